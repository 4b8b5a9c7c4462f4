"""Class labels and short decimals of typed columns, however deep they lie, and the closed set that a column means."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from cit_fast.data import ReadOptions, TaskSource, load_task, read_dataset
from cit_fast.data.column_values import plain_value
from cit_fast.errors import DataError

MOODS = ClassLabel(names=["bad", "good"])


def read(values, feature, **columns):
    """What the records of a column ``a`` read as."""
    features = Features({"instruction": Value("string"), "a": feature})
    dataset = Dataset.from_list([{"instruction": "i", "a": value} for value in values], features=features)
    options = ReadOptions(columns=columns or {"output": "a"})
    return [example.references for example in read_dataset(dataset, options, where="here")]


@pytest.mark.parametrize(
    ("values", "feature", "columns", "expected"),
    [
        ([[0, 1], [1, -1]], Sequence(MOODS), {}, [("bad", "good"), ("good",)]),
        ([{"label": 1}], {"label": MOODS}, {"output": "a.label"}, [("good",)]),
        ([{"labels": [1, 0]}], {"labels": Sequence(MOODS)}, {"output": "a.labels"}, [("good", "bad")]),
        ([{"b": {"label": 1}}], {"b": {"label": MOODS}}, {"output": "a.b.label"}, [("good",)]),
        ([[0.1, 2.7]], Sequence(Value("float32")), {}, [("0.1", "2.7")]),
        ([{"score": 0.1}], {"score": Value("float32")}, {"output": "a.score"}, [("0.1",)]),
        ([0.1, 2.7], Value("float16"), {}, [("0.1",), ("2.7",)]),
        ([0.1], Value("float32"), {}, [("0.1",)]),
        ([[0.1]], Sequence(Value("float64")), {}, [("0.1",)]),
    ],
)
def test_values_are_plain_however_deep_they_lie(values, feature, columns, expected):
    assert read(values, feature, **columns) == expected


def test_parts_of_a_structure_that_nobody_reads_may_be_unlabelled():
    assert read([{"label": 1, "other": 7}], {"label": MOODS, "other": Value("int64")}, output="a.label") == [("good",)]
    features = Features({"instruction": Value("string"), "a": {"label": MOODS, "other": MOODS}})
    dataset = Dataset.from_list([{"instruction": "i", "a": {"label": 1, "other": -1}}], features=features)
    (example,) = read_dataset(dataset, ReadOptions(columns={"output": "a.label"}), where="here")
    assert example.references == ("good",)


def test_a_label_without_a_class_is_named():
    with pytest.raises(DataError, match=r"^here:1: 'a' has no label \(7\); it has 2 classes$"):
        plain_value([1, 7], Sequence(MOODS), "here:1: 'a'")


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "text", "completion": "label"},
        {"prompt": "text", "answer": "label"},
        {"instruction": "text", "output": "label"},
        {"instruction": "text", "output": "deep.label"},
        {"instruction": "text", "output": "several"},
    ],
)
def test_a_class_label_is_a_closed_set_in_every_format(tmp_path, columns):
    features = Features({"text": Value("string"), "label": MOODS, "deep": {"label": MOODS}, "several": Sequence(MOODS)})
    table = [{"text": f"t{n}", "label": n % 2, "deep": {"label": 1}, "several": [n % 2]} for n in range(20)]
    Dataset.from_list(table, features).save_to_disk(str(tmp_path / "judge"))
    task = load_task(TaskSource(path=str(tmp_path / "judge"), columns=columns))
    assert (task.labels, task.metric) == (("bad", "good"), "accuracy")
    assert task.train[0].references[0] in task.labels


def test_only_the_column_that_is_answered_from_is_the_closed_set(tmp_path):
    features = Features({"prompt": Value("string"), "answer": Value("string"), "output": MOODS})
    table = [{"prompt": f"t{n}", "answer": f"a{n}", "output": n % 2} for n in range(8)]
    Dataset.from_list(table, features).save_to_disk(str(tmp_path / "asked"))
    assert load_task(TaskSource(path=str(tmp_path / "asked"))).labels == ()
