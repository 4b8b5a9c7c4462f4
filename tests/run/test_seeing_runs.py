"""Whole runs of models that take images: every architecture, every kind of method, bad data."""

from __future__ import annotations

import base64
import functools
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from resumed import killed_twice
from safetensors.torch import load_file
from seeing_models import KINDS, seeing_model_folder
from toy_runs import adapter, start

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task, TaskStream
from cit_fast.errors import ConfigError, DataError, RunError
from cit_fast.evaluation import predictions_after, read_predictions, read_stages
from cit_fast.inference.continual_model import ContinualModel
from cit_fast.inference.engine import Engine
from cit_fast.inference.export import export_adapters, export_merged
from cit_fast.inference.openai_format import ChatRequest, parsed
from cit_fast.inference.questions import Question
from cit_fast.models.config import ModelConfig
from cit_fast.models.pretrained import load_model
from cit_fast.models.prompts import ExampleTooLongError

COLOURS = ("red", "green", "blue", "white", "black", "yellow")


def picture(colour: str, width: int = 40) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, 40), colour).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def task(name: str, instruction: str, answers: tuple[str, ...]) -> Task:
    def examples(count: int, start: int) -> tuple[Example, ...]:
        return tuple(
            Example(
                instruction, "", (answers[k % 6],), name, ((0, 4),), images=(picture(COLOURS[k % 6], 30 + k),),
                source=f"{name}: record {k}",
            )
            for k in range(start, start + count)
        )  # fmt: skip

    return Task(name, examples(8, 0), (), examples(3, 20), metric="exact_match")


@pytest.fixture(scope="module")
def stream() -> TaskStream:
    letters = tuple(colour[0] for colour in COLOURS)
    return TaskStream((task("colour", "Name the colour.", COLOURS), task("letter", "Give its first letter.", letters)))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("seeing")
    return functools.cache(lambda kind: seeing_model_folder(root / kind, kind))


@pytest.fixture
def seeing_settings(settings):
    """Of a run without its model."""
    return {
        **settings, "data": {"max_length": 300}, "evaluation": {"max_new_tokens": 4, "batch_size": 4},
        "adapter": {"r": 2, "target_modules": "all-linear"},
        "training": {**settings["training"], "projector_learning_rate": 1e-3},
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_the_same_bits_and_its_sets_go_elsewhere(kind, folder_of, seeing_settings, stream, tmp_path):
    seeing_settings |= {"model": {"name": str(folder_of(kind))}, "methods": ["replay-ema"]}
    folder = killed_twice(seeing_settings, stream)
    kept = adapter(folder, 2)
    assert adapter(folder, 1).keys() == kept.keys()
    assert any("lora_A" in name for name in kept)
    assert any("lora_" not in name for name in kept), "the projector"

    # The run's own model, and PEFT without this package, answer alike.
    model = ContinualModel.from_run(folder)
    examples = list(stream[1].test)
    answers = model.generate(examples, max_new_tokens=4)
    assert len(answers) == len(examples)
    (name,) = export_adapters(folder, tmp_path / "sets")
    base = load_model(folder_of(kind), ModelConfig(name=str(folder_of(kind))))
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "sets" / name)).eval()
    prompt = model.encoder.prompt(examples[0])
    inputs = {"input_ids": torch.tensor([list(prompt)]), **prompt.pictures.inputs(prompt)}
    output = theirs.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert model.encoder.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip() == answers[0]


METHODS = ("lcia", "kpig", "inscl", "switch-tokens", "cit-fast", "o-lora", "sdft", "osft")


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method_trains_with_images(method, folder_of, seeing_settings, stream):
    seeing_settings |= {"model": {"name": str(folder_of("llava"))}, "methods": [method]}
    (folder,) = start(seeing_settings, stream)
    last = read_stages(folder)[-1]
    assert last.index == 2
    assert all(loss == loss for _, loss in last.losses)
    assert not [note for note in last.notes if "have not moved" in note]
    answered = read_predictions(predictions_after(folder, last, "colour"))
    assert [one.images for one in answered] == [example.images for example in stream[0].test]
    model = ContinualModel.from_run(folder)
    assert model.generate([*stream[0].test, *stream[1].test], max_new_tokens=2)


