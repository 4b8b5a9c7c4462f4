"""KPIG inside ``ContinualTrainer``: presets at one budget, records, killed and resumed, two processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ablations import spelled
from killed import at_call, killed
from launches import ACCELERATE, TORCHRUN, launch
from rich.console import Console
from toy_runs import adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task, TaskStream
from cit_fast.errors import ConfigError
from cit_fast.evaluation import read_run, read_stages
from cit_fast.evaluation.records import ObjectiveRecord
from cit_fast.key_parts import teacher as frozen
from cit_fast.key_parts.gain import predictive_entropy
from cit_fast.key_parts.wordings import Wording, write_pools
from cit_fast.methods.objectives import KPIG, kpig, plain_inputs
from cit_fast.methods.replay import kpig as replay
from cit_fast.models import kept_tensors
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run import stage_evaluation, stage_trainer

METHODS = ["random-replay", "kpig", "kpig-no-mask", "kpig-no-jsd", "kpig-fixed-temperature"]
NAMES = ("alpha", "beta", "gamma")


def make_task(name: str, size: int = 16, key_parts: bool = True) -> Task:
    def examples(count, start):
        text = f"Say {name}, then the number in digits."
        spans = ((4, 4 + len(name)), (text.index("in"), len(text) - 1)) if key_parts else ()
        return tuple(Example(text, str(k), (f"{name} {k}",), name, spans) for k in range(start, start + count))

    return Task(name, examples(size, 0), (), examples(2, 100), metric="token_f1")


@pytest.fixture(scope="module")
def stream() -> TaskStream:
    return TaskStream(tuple(map(make_task, NAMES)))


@pytest.fixture
def settings(settings):
    settings["evaluation"] = {"max_new_tokens": 3, "untrained": False}
    settings["training"]["logging_steps"] = 1
    return settings


def run(settings, stream, **more) -> dict[str, list]:
    folders = ContinualTrainer({**settings, **more}, stream=stream, console=Console(quiet=True)).run()
    return {folder.name: read_stages(folder) for folder in folders}


def losses(stages) -> list[list[float]]:
    return [[loss for _, loss in stage.losses] for stage in stages]


def test_presets_at_the_budget_of_random_replay(settings, stream):
    training = {**settings["training"], "max_steps": 2, "save_strategy": "no"}
    runs = run(settings, stream, methods=spelled(METHODS, 0.1), training=training)
    totals = {name: [sum(stage.replayed.values()) for stage in stages] for name, stages in runs.items()}
    assert totals == {name: [0, 0, 2, 4] for name in METHODS}
    for stage in runs["kpig-no-mask"][2:]:
        entropies = stage.replay.details["predictive_entropy"]
        assert list(entropies) == list(NAMES[: stage.index - 1])
        assert stage.replay.budgets[max(entropies, key=entropies.get)] > 0
        assert stage.replay.gains == {}
    for name in ("kpig", "kpig-no-jsd", "kpig-fixed-temperature"):
        for stage in runs[name][2:]:
            gains, budgets = stage.replay.gains, stage.replay.budgets
            assert list(gains) == list(NAMES[: stage.index - 1])
            assert stage.replayed == {name: share for name, share in budgets.items() if share}
            assert budgets[min(gains, key=gains.get)] > 0
    last = runs["kpig"][3]
    assert last.objective.compared == 16 + 4
    assert last.objective.without_key_parts == 0
    assert set(last.objective.gains) == {"gamma", *(name for name, share in last.replayed.items() if share)}
    assert last.objective.seconds > 0
    (said,) = last.objective.notes
    assert said.startswith("No pool of wordings is given")
    assert runs["kpig-no-jsd"][3].objective == ObjectiveRecord(notes=[said])
    curves = [losses(runs[name]) for name in METHODS[1:]]
    assert all(curves.count(curve) == 1 for curve in curves)  # each is a method of its own
    folder = Path(settings["output"]) / "kpig"
    assert not list(folder.rglob("frozen*"))  # gone with the stage


def test_cit_fast_replays_compares_and_averages(settings, stream):
    names = ["cit-fast", "cit-fast-no-replay", "cit-fast-no-objective", "cit-fast-no-update"]
    training = {**settings["training"], "max_steps": 1}
    for name, stages in run(settings, stream, methods=spelled(names), training=training).items():
        without = name.rpartition("-no-")[2]
        assert [sum(stage.replayed.values()) for stage in stages] == [
            0,
            0,
            *((0, 0) if without == "replay" else (2, 4)),
        ]
        assert [bool(stage.objective.gains) for stage in stages[1:]] == [without != "objective"] * 3
        averaged = [False, True, True] if without != "update" else [False] * 3  # when: from-second
        assert [bool(stage.balance_weights) for stage in stages[1:]] == averaged


def test_full_fine_tuning_and_what_the_data_does_not_say(settings, stream):
    """No adapter: the head is trained, too. A task without key parts: they are discovered, or left out."""
    mixed = TaskStream((make_task("alpha"), make_task("beta", key_parts=False)))
    settings["adapter"] = None
    settings["training"]["learning_rate"] = 1e-4
    methods = [
        {
            "preset": "kpig",
            "name": name,
            "replay": {"key_parts": source, "tasks": None, "instances": None},
            "objective": {"key_parts": source},
        }
        for name, source in (("discovered", "auto"), ("given", "data"))
    ]
    runs = run(settings, mixed, methods=methods)
    assert [stage.objective.compared for stage in runs["discovered"][1:]] == [16, 16 + 2]
    assert [stage.objective.without_key_parts for stage in runs["given"][1:]] == [0, 16]
    assert runs["given"][2].objective.notes[0].startswith("16 of 18 examples have no key parts")
    kept = list((Path(settings["output"]) / "discovered" / "replay").rglob("*.json"))
    assert len(kept) == 1
    assert json.loads(kept[0].read_text())["key_parts"]


def test_accumulated_micro_batches_are_one_batch(settings, stream):
    settings["adapter"]["lora_dropout"], stream = 0.0, TaskStream(stream[:1])
    method = {"preset": "kpig", "objective": {"lambda_": 5.0}}
    whole = run(settings, stream, methods=[{**method, "name": "whole"}])["whole"]
    training = {**settings["training"], "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    parts = run(settings, stream, methods=[{**method, "name": "parts"}], training=training)["parts"]
    for ours, theirs in zip(losses(parts), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


def test_mixed_precision_runs(settings, stream):
    """A logit is rounded by each product before it, to about the root of their number; a loss is of two such sums."""
    one = TaskStream(stream[:1])
    mixed = run(settings, one, methods=["kpig"], training={**settings["training"], "bf16": True})["kpig"]
    plain = run(settings, one, methods=[{"preset": "kpig", "name": "plain"}])["plain"]
    model = AutoModelForCausalLM.from_pretrained(settings["model"]["name"])
    with torch.no_grad():
        size = model(torch.arange(400).view(4, 100)).logits.square().mean().sqrt().item()
    deviation = 2.0**-8 * (7 * model.config.num_hidden_layers + 1) ** 0.5 * size
    (ours, *later), (theirs, *_) = losses(mixed)[1], losses(plain)[1]
    assert 0 < abs(ours - theirs) < 4 * 2**0.5 * deviation < 2e-3 * theirs
    assert min(later) < ours


def test_a_users_own_objective(settings, stream):
    class Own:
        def prepare(self, stage):
            inputs = plain_inputs(stage, stage.examples)
            return replace(inputs, record=ObjectiveRecord(details={"examples": len(stage.examples)}))

        def __call__(self, model, batch, num_items):
            assert set(batch) == {"input_ids", "attention_mask", "labels"}
            return model(**batch).loss

    folders = ContinualTrainer(
        {**settings, "methods": ["sequential"]},
        stream=TaskStream(stream[:1]),
        objective=Own(),
        console=Console(quiet=True),
    ).run()
    assert read_stages(folders[0])[1].objective.details == {"examples": 16}


# ------------------------------------------------------------------------------------------------ killed and resumed


# One run is killed at all of them, one after another: calls are counted from where it went on.
MOMENTS = {
    "inside the first frozen pass": at_call(2, frozen, "hidden_of"),
    "before its states are written": at_call(1, kept_tensors, "save_file"),
    "while the seen task is scored": at_call(1, replay, "information_gain"),
    "inside a step of stage 2, after a checkpoint": at_call(4, kpig, "masked_jsd"),
    "while a checkpoint of stage 2 is made": at_call(1, stage_trainer, "mark_complete"),
    "when stage 2 is trained, and not committed": at_call(1, stage_evaluation, "evaluate"),
}


def outcome(folder: Path) -> list:
    plain = [stage.objective and replace(stage.objective, seconds=0) for stage in read_stages(folder)]
    return [(s.replayed, s.replay, own, s.losses, s.scores) for s, own in zip(read_stages(folder), plain, strict=True)]


def test_kill_at_any_moment_and_go_on_with_the_same_bits(settings, stream, tmp_path):
    two = TaskStream(stream[:2])
    run({**settings, "methods": ["kpig"], "output": str(tmp_path / "whole")}, two)
    expected, folder = tmp_path / "whole" / "kpig", Path(settings["output"]) / "kpig"
    for moment, arm in MOMENTS.items():
        assert killed(lambda: run(settings, two, methods=["kpig"]), arm), moment
    run(settings, two, methods=["kpig"])
    assert outcome(folder) == outcome(expected)
    for stage in (1, 2):
        ours, theirs = adapter(folder, stage), adapter(expected, stage)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), stage
    assert not list(folder.rglob("*frozen*"))


def test_a_resumed_stage_reads_the_states_it_left(settings, stream, monkeypatch):
    two = {**settings, "methods": ["kpig"]}
    stages = TaskStream(stream[:1])
    assert killed(lambda: run(two, stages), at_call(4, kpig, "masked_jsd"))
    folder = Path(settings["output"]) / "kpig"
    assert len(list(folder.rglob("frozen-00000-of-00001.safetensors"))) == 1
    monkeypatch.setattr(frozen, "hidden_of", lambda *_, **__: pytest.fail("worked out again"))
    assert len(run(two, stages)["kpig"]) == 2


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.mark.slow
@pytest.mark.parametrize(("full", "sharded"), [(True, False), (False, True)], ids=["ddp-full", "fsdp2-lora"])
def test_two_processes_equal_one(settings, stream, tmp_path, full, sharded):
    names = NAMES[:2]
    for task in stream[:2]:
        folder = tmp_path / task.name
        folder.mkdir()
        for split, examples in (("train", task.train), ("test", task.test)):
            records = [
                {"instruction": e.instruction, "input": e.input, "output": e.references[0],
                 "key_parts": list(e.key_part_texts)}
                for e in examples
            ]  # fmt: skip
            (folder / f"{split}.json").write_text(json.dumps(records))
    settings["data"] |= {"dev": 0, "tasks": [{"path": str(tmp_path / name)} for name in names]}
    settings["adapter"] = None if full else {**settings["adapter"], "lora_dropout": 0.0}
    settings["training"]["learning_rate"] = 1e-3
    # Four replayed examples, and none of the 16 held out for a dev set: in two processes Accelerate fills a last batch
    # that is not full up with the first examples of the epoch, so its loss would be another one.
    method = {
        "preset": "kpig",
        "objective": {"lambda_": 2.0, "batch_size": 4},
        "replay": {"per_task": 4, "tasks": None, "instances": None},
    }
    settings["methods"] = [method]
    ContinualTrainer(settings, console=Console(quiet=True)).run()
    one = Path(settings["output"]) / "kpig"

    settings["output"] += "-two"
    settings["training"]["per_device_train_batch_size"] = 2
    if sharded:
        settings["training"] |= {"use_cpu": False, "fsdp": True}
    done = launch(TORCHRUN if sharded else ACCELERATE, [settings], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    two = Path(settings["output"]) / "kpig"
    assert read_run(two).status == "finished"
    for ours, theirs in zip(read_stages(two)[1:], read_stages(one)[1:], strict=True):
        assert ours.replayed == theirs.replayed
        for part in ("replay", "objective"):
            gains, expected = (getattr(getattr(stage, part), "gains", {}) for stage in (ours, theirs))
            assert gains == pytest.approx(expected, abs=1e-5)
        assert ours.objective.compared == theirs.objective.compared == 12 + 4 * ours.index
        assert [loss for _, loss in ours.losses] == pytest.approx([loss for _, loss in theirs.losses], rel=1e-5)


def test_the_options_of_a_preset_reach_its_parts(settings, stream):
    method = {"preset": "kpig", "objective": {"temperature": 1.0, "lambda_": 0.5}}
    trainer = ContinualTrainer({**settings, "methods": [method]}, stream=stream, console=Console(quiet=True))
    options = trainer.config.methods[0].objective.options
    assert options == {"instructions": "pool", "temperature": 1.0, "lambda_": 0.5}
    assert KPIG(**options).temperature == 1.0


def test_the_budget_of_the_paper(settings, stream):
    """M = N = 10, capped by what there is: both earlier tasks, ten instances of each."""
    training = {**settings["training"], "max_steps": 1, "save_strategy": "no"}
    stages = run(settings, stream, methods=["kpig-no-diversity"], training=training)["kpig-no-diversity"]
    assert [stage.replayed for stage in stages[2:]] == [{"alpha": 10}, {"alpha": 10, "beta": 10}]
    assert stages[3].objective.notes == []


def test_a_pool_is_drawn_from_for_training_and_for_scoring(settings, stream, tmp_path, monkeypatch):
    pool = tmp_path / "pool.json"
    first = stream[0].train[0]
    wordings = [Wording(first.instruction, first.key_parts), Wording("Please reply in words.", ((13, 21),))]
    write_pools(pool, {"alpha": wordings}, {"model": "hand"})
    scored, trained = [], []

    def watch(module, name, seen, position):
        original = getattr(module, name)

        def watched(*args, **options):
            seen.extend(args[position])
            return original(*args, **options)

        monkeypatch.setattr(module, name, watched)

    watch(replay, "information_gain", scored, 2)
    watch(kpig, "encode_pairs", trained, 1)
    two = TaskStream(stream[:2])
    part = {"pool": str(pool)}
    methods = [{"preset": "kpig", "objective": part, "replay": part}]
    training = {**settings["training"], "max_steps": 1, "save_strategy": "no"}
    stages = run(settings, two, methods=methods, training=training)["kpig"]
    for examples in (scored, [each for each in trained if each.task == "alpha"]):
        assert {"Please reply in words."} < {each.instruction for each in examples}
    assert stages[1].objective.wordings == {"alpha": 2}
    assert len(stages[1].objective.details["pool"]) == 64
    assert not stages[1].objective.notes
    broken = pool.read_text().replace('"in words"', '"in figures"')
    pool.write_text(broken)
    with pytest.raises(
        ConfigError, match=r"replay\.pool: .*pool\.json: tasks\.alpha\.\d: key part 'in figures' is not in"
    ):
        run({**settings, "output": str(tmp_path / "again")}, two, methods=methods)


def test_discovered_key_parts_are_marked_in_the_record(settings):
    mixed = TaskStream((make_task("alpha"), make_task("beta", key_parts=False)))
    training = {**settings["training"], "max_steps": 1, "save_strategy": "no"}
    stages = run(settings, mixed, methods=["kpig-no-diversity"], training=training)["kpig-no-diversity"]
    assert stages[1].objective.notes == []  # given by the data
    assert any("are discovered: clauses that the model itself heeds most" in note for note in stages[2].objective.notes)


def test_entropy_is_that_of_the_models_own_logits(settings, stream, tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(tiny_model_folder), max_length=96)
    examples = list(stream[0].train[:5])
    found = predictive_entropy(model, encoder, examples, batch_size=2)
    assert [index for index, _ in found] == list(range(5))
    for index, value in found:
        encoded = encoder.example(examples[index])
        ids, start = encoded.input_ids, encoded.prompt_length
        end = next(k for k in range(start, len(ids)) if ids[k] in encoder.stop_token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : end - 1].double()
        log_p = logits.log_softmax(1)
        assert value == pytest.approx(-(log_p.exp() * log_p).sum(1).mean().item(), rel=1e-4)
