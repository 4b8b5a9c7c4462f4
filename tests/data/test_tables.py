"""CSV, Parquet and saved datasets: cells as they stand in the file, splits in shards, damage that is named."""

from __future__ import annotations

import csv
import gzip
import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.data import TaskSource, load_task
from cit_fast.data.images import name_of_bytes
from cit_fast.data.readers import _records_of_csv
from cit_fast.errors import DataError

ROWS = [{"instruction": "Good or bad?", "input": f"text {n}", "output": ("good", "bad")[n % 2]} for n in range(8)]


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def read(path, **options):
    return load_task(TaskSource(path=str(path), name="t", **options), dev=0, test=0).train


def failing(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return path


# -------------------------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize(
    "cell", ["None", "NA", "N/A", "null", "nan", "01001", "1.50", "1e5", "Infinity", "1_000", "True"]
)
def test_cells_are_texts(tmp_path, cell):
    path = table(tmp_path / "a.csv", f'instruction,input,output\nWhich?,{cell},{cell}\nWhich?,"{cell}",{cell}\n')
    assert [(e.input, e.references) for e in read(path)] == [(cell, (cell,))] * 2


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("instruction;input;output", "Do it.;a;b"),
        ("instruction\tinput\toutput", "Do it.\ta\tb"),
        ("instruction, input, output", "Do it., a, b"),
        (",instruction,input,output", "0,Do it.,a,b"),
        ("\ufeffinstruction,input,output\r", "Do it.,a,b\r"),
    ],
)
def test_what_stands_between_the_cells_is_told_from_the_header(tmp_path, header, row):
    (example,) = read(table(tmp_path / "a.csv", f"{header}\n{row}\n\n"))
    assert (example.instruction, example.input, example.references) == ("Do it.", "a", ("b",))


@pytest.mark.parametrize(
    ("text", "encoding", "said"),
    [
        (
            "instruction,output\na,b\na,with, comma\n",
            "utf-8",
            ":3: 3 cells, but the header has 2; a cell that holds ','",
        ),
        ("instruction,output\na\n", "utf-8", ":2: 1 cells, but the header has 2"),
        ('instruction,output\n"a\nb",c\n"a,b\n', "utf-8", ":4: broken CSV: unexpected end of data"),
        ("output,instruction,output\na,b,c\n", "utf-8", ":1: two columns are called 'output'"),
        ("instruction,output\na,\u00e9\n", "latin-1", ":2: not UTF-8"),
        ("instruction,output\na,b\n", "utf-16", ":1: not UTF-8"),
        ("instruction,output\na,b\n", "utf-16-le", ":1: a null character, as of UTF-16"),
        ("instruction,output\n", "utf-8", ":1: no records"),
        ("", "utf-8", ":1: the file is empty"),
    ],
)
def test_broken_csv(tmp_path, text, encoding, said):
    path = table(tmp_path / "mine.csv", text, encoding)
    assert failing(path).startswith(f"{path}{said}")


def test_a_row_of_several_lines_is_called_by_its_first(tmp_path):
    path = table(tmp_path / "a.csv", 'instruction,output\n"a\n\nb",c\nd,e\n')
    assert [e.source.rpartition(":")[2] for e in read(path)] == ["2", "5"]


def test_cells_longer_than_the_csv_module_takes(tmp_path):
    before = csv.field_size_limit()
    (example,) = read(table(tmp_path / "a.csv", f"instruction,output\n{'a' * 200_000},b\n"))
    assert (len(example.instruction), csv.field_size_limit()) == (200_000, before)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(
    rows=st.lists(st.lists(cells, min_size=2, max_size=2), min_size=1, max_size=5), delimiter=st.sampled_from(",;\t")
)
def test_what_the_csv_module_writes_is_read_back(rows, delimiter):
    from pathlib import Path

    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([["question", "answer"], *rows])
    found = [record for _, record in _records_of_csv(Path("a.csv"), file.getvalue())]
    assert found == [dict(zip(["question", "answer"], row, strict=True)) for row in rows]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "A.JSON", "a.tsv"])
def test_names_of_files(tmp_path, name):
    folder = tmp_path / "judge"
    folder.mkdir()
    text = "instruction\toutput\nSay it.\tx\n" if "sv" in name else '{"instruction": "Say it.", "output": "x"}'
    for path in (tmp_path / name, folder / f"Train{name[1:]}"):
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert [e.references for e in read(tmp_path / name)] == [("x",)]
    assert load_task(str(tmp_path / name), dev=0, test=0).name == name[0]
    assert [e.references for e in read(folder)] == [("x",)]


