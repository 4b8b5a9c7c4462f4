"""The policy on its own: distances, budgets, what it records, and what it keeps."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import ot
import pytest
import torch

from cit_fast.data import Example, Task
from cit_fast.embeddings.token_mean import TokenMeanEmbedder
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation.records import ReplayRecord
from cit_fast.methods.replay import (
    DiverseInstructionReplay,
    InsCLReplay,
    PrototypeDataReplay,
    PrototypeInstructionReplay,
    RandomReplay,
    inscl,
)
from cit_fast.methods.stage import Selection, Stage

WORDS = ["red", "green", "blue", "apple", "pear", "plum"]


def task(name: str, *instructions: tuple[str, int]) -> Task:
    """A task with so many examples of each instruction, taking turns."""
    made = [Example(text, f"{name} {k}", (f"{k}",), task=name) for text, count in instructions for k in range(count)]
    return Task(name, tuple(sorted(made, key=lambda each: int(each.references[0]))))


COLOURS = task("colours", ("red green", 30), ("green blue", 10))
FRUIT = task("fruit", ("apple pear", 20), ("pear plum", 20))
MIXED = task("mixed", ("red apple", 5), ("blue plum", 35))
NEW = task("new", ("red green blue", 8), ("red", 2))


class Whitespace:
    """A tokenizer of six words."""

    backend_tokenizer = None

    def get_vocab(self):
        return {word: k for k, word in enumerate(WORDS)}

    def __call__(self, texts, **_options):
        return {"input_ids": [[WORDS.index(word) for word in text.split() if word in WORDS] for text in texts]}


def completion(text: str) -> tuple[int, dict, dict]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


@pytest.fixture
def model():
    """Colours point one way, fruit another."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(6, 4)
    with torch.no_grad():
        table.weight.copy_(0.2 * torch.randn(6, 4) + torch.tensor([[1.0, 0, 0, 0]] * 3 + [[0, 1.0, 0, 0]] * 3))
    return SimpleNamespace(get_input_embeddings=lambda: table)


def select(policy, stage) -> tuple[list[Example], ReplayRecord]:
    found = policy.select(stage)
    return found.examples, found.record


def stage(model, seen, new=NEW, seed=0, **more) -> Stage:
    encoder = SimpleNamespace(tokenizer=Whitespace())
    return Stage(model, encoder, tasks=(new,), seen=tuple(seen), seed=str(seed), **more)


def counts(chosen) -> dict[str, int]:
    return {name: sum(each.task == name for each in chosen) for name in dict.fromkeys(each.task for each in chosen)}


def emd(model, a, b, weights) -> float:
    """The distance by its definition, straight from POT."""

    def measure(of):
        texts = list(dict.fromkeys(each.instruction for each in of.train))
        share = [sum(e.instruction == text for e in of.train) if weights == "real" else 1 for text in texts]
        table = model.get_input_embeddings().weight.detach().double().numpy()
        points = np.stack([table[[WORDS.index(word) for word in text.split()]].mean(axis=0) for text in texts])
        return points, np.array(share) / sum(share)

    (x, p), (y, q) = measure(a), measure(b)
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, y)]
    return ot.emd2(p, q, 1 - unit[0] @ unit[1].T)


@pytest.mark.parametrize("weights", ["real", "uniform"])
def test_distances_and_budgets_are_those_of_the_definition(model, weights):
    asked = stage(model, [COLOURS, FRUIT, MIXED])
    chosen, record = select(InsCLReplay(fraction=0.3, weights=weights), asked)
    expected = {each.name: emd(model, each, NEW, weights) for each in asked.seen}
    assert record.distances == pytest.approx(expected, abs=1e-6)  # points are float32
    assert record.distances["fruit"] == max(record.distances.values())
    quotas = {name: 36 * distance / sum(expected.values()) for name, distance in expected.items()}
    shares = record.budgets
    assert sum(shares.values()) == len(chosen) == 36
    assert all(abs(shares[name] - quotas[name]) < 1 for name in shares)
    assert counts(chosen) == {name: share for name, share in shares.items() if share}
    assert len(set(chosen)) == len(chosen)


