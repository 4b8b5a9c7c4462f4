"""Prompts with images, in five kinds of vision-language models made from their configurations."""

from __future__ import annotations

import base64
import copy
import io
from dataclasses import replace

import pytest
import torch
from PIL import Image
from seeing_models import KINDS, seeing_model_folder

from cit_fast.data.example import Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.key_parts.hidden import hidden_of, pair_collator
from cit_fast.key_parts.pairs import encode_pairs
from cit_fast.models.adapters import load_encoder, train_adapter
from cit_fast.models.collation import PaddingCollator
from cit_fast.models.config import DataConfig, ModelConfig
from cit_fast.models.generation import generate
from cit_fast.models.image_places import without_images
from cit_fast.models.pretrained import load_model
from cit_fast.run.label_choice import most_likely


def picture(colour: str, width: int = 40, height: int = 40) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


ONE = Example("What colour?", "", ("red",), "t", images=(picture("red"),))
NONE = Example("Say hi.", "", ("hi",), "t")
TWO = Example(
    "Which", "<image> or <image>?", ("first",), "t", images=(picture("blue", 64, 32), picture("green", 20, 50))
)
TURNS = Example(
    "And now?", "", ("two",), "t", images=(picture("blue"), picture("green")),
    messages=(("user", "Look: <image>"), ("assistant", "one"), ("user", "<image>And now?"), ("assistant", "two")),
)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def seeing(request, tmp_path_factory):
    folder = seeing_model_folder(tmp_path_factory.mktemp("seeing") / request.param, request.param)
    config = ModelConfig(name=str(folder))
    model = load_model(folder, config).eval()
    encoder = load_encoder(folder, config, DataConfig(max_length=400))
    encoder.fit_to(model)
    return model, encoder


def test_a_batch_is_what_each_of_its_examples_is_alone(seeing):
    model, encoder = seeing
    encoded = encoder.encode_all([ONE, NONE, TWO, TURNS]).encoded
    collate = PaddingCollator(encoder.pad_token_id)
    with torch.no_grad():
        together = model(**collate(encoded)).logits
        for row, one in enumerate(encoded):
            alone = model(**collate([one])).logits[0, : len(one)]
            torch.testing.assert_close(together[row, : len(one)], alone, rtol=1e-5, atol=1e-5)


def test_the_model_sees_its_own_image_at_its_place(seeing):
    model, encoder = seeing
    collate = PaddingCollator(encoder.pad_token_id)

    def logits(*examples):
        with torch.no_grad():
            return model(**collate(encoder.encode_all(examples).encoded)).logits

    other = replace(ONE, images=(picture("blue"),))
    swapped = replace(TWO, images=TWO.images[::-1])
    first = logits(ONE, other)
    assert (first[0] - first[1]).abs().amax() > 1e-3
    assert (logits(TWO) - logits(swapped)).abs().amax() > 1e-3
    # Another row's image changes nothing.
    torch.testing.assert_close(logits(NONE, ONE)[0], logits(NONE, other)[0], rtol=1e-5, atol=1e-5)


def test_the_answer_alone_is_learned_and_no_token_of_an_image(seeing):
    _, encoder = seeing
    for example in (ONE, TWO, TURNS):
        encoded = encoder.example(example)
        learned = [token for token in encoded.labels if token != -100]
        assert encoder.tokenizer.decode(learned[:-1]) == example.references[0]
        assert learned[-1] == encoder.end_of_turn_id
        assert not encoder.images.token_ids & set(learned)
        assert encoder.prompt(example) == encoded.input_ids[: encoded.prompt_length]
        assert encoder.text_of(encoder.prompt(example)).count(encoder.images.token) == len(example.images)


def test_answers_in_a_batch_are_those_of_each_prompt_alone(seeing):
    model, encoder = seeing
    prompts = [encoder.prompt(example) for example in (ONE, NONE, TWO, TURNS, replace(NONE, input="4"))]
    options = {
        "pad_token_id": encoder.pad_token_id, "eos_token_ids": [], "tokenizer": encoder.tokenizer, "max_new_tokens": 5,
    }  # fmt: skip
    alone = [generate(model, [prompt], **options)[0] for prompt in prompts]
    assert generate(model, prompts, **options) == alone
    # transformers itself, from the processor's own batch of one
    inputs = {"input_ids": torch.tensor([list(prompts[0])]), **prompts[0].pictures.inputs(prompts[0])}
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert encoder.tokenizer.decode(output[0, len(prompts[0]) :], skip_special_tokens=True).strip() == alone[0]


