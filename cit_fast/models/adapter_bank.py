"""Mixed-adapter batches: every row of a batch uses its own adapter set, over one base model.

With LoRA (Hu et al., 2021, equation 3), row ``i`` and its set ``s`` give ``y_i = W x_i + c_s B_s A_s x_i``. PEFT's own
mixing of adapters runs a loop over the sets of a batch in each of the model's layers. Here the matrices of the batch's
rows are stacked once per batch, ``A [rows, in, r]`` and ``B [rows, r, out]``, and each layer is the base model's
product and two batched ones. Two batched products touch each set once per row and nothing of any other row's, so an
answer does not depend on what else is in the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cit_fast.errors import DataError, RunError
from cit_fast.text import first_line

BASE = "__base__"
"""The name of no adapter set: the base model alone. A router's answer "none of these"."""


class RowsLostError(Exception):
    """A layer was not given one entry per row of the batch, so no row there can have an adapter set of its own."""


# What may differ from LoraConfig's default and still be y = W x + c B A x; all else changes what a layer computes.
_UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
}  # fmt: skip
# bitsandbytes' quantised layers add the same update to another base product.
_PLAIN_LAYERS = {"Linear", "FusedLoraLinear", "Linear4bit", "Linear8bitLt"}


def is_plain_lora(config: Any) -> bool:
    """Whether a PEFT configuration describes plain LoRA on linear layers, whose rows can be mixed."""
    if type(config) is not LoraConfig:
        return False
    if not (isinstance(config.init_lora_weights, bool) or config.init_lora_weights == "gaussian"):
        return False  # PiSSA, OLoRA and the like change the base model's weights as well
    default = LoraConfig()
    names = {each.name for each in dataclasses.fields(LoraConfig)} - _UNDERSTOOD - {"init_lora_weights"}
    # None and {} both say "not used"; some fields are read back from a file as the other one.
    return all((getattr(config, name) or None) == (getattr(default, name) or None) for name in names)


@dataclass(frozen=True)
class LowRank:
    """One layer's update by one adapter set.

    Args:
        a: ``[r, in]``; ``b``: ``[out, r]``; ``bias``: ``[out]``, before scaling.
        scaling: ``c``; alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    a: Tensor
    b: Tensor
    scaling: float
    bias: Tensor | None = None


class _Layer:
    """A linear layer of the base model with the updates of all sets, and the stacked ones of the batch at work."""

    def __init__(self, module: torch.nn.Module, base: Callable[..., Tensor]) -> None:
        self.module, self.base = module, base
        self.updates: MutableMapping[str, LowRank] = {}
        self.a: Tensor | None = None  # [rows, in, r], or [r, in] where all rows have one set
        self.b: Tensor | None = None  # [rows, r, out], or [out, r]
        self.bias: Tensor | None = None  # [rows, 1, out], or [out]
        self.scaling = 1.0

    def prepare(self, names: Sequence[str]) -> None:
        """Stack the updates of a batch's rows; smaller ranks are filled up with zeros."""
        found = [self.updates.get(name) for name in names]
        there = [update for update in found if update is not None]
        self.a = self.b = self.bias = None
        if not there:
            return
        first = there[0]
        if len(set(names)) == 1:
            self.a, self.b, self.scaling = first.a, first.b, first.scaling
            self.bias = None if first.bias is None else first.bias * first.scaling
            return
        rows, rank = len(names), max(len(update.a) for update in there)
        # A row's [r, in] is copied in one piece; turned over, it is the layout that the batched product reads.
        a = first.a.new_zeros(rows, rank, first.a.shape[1])
        b = first.b.new_zeros(rows, rank, first.b.shape[0])
        biased = any(update.bias is not None for update in there)
        bias = first.b.new_zeros(rows, 1, first.b.shape[0]) if biased else None
        for row, update in enumerate(found):
            if update is None:
                continue
            r = len(update.a)
            a[row, :r] = update.a
            torch.mul(update.b.T, update.scaling, out=b[row, :r])
            if bias is not None and update.bias is not None:
                bias[row, 0] = update.bias * update.scaling
        self.a, self.b, self.bias = a.transpose(1, 2), b, bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with each row's update."""
        y = self.base(x, *args, **kwargs)
        a, b = self.a, self.b
        if a is None or b is None:
            return y
        inputs = x.to(a.dtype)
        if a.dim() == 2:
            update = torch.nn.functional.linear(torch.nn.functional.linear(inputs, a), b)
            update = update * self.scaling if self.bias is None else update * self.scaling + self.bias
        else:
            if x.dim() < 2 or len(x) != len(a):
                raise RowsLostError
            rows = inputs.reshape(len(a), -1, x.shape[-1])
            low = torch.bmm(rows, a)
            update = torch.bmm(low, b) if self.bias is None else torch.baddbmm(self.bias, low, b)
            update = update.view(y.shape)
        return (y + update).to(y.dtype)