def test_real_and_uniform_weights_differ(model):
    rows = []
    for weights in ("real", "uniform"):
        asked = stage(model, [COLOURS, MIXED])
        _, record = select(InsCLReplay(weights=weights), asked)
        rows.append(list(record.distances.values()))
    assert rows[0] != pytest.approx(rows[1], rel=0.01)


def test_the_budget_is_that_of_random_replay(model):
    seen = [COLOURS, FRUIT, MIXED]
    for options in ({"fraction": 0.13}, {"per_task": 9}):
        random_replay = len(RandomReplay(**options).select(stage(model, seen)).examples)
        for kind in (InsCLReplay, PrototypeDataReplay, PrototypeInstructionReplay, DiverseInstructionReplay):
            assert len(kind(**options).select(stage(model, seen)).examples) == random_replay


def test_a_budget_larger_than_the_history(model):
    asked = stage(model, [COLOURS, FRUIT])
    found = InsCLReplay(per_task=200).select(asked)
    assert counts(found.examples) == {"colours": 40, "fruit": 40}
    budget, merged = found.record.notes
    assert budget == "The budget of 400 is larger than the history of 80: all of it came back."
    assert re.fullmatch(r"Of \d+ tags \d+ were merged with another that says the same\.", merged)


def test_tasks_with_the_same_instructions_share_equally(model):
    twins = [task(name, ("red green", 20)) for name in ("a", "b", "c")]
    asked = stage(model, twins, task("d", ("red green", 5)))
    assert counts((found := InsCLReplay(per_task=5, within="random").select(asked)).examples) == {
        "a": 5,
        "b": 5,
        "c": 5,
    }
    assert found.record.distances == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert "All distances are zero" in found.record.notes[0]


def test_nothing_seen(model):
    asked = stage(model, [])
    for kind in (InsCLReplay, PrototypeDataReplay, DiverseInstructionReplay):
        assert kind().select(asked) == Selection([])


class Planted:
    """Tags by hand."""

    def __init__(self, **tags):
        self.of = {text.replace("_", " "): own for text, own in tags.items()}

    def tags(self, instructions):
        return [self.of[text] for text in instructions]


def test_rare_tags_bring_back_more_and_the_new_task_counts(model):
    tagger = Planted(red_green=["red", "apple"], green_blue=["blue"], red_green_blue=["blue"], red=["blue"])
    asked = stage(model, [COLOURS])
    chosen, record = select(InsCLReplay(per_task=12, tagger=tagger), asked)
    # Over four instructions: log 4 twice against log(4/3); shares of 12: floor(10.87) and floor(1.13).
    ranked = record.instructions
    assert [entry.insinfo for entry in ranked] == pytest.approx([2 * np.log(4), np.log(4 / 3)])
    assert [(entry.instruction, entry.drawn, entry.available) for entry in ranked][1][1] in {1, 2}
    assert ranked[0].drawn == sum(each.instruction == "red green" for each in chosen) >= 10
    assert ranked[0].tags == ["apple", "red"]
    assert record.instruction_count == 2


def test_a_small_budget_takes_the_top_instruction(model):
    tagger = Planted(red_green=["blue"], green_blue=["red"], red_green_blue=["blue"], red=["blue"])
    for seed in range(4):
        chosen, _record = select(InsCLReplay(per_task=1, tagger=tagger), stage(model, [COLOURS], seed=seed))
        assert [each.instruction for each in chosen] == ["green blue"]


def test_the_draw_follows_the_generator_alone(model):
    seen = [COLOURS, FRUIT]
    for kind in (InsCLReplay, PrototypeDataReplay, PrototypeInstructionReplay, DiverseInstructionReplay):
        policy = kind(fraction=0.2)
        assert policy.select(stage(model, seen, seed=1)) == policy.select(stage(model, seen, seed=1))
    policy = InsCLReplay(fraction=0.2)
    assert policy.select(stage(model, seen, seed=1)) != policy.select(stage(model, seen, seed=2))


