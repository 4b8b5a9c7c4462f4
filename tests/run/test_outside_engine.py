"""Test prompts answered by an inference server: the answers of the model here, whatever fails on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from growth import predictions
from launches import ACCELERATE, launch
from lora_server import BARE, LoraServer
from rich.console import Console
from served import served

from cit_fast import ContinualTrainer
from cit_fast.data import TaskStream
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation import read_run, read_stages
from cit_fast.run.config import RunConfig


@pytest.fixture
def here(settings, stream):
    """Scores and answers of runs whose own model answers."""

    def run(method: str) -> Path:
        own = {**settings, "methods": [method], "output": settings["output"] + "-here"}
        return ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()[0]

    return run


def run(settings, stream, url, method="sequential", **engine) -> Path:
    evaluation = {**settings["evaluation"], "engine": {"openai": url, **engine}}
    own = {**settings, "methods": [method], "evaluation": evaluation}
    return ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()[0]


def answers(folder: Path, stream) -> list[list[str]]:
    stages = range(len(read_stages(folder)))
    return [
        [each.prediction for each in predictions(folder, stage, task.name)] for stage in stages for task in stream.tasks
    ]


@pytest.mark.parametrize(
    ("method", "kind"),
    [("switch-tokens", "vllm"), ("oracle", "sglang"), ("o-lora", "vllm")],
)
def test_a_server_answers_as_the_model_here(settings, stream, here, tiny_model_folder, tmp_path, method, kind):
    stand_in = LoraServer(tiny_model_folder, kind)
    with served(stand_in.app) as root:
        there = run(settings, stream, f"{root}/v1", method)
    own = here(method)
    assert answers(there, stream) == answers(own, stream)
    assert [stage.scores for stage in read_stages(there)] == [stage.scores for stage in read_stages(own)]
    assert stand_in.asked[BARE] >= 12  # the untrained model
    assert len(stand_in.loaded) >= 3
    assert not stand_in.sets  # all unloaded again
    assert not list((tmp_path / "cache" / "engine-sets").iterdir())


def test_requests_that_fail_are_made_again_and_answers_kept(settings, stream, tiny_model_folder, monkeypatch):
    monkeypatch.setenv("CIT_FAST_ENGINE_API_KEY", "secret-key")
    stand_in = LoraServer(tiny_model_folder)
    stand_in.failures, stand_in.loses = [500, 429, 503], True
    with served(stand_in.app) as root:
        first = run(settings, stream, f"{root}/v1")
        asked, loaded = sum(stand_in.asked.values()), len(stand_in.loaded)
        settings["output"] += "-again"
        again = run(settings, stream, f"{root}/v1")
    assert answers(first, stream) == answers(again, stream)
    assert sum(stand_in.asked.values()) == asked  # the same weights were asked the same before
    assert len(stand_in.loaded) == loaded
    assert stand_in.keys == {"Bearer secret-key"}
    assert "secret-key" not in (first / "run.json").read_text()


def test_a_run_goes_on_when_the_server_is_back_elsewhere(settings, stream, here, tiny_model_folder):
    stand_in = LoraServer(tiny_model_folder)
    with served(stand_in.app) as root:
        stand_in.failures = [400]
        with pytest.raises(RunError, match=r"no answer to .* of 12 prompts .HTTP 400") as error:
            run(settings, stream, f"{root}/v1", attempts=1)
        assert "\n" not in str(error.value)
        assert not stand_in.sets
        run(settings, TaskStream(stream.tasks[:2]), f"{root}/v1", attempts=1)
    with served(stand_in.app) as root:
        folder = run(settings, stream, f"{root}/v1", attempts=2)
    assert len(read_stages(folder)) == 4
    own = here("sequential")
    for task in stream.tasks:
        said = [[each.prediction for each in predictions(one, 3, task.name)] for one in (folder, own)]
        assert said[0] == said[1]


def test_another_base_there_is_asked_anew(settings, stream, tiny_model_folder):
    stand_in = LoraServer(tiny_model_folder)
    with served(stand_in.app) as root:
        run(settings, TaskStream(stream.tasks[:1]), f"{root}/v1")
        asked, stand_in.base = sum(stand_in.asked.values()), "the/base-in-4-bits"
        settings["output"] += "-again"
        run(settings, TaskStream(stream.tasks[:1]), f"{root}/v1")
    assert sum(stand_in.asked.values()) == asked + 4  # the untrained scores are kept, the stage's answers are not


@pytest.mark.slow
def test_two_processes_share_prompts_and_batches_of_tokens(two_tasks, tiny_model_folder, tmp_path):
    """Each asks the server half, and has a batch of every pair; one that takes two a step sees the same pairs."""
    del two_tasks["training"]["per_device_train_batch_size"]
    two_tasks["training"] |= {"tokens_per_batch": 160, "num_train_epochs": 2}
    two_tasks["methods"] = ["oracle"]
    one_process = {**two_tasks, "output": str(tmp_path / "one")}
    one_process["training"] = {**two_tasks["training"], "gradient_accumulation_steps": 2}
    (one,) = ContinualTrainer(one_process, console=Console(quiet=True)).run()
    stand_in = LoraServer(tiny_model_folder)
    with served(stand_in.app) as root:
        evaluation = {**two_tasks["evaluation"], "engine": {"openai": f"{root}/v1"}}
        done = launch(ACCELERATE, [{**two_tasks, "evaluation": evaluation}], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert stand_in.loaded
    assert not stand_in.sets
    two = Path(two_tasks["output"]) / "oracle"
    assert read_run(two).environment["effective_batch_tokens"] == 2 * 160
    for ours, theirs in zip(read_stages(two)[1:], read_stages(one)[1:], strict=True):
        assert len(ours.losses) == ours.steps == theirs.steps >= 4
        assert [loss for _, loss in ours.losses] == pytest.approx([loss for _, loss in theirs.losses], rel=1e-5)
    for task in ("alpha", "beta"):
        said = [[each.prediction for each in predictions(folder, 2, task)] for folder in (two, one)]
        assert said[0] == said[1]


def test_a_server_that_is_not_there_is_named_before_a_folder_is_made(settings, stream, tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation.engine: http://127.0.0.1:9/v1: Connection error"):
        run(settings, stream, "http://127.0.0.1:9/v1", attempts=1)
    assert not (tmp_path / "runs").exists()


def test_a_server_that_cannot_load_sets_says_how_to_start_it(settings, stream, tiny_model_folder):
    with (
        served(LoraServer(tiny_model_folder, loads=False).app) as root,
        pytest.raises(RunError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING") as error,
    ):
        run(settings, stream, f"{root}/v1", attempts=1)
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_there(settings, stream, tiny_model_folder):
    with (
        served(LoraServer(tiny_model_folder).app) as root,
        pytest.raises(ConfigError, match="does not serve 'another'; it has the/base"),
    ):
        run(settings, stream, f"{root}/v1", model="another")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluation": {"engine": {"openai": "http://localhost:8001"}}}, "expected an address like"),
        (
            {"evaluation": {"engine": {"openai": "http://a/v1"}, "decode": "labels"}},
            "needs the model's own predictions",
        ),
        ({"evaluation": {"engine": {"openai": "http://me:secret@a/v1"}}}, "openai: carries credentials"),
        (
            {"evaluation": {"engine": {"openai": "http://a/v1"}}, "adapter": {"r": 4, "use_dora": True}},
            "is more than that",
        ),
        (
            {"evaluation": {"engine": {"openai": "http://a/v1"}}, "adapter": {"alpha_pattern": {"q_proj": 4}}},
            "one rank and one alpha",
        ),
        ({"evaluation": {"engine": {"openai": "http://a/v1"}}, "adapter": None}, "trains the model itself"),
        ({"evaluation": {"engine": {"openai": "http://a/v1"}}, "methods": ["osft"]}, "'osft' trains the model itself"),
    ],
)
def test_what_a_server_cannot_answer_is_refused(settings, change, said):
    evaluation = {**settings["evaluation"], **change.get("evaluation", {})}
    with pytest.raises(ValueError, match=said):
        RunConfig.model_validate({**settings, **change, "evaluation": evaluation})
