"""The test bed: tasks whose answers are right, streams that repeat, figures with intervals."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are no package of the wheel
from bench import paired
from bench.testbed import __main__ as bed
from bench.testbed import model, runs
from bench.testbed.pretraining_tasks import KIND_OF, PRETRAINING
from bench.testbed.streams import ORDERS, STREAM, reworded, stream
from cit_fast.errors import CitFastError


@pytest.mark.parametrize("generator", [*PRETRAINING, *STREAM], ids=lambda g: g.name)
def test_examples_are_the_same_again_and_wordings_take_turns(generator):
    examples = generator.examples(60, "0")
    assert examples == generator.examples(60, "0") != generator.examples(60, "1")
    wordings = {re.sub(r"[\[\]]", "", wording) for wording in generator.wordings}
    assert {example.instruction for example in examples} == wordings
    assert all(example.references[0] and example.task == generator.name for example in examples)
    if generator.labels:
        assert {example.references[0] for example in examples} <= set(generator.labels)


def test_reworded_tests_ask_the_same_in_words_never_trained():
    tasks = stream(1, 0, 30, 10)
    for task, other in zip(tasks, reworded(tasks), strict=True):
        assert [(e.input, e.references) for e in other.test] == [(e.input, e.references) for e in task.test]
        (instruction,) = {each.instruction for each in other.test}
        assert instruction not in {each.instruction for each in task.train}
        assert all(part in instruction for part in other.test[0].key_part_texts)
        assert (other.name, other.train) == (f"{task.name}-reworded", ())


def test_what_pretraining_teaches_is_right():
    answers = {g.name: [(e.input, e.references[0]) for e in g.examples(40, "right")] for g in PRETRAINING}
    for text, answer in answers["reverse"]:
        assert answer.split(", ")[::-1] == text.split(", ")
    for text, answer in answers["count"]:
        assert int(answer) == len(text.split(", "))
    for text, answer in answers["odd-one-out"]:
        kinds = [KIND_OF[word] for word in text.split(", ")]
        assert kinds.count(KIND_OF[answer]) == 1
    for text, answer in answers["holds"]:
        items, kind = text.split(" / ")
        assert (answer == "yes") == (kind in [KIND_OF[word] for word in items.split(", ")])
    for text, answer in answers["next-number"]:
        numbers = list(map(int, text.split(", ")))
        assert int(answer) == numbers[-1] + numbers[1] - numbers[0]


def test_a_stream_trains_on_no_test_input_and_seeds_differ():
    one, again, other = stream(1, 0, 60, 20), stream(1, 0, 60, 20), stream(1, 1, 60, 20)
    assert one.names == ORDERS[1]
    assert sorted(ORDERS[1]) == sorted(ORDERS[2]) == sorted(g.name for g in STREAM)
    for task, same, differs in zip(one, again, other, strict=True):
        assert task == same != differs
        assert (len(task.train), len(task.dev), len(task.test)) == (60, 20, 20)
        inputs = [{example.input for example in split} for split in (task.train, task.dev, task.test)]
        assert len(set.union(*inputs)) == sum(map(len, inputs))
        assert all(example.key_parts for example in task.train)


@pytest.mark.parametrize("pair", [("shelf", "shelf-moved"), ("last-two", "first-two"), ("level", "alarm")])
def test_tasks_contradict_each_other_on_the_same_inputs(pair):
    drawn = [{e.input: e.references[0] for e in g.examples(2000, "x")} for g in STREAM if g.name in pair]
    shared = drawn[0].keys() & drawn[1].keys()
    alike = [text for text in shared if drawn[0][text] == drawn[1][text]]
    # The long lists of parcels hardly ever come twice.
    assert len(shared) > (20 if "level" in pair or "shelf" in pair else -1)
    assert not alike


def test_differences_are_paired():
    found = paired.difference([3.0, 5.0, 9.0, 4.0], [1.0, 4.0, 9.0, 5.0], 1)
    assert found["mean"] == pytest.approx(0.5)
    assert found["wins"] == pytest.approx(0.625)
    assert found["low"] < 0.5 < found["high"]
    assert -1 <= found["low"] <= found["high"] <= 2
    assert paired.difference([2.0, 3.0], [1.0, 2.0], -1) == {"mean": 1.0, "low": 1.0, "high": 1.0, "wins": 0.0}


def test_an_interrupted_pretraining_goes_on_where_it_was(tmp_path, monkeypatch):
    for name, value in {"STEPS": 6, "_KEPT": 2, "BATCH": 4, "_POOL": 4, "WARMUP": 1, "GYM": {}}.items():
        monkeypatch.setattr(model, name, value)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(model, "SIZES", {**model.SIZES, **small})
    model._pretrain(tmp_path / "whole", tmp_path / "whole.checkpoint")
    collate, calls = model.PaddingCollator.__call__, []

    def stop_at_the_fifth(self, examples):
        calls.append(examples)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return collate(self, examples)

    monkeypatch.setattr(model.PaddingCollator, "__call__", stop_at_the_fifth)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            model._pretrain(tmp_path / "again", tmp_path / "again.checkpoint")
    assert len(calls) == 5 + 2
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_job_leaves_its_figures_and_is_not_run_twice(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runs, "TRAIN", 8)
    monkeypatch.setattr(runs, "TEST", 2)
    monkeypatch.setattr(runs, "general", lambda test: [PRETRAINING[0].task(1, 2, "0")])
    monkeypatch.setitem(runs.TRAINING, "per_device_train_batch_size", 8)
    job = runs.Job("random-replay", 0.5, 2, 0)
    runs.run(job, tiny_model_folder, tmp_path, keep=False)
    found = json.loads(job.file(tmp_path).read_text())
    assert set(runs.FIGURES) <= set(found)
    assert list(found["scores"]) == list(ORDERS[2])
    assert found["replayed"] == 4 * sum(range(8))
    assert not (tmp_path / "runs" / job.file(tmp_path).stem).exists()
    before = job.file(tmp_path).stat().st_mtime_ns
    runs.run(job, Path("gone"), tmp_path, keep=False)
    assert job.file(tmp_path).stat().st_mtime_ns == before
    with pytest.raises(CitFastError, match="gone"):
        runs.run(job._replace(seed=1), Path("gone"), tmp_path, keep=False)
    rows = bed.summary({"random-replay": [found], "other": [found]})
    assert rows["other"]["difference to random-replay"]["AP"]["wins"] == 0.5


def test_a_job_that_fails_is_named_and_the_call_ends_with_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bed, "pretrained", lambda: Path("gone"))
    monkeypatch.setattr(paired, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(runs, "general", lambda test: [PRETRAINING[0].task(1, 2, "0")])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    arguments = ["--methods", "sequential", "--seeds", "1", "--orders", "1", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench.testbed", *arguments])
    with pytest.raises(SystemExit, match="1 runs have no figures, the first sequential-own-order1-seed0"):
        bed.main()
    printed = capsys.readouterr().out
    assert "method='sequential'" in printed
    assert "gone" in printed


def test_runs_that_are_recorded_are_not_run_again(tmp_path, monkeypatch, capsys):
    """A call elsewhere, with the record alone: the table is made from it, and other settings are refused."""
    monkeypatch.setattr(bed, "pretrained", lambda: Path("gone"))
    results, figures = tmp_path / "results.json", dict.fromkeys(runs.FIGURES, 1.0)
    arguments = [
        "--methods",
        "sequential",
        "joint",
        "--seeds",
        "2",
        "--orders",
        "2",
        "--output",
        str(tmp_path / "none"),
    ]
    monkeypatch.setattr("sys.argv", ["bench.testbed", *arguments, "--results", str(results)])
    jobs = [runs.Job(name, None, 2, seed) for name in ("sequential", "joint") for seed in (0, 1)]
    for job in jobs:
        job.file(tmp_path / "none").parent.mkdir(parents=True, exist_ok=True)
        job.file(tmp_path / "none").write_text(json.dumps({**figures, "AP": float(job.seed)}))
    bed.main()
    for job in jobs:
        job.file(tmp_path / "none").unlink()
    bed.main()
    record = json.loads(results.read_text())
    assert record["runs"].keys() == {job.name for job in jobs}
    (table,) = record["tables"].values()
    assert table["joint"]["mean"]["AP"] == 0.5
    assert "order 2, seeds 0 to 1" in capsys.readouterr().out
    monkeypatch.setattr(bed, "TRAIN", 7)
    with pytest.raises(SystemExit, match="of another model or setting"):
        bed.main()