def test_one_new_row_per_task_and_never_twice(model, tmp_path, monkeypatch):
    pairs = []
    original = inscl.wasserstein_matrix
    monkeypatch.setattr(inscl, "wasserstein_matrix", lambda *a, **k: pairs.append(k["pairs"]) or original(*a, **k))
    order = [COLOURS, FRUIT, MIXED, NEW]
    rows = []
    for _ in range(2):
        for arrived in range(1, 4):
            asked = stage(model, order[:arrived], order[arrived], kept=tmp_path)
            _, record = select(InsCLReplay(), asked)
            rows.append(record.distances)
    assert pairs == [[(0, 1)], [(0, 2), (1, 2)], [(0, 3), (1, 3), (2, 3)]]
    assert rows[:3] == rows[3:]
    assert list(rows[2]) == ["colours", "fruit", "mixed"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"key": 1}', None])
def test_a_kept_row_that_is_damaged_or_of_other_data_is_computed_anew(model, tmp_path, damage):
    asked = InsCLReplay().select(stage(model, [COLOURS, FRUIT], kept=tmp_path)).record
    (path,) = tmp_path.rglob("*.json")
    other = NEW
    if damage is None:
        other = task("new", ("pear", 3))
        path.write_text(json.dumps({**json.loads(path.read_text()), "distances": [0.5, 0.5]}))
    else:
        path.write_text(damage)
    again = InsCLReplay().select(stage(model, [COLOURS, FRUIT], other, kept=tmp_path)).record
    assert (again.distances == asked.distances) == (damage is not None)
    assert again.distances != {"colours": 0.5, "fruit": 0.5}


def test_tokens_are_those_of_the_model_as_it_is(model):
    policy = InsCLReplay()
    before = policy.select(stage(model, [COLOURS, FRUIT])).record
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(torch.randn(6, 4))
    after = policy.select(stage(model, [COLOURS, FRUIT])).record
    assert before.distances != after.distances


