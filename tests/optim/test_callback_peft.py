"""The average with LoRA adapters and frozen parameters, in transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from cit_fast.optim import AdamWBalanceEMA, BalanceEMA, BalanceEMACallback, find_balance_ema
from cit_fast.optim.callback import EXPORT_FOLDER

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data", "ignore::UserWarning:peft")


class Rows(torch.utils.data.Dataset):
    ids = torch.randint(10, 300, (16, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def lora(tiny: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype), config)


def make_trainer(folder: Path, model: Any, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    optimizer = settings.pop("optimizer", None)
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 0.05,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        },
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=optimizer,
    )


def trained(model: Any) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def averages(trainer: Trainer) -> dict[str, Tensor]:
    balance_ema = find_balance_ema(trainer.optimizer)
    balance_ema.flush()
    return {
        name: balance_ema.state[param]["average"].clone()
        for name, param in trainer.model.named_parameters()
        if param.requires_grad
    }


def same(xs: dict[str, Tensor], ys: dict[str, Tensor]) -> bool:
    return xs.keys() == ys.keys() and all(torch.equal(xs[name], ys[name]) for name in xs)


@pytest.mark.parametrize("fused", [False, True], ids=["watched", "fused"])
def test_adapters_resume_and_are_exported(tmp_path: Path, tiny_model_folder: Path, fused: bool) -> None:
    optimizer = (AdamWBalanceEMA, {"lr": 0.05, "fallback": 0.3}) if fused else None
    options = {} if fused else {"fallback": 0.3}
    callback = BalanceEMACallback(final="live", **options)
    straight = make_trainer(tmp_path, lora(tiny_model_folder), callback, optimizer=optimizer)
    straight.train()
    assert len(find_balance_ema(straight.optimizer).state) == len(trained(straight.model)) == 8  # adapters only

    resumed = make_trainer(
        tmp_path, lora(tiny_model_folder), BalanceEMACallback(final="live", **options), optimizer=optimizer
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # The exported adapter lies deep enough not to be taken for one of the model's.
    assert list(resumed.model.peft_config) == ["default"]
    assert same(trained(resumed.model), trained(straight.model))
    assert same(averages(resumed), averages(straight))

    folder = tmp_path / "checkpoint-4" / EXPORT_FOLDER
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 8
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    exported = PeftModel.from_pretrained(base, folder)
    with find_balance_ema(straight.optimizer).averaged():
        averaged = {name: param.detach().clone() for name, param in straight.model.named_parameters()}
    assert all(torch.equal(param, averaged[name]) for name, param in exported.named_parameters())


def test_the_best_adapter_is_loaded_from_its_export(tmp_path: Path, tiny_model_folder: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        lora(tiny_model_folder),
        BalanceEMACallback(fallback=0.3),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    exported = load_file(best / EXPORT_FOLDER / "adapter_model.safetensors")
    held = {name.replace(".default", ""): value for name, value in trained(trainer.model).items()}
    assert same(held, exported)


def test_two_adapters_switched_in_mid_run(tiny_model_folder: Path) -> None:
    """What TRL's BEMACallback cannot do: adapters beside frozen embeddings, and one that is not trained yet."""
    model = lora(tiny_model_folder)
    model.add_adapter("task1", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    first = [param for name, param in model.named_parameters() if ".default." in name]
    second = [param for name, param in model.named_parameters() if ".task1." in name]
    for make in (
        lambda params: AdamWBalanceEMA(params, lr=0.05, fallback=0.3),
        lambda params: BalanceEMA(AdamW(params, lr=0.05), fallback=0.3),
    ):
        model.set_adapter("default")
        optimizer = make([*first, *second])
        for adapter, trained_now in (("default", first), ("task1", second), ("default", first)):
            model.set_adapter(adapter)
            before = {param: optimizer.state[param].get("average") for param in [*first, *second]}
            before = {param: None if average is None else average.clone() for param, average in before.items()}
            for _ in range(2):
                optimizer.zero_grad()
                model(input_ids=Rows.ids[:4], labels=Rows.ids[:4]).loss.backward()
                optimizer.step()
            optimizer.flush()
            for param in [*first, *second]:
                average = optimizer.state[param].get("average")
                if any(param is other for other in trained_now):
                    assert average is not None
                    assert before[param] is None or not torch.equal(average, before[param])
                elif before[param] is None:
                    assert average is None
                else:
                    assert torch.equal(average, before[param])
        assert len(optimizer.balance_weights()) == len(first)


@pytest.mark.parametrize("use_lora", [True, False], ids=["lora", "frozen embeddings"])
def test_trl_sft_trainer(
    tmp_path: Path, tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, use_lora: bool
) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = Dataset.from_list(
        [{"prompt": f"Write {i} in words.", "completion": " one two three"[: 4 + i % 8]} for i in range(8)]
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    if not use_lora:
        model.get_input_embeddings().requires_grad_(False)
    callback = BalanceEMACallback(fallback=0.3)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            max_steps=3,
            save_steps=3,
            eval_strategy="steps",
            eval_steps=3,
            logging_steps=1,
            learning_rate=0.01,
            max_length=32,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if use_lora else None,
        callbacks=[callback],
    )
    trainer.train()
    assert any("balance_weight_mean" in log for log in trainer.state.log_history)
    name = "adapter_model.safetensors" if use_lora else "model.safetensors"
    raw = load_file(tmp_path / "checkpoint-3" / name)
    exported = load_file(tmp_path / "checkpoint-3" / EXPORT_FOLDER / name)
    assert raw.keys() == exported.keys()
    assert not same(raw, exported)
    assert all(torch.equal(value, averages(trainer)[name]) for name, value in trained(trainer.model).items())
