"""A tiny vision-language model of a real architecture (LLaVA), pretrained here in minutes, for the visual tasks.

It is for tests, for the quickstart on pictures and for comparing methods where no other model can be had: it sees the
drawings of the built-in visual tasks and nothing else. Pretraining has two parts. The vision tower first learns to tell
what lies in each cell of a picture; then all of the model learns to say it, in sentences
(``cit_fast.models.tiny_vision_texts``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from cit_fast.cache import cache_folder
from cit_fast.data.builtin.kinds import Draw
from cit_fast.data.builtin.visual import SIDES, plural
from cit_fast.data.builtin.visual_drawing import CELL, CELLS, COLOURS, SHAPES, SIDE, Mark, Picture
from cit_fast.files import new_folder
from cit_fast.models.config import TINY_VISION
from cit_fast.models.tiny_vision_texts import NUMBERS, Shown, drawn_conversation, vocabulary

VERSION = 1
"""Goes up with every change that makes other weights."""
STEPS = 1150
"""Of pretraining, beside those of the vision tower alone."""

_BATCH = 16
_SORTED = 8  # as many batches are drawn at a time and sorted by length, against padding
_SEEING_STEPS, _SEEING_BATCH = 350, 64
_SEEING_LR, _SAYING_LR, _WARM_UP = 2e-3, 2e-3, 100
_EASY = 2.0  # easy conversations have become none when this part of one has passed
_SHARPNESS = 1.4  # of the look-up that the first layer begins with
_IGNORED = -100  # a label that is none

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_vision_folder() -> Path:
    """The folder of the pretrained model in the cache; made on first use, which takes minutes."""
    folder = _place()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not (folder / "config.json").exists():
            print(f"Pretraining {TINY_VISION}, once: about six minutes on one core.", flush=True)  # noqa: T201
            tiny_vision_model(folder)
    return folder


def kept_tiny_vision() -> Path | None:
    """That folder, if the model has been made already."""
    return folder if ((folder := _place()) / "config.json").exists() else None


def _place() -> Path:
    return cache_folder() / "models" / f"{TINY_VISION.replace('/', '--')}-{VERSION}"


def tiny_vision_model(folder: Path, *, steps: int = STEPS, seed: int = 0) -> Path:
    """Pretrain the model and write it with its processor, whole or not at all.

    The same steps, seed, threads and machine give the same weights. The state of torch's generator is left as it was.

    Args:
        folder: where it appears; one that is there is replaced.
        steps: of pretraining on sentences, at least 1; the vision tower's own shrink with them.
        seed: of weights and pictures.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        processor = tiny_vision_processor()
        model = tiny_vision_untrained(processor.tokenizer)
        _learn_to_see(model, processor.tokenizer, min(_SEEING_STEPS, steps), seed)
        _learn_to_say(model, processor.tokenizer, steps, seed)
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    return folder


def tiny_vision_processor() -> LlavaProcessor:
    """The processor: its tokenizer and the one image processor of LLaVA that does without torchvision."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    half = [0.5, 0.5, 0.5]
    size = {"height": SIDE, "width": SIDE}
    images = LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size, image_mean=half, image_std=half)
    return LlavaProcessor(
        images, _tokenizer(), patch_size=CELL, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of the visual tasks, single digits, and bytes for all else."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[0-9]|[^A-Za-z0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{word}\n {word}" for word in vocabulary()]
    special = ["<pad>", "<s>", "</s>", "<image>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4096,  # more than there are: every word becomes one token
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
    )
    made.chat_template = _TEMPLATE
    return made


def tiny_vision_untrained(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The model with random weights."""
    text = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": SIDE, "patch_size": CELL, "projection_dim": 128,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=CELLS * CELLS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def _pixel_values(pictures: Sequence[Picture]) -> torch.Tensor:
    """``(N, 3, SIDE, SIDE)``, as the processor makes them."""
    painted = [picture.painted() for picture in pictures]
    numbers = torch.frombuffer(bytearray(b"".join(pixels for pixels, _ in painted)), dtype=torch.uint8)
    colours = torch.tensor([[*shades, *[(0, 0, 0)] * (16 - len(shades))] for _, shades in painted]).float()
    rows = numbers.view(len(painted), SIDE * SIDE).long() + 16 * torch.arange(len(painted))[:, None]
    images = (colours / 127.5 - 1.0).flatten(0, 1)[rows]
    return images.view(len(painted), SIDE, SIDE, 3).permute(0, 3, 1, 2).contiguous()


def _rate(step: int, steps: int) -> float:
    """A factor of the learning rate: up from nothing, then down along a cosine."""
    warm_up = min(_WARM_UP, steps // 10 + 1)
    return min(1.0, (step + 1) / warm_up) * (0.51 + 0.49 * math.cos(math.pi * step / steps))


def _optimizer(parameters: Iterable[torch.nn.Parameter], lr: float, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))


