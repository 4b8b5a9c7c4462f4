"""Hidden states of the full and the masked context in one forward pass, with shared prefixes where the model can."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cit_fast.errors import ConfigError
from cit_fast.key_parts.pairs import EncodedPair, PairCollator
from cit_fast.models.collation import LENGTHS
from cit_fast.models.encoder_decoder import decoder_start
from cit_fast.models.forward import evaluating, hidden_rows, router_loss
from cit_fast.models.prompts import IGNORED, Encoded
from cit_fast.models.wrappers import learned_positions, sees_images, unwrap

_log = logging.getLogger(__name__)


class PairHidden(NamedTuple):
    """Final hidden states that predict the labelled tokens of E pairs: what goes into the output projection."""

    full: Tensor
    """[T, d], after the full instruction, in the model's dtype."""
    masked: Tensor
    """[T, d], the same tokens after the masked instruction."""
    targets: Tensor
    """[T] int64, the tokens."""
    offsets: Tensor
    """[E + 1] int64: pair e has tokens ``offsets[e]`` to ``offsets[e + 1]``."""
    scored: Tensor
    """[T] bool: the answer's own tokens, over which the information gain sums; of the others (end of turn, earlier
    turns of a conversation) only the cross-entropy knows. Every pair has at least one, and they are consecutive."""
    router_loss: Tensor | None = None
    """See :func:`cit_fast.models.forward.router_loss`; of both contexts together."""

    def only_scored(self) -> PairHidden:
        """The scored tokens alone, ``offsets`` counted anew: what ``token_gain`` and the alpha-weighted sum take."""
        kept = torch.cumsum(self.scored, 0)
        kept = torch.cat([kept.new_zeros(1), kept])
        at = self.scored.nonzero().squeeze(1)
        return self._replace(
            full=self.full[at],
            masked=self.masked[at],
            targets=self.targets[at],
            offsets=kept[self.offsets],
            scored=self.scored[at],
        )


_OURS = ("labels", "branch", "visible", "full_at", "masked_at", "offsets", "scored", "index")


def pair_hidden(model: nn.Module, batch: Mapping[str, Any]) -> PairHidden:
    """One forward pass of the model over a batch of :class:`PairCollator`, without logits.

    Args:
        model: the model as the trainer wraps it, or bare; not compiled.
        batch: on the model's device.

    Raises:
        ConfigError: a compiled model, or one that does not use its output projection once.
    """
    if hasattr(model, "_orig_mod"):
        raise ConfigError("torch_compile: pairs of full and masked instructions need the model uncompiled")
    places = torch.cat([batch["full_at"], batch["masked_at"]])
    hidden, output = hidden_rows(model, model_inputs(model, batch), places)
    full, masked = hidden.chunk(2)
    targets = batch["labels"].flatten()[batch["full_at"] + 1]
    return PairHidden(full, masked, targets, batch["offsets"], batch["scored"], router_loss(model, output))


def hidden_of(
    model: nn.Module, collate: Callable[[Sequence[EncodedPair]], Mapping[str, Any]], pairs: Sequence[EncodedPair]
) -> PairHidden:
    """:func:`pair_hidden` of some pairs, as ``collate`` makes a batch of them, on the model's device."""
    device = _device(model)
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate(pairs).items()}
    return pair_hidden(model, batch)


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model itself takes; of shared rows with their attention mask."""
    inputs = {name: value for name, value in batch.items() if name not in _OURS}
    if "branch" in batch:
        inputs["attention_mask"] = _shared_row_mask(model, batch["branch"], batch["visible"])
    return inputs


def _shared_row_mask(model: nn.Module, branch: Tensor, visible: Tensor) -> Tensor:
    """The attention mask [R, 1, S, S] of shared rows, built on the model's device from two numbers per position."""
    places = torch.arange(branch.shape[1], device=branch.device)
    earlier = places[None, :] <= places[:, None]
    own = branch[:, :, None] == branch[:, None, :]  # padding sees earlier padding: attention to nothing would be NaN
    allowed = (own & earlier | (places < visible[:, :, None])).unsqueeze(1)
    base: Any = unwrap(model)
    if base.config._attn_implementation == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=base.dtype, device=branch.device).masked_fill_(
        ~allowed, torch.finfo(base.dtype).min
    )


# ---------------------------------------------------------------------------------- which models can share prefixes

_can: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
# Of hidden states, relative to their size; where a mask is not honoured, or positions are not, errors are far larger.
_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3}


