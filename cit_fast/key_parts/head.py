"""The output projection of a language model as tensors and numbers, for the ops that take hidden states."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cit_fast.errors import ConfigError
from cit_fast.models.encoder_decoder import few_tokens
from cit_fast.models.forward import evaluating
from cit_fast.models.wrappers import unwrap

# What the configurations of transformers call the cap and the factor of the logits.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
_FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
_DIVISORS = ("logits_scaling",)  # Granite
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


ROWS = 256
"""Hidden states whose logits are made at a time, where they are made: 50 MB of a vocabulary of 49,000."""


class Head(NamedTuple):
    """``logits = cap(scale * (hidden @ weight.T + bias))``, ``cap(z) = softcap * tanh(z / softcap)`` or z itself."""

    weight: Tensor
    """[V, d], the live parameter: gradients flow into it where it is trained. All its rows are in the vocabulary, those
    beyond the tokenizer's too, as in the model's own softmax."""
    bias: Tensor | None
    """[V] or None."""
    softcap: float | None
    """Positive, or None."""
    scale: float
    """Finite."""
    vocabulary: int
    """V."""

    @property
    def options(self) -> dict[str, Any]:
        """``softcap`` and ``scale`` as keyword arguments of the ops in :mod:`cit_fast.ops`."""
        return {"softcap": self.softcap, "scale": self.scale}

    def beside(self, hidden: Tensor) -> Head:
        """This head in the dtype of hidden states [T, d] that autocast has rounded; else as it is.

        So weights in float32 are multiplied as the model's own projection does it, many times faster than in float32.
        """
        if self.weight.dtype != torch.float32 or hidden.dtype not in (torch.bfloat16, torch.float16):
            return self
        return self._replace(weight=self.weight.to(hidden.dtype))

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """[T, V] float32, in nats, of the next token after hidden states [T, d]; for few T, as it makes all logits."""
        logits = (hidden @ self.weight.T).float()
        if self.bias is not None:
            logits = logits + self.bias.float()
        logits = self.scale * logits
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.log_softmax(1)

    def target_log_probabilities(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[T] float32, in nats, of the tokens ``targets`` [T] after hidden states [T, d]; any T."""
        blocks = zip(torch.split(hidden, ROWS), torch.split(targets, ROWS), strict=True)
        return torch.cat([self.log_probabilities(rows).gather(1, own[:, None])[:, 0] for rows, own in blocks])


_checked: weakref.WeakKeyDictionary[nn.Module, tuple[float | None, float]] = weakref.WeakKeyDictionary()


def head_of(model: nn.Module) -> Head:
    """The output projection of a causal language model, its cap and its scale included.

    The first call for a model runs it on a few tokens, to see that its logits are what the returned numbers say;
    weight and bias are taken anew at every call, because training wrappers may replace them.

    Args:
        model: a causal language model of transformers, in PEFT, DDP or other wrappers.

    Raises:
        ConfigError: no output projection, or logits that are computed in some other way.
    """
    base = unwrap(model)
    projection = _projection(base)
    weight, bias = _weight(projection), getattr(projection, "bias", None)
    if base not in _checked:
        softcap, scale = _cap_and_scale(base)
        _check(base, projection, Head(weight, bias, softcap, scale, weight.shape[0]))
        _checked[base] = softcap, scale
    return Head(weight, bias, *_checked[base], weight.shape[0])


def whole_head(model: nn.Module, width: int) -> Head | None:
    """:func:`head_of`, gathered where FSDP has its rows on several devices; ``None`` where ZeRO-3 has split it.

    Args:
        width: d of the hidden states.
    """
    head = head_of(model)
    if isinstance(head.weight, DTensor):
        bias = head.bias.full_tensor() if isinstance(head.bias, DTensor) else head.bias
        return head._replace(weight=head.weight.full_tensor(), bias=bias)
    return head if head.weight.dim() == 2 and head.weight.shape[1] == width else None


def _projection(base: nn.Module) -> Any:
    get = getattr(base, "get_output_embeddings", None)
    projection = None if get is None else get()
    if projection is None or not isinstance(getattr(projection, "weight", None), Tensor):
        raise ConfigError(
            f"{type(base).__name__}: no output projection with a weight; key-part information gain needs a causal "
            "language model of transformers (get_output_embeddings)"
        )
    return projection


def _weight(projection: Any) -> Tensor:
    """[V, d]: the projection's own, or what its adapters make of it.

    Whatever the kind of adapter, it is what the projection does to each unit vector, and gradients flow into it.
    Dropout of the adapter's input, which no weight can have, is left out.
    """
    weight: Tensor = projection.weight
    if not isinstance(projection, BaseTunerLayer) or projection.merged or projection.disable_adapters:
        return weight
    if isinstance(weight, DTensor):
        raise ConfigError(
            "adapter.target_modules: the output projection has an adapter and is split over the processes; this loss "
            "needs it whole: leave the output projection out, or use DDP"
        )
    units = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    with evaluating(projection):
        columns: Tensor = projection(units)
    bias = getattr(projection, "bias", None)
    return (columns if bias is None else columns - bias).T.contiguous()


def _cap_and_scale(base: nn.Module) -> tuple[float | None, float]:
    config: Any = getattr(base, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    config = config if get_text_config is None else get_text_config()

    def first(names: tuple[str, ...]) -> float | None:
        return next((float(v) for name in names if (v := getattr(config, name, None)) is not None), None)

    factor, divisor = first(_FACTORS), first(_DIVISORS)
    return first(_CAPS), (1.0 if factor is None else factor) / (1.0 if divisor is None else divisor)


@torch.no_grad()
def _check(base: nn.Module, projection: nn.Module, head: Head) -> None:
    """Compare the model's own logits of a few tokens with those that ``head`` describes."""
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = torch.arange(min(4, head.vocabulary), device=head.weight.device)[None]
    try:
        with evaluating(base):
            logits = base(**few_tokens(base, tokens), use_cache=False).logits
    finally:
        handle.remove()
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    expected = logits.new_tensor(float("nan"))
    if len(seen) == 1 and seen[0].shape[-1] == head.weight.shape[1]:
        # Quantised weights and other products that are no matrix of the hidden size fail here, too.
        z = seen[0].to(wide) @ head.weight.to(wide).T
        z = head.scale * (z if head.bias is None else z + head.bias.to(wide))
        expected = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    size = logits.abs().amax().clamp(min=1e-6)
    if expected.shape != logits.shape or not (
        (expected - logits).abs().amax() <= _TOLERANCE.get(head.weight.dtype, 3e-2) * size
    ):
        raise ConfigError(
            f"{type(base).__name__}: its logits are not cap(scale * (hidden @ weight.T + bias)) of its output "
            f"projection (tried softcap {head.softcap}, scale {head.scale:g}, of its configuration); key-part "
            "information gain cannot be computed from its hidden states"
        )