class AdapterBank:
    """Plain LoRA sets over one base model, ready to be mixed row by row.

    Made from a PEFT model (:meth:`of_model`), or from adapter folders over a bare base model (:meth:`read`): PEFT takes
    minutes to take up a hundred adapters, here they are mapped from their files.
    """

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}
        self.names: set[str] = set()

    @classmethod
    def of_model(cls, model: Any) -> AdapterBank | None:
        """The sets of a PEFT model; ``None`` where one of them is more, or something else, than plain LoRA."""
        if not isinstance(model, PeftModel) or not all(map(is_plain_lora, model.peft_config.values())):
            return None
        bank = cls()
        bank.names = set(model.peft_config)
        for path, module in model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            if type(module).__name__ not in _PLAIN_LAYERS or module.merged or module.lora_variant:
                return None
            layer = bank._layers[path] = _Layer(module, module.base_layer)
            for name, a in module.lora_A.items():
                b = module.lora_B[name]
                layer.updates[name] = LowRank(
                    a.weight.detach(),
                    b.weight.detach(),
                    module.scaling[name],
                    None if b.bias is None else b.bias.detach(),
                )
        return bank

    def extend(self, model: Any, updates: Mapping[str, MutableMapping[str, LowRank]], names: Iterable[str]) -> None:
        """Add sets that lie beside the PEFT model: layer -> set -> its matrices."""
        self.names.update(names)
        for path, sets in updates.items():
            if path not in self._layers:
                module = model.get_submodule(path)
                self._layers[path] = _Layer(module, module.forward)
            self._layers[path].updates = ChainMap(self._layers[path].updates, sets)

    def updates_of(self, name: str) -> dict[str, LowRank]:
        """A set's matrices, by layer."""
        return {path: layer.updates[name] for path, layer in self._layers.items() if name in layer.updates}

    def read(self, base: Any, name: str, folder: Path) -> None:
        """Add the set in a PEFT adapter folder, over the bare model ``base``.

        Raises:
            NotPlainLoraError: it is readable, but no plain LoRA.
            RunError: a missing or damaged file, weights that are not finite, or an adapter of another base model.
        """
        config = read_adapter_config(folder)
        if not is_plain_lora(config):
            raise NotPlainLoraError(f"{folder}: not plain LoRA")
        device = next(base.parameters()).device
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in read_adapter_weights(folder).items():
            path, kind = _split_key(key)
            if not kind:
                raise NotPlainLoraError(f"{folder}: {key} is no part of plain LoRA")
            # Half precision is summed in float32, as PEFT does.
            full = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
            found.setdefault(path, {})[kind] = full.to(device)
        updates = {path: self._update(folder, base, path, parts, config) for path, parts in found.items()}
        for path, update in updates.items():
            if path not in self._layers:
                module = base.get_submodule(path)
                self._layers[path] = _Layer(module, module.forward)
            self._layers[path].updates[name] = update
        self.names.add(name)

    @staticmethod
    def _update(folder: Path, base: Any, path: str, parts: Mapping[str, Tensor], config: LoraConfig) -> LowRank:
        """One layer's update, checked against the base model."""
        try:
            module = base.get_submodule(path)
        except AttributeError:
            raise RunError(f"{folder}: made for another base model: this one has no layer {path}") from None
        if set(parts) - {"bias"} != {"a", "b"}:
            raise RunError(f"{folder}: damaged: {path} lacks {'lora_B' if 'a' in parts else 'lora_A'}")
        a, b = parts["a"], parts["b"]
        if a.dim() != 2 or not hasattr(module, "weight"):
            raise NotPlainLoraError(f"{folder}: {path} is no linear layer")
        # transformers' Conv1D (GPT-2) keeps its weight the other way round.
        out, into = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
        if (b.shape[0], a.shape[1]) != (out, into) or b.shape[1] != a.shape[0]:
            raise RunError(
                f"{folder}: made for another base model: {path} has {into} inputs and {out} outputs, "
                f"the adapter's {a.shape[1]} and {b.shape[0]}"
            )
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha)
        return LowRank(a, b, alpha / (math.sqrt(len(a)) if config.use_rslora else len(a)), parts.get("bias"))

    def memory(self) -> int:
        """Bytes of all sets' matrices."""
        tensors = [t for x in self._layers.values() for u in x.updates.values() for t in (u.a, u.b, u.bias)]
        return sum(t.nbytes for t in tensors if t is not None)

    @contextlib.contextmanager
    def answering(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, row ``i`` of whatever goes through the model has the set ``names[i]``, :data:`BASE` for none.

        Args:
            names: one per row of the batch; where all are the same, any number of rows can go through.

        Raises:
            DataError: a name that is no set.
            RowsLostError: inside, by a layer that is given something else than the batch's rows.
        """
        unknown = set(names) - self.names - {BASE}
        if unknown:
            raise DataError(f"adapter set {min(unknown)!r} is unknown; there are {', '.join(sorted(self.names))}")
        own: dict[str, Any] = {path: layer.module.__dict__.get("forward") for path, layer in self._layers.items()}
        try:
            for layer in self._layers.values():
                layer.prepare(names)
                layer.module.forward = layer.forward
            yield
        finally:
            for path, layer in self._layers.items():
                layer.a = layer.b = layer.bias = None
                layer.module.__dict__.pop("forward", None)
                if own[path] is not None:
                    layer.module.forward = own[path]


class NotPlainLoraError(Exception):
    """An adapter that PEFT itself must apply."""


def read_adapter_config(folder: Path) -> Any:
    """The PEFT configuration of an adapter folder.

    Raises:
        RunError: a missing or damaged file, or a kind of adapter that this PEFT does not know.
    """
    from peft import PeftConfig

    path = folder / "adapter_config.json"
    if not folder.is_dir():
        raise RunError(f"{folder}: not there; the adapter set is gone")
    try:
        if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            raise RunError(f"{path}: damaged (no JSON object)")
        return PeftConfig.from_pretrained(str(folder))
    except FileNotFoundError:
        raise RunError(f"{path}: not there; the adapter set is damaged") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: damaged ({first_line(error)})") from None


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, on the CPU, mapped from the file.

    Raises:
        RunError: a missing or damaged file, or weights that are not finite.
    """
    path = folder / "adapter_model.safetensors"
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise RunError(f"{path}: not there; the adapter set is damaged") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"{path}: damaged ({first_line(error)})") from None
    if not tensors:
        raise RunError(f"{path}: damaged (it holds no weights)")
    for key, tensor in tensors.items():
        # A sum is one pass over the bytes and not finite where any part is not.
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float32)):
            raise RunError(f"{path}: damaged ({key} is not finite)")
    return tensors


def _split_key(key: str) -> tuple[str, str]:
    """``base_model.model.<layer>.lora_A.weight`` -> the layer's path and a, b or bias; an empty kind for other keys."""
    for ending, kind in ((".lora_A.weight", "a"), (".lora_B.weight", "b"), (".lora_B.bias", "bias")):
        if key.endswith(ending):
            return key.removesuffix(ending).removeprefix("base_model.model."), kind
    return key, ""
