"""Which file is which split, what a task of several parts holds out, and splits without answers."""

from __future__ import annotations

import json

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from cit_fast.data import TaskSource, find_tasks, load_task
from cit_fast.data.sources import SPLITS
from cit_fast.errors import DataError


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def rows(count, prefix="x"):
    return [{"instruction": "Copy.", "input": f"{prefix}{n}", "output": f"{prefix}{n}"} for n in range(count)]


def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def parts(task):
    """Split -> the letters that its inputs begin with."""
    return {split: "".join(sorted({example.input[0] for example in getattr(task, split)})) for split in SPLITS}


def failing(path, **options):
    with pytest.raises(DataError) as caught:
        load_task(TaskSource(path=path, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- names of splits


def test_the_splits_that_are_not_named_are_found_by_their_usual_names(tmp_path):
    folder = put(tmp_path / "copy", train=rows(8, "t"), validation=rows(4, "v"), test=rows(4, "e"))
    task = load_task(TaskSource(path=folder, splits={"train": "train"}))
    assert (parts(task), len(task.train)) == ({"train": "t", "dev": "v", "test": "e"}, 8)
    Dataset.from_list(rows(8, "t")).save_to_disk(str(tmp_path / "alone"))
    sets = {"train": rows(8, "t"), "validation": rows(4, "v"), "test": rows(4, "e")}
    DatasetDict({name: Dataset.from_list(each) for name, each in sets.items()}).save_to_disk(str(tmp_path / "saved"))
    task = load_task(TaskSource(path=str(tmp_path / "saved"), splits={"dev": "test"}))
    assert parts(task) == {"train": "t", "dev": "e", "test": "t"}


def test_a_file_that_is_named_for_one_split_is_no_other_split_too(tmp_path):
    folder = put(tmp_path / "copy", train=rows(8, "t"), validation=rows(4, "v"))
    task = load_task(TaskSource(path=folder, splits={"test": "Validation"}))
    assert parts(task) == {"train": "t", "dev": "t", "test": "v"}  # dev is held out of the training set
    without = load_task(TaskSource(path=folder, splits={"test": "validation"}), dev=0)
    assert (parts(without)["dev"], len(without.train)) == ("", 8)


def test_a_missing_shard_is_named(tmp_path):
    shard = "train-{:05}-of-00003"
    folder = put(tmp_path / "copy", **{shard.format(0): rows(2), shard.format(2): rows(2)})
    expected = f"{folder}/train-00001-of-00003.json: no such file, though train-00000-of-00003.json is one of 3 shards"
    assert failing(folder) == expected
    put(tmp_path / "copy", **{shard.format(1): rows(2)})
    assert len(load_task(folder, dev=0, test=0).train) == 6
    from_one = put(tmp_path / "ones", **{f"train-{number}-of-2": rows(2) for number in (1, 2)})
    assert len(load_task(from_one, dev=0, test=0).train) == 4
    (tmp_path / "ones" / "train-2-of-2.json").unlink()
    assert "train-0-of-2.json: no such file" in failing(from_one)


def test_a_broken_link_is_named(tmp_path):
    folder = put(tmp_path / "copy", train=rows(8))
    (tmp_path / "copy" / "test.json").symlink_to("/nowhere/test.json")
    said = f"{folder}/test.json: a link to /nowhere/test.json, which is not there; mend or remove the link"
    assert failing(folder) == said
    put(tmp_path / "all", a=rows(2))
    (tmp_path / "all" / "b.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl: a link to gone\.jsonl, which is not there"):
        find_tasks([str(tmp_path / "all")])


def test_what_macos_keeps_beside_a_file_is_no_task(tmp_path):
    folder = tmp_path / "all"
    put(folder, a=rows(2))
    (folder / "._a.json").write_bytes(b"\0\5\x16\7\0")
    assert [source.path for source in find_tasks([str(folder)])] == [f"{folder}/a.json"]


def test_labels_json_counts_beside_a_file(tmp_path):
    lone = put(tmp_path / "lone", judge=rows(2), labels=["x0", "x1"])
    task = load_task(f"{lone}/judge.json")
    assert (task.labels, task.metric) == (("x0", "x1"), "accuracy")
    whole = put(tmp_path / "whole", train=rows(2), test=rows(2), labels=["x0", "x1"])
    assert load_task(f"{whole}/train.json").labels == ("x0", "x1")
    several = put(tmp_path / "several", judge=rows(2), other=rows(2), labels=["yes"])
    assert load_task(f"{several}/judge.json").labels == ()


# -------------------------------------------------------------------------------------- several parts as one task


def test_a_part_without_a_test_set_holds_one_out(tmp_path):
    tested = put(tmp_path / "tested", train=rows(40, "a"), test=rows(6, "b"))
    alone = put(tmp_path / "alone", train=rows(40, "c"))
    task = load_task(TaskSource(path=(tested, alone), name="both"), dev=0, seed=3)
    assert parts(task) == {"train": "ac", "dev": "", "test": "bc"}
    assert [example.input for example in task.test[:6]] == [row["input"] for row in rows(6, "b")]
    by_itself = load_task(alone, dev=0, seed=3)  # the same as where the part is a task of its own
    assert [example.input for example in task.test[6:]] == [example.input for example in by_itself.test]
    assert [example.input for example in task.train[40:]] == [example.input for example in by_itself.train]
    assert len(load_task(TaskSource(path=(tested, alone), name="both"), dev=0, test=0).train) == 80
    halves = load_task(TaskSource(path=(alone, put(tmp_path / "more", train=rows(40, "d"))), name="both"), dev=0)
    assert (len(halves.train), len(halves.test)) == (72, 8)  # held out of both together where neither has one


# ------------------------------------------------------------------------------------------ splits without answers


def unlabelled_test_set(folder):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    table = [{"text": f"t{n}", "label": n % 2} for n in range(20)]
    sets = {"train": table, "validation": table[:4], "test": [{"text": "t", "label": -1}] * 4}
    DatasetDict({name: Dataset.from_list(each, features) for name, each in sets.items()}).save_to_disk(str(folder))
    return {"path": str(folder), "columns": {"input": "text", "output": "label"}, "instruction": "Judge."}


def test_a_split_without_answers_counts_as_absent(tmp_path, caplog):
    options = unlabelled_test_set(tmp_path / "glue")
    task = load_task(TaskSource(**options, skip_unanswered=True))
    assert [len(task.train), len(task.dev), len(task.test)] == [18, 4, 2]
    assert "glue [test]: record 1: no reference answer" in caplog.text
    assert "skip_unanswered" not in caplog.text  # it is set already
    assert "skip_unanswered leaves such records out" in failing(**options)
    files = put(tmp_path / "copy", train=rows(20), test=[{"instruction": "Copy.", "input": "x", "output": ""}] * 3)
    assert len(load_task(TaskSource(path=files, skip_unanswered=True)).test) == 2
    shards = put(
        tmp_path / "shards",
        **{"train-0-of-2": rows(4), "train-1-of-2": [{"instruction": "Copy.", "input": "x", "output": ""}]},
    )
    assert len(load_task(TaskSource(path=shards, skip_unanswered=True), dev=0, test=0).train) == 4


def test_a_training_set_without_answers_is_an_error(tmp_path):
    folder = put(tmp_path / "copy", train=[{"instruction": "Copy.", "output": ""}] * 2, test=rows(4))
    assert "train.json: record 1: no reference answer" in failing(folder, skip_unanswered=True)
    assert "nor has any other of 2 records" in failing(folder, skip_unanswered=True)


# -------------------------------------------------------------------------------------------------- held-out prompts


def test_prompts_on_both_sides_of_the_cut_are_counted(tmp_path, caplog):
    twice = put(tmp_path, copy=[*rows(40), *rows(40)])
    task = load_task(f"{twice}/copy.json", dev=0)
    shared = {example.input for example in task.train} & {example.input for example in task.test}
    assert len(shared) > 0
    count = sum(example.input in shared for example in task.test)
    assert (
        f"task copy: {count} of the 8 examples held out of its training set have a prompt that is in it" in caplog.text
    )
    assert len(caplog.records) == 1
    caplog.clear()
    load_task(put(tmp_path / "own", train=rows(8), test=rows(8)), dev=0)  # its author's choice
    load_task(put(tmp_path / "plain", train=rows(40)))
    assert not caplog.records
