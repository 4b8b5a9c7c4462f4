from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from cit_fast.data import TaskSource, find_tasks, load_stream, load_task
from cit_fast.data.builtin import builtin_task, builtin_task_names
from cit_fast.data.sources import SPLITS, choose_examples
from cit_fast.errors import ConfigError, DataError


def rows(count, prefix="x"):
    return [{"instruction": "Copy.", "input": f"{prefix}{n}", "output": f"{prefix}{n}"} for n in range(count)]


def put(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def inputs(task):
    return {split: [example.input for example in getattr(task, split)] for split in SPLITS}


def failing(error, source, **options):
    with pytest.raises(error) as caught:
        load_task(source if isinstance(source, str) else TaskSource(**source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- splits


def test_folder_of_splits(tmp_path):
    folder = put(tmp_path / "copy", train=rows(5), eval=rows(3, "d"), test=rows(4, "t"))
    task = load_task(folder)
    assert (task.name, task.metric, task.labels) == ("copy", "rouge_l", ())
    assert inputs(task) == {
        split: [row["input"] for row in part]
        for split, part in zip(SPLITS, (rows(5), rows(3, "d"), rows(4, "t")), strict=True)
    }
    assert task.test[0].source == f"{tmp_path / 'copy' / 'test.json'}: record 1"
    few = load_task(folder, train=2, dev=0, test=9)
    assert [len(few.train), len(few.dev), len(few.test)] == [2, 0, 4]


def test_super_ni_folder(tmp_path):
    definition = {"Definition": ["Copy it."], "Positive Examples": []}
    parts = {name: {**definition, "Instances": rows(4, name)} for name in SPLITS}
    task = load_task(TaskSource(path=put(tmp_path / "task001_copy", **parts)))
    assert (task.name, task.metric, task.instructions) == ("task001_copy", "rouge_l", ("Copy it.",))
    assert inputs(task)["dev"] == ["dev0", "dev1", "dev2", "dev3"]


def test_missing_splits_are_held_out_by_seed(tmp_path):
    file = put(tmp_path, copy=rows(40)) + "/copy.json"
    task = load_task(file, dev=5, test=6)
    parts = inputs(task)
    assert [len(parts[split]) for split in SPLITS] == [29, 5, 6]
    assert sorted(name for part in parts.values() for name in part) == sorted(row["input"] for row in rows(40))
    assert inputs(load_task(file, dev=5, test=6)) == parts
    assert inputs(load_task(file, seed=1, dev=5, test=6)) != parts
    assert [len(part) for part in inputs(load_task(file)).values()] == [32, 4, 4]
    assert [len(part) for part in inputs(load_task(file, train=3, dev=99, test=99)).values()] == [3, 10, 10]
    assert inputs(load_task(file, dev=0, test=6))["test"] == parts["test"]


def test_one_example_is_for_training(tmp_path):
    task = load_task(put(tmp_path, copy=rows(1)) + "/copy.json")
    assert [len(part) for part in inputs(task).values()] == [1, 0, 0]


def test_a_test_set_alone_is_a_task_to_evaluate(tmp_path):
    task = load_task(put(tmp_path / "copy", test=rows(3)))
    assert [len(part) for part in inputs(task).values()] == [0, 0, 3]


@given(
    counts=st.dictionaries(st.sampled_from(SPLITS), st.integers(0, 50), min_size=1),
    limits=st.fixed_dictionaries({split: st.none() | st.integers(0, 60) for split in SPLITS}),
    seed=st.integers(0, 3),
)
def test_choice_of_examples(counts, limits, seed):
    chosen = choose_examples(counts, limits, str(seed))
    for split, (origin, positions) in chosen.items():
        assert positions == sorted(set(positions))
        assert all(0 <= position < counts.get(origin, 0) for position in positions)
        if limits[split] is not None:
            assert len(positions) <= limits[split]
        if split in counts and split != "train":
            asked = counts[split] if limits[split] is None else limits[split]
            assert (origin, len(positions)) == (split, min(counts[split], asked))
    of_train = [position for origin, positions in chosen.values() if origin == "train" for position in positions]
    assert len(of_train) == len(set(of_train))
    if limits["train"] is None:
        assert len(chosen["train"][1]) >= counts.get("train", 0) / 2
    # A smaller limit takes a subset.
    smaller = choose_examples(counts, {**limits, "train": 2}, str(seed))
    if limits["train"] is None or limits["train"] >= 2:
        assert set(smaller["train"][1]) <= set(chosen["train"][1])


def test_split_names(tmp_path):
    folder = put(tmp_path / "copy", a=rows(8), b=rows(2, "b"))
    task = load_task(TaskSource(path=folder, splits={"train": "a", "test": "b"}))
    assert inputs(task)["test"] == ["b0", "b1"]
    assert len(task.dev) == 1
    said = failing(DataError, {"path": folder, "splits": {"train": "a", "test": "c"}})
    assert said == f"{folder}: no file 'c' for the test split; it has a.json, b.json"
    assert "no train.json, dev.json or test.json (or .jsonl); it has a.json, b.json" in failing(DataError, folder)
    (tmp_path / "empty").mkdir()
    assert "it has no data files" in failing(DataError, str(tmp_path / "empty"))


def test_two_files_for_one_split(tmp_path):
    folder = put(tmp_path / "copy", dev=rows(1), validation=rows(1), train=rows(1))
    assert "both dev.json and validation.json could be the dev split" in failing(DataError, folder)


# --------------------------------------------------------------------------------------- metric, labels and names


def test_labels_and_metric(tmp_path):
    folder = put(tmp_path / "judge", train=[{"prompt": "nice", "answer": "Good"}], labels=["good", "bad"])
    task = load_task(folder)
    assert (task.labels, task.metric) == (("good", "bad"), "accuracy")
    named = load_task(TaskSource(path=folder, metric="exact_match", labels=("Good",), answer_pattern="G.*"))
    assert (named.labels, named.metric, named.answer_pattern) == (("Good",), "exact_match", "G.*")
    said = failing(DataError, {"path": folder, "labels": tuple(f"label{n}" for n in range(30))})
    assert f"{folder}/train.json: record 1: answer 'Good' is not one of the labels: label0, label1" in said
    assert said.endswith("...")


@pytest.mark.parametrize(("text", "said"), [('["a"', "broken JSON"), ('{"a": 1}', "must be a list of texts")])
def test_broken_labels_file(tmp_path, text, said):
    folder = put(tmp_path / "judge", train=rows(1))
    (tmp_path / "judge" / "labels.json").write_text(text)
    message = failing(DataError, folder)
    assert message.startswith(f"{folder}/labels.json:1: ")
    assert said in message


def test_names_are_made_fit_for_files(tmp_path):
    assert load_task(put(tmp_path / ".my task (1)", train=rows(1))).name == "my_task__1_"
    assert load_task(TaskSource(path=put(tmp_path / "copy", train=rows(1)), name="other")).train[0].task == "other"


def test_reading_options_reach_the_reader(tmp_path):
    folder = put(tmp_path / "judge", train=[{"sentence": "nice", "label": "good"}])
    source = TaskSource(
        path=folder,
        columns={"input": "sentence", "output": "label"},
        instruction="Judge [the tone].",
        key_part_markers=("[", "]"),
    )
    (example,) = load_task(source).train
    assert (example.input, example.references, example.key_part_texts) == ("nice", ("good",), ("the tone",))


# --------------------------------------------------------------------------------------------------------- built-in


def test_builtin_task():
    expected = builtin_task("dates", seed=3, train=4, dev=2, test=1)
    assert load_task("dates", seed=3, train=4, dev=2, test=1) == expected
    assert load_task("dates") == builtin_task("dates")
    renamed = load_task(TaskSource(builtin="dates", name="days", metric="rouge_l"), train=4, dev=2, test=1)
    assert (renamed.name, renamed.metric, renamed.answer_pattern) == ("days", "rouge_l", expected.answer_pattern)
    assert {example.task for example in renamed.train + renamed.dev + renamed.test} == {"days"}
    patterned = load_task(TaskSource(builtin="dates", answer_pattern=".*"), train=1)
    assert patterned == replace(load_task("dates", train=1), answer_pattern=".*")


def test_unknown_builtin_task_names_near_ones():
    assert "neither a built-in task nor a file or folder; did you mean 'dates'" in failing(DataError, "date")
    assert "known: amounts, " in failing(DataError, "qqqqqq")
    assert "dates" in failing(DataError, {"builtin": "date"})


def test_stream(tmp_path):
    folder = put(tmp_path / "copy", train=rows(8))
    stream = load_stream(["dates", folder, TaskSource(builtin="dates", name="again")], train=3, dev=1, test=2)
    assert stream.names == ("dates", "copy", "again")
    assert [[len(task.train), len(task.dev), len(task.test)] for task in stream] == [[3, 1, 2]] * 3
    with pytest.raises(DataError, match="two tasks of one name: dates"):
        load_stream(["dates", "dates"], train=1, dev=0, test=0)
    with pytest.raises(DataError, match="stream is empty"):
        load_stream([])


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({}, "exactly one of builtin, path and dataset, not none"),
        ({"builtin": "dates", "path": "x"}, "not builtin and path"),
        ({"path": "x", "splits": {"valid": "dev"}}, "splits: 'valid' is unknown; the splits are train, dev, test"),
        ({"path": "x", "revision": "main"}, "belong to a dataset source"),
        ({"builtin": "dates", "columns": {"input": "x"}}, "columns does not apply to the built-in task 'dates'"),
        ({"path": "x", "format": "yaml"}, "format 'yaml' is unknown"),
    ],
)
def test_unusable_sources(source, said):
    assert said in failing(ConfigError, source)


def test_negative_size():
    assert failing(ConfigError, "dates", dev=-1) == "dev: the number of examples must be 0 or more, not -1"


def test_missing_path(tmp_path):
    assert failing(DataError, f"{tmp_path}/x.json") == f"{tmp_path}/x.json: no such file or folder"
    assert failing(DataError, {"path": f"{tmp_path}/x"}) == f"{tmp_path}/x: no such file or folder"


def test_pydantic_validates_a_source():
    adapter = TypeAdapter(TaskSource)
    source = adapter.validate_python({"path": "x.json", "labels": ["a"], "key_part_markers": ["[", "]"]})
    assert source == TaskSource(path="x.json", labels=("a",), key_part_markers=("[", "]"))
    with pytest.raises(ValidationError, match="colums"):
        adapter.validate_python({"path": "x.json", "colums": {}})
    with pytest.raises(ValidationError, match="metric"):
        adapter.validate_python({"path": "x.json", "metric": 3})
    with pytest.raises(ValidationError, match="exactly one"):
        adapter.validate_python({})


# --------------------------------------------------------------------------------------------------------- datasets


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def test_saved_dataset(tmp_path, dataset_cache):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    table = [{"text": f"t{n}", "label": n % 2} for n in range(20)]
    parts = {"train": Dataset.from_list(table, features), "validation": Dataset.from_list(table[:3], features)}
    DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "single")
    options = {"columns": {"input": "text", "output": "label"}, "instruction": "Judge."}

    task = load_task(TaskSource(path=str(tmp_path / "both"), **options), train=6)
    assert (task.name, task.labels, task.metric) == ("both", ("bad", "good"), "accuracy")
    assert [len(task.train), len(task.dev), len(task.test)] == [6, 3, 2]
    assert task.dev[2].source == f"{tmp_path / 'both'} [validation]: record 3"
    assert task.dev[1].references == ("good",)
    assert len(load_task(TaskSource(path=str(tmp_path / "single"), **options)).train) == 16

    wrong = {"path": str(tmp_path / "both"), "splits": {"train": "all"}, **options}
    assert "no split 'all'; it has 'train', 'validation'" in failing(DataError, wrong)
    odd = DatasetDict({"odd": parts["train"]})
    odd.save_to_disk(tmp_path / "odd")
    assert "none of its splits 'odd' is known" in failing(DataError, {"path": str(tmp_path / "odd"), **options})


