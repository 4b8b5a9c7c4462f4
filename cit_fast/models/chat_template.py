"""A tokenizer's chat template: training texts and prompts are what it renders.

A template renders a conversation in two ways: whole, and up to where the assistant speaks (``add_generation_prompt``).
With most templates a whole conversation begins with the second text, and then that is the prompt. With others it does
not: the template writes a header or an empty thought before every answer, or opens a thought for the model to go on
with. There, the prompt is the whole rendering up to the answer, in training and in generation alike, so that nothing
but the answer and its end is learned. White space that a template writes before an answer and not where the assistant
begins to speak (``[/INST] answer``) is the answer's, which begins with it in the tokens that the model knows.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from cit_fast.errors import ConfigError, DataError
from cit_fast.text import first_line

Turns = list[dict[str, Any]]
"""Each with ``role`` and ``content``: a text, or a list of parts where an image stands in it."""

_ANSWER, _QUESTION = "Xyzzy42", "Plugh17"
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\b")
_DATE_FORMAT = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(['"])(.*?)\1""")
# A template that goes through the parts of a content loses a plain text: it is made a list of one part.
_TEXTS_AS_PARTS = (
    "{%- set as_parts = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set content = [{'type': 'text', 'text': message['content']}] if message['content'] is string "
    "else message['content'] -%}"
    "{%- set as_parts.messages = as_parts.messages + [dict(message, content=content)] -%}"
    "{%- endfor -%}{%- set messages = as_parts.messages -%}"
)


