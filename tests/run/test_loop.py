from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from toy_runs import adapter

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.data import Example, Task, TaskStream
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.evaluation import read_predictions, read_run, read_stages
from cit_fast.evaluation.records import FORMAT_VERSION
from cit_fast.inference import continual_model as serving
from cit_fast.methods.objectives import CrossEntropy
from cit_fast.methods.replay import RandomReplay
from cit_fast.methods.routing.router import SavedRouter
from cit_fast.methods.stage import Assignment, Finished, Selection
from cit_fast.optim import BalanceEMA
from cit_fast.report.status import status
from cit_fast.run import cached_scores
from cit_fast.run.run_folder import RunFolder

ONE_STEP = {"max_steps": 1}
UNSEEN = {"untrained": False}
QUICK = {"training": ONE_STEP, "evaluation": UNSEEN}  # where a test is not about what is learned


def run(settings, stream, **more) -> dict[str, Path]:
    keys = {key: more.pop(key) for key in list(more) if key in {"methods", "adapter", "evaluation", "training", "data"}}
    merged = {**settings, **{k: {**settings[k], **v} if isinstance(v, dict) else v for k, v in keys.items()}}
    folders = ContinualTrainer(merged, stream=stream, console=Console(quiet=True), **more).run()
    return {folder.name: folder for folder in folders}


@pytest.fixture(scope="module")
def three_methods(toy_settings, stream, tmp_path_factory) -> dict[str, Path]:
    """The folders of three methods run together: only read them."""
    made = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIT_FAST_CACHE", str(made / "cache"))
        methods = ["sequential", "random-replay", "joint"]
        return run({**toy_settings, "output": str(made / "runs")}, stream, methods=methods)


def test_a_run_leaves_a_whole_record(three_methods):
    folders = three_methods
    for name, count in (("sequential", 4), ("random-replay", 4), ("joint", 2)):
        record, stages = read_run(folders[name]), read_stages(folders[name])
        assert (record.status, record.method_name, record.tasks) == ("finished", name, ["alpha", "beta", "gamma"])
        assert record.environment["effective_batch_size"] == 4
        assert [stage.index for stage in stages] == list(range(count))
        assert all(set(stage.scores) == {"alpha", "beta", "gamma"} for stage in stages)
        assert not (folders[name] / "checkpoints" / "01").exists()
    sequential, replay = read_stages(folders["sequential"]), read_stages(folders["random-replay"])
    assert [stage.replayed for stage in sequential] == [{}, {}, {}, {}]
    assert [stage.replayed for stage in replay] == [{}, {}, {"alpha": 2}, {"alpha": 2, "beta": 2}]
    assert [stage.steps for stage in sequential] == [0, 4, 4, 4]
    assert [stage.steps for stage in replay] == [0, 4, 5, 5]
    assert sequential[1].losses[0][0] == 2
    assert sequential[1].losses[-1][1] < sequential[1].losses[0][1]
    assert read_stages(folders["joint"])[1].trained == ["alpha", "beta", "gamma"]
    assert read_stages(folders["joint"])[1].train_examples == 48
    stored = read_predictions(folders["sequential"] / "stages/03/predictions/beta.jsonl")
    assert [entry.references for entry in stored] == [(f"beta {k}",) for k in range(100, 104)]
    assert sum(entry.score for entry in stored) / 4 == pytest.approx(sequential[3].scores["beta"])