def test_tables(tmp_path, dataset_cache):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "train.csv").write_text("instruction,output\nSay 1.,1\nSay 2.,2\n")
    (folder / "test.csv").write_text("instruction,output\nSay 3.,3\n")
    task = load_task(str(folder))
    assert [example.references for example in task.train + task.test] == [("1",), ("2",), ("3",)]
    assert load_task(str(folder / "train.csv")).name == "train"
    (folder / "dev.json").write_text(json.dumps(rows(1)))
    assert [example.input for example in load_task(str(folder)).dev] == ["x0"]
    (folder / "dev.json").unlink()
    pq.write_table(pa.Table.from_pylist(rows(1)), folder / "dev.parquet")
    assert "of different kinds (.csv, .parquet)" in failing(DataError, str(folder))


def test_dataset_that_cannot_be_loaded(dataset_cache):
    said = failing(DataError, {"dataset": "nobody/nothing", "subset": "en", "revision": "main"})
    assert said.startswith("dataset nobody/nothing: cannot be loaded: ")


def test_dataset_by_name(monkeypatch, dataset_cache):
    import datasets

    asked = []

    def load_dataset(name, subset, *, revision):
        asked.append((name, subset, revision))
        return datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(rows(8)), "test": datasets.Dataset.from_list(rows(2, "t"))}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(TaskSource(dataset="someone/copy", subset="en", revision="v1"), test=1)
    assert asked == [("someone/copy", "en", "v1")]
    assert (task.name, len(task.train), len(task.dev), len(task.test)) == ("copy", 7, 1, 1)
    assert task.train[0].source == "someone/copy [train]: record 1"


