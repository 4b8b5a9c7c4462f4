"""Replay of the model's own answers: which are kept, what comes back instead, the same in a resumed run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from killed import at_call, killed
from peft import PeftModel
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.data import Example, Task, load_task
from cit_fast.errors import ConfigError
from cit_fast.evaluation import read_stages
from cit_fast.key_parts.gain import answer_surprise
from cit_fast.methods import own_answers
from cit_fast.methods.replay import OnPolicyReplay, RandomReplay, SurpriseReplay
from cit_fast.methods.stage import Stage
from cit_fast.models.generation import Answer, generate
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run import stage_evaluation, stage_training

WORDS = ("seven", "positive", "count to ten", "the e-mail address", "no")


def task(name: str, size: int, metric: str = "exact_match") -> Task:
    examples = (Example(f"Say {name}.", f"{k}", (f"{WORDS[k % 5]} {k}",), name) for k in range(size))
    return Task(name, tuple(examples), metric=metric)


NEW = task("new", 1)


@pytest.fixture
def model(make_model):
    return make_model("Llama")


def at(model, encoder, *seen: Task) -> Stage:
    return Stage(model, encoder, index=2, tasks=(NEW,), seen=seen, seed="0/2")


@pytest.fixture
def says(monkeypatch, tiny_tokenizer):
    """``says(answers)``: the model's sample s for the prompt whose input is k is ``answers(k, s)``, ended or not."""

    def install(answers) -> None:
        def fake(model, prompts, **options):
            samples: dict[int, int] = {}
            found = []
            for prompt in prompts:
                text = tiny_tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
                k = int("".join(c for c in text if c.isdigit()))
                samples[k] = samples.get(k, -1) + 1
                answer = answers(k, samples[k])
                found.append(answer if isinstance(answer, Answer) else Answer(answer, True))
            return found

        monkeypatch.setattr(own_answers, "generate_answers", fake)

    return install


def answers_of(selection) -> dict[int, str]:
    return {int(example.input): example.references[0] for example in selection.examples}


def test_an_answer_that_the_metric_passes_replaces_the_references(model, encoder, says):
    """Odd prompts are answered rightly at the second try, in other white space; even ones never."""
    says(lambda k, s: f"{WORDS[k % 5]}  {k}" if k % 2 and s == 1 else f"wrong {s}")
    alpha = task("alpha", 20)
    found = OnPolicyReplay(0.4, samples=3).select(at(model, encoder, alpha))
    chosen = RandomReplay(0.4).select(at(model, encoder, alpha)).examples
    assert [example.input for example in found.examples] == [example.input for example in chosen]
    for k, own in answers_of(found).items():
        assert own == (f"{WORDS[k % 5]}  {k}" if k % 2 else f"{WORDS[k % 5]} {k}")
    odd = sum(int(example.input) % 2 for example in chosen)
    assert 0 < odd < 8
    assert found.record.details["own answers"] == {"alpha": odd}
    assert found.record.details["prompts"] == {"alpha": 8}
    assert len(found.record.details["differing"]["alpha"]) == 2


def test_a_graded_metric_takes_the_best_answer_from_least_on(model, encoder, says):
    says(lambda k, s: (f"{WORDS[k % 5]} {k} and more", f"{WORDS[k % 5]} {k}!", "nothing")[s])
    alpha = task("alpha", 4, "token_f1")
    stage = at(model, encoder, alpha)
    found = OnPolicyReplay(1.0, samples=3).select(stage)
    assert answers_of(found) == {k: f"{WORDS[k % 5]} {k}!" for k in range(4)}
    says(lambda k, s: f"{k}")  # F1 of one word of two or more: 2/3 at most
    assert answers_of(OnPolicyReplay(1.0, samples=1, least=70).select(stage)) == {
        k: f"{WORDS[k % 5]} {k}" for k in range(4)
    }
    assert answers_of(OnPolicyReplay(1.0, samples=1, least=0).select(stage)) == {k: f"{k}" for k in range(4)}


