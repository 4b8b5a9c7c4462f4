from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
from made_up_runs import REPLAY, SEQUENTIAL, TASKS, Page, printed, write_run
from PIL import Image

from cit_fast.data.images import name_of_bytes
from cit_fast.errors import RunError
from cit_fast.evaluation.predictions import Prediction, predictions_path, write_predictions
from cit_fast.report import comparison_table, write_report
from cit_fast.report import figures as pictures
from cit_fast.report.collect import collect, number
from cit_fast.report.headline import headline


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def test_page_is_self_contained_and_its_pictures_are_pngs(folders, tmp_path):
    path = write_report(folders, title="Three ways")
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert page.open == []
    images = list(page.images())
    # comparison, tasks, 3 matrices, 3 losses, 1 replay, 1 balance weights
    assert len(images) == 10
    assert all(image.format == "PNG" and image.width > 300 for image in images)
    assert "script" not in page.tags
    assert "@import" not in page.html
    assert "url(" not in page.html
    names = {file.name for file in (tmp_path / "report-figures").glob("*.png")}
    assert len(names) == 10
    assert {"comparison.png", "tasks.png", "sequential-scores.png", "random-replay-balance-weights.png"} <= names
    assert "Three ways" in page.text


@pytest.mark.usefixtures("undrawn")
def test_page_says_the_result_first(folders):
    page = Page(write_report(folders))
    # forgetting: ((96 - 20) + (88 - 48)) / 2 and ((95 - 85) + (86 - 80)) / 2
    sentence = (
        "sequential forgot 58.0 points and ended at an average of 54.0; random-replay, bringing back 30 earlier "
        "examples (10.0 % of the new ones), forgot 8.0 points and ended at an average of 86.0. Compared with "
        "sequential, random-replay forgot 50.0 points less. joint reached an average of 93.0 points, the upper bound."
    )
    assert sentence in page.text
    assert page.text.index(sentence) < page.text.index("Forgetting ↓") < page.text.index("The table as bars")
    assert "sequential: Trains one task after another" in page.text
    assert "86.0 ★" in page.text
    assert "93.0 ★" not in page.text  # joint is the bound, not a competitor


def test_terminal_table(folders):
    text = printed(comparison_table(folders))
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line[:1].isalpha():
            rows.setdefault(line.split()[0], []).extend(line.split()[1:])  # the second table is below the first
    assert rows["sequential"] == ["54.0", "92.7*", "58.0", "−58.0", "0", "1.6", "−4.0", "–", "–"]
    assert rows["random-replay"] == ["86.0*", "91.3", "8.0*", "−8.0*", "30", "1.6", "−4.0", "0.100", "50.0"]
    assert rows["joint"] == ["93.0", "93.0", "–", "–", "0", "0.6", "–", "–", "–"]
    assert "Rel. gain" not in text  # no experts, no column
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.usefixtures("undrawn")
def test_one_run_goes_beside_its_records_and_marks_nothing_best(folders):
    path = write_report(folders[:1])
    assert path == folders[0] / "report.html"
    page = Page(path)
    assert "★" not in page.text
    assert "*" not in printed(comparison_table(folders[:1]))
    assert "forgot 58.0 points" in page.text


@pytest.mark.usefixtures("undrawn")
def test_answers_right_and_wrong(folders):
    page = Page(write_report(folders[:1]))
    shown = re.findall(r"answer (\d)", page.text)
    assert shown == ["1", "3", "0", "2"] * 3


@pytest.mark.usefixtures("undrawn")
def test_run_under_way_is_shown_as_far_as_it_is(folders, tmp_path):
    running = write_run(tmp_path / "d", REPLAY[:2], method="balance-ema", status="running", weights=True)
    page = Page(write_report([*folders, running]))
    assert "balance-ema: still running: 2 of 3 tasks trained." in page.text
    assert "balance-ema forgot" not in page.text  # the headline is about complete runs
    table = printed(comparison_table([*folders, running]), width=100)
    assert "balance-ema …" in table
    started = write_run(tmp_path / "e", [], method="sequential", status="running", answers=False)
    page = Page(write_report([started]))
    assert "No stage is finished yet." in page.text
    assert "No complete run yet: sequential is still running: 0 of 3 tasks trained." in page.text