def test_the_switch_tells_tasks_apart_by_their_images(folder_of, seeing_settings):
    """Of one instruction and one answer, and in an order in which texts stand between them."""

    def examples(name: str, colours: tuple[str, ...], start: int) -> tuple[Example, ...]:
        images = [(picture(colour, 30 + k),) for k in range(start, start + 4) for colour in colours]
        return tuple(Example("Look.", "", ("yes",), name, images=each, source=name) for each in images)

    def of(name: str, colours: tuple[str, ...]) -> Task:
        texts = tuple(Example("Look.", word, ("no",), name, source=name) for word in ("here", "there"))
        train, test = examples(name, colours, 0), examples(name, colours, 20)
        return Task(name, (*train[:3], *texts, *train[3:]), (), (*test[:3], *texts, *test[3:]), metric="exact_match")

    stream = TaskStream((of("dark", ("black", "navy")), of("light", ("white", "yellow"))))
    router = {"name": "switch", "fraction": 1.0, "epochs": 200}
    seeing_settings |= {
        "model": {"name": str(folder_of("llava"))},
        "methods": [{"preset": "switchcit", "router": router}],
    }
    (folder,) = start(seeing_settings, stream)
    model = ContinualModel.from_run(folder)
    for task in stream:
        seen = [example for example in task.test if example.images]
        assert set(model.route(seen)) == {f"task-{task.name}"}
        texts = [replace(example, images=()) for example in seen]
        assert len(set(model.route(texts))) == 1


def test_images_are_served_beside_texts(folder_of, seeing_settings, stream):
    """As a client sends them, in the message; addresses are not fetched, and a model of texts takes none."""
    seeing_settings |= {"model": {"name": str(folder_of("llava"))}, "methods": ["switch-tokens"]}
    (folder,) = start(seeing_settings, stream)
    model = ContinualModel.from_run(folder)
    example = stream[1].test[0]

    def asked(*parts: dict) -> Question:
        body = {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 4}
        request = parsed(body, ChatRequest)
        return request.question(request.example, {"auto": None})

    image = {"type": "image_url", "image_url": {"url": example.images[0]}}
    text = {"type": "text", "text": example.instruction}
    (alone,) = model.generate([example], max_new_tokens=4)
    with Engine(model) as engine:
        replies = [engine.ask(asked(*parts)) for parts in ([image, text], [text], [image, text])]
        assert [reply.result(60).answer.text for reply in replies[::2]] == [alone, alone]
        assert replies[1].result(60).prompt_tokens < replies[0].result(60).prompt_tokens
        with pytest.raises(DataError, match=r"no image|broken"):
            engine.ask(asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, text)).result(
                60
            )
    for address in ("http://localhost/a.png", "/etc/passwd"):
        with pytest.raises(DataError, match="must come as a data: URI"):
            asked({"type": "image_url", "image_url": {"url": address}}, text)


def test_a_merged_model_is_one_that_transformers_loads(folder_of, seeing_settings, stream, tmp_path):
    seeing_settings |= {"model": {"name": str(folder_of("gemma3"))}, "methods": ["sequential"]}
    (folder,) = start(seeing_settings, stream)
    export_merged(folder, tmp_path / "merged", "shared")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert 'AutoModelForImageTextToText.from_pretrained("this folder"' in card
    assert "AutoProcessor" in card
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert processor.image_seq_length == 4


def test_the_model_itself_trains_but_for_its_tower(folder_of, seeing_settings, stream):
    seeing_settings |= {"model": {"name": str(folder_of("llava"))}, "methods": ["sequential"], "adapter": None}
    (folder,) = start(seeing_settings, stream)
    before = load_file(folder_of("llava") / "model.safetensors")
    after = load_file(folder / "stages" / "02" / "model" / "model.safetensors")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert any("projector" in name for name in moved)
    assert any("language_model" in name for name in moved)
    assert not any("vision" in name for name in moved)


def test_the_projector_has_its_own_learning_rate(folder_of, seeing_settings, stream):
    seeing_settings |= {"model": {"name": str(folder_of("llava"))}, "methods": ["sequential"]}
    seeing_settings["training"]["projector_learning_rate"] = 0.0
    (folder,) = start(seeing_settings, stream)
    before = load_file(folder_of("llava") / "model.safetensors")
    after = {name: tensor for name, tensor in adapter(folder, 2).items() if "lora_" not in name}
    assert after
    for name, tensor in after.items():
        end = name.partition("multi_modal_projector.")[2]
        (own,) = [value for key, value in before.items() if key.endswith(f"multi_modal_projector.{end}")]
        assert torch.equal(own, tensor)


def test_texts_alone_train_a_model_that_sees(folder_of, seeing_settings, capsys):
    def bare(one: Task) -> Task:
        train, test = (tuple(replace(each, images=()) for each in split) for split in (one.train, one.test))
        return replace(one, train=train, test=test)

    plain = TaskStream(tuple(bare(task(name, f"Say {name}.", COLOURS)) for name in ("colour", "letter")))
    seeing_settings |= {"model": {"name": str(folder_of("qwen2_5_vl"))}, "methods": ["lcia-ema"]}
    ContinualTrainer(seeing_settings, stream=plain).run()
    assert capsys.readouterr().out.count("vision tower is frozen and not used") == 1


