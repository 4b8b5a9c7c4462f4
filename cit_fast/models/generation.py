"""Batched greedy generation: the answers that are scored, each prompt's by its own adapter set where asked."""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import DynamicCache, GenerationConfig

from cit_fast.errors import DataError
from cit_fast.models.adapter_bank import BASE, AdapterBank, RowsLostError
from cit_fast.models.forward import evaluating, whole_rows
from cit_fast.models.fused_lora import adapters_cast_once
from cit_fast.models.prefix_cache import (
    CACHE,
    Beginnings,
    batches_of_least_work,
    can_continue,
    for_trial,
    layout,
    padded,
    same_logits,
)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    eos_token_ids: int | Sequence[int],
    tokenizer: Any,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
    adapters: Sequence[str] | None = None,
    bank: AdapterBank | None = None,
) -> list[str]:
    """Answer each prompt with the most likely token at every step, until an end token or ``max_new_tokens``.

    Batches are cut for the least work, the largest first (so that memory runs out at once or never), and padded on the
    left. Where the model can, what several prompts of a batch begin with is read once. An answer depends on its prompt
    alone, not on the batch it is in, up to the rounding of the model's dtype. A model that does not skip padding
    (linear attention, state spaces), which is tried once, gets prompts of one length in a batch; one that mixes the
    rows of a batch up gets them one by one. The model's own generation defaults (sampling, penalties, lengths) play no
    part; they, and which modules are in training mode, are as before afterwards. No gradients are kept.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        prompts: N token sequences, each of one token or more, template and all.
        pad_token_id: any token; padded places are masked. ``eos_token_ids``: the tokens that end an answer.
        tokenizer: turns the new tokens into text; special tokens and white space around the answer are
            dropped.
        max_new_tokens: tokens per answer, >= 1. ``batch_size``: prompts per batch, >= 1.
        progress: called after each batch with the number of prompts it answered.
        adapters: N names of adapter sets, prompt i is answered by ``adapters[i]``, ``BASE`` for the base
            model alone. Sets of plain LoRA are mixed in the same batch, others answer one after another.
            Without it, whichever set is active answers.
        bank: the sets, where ``model`` is a bare base model; those of a PEFT model are found in it.

    Returns:
        N answers in the order of the prompts.

    Raises:
        DataError: a prompt without tokens, a size below 1, or a set that the model does not have.
    """
    for name, size in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if size < 1:
            raise DataError(f"generate: {name} is {size}; it must be at least 1")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"generate: prompt {index} has no tokens")
    end_tokens = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=end_tokens,
        use_cache=True,
    )
    if adapters is not None and len(adapters) != len(prompts):
        raise DataError(f"generate: {len(adapters)} adapter sets for {len(prompts)} prompts")
    answers = [""] * len(prompts)
    beginnings: dict[str | None, Beginnings] = {}

    def answer(batch: Sequence[int]) -> None:
        sets = {None if adapters is None else adapters[index] for index in batch}
        kept = None
        if continues and len(sets) == 1:
            name = sets.pop()
            kept = beginnings.get(name) or Beginnings(model)
            beginnings.clear()  # of one set at a time
            beginnings[name] = kept
        new_tokens = _new_tokens(model, [prompts[index] for index in batch], config, kept)
        for index, tokens in zip(batch, new_tokens, strict=True):
            end = next((k for k, token in enumerate(tokens) if token in end_tokens), len(tokens))
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers[index] = text.strip()
        if progress is not None:
            progress(len(batch))

    lengths = list(map(len, prompts))
    longest_first = sorted(range(len(prompts)), key=lambda index: -lengths[index])
    cast = adapters_cast_once(model)
    with evaluating(model), _only_defaults(model, config), whole_rows(model), cast, torch.inference_mode():
        together = "any" if batch_size == 1 or len(prompts) < 2 else _batched_together(model, prompts[0], pad_token_id)
        several = batch_size > 1 and len(prompts) > 1
        continues = several and together == "any" and can_continue(model, prompts[longest_first[0]], pad_token_id)
        share = continues and _worth_sharing(prompts, batch_size, adapters)

        def batches(indices: Sequence[int]) -> Iterable[Sequence[int]]:
            if together == "any":
                return batches_of_least_work(prompts, indices, batch_size, adapters if share else None, share)
            alike = itertools.groupby(indices, key=lambda index: lengths[index])
            size = batch_size if together == "equal" else 1
            return itertools.chain.from_iterable(_chunks(list(group), size) for _, group in alike)

        if adapters is None:
            for batch in batches(longest_first):
                answer(batch)
        else:
            _answer_with_sets(model, bank, adapters, longest_first, batches, answer)
    return answers


_Batches = Callable[[Sequence[int]], Iterable[Sequence[int]]]


def _chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


_Together = Literal["any", "equal", "none"]
_found: weakref.WeakKeyDictionary[torch.nn.Module, _Together] = weakref.WeakKeyDictionary()
_PADDING, _TRIED = 3, 16  # tokens


