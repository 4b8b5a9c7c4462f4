from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from cit_fast.analysis import distances as module
from cit_fast.analysis.distances import TaskDistances, how_measured, measure_distances
from cit_fast.data import Example, Task
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.ops import wasserstein_matrix
from cit_fast.report import distances_page, figures
from cit_fast.report.distances import distance_tables, write_distances


class Letters:
    """Embeds a text by how often it has each letter, plus one number that keeps zero away."""

    name = "letters:1"

    def embed(self, texts):
        return torch.tensor([[1.0, *(float(text.count(letter)) for letter in "abcdef")] for text in texts])


def task(name, *instructions):
    return Task(name, tuple(Example(each, references=("x",)) for each in instructions))


TASKS = [
    task("near-1", "aab", "ab", "ab", "ab"),
    task("far", "eeef", "ff"),
    task("near-2", "ab", "aab"),
    task("middle", "cccd", "abcd", "ddc", "cabd", "b"),
]


def made_up(count, **fields):
    """Tasks on a line, in an order that says nothing, in pairs 0.1 apart."""
    places = np.array([k // 2 + 0.1 * (k % 2) for k in range(count)])[np.random.default_rng(0).permutation(count)]
    matrix = np.abs(places[:, None] - places[None, :]) + 0.0
    zeros = np.zeros((count, count))
    values = {
        "names": tuple(f"task_{place:.1f}" for place in places),
        "instructions": (3,) * count,
        "examples": (1200,) * count,
        "distances": matrix,
        "lower": matrix,
        "upper": matrix,
        "iterations": zeros.astype(np.int64),
        "marginal_error": zeros,
        "metric": "cosine",
        "method": "exact",
        "weights": "real",
        "embedder": "letters:1",
    }
    return TaskDistances(**{**values, **fields})


def printed(result, width):
    console = Console(width=width, file=io.StringIO())
    for table in distance_tables(result, width):
        console.print(table)
    return console.file.getvalue()


# -- measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["real", "uniform"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "sqeuclidean"])
def test_distances_are_those_of_the_op(weights, metric):
    result = measure_distances(TASKS, Letters(), weights=weights, metric=metric, method="exact")
    texts = [list(dict.fromkeys(e.instruction for e in t.train)) for t in TASKS]
    shares = [
        torch.tensor([float(sum(e.instruction == text for e in t.train)) if weights == "real" else 1.0 for text in own])
        for t, own in zip(TASKS, texts, strict=True)
    ]
    expected = wasserstein_matrix([Letters().embed(own) for own in texts], shares, metric=metric)
    np.testing.assert_allclose(result.distances, expected.distances.numpy(), rtol=1e-6, atol=1e-9)
    assert result.instructions == (2, 2, 2, 5)
    assert result.examples == (4, 2, 2, 5)
    assert result.method == "exact"


@pytest.mark.parametrize("count", [2, 3, 9, 10, 11, 21, 45])
def test_tiles_hold_every_pair_once(count):
    pairs = [(some[i], some[j]) for some, inner in module._blocks(count) for i, j in inner]
    assert sorted(pairs) == list(itertools.combinations(range(count), 2))


def test_many_tasks_and_progress():
    tasks = [task(f"t{k}", "a" * (k + 1), "b" * (1 + k % 5)) for k in range(23)]
    seen = []
    result = measure_distances(tasks, Letters(), metric="euclidean", progress=lambda *step: seen.append(step))
    clouds = [Letters().embed([e.instruction for e in t.train]) for t in tasks]
    expected = wasserstein_matrix(clouds, metric="euclidean").distances.numpy()
    np.testing.assert_allclose(result.distances, expected, rtol=1e-6, atol=1e-9)
    assert seen[0][0] == "Embedding instructions"
    done = [step[1:] for step in seen if step[0] == "Distances"]
    assert done == sorted(done)
    assert done[-1] == (253, 253)
    assert len(done) > 10


def test_sinkhorn_gives_bounds():
    exact = measure_distances(TASKS, Letters(), method="exact")
    result = measure_distances(TASKS, Letters(), method="sinkhorn")
    off = ~np.eye(4, dtype=bool)
    assert (result.lower[off] <= exact.distances[off] + 1e-9).all()
    assert (result.upper[off] >= exact.distances[off] - 1e-9).all()
    assert result.widest <= 1e-3
    assert f"(at most {100 * result.widest:.2g} % above" in how_measured(result)
    assert "(exact)" in how_measured(exact)


def test_auto_turns_to_sinkhorn_where_exact_takes_long():
    assert module._seconds_of_exact(np.full(300, 100.0)) < 60
    assert module._seconds_of_exact(np.full(300, 400.0)) > 60
    assert measure_distances(TASKS, Letters()).method == "exact"


def test_auto_says_what_it_took(monkeypatch):
    monkeypatch.setattr(module, "_seconds_of_exact", lambda sizes: 61.0)
    assert measure_distances(TASKS, Letters()).method == "sinkhorn"


def test_bad_input():
    with pytest.raises(DataError, match=r"only 1 task \(near-1\): distances need at least two"):
        measure_distances(TASKS[:1], Letters())
    held_out = Task("held-out", (), test=(Example("a", references=("x",)),))
    with pytest.raises(DataError, match="task 'held-out': no training examples"):
        measure_distances([TASKS[0], held_out], Letters())
    for option, known in (("metric", "cosine, euc"), ("method", "auto, exact, sink"), ("weights", "real, uniform")):
        with pytest.raises(ConfigError, match=f"{option}: 'other' is unknown; expected one of {known}"):
            measure_distances(TASKS, Letters(), **{option: "other"})

    class Zero(Letters):
        def embed(self, texts):
            return super().embed(texts) * torch.tensor([[float(text != "ff")] for text in texts])

    with pytest.raises(DataError, match="task 'far': the embedding of 'ff' is all zero"):
        measure_distances(TASKS, Zero())
    assert measure_distances(TASKS, Zero(), metric="euclidean").distances.max() > 0


# -- order ---------------------------------------------------------------------------------------------------------


def test_order_puts_close_tasks_side_by_side():
    result = made_up(14)
    assert sorted(result.order) == list(range(14))
    line = [float(result.names[k].removeprefix("task_")) for k in result.order]
    assert line in (sorted(line), sorted(line, reverse=True))


def test_order_of_a_tree_as_deep_as_there_are_tasks():
    places = np.cumsum(1.01 ** np.arange(700.0))  # each joins the cluster of all before it
    result = made_up(700, distances=np.abs(places[:, None] - places[None, :]))
    assert sorted(result.order) == list(range(700))
    assert len(distances_page._branches(result)) == 699


def test_neighbours_pairs_and_means():
    result = measure_distances(TASKS, Letters())
    assert result.names[result.neighbours(0)[0]] == "near-2"
    assert len(result.neighbours(0)) == 3
    assert result.pairs[0] == (0, 2)
    distances = [result.distances[pair] for pair in result.pairs]
    assert distances == sorted(distances)
    np.testing.assert_allclose(result.mean, [row[row > 0].mean() for row in result.distances])


def test_identical_tasks():
    result = measure_distances([task("one", "ab"), task("two", "ab"), task("three", "ab")], Letters())
    assert (result.distances == 0).all()
    assert result.number(0.0) == "0.00"
    assert distances_page.draw_distances(result).html


@pytest.mark.parametrize(("spread", "shown"), [(0.3, "0.123"), (0.004, "0.12346"), (25.0, "0.1"), (4000.0, "0")])
def test_numbers_show_as_many_decimals_as_tell_distances_apart(spread, shown):
    matrix = np.array([[0, 1, 1 + spread], [1, 0, 1], [1 + spread, 1, 0]])
    assert made_up(3, distances=matrix).number(0.123456) == shown


# -- the terminal --------------------------------------------------------------------------------------------------


def test_few_tasks_are_a_matrix():
    text = printed(made_up(4), 80)
    assert "Distances between tasks" in text
    assert "Nearest" not in text
    assert text.count("0.10") == 4


@pytest.mark.parametrize(("width", "columns"), [(60, 1), (80, 1), (120, 2), (200, 3)])
def test_many_tasks_are_neighbours_on_one_line_each(width, columns):
    result = made_up(40, names=tuple(f"task_{k:03d}_with_a_name_that_is_too_long_for_any_terminal" for k in range(40)))
    lines = printed(result, width).splitlines()
    assert max(map(len, lines)) <= width
    table = lines[: lines.index(next(line for line in lines if "Extremes" in line))]
    assert sum("…" in line for line in table) == 40
    assert [word for word in ("Nearest", "Second", "Third") if word in table[1]] == ["Nearest", "Second", "Third"][
        :columns
    ]
    assert all(re.search(r"(?<![\d.])0\.1(?!\d)", line) for line in table if "…" in line)  # to the nearest


# -- files ---------------------------------------------------------------------------------------------------------


def test_files(tmp_path):
    from pyarrow import parquet

    result = measure_distances(TASKS, Letters(), method="sinkhorn")
    page = write_distances(result, tmp_path / "out")
    assert page == tmp_path / "out" / "distances.html"
    rows = list(csv.reader((tmp_path / "out" / "distances.csv").read_text().splitlines()))
    assert rows[0] == ["task", "near-1", "far", "near-2", "middle"]
    assert [row[0] for row in rows[1:]] == rows[0][1:]
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], dtype=float), result.distances)
    table = parquet.read_table(tmp_path / "out" / "distances.parquet")
    assert table.num_rows == 6
    for row in table.to_pylist():
        pair = result.names.index(row["task_a"]), result.names.index(row["task_b"])
        for name in ("distance", "lower", "upper", "iterations", "marginal_error"):
            assert row[name] == getattr(result, "distances" if name == "distance" else name)[pair]
    assert table.schema.metadata[b"embedder"] == b"letters:1"
    with Image.open(tmp_path / "out" / "distances.png") as picture:
        assert picture.width > 1000
    write_distances(measure_distances(TASKS, Letters(), method="sinkhorn"), tmp_path / "again")
    for name in ("csv", "parquet", "png", "html"):
        first, second = ((tmp_path / f / f"distances.{name}").read_bytes() for f in ("out", "again"))
        assert first == second, name
    assert not [each for each in (tmp_path / "out").iterdir() if each.name.startswith(".")]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_distances(made_up(3), tmp_path / "file")