class ChatTemplate:
    """Renders turns for one tokenizer.

    A template that leaves plain texts out of its prompts, because it wants lists of parts, is completed in the
    tokenizer itself, so that whoever renders with that tokenizer sees the same text.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        system: the system turn of conversations that bring none; empty for none.
        options: further variables of the template, e.g. ``{"enable_thinking": False}``.
        date: what the template takes for today, where it asks; a run has one date, whenever it is resumed.

    Raises:
        ConfigError: the template refuses the system turn, fails, or leaves the question out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system: Turns, options: Mapping[str, Any], date: datetime.date
    ) -> None:
        self._tokenizer, self._options, self._date = tokenizer, dict(options), date
        self._source = _with_date(str(tokenizer.get_chat_template()), date)
        probe = [*system, {"role": "user", "content": _QUESTION}]
        answered = [*probe, {"role": "assistant", "content": _ANSWER}]
        try:
            if _QUESTION not in self._render(probe, add_generation_prompt=True):
                self._take_plain_texts(probe)
            opened, whole = self._render(probe, add_generation_prompt=True), self._render(answered)
        except DataError as error:
            raise ConfigError(f"system_prompt {system[0]['content']!r}: {error}" if system else f"{error}") from None
        before, found, _ = whole[len(opened) :].partition(_ANSWER) if whole.startswith(opened) else ("", "", "")
        self.lead = before if found and before.isspace() else ""
        """What stands between the prompt and every answer."""
        self._cuts = _ANSWER in whole and not whole.startswith(opened + self.lead + _ANSWER)
        self._tail = whole.rpartition(_ANSWER)[2] if _ANSWER in whole else ""
        self.end_of_turn_id = self._end_of_turn()
        self.marks_assistant = tokenizer.is_fast and bool(_GENERATION_TAG.search(self._source))

    def split(self, turns: Turns, answer: str, where: str) -> tuple[str, str]:
        """The prompt that ``turns`` make, and what is to follow it: :attr:`lead` and the answer, without its end.

        Args:
            turns: up to the question.
            answer: the assistant's; the prompt does not depend on it, unless it brings a thought of its own, which the
                template would otherwise have written.
            where: the example, for messages.

        Raises:
            DataError: the template refuses the conversation, or changes the answer.
        """
        opened = self._render(turns, where, add_generation_prompt=True)
        if not self._cuts:
            return opened, self.lead + answer
        before = self._whole(turns, _ANSWER, where).rpartition(_ANSWER)[0]
        whole = self._whole(turns, answer, where)
        if whole.startswith(before) and "".join(whole[len(before) :].split()).startswith("".join(answer.split())):
            return before, answer  # whose white space is ours, as with any other template
        if whole.startswith(opened) and self._tail and self._tail in whole[len(opened) :]:
            return opened, whole[len(opened) :].rpartition(self._tail)[0]
        raise DataError(
            f"{where}: the chat template does not render this answer as it is; set data.template_options, or give the "
            "tokenizer a template made for training"
        )

    def user_turn(self, system: Turns) -> tuple[str, str]:
        """What stands before a user's first words, and what follows them.

        Args:
            system: the turns before.
        """
        opened = self._render([*system, {"role": "user", "content": _QUESTION}], add_generation_prompt=True)
        before, _, after = opened.partition(_QUESTION)
        return before, after

    def writes(self, place: str) -> bool:
        """Whether the template writes the place of an image for a part of that type; else it takes texts alone."""
        parts = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
        try:
            text = self._render([{"role": "user", "content": parts}], add_generation_prompt=True)
        except DataError:
            return False
        return text.count(place) == 1 and _QUESTION in text

    def marked(self, turns: Turns, where: str) -> tuple[list[int], list[int]]:
        """A whole conversation as tokens, and 1 for each of them that the template says the assistant speaks."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        marked = self._apply(turns, where, **options)
        return list(marked["input_ids"]), list(marked["assistant_masks"])

    def _whole(self, turns: Turns, answer: str, where: str) -> str:
        return self._render([*turns, {"role": "assistant", "content": answer}], where)

    def _render(self, turns: Turns, where: str = "", **options: Any) -> str:
        return str(self._apply(turns, where, tokenize=False, **options))

    def _apply(self, turns: Turns, where: str, **options: Any) -> Any:
        place = f"{where}: " if where else ""
        try:
            return self._tokenizer.apply_chat_template(
                turns, chat_template=self._source, **{**self._options, **options}
            )
        except TemplateError as error:
            raise DataError(f"{place}the chat template refuses the conversation: {first_line(error)}") from None
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:  # an expression in it failed
            raise DataError(f"{place}the chat template fails: {type(error).__name__}: {first_line(error)}") from error

    def _take_plain_texts(self, probe: Turns) -> None:
        tokenizer, before = self._tokenizer, self._tokenizer.chat_template
        completed = _TEXTS_AS_PARTS + str(tokenizer.get_chat_template())
        tokenizer.chat_template = {**before, "default": completed} if isinstance(before, dict) else completed
        self._source = _with_date(completed, self._date)
        if _QUESTION not in self._render(probe, add_generation_prompt=True):
            tokenizer.chat_template = before
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path!r} leaves the question out of the prompt; give the "
                "tokenizer a template that renders what users say"
            )

    def _end_of_turn(self) -> int:
        """The token that ends an answer; not always EOS (Gemma: ``<end_of_turn>``)."""
        eos = int(self._tokenizer.eos_token_id)
        special = {token for token, added in self._tokenizer.added_tokens_decoder.items() if added.special} | {eos}
        after = self._tokenizer(self._tail, add_special_tokens=False)["input_ids"]
        return next((token for token in after if token in special), eos)


def asks_for_date(template: str) -> bool:
    """Whether a chat template writes today's date."""
    return "strftime_now" in template


def _with_date(template: str, date: datetime.date) -> str:
    """The template with ``date`` for today: its own function of that name, for the formats that it asks for.

    transformers takes no function from outside.
    """
    if not asks_for_date(template):
        return template
    today = datetime.datetime.combine(date, datetime.time())
    formats = sorted({found.group(2) for found in _DATE_FORMAT.finditer(template)})
    text = "{{- raise_exception('strftime_now: the format must be written out in the template') -}}"
    for form in formats:
        written = json.dumps(today.strftime(form))
        text = f"{{%- if format == {json.dumps(form)} -%}}{{{{ {written} }}}}{{%- else -%}}{text}{{%- endif -%}}"
    return f"{{%- macro strftime_now(format) -%}}{text}{{%- endmacro -%}}{template}"
