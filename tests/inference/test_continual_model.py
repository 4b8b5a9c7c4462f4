"""Runs with a set per task as models that answer, and their weights in other libraries' formats."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch
from growth import predictions
from transformers import GPT2Config, GPT2LMHeadModel
from worded_run import WORDINGS

from cit_fast import ContinualModel, cli
from cit_fast.data import Example
from cit_fast.errors import DataError, RunError
from cit_fast.evaluation import read_stages
from cit_fast.inference.export import export_adapters, export_merged
from cit_fast.models import adapter_bank as mixed_batches
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.forward import undisturbed
from cit_fast.models.generation import generate
from cit_fast.models.prompts import PromptEncoder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "lcia")


def sets_of(run):
    return {stage.trained[0]: stage.adapter for stage in read_stages(run)[1:]}


def damage(run, name):
    (path,) = run.glob(f"stages/*/adapters/{name}/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:100])


def test_each_prompt_goes_to_its_set_and_is_answered_as_in_the_evaluation(finished, model, stream):
    examples = [example for pair in zip(*(task.test for task in stream), strict=True) for example in pair]
    stored = {task: predictions(finished, 3, task) for task in stream.names}
    expected = [stored[task][k].prediction for k in range(4) for task in stream.names]
    sets = sets_of(finished)
    assert len(set(sets.values())) == 3
    assert model.sets == tuple(sorted(sets.values()))
    assert model.route(examples) == [sets[example.task] for example in examples]
    assert model.generate(examples, max_new_tokens=6, batch_size=5) == expected
    texts = [f"{example.instruction}\n\n{example.input}" for example in examples]
    assert model.route(texts) == model.route(examples)
    assert model.generate(texts, max_new_tokens=6) == expected
    own = model.generate(texts[:2], max_new_tokens=6, adapters=[BASE, sets["mood"]])
    assert own[1] == model.generate(texts[1:2], max_new_tokens=6, adapters=[sets["mood"]])[0]
    assert model.generate([]) == model.route([]) == []


def test_the_same_through_peft_itself(finished, model, stream, monkeypatch):
    expected = model.generate([task.test[0] for task in stream], max_new_tokens=6)
    monkeypatch.setattr(mixed_batches, "is_plain_lora", lambda config: False)
    again = ContinualModel.from_run(finished, device="cpu")
    assert again.bank is None
    assert again.generate([task.test[0] for task in stream], max_new_tokens=6) == expected


@pytest.mark.parametrize("through_peft", [False, True])
def test_a_damaged_set_is_named_and_the_others_serve(run, stream, monkeypatch, through_peft):
    sets = sets_of(run)
    examples = [task.test[0] for task in stream]
    expected = ContinualModel.from_run(run, device="cpu").generate(examples, max_new_tokens=6)
    damage(run, sets["mail"])
    if through_peft:
        monkeypatch.setattr(mixed_batches, "is_plain_lora", lambda config: False)
    with pytest.warns(
        UserWarning, match=f"adapter set '{sets['mail']}' cannot be used: .*adapter_model.safetensors: damaged"
    ):
        model = ContinualModel.from_run(run, device="cpu")
    assert set(model.unusable) == {sets["mail"]}
    routed = model.route(examples)
    assert [routed[0], routed[2]] == [sets["dates"], sets["mood"]]
    assert routed[1] in {sets["dates"], sets["mood"], BASE}
    found = model.generate(examples, max_new_tokens=6)
    assert [found[0], found[2]] == [expected[0], expected[2]]
    with pytest.raises(DataError, match=f"adapter set '{sets['mail']}' cannot be used"):
        model.generate(examples[:1], adapters=[sets["mail"]])


def test_a_missing_folder_is_named_too(run, stream):
    sets = sets_of(run)
    shutil.rmtree(run / "stages/01/adapters" / sets["dates"])
    with pytest.warns(UserWarning, match=f"adapter set '{sets['dates']}' cannot be used: .* not there"):
        model = ContinualModel.from_run(run, device="cpu")
    assert sets["dates"] not in model.route([stream[0].test[0]])


def test_an_earlier_stage_answers_and_is_exported(run, stream, tmp_path, monkeypatch, capsys):
    """As it answered then; sets that came later are not there."""
    names = list(WORDINGS)
    for index in (1, 2):
        earlier = ContinualModel.from_run(run, device="cpu", stage=index)
        assert set(earlier.sets) == {sets_of(run)[name] for name in names[:index]}
        for task in list(stream)[:index]:
            kept = predictions(run, index, task.name)
            assert earlier.generate(list(task.test), max_new_tokens=6) == [each.prediction for each in kept]
    assert export_adapters(run, tmp_path / "first", stage=1) == [sets_of(run)[names[0]]]
    assert call(monkeypatch, "export", run, tmp_path / "merged", "--merge", sets_of(run)[names[0]], "--stage", 1) == 0
    capsys.readouterr()
    assert call(monkeypatch, "export", run, tmp_path / "none", "--stage", 9) == 2
    assert f"has no trained stage 9; there are 1 to {len(names)}" in capsys.readouterr().err


def test_nothing_left_to_answer(run):
    for name in sets_of(run).values():
        damage(run, name)
    with pytest.raises(RunError, match=r"no adapter set can answer: .*damaged") as caught:
        ContinualModel.from_run(run, device="cpu")
    assert "\n" not in str(caught.value)
    for folder in run.glob("stages/*/adapters"):
        shutil.rmtree(folder)
    with pytest.raises(RunError, match="holds neither adapters nor a model, and its router knows set-01"):
        ContinualModel.from_run(run, device="cpu")


def test_a_damaged_router(run):
    (run / "stages/03/router/router.json").write_text("{")
    with pytest.raises(RunError, match=r"router.json: damaged"):
        ContinualModel.from_run(run, device="cpu")


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt(model, prompt):
    for ask in (model.route, model.generate):
        with pytest.raises(DataError, match="prompt 1 is empty"):
            ask(["Write the date.", prompt])


@pytest.mark.parametrize("prompt", ["Write the date.", Example("Say it.", references=("-",))])
def test_one_prompt_is_no_list(model, prompt):
    for ask in (model.route, model.generate):
        with pytest.raises(DataError, match="one prompt alone; expected a list of them"):
            ask(prompt)


def test_a_prompt_leaves_room_for_the_answer_where_positions_end(tiny_tokenizer):
    """As in the evaluation."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    network, encoder = GPT2LMHeadModel(config).eval(), PromptEncoder(tiny_tokenizer, max_length=64)
    encoder.fit_to(network)
    model = ContinualModel(network, encoder)
    asked = [Example("Count.", "0 1 2 3 " * 40, references=("-",)), Example("Count.", references=("-",))]
    encoded = encoder.encode_prompts(asked, reserve=20)
    assert encoded.truncated == 1
    options = {
        "tokenizer": tiny_tokenizer, "pad_token_id": encoder.pad_token_id, "eos_token_ids": encoder.stop_token_ids
    }  # fmt: skip
    assert model.generate(asked, 20) == generate(network, encoded.prompts, max_new_tokens=20, **options)