# ------------------------------------------------------------------------------------------ all tasks at a place


def found(*places):
    return {source.name: source.path or source.builtin for source in find_tasks([str(place) for place in places])}


def test_builtin_tasks_are_found():
    assert tuple(found("builtin")) == builtin_task_names()
    assert found("units", "dates") == {"units": "units", "dates": "dates"}


def test_a_folder_of_tasks(tmp_path):
    put(tmp_path / "all", beta=rows(2), alpha=rows(2), labels=["yes"])
    (tmp_path / "all" / "notes.txt").write_text("not data")
    put(tmp_path / "all" / "gamma", train=rows(3), test=rows(1))
    (tmp_path / "all" / "empty").mkdir()
    assert list(found(tmp_path / "all")) == ["alpha", "beta", "gamma"]
    tasks = [load_task(source, dev=0, test=0) for source in find_tasks([str(tmp_path / "all")])]
    assert [(task.name, len(task.train), len(task.test)) for task in tasks] == [
        ("alpha", 2, 0),
        ("beta", 2, 0),
        ("gamma", 3, 0),
    ]


def test_a_folder_with_splits_and_a_saved_dataset_are_one_task_each(tmp_path):
    import datasets

    one = put(tmp_path / "one", train=rows(2), other=rows(2))
    datasets.Dataset.from_list(rows(2)).save_to_disk(str(tmp_path / "two"))
    assert found(one) == {"one": one}
    assert list(found(tmp_path)) == ["one", "two"]