def test_tags_of_a_chat_model_are_asked_once_for_all_tasks(serve, model, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)

    def respond(prompt, attempt):
        text = prompt.partition("<<<\n")[2].partition("\n>>>")[0]
        if text == "pear plum":
            return completion("I would rather not.")
        return completion(json.dumps([{"tag": word, "explanation": ""} for word in text.split()]))

    with serve(respond) as server:
        tagger = {"base_url": server.url, "model": "stub", "key_variable": "NO_KEY"}
        asked = stage(model, [COLOURS], FRUIT, cache=tmp_path)
        with pytest.raises(Exception, match="1 of 4 instructions got no tags from the chat model in 3 attempts"):
            _, record = select(InsCLReplay(tagger=tagger), asked)
        assert len(server.requests) == 4 + 2
        policy = InsCLReplay(tagger={**tagger, "unusable": "offline"})
        asked = stage(model, [COLOURS], FRUIT, cache=tmp_path)
        _, record = select(policy, asked)
        assert len(server.requests) == 6 + 3  # what was answered is known, what was of no use is asked again
        assert record.notes[1:] == ["1 of 4 instructions got their tags offline: the chat model's answers held none."]
        policy.select(stage(model, [COLOURS, FRUIT], NEW, cache=tmp_path))
        assert len(server.requests) == 9 + 2  # the two new ones
    down = InsCLReplay(tagger={**tagger, "attempts": 1})
    with pytest.raises(RunError, match="no answer to 2 of 2 prompts"):
        down.select(stage(model, [COLOURS], MIXED, cache=tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "fraction: 0 is outside"),
        ({"per_task": 0}, "per_task: 0 is not a positive number"),
        ({"weights": "real-ish"}, "weights: 'real-ish' is unknown"),
        ({"distance": "sinkhron"}, "distance: 'sinkhron' is unknown"),
        ({"tagger": "online"}, "tagger: 'online' is unknown"),
        ({"tagger": {"base_url": "http://host/v1"}}, "missing 1 required positional argument: 'model'"),
        ({"tagger": {"local": "a/b", "unusable": "skip"}}, "unusable: 'skip'"),
        ({"eps": 0}, "eps, min_samples: 0, 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        InsCLReplay(**options)


def test_an_embedder_that_is_none(model):
    with pytest.raises(ConfigError, match=r"embedder .*: no folder 'no-such-model'"):
        InsCLReplay(embedder="no-such-model").select(stage(model, [COLOURS]))


# --- the baselines of the paper -----------------------------------------------------------------------------


def test_prototype_data_are_nearest_to_their_centres(model):
    odd = task("odd", ("red green", 12))
    inputs = ["apple" if k in {3, 7} else "green" for k in range(12)]
    odd = Task(
        "odd",
        tuple(Example(e.instruction, text, e.references, "odd") for e, text in zip(odd.train, inputs, strict=True)),
    )
    chosen, _record = select(PrototypeDataReplay(per_task=10), stage(model, [odd]))
    assert {each.input for each in chosen} == {"green"}


def test_prototype_instructions_come_first_and_others_fill_up(model):
    instructions = [("red", 6), ("red red green", 6), ("red green", 6), ("apple", 6), ("apple apple pear", 6)]
    seen = [task("pool", *instructions)]
    few, _ = select(PrototypeInstructionReplay(per_task=12), stage(model, seen))
    assert len({each.instruction for each in few}) == 2  # a colour and a fruit: the best silhouette has two clusters
    assert {each.instruction.split()[0] for each in few} == {"red", "apple"}
    more, _ = select(PrototypeInstructionReplay(per_task=20), stage(model, seen))
    assert {each.instruction for each in few} < {each.instruction for each in more}
    assert len(set(more)) == 20
    with pytest.raises(ConfigError, match="most_clusters: 1"):
        PrototypeInstructionReplay(most_clusters=1)


def test_diverse_instructions_are_those_least_like_the_new_ones(model):
    seen = [task("pool", ("red green", 5), ("apple pear", 5), ("red apple", 5))]
    chosen, _record = select(DiverseInstructionReplay(per_task=7), stage(model, seen))
    assert [each.instruction for each in chosen] == ["apple pear"] * 5 + ["red apple"] * 2


def test_token_means_are_the_default(model):
    embedder = inscl.embedder_for("tokens", stage(model, [COLOURS]), {})
    assert isinstance(embedder, TokenMeanEmbedder)


class Directions:
    """An embedder whose texts are one point each, but for those that mean the same."""

    name = "directions"

    def __init__(self, alike):
        self.alike, self.seen = alike, []

    def embed(self, texts):
        self.seen += texts
        first = {text: group[0] for group in self.alike for text in group}
        points = torch.eye(64)
        order: dict[str, int] = {}
        return torch.stack([points[order.setdefault(first.get(text, text), len(order))] for text in texts])


def test_tags_have_an_embedder_of_their_own(model, monkeypatch):
    """The paper's pair: one model for the distances of instructions, another for the meaning of tags."""
    of_tags = Directions([])
    build = inscl.build_embedder
    monkeypatch.setattr(
        inscl, "build_embedder", lambda spec, **options: of_tags if spec == "phrases" else build(spec, **options)
    )
    _, record = select(InsCLReplay(tag_embedder="phrases"), stage(model, [COLOURS, FRUIT]))
    assert "blue" in of_tags.seen
    _, alone = select(InsCLReplay(), stage(model, [COLOURS, FRUIT]))
    assert record.distances == alone.distances  # which the model's own token means still decide


def test_offline_tags_merge_where_two_say_the_same():
    tags = [["classify text", "mood"], ["classify sentence"], ["write"]]
    merged = inscl.merge_similar(tags, Directions([("classify text", "classify sentence")]), eps=0.2, min_samples=2)
    assert merged[0][0] == merged[1][0]
    assert (InsCLReplay().eps, InsCLReplay().min_samples) == (0.2, 2)
    assert (InsCLReplay(tagger={"local": "model"}).eps, InsCLReplay(tagger={"local": "model"}).min_samples) == (0.1, 5)