def test_the_first_stage_is_the_same_with_and_without_replay(three_methods):
    first, second = (adapter(three_methods[name], 1) for name in ("sequential", "random-replay"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    later = [adapter(three_methods[name], 2) for name in ("sequential", "random-replay")]
    assert any(not torch.equal(later[0][name], later[1][name]) for name in later[0])


def test_the_average_is_what_is_kept(settings, stream, finished_run):
    class Watched:
        """BalanceEMAUpdate that remembers what the average was when it was copied."""

        averages = []  # noqa: RUF012  # of the class: each method trains with a copy of the object

        def begin(self, stage):
            pass

        def wrap(self, optimizer, stage):
            self.optimizer = BalanceEMA(optimizer)
            return self.optimizer

        def finish(self, optimizer, stage):
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.averages.append(sorted(float(self.optimizer.state[p]["average"].sum()) for p in parameters))
            self.optimizer.copy_averaged_to_parameters()
            return Finished()

        def summary(self, optimizer, stage):
            return self.optimizer.balance_summary()

    update = Watched()
    one = TaskStream(stream[:1])
    ours = run(settings, one, methods=[{"preset": "sequential", "name": "watched"}], update=update)["watched"]
    kept = sorted(float(tensor.sum()) for tensor in adapter(ours, 1).values())
    assert kept == pytest.approx(update.averages[0], abs=1e-6)
    assert kept != pytest.approx(sorted(float(t.sum()) for t in adapter(finished_run, 1).values()), abs=1e-6)
    assert read_run(ours).method["update"]["name"].endswith("Watched")


def test_balance_weights_are_recorded_per_step(settings, stream):
    folder = run(settings, TaskStream(stream[:2]), methods=["lcia-ema"], evaluation=UNSEEN)["lcia-ema"]
    assert read_stages(folder)[1].balance_weights == []  # when: from-second
    for stage in read_stages(folder)[2:]:
        assert [entry[0] for entry in stage.balance_weights] == [1, 2, 3, 4]
        assert stage.balance_weights[0][1:] == pytest.approx([0.01, 0.01, 0.01, 1.0])  # no gradient before the first
        assert all(0 <= low <= mean <= high <= 1 for _, mean, low, high, _ in stage.balance_weights)


def test_accumulated_steps_equal_whole_ones(settings, stream):
    settings["adapter"]["lora_dropout"] = 0.0
    stream = TaskStream(stream[:1])
    whole = run(settings, stream, methods=[{"preset": "sequential", "name": "whole"}])["whole"]
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings["output"] += "-halves"
    parts = run(settings, stream, methods=[{"preset": "sequential", "name": "parts"}], training=halves)["parts"]
    for ours, theirs in zip(read_stages(parts)[1:], read_stages(whole)[1:], strict=True):
        assert [loss for _, loss in ours.losses] == pytest.approx([loss for _, loss in theirs.losses], rel=1e-3)


def test_training_arguments_pass_through(settings, stream):
    training = {"bf16": True, "max_steps": 3, "lr_scheduler_type": "linear", "gradient_checkpointing": True}
    folder = run(settings, stream, methods=["lcia-ema"], training=training)["lcia-ema"]
    assert [stage.steps for stage in read_stages(folder)] == [0, 3, 3, 3]


def test_experts_are_cached_between_runs(settings, stream, monkeypatch):
    every, stream = {"experts": True, **UNSEEN}, TaskStream(stream[:2])
    first = read_run(run(settings, stream, methods=["sequential"], evaluation=every)["sequential"])
    assert set(first.experts) == {"alpha", "beta"}
    stages = read_stages(Path(settings["output"]) / "sequential")
    assert first.experts["alpha"] == stages[1].scores["alpha"]  # the first task is learned alone anyway
    trained = []
    prepare = CrossEntropy.prepare
    monkeypatch.setattr(CrossEntropy, "prepare", lambda self, stage: trained.append(1) or prepare(self, stage))
    again = read_run(run(settings, stream, methods=["random-replay"], evaluation=every)["random-replay"])
    assert again.experts == first.experts
    assert len(trained) == 2


def test_an_expert_is_shared_by_streams_that_differ_elsewhere(settings, stream):
    every, two = {"experts": True, **UNSEEN}, TaskStream(stream[:2])
    run(settings, two, methods=["sequential"], evaluation=every, training=ONE_STEP)
    shorter, seen = ({**settings, "output": settings["output"] + name} for name in ("-shorter", "-seen"))
    last = TaskStream(two[1:])
    record = read_run(run(shorter, last, methods=["sequential"], evaluation=every, training=ONE_STEP)["sequential"])
    assert set(record.experts) == {"beta"}
    run(seen, two, methods=["sequential"], evaluation={**every, "tasks": "seen"}, training=ONE_STEP)
    assert len(list((Path(settings["output"]).parent / "cache" / "experts").glob("*/run.json"))) == 2


class OneSetPerTask(SavedRouter):
    """Every task trains a set of its own, and answers with it."""

    sets = ()

    def assign(self, stage):
        return Assignment(f"set-{stage.task.name}")

    def answer(self, examples, stage):
        return [f"set-{example.task}" for example in examples]


def test_a_router_with_several_sets_trains_and_answers_with_each(settings, stream):
    method, seen = {"preset": "sequential", "name": "own"}, {"tasks": "seen"}
    with pytest.raises(ConfigError, match="answers with the adapter set 'set-beta', which no task has trained yet"):
        run({**settings, "output": settings["output"] + "-all"}, stream, methods=[method], router=OneSetPerTask())
    folder = run(settings, stream, methods=[method], router=OneSetPerTask(), evaluation=seen)["own"]
    stages = read_stages(folder)
    assert [stage.adapter for stage in stages[1:]] == ["set-alpha", "set-beta", "set-gamma"]
    adapters = sorted(path.relative_to(folder / "stages") for path in folder.glob("stages/*/adapters/set-*"))
    expected = [f"{k:02d}/adapters/set-{name}" for k, name in enumerate(stream.names, start=1)]
    assert list(map(str, adapters)) == expected  # where each was trained
    assert [stage.scores["alpha"] for stage in stages[1:]] == [
        stages[1].scores["alpha"]
    ] * 3  # and nothing is forgotten
    with pytest.raises(RunError, match="load one of your own with its class"):
        ContinualModel.from_run(folder, device="cpu")
    model = ContinualModel.from_run(folder, device="cpu", router=OneSetPerTask.load(folder / "stages/03/router"))
    assert model.route([task.test[0] for task in stream]) == ["set-alpha", "set-beta", "set-gamma"]


@pytest.mark.parametrize("name", ["default", "a.b", ""])
def test_a_name_that_peft_cannot_keep(settings, stream, name):
    class Named(OneSetPerTask):
        def assign(self, stage):
            return Assignment(name)

    with pytest.raises(ConfigError, match="cannot name an adapter set"):
        run(settings, stream, methods=[{"preset": "sequential", "name": "own"}], router=Named())


def test_only_seen_tasks_when_asked(settings, stream):
    folder = run(settings, stream, methods=["sequential"], evaluation={"tasks": "seen", "untrained": False})[
        "sequential"
    ]
    assert [sorted(stage.scores) for stage in read_stages(folder)] == [
        [],
        ["alpha"],
        ["alpha", "beta"],
        ["alpha", "beta", "gamma"],
    ]


def test_a_sample_of_the_earlier_tasks_is_answered_and_all_after_the_last(settings, stream):
    asked = {"tasks": {"sample": 0}, "untrained": False}
    folder = run(settings, stream, methods=["sequential"], evaluation=asked)["sequential"]
    assert [sorted(stage.scores) for stage in read_stages(folder)] == [
        [],
        ["alpha"],
        ["beta"],
        ["alpha", "beta", "gamma"],
    ]
    assert [task["now"] is not None for task in status(folder)["tasks"]] == [True] * 3


def test_full_fine_tuning(settings, stream):
    folder = run(settings, stream, methods=["sequential"], adapter=None, **QUICK)["sequential"]
    assert (folder / "stages/03/model/model.safetensors").exists()
    assert ContinualModel.from_run(folder, device="cpu").generate(["Say alpha, then the number.\n\n100"])


def test_a_finished_run_says_so(settings, stream, sequential):
    said = io.StringIO()
    ContinualTrainer(
        {**settings, "methods": ["sequential"]}, stream=stream, console=Console(file=said, width=200)
    ).run()
    assert "already finished, nothing to do" in said.getvalue()


def test_own_parts_by_object_and_by_dotted_path(settings, stream):
    class Everything:
        def select(self, stage):
            return Selection([example for task in stage.seen for example in task.train])

    own = {"preset": "sequential", "name": "own"}
    folder = run(settings, stream, methods=[own], replay=Everything(), **QUICK)["own"]
    assert read_stages(folder)[3].replayed == {"alpha": 16, "beta": 16}
    method = {"name": "dotted", "replay": {"name": "cit_fast.methods.replay.RandomReplay", "per_task": 5}}
    folder = run(settings, stream, methods=[method], **QUICK)["dotted"]
    assert read_stages(folder)[3].replayed == {"alpha": 5, "beta": 5}


def test_an_object_that_is_no_part(settings, stream):
    with pytest.raises(ConfigError, match=r"objective: a RandomReplay is no objective: it has no prepare\(\)"):
        run(settings, stream, methods=["sequential"], objective=RandomReplay())

    class Listing:
        def select(self, stage):
            return list(stage.seen)

    with pytest.raises(ConfigError, match=r"Listing.select\(\) returned a list; return a Selection"):
        run(settings, stream, methods=["sequential"], replay=Listing())


def test_one_folder_one_configuration(settings, stream, sequential):
    with pytest.raises(RunError, match=r"another configuration \(training.learning_rate was 0.01, now 0.5\)"):
        run(settings, stream, methods=["sequential"], training={"learning_rate": 0.5})
    shorter = TaskStream(stream.tasks[:2])
    with pytest.raises(RunError, match="has 3 tasks, of which this configuration names the first 2"):
        run(settings, shorter, methods=["sequential"])
    assert len(read_stages(sequential)) == 4


def test_the_model_and_given_parts_are_part_of_the_configuration(settings, stream, tiny_model_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    settings["model"], stream = {"name": str(model)}, TaskStream(stream[:2])
    run(settings, stream, training=ONE_STEP, methods=["sequential"])
    own = [{"preset": "sequential", "name": "own"}]
    run(settings, stream, training=ONE_STEP, methods=own, replay=RandomReplay(0.5))
    with pytest.raises(RunError, match=r"method.replay.options.fraction was 0.5, now 1.0"):
        run(settings, stream, training=ONE_STEP, methods=own, replay=RandomReplay(1.0))
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "model"))
    with pytest.raises(RunError, match="weights was"):
        run(settings, stream, training=ONE_STEP, methods=["sequential"])


def test_a_part_does_not_carry_over_to_the_next_method(settings, stream):
    class Counting:
        calls = 0

        def select(self, stage):
            self.calls += 1
            return Selection(list(stage.seen[0].train[: self.calls]))

    folders = run(
        settings,
        stream,
        methods=[{"preset": "sequential", "name": "one"}, {"preset": "sequential", "name": "two"}],
        replay=Counting(),
        **QUICK,
    )
    for folder in folders.values():
        assert [sum(stage.replayed.values()) for stage in read_stages(folder)] == [0, 0, 1, 2]


def test_a_run_that_diverges_says_so(settings, stream):
    with pytest.raises(RunError, match=r"alpha: the training loss is (nan|inf) at step"):
        run(settings, stream, methods=["sequential"], training={"learning_rate": 1e30, "logging_steps": 1})
    quiet = {**settings, "output": settings["output"] + "-quiet"}
    with pytest.raises(RunError, match=r"stage 1 \(alpha\): .* is not finite after training"):
        run(quiet, stream, methods=["sequential"], training={"learning_rate": 1e30, "logging_steps": 100})


def test_examples_that_cannot_fit(settings, stream):
    long = Task("long", tuple(Example("word " * 200, references=("x",)) for _ in range(4)), test=stream[0].test)
    skip = {"on_overflow": "skip"}
    with pytest.raises(DataError, match="task 'long': no training example fits"):
        run(settings, TaskStream((long,)), methods=["sequential"], data=skip)
    mixed = Task("mixed", stream[0].train + long.train, test=stream[0].test + long.train[:1], metric="token_f1")
    settings["output"] += "-mixed"
    stage = read_stages(run(settings, TaskStream((mixed,)), methods=["sequential"], data=skip)["sequential"])[1]
    assert (stage.skipped, stage.test_skipped) == (4, 1)
    only = Task("only", stream[0].train, test=long.train)
    settings["output"] += "-only"
    with pytest.raises(DataError, match="task 'only': every test example is longer"):
        run(settings, TaskStream((only,)), methods=["sequential"], data=skip)


def test_a_task_with_nothing_to_train(settings, stream):
    with pytest.raises(DataError, match="task 'empty' has no training examples"):
        ContinualTrainer(settings, stream=TaskStream((Task("empty", (), test=stream[0].test),)))


def test_one_folder_one_process(settings, stream):
    folder = Path(settings["output"]) / "sequential"
    with RunFolder(folder).locked(), pytest.raises(RunError, match="another cit-fast run is working in this folder"):
        run(settings, stream, methods=["sequential"])
    run(settings, stream, methods=["sequential"])


def test_a_folder_of_something_else_is_left_alone(settings, stream):
    folder = Path(settings["output"]) / "sequential"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"not empty and not a cit-fast run \('thesis.tex' is there\)"):
        run(settings, stream, methods=["sequential"])
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_way(settings, stream):
    Path(settings["output"]).mkdir()
    (Path(settings["output"]) / "sequential").write_text("x")
    with pytest.raises(RunError, match="a file is in the way"):
        run(settings, stream, methods=["sequential"])


