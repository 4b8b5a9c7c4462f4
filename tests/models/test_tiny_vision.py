from __future__ import annotations

import base64
import io
import re

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from cit_fast.data.builtin import builtin_task, visual_task_names
from cit_fast.data.builtin.kinds import Draw
from cit_fast.files import tree_checksums
from cit_fast.models import tiny_vision
from cit_fast.models.tiny_vision import tiny_vision_folder, tiny_vision_model
from cit_fast.models.tiny_vision_texts import drawn_conversation, vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_vision_model(tmp_path_factory.mktemp("tiny") / "model", steps=2)


def image_of(example):
    return Image.open(io.BytesIO(base64.b64decode(example.images[0].partition(",")[2])))


def asked(example):
    parts = [{"type": "image"}, {"type": "text", "text": f"{example.instruction}\n\n{example.input}"}]
    return [{"role": "user", "content": parts}]


def test_what_is_written_loads_by_the_usual_classes_and_answers(folder):
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    assert not model.training
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    (example,) = builtin_task("visual-colour", train=1, dev=0, test=0).train
    text = processor.apply_chat_template(asked(example), add_generation_prompt=True, tokenize=False)
    assert text == f"<s><|user|><image>{example.instruction}\n\n{example.input}<|assistant|>"
    inputs = processor(images=image_of(example), text=text, return_tensors="pt", add_special_tokens=False)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    assert (inputs["input_ids"] == tokenizer.bos_token_id).sum() == 1
    written = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert 0 < written.shape[1] - inputs["input_ids"].shape[1] <= 2


def test_pixels_of_pretraining_are_those_of_the_processor(folder):
    processor, draw = AutoProcessor.from_pretrained(folder), Draw("pixels", "train")
    pictures = [drawn_conversation(draw).picture for _ in range(12)]
    images = [Image.open(io.BytesIO(picture.png())) for picture in pictures]
    made = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.allclose(made, tiny_vision._pixel_values(pictures), rtol=0, atol=1e-6)  # of steps of 1/128


def test_tokens_of_pretraining_are_those_of_the_template(folder):
    processor, draw = AutoProcessor.from_pretrained(folder), Draw("tokens", "train")
    for _ in range(12):
        shown = drawn_conversation(draw)
        turns = []
        for question, answer in shown.turns:
            turns.append({"role": "user", "content": [{"type": "text", "text": question}]})
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        turns[0]["content"].insert(0, {"type": "image"})
        image = Image.open(io.BytesIO(shown.picture.png()))
        text = processor.apply_chat_template(turns, tokenize=False)
        expected = processor(images=image, text=text, add_special_tokens=False)["input_ids"]
        tokens, labels, _ = tiny_vision._encoded(processor.tokenizer, shown)
        assert [tokens] == list(expected)
        learned = [token for token, label in zip(tokens, labels, strict=True) if label == token]
        assert len(learned) == len(labels) - labels.count(-100)
        end = processor.tokenizer.eos_token
        assert processor.tokenizer.decode(learned) == "".join(answer + end for _, answer in shown.turns)


def test_words_and_digits_are_single_tokens_and_any_text_comes_back(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for word in vocabulary():
        if word.isalpha():
            assert len(tokenizer.tokenize(word)) == len(tokenizer.tokenize(f" {word}")) == 1
    assert tokenizer.tokenize("12,30") == ["1", "2", ",", "3", "0"]
    for text in ("Zebra crossing: 3 × €5\n\nüber", "12,30,44,98", "A. red\nB. blue", "日本"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_the_same_seed_gives_the_same_files_and_leaves_the_generator_alone(folder, tmp_path):
    state = torch.get_rng_state()
    again = tiny_vision_model(tmp_path / "again", steps=2)
    other = tiny_vision_model(tmp_path / "other", steps=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert tree_checksums(again) == tree_checksums(folder) != tree_checksums(other)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_pretraining_words_its_answers_as_no_task_wants_them():
    draw = Draw("forms", "train")
    said = {answer for _ in range(300) for _, answer in drawn_conversation(draw).turns}
    for name in visual_task_names():
        pattern = builtin_task(name, train=1, dev=0, test=0).answer_pattern
        assert not [answer for answer in said if re.fullmatch(f"{pattern}", answer)]


def test_the_model_of_the_cache_is_made_once(folder, tmp_path, monkeypatch, capsys):
    made = []

    def few_steps(place):
        made.append(place)
        return tiny_vision_model(place, steps=1)

    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tiny_vision, "tiny_vision_model", few_steps)
    first = tiny_vision_folder()
    assert tiny_vision_folder() == first == made[0]
    assert len(made) == 1
    assert first.parent == tmp_path / "models"
    assert (first / "config.json").exists()
    assert capsys.readouterr().out.count("\n") == 1
