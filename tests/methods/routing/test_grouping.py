from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from cit_fast.data import Example, Task
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.methods.routing import GroupingRouter, LCIARouter, PerTaskRouter, load_router
from cit_fast.methods.routing.similarity import tfidf_pairwise
from cit_fast.methods.stage import Assignment
from cit_fast.models.adapter_bank import BASE


def make(name, *instructions) -> Task:
    return Task(name, tuple(Example(text, f"input {k}", ("x",)) for k, text in enumerate(instructions * 2)))


def learn(router, tasks, stage):
    chosen = []
    for task in tasks:
        chosen.append(router.assign(stage(task=task)).adapter)
        router.learn(stage(task=task))
    return chosen


def test_the_mean_over_all_pairs_decides(stage):
    first = make("a", "Name the colour of the fruit.", "Which colour does the fruit have?")
    second = make("b", "Name the colour of the car.", "Name the fruit")
    mean = tfidf_pairwise(second.instructions, first.instructions).mean()
    for threshold, expected in ((mean - 1e-9, "set-01"), (mean + 1e-9, "set-02")):
        router = GroupingRouter("tfidf-pairwise", threshold)
        assert router.assign(stage(task=first)) == Assignment("set-01", {}, threshold)
        found = router.assign(stage(task=second))
        assert found == Assignment(expected, {"set-01": pytest.approx(mean)}, threshold)


def test_a_reused_set_keeps_distinct_instructions_in_order(stage):
    router = GroupingRouter(threshold=0.3)
    tasks = [make("a", "Sort the list.", "Order the list."), make("b", "Translate it."), make("c", "Sort the list.")]
    assert learn(router, tasks, stage) == ["set-01", "set-02", "set-01"]
    learn(router, [make("d", "Reverse the list.", "Order the list.")], stage)
    assert router.codebook == {
        "set-01": ("Sort the list.", "Order the list.", "Reverse the list."),
        "set-02": ("Translate it.",),
    }


@pytest.mark.parametrize("similarity", ["tfidf", "tfidf-pairwise", "embedding"])
def test_each_prompt_goes_to_the_most_similar_set(tasks, stage, similarity):
    router = PerTaskRouter(similarity, reject=0)
    assert learn(router, tasks, stage) == ["task-dates", "task-mail", "task-mood"]
    found = router.answer([example for task in tasks for example in task.test], stage())
    right = np.repeat(router.sets, 4)
    assert np.mean(np.array(found) == right) >= (1.0 if similarity.startswith("tfidf") else 0.7)
    plain = [Example(f"{e.instruction}\n\n{e.input}", references=("-",)) for task in tasks for e in task.test]
    assert router.answer(plain, stage()) == found  # as when served: the prompt is one text


def test_what_is_like_nothing_goes_to_the_base_model(tasks, stage):
    router = GroupingRouter()
    learn(router, tasks, stage)
    other = [Example("Compose a limerick about volcanoes", "Etna", ("-",)), tasks[0].test[0]]
    assert router.answer(other, stage()) == [BASE, "set-01"]
    everything = GroupingRouter(reject=0)
    learn(everything, tasks, stage)
    assert BASE not in everything.answer(other, stage())


def test_held_out_tasks_set_the_threshold(tasks, stage):
    router = GroupingRouter(reject=0.2, held_out=["numbers"])
    learn(router, tasks, stage)
    unknown = router._rejection.unknown_prompts()
    assert len(unknown) == 32
    assert router.answer(unknown, stage()).count(BASE) == 32
    missing = GroupingRouter(held_out=["no-such-task"])
    with pytest.raises(ConfigError, match=r"router\.held_out: 'no-such-task'"):
        missing.assign(stage(task=tasks[0]))


@pytest.mark.parametrize("kind", [GroupingRouter, PerTaskRouter])
def test_save_and_load(tasks, stage, tmp_path, kind):
    router = kind("tfidf-pairwise", reads="instruction", reject=0.1)
    learn(router, tasks, stage)
    router.save(tmp_path)
    twin = load_router(tmp_path)
    assert type(twin) is kind
    assert (twin.state(), twin.sets, twin.codebook) == (router.state(), router.sets, router.codebook)
    examples = [example for task in tasks for example in task.test]
    assert twin.answer(examples, stage()) == router.answer(examples, stage())
    twin.save(tmp_path / "again")
    assert (tmp_path / "again/router.json").read_bytes() == (tmp_path / "router.json").read_bytes()