@pytest.mark.usefixtures("undrawn")
def test_finished_run_that_lacks_a_stage_says_so(tmp_path):
    page = Page(write_report([write_run(tmp_path / "a", SEQUENTIAL[:2])]))
    assert "sequential: lacks the stages of labels." in page.text
    assert "No complete run yet: sequential lacks the stages of labels." in page.text


@pytest.mark.usefixtures("undrawn")
def test_other_tasks_are_left_out_of_the_comparison_and_said(folders, tmp_path):
    other = write_run(tmp_path / "d", [(50.0, 1.0), (40.0, 60.0)], tasks=("x", "y"), method="inscl")
    same_tasks_other_metric = write_run(
        tmp_path / "e", SEQUENTIAL, method="kpig", metrics=dict.fromkeys(TASKS, "rouge_l")
    )
    page = Page(write_report([other, *folders, same_tasks_other_metric]))
    assert "inscl is left out of the comparison: it is on other tasks or metrics (x, y)." in page.text
    assert "kpig is left out" in page.text
    text = printed(comparison_table([other, *folders]), width=120)
    assert "inscl is left out" in text
    assert not [line for line in text.splitlines() if line.startswith("inscl ") and "left out" not in line]
    assert (tmp_path / "report-figures" / "inscl-tasks.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_another_order_of_the_same_tasks_is_compared(folders, tmp_path):
    order = ("labels", "dates", "words")
    reverse = write_run(tmp_path / "d", SEQUENTIAL, tasks=order, method="sequential", name="reverse")
    runs = collect([*folders, reverse])
    assert [view.label for view in runs.compared] == [
        "sequential, demo",
        "random-replay",
        "joint",
        "sequential, reverse",
    ]
    page = Page(write_report([*folders, reverse]))
    assert "left out" not in page.text
    assert page.text.count("Score matrix as a table") == 4


@pytest.mark.usefixtures("undrawn")
def test_run_given_twice_is_shown_once(folders, tmp_path):
    page = Page(write_report([folders[0], tmp_path / "b" / ".." / "a", folders[1]], tmp_path / "twice.html"))
    assert "was given twice and is shown once" in page.text
    assert page.text.count("Score matrix as a table") == 2


@pytest.mark.usefixtures("undrawn")
def test_labels_tell_runs_apart(tmp_path):
    runs = [
        write_run(tmp_path / "a", SEQUENTIAL, seed=0),
        write_run(tmp_path / "b", SEQUENTIAL, seed=1),
        write_run(tmp_path / "c", REPLAY, method="kpig"),
    ]
    assert [v.label for v in collect(runs).views] == ["sequential, seed 0", "sequential, seed 1", "kpig"]
    runs = [write_run(tmp_path / "x" / "same", SEQUENTIAL), write_run(tmp_path / "y" / "same", SEQUENTIAL)]
    labels = [v.label for v in collect(runs).views]
    assert labels == [f"sequential, {run.resolve()}" for run in runs]
    write_report(runs)  # and such labels name files, too
    assert len(list((tmp_path / "report-figures").glob("*scores.png"))) == 2


def test_hostile_names_and_answers_are_text(tmp_path):
    attack = "<script>alert('x')</script><img src=https://evil.example/x onerror=alert(1)>"
    folder = write_run(
        tmp_path / "a", SEQUENTIAL, name=attack, method=f"$x$ _{attack}", model=attack, environment={"cpu": attack}
    )
    write_predictions(
        predictions_path(folder, 3, "dates"), [Prediction(attack * 20, attack + "\ud800", (attack,), 0.0)]
    )
    other = write_run(tmp_path / "b", SEQUENTIAL, method="_$under_score$ 日本")
    page = Page(write_report([folder, other], tmp_path / "out.html"))
    assert page.open == []
    assert "script" not in page.tags
    assert list(page.images())
    assert attack in page.text
    assert "[…]" in page.text
    printed(comparison_table([folder, other]))
    assert "[bold" in printed(comparison_table([write_run(tmp_path / "c", SEQUENTIAL, method="[bold")]), width=120)


@pytest.mark.usefixtures("undrawn")
def test_answers_have_their_images_beside_them(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "noise.png")
    gone = str(tmp_path / "<gone>.png")
    folder = write_run(tmp_path / "a", SEQUENTIAL)
    names = (str(tmp_path / "noise.png"), gone, drawn := name_of_bytes(png(Image.new("RGB", (40, 20), "red"))))
    write_predictions(
        predictions_path(folder, 3, "dates"),
        [Prediction("p", "a", ("b",), 0.0, images=names), Prediction("p", "a", ("a",), 100.0, images=(drawn,) * 6)],
    )
    page = Page(write_report([folder]))
    found = [Image.open(io.BytesIO(base64.b64decode(each.partition(",")[2]))) for each in page.references]
    sizes = [(image.format, image.size) for image in found if max(image.size) > 2]  # not the figures, undrawn
    assert sizes == [("PNG", (40, 20))] * 4 + [("JPEG", (128, 64)), ("PNG", (40, 20))]
    assert f"image {gone}: no such file" in page.text
    assert "and 2 more" in page.text
    assert "<gone>" not in page.tags


def test_missing_scores_and_odd_sizes(tmp_path):
    nan = math.nan
    only_seen = [(80.0, nan, nan), (70.0, 90.0, nan), (60.0, 80.0, 70.0)]
    page = Page(write_report([write_run(tmp_path / "a", only_seen, answers=False)]))
    assert "Answers after the last stage" not in page.text
    assert "–" in page.text
    many = tuple(f"task_number_{k:02d}_with_a_very_long_name_indeed" for k in range(9))
    rows = [[90.0 - 3 * abs(i - j) for j in range(9)] for i in range(9)]
    long = write_run(tmp_path / "b", rows, tasks=many, answers=False, replay=1)
    assert "task_number_08" in Page(write_report([long])).text
    single = write_run(tmp_path / "c", [(70.0,)], tasks=("only",))
    page = Page(write_report([single]))
    assert "reached an average of 70.0 points." in page.text
    assert "upper bound" not in page.text


@pytest.mark.usefixtures("undrawn")
def test_many_runs_have_a_short_headline(tmp_path):
    runs = [write_run(tmp_path / "m0", SEQUENTIAL)]
    runs += [
        write_run(tmp_path / f"m{k}", [REPLAY[0], REPLAY[1], (85.0 - k, 80.0, 93.0)], method=f"method-{k}")
        for k in range(1, 9)
    ]
    text = headline(collect(runs))
    assert text.startswith("sequential forgot 58.0 points")
    assert re.findall(r"method-\d forgot \d+\.\d points and", text) == [
        "method-1 forgot 8.5 points and",
        "method-2 forgot 9.0 points and",
        "method-3 forgot 9.5 points and",
    ]
    assert "The table below has all 9 complete runs." in text
    page = Page(write_report(runs))
    assert page.text.index(text) < page.text.index("Forgetting ↓") < page.text.index("method-8")


def test_earlier_tasks_that_gained(tmp_path):
    run = write_run(tmp_path / "a", [(50.0, 1.0, 1.0), (60.0, 50.0, 1.0), (70.0, 60.0, 50.0)], method="mine")
    assert headline(collect([run])) == (
        "mine forgot nothing (earlier tasks gained 10.0 points) and ended at an average of 60.0."
    )


@pytest.mark.usefixtures("undrawn")
def test_damaged_answers_do_not_hide_the_rest(folders):
    path = predictions_path(folders[0], 3, "words")
    path.write_text("{broken\n")
    page = Page(write_report(folders[:1]))
    assert f"Some answers could not be read: {path}:1: broken JSON" in page.text
    assert "answer 1" in page.text


def test_run_without_any_score(tmp_path):
    nan = math.nan
    run = write_run(tmp_path / "a", [(nan, nan, nan)] * 3, answers=False)
    assert "no scores from which" in headline(collect([run]))
    page = Page(write_report([run]))
    assert headline(collect([run])) in page.text
    assert "forgot" not in page.text
    no_untrained = write_run(tmp_path / "b", SEQUENTIAL, answers=False)
    shutil.rmtree(no_untrained / "stages" / "00")
    assert "sequential forgot 58.0 points" in Page(write_report([no_untrained])).text
    assert "FWT" not in printed(comparison_table([no_untrained]))  # forward transfer starts from the untrained model


def test_relative_gain_is_shown_where_there_are_experts(tmp_path):
    run = write_run(tmp_path / "a", SEQUENTIAL, experts={"dates": 80.0, "words": 96.0})
    gain = (40 / 80 + (20 / 80 + 48 / 96) / 2) / 2  # mean of the second and the third stage
    assert f"{100 * gain:.1f}" in printed(comparison_table([run]))
    panels = pictures.comparison_figure(collect([run]).views).axes
    assert [ax.axison for ax in panels] == [True] * 8


@pytest.mark.usefixtures("undrawn")
def test_names_that_make_one_file_name_do_not_overwrite_each_other(tmp_path):
    runs = [write_run(tmp_path / name, SEQUENTIAL, method=name) for name in ("a b", "a-b")]
    write_report(runs)
    names = sorted(file.name for file in (tmp_path / "report-figures").glob("*scores*"))
    assert names == ["a-b-scores-2.png", "a-b-scores.png"]


def test_forgetting_without_an_average(tmp_path):
    rows = [SEQUENTIAL[0], SEQUENTIAL[1], (20.0, 48.0, math.nan)]
    run = write_run(tmp_path / "a", rows, method="mine")
    assert headline(collect([run])) == "mine forgot 58.0 points."


@pytest.mark.usefixtures("undrawn")
def test_output_may_be_a_folder(folders, tmp_path):
    (tmp_path / "out").mkdir()
    assert write_report(folders[:1], tmp_path / "out") == tmp_path / "out" / "report.html"
    assert write_report(folders[:1], tmp_path / "new" / "page.html").exists()
    assert (tmp_path / "new" / "page-figures" / "sequential-scores.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_bad_input(folders, tmp_path):
    with pytest.raises(RunError, match="name at least one"):
        write_report([])
    with pytest.raises(RunError, match=r"nowhere/run\.json: not there"):
        comparison_table([tmp_path / "nowhere"])
    (tmp_path / "file").write_text("")
    nameless = json.loads((folders[1] / "run.json").read_text())
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "run.json").write_text(json.dumps({**nameless, "method": {}}))
    with pytest.raises(RunError, match=r"d/run\.json: method has no name"):
        collect([tmp_path / "d"])
    with pytest.raises(RunError, match=r"file.*: cannot be written"):
        write_report(folders, tmp_path / "file" / "report.html")
    stage = folders[0] / "stages" / "02" / "stage.json"
    stage.write_text(json.dumps({**json.loads(stage.read_text()), "scores": {"dates": 140}}))
    with pytest.raises(RunError, match=r"score of dates is 140.0; scores lie in \[0, 100\]"):
        collect([folders[0]])


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [(1.25, False, "1.2"), (-0.04, True, "0.0"), (3.0, True, "+3.0"), (-3.0, False, "\u22123.0"), (None, False, "–")],
)
def test_numbers(value, sign, text):
    assert number(value, sign=sign) == text


