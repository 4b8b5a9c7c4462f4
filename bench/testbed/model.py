"""The small model of the test bed: its tokenizer, its pretraining on generated tasks, and where it is kept.

Made once for each content of this file and of the pretraining tasks, in the cache of cit-fast (``CIT_FAST_CACHE``),
atomically. The same sources give the same tokens in the same order; on another number of threads sums may round
otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.testbed.pretraining_tasks import GYM, PRETRAINING, gym_examples
from cit_fast.cache import cache_folder
from cit_fast.data import Example
from cit_fast.methods.objectives import CrossEntropy
from cit_fast.models.collation import PaddingCollator
from cit_fast.models.prompts import IGNORED, Encoded, PromptEncoder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 1024
_ENGLISH = """The gauge shows the reading of the north sensor after the move. Say how to carry the parcel, and on which
shelf in the new hall it belongs. Ada found a crate, Ben lost his sack, and the van brings what the upper dial calls
for. Low, fine and high are words; red, green and amber are colours of an alarm. Give the code, call for the rule, split
the two things, write the final numeral with care as usual, name the slash or the plus between, where they come from."""
"""Words that instructions are made of, so that they are no heaps of letters to a model that has not seen them."""
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
STEPS, BATCH, LEARNING_RATE, WARMUP = 12_000, 24, 2e-3, 100
_POOL = 64  # batches whose conversations are drawn together, so that those of a length can be in one batch
_KEPT = 500  # steps between checkpoints
_TURNS = 6  # of a conversation, at most; every answer is learned


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of the pretraining tasks' texts; digits stand alone. End of turn and EOS are ``<|im_end|>``."""
    texts = [f"{e.instruction}\n\n{e.input}\n{e.references[0]}" for e in _pretraining_pool(0, 300)]
    texts += 400 * [_ENGLISH]
    own = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    own.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    own.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def _pretraining_pool(seed: int, each: int) -> list[Example]:
    """``each`` examples of every pretraining task of ours, half as many of reasoning-gym's, shuffled."""
    found = [e for generator in PRETRAINING for e in generator.examples(each, f"pretraining/{seed}")]
    found += [e for name in GYM for e in gym_examples(name, each // 2, 1000 + seed)]
    random.Random(seed).shuffle(found)
    return found


def _conversations(encoder: PromptEncoder, seed: int, count: int) -> list[Encoded]:
    """Conversations of some turns, in which the instruction is said once and every answer is learned."""
    rng = random.Random(seed)
    waiting: dict[tuple[str, str], tuple[list[Example], int]] = {}
    found = []
    between = encoder.tokenizer("\n", add_special_tokens=False)["input_ids"]
    for example in _pretraining_pool(seed, math.ceil(count * _TURNS / (len(PRETRAINING) + len(GYM) / 2))):
        # Our tasks ask for more inputs of the same wording; a task of reasoning-gym asks a whole question again.
        key = example.task, example.instruction if example.input else ""
        own, turns = waiting.setdefault(key, ([], rng.randint(1, _TURNS)))
        own.append(example)
        if len(own) < turns:
            continue
        del waiting[key]
        ids, labels = list[int](), list[int]()
        for turn in own:
            again = replace(turn, instruction=turn.input, input="", key_parts=()) if ids and turn.input else turn
            encoded = encoder.example(again)
            ids += [*(between if ids else []), *encoded.input_ids]
            labels += [*([IGNORED] * len(between) if labels else []), *encoded.labels]
        found.append(Encoded(ids, labels, 0))
    return found


def _batches(encoder: PromptEncoder) -> Iterator[list[Encoded]]:
    """Endless batches of conversations of much the same length, in random order."""
    seed = 0
    while True:
        seed += 1
        found = sorted(_conversations(encoder, seed, _POOL * BATCH), key=len)
        batches = [found[start : start + BATCH] for start in range(0, len(found) - BATCH + 1, BATCH)]
        random.Random(seed).shuffle(batches)
        yield from batches


def pretrained() -> Path:
    """The folder of the pretrained model with its tokenizer; where it is new, pretrains it, in an hour on two cores.

    A pretraining that was interrupted goes on where it was.
    """
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("model.py", "pretraining_tasks.py")]
    key = hashlib.sha256(b"\0".join([*sources, torch.__version__.encode(), transformers.__version__.encode()]))
    folder = cache_folder() / "testbed" / key.hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as made:
                _pretrain(Path(made) / "model", folder.with_suffix(".checkpoint"))
                (Path(made) / "model").rename(folder)
            folder.with_suffix(".checkpoint").unlink(missing_ok=True)
    return folder


def _pretrain(folder: Path, checkpoint: Path) -> None:
    tokens = tokenizer()
    encoder = PromptEncoder(tokens, max_length=SIZES["max_position_embeddings"])
    config = LlamaConfig(
        **SIZES,
        vocab_size=len(tokens),
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * min(1.0, step / STEPS))) + 0.01)
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    losses: list[float] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        losses = saved.pop("losses")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    objective, collate = CrossEntropy(), PaddingCollator(encoder.pad_token_id)
    bar = tqdm(total=STEPS, initial=len(losses), desc="pretraining", unit="step")
    for examples in islice(_batches(encoder), len(losses), STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(model, collate(examples), None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
        bar.update(1)
        if len(losses) % _KEPT == 0:
            half = checkpoint.with_suffix(".half")
            torch.save({"losses": losses, **{name: part.state_dict() for name, part in parts.items()}}, half)
            half.replace(checkpoint)
    model.eval().save_pretrained(folder)
    tokens.save_pretrained(folder)
    every_50 = [round(sum(losses[k : k + 50]) / 50, 4) for k in range(0, STEPS, 50)]
    (folder / "pretraining.json").write_text(json.dumps({"losses": every_50}))