def test_confidence_keeps_the_likeliest_answers(model, encoder, says):
    said = [f"{WORDS[(k * 3) % 5]} {k * 7}" for k in range(8)]
    says(lambda k, s: said[k])
    alpha = task("alpha", 8)
    own = [Example(e.instruction, e.input, (text,), "alpha") for e, text in zip(alpha.train, said, strict=True)]
    surprise = dict(answer_surprise(model, encoder, own))
    likeliest = set(sorted(surprise, key=surprise.get)[:4])
    found = OnPolicyReplay(1.0, keep="confidence", samples=1, share=0.5).select(at(model, encoder, alpha))
    assert answers_of(found) == {k: said[k] if k in likeliest else alpha.train[k].references[0] for k in range(8)}
    without = OnPolicyReplay(1.0, keep="confidence", samples=1, references=False).select(at(model, encoder, alpha))
    assert answers_of(without) == dict(enumerate(said))


def test_the_papers_choice_replays_the_best_answered_prompts(model, encoder, says):
    """Of all prompts those whose answers are right come back; where they are too few, others with references."""
    says(lambda k, s: f"{WORDS[k % 5]} {k}" if k in (3, 11, 17) else "wrong")
    alpha = task("alpha", 20)
    options = {"choose": "answers", "candidates": None, "samples": 1, "temperature": 0.1}
    found = OnPolicyReplay(per_task=2, **options).select(at(model, encoder, alpha))
    assert set(answers_of(found)) < {3, 11, 17}
    assert len(found.examples) == 2
    more = OnPolicyReplay(per_task=5, **options).select(at(model, encoder, alpha))
    assert {3, 11, 17} < set(answers_of(more))
    assert len(more.examples) == 5
    assert more.record.details["own answers"] == {"alpha": 3}
    assert more.record.details["prompts"] == {"alpha": 20}


def test_what_never_ends_or_says_nothing_is_not_kept(model, encoder, says):
    says(lambda k, s: Answer(f"{WORDS[k % 5]} {k}", False) if k % 2 else "")
    alpha = task("alpha", 6)
    found = OnPolicyReplay(1.0, samples=1, least=0).select(at(model, encoder, alpha))
    assert answers_of(found) == {k: f"{WORDS[k % 5]} {k}" for k in range(6)}
    assert found.record.details["own answers"] == {"alpha": 0}
    assert found.record.details["answers without an end"] == {"alpha": 3}
    only = OnPolicyReplay(1.0, keep="confidence", references=False).select(at(model, encoder, alpha))
    assert only.examples == []


def test_a_prompt_that_is_too_long_keeps_its_references(model, tiny_tokenizer, says):
    says(lambda k, s: f"{WORDS[k % 5]} {k}")
    encoder = PromptEncoder(tiny_tokenizer, max_length=80)
    long = Example("Say it. " * 12, "99", ("seven",), "alpha")
    alpha = Task("alpha", (long, *task("alpha", 3).train), metric="exact_match")
    found = OnPolicyReplay(1.0, samples=1, max_new_tokens=30).select(at(model, encoder, alpha))
    assert long in found.examples
    assert found.record.details["own answers"] == {"alpha": 3}
    assert found.record.notes == [
        "The model's own answers come back for 3 of 4 prompts of alpha.",
        "alpha: 1 of 4 prompts are too long to be answered.",
    ]


def test_a_judged_task_goes_by_confidence_and_says_so(model, encoder, says):
    says(lambda k, s: f"own {k}")
    tasks = (task("alpha", 4, "judge"), task("beta", 4))
    found = OnPolicyReplay(1.0, samples=1, share=1.0).select(at(model, encoder, *tasks))
    assert found.record.details["own answers"] == {"alpha": 4, "beta": 0}
    said, note = found.record.notes
    assert said.startswith("The model's own answers come back for 4 of 4 prompts of alpha, 0 of 4 prompts of beta. For")
    assert note.startswith("alpha: a judge scores this task")


def test_a_conversation_ends_with_the_models_own_answer(model, encoder, says):
    says(lambda k, s: "own words")
    talk = (("user", "Say 1."), ("assistant", "one"), ("user", "And 2?"), ("assistant", "two"))
    alpha = Task("alpha", (Example("", "", ("two",), "alpha", messages=talk),), metric="exact_match")
    (found,) = OnPolicyReplay(1.0, samples=1, least=0).select(at(model, encoder, alpha)).examples
    assert found.references == ("own words",)
    assert found.messages == (*talk[:-1], ("assistant", "own words"))


