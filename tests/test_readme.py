"""Every Python snippet of the README and the guide runs, on the tiny model in place of the real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README, GUIDE, RESULTS = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "GUIDE.md", "bench/RESULTS.md")
)
SNIPPETS = re.findall(r"```python\n(.*?)```", README + GUIDE, flags=re.DOTALL)


def test_every_way_in_has_its_snippet():
    ways = [
        "Linear",
        "continual_metrics(",
        "wasserstein_matrix(",
        "Selection(",
        " Trainer(",
        "SFTTrainer(",
        "export_merged(",
    ]
    assert [name for name in ways for text in SNIPPETS if name in text] == ways


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # Trainer's default, without a GPU
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[0][:40])
def test_snippet_runs(snippet, tiny_model_folder, tmp_path, monkeypatch, capsys):
    if "from trl" in snippet:
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    snippet = snippet.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model_folder))
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})  # noqa: S102


def test_every_command_of_the_readme_exists(capsys):
    from typer.testing import CliRunner

    from cit_fast.cli import app

    for name in set(re.findall(r"cit-fast (\w+)", README + GUIDE)):
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, name


def test_every_file_that_is_named_exists():
    for text, folder in ((README, ROOT), (GUIDE, ROOT), (RESULTS, ROOT / "bench")):
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
            assert (folder / target).exists(), target


def test_every_preset_is_in_the_readme_in_its_own_words():
    from cit_fast.methods.config import descriptions, sources

    rows = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+?) \|$", README, flags=re.MULTILINE)
    assert rows == [(name, says, sources()[name]) for name, says in descriptions().items()]