def test_figures_show_the_values(folders):
    views = collect(folders).views
    figure = pictures.score_matrix_figure(views[0])
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown[:6] == ["4.0", "0.0", "20.0", "96.0", "2.0", "20.0"]
    framed = {(round(p.get_y() + 0.43), round(p.get_x() + 0.46)) for p in figure.axes[0].patches}
    assert framed == {(1, 0), (2, 1), (3, 2)}
    assert figure.axes[0].images[0].get_clim() == (0, 100)
    replayed = pictures.replay_figure(views[1]).axes[0].texts
    assert [text.get_text() for text in replayed] == ["", "", "", "10", "", "", "10", "10", ""]
    weights = pictures.balance_weight_figure(views[1])
    assert weights.axes[0].get_yscale() == "log"
    assert list(weights.axes[0].lines[0].get_xdata()) == list(range(1, 31))  # steps go on over the stages
    assert list(weights.axes[1].lines[0].get_ydata()) == [50.0] * 30
    assert pictures.loss_figure(views[0]).axes[0].get_ylim() == (0.0, pytest.approx(2.16))
    bars = pictures.comparison_figure(views)
    assert [text.get_text() for text in bars.axes[2].texts] == ["58.0", "8.0", "–"]
    assert [patch.get_width() for patch in bars.axes[2].patches] == pytest.approx([58.0, 8.0])
    curves = pictures.task_curves_figure(views)
    assert list(curves.axes[0].lines[0].get_ydata()) == [4.0, 96.0, 40.0, 20.0]
