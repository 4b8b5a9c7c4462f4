"""Test prompts answered by an inference server instead of by the model here: ``evaluation: {engine: {openai: URL}}``.

The server has the base model, and loads adapter sets while it runs, as vLLM and SGLang do. A set is written where the
server can read it, under a name that says which weights it has; it is asked by that name, and unloaded when the
prompts of an evaluation are answered. Prompts are sent as the run's own tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from safetensors.torch import save_file

from cit_fast.errors import ConfigError, RunError
from cit_fast.files import new_folder
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.chat import CompletionEndpoint, excerpt
from cit_fast.models.digests import hash_tensor
from cit_fast.models.parked_sets import parked, weights_of
from cit_fast.models.pretrained import cache_folder
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run.config import EngineConfig, RunConfig
from cit_fast.text import first_line

_LOADING = ("/v1/load_lora_adapter", "/load_lora_adapter")  # vLLM's, SGLang's


class OutsideEngine:
    """Answers prompts through a server.

    Args:
        config: which.
        base: the base model's name, as the run has it; ``identity``: digits that tell its weights apart.
        stop: tokens that end an answer; ``longest``: tokens of an answer at most.

    Raises:
        ConfigError: no address of a server, or the package that asks it is missing.
    """

    def __init__(self, config: EngineConfig, base: str, identity: str, stop: Sequence[int], longest: int) -> None:
        self.config, self.base = config, base
        fields = {"max_tokens": longest, "stop_token_ids": sorted(stop), "skip_special_tokens": True}
        self.endpoint = CompletionEndpoint(
            config.openai,
            identity={"base": base, "weights": identity},
            options=fields,
            key_variable=config.key_variable,
            timeout=config.timeout,
            attempts=config.attempts,
            concurrency=config.concurrency,
            cache=cache_folder() / "engine",
        )

    def check(self) -> None:
        """See that the server is there and has the base model.

        Raises:
            ConfigError: it is not, or has not.
        """
        try:
            self._models()
        except RunError as error:
            raise ConfigError(str(error)) from None

    def answers(self, model: Any, prompts: Sequence[Sequence[int]], sets: Sequence[str | None]) -> list[str]:
        """The answers, in order; the main process asks, and the others are told.

        Args:
            model: whose adapter sets these are.
            sets: of each prompt the set that answers it, :data:`BASE` for none; ``None``: the one at work.

        Raises:
            RunError: the server cannot be reached, cannot load a set, or gives no answer.
        """
        found: list[Any] = [None]
        if PartialState().is_main_process:
            try:
                found[0] = self._asked(model, prompts, sets)
            except RunError as error:  # the others must hear of it, or they would wait
                found[0] = error
        broadcast_object_list(found)
        if isinstance(found[0], RunError):
            raise found[0]
        return list(found[0])

    def _asked(self, model: Any, prompts: Sequence[Sequence[int]], sets: Sequence[str | None]) -> list[str]:
        at_work = model.active_adapters[0] if isinstance(model, PeftModel) else BASE
        of_prompts = [at_work if name is None else name for name in sets]
        keys = {name: BASE if name == BASE else f"{name}-{_digest(model, name)}" for name in set(of_prompts)}
        asked = [self.endpoint.prompt(keys[name], ids) for name, ids in zip(of_prompts, prompts, strict=True)]
        with self._served(model, keys):
            return self.endpoint.complete(asked)

    @contextlib.contextmanager
    def _served(self, model: Any, keys: Mapping[str, str]) -> Iterator[None]:
        """Inside, the server has these sets; each under a name of this evaluation's own, for others may ask it, too."""
        base, prefix = self._models()
        root = Path(self.config.folder) if self.config.folder is not None else cache_folder() / "engine-sets"
        folders: dict[str, Path] = {}
        self.endpoint.names = {BASE: base}
        try:
            for name, key in keys.items():
                if name == BASE:
                    continue
                there = f"{key}-{uuid.uuid4().hex[:8]}"
                folders[there] = root.absolute() / there
                _write(model, name, folders[there], self.base)
                self._told(_LOADING, {"lora_name": there, "lora_path": str(folders[there])})
                self.endpoint.names[key] = prefix + there
            yield
        finally:
            for there, folder in folders.items():
                with contextlib.suppress(RunError):  # it was never loaded, or the server has gone
                    self._told([path.replace("/load", "/unload") for path in _LOADING], {"lora_name": there})
                shutil.rmtree(folder, ignore_errors=True)

    def _models(self) -> tuple[str, str]:
        """The base model's name there, and what stands before a set's."""
        cards = self._request(lambda client, options: client.get("/models", cast_to=object, options=options))
        try:
            found = {card["id"]: card for card in cards["data"]}
            name = self.config.model or next(key for key, card in found.items() if not card.get("parent"))
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise RunError(f"evaluation.engine: {self.config.openai}/models lists no model") from None
        if name not in found:
            raise RunError(
                f"evaluation.engine: {self.config.openai} does not serve {name!r}; it has {', '.join(sorted(found))}"
            )
        return name, f"{name}:" if found[name].get("owned_by") == "sglang" else ""

    def _told(self, paths: Sequence[str], body: dict[str, str]) -> None:
        """Have the server load or unload a set."""
        from openai import NotFoundError

        root = self.config.openai.removesuffix("/v1")
        for path in paths:
            try:
                self._request(
                    lambda client, options, path=path: client.post(root + path, cast_to=str, body=body, options=options)
                )
            except RunError as error:
                if isinstance(error.__cause__, NotFoundError) and path != paths[-1]:
                    continue
                hint = ""
                if isinstance(error.__cause__, NotFoundError):
                    hint = "; start it so that it loads adapter sets (vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)"
                raise RunError(f"{error}{hint}") from error.__cause__
            else:
                return

    def _request(self, request: Callable[..., Any]) -> Any:
        """One request by the package's client, whose errors become one line."""
        from openai import APIStatusError, Omit, OpenAIError

        headers = {} if os.environ.get(self.config.key_variable) else {"Authorization": Omit()}
        try:
            with self.endpoint.client() as client:
                return request(client, {"headers": headers})
        except APIStatusError as error:
            said = excerpt(error.response.text, self.config.key_variable)
            raise RunError(f"evaluation.engine: {error.request.url}: HTTP {error.status_code}: {said}") from error
        except (OpenAIError, ValueError) as error:
            raise RunError(f"evaluation.engine: {self.config.openai}: {first_line(error)}") from error


