"""Test prompts answered by an inference server instead of by the model here: ``evaluation: {engine: {openai: URL}}``.

The server has the base model, and loads adapter sets while it runs, as vLLM and SGLang do. A set is written where the
server can read it, under a name that says which weights it has; it is asked by that name, and unloaded when the
prompts of an evaluation are answered. Prompts are sent as the run's own tokens.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors.torch import save_file

from cit_fast.cache import cache_folder
from cit_fast.errors import ConfigError, RunError
from cit_fast.files import new_folder
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.chat import CompletionEndpoint, excerpt
from cit_fast.models.digests import hash_tensor
from cit_fast.models.parked_sets import parked, weights_of
from cit_fast.models.prompts import PromptEncoder
from cit_fast.run.config import EngineConfig, RunConfig
from cit_fast.text import first_line

_T = TypeVar("_T")
_LOADING = ("/v1/load_lora_adapter", "/load_lora_adapter")  # vLLM's, SGLang's
_UNLOADING = 20.0  # seconds that a server may take to let go of a set
# A server takes what is not said here from the model's own generation configuration, which plays no part in ours.
_GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0}


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
        fields = {**_GREEDY, "max_tokens": longest, "stop_token_ids": sorted(stop), "skip_special_tokens": True}
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
        """See that the server is there and has the base model; every process calls it.

        Raises:
            ConfigError: it is not, or has not.
        """
        try:
            _by_one(self._models)
        except RunError as error:
            raise ConfigError(str(error)) from None

    def answers(self, model: Any, prompts: Sequence[Sequence[int]], sets: Sequence[str | None]) -> list[str]:
        """The answers, in order. The main process has the sets loaded, each process asks its share of the prompts.

        Args:
            model: whose adapter sets these are.
            sets: of each prompt the set that answers it, :data:`BASE` for none; ``None``: the one at work.

        Raises:
            RunError: the server cannot be reached, cannot load a set, or gives no answer.
        """
        state = PartialState()
        at_work = model.active_adapters[0] if isinstance(model, PeftModel) else BASE
        of_prompts = [at_work if name is None else name for name in sets]
        base = _by_one(self._models)
        # What is asked, and kept: the weights of base and set, whatever the server calls them this time.
        keys = {name: json.dumps([base.key, name, _digest(model, name)]) for name in set(of_prompts)}
        asked = [self.endpoint.prompt(keys[name], ids) for name, ids in zip(of_prompts, prompts, strict=True)]
        with self._served(model, base, keys, [key for key in keys.values() if self._open(key, asked)]):
            with state.split_between_processes(list(range(len(asked)))) as numbers:
                mine = _caught(lambda: self.endpoint.complete([asked[number] for number in numbers]))
            shares: list[list[str] | RunError] = gather_object([mine]) if state.num_processes > 1 else [mine]
            answers: list[str] = []
            for share in shares:
                if isinstance(share, RunError):
                    raise share
                answers += share
            return answers

    def _open(self, key: str, asked: Sequence[str]) -> bool:
        """Whether a set is needed for a prompt that has no answer yet."""
        return any(json.loads(prompt)[0] == key and not self.endpoint.knows(prompt) for prompt in dict.fromkeys(asked))

    @contextlib.contextmanager
    def _served(self, model: Any, base: _Base, keys: Mapping[str, str], wanted: Collection[str]) -> Iterator[None]:
        """Inside, the server has these sets; each under a name of this evaluation's own, for others may ask it, too."""
        root = Path(self.config.folder) if self.config.folder is not None else cache_folder() / "engine-sets"
        folders: dict[str, Path] = {}

        def load() -> dict[str, str]:
            names = dict.fromkeys(keys.values(), base.name)
            for name, key in keys.items():
                if name == BASE or key not in wanted:
                    continue
                there = f"{name}-{uuid.uuid4().hex[:12]}"
                folders[there] = root.absolute() / there
                _write(model, name, folders[there], self.base)
                self._told(_LOADING, {"lora_name": there, "lora_path": str(folders[there])})
                names[key] = base.prefix + there
            return names

        try:
            self.endpoint.names = _by_one(load)
            yield
        finally:
            reachable = True
            for there, folder in folders.items():
                if reachable:
                    reachable = self._unloaded(there)
                shutil.rmtree(folder, ignore_errors=True)

    def _models(self) -> _Base:
        """The base model as the server has it."""
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
        owner = found[name].get("owned_by")
        return _Base(name, f"{name}:" if owner == "sglang" else "", f"{owner} {name} {found[name].get('root', '')}")

    def _told(self, paths: Sequence[str], body: dict[str, str]) -> None:
        """Have the server load a set."""
        from openai import BadRequestError, NotFoundError

        root, errors = self.config.openai.removesuffix("/v1"), []
        for path in paths:
            try:
                self._request(functools.partial(_post, root + path, body))
            except RunError as error:
                if isinstance(error.__cause__, BadRequestError) and "already" in str(error):
                    return  # by a request whose reply was lost: no other has this name
                errors.append(error)
                if not isinstance(error.__cause__, NotFoundError):
                    break
            else:
                return
        first, last = errors[0], errors[-1]
        if isinstance(last.__cause__, NotFoundError):
            raise RunError(
                f"{first}; start it so that it loads adapter sets (vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True), and "
                f"let it see {body['lora_path']} (evaluation.engine.folder)"
            ) from first.__cause__
        raise last

    def _unloaded(self, there: str) -> bool:
        """Have the server let go of a set, if it has it; whether the server could be reached."""
        from openai import APIConnectionError

        root = self.config.openai.removesuffix("/v1")
        for path in _LOADING:
            post = functools.partial(_post, root + path.replace("/load", "/unload"), {"lora_name": there})
            try:
                self._request(post, max_retries=0, timeout=_UNLOADING)
            except RunError as error:
                if isinstance(error.__cause__, APIConnectionError):
                    return False
            else:
                break
        return True

    def _request(self, request: Callable[..., Any], **options: Any) -> Any:
        """One request by the package's client, whose errors become one line."""
        from openai import APIStatusError, Omit, OpenAIError

        headers = {} if os.environ.get(self.config.key_variable) else {"Authorization": Omit()}
        try:
            with self.endpoint.client() as client:
                return request(client.with_options(**options) if options else client, {"headers": headers})
        except APIStatusError as error:
            said = excerpt(error.response.text, self.config.key_variable)
            raise RunError(f"evaluation.engine: {error.request.url}: HTTP {error.status_code}: {said}") from error
        except (OpenAIError, ValueError) as error:
            raise RunError(f"evaluation.engine: {self.config.openai}: {first_line(error)}") from error


class _Base(NamedTuple):
    """The base model on a server: its name, what stands before a set's name, and what tells it from other bases."""

    name: str
    prefix: str
    key: str


def _by_one(work: Callable[[], _T]) -> _T:
    """What the main process works out; where that fails, all of them fail instead of waiting for it.

    Raises:
        RunError: it has failed.
    """
    found: list[Any] = [_caught(work) if PartialState().is_main_process else None]
    broadcast_object_list(found)
    if isinstance(found[0], RunError):
        raise found[0]
    result: _T = found[0]
    return result


def _caught(work: Callable[[], _T]) -> _T | RunError:
    """What it gives, or its error as one that other processes can be told."""
    try:
        return work()
    except RunError as error:
        return RunError(str(error))
    except (OSError, RuntimeError, ValueError) as error:
        return RunError(f"evaluation.engine: {first_line(error)}")


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
    if name == BASE:
        return ""
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