# ------------------------------------------------------------------------------------------------- closed sets


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "saved"])
def test_labels_json_counts_beside_every_kind(tmp_path, kind):
    folder = tmp_path / "judge"
    folder.mkdir()
    if kind == "json":
        (folder / "train.json").write_text(json.dumps(ROWS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    else:
        with (folder / "train.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    (folder / "labels.json").write_text('["good", "bad"]')
    task = load_task(str(folder))
    assert (task.labels, task.metric) == (("good", "bad"), "accuracy")
    (folder / "labels.json").write_text('["good"]')
    assert "answer 'bad' is not one of the labels: good" in failing(folder)
    assert [e.references for e in read(folder, skip_unanswered=True)] == [("good",)] * 4


@pytest.mark.parametrize("content", ["[" * 100_000, '["a", ""]', None])
def test_labels_that_cannot_be_read(tmp_path, content):
    (tmp_path / "train.json").write_text(json.dumps(ROWS))
    if content is None:
        (tmp_path / "labels.json").mkdir()
    else:
        (tmp_path / "labels.json").write_text(content)
    assert failing(tmp_path).startswith(f"{tmp_path / 'labels.json'}:1: ")


# ---------------------------------------------------------------------------------------------------------- Parquet


def test_shards_as_the_hub_lays_them_out(tmp_path):
    folder = tmp_path / "snap[1]*"
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        part = pa.Table.from_pylist([{**row, "input": f"{number}"} for row in ROWS])
        pq.write_table(part, folder / "data" / f"train-0000{number}-of-00002.parquet")
        pq.write_table(part, folder / "data" / f"validation-0000{number}-of-00002-0123456789abcdef.parquet")
    for place in (folder, folder / "data"):
        task = load_task(TaskSource(path=str(place), name="t"), test=0)
        assert [e.input for e in task.train] == ["0"] * 8 + ["1"] * 8
        assert len(task.dev) == 16


def test_values_of_typed_columns(tmp_path):
    columns = {
        "instruction": pa.array(["Say it."]),
        "input": pa.array([0.1], pa.float32()),
        "output": pa.array([True]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    (example,) = read(tmp_path / "a.parquet")
    assert (example.input, example.references) == ("0.1", ("true",))


def test_images_are_not_decoded(tmp_path):
    pytest.importorskip("PIL", reason="the feature can be declared only with pillow")
    features = datasets.Features(
        {"instruction": datasets.Value("string"), "output": datasets.Value("string"), "image": datasets.Image()}
    )
    row = {"instruction": "What?", "output": "cat", "image": {"bytes": b"no picture", "path": None}}
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "a.parquet")
    (example,) = read(tmp_path / "a.parquet")
    assert example.images == (name_of_bytes(b"no picture"),)


def test_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no table PAR1")
    said = failing(tmp_path / "a.parquet")
    assert said.startswith(f"{tmp_path / 'a.parquet'}: cannot be loaded: ")
    assert "generating the dataset" not in said


# --------------------------------------------------------------------------------------------------- saved datasets


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "..", "", None, 3])
def test_a_saved_dataset_names_only_files_of_its_own(saved, name):
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (saved / "state.json").write_text(json.dumps(state))
    assert "names a file outside its folder or none at all" in failing(saved)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("state.json", "{", "damaged: "),
        ("state.json", "{}", "damaged: it lists no _data_files"),
        ("state.json", "[" * 100_000, "damaged: "),
        ("dataset_info.json", "{", "a saved dataset that cannot be loaded"),
        ("data-00000-of-00001.arrow", "no arrow", "a saved dataset that cannot be loaded"),
        ("data-00000-of-00001.arrow", None, "no such file; the saved dataset is damaged"),
        ("dataset_dict.json", '{"splits": ["../elsewhere"]}', "names a file outside its folder"),
        ("dataset_dict.json", '{"splits": ["train"]}', "no such file"),
    ],
)
def test_damaged_saved_datasets(saved, file, content, said):
    if content is None:
        (saved / file).unlink()
    else:
        (saved / file).write_text(content)
    assert said in failing(saved)
