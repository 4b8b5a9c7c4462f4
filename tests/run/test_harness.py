"""lm-evaluation-harness on a model under training, with tasks from a local folder: no network."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from seq2seq_models import seq2seq_folder

from cit_fast import ContinualTrainer
from cit_fast.errors import ConfigError, GateError
from cit_fast.evaluation import read_stages
from cit_fast.evaluation.records import GeneralRecord
from cit_fast.methods.routing import Router
from cit_fast.models.adapter_bank import BASE
from cit_fast.report.status import status, status_table
from cit_fast.run.config import HarnessConfig
from cit_fast.run.harness import _harness_model, _metrics, benchmarks, check_harness

pytest.importorskip("lm_eval")

DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
"""
CHOICE = f"""
task: colours
{DATA}
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: [red, green, blue]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWER = f"""
task: echo
{DATA}
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
LINES = f"""
task: lines
{DATA}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
tag: all-lines
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Of two tasks."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    there = tmp_path / "harness"
    there.mkdir()
    rows = [{"question": f"Which colour has number {k}?", "answer": k % 3, "said": "red"} for k in range(9)]
    data = there / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("colours", CHOICE), ("echo", ANSWER)):
        (there / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return there


def config(folder: Path, *tasks: str, **more) -> HarnessConfig:
    return HarnessConfig(lm_eval=tasks or ("colours",), include_path=str(folder), **more)


def test_the_likeliest_choice_by_the_harness_is_ours(make_model, encoder, folder):
    model = make_model("Llama")
    (found,) = benchmarks(model, encoder, None, config(folder), 4)[0].values()
    right = 0
    for k in range(9):
        prompt = f"Which colour has number {k}?"
        if encoder.tokenizer.chat_template is not None:
            turn = [{"role": "user", "content": prompt}]
            prompt = encoder.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        sums = []
        for colour in ("red", "green", "blue"):
            space = "" if encoder.tokenizer.chat_template is not None else " "
            ids = encoder.tokenizer(prompt, add_special_tokens=False).input_ids
            answer = encoder.tokenizer(prompt + space + colour, add_special_tokens=False).input_ids[len(ids) :]
            with torch.no_grad():
                logits = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
            sums.append(sum(float(logits[len(ids) + i - 1, token]) for i, token in enumerate(answer)))
        right += int(np.argmax(sums)) == k % 3
    assert found == {"acc": pytest.approx(100 * right / 9)}


class ByNumber(Router):
    """Even questions go to one set, odd ones to the base model."""

    def answer(self, examples, stage):
        self.asked = [example.instruction for example in examples]
        return ["even" if int(text.split("number ")[1][0]) % 2 == 0 else BASE for text in self.asked]


def requests(kind: str, last: object) -> list:
    from lm_eval.api.instance import Instance

    asked = [f"Which colour has number {k}?" for k in range(9)]
    return [Instance(kind, {}, (each, last), k) for k, each in enumerate(asked)]


@pytest.mark.parametrize(("kind", "last"), [("loglikelihood", " red"), ("generate_until", {"max_gen_toks": 3})])
def test_every_request_goes_to_its_own_set(make_model, encoder, kind, last):
    bare = make_model("Llama")
    model = get_peft_model(bare, LoraConfig(r=4, task_type="CAUSAL_LM"), adapter_name="even")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    sets = {name: _harness_model(model, encoder, router, 4) for name, router in (("mixed", ByNumber()), ("even", None))}
    with torch.no_grad():
        found = {name: getattr(each, kind)(requests(kind, last), disable_tqdm=True) for name, each in sets.items()}
        with model.disable_adapter():
            base = getattr(sets["even"], kind)(requests(kind, last), disable_tqdm=True)
    assert found["even"] != base
    for k, answer in enumerate(found["mixed"]):
        assert answer == pytest.approx((base if k % 2 else found["even"])[k])
    assert model.active_adapters == ["even"]


def test_the_router_reads_what_the_user_says(make_model, encoder, folder):
    router = ByNumber()
    model = get_peft_model(make_model("Llama"), LoraConfig(r=4, task_type="CAUSAL_LM"), adapter_name="even")
    benchmarks(model, encoder, router, config(folder, "colours", "echo"), 4)
    assert set(router.asked) == {f"Which colour has number {k}?" for k in range(9)}  # no template around it


def test_tags_blank_contexts_and_metrics_of_which_less_is_better(make_model, encoder, folder):
    (folder / "lines.yaml").write_text(LINES.replace("DATA", str(folder / "data.jsonl")))
    blank = CHOICE.replace("task: colours", "task: blank").replace("{{question}}", "")
    (folder / "blank.yaml").write_text(blank.replace("DATA", str(folder / "data.jsonl")))
    model = get_peft_model(make_model("Llama"), LoraConfig(r=4, task_type="CAUSAL_LM"), adapter_name="even")

    class Always(Router):
        def answer(self, examples, stage):
            assert all(example.instruction.strip() for example in examples)
            return ["even"] * len(examples)

    found, main = benchmarks(model, encoder, Always(), config(folder, "all-lines", "blank"), 4)
    assert (set(found), main) == ({"lines", "blank"}, {"blank": "acc"})
    assert found["lines"]["word_perplexity"] > 1
    assert 0 < found["lines"]["bits_per_byte"] < 100
    assert GeneralRecord({"a": 1.0}, {}, found, main).main == {"blank": found["blank"]["acc"]}


def test_numbers_that_are_none_and_shares():
    values = {
        "alias": "x",
        "acc,none": 0.25,
        "acc_stderr,none": 0.1,
        "bleu,none": 0.5,
        "f1,none": float("nan"),
        "em": True,
    }
    assert _metrics({**values, "exact_match,strict": 1.0, "sample_len": 9}) == {
        "acc": 25.0,
        "bleu": 0.5,
        "exact_match,strict": 100.0,
    }


def test_chance_is_as_it_was(make_model, encoder, folder):
    def drawn() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    def seeded() -> None:
        random.seed(1)
        np.random.seed(2)  # noqa: NPY002
        torch.manual_seed(3)

    seeded()
    before = drawn()
    seeded()
    benchmarks(make_model("Llama"), encoder, None, config(folder), 4)
    assert drawn() == before


def run(settings, stream, folder, **more) -> Path:
    general = {"lm_eval": ["colours"], "include_path": str(folder), "limit": 6}
    evaluation = {**settings["evaluation"], "general": general}
    own = {"methods": ["sequential"], **settings, "evaluation": evaluation, **more}
    (made,) = ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()
    return made


def test_in_a_run(settings, stream, folder):
    settings["training"] |= {"max_steps": 1}
    made = run(settings, stream, folder)
    stages = read_stages(made)
    assert all(stage.general.probes for stage in stages)
    assert all(set(stage.general.benchmarks) == {"colours"} for stage in stages)
    for stage in stages:
        assert round(6 * stage.general.main["colours"], 6) % 100 == 0  # a share of six
    first, last = stages[0].general.main["colours"], stages[-1].general.main["colours"]
    assert status(made)["general"]["benchmarks"] == {"colours": [first, last]}
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(status_table(status(made)))
    assert f"colours {first:.1f}, now {last:.1f}" in console.export_text()


def test_an_encoder_decoder_is_measured(settings, stream, folder, tmp_path):
    settings["model"] = {"name": str(seq2seq_folder(tmp_path / "t5", "t5"))}
    settings["training"] |= {"max_steps": 1}
    stages = read_stages(run(settings, stream, folder))
    assert all(round(6 * stage.general.main["colours"], 6) % 100 == 0 for stage in stages)


def test_a_benchmark_that_falls_breaks_the_gate(settings, stream, folder, monkeypatch):
    from cit_fast.run import general

    scores = iter([90.0, 70.0])
    monkeypatch.setattr(general, "benchmarks", lambda *_: ({"colours": {"acc": next(scores)}}, {"colours": "acc"}))
    settings["training"] |= {"max_steps": 1}
    with pytest.raises(GateError, match=r"colours fell by 20.0 \(at most 10\)"):
        run(settings, stream, folder, gate={"general": 10})


def test_bad_input(settings, stream, folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"evaluation.general.lm_eval: unknown task 'colour'; .*colours"):
        check_harness(config(folder, "colour"))
    (folder / "data.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"evaluation.general.lm_eval: .*data.jsonl"):
        run(settings, stream, folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm_eval is not installed; pip install 'cit-fast\[lm-eval\]'"):
        check_harness(config(folder))