def _post(url: str, body: dict[str, str], client: Any, options: Any) -> str:
    return str(client.post(url, cast_to=str, body=body, options=options))


def outside_engine(config: RunConfig, identity: str, encoder: PromptEncoder) -> OutsideEngine | None:
    """The engine that a configuration names; ``None`` where the model answers itself.

    Args:
        identity: of the base model. ``encoder``: of its prompts, which knows what ends an answer.
    """
    engine = config.evaluation.engine
    if engine == "transformers":
        return None
    return OutsideEngine(engine, config.model.name, identity, encoder.stop_token_ids, config.evaluation.max_new_tokens)


def _digest(model: Any, name: str) -> str:
    """Digits that tell a set's weights and how they are used apart."""
    elsewhere = ("base_model_name_or_path", "revision", "inference_mode")
    config = {key: value for key, value in _config(model, name).to_dict().items() if key not in elsewhere}
    plain = json.dumps(
        config, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )
    digest = hashlib.blake2b(json.dumps(plain, sort_keys=True, default=str).encode(), digest_size=8)
    for key, value in sorted(weights_of(model, name).items()):
        digest.update(key.encode())
        hash_tensor(digest, value)
    return digest.hexdigest()


def _config(model: Any, name: str) -> Any:
    return model.peft_config.get(name) or parked(model).configs[name]


def _write(model: Any, name: str, folder: Path, base: str) -> None:
    """A set as a PEFT folder, whether it is in the model or parked beside it."""
    with new_folder(folder) as temporary:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in weights_of(model, name).items()},
            temporary / "adapter_model.safetensors",
            {"format": "pt"},
        )
        config = _config(model, name)
        before, config.base_model_name_or_path = config.base_model_name_or_path, base
        config.save_pretrained(temporary)
        config.base_model_name_or_path = before
