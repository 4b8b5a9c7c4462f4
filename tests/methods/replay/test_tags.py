from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cit_fast.errors import ConfigError, DataError
from cit_fast.methods.replay.tags import LLMTagger, OfflineTagger, merge_similar, normalise, read_tags
from cit_fast.models.chat import Chat


@pytest.mark.parametrize(
    ("tag", "normal"),
    [
        ("Summarized Articles (2)", "summarize article"),
        ("e-mail address", "e mail address"),
        ("person's names", "person name"),
        ("Größen", "größen"),
        ("123 !?", ""),
        ("", ""),
    ],
)
def test_normal_form(tag, normal):
    assert normalise(tag) == normal


@pytest.mark.parametrize(
    ("instruction", "tags"),
    [
        (
            "In this task, you are given an article. Your task is to summarize the article in a sentence.",
            {"summarize article", "article", "sentence"},
        ),
        ("Classify the movie review as positive or negative.", {"classify review", "movie review", "positive"}),
        ("You should not change the selected sentences.", {"change sentence"}),
        ("Convert the number to words and answer with the words only.", {"convert number", "answer word", "number"}),
        ("Sentences are given. Is the person's mood good?", {"sentence", "person mood good"}),
        ("What is 2 + 2?", set()),
        ("", set()),
    ],
)
def test_offline_tags(instruction, tags):
    (found,) = OfflineTagger().tags([instruction])
    assert tags <= set(found)
    assert (not tags) == (not found)
    assert all(tag == normalise(tag) for tag in found)


def test_offline_tags_are_few_and_start_with_what_is_to_be_done():
    text = "Read the story. Then name the hero, the villain, the castle, the river, the forest, the king and the moral."
    found = OfflineTagger(most=4).tags([text, text])
    assert found[0] == found[1]
    assert found[0][:2] == ["read story", "name hero"]
    assert len(found[0]) == 4
    with pytest.raises(ConfigError, match="most: 0"):
        OfflineTagger(most=0)


@given(st.text(max_size=200))
def test_any_text_can_be_tagged(text):
    for tag in OfflineTagger().tags([text])[0]:
        assert tag
        assert tag == tag.lower()


class Planted:
    """An embedder with points given by hand; others stand far from everything."""

    name = "planted"

    def __init__(self, angles: dict[str, float]) -> None:
        self.angles = angles

    def embed(self, texts):
        angles = torch.tensor([self.angles.get(text, 100 + 0.7 * k) for k, text in enumerate(texts)])
        return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_tags_that_mean_the_same_become_the_most_frequent_of_them():
    alike = ["summarize", "summary", "abstract", "digest", "outline"]
    embedder = Planted({tag: 0.01 * k for k, tag in enumerate(alike)} | {"poem": 2.0, "rhyme": 2.01})
    tags = [["Summary", "poems"], ["digest", "summaries"], ["abstracts", "rhyme"], ["summarize", "outline"]]
    assert merge_similar(tags, embedder) == [
        ["poem", "summary"],
        ["summary"],  # each once
        ["rhyme", "summary"],  # two are no cluster
        ["summary"],
    ]
    assert merge_similar(tags, embedder, min_samples=2)[2] == ["poem", "summary"]  # of equals, the alphabet
    assert merge_similar(tags, embedder, min_samples=9) == [
        ["poem", "summary"],
        ["digest", "summary"],
        ["abstract", "rhyme"],
        ["outline", "summarize"],
    ]


def test_nothing_to_merge():
    assert merge_similar([["12"], []], Planted({})) == [[], []]
    assert merge_similar([], Planted({})) == []


@pytest.mark.parametrize(
    ("answer", "tags"),
    [
        ('[{"tag": "news", "explanation": "x"}, {"tag": "Summary"}]', ["news", "Summary"]),
        ('Sure, here you are:\n```json\n[{"tag": "a b"}]\n``` Anything else [1]?', ["a b"]),
        ('["news", "summary"]', ["news", "summary"]),
        ('[1] and [] and ["", "42"] but ["news"]', ["news"]),
        ('[{"tag": 3}, {"label": "x"}, "ok"]', ["ok"]),
        ('[{"tag": "cut', []),
        ('{"tag": "no list"}', []),
        ("I cannot do that.", []),
        ("[" * 5000, []),
        ("", []),
    ],
)
def test_the_list_is_found_in_the_answer(answer, tags):
    assert read_tags(answer) == tags


class Scripted(Chat):
    """Answers every prompt about an instruction by the next line of its script."""

    def __init__(self, script: dict[str, list[str]], cache=None) -> None:
        super().__init__({"scripted": True}, cache)
        self.script, self.asked = script, []

    def _answers(self, prompts):
        for prompt in prompts:
            instruction = prompt.partition("<<<\n")[2].partition("\n>>>")[0]
            self.asked.append(instruction)
            yield prompt, self.script[instruction].pop(0)


def answer(*tags: str) -> str:
    return json.dumps([{"tag": tag, "explanation": "..."} for tag in tags])


def test_tags_of_a_chat_model():
    chat = Scripted({"Do {this}.": [answer("deed")], "Do that.": ["no idea", "[]", answer("other deed")]})
    assert LLMTagger(chat).tags(["Do {this}.", "Do that.", "Do {this}."]) == [["deed"], ["other deed"], ["deed"]]
    assert chat.asked == ["Do {this}.", "Do that.", "Do that.", "Do that."]  # garbage is asked for again, alone


def test_garbage_to_the_end_is_reported_and_good_answers_are_kept(tmp_path):
    script = {"Do this.": [answer("deed")], "Do that.": ["no", "still no", "never " * 50]}
    with pytest.raises(DataError, match=r"1 of 2 instructions got no tags .* 3 attempts; 'Do that.' .* 'never never"):
        LLMTagger(Scripted(script, tmp_path)).tags(["Do this.", "Do that."])
    assert LLMTagger(Scripted({}, tmp_path)).tags(["Do this."]) == [["deed"]]


def test_garbage_may_be_replaced():
    tagger = LLMTagger(Scripted({"Sort the names.": ["no"] * 3, "b": [answer("x")]}), unusable="offline")
    assert tagger.tags(["Sort the names.", "b"]) == [["sort name", "name"], ["x"]]
    assert tagger.replaced == 1
    with pytest.raises(ConfigError, match="unusable: 'ignore'"):
        LLMTagger(Scripted({}), unusable="ignore")