def test_every_cell_has_the_colour_of_its_distance():
    import matplotlib as mpl

    result = made_up(25)  # too many to be written into the cells
    _, box = distances_page._heat_map(result)
    image = Image.open(io.BytesIO(distances_page.draw_distances(result).png)).convert("RGB")
    values = result.distances[np.ix_(result.order, result.order)]
    low, high = values[values > 0].min(), values.max()
    for i, j in itertools.permutations(range(25), 2):
        x = image.width * (box.left + box.width * (j + 0.5) / 25)
        y = image.height * (box.top + box.height * (i + 0.5) / 25)
        expected = mpl.colormaps["viridis"]((values[i, j] - low) / (high - low), bytes=True)[:3]
        assert image.getpixel((int(x), int(y))) == tuple(int(c) for c in expected), (i, j)


@pytest.fixture
def undrawn(monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "png")
    monkeypatch.setattr(figures, "png", lambda figure, **_: buffer.getvalue())


@pytest.mark.usefixtures("undrawn")
def test_the_page_needs_nothing_and_runs_only_its_own_script():
    result = made_up(4, names=("</script><b>&", 'quo"te', "$math$ 数", "plain"))
    html = distances_page.draw_distances(result).html
    assert re.findall(r'(?:src|srcset|href)="(?!data:image/png;base64,)', html) == []
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 1
    allowed = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src &#39;sha256-{allowed}&#39;" in html or f"script-src 'sha256-{allowed}'" in html
    assert "</script><b>" not in html
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert data["names"] == [result.names[k] for k in result.order]
    in_order = itertools.combinations(result.order, 2)
    assert data["distances"] == [float(result.number(result.distances[pair])) for pair in in_order]
    assert "All distances as a table" in html


@pytest.mark.usefixtures("undrawn")
def test_the_page_of_many_tasks_has_neighbours_and_no_matrix():
    result = made_up(70)
    html = distances_page.draw_distances(result).html
    assert "All distances as a table" not in html
    assert "full size" in html
    for name in result.names:
        assert f"<td>{name}</td>" in html
    assert "Closest are task_" in html


@pytest.mark.parametrize("count", [2, 12, 70, 650])
def test_the_picture_stays_of_a_size_that_can_be_drawn(count):
    figure, box = distances_page._heat_map(made_up(count))
    width, height = figure.get_size_inches()
    assert max(width, height) * figures.DPI < 8000
    assert 0 < box.left < box.left + box.width < 1
    assert 0 < box.top < box.top + box.height < 1
    assert abs(box.width * width - box.height * height) < 1e-9  # square cells
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert bool(names) == (count <= 420)
