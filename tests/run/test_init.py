"""`cit-fast init`: what it writes can be run."""

from __future__ import annotations

import json

import jsonschema
import pytest
from typer.testing import CliRunner

from cit_fast import cli
from cit_fast.cli import app
from cit_fast.run.config import load_config
from cit_fast.run.new_config import GOALS, SCHEMA, new_config
from cit_fast.run.plan import plan_run
from cit_fast.run.yaml_file import read_yaml


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_what_it_writes_fits_and_can_be_planned(tmp_path, tiny_model_folder, goal, machine):
    path = tmp_path / "mine.yaml"
    asked = ["--model", str(tiny_model_folder), "--data", "units", "--data", "records", "--goal", goal]
    result = CliRunner().invoke(app, ["init", str(path), *asked, "--machine", machine])
    assert result.exit_code == 0, result.output
    assert f"cit-fast run {path} --plan" in result.output.replace("\n", "")
    config = load_config(path)
    assert config.name == "mine"
    assert [str(task) for task in config.data.tasks] == ["units", "records"]
    assert path.read_text().startswith(f"# yaml-language-server: $schema={SCHEMA}\n")
    jsonschema.validate(read_yaml(path), json.loads((tmp_path / SCHEMA).read_text()))
    plan = plan_run(config)
    assert not plan.missing
    assert all(len(stages) == 2 for stages in plan.stages.values())
    assert len(plan.stages) == (4 if goal == "compare" else 1)


def test_your_own_data(tmp_path):
    folder = tmp_path / 'tasks "mine"'
    folder.mkdir()
    text = new_config("a model: with a colon", [str(folder)], "one-model", "cpu", "x")
    (tmp_path / "x.yaml").write_text(text)
    config = load_config(tmp_path / "x.yaml")
    assert config.data.tasks == (str(folder),)
    assert config.data.train is None
    assert config.model.name == "a model: with a colon"


def test_it_asks_where_there_is_a_terminal(tmp_path, monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    answers = iter(["a/model", "units dates", "per-task"])
    monkeypatch.setattr("cit_fast.cli.setup.sys.stdin", Terminal())
    monkeypatch.setattr("cit_fast.cli.setup.typer.prompt", lambda *_, **__: next(answers))
    app(["init", str(tmp_path / "my run.yaml")], standalone_mode=False)
    config = load_config(tmp_path / "my run.yaml")
    assert (config.name, config.model.name, config.data.tasks) == ("my-run", "a/model", ("units", "dates"))
    assert [method.name for method in config.methods] == ["switch-tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "data: 'nowhere' is no file or folder, and no built-in task (dates, "),
        (["there.yaml"], "there.yaml: is there already; name another file"),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine")
    monkeypatch.setattr("sys.argv", ["cit-fast", "init", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", "")
    assert (tmp_path / "there.yaml").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["there.yaml"]