def test_a_run_of_another_format_version(settings, stream, sequential, edit_record):
    edit_record(sequential / "run.json", format_version=99)
    with pytest.raises(RunError, match="written in format version 99"):
        run(settings, stream, methods=["sequential"])


def test_a_stage_gone_from_the_middle(settings, stream, sequential):
    (sequential / "stages" / "02").rename(sequential / "stages" / "gone")
    with pytest.raises(RunError, match="stage 02 is missing although stage 03 is there"):
        run(settings, stream, methods=["sequential"])


def test_model_folder_without_tokenizer_or_model(settings, stream, tiny_model_folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny_model_folder / name).read_bytes())
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        ContinualTrainer({**settings, "model": {"name": str(bare)}}, stream=stream).run()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((tiny_model_folder / name).read_bytes())
    (bare / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        ContinualTrainer({**settings, "model": {"name": str(bare)}}, stream=stream, console=Console(quiet=True)).run()
    with pytest.raises(ConfigError, match="no folder"):
        ContinualTrainer({**settings, "model": {"name": str(tmp_path / "nothing")}}, stream=stream).run()


def test_a_tokenizer_that_cannot_be_read_is_one_line(settings, stream, tiny_model_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_folder, broken)
    settings["model"] = {"name": str(broken)}
    for damage in (lambda path: path.write_text("{}"), lambda path: path.unlink()):
        damage(broken / "tokenizer.json")
        with pytest.raises(ConfigError, match="holds no tokenizer that can be read") as caught:
            ContinualTrainer(settings, stream=stream).run()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("evaluation", {"split": "dev"}, "task 'alpha' has no dev examples"),
        ("training", {"lr_scheduler_type": "zigzag"}, "training"),
        ("adapter", {"target_modules": ["no_such_layer"]}, "adapter: Target modules"),
        ("data", {"max_length": 5}, "data.max_length"),
        ("data", {"max_length": 8}, "tokens, 8 allowed, and without its input it is still too long; raise max_length"),
        ("evaluation", {"max_new_tokens": 96}, "leaves no room for a prompt"),
    ],
)
def test_settings_that_cannot_work(settings, stream, key, value, message):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        run(settings, stream, methods=["sequential"], **{key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_does_not_fit_is_named_before_anything_is_written(settings, stream, split):
    """Also an example of the last task, which would be read when all the others are trained."""
    alpha, beta, gamma = stream
    long = replace(getattr(gamma, split)[-1], instruction="Say it all. " * 40, source="gamma.json: record 7")
    late = replace(gamma, **{split: (*getattr(gamma, split)[:-1], long)})
    tasks = TaskStream((alpha, beta, late))
    with pytest.raises(DataError, match=r"gamma.json: record 7: \d+ tokens, \d+ allowed, and without its input"):
        run(settings, tasks, methods=["sequential"])
    assert not Path(settings["output"]).exists()
    folder = run(settings, tasks, methods=["sequential"], data={"on_overflow": "skip"}, **QUICK)["sequential"]
    last = read_stages(folder)[-1]
    assert (last.skipped if split == "train" else last.test_skipped) == 1


def test_use_a_run_afterwards(settings, stream, sequential):
    stored = read_predictions(sequential / "stages/03/predictions/gamma.jsonl")
    model = ContinualModel.from_run(sequential, device="cpu")
    again = model.generate(list(stream[2].test), max_new_tokens=6)
    assert again == [entry.prediction for entry in stored]
    adapter_config = json.loads((sequential / "stages/03/adapters/shared/adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == settings["model"]["name"]


def test_a_run_without_a_stage_cannot_answer(settings, stream, tmp_path):
    with pytest.raises(RunError, match=r"run\.json: not there"):
        ContinualModel.from_run(tmp_path)


def test_a_stage_without_its_weights_is_damaged(settings, stream, sequential):
    shutil.rmtree(sequential / "stages/03/adapters")
    with pytest.raises(RunError, match="holds neither adapters nor a model"):
        ContinualModel.from_run(sequential)


def test_a_runs_own_record_cannot_ask_for_foreign_code(settings, stream, sequential, monkeypatch, edit_record):
    config = json.loads((sequential / "run.json").read_text())["config"]
    config["model"]["trust_remote_code"] = True
    edit_record(sequential / "run.json", config=config)
    asked = []
    load = serving.load_model
    monkeypatch.setattr(serving, "load_model", lambda path, config: asked.append(config) or load(path, config))
    ContinualModel.from_run(sequential, device="cpu")
    assert [config.trust_remote_code for config in asked] == [False]
    edit_record(sequential / "run.json", config={**config, "version": 9})
    with pytest.raises(RunError, match=r"run.json: config: version: configuration version 9"):
        ContinualModel.from_run(sequential)


def test_a_damaged_adapter_is_named(settings, stream, sequential):
    weights = sequential / "stages/03/adapters/shared/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(
        RunError, match=r"no adapter set can answer: .*adapters/shared/adapter_model\.safetensors: damaged"
    ):
        ContinualModel.from_run(sequential)


def test_scores_cached_in_records_of_another_format_are_not_read(settings, stream, monkeypatch):
    run(settings, TaskStream(stream[:1]), methods=["sequential"])
    untrained = Path(settings["output"]).parent / "cache" / "untrained"
    monkeypatch.setattr(cached_scores, "_VERSIONS", ("0.0.1", *cached_scores._VERSIONS[1:]))
    settings["output"] += "-again"
    run(settings, TaskStream(stream[:1]), methods=["sequential"])
    assert len(list(untrained.glob("*/stages/00"))) == 2
    assert FORMAT_VERSION in cached_scores._VERSIONS
