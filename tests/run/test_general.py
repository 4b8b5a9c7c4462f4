"""General abilities: probes, and how far the model has moved from the base model."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.data import TaskStream
from cit_fast.errors import ConfigError, GateError
from cit_fast.evaluation import read_run, read_stages
from cit_fast.evaluation.records import GeneralRecord
from cit_fast.models.adapter_bank import BASE
from cit_fast.report.status import status, status_table
from cit_fast.run.gate import GateConfig, judge, judge_general
from cit_fast.run.general import general_prompts, measure, probes

SKILLS = ("knowledge", "arithmetic", "grammar", "vocabulary", "reading", "commonsense", "instructions", "logic")


def run(settings, stream, **more) -> Path:
    evaluation = {**settings["evaluation"], "general": True, **more.pop("evaluation", {})}
    config = {"methods": ["sequential"], **settings, "evaluation": evaluation, **more}
    (folder,) = ContinualTrainer(config, stream=stream, console=Console(quiet=True)).run()
    return folder


def test_what_is_shipped():
    counts = Counter(probe.skill for probe in probes())
    assert counts == dict.fromkeys(SKILLS, 15)
    for probe in probes():
        assert len(set(probe.answers)) == 4, probe.question.instruction
        assert probe.question.references == probe.answers[:1]
    assert len({probe.question.instruction for probe in probes()}) == 120
    assert len(general_prompts()) == len({each.instruction for each in general_prompts()}) == 60


def test_divergence_is_that_of_all_logits(make_model, encoder, stream):
    model = get_peft_model(make_model("Llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = measure(model, encoder, stream.tasks, "test")
    assert found.divergence == pytest.approx({"general": 0.0, "stream": 0.0}, abs=1e-6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    found = measure(model, encoder, stream.tasks, "test")
    total, count = 0.0, 0
    for prompt in encoder.encode_prompts(general_prompts()).prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            tuned = model(ids).logits[0, :-1].double().log_softmax(-1)
            with model.disable_adapter():
                base = model(ids).logits[0, :-1].double().log_softmax(-1)
        total += float((base.exp() * (base - tuned)).sum())
        count += len(prompt) - 1
    assert found.divergence["general"] == pytest.approx(total / count, rel=1e-4)
    assert found.divergence["general"] > 1e-3
    assert set(found.probes) == set(SKILLS)
    assert all(0 <= score <= 100 for score in found.probes.values())


def test_a_router_says_who_answers(make_model, encoder, stream):
    model = get_peft_model(make_model("Llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)

    class ToBase:
        def answer(self, examples, stage):
            return [BASE] * len(examples)

    class ToTheSet:
        def answer(self, examples, stage):
            return ["default"] * len(examples)

    untouched = measure(model, encoder, stream.tasks, "test", ToBase())
    assert untouched.divergence == {"general": 0.0, "stream": 0.0}
    assert measure(model, encoder, stream.tasks, "test", ToTheSet()) == measure(model, encoder, stream.tasks, "test")
    with model.disable_adapter():
        bare = measure(model.get_base_model(), encoder, stream.tasks, "test", untrained=True)
    assert untouched.probes == bare.probes


@pytest.mark.parametrize("adapter", [{}, None], ids=["lora", "full"])
def test_a_run_measures_them_after_every_stage(settings, stream, adapter):
    settings["training"] |= {"max_steps": 2}
    if adapter is None:
        settings["adapter"] = None
    folder = run(settings, TaskStream(stream[:2]))
    first, *rest = [stage.general for stage in read_stages(folder)]
    assert first.divergence == {"general": 0.0, "stream": 0.0}
    for record in rest:
        assert 0 < record.divergence["general"] < 20
        assert 0 < record.divergence["stream"] < 20
    found = status(folder)["general"]
    assert found["untrained"] == first.score
    assert found["now"] == rest[-1].score
    said = io.StringIO()
    Console(width=200, file=said).print(status_table(status(folder)))
    assert "General abilities" in said.getvalue()
    # A run without them is the same run.
    plain = run(settings, TaskStream(stream[:2]), evaluation={"general": False}, output=settings["output"] + "-plain")
    assert [stage.scores for stage in read_stages(plain)] == [stage.scores for stage in read_stages(folder)]
    assert "general" not in read_run(plain).config["evaluation"]


def test_the_gate_knows_them(settings, stream):
    first, now = GeneralRecord({"a": 80.0, "b": 60.0}), GeneralRecord({"a": 70.0, "b": 65.0})
    record = judge(GateConfig(general=2), "test", {}, [], [])
    assert judge_general(GateConfig(general=2.5), record, first, now).broken == []
    (broken,) = judge_general(GateConfig(general=2), record, first, now).broken
    assert (broken.limit, broken.found) == ("general", 2.5)
    with pytest.raises(ConfigError, match="gate: general needs evaluation"):
        run(settings, stream, gate={"general": 2}, evaluation={"general": False})
    settings["training"] |= {"max_steps": 4, "learning_rate": 3.0}
    with pytest.raises(GateError, match=r"general abilities have fallen|alpha scores"):
        run(settings, stream, gate={"general": 0, "new_task": 100})
