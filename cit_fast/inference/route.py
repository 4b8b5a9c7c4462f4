"""Routes prompts to adapter sets as the run did that wrote `router.safetensors`; needs numpy alone.

    router = Router("router.safetensors")
    name = router(tokenizer(text, add_special_tokens=False)["input_ids"])

The tokenizer is the base model's; `router.reads` says what the text is: "prompt" (instruction, empty line, input),
"instruction", or "whole" (the prompt with its chat template). The name "__base__" is the base model without a set.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class Router:
    """Token means -> a set's name: a network of two layers, and how far a prompt is from all that was learned."""

    def __init__(self, path: str | Path) -> None:
        with Path(path).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(size))
        told = json.loads(head.pop("__metadata__")["router"])
        self.sets, self.below, self.reads = told["sets"], told["below"], told["reads"]
        data = np.memmap(path, np.uint8, "r", 8 + size)
        kinds = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2"}
        self.tensors = {
            name: data[slice(*each["data_offsets"])].view(kinds[each["dtype"]]).reshape(each["shape"])
            for name, each in head.items()
        }

    def __call__(self, tokens: Sequence[int]) -> str:
        """The set that answers a prompt of these token ids, of which there must be one at least."""
        t = self.tensors
        rows = t["embeddings"][np.asarray(tokens)]
        if rows.dtype == np.uint16:  # bfloat16: the upper half of a float32
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        x = rows.astype(np.float32).mean(0)
        hidden = np.maximum(t["hidden_weight"] @ ((x - t["mean"]) / t["scale"]) + t["hidden_bias"], 0)
        chosen: str = self.sets[int(np.argmax(t["weight"] @ hidden + t["bias"]))]
        if self.below is None:
            return chosen
        apart = t["means"] - x.astype(np.float64) @ t["whitening"]
        return chosen if -np.square(apart).sum(1).min() >= self.below else "__base__"
