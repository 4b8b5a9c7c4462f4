"""Encoder-decoders: their batches and losses, whole runs of every kind of method, answers, exports, serving."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from resumed import killed_twice
from seq2seq_models import KINDS, seq2seq_folder
from toy_runs import adapter, start
from transformers import AutoModelForSeq2SeqLM

from cit_fast.data import Example, Task, TaskStream
from cit_fast.errors import RunError
from cit_fast.evaluation import read_stages
from cit_fast.inference.continual_model import ContinualModel
from cit_fast.inference.engine import Engine
from cit_fast.inference.export import export_adapters, export_merged
from cit_fast.inference.questions import Question
from cit_fast.key_parts.hidden import hidden_of, pair_collator
from cit_fast.key_parts.pairs import encode_pairs
from cit_fast.methods.objectives import CrossEntropy
from cit_fast.models.adapters import load_encoder
from cit_fast.models.collation import PaddingCollator
from cit_fast.models.config import DataConfig, ModelConfig
from cit_fast.models.encoder_decoder import decoder_start
from cit_fast.models.forward import hidden_rows
from cit_fast.models.generation import generate
from cit_fast.models.pretrained import load_model


def example(name: str, k: int) -> Example:
    return Example(f"Say {name}, then the number.", str(k), (f"{name} {k}",), name, ((0, 3),), source=f"{name}: {k}")


@pytest.fixture(scope="module")
def stream() -> TaskStream:
    def task(name: str) -> Task:
        train, test = (tuple(example(name, k) for k in numbers) for numbers in (range(8), range(100, 103)))
        return Task(name, train, (), test, metric="token_f1")

    return TaskStream((task("alpha"), task("beta")))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("seq2seq")
    return functools.cache(lambda kind: seq2seq_folder(root / kind, kind))


@pytest.fixture
def loaded(folder_of):
    def load(kind: str):
        config = ModelConfig(name=str(folder_of(kind)))
        encoder = load_encoder(folder_of(kind), config, DataConfig(max_length=96))
        return load_model(folder_of(kind), config).eval(), encoder

    return load


@pytest.fixture
def seq2seq_settings(settings):
    """Of a run without its model."""
    return {
        **settings, "data": {"max_length": 192}, "evaluation": {"max_new_tokens": 4, "batch_size": 4},
        "adapter": {"r": 2, "target_modules": "all-linear"},
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- batches, losses


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers(kind, loaded):
    """Of prompts and answers of several lengths; the encoder's prompt ends with EOS, as the tokenizer ends a text."""
    model, encoder = loaded(kind)
    examples = [example("alpha", 3), example("a longer name", 12345), example("b", 7)]
    encoded = encoder.encode_all(examples).encoded
    batch = PaddingCollator(encoder.pad_token_id, decoder_start=decoder_start(model))(encoded)
    ours = CrossEntropy()(model, batch, None)
    tokenizer = encoder.tokenizer
    total, count = 0.0, 0
    for one in examples:
        prompt = tokenizer(f"{one.instruction}\n\n{one.input}\n\n", return_tensors="pt")["input_ids"]
        labels = tokenizer(one.references[0], return_tensors="pt")["input_ids"]
        assert prompt[0, -1] == labels[0, -1] == tokenizer.eos_token_id
        total += model(input_ids=prompt, labels=labels).loss * labels.numel()
        count += labels.numel()
    # Both are sums in float32, in another order: two units in the last place.
    torch.testing.assert_close(ours, total / count, rtol=2**-22, atol=0)
    assert int((batch["labels"] != -100).sum()) == count
    assert batch["labels"].shape[1] < batch["input_ids"].shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_of_pairs_are_those_of_single_passes(kind, loaded):
    model, encoder = loaded(kind)
    model = model.double()  # so that nothing but rounding far below what a wrong place changes is allowed
    examples = [example("alpha", 3), replace(example("a longer name", 12345), key_parts=()), example("b", 7)]
    pairs = encode_pairs(encoder, examples).pairs
    found = hidden_of(model, pair_collator(model, encoder.pad_token_id), pairs)
    position = 0
    for pair in pairs:
        for side, one in ((found.full, pair.full), (found.masked, pair.masked or pair.full)):
            batch = PaddingCollator(encoder.pad_token_id, decoder_start=decoder_start(model))([one])
            labels = batch.pop("labels")[0]
            places = (labels != -100).nonzero()[:, 0] - 1
            alone, _ = hidden_rows(model, batch, places)
            torch.testing.assert_close(
                side[position : position + len(alone)], alone, rtol=0, atol=1e-13 * alone.detach().abs().max().item()
            )
        assert (
            found.targets[position : position + len(alone)].tolist() == pair.full.input_ids[pair.full.prompt_length :]
        )
        position += len(alone)
    assert position == len(found.targets)
    assert not torch.allclose(found.full[0], found.masked[0])


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_transformers_and_do_not_depend_on_the_batch(kind, loaded):
    model, encoder = loaded(kind)
    prompts = [encoder.prompt(example(name, k)) for name, k in (("alpha", 3), ("a much longer name", 12345), ("b", 7))]
    options = {
        "pad_token_id": encoder.pad_token_id, "eos_token_ids": encoder.stop_token_ids,
        "tokenizer": encoder.tokenizer, "max_new_tokens": 8,
    }  # fmt: skip
    together = generate(model, prompts, **options)
    assert all(together)
    assert together == [generate(model, [prompt], **options)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, together, strict=True):
        output = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, num_beams=1, forced_eos_token_id=None,
            decoder_start_token_id=decoder_start(model),
        )  # fmt: skip
        assert encoder.tokenizer.decode(output[0, 1:], skip_special_tokens=True).strip() == answer


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_the_same_bits_and_its_sets_go_elsewhere(
    kind, folder_of, seq2seq_settings, stream, tmp_path
):
    seq2seq_settings |= {"model": {"name": str(folder_of(kind))}, "methods": ["replay-ema"]}
    folder = killed_twice(seq2seq_settings, stream)
    kept = adapter(folder, 2)
    assert any("encoder" in name for name in kept)
    assert any("decoder" in name for name in kept)

    # The run's own model, and PEFT without this package, answer alike.
    model = ContinualModel.from_run(folder)
    answers = model.generate(list(stream[1].test), max_new_tokens=4)
    (name,) = export_adapters(folder, tmp_path / "sets")
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "sets" / name / "README.md").read_text()
    base = AutoModelForSeq2SeqLM.from_pretrained(folder_of(kind))
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "sets" / name)).eval()
    for asked, answer in zip(stream[1].test, answers, strict=True):
        prompt = torch.tensor([model.encoder.prompt(asked)])
        output = theirs.generate(
            input_ids=prompt, max_new_tokens=4, do_sample=False, forced_eos_token_id=None,
            decoder_start_token_id=decoder_start(base),
        )  # fmt: skip
        assert model.encoder.tokenizer.decode(output[0, 1:], skip_special_tokens=True).strip() == answer
    with pytest.raises(RunError, match="vLLM serves LoRA of a causal model"):
        export_adapters(folder, tmp_path / "for-vllm", engine="vllm")
    export_merged(folder, tmp_path / "merged", "shared")
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").config.is_encoder_decoder