def test_labels_are_chosen_by_what_is_seen(seeing):
    model, encoder = seeing
    labels = [encoder.answer(ONE, label) for label in ("red", "blue")]
    options = {"pad_token_id": encoder.pad_token_id, "batch_size": 2}
    prompts = [encoder.prompt(example) for example in (ONE, NONE, TWO)]
    together = most_likely(model, prompts, choices=[labels] * 3, **options)
    assert together == [most_likely(model, [prompt], choices=[labels], **options)[0] for prompt in prompts]


def test_both_contexts_of_a_pair_have_the_image(seeing):
    model, encoder = seeing
    marked = [replace(example, key_parts=((0, 4),)) for example in (ONE, TWO)]
    pairs = encode_pairs(encoder, marked).pairs
    with torch.no_grad():
        found = hidden_of(model, pair_collator(model, encoder.pad_token_id), pairs)
        dark = encode_pairs(encoder, [replace(marked[0], images=(picture("black"),))]).pairs
        other = hidden_of(model, pair_collator(model, encoder.pad_token_id), dark)
    rows = slice(0, int(found.offsets[1]))
    for ours, theirs in ((found.full, other.full), (found.masked, other.masked)):
        assert (ours[rows] - theirs).abs().amax() > 1e-3


def test_language_model_and_projector_train_and_nothing_of_the_tower(seeing):
    model, _ = seeing
    lora = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
    adapted, _ = train_adapter(copy.deepcopy(model), lora, "own", 0)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    layers = [name for name in trained if "lora_" in name]
    assert layers
    assert all("language_model" in name or "text_model" in name for name in layers)
    others = [name for name in trained if "lora_" not in name]
    assert others
    assert all("modules_to_save" in name for name in others)
    whole, _ = train_adapter(copy.deepcopy(model), None, "own", 0)
    still = {name for name, parameter in whole.named_parameters() if not parameter.requires_grad}
    assert still
    assert all("vision" in name or "visual" in name for name in still)
    assert not any("language_model" in name or "merger" in name or "projector" in name for name in still)


def test_an_input_is_cut_and_an_image_never(seeing):
    _, encoder = seeing
    long = replace(TWO, input=TWO.input + " word" * 400)
    encoded = encoder.example(long)
    assert encoded.truncated
    assert len(encoded) <= 400
    assert encoded.pictures.names == TWO.images
    short = encoder.with_limit(60, "skip")
    assert short.encode_all([replace(long, input="x" * 100 + TWO.input)]).encoded == []
    late = encoder.with_limit(len(encoder.example(TURNS)) - 4, "truncate").example(TURNS)
    assert late.pictures.names == TURNS.images[1:]


def test_what_cannot_be_shown_is_refused_by_name(seeing):
    _, encoder = seeing
    token = encoder.images.token
    for example, words in (
        (replace(TWO, input="<image>?", source="a.json: record 3"), "a.json: record 3: 2 images and 1 place"),
        (
            replace(NONE, instruction=f"Say {token}.", source="b: record 1"),
            "b: record 1: 0 images, .* has 1",
        ),
        (replace(ONE, images=("/nowhere/x.png",), source="c: record 2"), "c: record 2: .*x.png"),
    ):
        with pytest.raises(DataError, match=words):
            encoder.example(example)


def test_an_image_that_changes_size_later_is_an_error(tmp_path, seeing):
    _, encoder = seeing
    file = tmp_path / "a.png"
    Image.new("RGB", (64, 32), "red").save(file)
    encoded = encoder.example(replace(ONE, images=(str(file),), source="d: record 1"))
    Image.new("RGB", (16, 200), "red").save(file)
    again = encoder.example(replace(ONE, images=(str(file),)))
    if len(again) == len(encoded):  # every image has as many tokens: LLaVA 1.5, Gemma 3
        assert encoder.images.processor.__class__.__name__ in ("LlavaProcessor", "Gemma3Processor")
        seen, now = (PaddingCollator(0)([each])["pixel_values"] for each in (encoded, again))
        assert torch.equal(seen, now), "what is there when the batch is made"
        return
    with pytest.raises(DataError, match="d: record 1: an image has changed"):
        PaddingCollator(0)([encoded])


def test_without_its_images_an_example_is_a_text():
    bare = without_images(replace(TWO, instruction="<image>\nWhich", key_parts=((8, 13),)))
    assert (bare.images, bare.instruction, bare.input, bare.key_parts) == ((), "Which", "or ?", ())
    assert without_images(NONE) is NONE


def test_a_folder_without_a_processor_says_so(tmp_path):
    folder = seeing_model_folder(tmp_path, "llava")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="its processor of images cannot be loaded"):
        load_encoder(folder, ModelConfig(name=str(folder)), DataConfig())