# What lies in a cell: nothing, a shape, a part of a bar, or a digit.
_THINGS = ("nothing", *SHAPES, "bar", *NUMBERS)
_HUES = ("nothing", *COLOURS)
_ASIDE = 0.7  # how much of a cell the word for its half of the picture is, beside the others


def _parts(mark: Mark) -> Iterator[tuple[int, list[int]]]:
    """The number of each cell that the mark covers a part of, and the first and last column and row of that part."""
    right, bottom = mark.left + mark.width, mark.top + mark.height
    for row in range(mark.top // CELL, (bottom - 1) // CELL + 1):
        for column in range(mark.left // CELL, (right - 1) // CELL + 1):
            x, y = column * CELL, row * CELL
            edges = [max(mark.left, x), max(mark.top, y), min(right, x + CELL) - 1, min(bottom, y + CELL) - 1]
            yield row * CELLS + column, edges


def _cell_labels(pictures: Sequence[Picture]) -> torch.Tensor:
    """``(N, cells, 11)``: thing, hue, half of the picture, tens and ones of the part's edges in hundredths."""
    labels = []
    for picture in pictures:
        rows = [[0, 0, *[_IGNORED] * 9]] * (CELLS * CELLS)
        for mark in picture.marks:
            thing = NUMBERS[int(mark.what)] if mark.what.isdigit() else mark.what
            for cell, edges in _parts(mark):
                digits = [digit for edge in edges for digit in divmod(edge * 100 // SIDE, 10)]
                half = cell % CELLS * len(SIDES) // CELLS
                rows[cell] = [_THINGS.index(thing), _HUES.index(mark.colour), half, *digits]
        labels.append(rows)
    return torch.tensor(labels)


def _learn_to_see(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> None:
    """Train the vision tower and the projector: what lies in a cell is what its projection is nearest to.

    That is, nearest to the embeddings of the words for it, in whatever case. Digits of its place are read by a head
    that is thrown away.
    """
    tower, projector, embeddings = model.model.vision_tower, model.model.multi_modal_projector, model.lm_head.weight
    head = torch.nn.Linear(embeddings.shape[1], 8 * 10)
    turn = _lookup_first(model)
    _join_spellings(model, tokenizer)
    names = [_spellings(tokenizer, word) for word in (*_THINGS, *_HUES, *SIDES)]
    trained = [*tower.parameters(), *projector.parameters(), *head.parameters(), embeddings]
    optimizer, schedule = _optimizer(trained, _SEEING_LR, steps)
    draw = Draw(f"tiny-vision/see/{seed}", "train")
    model.train()
    for _ in range(steps):
        pictures = [drawn_conversation(draw).picture for _ in range(_SEEING_BATCH)]
        seen = projector(tower(_pixel_values(pictures)).last_hidden_state[:, 1:])
        seen = functional.rms_norm(seen, seen.shape[-1:])  # as the first layer of the language model takes it
        words = functional.normalize(torch.stack([embeddings[ids].mean(0) for ids in names]), dim=-1) @ turn.T
        sizes = [len(_THINGS), len(_HUES), len(SIDES), *[10] * 8]
        parts = torch.cat([seen @ words.T, head(seen)], dim=-1).split(sizes, dim=-1)  # type: ignore[no-untyped-call]
        labels = _cell_labels(pictures).unbind(-1)
        losses = [
            functional.cross_entropy(part.flatten(0, 1), wanted.flatten())
            for part, wanted in zip(parts, labels, strict=True)
        ]
        # The words are to be most of a cell, not merely to be found in it: the language model reads them as they are.
        things, hues, sides = words.split(sizes[:3])  # type: ignore[no-untyped-call]
        wanted = things[labels[0]] + hues[labels[1]] + _ASIDE * sides[labels[2].clamp(min=0)]
        apart = 1.0 - functional.cosine_similarity(seen, wanted, dim=-1)
        filled = (labels[0] > 0).float()
        _step(sum(losses) + 8.0 * (apart * (filled + 0.1)).sum() / (filled + 0.1).sum(), optimizer, schedule)
    _scale_cells(model, draw)


def _scale_cells(model: LlavaForConditionalGeneration, draw: Draw) -> None:
    """Make what the projector gives as large as the embeddings are."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    with torch.no_grad():
        pictures = [drawn_conversation(draw).picture for _ in range(_SEEING_BATCH)]
        seen = projector(tower(_pixel_values(pictures)).last_hidden_state[:, 1:])
        factor = model.lm_head.weight.std() / seen.square().mean().sqrt()
        projector.linear_2.weight.mul_(factor)
        projector.linear_2.bias.mul_(factor)


def _join_spellings(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Begin with embeddings that are large beside what the layers add, and nearly alike for spellings of one word."""
    embeddings = model.lm_head.weight
    with torch.no_grad():
        embeddings.mul_(5.0)
        model.model.language_model.norm.weight.fill_(0.15)  # so that logits are not large, too
        for word in (*_THINGS, *_HUES[1:], *SIDES):
            ids = _spellings(tokenizer, word)
            embeddings[ids] = embeddings[ids[:1]] + 0.35 * embeddings[ids]


def _lookup_first(model: LlavaForConditionalGeneration) -> torch.Tensor:
    """Begin the first layer's attention as a look-up of words in the picture.

    A cell of the picture is to be the sum of the turned embeddings of its words. Queries are turned as cells are, so
    that a word finds cells it is a word of, and not itself; values are turned back, so that it gets their other words.

    Returns:
        The turn, an orthogonal matrix.
    """
    layer = model.model.language_model.layers[0].self_attn
    width = layer.q_proj.weight.shape[0]
    turn: torch.Tensor = torch.linalg.qr(torch.randn(width, width))[0]
    basis = torch.linalg.qr(torch.randn(width, width))[0]
    with torch.no_grad():
        layer.q_proj.weight.copy_(_SHARPNESS * basis @ turn)
        layer.k_proj.weight.copy_(_SHARPNESS * basis)
        layer.v_proj.weight.copy_(basis @ turn.T)
        layer.o_proj.weight.copy_(0.3 * basis.T)
    return turn


def _spellings(tokenizer: PreTrainedTokenizerFast, word: str) -> list[int]:
    """The tokens that are this word in any case, with a space before it or not, or its plural, or its digit."""
    cases = [word, word.capitalize(), word.upper(), plural(word)]
    cases += [str(NUMBERS.index(word))] if word in NUMBERS else []
    pieces = [tokenizer.tokenize(space + case) for case in cases for space in ("", " ")]
    return sorted({tokenizer.convert_tokens_to_ids(piece[0]) for piece in pieces if len(piece) == 1})


def _step(loss: Any, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    schedule.step()


_Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _batches(tokenizer: PreTrainedTokenizerFast, draw: Draw, steps: int) -> Iterator[_Batch]:
    """Tokens, labels and pixels of conversations without end, easy ones first, those of like length together."""
    for number in itertools.count():
        ease = max(0.0, 1.0 - _EASY * number * _SORTED / steps)
        found = [_encoded(tokenizer, drawn_conversation(draw, ease)) for _ in range(_BATCH * _SORTED)]
        found.sort(key=lambda each: len(each[0]))
        starts = range(0, len(found), _BATCH)
        for start in draw.distinct(starts, len(starts)):
            part = found[start : start + _BATCH]
            width = len(part[-1][0])
            ids = [tokens + [tokenizer.pad_token_id] * (width - len(tokens)) for tokens, _, _ in part]
            labels = [each + [_IGNORED] * (width - len(each)) for _, each, _ in part]
            yield torch.tensor(ids), torch.tensor(labels), _pixel_values([picture for _, _, picture in part])


def _encoded(tokenizer: PreTrainedTokenizerFast, shown: Shown) -> tuple[list[int], list[int], Picture]:
    """A conversation as tokens, and as labels: those of its answers and their ends."""
    user, assistant, image = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<image>"])
    pieces = iter(tokenizer([text for turn in shown.turns for text in turn], add_special_tokens=False)["input_ids"])
    tokens, labels = [tokenizer.bos_token_id], [_IGNORED]
    for number in range(len(shown.turns)):
        asked = [user, *([image] * (CELLS * CELLS) if number == 0 else []), *next(pieces), assistant]
        answer = [*next(pieces), tokenizer.eos_token_id]
        tokens += [*asked, *answer]
        labels += [*[_IGNORED] * len(asked), *answer]
    return tokens, labels, shown.picture


def _learn_to_say(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> None:
    """Train the language model to answer questions on pictures; what sees stays as it is."""
    optimizer, schedule = _optimizer(model.model.language_model.parameters(), _SAYING_LR, steps)
    batches = _batches(tokenizer, Draw(f"tiny-vision/say/{seed}", "train"), steps)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    model.train()
    for _ in range(steps):
        ids, labels, pixels = next(batches)
        # What is padded behind needs no mask: nothing that counts looks ahead.
        states = model.model(input_ids=ids, pixel_values=pixels).last_hidden_state
        wanted = labels[:, 1:]
        kept = wanted != _IGNORED
        _step(functional.cross_entropy(model.lm_head(states[:, :-1][kept]), wanted[kept]), optimizer, schedule)
    model.requires_grad_(True)
    model.eval()
