"""Prompts that the model writes itself, where nothing of a task may be kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from growth import same
from killed import at_call, killed
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.errors import ConfigError
from cit_fast.evaluation import read_stages
from cit_fast.methods.own_answers import OwnAnswers
from cit_fast.methods.replay import self_generated
from cit_fast.methods.replay.on_policy import OnPolicyReplay
from cit_fast.methods.replay.self_generated import NAME, SelfGenerated
from cit_fast.methods.stage import Stage
from cit_fast.models.generation import Answer
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run import stage_trainer


def run(settings, stream, output: Path) -> Path:
    replay = {"generated": 24, "max_new_tokens": 40, "temperature": 1.5}
    config = {**settings, "methods": [{"preset": "on-policy", "replay": replay}], "memory": "none"}
    config |= {"evaluation": {**settings["evaluation"], "tasks": "seen"}, "output": str(output)}
    (folder,) = ContinualTrainer(config, stream=stream, console=Console(quiet=True)).run()
    return folder


def own_answers(count: int) -> OwnAnswers:
    return OwnAnswers({k: [f"own {k}"] for k in range(count)}, set())


def test_where_a_user_speaks(encoder, tiny_tokenizer):
    before, end = encoder.user_turn()
    prompt = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    begun = encoder.tokenizer.decode(before)
    assert prompt.startswith(begun + "Hello")
    assert prompt[len(begun + "Hello") :].startswith(encoder.tokenizer.decode([end]))
    spoken = PromptEncoder(encoder.tokenizer, max_length=64, system_prompt="Be kind.")
    assert "Be kind." in spoken.tokenizer.decode(spoken.user_turn()[0])


def test_a_run_that_keeps_nothing_replays_what_the_model_writes(settings, stream, tmp_path, monkeypatch):
    """From the second stage on; killed and resumed, the same. (What this model answers never ends.)"""
    monkeypatch.setattr(self_generated, "draw_answers", lambda _, asked, **__: own_answers(len(asked)))
    settings["training"] |= {"num_train_epochs": 1}
    folder = run(settings, stream, tmp_path / "whole")
    stages = read_stages(folder)
    assert stages[1].replay is None or not any(NAME in note for note in stages[1].replay.notes)
    for stage in stages[2:]:
        (note,) = [note for note in stage.replay.notes if note.startswith("Self-generated")]
        drawn = int(note.split(": ")[1].split(" of 24")[0])
        assert drawn > 0
        assert stage.steps == -(-(16 + drawn) // settings["training"]["per_device_train_batch_size"])
        assert stage.replayed == {}
    assert not any(path.stat().st_size > 4000 for path in (folder / "memory").glob("*.json"))  # test examples alone
    output = tmp_path / "killed"
    assert killed(lambda: run(settings, stream, output), at_call(2, stage_trainer, "mark_complete"))
    same(run(settings, stream, output), folder)


def test_what_comes_back(monkeypatch, encoder):
    """Texts that end, each once; those without an answer of their own are left out."""
    said = iter(["One.", "", "Two.", "One.", "Three", "Four."])
    ends = iter([True, True, True, True, False, True])
    monkeypatch.setattr(
        self_generated, "generate_answers", lambda _, prompts, **__: [Answer(next(said), next(ends)) for _ in prompts]
    )

    own = OwnAnswers({0: ["Answer one"], 2: ["Answer four"]}, set())
    monkeypatch.setattr(self_generated, "draw_answers", lambda *_, **__: own)
    drawn, note = SelfGenerated(6, 1.0, 8, 4).draw(Stage(None, encoder, 2))
    assert [(each.instruction, each.references, each.task) for each in drawn] == [
        ("One.", ("Answer one",), NAME),
        ("Four.", ("Answer four",), NAME),
    ]
    assert note == "Self-generated: 2 of 6 prompts that the model wrote come back."


def test_bad_input(monkeypatch, encoder):
    with pytest.raises(ConfigError, match="generated: 0 is below 1"):
        OnPolicyReplay(generated=0)
    monkeypatch.setattr(PromptEncoder, "user_turn", lambda _: None)
    with pytest.raises(ConfigError, match="does not tell where a user speaks"):
        SelfGenerated(6, 1.0, 8, 4).draw(Stage(None, encoder, 2))
