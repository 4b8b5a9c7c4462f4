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
from toy_folders import bpe_tokenizer, llama_folder

pytest_plugins = ["chat_server", "toy_models", "toy_runs", "two_tasks"]

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
    return bpe_tokenizer(_SENTENCES, 400)


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama (hidden size 32, 0.06 M parameters, fp32, fixed seed) saved with its tokenizer.

    Shared by the whole session: copy it before changing anything in it.
    """
    return llama_folder(tmp_path_factory.mktemp("tiny-llama"), tiny_tokenizer)


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
