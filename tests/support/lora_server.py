"""A stand-in for vLLM or SGLang: a base model that loads PEFT folders while it runs, and completes tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from peft import PeftModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer

BARE = "bare"


class LoraServer:
    """What such a server does with the requests that are made of it.

    Args:
        folder: of the base model. ``kind``: "vllm" or "sglang", which name sets and endpoints differently.
        loads: whether it was started so that it loads sets.
    """

    def __init__(self, folder: Path, kind: str = "vllm", loads: bool = True) -> None:
        self.base, self.kind = "the/base", kind
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.bare = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.sets: dict[str, PeftModel] = {}
        self.folder = folder
        self.loaded: list[str] = []
        self.asked: Counter[str] = Counter()
        self.failures: list[int] = []  # statuses of the next completions
        self.keys: set[str | None] = set()
        self.loses = False
        root = "/v1" if kind == "vllm" else ""
        loading = [Route(f"{root}/load_lora_adapter", self.load, methods=["POST"])]
        loading += [Route(f"{root}/unload_lora_adapter", self.unload, methods=["POST"])]
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
                *(loading if loads else []),
            ]
        )

    async def models(self, _request: Request) -> Response:
        card = {"object": "model", "owned_by": self.kind}
        found = [{**card, "id": self.base}, *({**card, "id": name, "parent": self.base} for name in self.sets)]
        return JSONResponse({"object": "list", "data": found})

    async def load(self, request: Request) -> Response:
        body = await request.json()
        if body["lora_name"] in self.sets:
            return JSONResponse({"message": f"The lora adapter {body['lora_name']} has already been loaded"}, 400)
        base = AutoModelForCausalLM.from_pretrained(self.folder)
        self.sets[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
        self.loaded.append(body["lora_name"])
        if self.loses:  # the reply, so the client asks again
            self.loses = False
            return JSONResponse({"message": "lost"}, 502)
        return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    async def unload(self, request: Request) -> Response:
        body = await request.json()
        if self.sets.pop(body["lora_name"], None) is None:
            return JSONResponse({"message": "no such set"}, 404)
        return PlainTextResponse("Success")

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.keys.add(request.headers.get("authorization"))
        # What is not said here, a server takes from the model's own generation configuration.
        greedy = {"temperature": 0, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0}
        assert {key: body[key] for key in greedy} == greedy
        assert all(isinstance(token, int) for token in body["prompt"])
        if self.failures:
            return JSONResponse({"error": {"message": "too much to do"}}, self.failures.pop())
        name = body["model"]
        name = name.partition(":")[2] if self.kind == "sglang" and ":" in name else name
        model = self.bare if name == self.base else self.sets.get(name)
        if model is None:
            return JSONResponse({"error": {"message": f"no model {name}"}}, 404)
        self.asked[name if model is not self.bare else BARE] += 1
        ids = torch.tensor([body["prompt"]])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                eos_token_id=body["stop_token_ids"],
                pad_token_id=0,
            )
        text = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=body["skip_special_tokens"])
        return JSONResponse({"object": "text_completion", "choices": [{"index": 0, "text": text}]})