def test_tasks_called_alike_are_told_apart_by_their_folders(tmp_path):
    put(tmp_path / "old", copy=rows(2), sort=rows(2))
    put(tmp_path / "new", copy=rows(2))
    assert list(found(tmp_path / "old", tmp_path / "new")) == ["old.copy", "sort", "new.copy"]
    with pytest.raises(DataError, match=r"two tasks are called 'old.copy': .*copy.json and .*copy.json; give each"):
        find_tasks([str(tmp_path / "old" / "copy.json"), str(tmp_path / "old")])
    with pytest.raises(DataError, match="two tasks are called 'units': builtin and builtin"):
        find_tasks(["builtin", "units"])


def test_places_without_tasks(tmp_path):
    (tmp_path / "notes.txt").write_text("not data")
    with pytest.raises(DataError, match=r"no tasks in it: no data files"):
        find_tasks([str(tmp_path)])
    with pytest.raises(DataError, match=r"did you mean 'units'"):
        find_tasks(["unitz"])
    with pytest.raises(DataError, match=r"no such file or folder"):
        find_tasks([str(tmp_path / "nowhere")])


def test_records_without_an_answer_are_skipped(tmp_path, caplog):
    path = put(tmp_path / "set", one=[*rows(2), {"instruction": "Copy.", "input": "", "output": ""}])
    (source,) = find_tasks([path])
    assert len(load_task(source, dev=0, test=0).train) == 2
    assert "skipped 1 records" in caplog.text


