"""A batch that prompts join and leave: every answer is the one that its prompt has alone."""

from __future__ import annotations

import functools
import random
from contextlib import contextmanager

import pytest
import torch
from toy_models import decided_llama
from transformers import GenerationConfig

from cit_fast.models.adapter_bank import BASE, AdapterBank, LowRank, _Layer
from cit_fast.models.generation import generating
from cit_fast.models.prefix_cache import Beginnings, PromptReader
from cit_fast.models.running_batch import Chance, Row, RunningBatch

PAD, EOS, VOCABULARY = 0, 2, 32


@pytest.fixture(scope="module")
def model():
    return decided_llama()


@pytest.fixture(scope="module")
def bank(model):
    """Two sets on every linear layer of the decoder, of different ranks."""
    generator = torch.Generator().manual_seed(3)
    found = AdapterBank()
    found.names = {"one", "two"}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            layer = found._layers[path] = _Layer(module, module.forward)
            for name, rank in (("one", 2), ("two", 5)):
                a, b = (
                    torch.randn(shape, generator=generator) * 0.4
                    for shape in ((rank, module.in_features), (module.out_features, rank))
                )
                layer.updates[name] = LowRank(a, b, 0.7)
    return found


@contextmanager
def batch_of(model, bank=None, ends=(EOS,)):
    with generating(model, GenerationConfig(do_sample=False, pad_token_id=PAD, eos_token_id=list(ends))):
        yield RunningBatch(PromptReader(model, None if bank is None else bank.answering), PAD, ends)


def copy_of(row: Row) -> Row:
    chance = row.chance and Chance(row.chance.temperature, seed_of[row.chance])
    return Row(row.prompt, row.longest, row.adapter, chance)


seed_of: dict[Chance, int] = {}


def chance_of(temperature: float, seed: int) -> Chance:
    chance = Chance(temperature, seed)
    seed_of[chance] = seed
    return chance


def alone(model, row: Row, bank=None, ends=(EOS,)) -> tuple[list[int], bool]:
    row = copy_of(row)
    with batch_of(model, bank, ends) as batch:
        batch.join([row])
        while batch.rows:
            batch.step(100)
    return row.tokens, row.ended


def random_row(rng: random.Random, sets) -> Row:
    prompt = [rng.randrange(3, VOCABULARY) for _ in range(rng.choice([1, 2, 3, 8, 17]))]
    chance = chance_of(rng.choice([0.5, 1.5]), rng.randrange(100)) if rng.random() < 0.3 else None
    return Row(prompt, rng.choice([1, 2, 7, 20]), rng.choice(sets) if sets else None, chance)


def test_alone_is_the_definition(model):
    """The whole sequence through the model for every token."""
    row = Row([5, 9, 3, 30], 12)
    tokens = list(row.prompt)
    with torch.no_grad():
        for _ in range(12):
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            if token == EOS:
                break
            tokens.append(token)
    assert alone(model, row)[0] == tokens[4:]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_whoever_joins_and_leaves(model, bank, seed, mixed):
    """Rows of all lengths come at any time, end, or are taken out before they do."""
    rng = random.Random(seed)
    ends = (EOS, 4, 7, 11, 19, 25)
    sets = ["one", "two", BASE] if mixed else []
    own = bank if mixed else None
    done, gone, there = [], [], []
    with batch_of(model, own, ends) as batch:
        for _ in range(12):
            new = [random_row(rng, sets) for _ in range(rng.randrange(4))]
            if new:
                done += batch.join(new)
                there += new
            if batch.rows and rng.random() < 0.2:
                row = rng.choice(batch.rows)
                batch.leave([row])
                gone.append(row)
            if batch.rows:
                done += batch.step(rng.choice([1, 3, 8]))
        while batch.rows:
            done += batch.step()
    assert len(done) + len(gone) == len(there) > 10
    for row in done:
        assert (row.tokens, row.ended) == alone(model, row, own, ends)
        assert row.ended or len(row.tokens) == row.longest
    for row in gone:
        assert row.tokens == alone(model, row, own, ends)[0][: len(row.tokens)]
    assert any(row.ended for row in done)
    assert any(row.chance for row in done)


