"""Fixtures for every test: a tokenizer and a language model, tiny and made on the spot."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports huggingface_hub or tokenizers, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

# Fixtures of more than one room.
sys.path.insert(0, str(Path(__file__).with_name("support")))
pytest_plugins = ["chat_server", "toy_models", "toy_runs"]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SENTENCES = (
    "Write the date in the form year, month, day.",
    "Convert the number to words and answer with the words only.",
    "Extract the e-mail address from the text.",
    "What is the sentiment of this review? Answer positive or negative.",
    "user system assistant",
    "The quick brown fox jumps over the lazy dog while 0 1 2 3 4 5 6 7 8 9 count to ten.",
)


# A shared or throttled machine is slow now and then; that is no failure. Everybody's tests draw the same examples;
# `make fuzz` draws new ones.
settings.register_profile("cit-fast", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, derandomize=False, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "cit-fast"))


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Tiny tensors run fastest, and always with the same bits, on one thread."""
    torch.set_num_threads(1)
    # Autograd starts its threads at the first backward pass, for the devices that there are. Fake tensors (opcheck,
    # torch.compile) register one that is not there; threads started after that would forbid forked children to train.
    torch.ones((), requires_grad=True).backward()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens with a ChatML template; every text decodes back to itself.

    End of turn and EOS are ``<|im_end|>``, padding is ``<|pad|>``, there is no BOS.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",  # noqa: S106 - a token, not a password
        eos_token="<|im_end|>",  # noqa: S106
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama (hidden size 32, 0.06 M parameters, fp32, fixed seed) saved with its tokenizer.

    Shared by the whole session: copy it before changing anything in it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def edit_record():
    """``edit_record(path, key=value, ...)``: change a run's record by hand, as its error says: without its checksum."""
    import json

    def edit(path: Path, **changes: object) -> dict[str, object]:
        record = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        record.pop("checksum", None)
        path.write_text(json.dumps(record), encoding="utf-8")
        return record

    return edit