# ------------------------------------------------------------------------------------------------- constraints


def test_what_a_source_declares_reaches_the_task(tmp_path):
    folder = put(tmp_path / "copy", train=rows(4), test=rows(2, "t"))
    declared = {"answer_pattern": r"\w\d", "answer_format": "json", "extractive": True, "wordy_above": 3.0}
    task = load_task(TaskSource(path=folder, **declared))
    assert {key: getattr(task, key) for key in declared} == declared
    task = load_task(TaskSource(builtin="units", wordy_above=5.0), train=2, dev=1, test=1)
    plain = builtin_task("units", train=2, dev=1, test=1)
    assert (task.wordy_above, task.answer_pattern) == (5.0, plain.answer_pattern)
    assert "task 'copy': answer_format 'xml' is unknown" in failing(DataError, {"path": folder, "answer_format": "xml"})


def test_labels_are_inferred_from_the_whole_source_when_asked(tmp_path):
    def answers(*labels, count):
        return [{"instruction": "Tag.", "input": f"{k}", "output": labels[k % len(labels)]} for k in range(count)]

    folder = put(tmp_path / "tag", train=answers("yes", "No", "no", count=60), test=answers("maybe", count=9))
    assert load_task(TaskSource(path=folder)).labels == ()
    task = load_task(TaskSource(path=folder, infer_labels=True), train=1, test=2)
    assert (set(task.labels), task.metric) == ({"No", "yes", "maybe"}, "accuracy")
    free = put(tmp_path / "free", train=rows(60))
    assert load_task(TaskSource(path=free, infer_labels=True)).labels == ()
    assert load_task(TaskSource(path=folder, infer_labels=True, metric="rouge_l")).metric == "rouge_l"
    with pytest.raises(ConfigError, match="infer_labels does not apply to the built-in task 'units'"):
        TaskSource(builtin="units", infer_labels=True)


def test_an_error_is_one_line_whatever_it_quotes(tmp_path):
    path = tmp_path / "test.json"
    path.write_text('[{"instruction": "Say it.", "output": "Yo", "labels": "x"}]')
    with pytest.raises(DataError) as caught:
        load_task(TaskSource(path=str(path), labels=("3", "a\nb")))
    assert "a\\nb" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_several_folders_are_one_task(tmp_path):
    for name, labels in (("one", ["yes", "no"]), ("two", ["no", "maybe"])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "labels.json").write_text(json.dumps(labels))
        for split, count in (("train", 6), ("test", 2)):
            rows = [{"instruction": f"{name}?", "input": f"{split} {k}", "output": labels[k % 2]} for k in range(count)]
            (folder / f"{split}.json").write_text(json.dumps(rows))
    source = TaskSource(path=[str(tmp_path / "one"), str(tmp_path / "two")], name="both")
    task = load_task(source)
    assert task.name == "both"
    dev = [example.instruction for example in task.dev]  # held out of the training set, as of any task
    told = ["one?"] * (6 - dev.count("one?")) + ["two?"] * (6 - dev.count("two?"))
    assert [example.instruction for example in task.train] == told
    assert len(task.test) == 4
    assert task.labels == ("yes", "no", "maybe")
    assert {example.task for example in task.train} == {"both"}
    few = load_task(source, train=4)
    assert len(few.train) == 4
    assert {example.instruction for example in few.train} <= {"one?", "two?"}
    with pytest.raises(ConfigError, match="path: a task of several files or folders needs at least one, and a name"):
        TaskSource(path=[str(tmp_path)])
    with pytest.raises(DataError, match=r"three: no such file or folder"):
        load_task(TaskSource(path=[str(tmp_path / "one"), str(tmp_path / "three")], name="both"))