def test_another_policy_chooses_the_prompts(model, encoder, says):
    says(lambda k, s: "wrong")
    alpha, beta = task("alpha", 20), task("beta", 10)
    stage = at(model, encoder, alpha, beta)
    for choose in ("surprise", {"name": "surprise", "fraction": 0.2}):
        found = OnPolicyReplay(0.2, choose=choose, samples=1).select(stage)
        expected = SurpriseReplay(0.2).select(stage)
        assert found.examples == expected.examples
        assert found.record.details.items() >= expected.record.details.items()
    assert OnPolicyReplay().select(Stage(model, encoder, tasks=(NEW,))).examples == []


def test_the_models_real_answers(model, encoder):
    """At temperature 0 the answer is that of greedy decoding; drawn ones are the same at every call."""
    alpha = task("alpha", 6)
    stage = at(model, encoder, alpha)
    greedy = generate(
        model,
        encoder.encode_prompts(alpha.train).prompts,
        pad_token_id=encoder.pad_token_id,
        eos_token_ids=encoder.stop_token_ids,
        tokenizer=encoder.tokenizer,
        max_new_tokens=200,
    )
    options = {"keep": "confidence", "references": False, "max_new_tokens": 200}
    found = OnPolicyReplay(1.0, temperature=0, samples=1, **options).select(stage)
    own = answers_of(found)
    assert own
    assert all(greedy[k] == text for k, text in own.items())
    drawn = OnPolicyReplay(1.0, samples=2, **options)
    first = drawn.select(stage)
    assert first == drawn.select(stage)
    assert answers_of(first) != own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "fraction"),
        ({"samples": 0}, "samples"),
        ({"candidates": 0}, "candidates"),
        ({"keep": "all"}, "keep"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 0}, "samples"),
        ({"least": 101}, "least"),
        ({"share": 0}, "share"),
        ({"references": False}, "references"),
        ({"choose": "none"}, "choose"),
        ({"choose": "on-policy"}, "choose"),
        ({"choose": "nonsense"}, "unknown name 'nonsense'"),
        ({"choose": {"name": "surprise", "candidates": 0}}, "candidates"),
        ({"choose": 3}, "choose"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        OnPolicyReplay(**options)


def test_a_run_goes_on_with_the_same_examples(settings, stream, tmp_path):
    # A random model ends hardly ever: many draws of long answers.
    replay = {"keep": "confidence", "share": 1.0, "samples": 24, "temperature": 2.0, "max_new_tokens": 40}

    def run(output: Path) -> list:
        own = {**settings, "methods": [{"preset": "on-policy", "replay": replay}], "output": str(output)}
        (folder,) = ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()
        return [(stage.replayed, stage.replay, stage.losses, stage.scores) for stage in read_stages(folder)]

    whole = run(tmp_path / "whole")
    assert [sum(replayed.values()) for replayed, *_ in whole] == [0, 0, 2, 4]
    assert sum(sum(r.details["own answers"].values()) for _, r, *_ in whole if r is not None) > 0
    assert killed(lambda: run(tmp_path / "killed"), at_call(3, stage_evaluation, "evaluate"))
    assert killed(lambda: run(tmp_path / "killed"), at_call(1, own_answers, "generate_answers"))
    assert run(tmp_path / "killed") == whole


# --- the anchor ---

UP = "base_model.model.model.layers.0.mlp.up_proj"


def anchored(settings, stream, output: Path, prompts: Path, **more) -> Path:
    replay = {"anchor": str(prompts), "anchor_examples": 3, "fraction": 0.1, "max_new_tokens": 4}
    method = {"preset": "on-policy", "replay": replay}
    own = {**settings, "methods": [method], "output": str(output), **more}
    return ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()[0]


@pytest.fixture
def base_says(monkeypatch, tiny_tokenizer):
    """Answers that end and tell whether the base model gave them; how often it was asked is in ``calls``."""

    def fake(model, prompts, **options):
        base = not isinstance(model, PeftModel) or model.get_submodule(UP).disable_adapters
        fake.calls.append((base, len(prompts)))
        return [Answer("base" if base else "tuned", True) for _ in prompts]

    fake.calls = []
    monkeypatch.setattr(own_answers, "generate_answers", fake)
    return fake


def test_prompts_of_no_task_come_back_with_the_base_models_answers(settings, stream, tmp_path, base_says, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello there.\n\nCount to three.\nSay no.\nWho are you?\n", encoding="utf-8")
    trained = []
    original = stage_training.StageTraining.train
    monkeypatch.setattr(
        stage_training.StageTraining,
        "train",
        lambda self, stage, *rest: trained.append(stage.examples) or original(self, stage, *rest),
    )
    folder = anchored(settings, stream, tmp_path / "runs", prompts)
    own = [[each for each in examples if each.task == "anchor"] for examples in trained]
    assert [len(each) for each in own] == [3, 3, 3]
    assert {each.references for examples in own for each in examples} == {("base",)}
    assert len({tuple(each.instruction for each in examples) for examples in own}) > 1  # drawn anew for every stage
    assert base_says.calls.count((True, 4)) == 1
    stages = read_stages(folder)
    for stage in stages[1:]:
        assert "Anchor: 3 prompts come back with what the base model says; it answered 4 of 4." in stage.replay.notes
        assert "anchor" not in stage.replayed


def test_an_anchored_run_goes_on_with_what_the_base_model_said(settings, stream, tmp_path, base_says):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello.\nNo.\nYes.\nSo.\n", encoding="utf-8")
    whole = anchored(settings, stream, tmp_path / "whole", prompts)
    assert killed(
        lambda: anchored(settings, stream, tmp_path / "killed", prompts), at_call(2, stage_evaluation, "evaluate")
    )
    folder = anchored(settings, stream, tmp_path / "killed", prompts)
    assert [s.losses for s in read_stages(folder)] == [s.losses for s in read_stages(whole)]


def test_without_adapters_the_base_model_is_asked_before_it_is_trained(settings, stream, tmp_path, base_says):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello.\nNo.\nYes.\n", encoding="utf-8")
    folder = anchored(settings, stream, tmp_path / "runs", prompts, adapter=None)
    assert base_says.calls[0] == (True, 3)
    assert all(any(note.startswith("Anchor: 3") for note in s.replay.notes) for s in read_stages(folder)[1:])


def test_prompts_of_a_data_file_and_what_cannot_be_read(model, encoder, tmp_path, says):
    one = tmp_path / "data.jsonl"
    one.write_text('{"instruction": "Say 1.", "input": "", "output": "x"}\n' * 2, encoding="utf-8")
    says(lambda k, sample: f"own {k}")
    stage = Stage(model, encoder, index=1, tasks=(NEW,), seed="0/1")
    found = OnPolicyReplay(anchor=str(one), anchor_examples=9).select(stage).examples
    assert [(each.task, each.references) for each in found] == [("anchor", ("own 1",))] * 2
    with pytest.raises(ConfigError, match=r"replay.anchor: .*missing.txt"):
        OnPolicyReplay(anchor=str(tmp_path / "missing.txt")).select(stage)
    says(lambda k, sample: Answer("on and on", False))
    with pytest.raises(ConfigError, match=r"none of the 2 prompts of .* got an answer"):
        OnPolicyReplay(anchor=str(one)).select(stage)


def test_what_a_task_is_evaluated_on_is_no_anchor(model, encoder, tmp_path, says):
    path = tmp_path / "same.jsonl"
    rows = [{"instruction": "Say it.", "input": f"{k}", "output": "x"} for k in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    says(lambda k, sample: f"own {k}")
    same, replay = load_task(str(path)), OnPolicyReplay(anchor=str(path), anchor_examples=99)
    first = replay.select(Stage(model, encoder, index=1, tasks=(NEW,), seed="0/1"))
    assert len(first.examples) == 40
    assert first.record.notes == ["Anchor: 40 prompts come back with what the base model says; it answered 40 of 40."]
    stage = Stage(model, encoder, index=2, tasks=(same,), seed="0/2")
    second = replay.select(stage)
    evaluated = {each.input for each in (*same.dev, *same.test)}
    assert {each.input for each in second.examples} == {row["input"] for row in rows} - evaluated
    assert second.record.notes[0].endswith(f" {len(evaluated)} stay out: a task's dev or test split has them.")
    only = Task("only", NEW.train, test=tuple(replace(each, task="only") for each in (*same.train, *same.test)))
    with pytest.raises(ConfigError, match=r"replay.anchor: all prompts of .*same.jsonl are evaluated on"):
        replay.select(Stage(model, encoder, index=3, tasks=(only,), seen=(same,), seed="0/3"))
