"""Batched generation: the answers that are scored or trained, each prompt's by its own adapter set where asked."""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig

from cit_fast.errors import DataError, RunError
from cit_fast.models.adapter_bank import BASE, AdapterBank, RowsLostError
from cit_fast.models.encoder_decoder import decoder_start
from cit_fast.models.forward import evaluating, undisturbed, whole_rows
from cit_fast.models.fused_lora import adapters_cast_once
from cit_fast.models.growing_adapter import activate
from cit_fast.models.image_reader import picture_inputs, pictures_of, spoken
from cit_fast.models.parked_sets import bank_of, parked, set_names
from cit_fast.models.prefix_cache import (
    PASS,
    AtWork,
    BatchLimit,
    CacheLostError,
    PromptReader,
    batches_of_pieces,
    can_continue,
    for_trial,
    padded,
    same_logits,
    turns_by_length,
)
from cit_fast.models.running_batch import Chance, Row, RunningBatch, drawing, until_end


class Sampling(NamedTuple):
    """How tokens are drawn instead of the most likely one: each prompt with chance of its own, whatever its batch."""

    temperature: float
    """Divides the logits, > 0 and finite."""
    seeds: Sequence[int]
    """One for each prompt."""
    top_p: float = 1.0
    """From 0 to 1: only the likeliest tokens are drawn that have so much of the probability together."""


class Answer(NamedTuple):
    """What a model answered."""

    text: str
    """Without special tokens and without white space around it."""
    ended: bool
    """Whether an end token came; without one the answer is as long as answers may be."""
    tokens: int = 0
    """How many it has, without the end token."""
    ids: tuple[int, ...] = ()
    """Those tokens, where they are known."""