def _batched_together(model: Any, prompt: Sequence[int], pad_token_id: int) -> _Together:
    """Which prompts can be in one batch: any, those of equal length, or none.

    Tried once per model, on the start of a prompt: alone, beside itself, and with padding before it, each must give the
    same logits for some tokens.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base not in _found:
        start = list(prompt[:_TRIED])
        config = for_trial(pad_token_id)
        with _only_defaults(model, config):
            alone, beside, padded = (_logits(model, start, *how, config) for how in ((1, 0), (2, 0), (1, _PADDING)))
        doubles, skips = (same_logits(base, alone, other) for other in (beside, padded))
        _found[base] = "none" if not doubles else "any" if skips else "equal"
    return _found[base]


def _logits(model: Any, prompt: list[int], rows: int, padding: int, config: GenerationConfig) -> torch.Tensor:
    """[new tokens, vocabulary] of the last of some equal rows."""
    input_ids = torch.tensor([[config.pad_token_id] * padding + prompt] * rows, device=model.device)
    attention_mask = torch.tensor([[0] * padding + [1] * len(prompt)] * rows, device=model.device)
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
    return torch.stack([logits[-1] for logits in output.logits])


def _answer_with_sets(
    model: Any,
    bank: AdapterBank | None,
    sets: Sequence[str],
    indices: Sequence[int],
    batches: _Batches,
    answer: Callable[[Sequence[int]], None],
) -> None:
    """Call ``answer`` on batches of ``indices`` while each of their rows has its set."""
    known = bank.names if bank is not None else set(getattr(model, "peft_config", ()))
    unknown = set(sets) - {*known, BASE}
    if unknown:
        raise DataError(f"generate: no adapter set {min(unknown)!r}; there are {', '.join(sorted(known)) or 'none'}")
    mixed = bank if bank is not None else AdapterBank.of_model(model)
    done: set[int] = set()
    if mixed is not None:
        try:
            for batch in batches(indices):
                with mixed.answering([sets[index] for index in batch]):
                    answer(batch)
                done.update(batch)
        except RowsLostError:  # e.g. experts, each given the tokens that are routed to it
            pass
    left = [index for index in indices if index not in done]
    for name in dict.fromkeys(sets[index] for index in left):
        own = [index for index in left if sets[index] == name]
        with one_set(model, name, bank):
            for batch in batches(own):
                answer(batch)


@contextlib.contextmanager
def one_set(model: Any, name: str, bank: AdapterBank | None = None) -> Iterator[None]:
    """Activate adapter set ``name`` inside; afterwards restore the active set and every ``requires_grad``.

    Args:
        model: a PEFT model, or a base model whose sets are in ``bank``.
        name: of the set, :data:`BASE` for the base model alone.
    """
    if bank is not None:
        with bank.answering([name]):
            yield
        return
    if not isinstance(model, PeftModel):  # BASE, which is all there is
        yield
        return
    before, trained = model.active_adapter, [each for each in model.parameters() if each.requires_grad]
    try:
        if name == BASE:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(name)
            yield
    finally:
        model.set_adapter(before)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _worth_sharing(prompts: Sequence[Sequence[int]], size: int, adapters: Sequence[str] | None) -> bool:
    """Whether it is less work to read what prompts begin with once, which takes batches of one adapter set."""

    def total(kinds: Sequence[str] | None, share: bool) -> int:
        batches = batches_of_least_work(prompts, range(len(prompts)), size, kinds, share)
        return sum(layout([prompts[index] for index in batch], share).work for batch in batches)

    return total(adapters, True) < total(None, False)


_AT_A_TIME = 8
"""New tokens after which rows that have ended leave the batch."""


def _new_tokens(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, beginnings: Beginnings | None
) -> list[list[int]]:
    """Generated tokens ``[batch][at most max_new_tokens]``, without the prompts.

    Args:
        beginnings: of a model that continues from a cache, in a batch of one adapter set; what the prompts begin with
            is read once, and rows leave when they have ended.
    """
    found = layout(prompts, share=beginnings is not None)
    cache: DynamicCache | None = None
    if beginnings is not None:
        cache = beginnings.rows(prompts, found.groups, found.rest + config.max_new_tokens)
        if cache is None:
            found = layout(prompts, share=False)
    input_ids, attention_mask = padded(prompts, found, config.pad_token_id, model.device)
    if cache is None:
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
        return output[:, input_ids.shape[1] :].tolist()  # type: ignore[no-any-return]
    answers: list[list[int]] = [[] for _ in prompts]
    there = list(range(len(prompts)))
    ends = torch.tensor(config.eos_token_id, device=model.device)
    left = config.max_new_tokens
    while True:
        some = copy.copy(config)
        some.max_new_tokens = min(left, _AT_A_TIME)
        output = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=some, **{CACHE: cache}
        )
        new = output[:, input_ids.shape[1] :]
        for index, tokens in zip(there, new.tolist(), strict=True):
            answers[index] += tokens
        left -= new.shape[1]
        rows = (~torch.isin(new, ends).any(1)).nonzero()[:, 0]
        if not left or not len(rows):
            return answers
        there = [there[row] for row in rows.tolist()]
        input_ids = output[rows]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(new.shape)], 1)[rows]
        if len(rows) < len(new):
            for layer in cache.layers:
                layer.keep(rows)


@contextlib.contextmanager
def _only_defaults(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Hides the model's own generation configuration.

    transformers fills every value that a given configuration leaves open from the model's (so a checkpoint's
    repetition penalty would reach a greedy search), and PEFT copies the wrapper's onto the model inside.
    """
    holders = [model]
    if hasattr(model, "get_base_model"):
        holders.append(model.get_base_model())
    own = [(each, each.__dict__["generation_config"]) for each in holders if "generation_config" in vars(each)]
    for holder, _ in own:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, previous in own:
            holder.generation_config = previous