@pytest.mark.parametrize("ask", [lambda model, each: model.route([each]), lambda model, each: model.generate([each])])
def test_a_second_thread_waits_for_the_base_model(model, stream, ask):
    """A router may look into it, too."""
    found = []
    thread = threading.Thread(target=lambda: found.append(ask(model, stream[0].test[0])))
    with undisturbed(model.model):
        thread.start()
        thread.join(0.2)
        assert not found
        right = ask(model, stream[0].test[0])
    thread.join(60)
    assert found == [right]


def test_a_set_that_is_not_there(model):
    with pytest.raises(DataError, match="no adapter set 'lost'; there are set-01"):
        model.generate([Example("Say it.", references=("-",))], adapters=["lost"])


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["cit-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_generate_says_which_set_answered(run, monkeypatch, capsys):
    lines = "".join(f"{WORDINGS[task][0]}\n" for task in ("dates", "mood"))
    sets = sets_of(run)
    options = ["generate", run, "--max-new-tokens", 3]
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert call(monkeypatch, *options, "--show-adapter") == 0
    shown = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in shown] == [sets["dates"], sets["mood"]]
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert call(monkeypatch, *options, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [[each["adapter"], each["answer"]] for each in records] == shown
    assert [each["prompt"] for each in records] == lines.splitlines()
    damage(run, sets["mail"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert call(monkeypatch, *options) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith(f"warning: adapter set '{sets['mail']}' cannot be used")
    assert len(printed.out.splitlines()) == 2


OUTSIDE = """
    import sys, torch, warnings
    warnings.simplefilter("ignore")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapter, merged = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = torch.tensor([tokenizer("Extract the e-mail address.")["input_ids"]])
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        assert own.peft_config["default"].base_model_name_or_path == base, own.peft_config
        with_adapter = own(ids).logits
        with own.disable_adapter():
            plain = own(ids).logits
    assert torch.allclose(whole, with_adapter, atol=1e-4), (whole - with_adapter).abs().max()
    assert (plain - with_adapter).abs().max() > 1e-3
    assert not [name for name in sys.modules if name.startswith("cit_fast")]
    print("loaded")
"""


def test_exports_load_without_this_package(run, tiny_model_folder, tmp_path, monkeypatch, capsys):
    name = sets_of(run)["mail"]
    assert call(monkeypatch, "export", run, tmp_path / "out") == 0
    assert name in capsys.readouterr().out
    assert call(monkeypatch, "export", run, tmp_path / "merged", "--merge", name) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", *sets_of(run).values()}
    script = [sys.executable, "-c", textwrap.dedent(OUTSIDE)]
    places = [tiny_model_folder.resolve(), tmp_path / "out" / name, tmp_path / "merged"]
    done = subprocess.run([*script, *map(str, places)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip() == "loaded", done.stderr
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_exports_that_cannot_be_made(run, tmp_path):
    sets = sets_of(run)
    damage(run, sets["mail"])
    with pytest.warns(UserWarning, match="left out: .*damaged"):
        assert sets["mail"] not in export_adapters(run, tmp_path / "out")
    with pytest.raises(RunError, match="out: there is something already"):
        export_adapters(run, tmp_path / "out")
    with pytest.raises(RunError, match="has no adapter set 'lost'; there are set-01"):
        export_merged(run, tmp_path / "new", "lost")
    with pytest.raises(RunError, match=r"adapter_model\.safetensors: damaged"):
        export_merged(run, tmp_path / "new", sets["mail"])
    with pytest.raises(RunError, match=r"run.json: not there"):
        export_adapters(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_loading_gives_no_warning_and_leaves_one_base_model(finished):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ContinualModel.from_run(finished, device="cpu")
    assert model.bank is not None
    assert model.bank.names == set(model.sets)
    assert not any("lora" in name for name, _ in model.model.named_modules())
