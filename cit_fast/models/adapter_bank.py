"""Mixed-adapter batches: every row of a batch uses its own adapter set, over one base model.

With LoRA (Hu et al., 2021, equation 3), row ``i`` and its set ``s`` give ``y_i = W x_i + c_s B_s A_s x_i``. PEFT's own
mixing of adapters runs a loop over the sets of a batch in each of the model's layers. Here each layer is the base
model's product and two more, in one of two forms:

* *side by side*: the matrices of the batch's K sets stand side by side, ``A [K r, in]`` and ``B [out, K r]``, and in
  between a row keeps the columns of its own set alone. Each set is read once, however many rows have it: this is for
  new tokens, where reading is what costs, and for few sets.
* *row by row*: ``A [rows, in, r]`` and ``B [rows, r, out]``, batched products. This is for the prompts of many sets.

An answer does not depend on what else is in the batch: in a row's own sum, what other sets have made of it is zero, and
matrices that are not finite do not stand beside others. Products are in the base layer's dtype, as in training
(:func:`~cit_fast.ops.lora_linear`), their sums in float32.
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
from torch.nn.functional import linear

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


MOST_SERVED_RANK = 512
"""Of vLLM."""


def served_elsewhere(config: Any) -> bool:
    """Whether an inference server (vLLM, SGLang) answers as this set does: plain LoRA on a causal model, of one rank
    and one alpha, without biases. They read over what they do not know.
    """
    plain = is_plain_lora(config) and config.bias == "none" and not config.lora_bias
    plain = plain and config.task_type != "SEQ_2_SEQ_LM"
    return plain and not (config.rank_pattern or config.alpha_pattern) and config.r <= MOST_SERVED_RANK


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


_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SIDE_BY_SIDE = 4
"""Sets of a batch up to which prompts are multiplied with all of them."""


class _Layer:
    """A linear layer of the base model with the updates of all sets, and those of the batch at work."""

    def __init__(self, module: torch.nn.Module, base: Callable[..., Tensor]) -> None:
        self.module, self.base = module, base
        self.updates: MutableMapping[str, LowRank] = {}
        self._sets: tuple[str, ...] | None = None
        self._names: Sequence[str] = ()
        self._a = self._b = torch.empty(0)  # of the sets side by side [K r, in], and scaled [out, K r]
        self._ranks: list[int] = []
        self._finite = True
        self._foreign: Tensor | None = (
            None  # [rows, K r] where a column is of another set than the row's; None: nowhere
        )
        self._bias: Tensor | None = None  # [rows, out], scaled
        self._rows: tuple[Tensor, Tensor] | None = None  # row by row: [rows, in, r], and scaled [rows, r, out]

    def prepare(self, names: Sequence[str]) -> None:
        """Lay out the updates of a batch's rows; those of the sets stay for the next batch with the same sets."""
        sets = tuple(name for name in dict.fromkeys(sorted(names)) if name in self.updates)
        if sets != self._sets:
            self._sets = None  # until all of it is there: memory may run out in between
            there = [self.updates[name] for name in sets]
            with torch.inference_mode(False), torch.no_grad():
                if there:
                    dtype = self._dtype(there[0].a.dtype)
                    self._a = torch.cat([each.a.to(dtype) for each in there])
                    self._b = torch.cat([(each.b * each.scaling).to(dtype) for each in there], 1)
                    self._finite = math.isfinite(self._a.sum()) and math.isfinite(self._b.sum())
            self._ranks, self._sets = [len(each.a) for each in there], sets
        self._names, self._foreign, self._bias, self._rows = names, None, None, None
        if not sets:
            return
        if len(set(names)) > 1:
            place = {name: k for k, name in enumerate(sets)}
            of_row = torch.tensor([place.get(name, len(sets)) for name in names], device=self._a.device)
            of_column = torch.repeat_interleave(torch.tensor(self._ranks)).to(self._a.device)
            self._foreign = of_row[:, None] != of_column
        if any(self.updates[name].bias is not None for name in sets):
            none = self._b.new_zeros(len(self._b))
            biases = {name: none if (of := self.updates[name]).bias is None else of.bias * of.scaling for name in sets}
            of_rows = names if self._foreign is not None else names[:1]
            self._bias = torch.stack([biases.get(name, none) for name in of_rows])

    def forget(self) -> None:
        """Of the batch, not of its sets."""
        self._foreign = self._bias = self._rows = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with each row's update."""
        y = self.base(x, *args, **kwargs)
        if not self._sets:
            return y
        foreign, bias = self._foreign, self._bias
        if foreign is None:
            y = _add(y, linear(x.to(self._a.dtype), self._a), self._b)
            return y if bias is None else y.add_(bias[0])
        if x.dim() < 2 or len(x) != len(foreign):
            raise RowsLostError
        rows = x.to(self._a.dtype).reshape(len(foreign), -1, x.shape[-1])
        if self._finite and (rows.shape[1] == 1 or len(self._sets) <= _SIDE_BY_SIDE):
            y = _add(y, linear(rows, self._a).masked_fill_(foreign[:, None], 0), self._b)
        else:
            a, b = self._rows = self._rows or self._row_by_row()
            y.add_(torch.bmm(torch.bmm(rows, a), b).view(y.shape))
        return y if bias is None else y.view(len(foreign), -1, y.shape[-1]).add_(bias[:, None]).view(y.shape)

    def _dtype(self, of_sets: torch.dtype) -> torch.dtype:
        """That of the base layer, unless it is quantised."""
        weight = getattr(getattr(self.module, "base_layer", self.module), "weight", None)
        return weight.dtype if weight is not None and weight.dtype in _COMPUTED else of_sets

    def _row_by_row(self) -> tuple[Tensor, Tensor]:
        """Smaller ranks are filled up with zeros."""
        found = [self.updates.get(name) for name in self._names]
        a = self._a.new_zeros(len(found), max(self._ranks), self._a.shape[1])
        b = self._a.new_zeros(len(found), max(self._ranks), len(self._b))
        for row, update in enumerate(found):
            if update is not None:
                # A row's [r, in] is copied in one piece; turned over, it is the layout that the product reads.
                a[row, : len(update.a)] = update.a
                torch.mul(update.b.T, update.scaling, out=b[row, : len(update.a)])
        return a.transpose(1, 2), b


def _add(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """``y += low b^T``, in one product where the dtypes allow; ``low`` [..., K r], ``b`` [out, K r]."""
    if y.dtype == b.dtype and y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), b.T)
        return y
    return y.add_(linear(low, b).view(y.shape))


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
        if isinstance(module, torch.nn.Linear):  # a quantised weight is packed
            out, into = module.out_features, module.in_features
        else:  # transformers' Conv1D (GPT-2) keeps its weight the other way round
            into, out = module.weight.shape
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
                layer.forget()
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
