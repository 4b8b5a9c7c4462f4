"""From an :class:`~cit_fast.data.example.Example` to token ids.

Training and generation see the same prompt tokens: the prompt is rendered up to the start of the assistant's
turn and tokenised alone, and a training example is that prompt followed by the tokens of the answer and the
token that ends the assistant's turn. Labels are -100 everywhere else.

With a chat template (:mod:`cit_fast.models.chat_template`), the user's turn is the instruction, a blank line and the
input. Without one, the text is the instruction, the input and the answer, with a blank line after each of the first
two.
"""

from __future__ import annotations

import bisect
import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from cit_fast.data.example import Example
from cit_fast.errors import ConfigError, DataError
from cit_fast.models.chat_template import ChatTemplate, Turns, asks_for_date
from cit_fast.models.encoder_decoder import around_text
from cit_fast.models.image_places import from_turn, least_input, with_places, without_images
from cit_fast.models.image_reader import ImageReader, Pictures, Prompt, pictures_of
from cit_fast.models.wrappers import learned_positions

IGNORED = -100
Overflow = Literal["truncate", "skip", "error"]

_Tokens = tuple[list[int], list[int]]  # input ids, labels
_Encode = Callable[[Turns, Example], _Tokens]


class ExampleTooLongError(DataError):
    """An example cannot be brought to the length limit without losing part of its instruction or answer."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training example as tokens.

    Args:
        input_ids: token ids of prompt and response, length T.
        labels: length T; the token id where the loss counts, else -100.
        prompt_length: tokens before the (last) response.
        truncated: whether the input was shortened to fit the length limit.
        pictures: the prompt's images, where the model takes some.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    truncated: bool = False
    pictures: Pictures | None = None

    def __len__(self) -> int:
        """T."""
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class EncodedExamples:
    """The result of :meth:`PromptEncoder.encode_all`.

    Args:
        encoded: the examples that fit, in order.
        indices: position of each of them among the examples given, ascending.
        truncated: how many of them had their input shortened.
        skipped: sources of the examples left out because they cannot fit.
    """

    encoded: list[Encoded]
    indices: list[int]
    truncated: int
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """The result of :meth:`PromptEncoder.encode_prompts`; fields as in :class:`EncodedExamples`."""

    prompts: list[list[int]]
    indices: list[int]
    truncated: int
    skipped: tuple[str, ...]


class PromptEncoder:
    """Turns examples into token ids for one tokenizer.

    An example over ``max_length`` has the end of its input cut off (of a conversation: its earliest turns),
    so that the system prompt, the instruction and the whole response stay. The result says so in
    ``truncated``.

    Args:
        tokenizer: a transformers tokenizer with an EOS token.
        max_length: limit in tokens of prompt and response together, or ``None`` for no limit.
        system_prompt: the system turn of examples that bring none. ``None`` leaves it to the chat template,
            which may insert a text of its own; ``""`` is an empty system turn, which keeps such a text out.
        on_overflow: for an example that does not fit even with its input cut off entirely: ``"truncate"``
            raises, ``"skip"`` leaves it out and counts it. ``"error"`` raises for any example over the limit.
        template_options: further variables of the chat template, e.g. ``{"enable_thinking": False}``.
        date: what a chat template takes for today where it writes the date; ``None``: the day on which this is made.
        images: of a model that takes images; without it, those of the examples are passed over.
        closes: prompts end as the tokenizer ends a text; for an encoder, which reads them alone.

    Raises:
        ConfigError: a tokenizer without EOS token, a chat template that takes no system turn though one is
            asked for or that leaves the question out, a limit below 1, or an unknown ``on_overflow``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = 1024,
        system_prompt: str | None = None,
        on_overflow: Overflow = "truncate",
        template_options: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
        images: ImageReader | None = None,
        closes: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so an answer could not end; "
                "set tokenizer.eos_token"
            )
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length must be at least 1 token, not {max_length}")
        if on_overflow not in get_args(Overflow):
            raise ConfigError(f"on_overflow must be one of {', '.join(get_args(Overflow))}, not {on_overflow!r}")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.system_prompt = system_prompt
        self.on_overflow = on_overflow
        self.template_options = dict(template_options or {})
        self.date = date or datetime.date.today()
        self._template: ChatTemplate | None = None
        if tokenizer.chat_template:
            self._template = ChatTemplate(tokenizer, self._system(), self.template_options, self.date)
        self.images = images
        self._image_parts = images is not None and self._template is not None and self._template.writes(images.token)
        self.closes = closes
        self._before, self._after = around_text(tokenizer, closes)
        self._vocabulary: int | None = None  # of the model, once it is known
        self.end_of_turn_id = int(tokenizer.eos_token_id if self._template is None else self._template.end_of_turn_id)

    def with_limit(self, max_length: int | None, on_overflow: Overflow) -> PromptEncoder:
        """The same encoder with another limit."""
        found = PromptEncoder(
            self.tokenizer,
            max_length=max_length,
            system_prompt=self.system_prompt,
            on_overflow=on_overflow,
            template_options=self.template_options,
            date=self.date,
            images=self.images,
            closes=self.closes,
        )
        found._vocabulary = self._vocabulary
        return found

    @property
    def writes_date(self) -> bool:
        """Whether the prompts have a date in them."""
        return bool(self.tokenizer.chat_template) and asks_for_date(str(self.tokenizer.get_chat_template()))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens at which generation must stop: what ends the assistant's turn, and EOS."""
        return tuple(dict.fromkeys((self.end_of_turn_id, self.tokenizer.eos_token_id)))

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding token, or EOS where it has none."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        beyond = pad is not None and self._vocabulary is not None and pad >= self._vocabulary
        return int(eos if pad is None or beyond else pad)

    def fit_to(self, model: Any) -> None:
        """Check that the model's embeddings and positions cover the tokens; from then on others are an error.

        A padding token that was added to the tokenizer and not to the model is replaced by EOS: padding is masked.

        Args:
            model: a causal language model of transformers, in wrappers or not.

        Raises:
            ConfigError: the model has fewer (learned) positions than ``max_length``.
        """
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        positions = learned_positions(model)
        if positions is not None and (self.max_length is None or self.max_length > positions):
            raise ConfigError(f"data.max_length: {self.max_length} tokens, but the model has {positions} positions")

    def prompt(self, example: Example, *, reserve: int = 0, masked: bool = False) -> list[int]:
        """Token ids up to the start of the answer, for generation.

        Args:
            example: what to ask.
            reserve: tokens of ``max_length`` to leave free for the answer.
            masked: ask with the key parts replaced by ``[MASK]``.

        Raises:
            ExampleTooLongError: the instruction does not fit (whatever ``on_overflow`` says).
        """
        return self._prompt(example, reserve, masked)[0]

    def text_of(self, prompt: Sequence[int]) -> str:
        """A prompt's text; where an image stands in it, what the chat template writes for one."""
        pictures = pictures_of(prompt)
        return str(self.tokenizer.decode(prompt)) if pictures is None else pictures.text

    def user_turn(self) -> tuple[list[int], int] | None:
        """Token ids up to where a user speaks, and the special token that ends what is said; ``None`` without a chat
        template that has one.
        """
        if self._template is None:
            return None
        before, after = self._template.user_turn(self._system())
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        end = next((token for token in self._tokenize(after) if token in special), None)
        return None if end is None or not before else (self._tokenize(before), end)

    def example(self, example: Example, *, masked: bool = False) -> Encoded:
        """Prompt and response with labels on the response only.

        For a conversation the response is every token that the chat template's own ``{% generation %}`` marks,
        where it has them, else the last turn.

        Args:
            example: what to learn; its first reference is the response.
            masked: with the key parts replaced by ``[MASK]``; the response tokens are the same.

        Raises:
            ExampleTooLongError: instruction and response do not fit (whatever ``on_overflow`` says).
            DataError: the chat template refuses the conversation.
        """
        (ids, labels), fitted = self._fitted(example, self._trained(example), self.max_length, masked)
        pictures = getattr(ids, "pictures", None)
        return Encoded(list(ids), labels, _start_of_last_run(labels), fitted is not example, pictures)

    def answer(self, example: Example, text: str) -> list[int]:
        """Token ids of an answer to the example's prompt and of its end, as training would have it learned."""
        example = replace(without_images(example), references=(text,))
        return self._split(self._turns(example, False), example)[1]

    def pair(self, example: Example) -> tuple[Encoded, Encoded]:
        """:meth:`example` full and masked; where the input must be shortened, it is the same in both.

        Raises:
            ExampleTooLongError, DataError: as :meth:`example`.
        """
        fitted = example
        for masked in (False, True):
            _, fitted = self._fitted(fitted, self._trained(example), self.max_length, masked)
        full, masked_one = self.example(fitted), self.example(fitted, masked=True)
        if fitted is example:
            return full, masked_one
        return replace(full, truncated=True), replace(masked_one, truncated=True)

    def encode_all(self, examples: Iterable[Example], *, masked: bool = False) -> EncodedExamples:
        """:meth:`example` for many, with counts.

        Raises:
            ExampleTooLongError: an example cannot fit and ``on_overflow`` is not ``"skip"``.
        """
        encoded, indices, skipped = self._each(examples, lambda one: self.example(one, masked=masked))
        return EncodedExamples(encoded, indices, sum(one.truncated for one in encoded), skipped)

    def encode_pairs(self, examples: Iterable[Example]) -> tuple[EncodedExamples, EncodedExamples]:
        """:meth:`pair` for many: full and masked, aligned, with the same counts.

        Raises:
            ExampleTooLongError: an example cannot fit and ``on_overflow`` is not ``"skip"``.
        """
        pairs, indices, skipped = self._each(examples, self.pair)
        truncated = sum(full.truncated for full, _ in pairs)
        full = EncodedExamples([full for full, _ in pairs], indices, truncated, skipped)
        return full, replace(full, encoded=[masked for _, masked in pairs])

    def encode_prompts(self, examples: Iterable[Example], *, reserve: int = 0) -> EncodedPrompts:
        """:meth:`prompt` for many, with counts.

        Raises:
            ExampleTooLongError: an instruction cannot fit and ``on_overflow`` is not ``"skip"``.
        """
        found, indices, skipped = self._each(examples, lambda one: self._prompt(one, reserve, False))
        prompts = [ids for ids, _ in found]
        return EncodedPrompts(prompts, indices, sum(truncated for _, truncated in found), skipped)

    # ---------------------------------------------------------------------------------------------- to tokens

    def _prompt(self, example: Example, reserve: int, masked: bool) -> tuple[list[int], bool]:
        limit = None if self.max_length is None else self.max_length - reserve
        (ids, _), fitted = self._fitted(example, lambda turns, one: (self._split(turns, one)[0], []), limit, masked)
        return ids, fitted is not example

    def _trained(self, example: Example) -> _Encode:
        """How the turns before the example's answer become the tokens and labels to train on."""
        pictured = self.images is not None and example.images  # whose tokens the template does not know
        apart = pictured or self.closes  # the answer alone is the decoder's
        if example.messages and self._template is not None and self._template.marks_assistant and not apart:
            answer = {"role": "assistant", "content": example.references[0]}
            return lambda turns, one: self._marked([*turns, answer], one)

        def encode(turns: Turns, one: Example) -> _Tokens:
            prompt, response = self._split(turns, one)
            ids = prompt + response
            pictures = getattr(prompt, "pictures", None)
            return ids if pictures is None else Prompt(ids, pictures), [IGNORED] * len(prompt) + response

        return encode

    def _split(self, turns: Turns, example: Example) -> tuple[list[int], list[int]]:
        """The turns and the start of the assistant's as tokens, and the answer with its end."""
        answer = example.references[0]
        if self._template is not None:
            prompt, said = self._template.split(turns, answer, _where(example))
            opened, lead = self._prompt_tokens(prompt, example), self._template.lead
            plain = said == lead + answer  # and not what the template makes of it
            if (
                lead
                and (whole := self._prompt_tokens(prompt + said, example))[: len(opened)] == opened
                and not self._has_special(answer)
            ):
                return opened, [*whole[len(opened) :], self.end_of_turn_id]
            return opened, [*self._tokenize(said, plain=plain), self.end_of_turn_id]
        text = "".join(turn["content"] + "\n\n" for turn in turns if turn["content"])
        opened = self._prompt_tokens(text, example, self._before)
        return opened, [*self._tokenize(answer, plain=True), self.end_of_turn_id]

    def _prompt_tokens(self, text: str, example: Example, before: Sequence[int] = ()) -> list[int]:
        """A prompt's text as tokens, some before it; for a model that takes images a :class:`Prompt`."""
        if self.images is None:
            return [*before, *self._tokenize(text), *self._after]
        return self.images.prompt(text, example.images, _where(example), before, self._tokenize)

    def _marked(self, turns: Turns, example: Example) -> _Tokens:
        """A whole conversation, labelled where the chat template says that the assistant speaks."""
        assert self._template is not None  # noqa: S101  # where there is none, nothing is marked
        ids, mask = self._template.marked(turns, _where(example))
        if not any(mask):
            raise DataError(f"{_where(example)}: the chat template marks no token as the assistant's")
        # The end of a turn is learned also where the template marks what is said alone.
        for k in range(1, len(ids)):
            if ids[k] == self.end_of_turn_id and mask[k - 1]:
                mask[k] = 1
        end = len(mask) - mask[::-1].index(1)  # nothing after the last response is learned or attended to
        labels = [token if own else IGNORED for token, own in zip(ids[:end], mask[:end], strict=True)]
        if self.end_of_turn_id not in labels[_start_of_last_run(labels) :]:
            ids, labels, end = [*ids[:end], self.end_of_turn_id], [*labels, self.end_of_turn_id], end + 1
        # The header before the last answer is the prompt's, as in generation, whatever the template marks.
        opened = self._split(turns[:-1], example)[0]
        if ids[: len(opened)] == opened:
            start = _start_of_last_run(labels)
            labels[start : len(opened)] = [IGNORED] * (len(opened) - start)
        return ids[:end], labels

    def _tokenize(self, text: str, *, plain: bool = False) -> list[int]:
        """Token ids; of ``plain`` text the name of a special token is text like any other."""
        options = {"split_special_tokens": True} if plain and self._has_special(text) else {}
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])

    def _has_special(self, text: str) -> bool:
        return any(token in text for token in self.tokenizer.all_special_tokens)

    # ----------------------------------------------------------------------------------------------- to turns

    def _system(self) -> Turns:
        return [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]

    def _turns(self, example: Example, masked: bool) -> Turns:
        """The turns before the answer."""
        instruction = example.masked_instruction if masked else example.instruction
        if not example.messages:
            content = f"{instruction}\n\n{example.input}" if example.input.strip() else instruction
            return self._placed([*self._system(), {"role": "user", "content": content}], example)
        turns = [{"role": role, "content": content} for role, content in example.messages[:-1]]
        if masked and example.key_parts:
            users = [turn for turn in turns if turn["role"] == "user"]
            if not users or example.instruction not in users[-1]["content"]:
                raise DataError(f"{_where(example)}: the instruction with the key parts is not in the last user turn")
            content = users[-1]["content"]
            users[-1]["content"] = content.replace(example.instruction, instruction, 1)
        if not turns or turns[0]["role"] != "system":
            turns = [*self._system(), *turns]
        return self._placed(turns, example)

    def _placed(self, turns: Turns, example: Example) -> Turns:
        """The turns with places for the images that the model is to see."""
        if self.images is None or not example.images:
            return turns
        return with_places(turns, len(example.images), self._image_parts, self.images.token, _where(example))

    # ------------------------------------------------------------------------------------------- to the limit

    def _fitted(self, example: Example, encode: _Encode, limit: int | None, masked: bool) -> tuple[_Tokens, Example]:
        """The example's tokens, and the example itself: another one if it had to be shortened."""
        whole = encode(self._turns(example, masked), example)
        length = len(whole[0])
        outside = max(whole[0], default=0)
        if self._vocabulary is not None and outside >= self._vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(outside)
            raise DataError(
                f"{_where(example)}: token {token!r} ({outside}) is not among the model's {self._vocabulary}; the "
                "tokenizer is that of another model, or the model's embeddings were not resized"
            )
        if limit is None or length <= limit:
            return whole, example
        if self.on_overflow != "error":
            shorten = self._drop_turns if example.messages else self._cut_input
            shorter = shorten(example, lambda one: encode(self._turns(one, masked), one), limit, length)
            if shorter is not None:
                return shorter
        raise ExampleTooLongError(
            f"{_where(example)}: {length} tokens, {limit} allowed"
            + ("" if self.on_overflow == "error" else ", and without its input it is still too long")
            + "; raise max_length"
            + (" or choose on_overflow: skip" if self.on_overflow == "truncate" else "")
        )

    @staticmethod
    def _cut_input(
        example: Example, encode: Callable[[Example], _Tokens], limit: int, length: int
    ) -> tuple[_Tokens, Example] | None:
        """The longest start of the input that fits, to within a token; ``None`` if even none is too much."""
        low, high, high_length = least_input(example), len(example.input), length
        fitted = replace(example, input=example.input[:low])
        best = encode(fitted)
        if len(best[0]) > limit:
            return None
        step = 0
        while high - low > 1 and limit - len(best[0]) > 1:
            # Tokens grow about evenly with characters: interpolate. Halve now and then, should they not.
            step += 1
            share = 0.5 if step % 3 == 0 else (limit - len(best[0])) / (high_length - len(best[0]))
            middle = min(max(low + int((high - low) * share), low + 1), high - 1)
            candidate = replace(example, input=example.input[:middle])
            tokens = encode(candidate)
            if len(tokens[0]) <= limit:
                low, best, fitted = middle, tokens, candidate
            else:
                high, high_length = middle, len(tokens[0])
        return best, fitted

    @staticmethod
    def _drop_turns(
        example: Example, encode: Callable[[Example], _Tokens], limit: int, _length: int
    ) -> tuple[_Tokens, Example] | None:
        """The conversation from the earliest user turn from which it fits; the system turn stays."""
        turns = example.messages
        system = turns[: turns[0][0] == "system"]
        starts = [start for start in range(len(system) + 1, len(turns)) if turns[start][0] == "user"]

        def later(start: int) -> Example:
            return from_turn(example, start, system)

        # The later the start, the fewer tokens: a conversation of n turns is rendered log n times.
        first = bisect.bisect_left(starts, True, key=lambda start: len(encode(later(start))[0]) <= limit)
        return (encode(later(starts[first])), later(starts[first])) if first < len(starts) else None

    def _each(
        self, examples: Iterable[Example], encode: Callable[[Example], Any]
    ) -> tuple[list[Any], list[int], tuple[str, ...]]:
        found, indices, skipped = [], [], []
        for index, example in enumerate(examples):
            one = self._unless_skipped(encode, example)
            if one is None:
                skipped.append(_where(example))
            else:
                found.append(one)
                indices.append(index)
        return found, indices, tuple(skipped)

    def _unless_skipped(self, encode: Callable[[Example], Any], example: Example) -> Any:
        try:
            return encode(example)
        except ExampleTooLongError:
            if self.on_overflow == "skip":
                return None
            raise


def _start_of_last_run(labels: list[int]) -> int:
    """Where the last unbroken run of labelled tokens, which ends the sequence, begins."""
    start = len(labels)
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    return start


def _where(example: Example) -> str:
    return example.source or f"an example of task {example.task!r}"
