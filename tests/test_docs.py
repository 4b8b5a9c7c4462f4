"""README and docs: every block of code runs or is taken, every link leads somewhere, and the site is built strictly.

Python blocks run on the tiny model in place of the real one; commands are parsed, and YAML is checked.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml

from cit_fast import cli
from cit_fast.methods.config import presets
from cit_fast.methods.registry import PARTS
from cit_fast.run.config import RunConfig
from cit_fast.run.schema import config_schema
from cit_fast.run.yaml_file import read_yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "bench" / "RESULTS.md"]
TEXT = {path: path.read_text(encoding="utf-8") for path in LINKED}


def blocks(language: str) -> list:
    """Every block of code in a language, by page and first line."""
    return [
        pytest.param(block, id=f"{path.stem}-{block.splitlines()[0][:40]}")
        for path in PAGES
        for block in re.findall(rf"^```{language}\n(.*?)^```", TEXT[path], flags=re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # Trainer's default, without a GPU
@pytest.mark.parametrize("snippet", blocks("python"))
def test_snippet_runs(snippet, tiny_model_folder, tmp_path, monkeypatch, capsys):
    if "from trl" in snippet:
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    snippet = snippet.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model_folder))
    exec(compile(snippet, "snippet", "exec"), {"__name__": "__main__"})  # noqa: S102


def test_the_readme_has_a_snippet_for_each_way_in():
    snippets = re.findall(r"^```python\n(.*?)^```", TEXT[ROOT / "README.md"], flags=re.DOTALL | re.MULTILINE)
    assert [name for text, name in zip(snippets, ("optim", "ContinualTrainer", "ops"), strict=True) if name in text]


COMMANDS = typer.main.get_command(cli.app).commands
TARGETS = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_are_taken(block):
    """Parsed, which must not fail, and not run; what stands behind a ``>`` is the shell's."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if words[:1] == ["make"]:
            assert words[1] in TARGETS
        if "cit_fast.cli" in words:
            words = ["cit-fast", *words[words.index("cit_fast.cli") + 1 :]]
        if words[:1] == ["cit-fast"]:
            COMMANDS[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_in_the_text_exist(path):
    for name in set(re.findall(r"`cit-fast ([a-z]\w*)", TEXT[path])):
        assert name in COMMANDS


@pytest.fixture(scope="module")
def validator():
    return jsonschema.Draft202012Validator(config_schema())


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_is_a_configuration_or_a_part_of_one(block, validator, tmp_path):
    (tmp_path / "block.yaml").write_text(block, encoding="utf-8")
    given = read_yaml(tmp_path / "block.yaml")
    validator.validate(given)
    RunConfig.model_validate(given)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_yaml_in_the_text_has_keys_that_exist(path, validator):
    sections = "|".join([*PARTS, "adapter", "data", "evaluation", "gate", "memory", "model", "training"])
    for span in re.findall(rf"`((?:{sections}): \{{[^`]*\}})`", TEXT[path]):
        if "..." not in span:
            given = yaml.safe_load(re.sub(r"\b[A-Z]\b", "1", span))  # {sample: K}
            of_method = next(iter(given)) in PARTS
            validator.validate({"methods": [{"preset": "sequential", **given}]} if of_method else given)


def slugs(path: Path) -> set[str]:
    """What a page's headings are called in links, the targets that it names itself, and those of what it includes."""
    included = re.findall(r"^```{include} (\S+)$", TEXT[path], re.MULTILINE)
    without_code = re.sub(r"^```.*?^```", "", TEXT[path], flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    own = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
    named = re.findall(r"^\(([\w-]+)\)=$", TEXT[path], flags=re.MULTILINE)
    return own.union(named, *(slugs((path.parent / name).resolve()) for name in included))


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(((?![\w+]+:)[^)#\s]*)(?:#([\w.-]+))?\)", TEXT[path]):
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), target
        if anchor and "<!-- generated" not in TEXT.get(found, ""):
            assert anchor in slugs(found), f"{target}#{anchor}"


def test_every_preset_is_told_of():
    told = "".join(text for path, text in TEXT.items() if path.is_relative_to(DOCS))
    assert [name for name in presets() if f"`{name}`" not in told] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_is_built_strictly(tmp_path):
    for package in ("furo", "latex2mathml", "myst_parser", "sphinx", "sphinxcontrib.mermaid"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", tmp_path / "doctrees", DOCS]
    built = subprocess.run([*command, tmp_path / "site"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert not built.stderr
    pages = {name: (tmp_path / "site" / f"{name}.html").read_text(encoding="utf-8") for name in GENERATED}
    assert [name for name in presets() if name not in pages["reference/presets"]] == []
    assert [name for name in COMMANDS if f'id="{name}"' not in pages["reference/commands"]] == []
    parts = [f"{kind}-{name}" for kind, names in PARTS.items() for name in names]
    assert [name for name in parts if f'id="{name}"' not in pages["reference/configuration"]] == []
    assert 'id="cit_fast.ops.token_gain"' in pages["reference/api/ops"]


GENERATED = ("reference/presets", "reference/commands", "reference/configuration", "reference/api/ops")