def test_what_the_model_does_not_take_is_refused(settings, folder_of, seeing_settings, stream, capsys):
    settings["methods"] = ["sequential"]
    with pytest.raises(DataError, match=r"colour: record 0: an image, which .* does not take.*ignore_media"):
        start(settings, stream)
    settings["data"]["ignore_media"] = True
    (folder,) = ContinualTrainer(settings, stream=stream).run()
    assert len(read_stages(folder)) == 3
    assert capsys.readouterr().out.count("Of 22 examples 22 have images, which this model does not see") == 1
    heard = replace(stream[0], train=(replace(stream[0].train[0], other_media=("a.wav",)),))
    seeing_settings |= {"model": {"name": str(folder_of("llava"))}, "methods": ["sequential"]}
    with pytest.raises(DataError, match="record 0: a video or a recording"):
        start(seeing_settings, TaskStream((heard,)))
    with pytest.raises(ConfigError, match=r"evaluation\.engine"):
        start({**seeing_settings, "evaluation": {"engine": {"openai": "http://localhost:1/v1"}}}, stream)


@pytest.mark.parametrize("of", ["another size", "another architecture"])
def test_a_processor_of_another_model_is_refused(of, folder_of, seeing_settings, stream, tmp_path):
    shutil.copytree(folder_of("llava"), tmp_path / "model")
    if of == "another size":
        own = json.loads((tmp_path / "model/processor_config.json").read_text())
        (tmp_path / "model/processor_config.json").write_text(json.dumps({**own, "patch_size": 16}))
    else:
        theirs = json.loads((folder_of("gemma3") / "processor_config.json").read_text())["image_processor"]
        own = json.loads((tmp_path / "model/processor_config.json").read_text())
        size = {"height": 16, "width": 16}
        own["image_processor"] = {**theirs, "size": size}
        (tmp_path / "model/processor_config.json").write_text(json.dumps(own))
    with pytest.raises(ConfigError, match=r"what its processor makes of a blank image, so its preprocessor_config"):
        start({**seeing_settings, "model": {"name": str(tmp_path / "model")}}, stream)


def test_a_bad_image_is_an_error_or_left_out_and_counted(folder_of, seeing_settings, stream, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    first, *others = stream[0].train
    damaged = TaskStream((replace(stream[0], train=(replace(first, images=(str(broken),)), *others)), stream[1]))
    seeing_settings |= {"model": {"name": str(folder_of("llava"))}, "methods": ["sequential"]}
    with pytest.raises(DataError, match=r"colour: record 0: .*broken\.png"):
        start(seeing_settings, damaged)
    seeing_settings["data"]["on_bad_image"] = "skip"
    (folder,) = ContinualTrainer(seeing_settings, stream=damaged).run()
    assert "1 of 8 examples left out" in " ".join(capsys.readouterr().out.split())
    assert read_stages(folder)[1].train_examples == 7


def test_what_has_no_room_for_its_image_is_refused_before_anything_trains(folder_of, seeing_settings, stream):
    seeing_settings |= {"model": {"name": str(folder_of("llava"))}, "methods": ["sequential"]}
    seeing_settings["data"]["max_length"] = 40  # more than the text's bytes
    with pytest.raises(ExampleTooLongError, match="colour: record 0: 57 tokens, 40 allowed"):
        start(seeing_settings, stream)
    assert not Path(seeing_settings["output"]).exists()


def test_a_changed_image_is_changed_data(folder_of, seeing_settings, stream, tmp_path):
    file = tmp_path / "one.png"
    Image.new("RGB", (40, 40), "red").save(file)
    first, *others = stream[0].train
    filed = TaskStream((replace(stream[0], train=(replace(first, images=(str(file),)), *others)), stream[1]))
    seeing_settings |= {"model": {"name": str(folder_of("llava"))}, "methods": ["sequential"]}
    (folder,) = start(seeing_settings, filed)
    moved = tmp_path / "elsewhere.png"
    shutil.copy(file, moved)
    elsewhere = TaskStream((replace(stream[0], train=(replace(first, images=(str(moved),)), *others)), stream[1]))
    assert start(seeing_settings, elsewhere) == [folder]
    Image.new("RGB", (40, 40), "blue").save(file)
    with pytest.raises(RunError, match="its training examples have changed"):
        start(seeing_settings, filed)