def pair_collator(
    model: nn.Module, pad_token_id: int, share_prefix: bool | Literal["auto"] = "auto", lengths: Sequence[int] = LENGTHS
) -> PairCollator:
    """The collator for a model: shared prefixes where it takes them, packed rows for flash attention, else padding.

    Args:
        model: a causal language model, in wrappers or not.
        pad_token_id, lengths: of :class:`PairCollator`.
        share_prefix: ``"auto"``: where the model takes it; True: or an error; False: never. Scoring, discovery and
            training then decide batch by batch whether it is less work
            (:class:`cit_fast.key_parts.layout.GroupingCollator`).

    Raises:
        ConfigError: ``share_prefix`` is True and the model does not take it.
    """
    flash = "flash" in str(unwrap(model).config._attn_implementation) and _device(model).type == "cuda"  # type: ignore[union-attr]
    start = decoder_start(model)
    packed = flash and start is None and not sees_images(unwrap(model).config)
    share = can_share_prefixes(model, share_prefix)
    positions = learned_positions(model)
    if positions is not None:  # padding must not go beyond them either
        lengths = [*(length for length in lengths if length < positions), positions]
    window = shortest_window(model)
    return PairCollator(pad_token_id, share, packed and not share, window, lengths=tuple(lengths), decoder_start=start)


def can_share_prefixes(model: nn.Module, share_prefix: bool | Literal["auto"]) -> bool:
    """Whether rows may share their beginnings, by the option ``share_prefix`` of :func:`pair_collator`.

    Raises:
        ConfigError: the option is True and the model does not take it.
    """
    share = honours_4d_mask(model) if share_prefix is not False else False
    if share_prefix is True and not share:
        raise ConfigError(
            f"share_prefix: {type(unwrap(model)).__name__} does not honour an attention mask of four dimensions; "
            "set it to 'auto' or false"
        )
    return share


@torch.no_grad()
def honours_4d_mask(model: nn.Module) -> bool:
    """Whether the model honours a 4-D attention mask, so that a shared row gives what separate rows give.

    Tried once per model on a dozen tokens: the hidden states of both contexts must equal those of separate passes, and
    a branch must not notice what stands in the other. Layers that are no attention (state spaces, linear attention),
    attention that makes its own mask (flash attention) and positions that are not read from ``position_ids`` all show.
    """
    base = unwrap(model)
    if sees_images(base.config):  # places of images have positions, and see each other, in ways of their own
        return False
    if decoder_start(base) is not None:  # the answers stand in other rows than the prompts
        return False
    if base not in _can:
        if "flash" in str(base.config._attn_implementation):  # type: ignore[union-attr]
            return False  # another implementation may be set later
        with evaluating(base):
            _can[base] = _try_shared_rows(base)
    return _can[base]


def _try_shared_rows(base: nn.Module) -> bool:
    vocabulary = base.get_input_embeddings().weight.shape[0]  # type: ignore[operator]

    def tokens(*numbers: int) -> list[int]:
        return [number % vocabulary for number in numbers]

    def pair(rest_full: list[int], rest_masked: list[int]) -> EncodedPair:
        prefix, answer = tokens(3, 14, 15, 92), tokens(31, 41)
        one, other = (
            Encoded([*prefix, *rest, *answer], [IGNORED] * (4 + len(rest)) + answer, 4 + len(rest))
            for rest in (rest_full, rest_masked)
        )
        return EncodedPair(one, other, 0, (one.prompt_length, one.prompt_length + 2))

    rest = tokens(65, 35, 89, 79)
    pairs = [pair(rest, tokens(32, 38)), pair(tokens(46, 26, 43, 38), tokens(32, 38))]
    device = _device(base)
    found = []
    for shared in (True, False):
        batch = PairCollator(0, shared)(pairs)
        try:
            found.append(pair_hidden(base, {name: value.to(device) for name, value in batch.items()}))
        except (RuntimeError, ValueError, TypeError) as error:
            if not shared:
                raise
            # A mask of four dimensions is more than this model can take: separate rows are right, only slower.
            _log.info("%s: no shared rows (%s: %s)", type(base).__name__, type(error).__name__, error)
            return False
    shared_one, apart = found
    dtype = apart.full.dtype
    size = apart.full.float().square().mean().sqrt()
    limit = _ROUNDING.get(dtype, 0.1) * size
    equal = all(
        bool((a.float() - b.float()).abs().amax() <= limit)
        for a, b in ((shared_one.full, apart.full), (shared_one.masked, apart.masked))
    )
    first, second = shared_one.masked.float().chunk(2)
    return equal and bool((first - second).abs().amax() <= min(_ROUNDING.get(dtype, 1e-3), 1e-3) * size)


def shortest_window(model: nn.Module) -> int | None:
    """The shortest sliding window, or chunk, of the model's attention layers in tokens; ``None`` without one."""
    config: Any = unwrap(model).config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
    sizes = [size for name in names if isinstance(size := getattr(config, name, None), int)]
    return min(sizes, default=None)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