def test_damage_is_named(tasks, stage, tmp_path):
    router = GroupingRouter()
    learn(router, tasks, stage)
    router.save(tmp_path)
    whole = json.loads((tmp_path / "router.json").read_text())
    del whole["checksum"]  # what is wrong in what somebody wrote by hand
    for change, message in (
        ({"state": {**whole["state"], "codebook": {"set-01": []}}}, "damaged .*a set without instructions"),
        ({"state": {**whole["state"], "codebook": [1]}}, "damaged"),
        ({"state": {}}, "damaged .*codebook"),
        ({"options": {"threshold": "high"}}, "damaged"),
        ({"options": {"colour": 1}}, "damaged .*colour"),
        ({"options": {"similarity": "vibes"}}, "damaged .*vibes"),
        ({"router": "oracle"}, "damaged"),
        ({"router": "my_package.MyRouter"}, "load one of your own with its class"),
        ({"format_version": 9}, "format version 9"),
        ({"state": None}, "state is missing"),
    ):
        (tmp_path / "router.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(RunError, match=message) as caught:
            load_router(tmp_path)
        assert "router.json" in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "router.json").write_text("[1]")
    with pytest.raises(RunError, match="a JSON object was expected, not list"):
        load_router(tmp_path)
    with pytest.raises(RunError, match="not there"):
        load_router(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "vibes"}, "similarity: 'vibes' is unknown"),
        ({"threshold": -1}, "threshold: -1"),
        ({"threshold": float("nan")}, "threshold: nan"),
        ({"reads": "mind"}, "reads: 'mind' is unknown"),
        ({"reject": 1.0}, "reject: 1.0; expected a share"),
        ({"linkage": "min"}, "linkage: 'min' is unknown; expected mean or max"),
        ({"start": "zero"}, "start: 'zero' is unknown; expected random, previous or nearest"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        GroupingRouter(**options)


def test_nothing_to_compare(tasks, stage):
    with pytest.raises(RunError, match="the codebook is empty"):
        GroupingRouter().answer(tasks[0].test, stage())
    router = GroupingRouter()
    learn(router, tasks, stage)
    assert router.answer([], stage()) == []
    empty = Example("", references=("x",), messages=(("user", "  "), ("assistant", "x")), source="chat.json:3")
    with pytest.raises(DataError, match=r"chat\.json:3: an empty prompt cannot be routed"):
        router.answer([empty], stage())
    chat = dataclasses.replace(empty, messages=(("user", tasks[1].train[0].instruction), ("assistant", "x")))
    assert GroupingRouter.name == "grouping"
    assert router.answer([chat], stage()) == ["set-02"]


# -- the published grouping ----------------------------------------------------------------------------------------

# Instructions of the CoIN benchmark (arXiv 2403.08350), of its kinds "Origin" and "Diverse", in the order of the paper.
WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
BOX = "Please provide the bounding box coordinate of the region this sentence describes:"
ORIGIN = {
    "ScienceQA": LETTER,
    "TextVQA": WORD,
    "ImageNet": f"What is the object in the image? {WORD}",
    "GQA": WORD,
    "VizWiz": WORD,
    "Grounding": BOX,
    "VQAv2": WORD,
    "OCR-VQA": WORD,
}
DIVERSE = {
    **ORIGIN,
    "TextVQA": "Capture the essence of your response in a single word or a concise phrase.",
    "ImageNet": "Express your answer in a single word or a short, descriptive phrase.",
    "GQA": "Respond to the question briefly, using only one word or a phrase.",
    "VizWiz": "Provide a succinct response with a single word or phrase.",
    "OCR-VQA": "Condense your answer for each question into a single word or concise phrase.",
}
# Table 10 of the LCIA paper.
GROUPS_ORIGIN = [["ScienceQA"], ["TextVQA", "GQA", "VizWiz", "VQAv2", "OCR-VQA"], ["ImageNet"], ["Grounding"]]
GROUPS_DIVERSE = [["ScienceQA"], ["TextVQA", "VizWiz"], ["ImageNet"], ["GQA", "VQAv2", "OCR-VQA"], ["Grounding"]]


def groups(router, instructions, stage):
    found: dict[str, list[str]] = {}
    for name, text in instructions.items():
        task = Task(name, (Example(text, "a question", ("x",), task=name),))
        found.setdefault(router.assign(stage(task=task)).adapter, []).append(name)
    return list(found.values())


@pytest.mark.parametrize("linkage", ["mean", "max"])
def test_the_groups_of_the_paper(stage, linkage):
    assert groups(LCIARouter(0.9, linkage), ORIGIN, stage) == GROUPS_ORIGIN
    assert groups(LCIARouter(0.3, linkage), DIVERSE, stage) == GROUPS_DIVERSE
    # One TF-IDF over the codebook, which is ours, groups differently: ImageNet joins TextVQA.
    assert len(groups(GroupingRouter(threshold=0.3), DIVERSE, stage)) == 4


def test_linkage_by_hand(stage):
    first = make("a", "Name the colour of the fruit.", "Translate the sentence into French.")
    second = make("b", "Name the colour of the car.")
    pairs = tfidf_pairwise(second.instructions, first.instructions)
    for linkage, expected in (("mean", pairs.mean()), ("max", pairs.max())):
        router = LCIARouter(0.0, linkage)
        router.assign(stage(task=first))
        assert router.assign(stage(task=second)).scores == {"set-01": pytest.approx(expected)}


STARTS = {
    "random": [None] * 4,
    "previous": [None, "set-01", None, "set-01"],
    "nearest": [None, "set-01", None, "set-02"],
}


@pytest.mark.parametrize("start", STARTS)
def test_where_a_new_set_starts(stage, start, tmp_path):
    router = LCIARouter(0.9, start=start)
    tasks = [
        make("a", "Sort the list."),
        make("b", "Translate it."),
        make("c", "Sort the list."),
        make("d", "Translate a letter."),
    ]
    starts = []
    for task in tasks:
        starts.append(router.assign(stage(task=task)).start_from)
        router.save(tmp_path)
        router = load_router(tmp_path)  # as a resumed run goes on
    assert starts == STARTS[start]


def test_a_whole_task_gets_one_answer_and_a_stranger_the_last_set(stage):
    router = LCIARouter(0.9)
    learn(router, [make("a", "Sort the list."), make("b", "Translate it."), make("c", "Sort the list.")], stage)
    own = [Example(f"{text}", "input", ("x",), task="mixed") for text in ("Sort the list.", "Sort the list.", "Hum.")]
    # Its instructions are alike to set-01 by 0.5 in the mean: below the threshold, so the last set answers.
    assert router.answer(own, stage()) == ["set-02"] * 3
    assert router.answer(own[:2], stage()) == ["set-01"] * 2
    assert router.answer([Example("Sort the list.", "x", ("x",)), Example("Hum.", "x", ("x",))], stage()) == [
        "set-01",
        "set-02",
    ]
    assert router.answer([], stage()) == []
    lost = dataclasses.replace(stage(), damaged=frozenset({"set-01"}))
    assert router.answer(own[:2], lost) == ["set-02"] * 2
    everything = dataclasses.replace(stage(), damaged=frozenset({"set-01", "set-02"}))
    assert router.answer(own[:2], everything) == [BASE] * 2
    with pytest.raises(RunError, match="the codebook is empty"):
        LCIARouter().answer(own, stage())


def test_a_turn_whose_last_line_is_the_instruction(stage):
    def turns(task, *questions):
        texts = [f"{question}\n{WORD}" for question in questions]
        spans = [(len(text) - len(WORD), len(text)) for text in texts]
        pairs = zip(texts, spans, strict=True)
        return Task(task, tuple(Example(text, "", ("x",), instruction_span=span) for text, span in pairs))

    router = LCIARouter(0.9)
    tasks = [turns("TextVQA", "Which brand is this?", "What does the sign say?"), turns("GQA", "Is the dog brown?")]
    assert [router.assign(stage(task=task)).adapter for task in tasks] == ["set-01", "set-01"]
    assert router.codebook == {"set-01": (WORD,)}