def test_padding_of_those_that_left_goes_with_them(model):
    """A batch that never empties does not grow wider than its longest row."""
    with batch_of(model, ends=()) as batch:
        widths = []
        for start in range(3, 30):
            batch.join([Row([start] * 4, 6)])
            batch.step(3)
            widths.append(batch._ids.shape[1])
    assert max(widths) <= 4 + 6 + 3
    assert len(batch.rows) == 1


def test_a_batch_is_no_wider_than_its_longest_row(model):
    """A row that has left does not push the others over what the model can read."""
    long, short = Row(list(range(3, 28)) * 2, 4), Row([5, 9, 3], 60)
    with batch_of(model, ends=()) as batch:
        batch.join([long, short])
        while batch.rows:
            batch.step(3)
            assert not batch.rows or batch._ids.shape[1] == max(len(row.prompt) + len(row.tokens) for row in batch.rows)
    assert short.tokens == alone(model, short, ends=())[0]


def test_a_prompt_that_cannot_be_read_changes_nothing(model, monkeypatch):
    first, expected = Row([5, 9, 3], 9), alone(model, Row([5, 9, 3], 9), ends=())
    with batch_of(model, ends=()) as batch:
        batch.join([first])
        batch.step(2)
        with monkeypatch.context() as patch:
            patch.setattr(model, "generate", lambda **_: (_ for _ in ()).throw(MemoryError("no room")))
            with pytest.raises(MemoryError):
                batch.join([Row([8, 8, 8], 4)])
        assert batch.rows == [first]
        while batch.rows:
            batch.step()
    assert (first.tokens, first.ended) == expected


def test_what_prompts_begin_with_is_read_once(model, bank, monkeypatch):
    """By prompts of the same set, from the second join on; of the others all is read in the same pass."""
    passes, plain = [], model.forward

    @functools.wraps(plain)  # transformers looks at its arguments
    def forward(*args, **kwargs):
        passes.append(tuple(kwargs["input_ids"].shape))
        return plain(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    beginning = list(range(3, 25))
    with batch_of(model, bank, ends=()) as batch:

        def joined(*prompts) -> list[tuple[int, ...]]:
            passes.clear()
            rows = [Row(prompt, 3, name) for name, prompt in prompts]
            batch.join(rows)
            found = list(passes)
            while batch.rows:
                batch.step()
            for row in rows:
                assert row.tokens == alone(model, row, bank, ends=())[0]
            return found

        assert joined(("one", [*beginning, 26, 9]), ("one", [*beginning, 27])) == [(2, 24)]
        assert joined(("one", [*beginning, 28, 9])) == [(1, 2)]
        assert joined(("one", [*beginning, 28, 9])) == [(1, 1)]  # a prompt that is known
        assert joined(("one", [*beginning, 28, 9, 4, 4])) == [(1, 2)]
        assert joined(("two", [*beginning, 28])) == [(1, 23)]  # the same prompt is another to another set
        assert joined(("two", [*beginning, 5]), ("one", [*beginning, 6, 7, 8, 9])) == [(2, 4)]
        assert joined(("two", [*beginning, 5]), ("one", [9, 9, 9])) == [(2, 3)]


def test_only_so_much_is_kept():
    kept = Beginnings(most=1000)
    for number in range(20):
        kv = [(torch.ones(2, 5, 4), torch.ones(2, 5, 4))]  # 320 bytes
        kept.keep("a", [number] * 5, kv)
    assert [kept.find("a", [number] * 3)[0] for number in range(20)] == [0] * 17 + [3] * 3
    kept.keep("a", [19] * 7, [(torch.ones(2, 7, 4), torch.ones(2, 7, 4))])  # in place of what it begins with
    assert [kept.find("a", [number] * 6)[0] for number in (17, 18, 19)] == [0, 5, 6]
    assert kept.find("b", [19] * 6) == (0, [])
    kept.keep("c", [1] * 30, [(torch.ones(2, 30, 4), torch.ones(2, 30, 4))])  # 64 bytes a token: 15 of them
    assert kept.find("c", [1] * 30)[0] == 15
