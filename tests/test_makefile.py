"""Which torch `make setup` takes where, and that it says so; nothing is installed here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")

# Stands for every program of the recipe: says what it was asked, and fails at what fits FAILS.
STUB = """#!/bin/sh
name="${0##*/}"
if [ "$name $1 $2" = "python -m venv" ]; then
  mkdir -p "$3/bin"
  for tool in python pip uv; do ln -s "$0" "$3/bin/$tool"; done
fi
case "$name $*" in "python -c import torch") exit 1;; esac
echo "$name $*" >> "$ASKED"
[ -z "$PYTHONDONTWRITEBYTECODE" ] || echo "$name keeps nothing that it compiles" >> "$ASKED"
case "$name $*" in ${FAILS:-nothing}) exit 1;; esac
"""


def made(folder: Path, *arguments: str, fails: str = "", gpu: bool = False) -> tuple[int, str, list[str]]:
    """What `make setup` returned and printed, and what it asked of pip and uv for torch."""
    tools = folder / "tools"
    tools.mkdir(parents=True)
    for name in ("sh", "touch", "mkdir", "ln"):
        (tools / name).symlink_to(str(shutil.which(name)))
    for name in ("python", *(["nvidia-smi"] if gpu else [])):
        (tools / name).write_text(STUB)
        (tools / name).chmod(0o755)
    command = [MAKE, "-s", "-C", ROOT, f"VENV={folder / 'venv'}", f"PYTHON={tools / 'python'}", *arguments, "setup"]
    # As images of containers have it; then every process would compile 4,000 modules anew.
    environment = {"PATH": str(tools), "ASKED": str(folder / "asked"), "FAILS": fails, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, env=environment)
    asked = (folder / "asked").read_text().splitlines()
    assert not [line for line in asked if "keeps nothing" in line]
    return done.returncode, done.stdout, [line for line in asked if " torch" in line]


@pytest.mark.skipif(MAKE is None, reason="no make")
def test_torch_comes_from_pytorchs_own_index_or_else_from_pips(tmp_path):
    code, said, asked = made(tmp_path / "first")
    assert code == 0
    assert "torch for the CPU, from PyTorch's own index" in said
    assert len(asked) == 1
    assert asked[0].startswith("uv pip install")
    assert "--torch-backend cpu torch==" in asked[0]

    # Out of reach: the configured one, without a word of uv's.
    code, said, asked = made(tmp_path / "second", fails="uv*")
    assert code == 0
    assert said.strip() == "== torch from pip's index, as PyTorch's own for the CPU gave none"
    assert [line.split()[0] for line in asked] == ["uv", "pip"]

    code, said, _ = made(tmp_path / "neither", fails="*torch==*")
    assert code != 0
    assert said == ""


@pytest.mark.skipif(MAKE is None, reason="no make")
def test_an_index_that_is_named_and_a_gpu(tmp_path):
    code, said, asked = made(tmp_path / "named", "TORCH_INDEX=https://index.example/cpu")
    assert code == 0
    assert said.strip() == "== torch from TORCH_INDEX"
    assert "--index-url https://index.example/cpu torch==" in asked[0]
    assert len(asked) == 1

    code, said, asked = made(tmp_path / "gpu", gpu=True)
    assert code == 0
    assert said.strip() == "== torch for this NVIDIA GPU, from pip's index"
    assert len(asked) == 1
    assert asked[0].endswith("torch>=2.11,<3")


@pytest.mark.skipif(MAKE is None, reason="no make")
def test_coverage_takes_arguments_in_quotes(tmp_path):
    """An expression for -k has blanks, and so quotes."""
    command = [
        str(MAKE),
        "-n",
        "-C",
        str(ROOT),
        f"VENV={tmp_path}",
        "coverage",
        "PYTEST_ARGS=-k 'one or two' tests/data",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2 if "Leaving" in done.stdout else -1].endswith(
        f"{tmp_path}/bin/pytest -n 2 --dist worksteal --cov --cov-report=term -k 'one or two' tests/data"
    )