METHODS = (
    "lcia", "kpig", "inscl", "switchcit", "switch-tokens", "cit-fast", "o-lora", "sdft", "osft", "lwf", "ewc",
    "on-policy", "surprise", "merge",
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method_trains_them(method, folder_of, seq2seq_settings, stream):
    seq2seq_settings |= {"model": {"name": str(folder_of("t5"))}, "methods": [method]}
    (folder,) = start(seq2seq_settings, stream)
    last = read_stages(folder)[-1]
    assert last.index == 2
    assert last.losses
    assert all(loss == loss for _, loss in last.losses)
    assert not [note for note in last.notes if "have not moved" in note]
    assert ContinualModel.from_run(folder).generate([*stream[0].test, *stream[1].test], max_new_tokens=2)


def test_the_model_itself_learns_and_says_what_it_was_taught(folder_of, seq2seq_settings):
    def task(name: str, answer: str) -> Task:
        examples = tuple(Example(f"Say {name}.", str(k), (answer,), name) for k in range(40))
        return Task(name, examples[:32], (), examples[32:], metric="accuracy", labels=("yes", "no"))

    seq2seq_settings |= {"model": {"name": str(folder_of("t5"))}, "methods": ["sequential"], "adapter": None}
    seq2seq_settings["training"] |= {"num_train_epochs": 4, "learning_rate": 5e-3}
    seq2seq_settings["evaluation"] |= {"decode": "labels", "general": True}
    (folder,) = start(seq2seq_settings, TaskStream((task("first", "yes"), task("second", "no"))))
    stages = read_stages(folder)
    assert stages[1].scores["first"] == stages[2].scores["second"] == 100
    assert stages[2].general.probes
    assert stages[2].general.divergence == {}


def test_they_are_served(folder_of, seq2seq_settings, stream):
    seq2seq_settings |= {"model": {"name": str(folder_of("t5"))}, "methods": ["switch-tokens"]}
    (folder,) = start(seq2seq_settings, stream)
    model = ContinualModel.from_run(folder)
    examples = [*stream[0].test, *stream[1].test]
    with Engine(model, 4) as engine:
        asked = [engine.ask(Question(one, max_new_tokens=4)) for one in examples]
        answers = [each.result(60).answer.text for each in asked]
    assert answers == model.generate(examples, max_new_tokens=4)
