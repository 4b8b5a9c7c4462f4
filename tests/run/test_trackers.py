"""One tracker run with one step count, over all stages, whatever happens to the run: read back with the trackers' own
readers.
"""

from __future__ import annotations

import pytest
from curves import Curves, tensorboard_curves
from growth import run
from killed import at_call, killed
from rich.console import Console

from cit_fast import ContinualTrainer, learn
from cit_fast.data import TaskStream
from cit_fast.errors import ConfigError
from cit_fast.evaluation import read_run, read_stages
from cit_fast.evaluation.continual import continual_metrics
from cit_fast.run import trackers
from cit_fast.run.rollback import rollback, undo_rollback
from cit_fast.run.stage_trainer import StageTrainer


def mlflow_runs(experiment: str) -> list:
    from mlflow import MlflowClient

    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id])


@pytest.fixture
def watched(settings, tmp_path, monkeypatch):
    """Settings with two-step stages that log every step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no other
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    settings["training"] |= {"max_steps": 2, "logging_steps": 1, "save_steps": 1, "report_to": ["tensorboard"]}
    return settings


def steps_of(curves: Curves, name: str) -> list[int]:
    return [step for step, _ in curves[name]]


def test_one_step_count_over_all_stages(watched, stream, tmp_path):
    (folder,) = run(watched, stream, tmp_path / "runs", {"preset": "replay-ema", "replay": {"fraction": 0.2}}).values()
    curves, stages = tensorboard_curves(folder), read_stages(folder)
    assert steps_of(curves, "train/loss") == [1, 2, 3, 4, 5, 6]
    recorded = [round(loss, 4) for stage in stages for _, loss in stage.losses]
    assert [value for _, value in curves["train/loss"]] == pytest.approx(recorded, abs=1e-4)
    assert steps_of(curves, "train/learning_rate") == [1, 2, 3, 4, 5, 6]
    assert steps_of(curves, "train/balance_weight_mean") == [3, 4, 5, 6]  # averaged from the second stage on
    assert [stage for _, stage in curves["train/stage"]] == [1, 1, 2, 2, 3, 3]
    assert curves["stage/number"] == [(0, 0), (2, 1), (4, 2), (6, 3)]
    record = read_run(folder)
    for count, (step, value) in enumerate(curves["stage/AP"], start=1):
        expected = continual_metrics(record, stages[: count + 1])
        assert (step, value) == (2 * count, pytest.approx(expected.average_performance, abs=1e-3))
    assert steps_of(curves, "stage/forgetting") == [4, 6]
    assert curves["score/alpha"][-1][1] == pytest.approx(stages[-1].scores["alpha"], abs=1e-3)
    assert curves["replayed/alpha"] == [(4, stages[2].replayed["alpha"]), (6, stages[3].replayed["alpha"])]


@pytest.mark.parametrize("at", [(2, StageTrainer, "compute_loss"), (5, StageTrainer, "compute_loss")])
def test_killed_and_resumed_nothing_is_there_twice(watched, stream, tmp_path, at):
    assert killed(lambda: run(watched, stream, tmp_path / "runs", "sequential"), at_call(*at))
    (folder,) = run(watched, stream, tmp_path / "runs", "sequential").values()
    curves = tensorboard_curves(folder)
    assert steps_of(curves, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert steps_of(curves, "stage/number") == [0, 2, 4, 6]


def test_killed_between_a_stage_and_its_results(watched, stream, tmp_path):
    """The results of a stage that was committed and not logged come with the next start."""
    at = at_call(2, trackers.RunTrackers, "stage")  # the first call is of the untrained model
    assert killed(lambda: run(watched, stream, tmp_path / "runs", "sequential"), at)
    (folder,) = run(watched, stream, tmp_path / "runs", "sequential").values()
    assert tensorboard_curves(folder)["stage/number"] == [(0, 0), (2, 1), (4, 2), (6, 3)]


def test_what_a_rollback_took_back_stays_and_no_step_has_two_values(watched, stream, tmp_path):
    alpha, beta, gamma = stream
    (folder,) = run(watched, stream, tmp_path / "runs", "sequential").values()
    rollback(folder, 1)
    run(watched, TaskStream((alpha, gamma)), tmp_path / "runs", "sequential")
    curves = tensorboard_curves(folder)
    assert steps_of(curves, "train/loss") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert curves["stage/number"] == [(0, 0), (2, 1), (4, 2), (6, 3), (8, 2)]
    rollback(folder, 1)
    undo_rollback(folder)
    run(watched, TaskStream((alpha, gamma, beta)), tmp_path / "runs", "sequential")
    assert tensorboard_curves(folder)["stage/number"][-1] == (10, 3)


def test_a_run_can_be_watched_from_its_middle_on(watched, stream, tmp_path):
    """Who watches decides nothing: the run is the same, and the tracker gets what is recorded of earlier stages."""
    watched["training"]["report_to"] = "none"
    alpha, beta, gamma = stream
    (folder,) = run(watched, TaskStream((alpha, beta)), tmp_path / "runs", "sequential").values()
    watched["training"]["report_to"] = "tensorboard"
    run(watched, TaskStream((alpha, beta, gamma)), tmp_path / "runs", "sequential")
    curves = tensorboard_curves(folder)
    assert steps_of(curves, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert steps_of(curves, "stage/number") == [0, 2, 4, 6]


def test_learn_may_change_who_watches(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings["training"] |= {"max_steps": 1, "logging_steps": 1}
    settings["data"] |= {"tasks": ["units"], "train": 8, "test": 2, "max_length": 256}
    (folder,) = ContinualTrainer({**settings, "methods": ["sequential"]}, console=Console(quiet=True)).run()
    learn(folder, ["records"], Console(quiet=True), settings=["training.report_to=tensorboard"])
    assert steps_of(tensorboard_curves(folder), "stage/number") == [0, 1, 2]


def test_routing_general_abilities_and_violations(watched, stream, tmp_path):
    watched["evaluation"] |= {"general": True}
    (folder,) = run(watched, stream, tmp_path / "runs", "oracle").values()
    curves, stages = tensorboard_curves(folder), read_stages(folder)
    assert curves["general/change"][0] == (0, 0.0)
    assert curves["general/mean"][-1][1] == pytest.approx(stages[-1].general.score, abs=1e-3)
    assert steps_of(curves, "divergence/stream") == [0, 2, 4, 6]
    counted = sum(count for counts in stages[-1].routing.answers.values() for count in counts.values())
    assert sum(values[-1][1] for name, values in curves.items() if name.startswith("routed/")) == counted
    assert curves["stage/routing_accuracy"][-1][1] == 1.0


def test_mlflow_has_one_run_of_each_method(watched, stream, tmp_path):
    pytest.importorskip("mlflow")
    watched["training"]["report_to"] = ["mlflow"]
    watched["name"] = "watched"
    alpha, beta, gamma = stream
    methods = ("sequential", {"preset": "random-replay", "replay": {"fraction": 0.2}})
    run(watched, TaskStream((alpha, beta)), tmp_path / "runs", *methods)
    folders = run(watched, TaskStream((alpha, beta, gamma)), tmp_path / "runs", *methods)  # other tasks, the same runs
    found = {each.info.run_name: each for each in mlflow_runs("watched")}
    assert sorted(found) == ["random-replay-seed0", "sequential-seed0"]
    from mlflow import MlflowClient

    client = MlflowClient()
    for name, each in found.items():
        assert each.info.status == "FINISHED"
        assert each.data.params["training.max_steps"] == "2"
        run_id = each.info.run_id
        assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]
        history = client.get_metric_history(run_id, "stage/AP")
        metrics = continual_metrics(
            read_run(folders[name.removesuffix("-seed0")]), read_stages(folders[name.removesuffix("-seed0")])
        )
        assert history[-1].value == pytest.approx(metrics.average_performance)


def test_a_tracker_that_cannot_be_started_says_so_before_anything_is_trained(watched, stream, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no other
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    watched["training"]["report_to"] = ["mlflow"]
    with pytest.raises(ConfigError, match=r"training.report_to: mlflow cannot be started: .*nonsense"):
        run(watched, stream, tmp_path / "runs", "sequential")
    assert not list((tmp_path / "runs").rglob("stage.json"))


def test_a_tracker_that_fails_later_costs_its_curve_and_nothing_else(watched, stream, tmp_path, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    plain = TensorBoardTracker.log

    def log(self, values, step=None, **kwargs):
        if step >= 3:
            raise ConnectionError("the server has gone")
        return plain(self, values, step, **kwargs)

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    (folder,) = run(watched, stream, tmp_path / "runs", "sequential").values()
    assert len(read_stages(folder)) == 4
    assert caplog.text.count("the server has gone") == 1