def generate(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[str]:
    """The texts of :func:`generate_answers`."""
    return [answer.text for answer in generate_answers(model, prompts, **options)]


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """An answer's text, without special tokens."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    eos_token_ids: int | Sequence[int],
    tokenizer: Any,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
    adapters: Sequence[str] | None = None,
    bank: AdapterBank | None = None,
    sampling: Sampling | None = None,
) -> list[Answer]:
    """Answer each prompt with the most likely token at every step, until an end token or ``max_new_tokens``.

    Where the model can, prompts are read apart and answered together (:mod:`cit_fast.models.prefix_cache`); else a
    batch is padded on the left. The longest go first: memory runs out at once or never. An answer depends on its prompt
    alone, not on the batch it is in, up to the rounding of the model's dtype. A model that does not skip padding
    (linear attention, state spaces), which is tried once, or whose positions depend on the length (LongRoPE, dynamic
    scaling), gets prompts of one length in a batch; one that mixes the rows of a batch up gets them one by one. The
    model's own generation defaults (sampling, penalties, lengths) play no part; they, and which modules are in training
    mode, are as before afterwards. No gradients are kept. Of several threads with one base model, one answers at a
    time.

    Args:
        model: a causal language model or an encoder-decoder of transformers, or a PEFT model around one.
        prompts: N token sequences, each of one token or more, template and all; those with images are
            :class:`~cit_fast.models.image_reader.Prompt`.
        pad_token_id: any token; padded places are masked. ``eos_token_ids``: the tokens that end an answer.
        tokenizer: turns the new tokens into text.
        max_new_tokens: tokens per answer, >= 1. ``batch_size``: prompts per batch, >= 1; ``batch_tokens``: and no more
            of them than have so many tokens, padding and the longest answers counted.
        progress: called after each batch with the number of prompts it answered.
        adapters: N names of adapter sets, prompt i is answered by ``adapters[i]``, ``BASE`` for the base
            model alone. Sets of plain LoRA are mixed in the same batch, others answer one after another.
            Without it, whichever set is active answers.
        bank: the sets, where ``model`` is a bare base model; those of a PEFT model are found in it.
        sampling: draws tokens from the model's distribution instead.

    Returns:
        N answers in the order of the prompts.

    Raises:
        DataError: a prompt without tokens, a size or temperature out of range, another number of sets or seeds than
            of prompts, or a set that the model does not have.
    """
    limit = BatchLimit(batch_size, batch_tokens, max_new_tokens)
    for name, size in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("batch_tokens", batch_tokens)):
        if size is not None and size < 1:
            raise DataError(f"generate: {name} is {size}; it must be at least 1")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"generate: prompt {index} has no tokens")
    end_tokens = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids)
    start = decoder_start(model)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        decoder_start_token_id=start,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=end_tokens,
        use_cache=True,
    )
    if adapters is not None and len(adapters) != len(prompts):
        raise DataError(f"generate: {len(adapters)} adapter sets for {len(prompts)} prompts")
    if sampling is not None and not (sampling.temperature > 0 and math.isfinite(sampling.temperature)):
        raise DataError(f"generate: the temperature is {sampling.temperature}; it must be positive and finite")
    if sampling is not None and not 0 <= sampling.top_p <= 1:
        raise DataError(f"generate: top_p is {sampling.top_p}; it must be from 0 to 1")
    if sampling is not None and len(sampling.seeds) != len(prompts):
        raise DataError(f"generate: {len(sampling.seeds)} seeds for {len(prompts)} prompts")
    answers = [Answer("", False)] * len(prompts)
    done: set[int] = set()

    def chance(index: int) -> Chance | None:
        """From its start: a batch may be tried twice."""
        return None if sampling is None else Chance(sampling.temperature, sampling.seeds[index], sampling.top_p)

    def answered(batch: Sequence[int], found: Sequence[tuple[Sequence[int], bool]]) -> None:
        for index, (tokens, ended) in zip(batch, found, strict=True):
            answers[index] = Answer(decoded(tokenizer, tokens).strip(), ended, len(tokens), tuple(tokens))
            done.add(index)
        if progress is not None:
            progress(len(batch))

    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    with generating(model, config):
        several = batch_size > 1 and len(prompts) > 1
        texts = [each for each in prompts if pictures_of(each) is None]
        together: _Together = "any"
        if several:
            together = _batched_together(model, texts[0] if texts else spoken(prompts[0]), pad_token_id)

        def answer_apart(indices: Sequence[int], reader: PromptReader, sets: Sequence[str] | None) -> None:
            for pieces in batches_of_pieces(prompts, indices, limit, sets):
                batch = [index for piece in pieces for index in piece.indices]
                rows = [Row(prompts[i], max_new_tokens, None if sets is None else sets[i], chance(i)) for i in batch]
                running = RunningBatch(reader, pad_token_id, end_tokens)
                running.join_read(rows, reader.read(prompts, pieces, 1 + max_new_tokens, sets))
                while running.rows:
                    running.step()
                answered(batch, [(row.tokens, row.ended) for row in rows])

        def answer(indices: Sequence[int], at_work: AtWork | None = None) -> None:
            sets = adapters if at_work is not None else None
            reader = PromptReader(model, at_work)
            texts = [index for index in indices if pictures_of(prompts[index]) is None]
            if several and texts and can_run_on(model, prompts[texts[0]], pad_token_id):
                with contextlib.suppress(CacheLostError):
                    answer_apart(texts, reader, sets)
                indices = [index for index in indices if index not in done]
            for batch in _batches(prompts, indices, limit, together):
                own, names = [prompts[i] for i in batch], None if sets is None else [sets[i] for i in batch]
                input_ids, mask = padded(own, pad_token_id, model.device, left=start is None)
                seen = picture_inputs(
                    [(each, getattr(each, "pictures", None)) for each in own], input_ids.shape[1], left=True
                )
                with reader.having(names):
                    output = model.generate(
                        input_ids=input_ids,
                        attention_mask=mask,
                        **{name: value.to(model.device) for name, value in seen.items()},
                        generation_config=config,
                        logits_processor=drawing([chance(i) for i in batch]),
                    )
                before = input_ids.shape[1] if start is None else 1
                answered(batch, [until_end(new, end_tokens) for new in output[:, before:].tolist()])

        if adapters is None:
            answer(longest_first)
        else:
            _answer_with_sets(model, bank, adapters, longest_first, answer, done.__contains__)
    return answers


def _batches(
    prompts: Sequence[Sequence[int]], indices: Sequence[int], limit: BatchLimit, together: _Together
) -> list[list[int]]:
    """Batches of the indices within the limit, whose prompts get shorter; the largest first."""
    if together == "any":
        cuts = _cuts([len(prompts[index]) for index in indices], limit)
        batches = [list(indices[start:stop]) for start, stop in cuts]
        return sorted(batches, key=lambda batch: -len(batch) * len(prompts[batch[0]]))
    found = []
    for longest, alike in itertools.groupby(indices, key=lambda index: len(prompts[index])):
        group, size = list(alike), limit.of(longest) if together == "equal" else 1
        found += [group[start : start + size] for start in range(0, len(group), size)]
    return found


_STEPS = 8
"""Tokens of an answer, a pass each; how many is not known before."""


def _cuts(widths: Sequence[int], limit: BatchLimit) -> list[tuple[int, int]]:
    """Where to cut descending widths into batches within the limit, each padded to its first, for the least work."""
    least, first = [0], [0]
    for stop in range(1, len(widths) + 1):
        work, start = min(
            (least[start] + (stop - start) * widths[start] + (1 + _STEPS) * PASS, start)
            for start in range(max(0, stop - limit.rows), stop)
            if stop - start <= limit.of(widths[start])
        )
        least.append(work)
        first.append(start)
    cuts, stop = [], len(widths)
    while stop:
        cuts.append((first[stop], stop))
        stop = first[stop]
    return cuts[::-1]


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
        config = for_trial(pad_token_id, decoder_start(base))
        with _only_defaults(model, config):
            alone, beside, padded = (_logits(model, start, *how, config) for how in ((1, 0), (2, 0), (1, _PADDING)))
        doubles, skips = (same_logits(base, alone, other) for other in (beside, padded))
        skips = skips and not turns_by_length(base)  # so few tokens are too short a text to show it
        _found[base] = "none" if not doubles else "any" if skips else "equal"
    return _found[base]


def _logits(model: Any, prompt: list[int], rows: int, padding: int, config: GenerationConfig) -> torch.Tensor:
    """[new tokens, vocabulary] of the last of some equal rows, padded before the prompt, for an encoder after it."""
    tokens, seen = [config.pad_token_id] * padding + prompt, [0] * padding + [1] * len(prompt)
    if decoder_start(model) is not None:
        tokens, seen = prompt + [config.pad_token_id] * padding, seen[::-1]
    input_ids = torch.tensor([tokens] * rows, device=model.device)
    attention_mask = torch.tensor([seen] * rows, device=model.device)
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
    return torch.stack([logits[-1] for logits in output.logits])


def _answer_with_sets(
    model: Any,
    bank: AdapterBank | None,
    sets: Sequence[str],
    indices: Sequence[int],
    answer: Callable[[Sequence[int], AtWork | None], None],
    done: Callable[[int], bool],
) -> None:
    """Call ``answer`` on the indices such that each of their rows has its set; ``done`` says which are answered."""
    known = bank.names if bank is not None else set_names(model)
    unknown = set(sets) - {*known, BASE}
    if unknown:
        raise DataError(f"generate: no adapter set {min(unknown)!r}; there are {', '.join(sorted(known)) or 'none'}")
    mixed = bank if bank is not None else bank_of(model)
    if mixed is not None:
        with contextlib.suppress(RowsLostError):  # e.g. experts, each given the tokens that are routed to it
            answer(indices, mixed.answering)
    left = [index for index in indices if not done(index)]
    for name in dict.fromkeys(sets[index] for index in left):
        with one_set(model, name, bank):
            answer([index for index in left if sets[index] == name], None)


@contextlib.contextmanager
def one_set(model: Any, name: str, bank: AdapterBank | None = None) -> Iterator[None]:
    """Activate adapter set ``name`` inside, for one thread at a time; afterwards restore the active set and every
    ``requires_grad``.

    Args:
        model: a PEFT model, with parked sets or without, or a base model whose sets are in ``bank``.
        name: of the set, :data:`BASE` for the base model alone.

    Raises:
        RunError: a parked set, and the one in the model is of another kind.
    """
    with undisturbed(model):
        if bank is None and name in parked(model).configs:
            bank = bank_of(model)
            if bank is None:
                raise RunError(f"adapter set {name!r} cannot answer while the set in the model is no plain LoRA")
        if bank is not None:
            with bank.answering([name]):
                yield
            return
        if not isinstance(model, PeftModel):  # BASE, which is all there is
            yield
            return
        before, trained = list(model.active_adapters), [each for each in model.parameters() if each.requires_grad]
        try:
            if name == BASE:
                with model.disable_adapter():
                    yield
            else:
                model.set_adapter(name)
                yield
        finally:
            activate(model, before, before)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Inside, the model generates as ``config`` says, without gradients, for one thread at a time; afterwards it is as
    it was.
    """
    cast = adapters_cast_once(model)
    only = _only_defaults(model, config)
    with undisturbed(model), evaluating(model), only, whole_rows(model), cast, torch.inference_mode():
        yield


def can_run_on(model: Any, prompt: Sequence[int], pad_token_id: int) -> bool:
    """Whether a :class:`RunningBatch` gives what the model gives; tried once per model, on the start of a prompt."""
    if decoder_start(model) is not None:  # it reads a prompt at once
        return False
    return _batched_together(model, prompt, pad_token_id) == "any" and can_continue(model, prompt, pad_token_id)


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
