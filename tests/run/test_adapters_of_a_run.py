"""Adapters that touch more than their own weights: rewritten bases, output projections, tied embeddings."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from growth import predictions
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.data import Example, Task, TaskStream
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation import read_stages
from cit_fast.inference import export
from cit_fast.inference.export import export_adapters, export_merged
from cit_fast.run import stage_training

# PEFT's advice; what it warns of is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


@pytest.fixture
def loud(settings, tiny_model_folder, tmp_path):
    """Settings with a model whose random weights are large enough that adapters and tokens matter."""
    folder = tmp_path / "loud"
    shutil.copytree(tiny_model_folder, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(folder)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return {**settings, "model": {"name": str(folder)}}


def run(settings, stream, method, **adapter):
    merged = {**settings, "methods": [method], "adapter": {"r": 4, "target_modules": "all-linear", **adapter}}
    return ContinualTrainer(merged, stream=stream, console=Console(quiet=True)).run()[0]


def answers(folder, stage, task):
    return [entry.prediction for entry in predictions(folder, stage, task)]


def trained(folder, stage, name):
    return load_file(folder / f"stages/{stage:02d}/adapters/{name}/adapter_model.safetensors")


# ------------------------------------------------------------------------------------------------- rewritten bases


@pytest.mark.parametrize(
    "adapter",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa_niter_4", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"init_lora_weights": "pissa", "use_dora": True, "modules_to_save": ["lm_head"]},
    ],
    ids=["pissa", "olora", "patterns", "dora"],
)
def test_the_base_model_is_put_back(loud, stream, adapter):
    folder = run(loud, stream, "oracle", **adapter)
    for task in stream.names[:2]:
        assert answers(folder, 2, task) == answers(folder, 3, task)
    model = ContinualModel.from_run(folder)
    test = list(stream[0].test)
    assert model.generate(test, 6, adapters=["__base__"] * 4) == answers(folder, 0, "alpha")
    assert model.generate(test, 6) == answers(folder, 3, "alpha")
    assert answers(folder, 3, "alpha") != answers(folder, 0, "alpha")
    config = json.loads((folder / "stages/01/adapters/task-alpha/adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)


def test_a_set_trained_again_goes_on_from_plain_lora(loud, stream, tmp_path):
    first = run(loud, TaskStream(stream.tasks[:1]), "sequential", init_lora_weights="pissa")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(loud["model"]["name"]), first / "stages/01/adapters/shared"
    )
    asked = ContinualModel.from_run(first).encoder.prompt(stream[0].test[0])
    ids = torch.tensor([asked])
    with torch.no_grad():
        by_peft = model(ids).logits[0, -1]
    ours = ContinualModel.from_run(first)
    with ours.bank.answering(["shared"]), torch.no_grad():
        torch.testing.assert_close(ours.model(ids).logits[0, -1], by_peft, atol=1e-4, rtol=1e-4)
    more = run({**loud, "output": str(tmp_path / "more")}, stream, "sequential", init_lora_weights="pissa")
    weights = trained(more, 3, "shared")
    assert {len(a) for key, a in weights.items() if "lora_A" in key} == {8}
    assert answers(more, 3, "gamma") != answers(more, 2, "gamma")


def test_a_base_weight_that_changes_is_refused(settings, stream, monkeypatch):
    class Meddling(stage_training.StageTrainer):
        def train(self, *args, **kwargs):
            super().train(*args, **kwargs)
            self.model.get_base_model().model.norm.weight.data.add_(1)

    monkeypatch.setattr(stage_training, "StageTrainer", Meddling)
    with pytest.raises(RunError, match=r"stage 1 \(alpha\): .*model\.norm\.weight, which is not trained, has changed"):
        run(settings, stream, "oracle")


def test_layers_that_do_not_move_are_noted(settings, stream):
    still = {**settings, "training": {**settings["training"], "learning_rate": 0.0}}
    folder = run(still, stream, "sequential", target_modules=["q_proj"])
    (note,) = read_stages(folder)[1].notes
    assert note.startswith("2 of 2 trained layers have not moved: base_model.model.model.layers.0.self_attn.q_proj")
    assert read_stages(run({**settings, "output": settings["output"] + "2"}, stream, "sequential"))[1].notes == []


# --------------------------------------------------------------------------------------- on the output projection


@pytest.mark.parametrize("method", ["sequential", "kpig", "cit-fast"])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_on_the_output_projection_learns(loud, stream, method, more):
    folder = run(loud, stream, method, target_modules=["q_proj", "lm_head"], **more)
    moved = {key: float(b.abs().max()) for key, b in trained(folder, 3, "shared").items() if "lora_B" in key}
    assert len(moved) == 3
    assert min(moved.values()) > 0


# ---------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("modules", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]], ids=["head", "embeddings"])
def test_merging_where_embeddings_are_tied(loud, stream, tmp_path, modules):
    folder = run(loud, stream, "sequential", target_modules=modules)
    export_merged(folder, tmp_path / "merged", "shared")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    ours = ContinualModel.from_run(folder)
    ids = torch.tensor([ours.encoder.prompt(stream[2].test[0])])
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(loud["model"]["name"]), folder / "stages/03/adapters/shared"
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-5)


def test_embeddings_stay_tied_where_no_adapter_is_on_them(settings, stream, tmp_path):
    folder = run(settings, stream, "sequential", target_modules=["q_proj"])
    export_merged(folder, tmp_path / "merged", "shared")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.tie_word_embeddings


def test_a_merge_into_half_precision_is_rounded_once(loud, stream, tmp_path, monkeypatch):
    loud["model"]["dtype"] = "bfloat16"
    folder = run(loud, stream, "sequential")
    for dtype in ("auto", "float32"):
        export_merged(folder, tmp_path / dtype, "shared", dtype=dtype)
    half, full = (AutoModelForCausalLM.from_pretrained(tmp_path / each, dtype="auto") for each in ("auto", "float32"))
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    for name, weight in full.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.bfloat16()), name
    base = AutoModelForCausalLM.from_pretrained(loud["model"]["name"], dtype=torch.bfloat16).float()
    adapted = PeftModel.from_pretrained(base, folder / "stages/03/adapters/shared")
    ids = torch.tensor([ContinualModel.from_run(folder).encoder.prompt(stream[2].test[0])])
    with torch.no_grad():
        right = adapted(ids).logits
        torch.testing.assert_close(full(ids).logits, right, atol=1e-4, rtol=1e-5)
        with adapted.disable_adapter():
            assert (adapted(ids).logits - right).abs().amax() > 0.01  # what the adapter does is far more
    plain = export.load_model

    def with_one_in_float32(*given):  # as transformers keeps some
        model = plain(*given)
        model.model.register_buffer("kept", torch.full((4,), 1.0001))
        return model

    with monkeypatch.context() as patch:
        patch.setattr(export, "load_model", with_one_in_float32)
        export_merged(folder, tmp_path / "kept", "shared")
    found = load_file(tmp_path / "kept" / "model.safetensors")
    assert torch.equal(found["model.kept"], torch.full((4,), 1.0001))
    assert found["model.embed_tokens.weight"].dtype == torch.bfloat16
    logits = export._few_logits
    monkeypatch.setattr(
        export, "_few_logits", lambda model: logits(model) * (1.2 if model.dtype != torch.float32 else 1)
    )
    with pytest.warns(UserWarning, match=r"rounded to bfloat16, logits of up to .* dtype float32 keeps them"):
        export_merged(folder, tmp_path / "again", "shared")


@pytest.mark.parametrize("what", ["merged", "adapters"])
def test_an_export_that_answers_otherwise_does_not_appear(loud, stream, tmp_path, monkeypatch, what):
    folder = run(loud, stream, "sequential")
    logits, calls = export._few_logits, []

    def changed(model):
        calls.append(1)
        return logits(model) * (1 if len(calls) == 1 else 1.5)

    monkeypatch.setattr(export, "_few_logits", changed)
    with pytest.raises(RunError, match=r"does not answer as the adapter does here .* nothing was written"):
        export_merged(folder, tmp_path / "out", "shared") if what == "merged" else export_adapters(
            folder, tmp_path / "out"
        )
    assert not list(tmp_path.glob("*out*"))


def test_adapters_can_be_exported_without_their_base_model(loud, stream, tmp_path):
    folder = run(loud, stream, "sequential")
    shutil.rmtree(loud["model"]["name"])
    with pytest.warns(UserWarning, match="not tried with the base model: model.name"):
        assert export_adapters(folder, tmp_path / "out") == ["shared"]


def test_kinds_that_cannot_be_trained_here_say_why(settings, stream):
    for adapter, said in (
        ({"peft_type": "ADALORA"}, "moves its ranks between the steps"),
        ({"peft_type": "POLY"}, "wants a task's number with every batch"),
        ({"layer_replication": [[0, 2]]}, "makes another base model"),
        ({"init_lora_weights": "eva"}, "needs a pass over data"),
        ({"inference_mode": True}, "set by cit-fast"),
        ({"task_type": "SEQ_CLS"}, "only CAUSAL_LM and SEQ_2_SEQ_LM are trained here"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(settings, stream, "sequential", **adapter)


def test_an_example_with_a_token_the_model_lacks(settings, stream, tiny_model_folder, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "more-tokens"
    shutil.copytree(tiny_model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    other = {**settings, "model": {"name": str(folder)}}
    assert read_stages(run(other, stream, "sequential"))[3].steps == 4
    task = Task("odd", (Example("Say [PAD].", references=("x",), source="odd.json:1"),), test=stream[0].test)
    with pytest.raises(Exception, match=r"odd.json:1: token '\[PAD\]' \(\d+\) is not among the model's"):
        run({**other, "output": str(tmp_path / "odd")}, TaskStream((task,)), "sequential")
