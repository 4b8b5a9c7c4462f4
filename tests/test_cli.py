from __future__ import annotations

import io
import json
import shlex
import signal
import sys

import pytest
import typer
import yaml

from cit_fast import cli
from cit_fast.key_parts.wordings import read_pools
from cit_fast.methods.config import descriptions

STREAM = ["units", "records"]


@pytest.fixture
def config(tmp_path, tiny_model_folder, monkeypatch, quick_collections):
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "tiny",
                "output": str(tmp_path / "runs"),
                "methods": ["sequential", "lcia-ema"],
                "model": {"name": str(tiny_model_folder)},
                "adapter": {"r": 2, "target_modules": "all-linear"},
                "data": {"tasks": STREAM, "train": 8, "test": 2, "max_length": 256},
                "training": {"per_device_train_batch_size": 4, "use_cpu": True},
                "evaluation": {"max_new_tokens": 4},
            }
        )
    )
    return path


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["cit-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_run_report_eval_generate(edit_record, config, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "run", config, "--set", "seed=3") == 0
    printed = capsys.readouterr().out
    assert "sequential" in printed
    assert "lcia-ema" in printed
    assert "Forgetting" in printed or "forgetting" in printed
    report = tmp_path / "runs" / "report.html"
    assert str(report) in printed
    assert report.read_text().count("data:image/png;base64,") >= 5

    assert call(monkeypatch, "run", config, "--set", "seed=3") == 0
    assert capsys.readouterr().out.count("already finished, nothing to do") == 2

    assert call(monkeypatch, "report", tmp_path / "runs", "-o", tmp_path / "other.html") == 0
    assert (tmp_path / "other.html").exists()
    capsys.readouterr()

    assert call(monkeypatch, "eval", tmp_path / "runs" / "sequential") == 0
    assert "All recorded scores agree." in capsys.readouterr().out
    stage = tmp_path / "runs/sequential/stages/02/stage.json"
    record = json.loads(stage.read_text())
    edit_record(stage, scores={**record["scores"], "units": record["scores"]["units"] + 1})
    assert call(monkeypatch, "eval", tmp_path / "runs" / "sequential") == 1
    assert "Not as recorded: 1 scores." in capsys.readouterr().out
    violations = {**record["violations"], "units": {"WFR": 12.5, "WR": 12.5}}
    edit_record(stage, scores=record["scores"], violations=violations)
    assert call(monkeypatch, "eval", tmp_path / "runs" / "sequential") == 1
    printed = capsys.readouterr().out
    assert "12.5 ≠ " in printed
    assert "Not as recorded: 1 V-scores." in printed

    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"\xef\xbb\xbfConvert: 2 km\r\n\r\nConvert:\xe2\x80\xa83\x0ckg\r\n")
    generate = ["generate", tmp_path / "runs/sequential", "--max-new-tokens", 3, "--json", "--prompts"]
    assert call(monkeypatch, *generate, prompts) == 0
    answered = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert [each["prompt"] for each in answered] == ["Convert: 2 km", "", "Convert:\u20283\x0ckg"]
    assert answered[1]["answer"] == ""
    listed = tmp_path / "prompts.jsonl"
    listed.write_text('"Convert:\\n\\n2 km"\n{"prompt": "Convert: 3 kg"}\n')
    assert call(monkeypatch, *generate, listed) == 0
    answered = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert answered == ["Convert:\n\n2 km", "Convert: 3 kg"]
    for line, said in (("{}", "a prompt must be a text"), ("[", "broken JSON"), ("[" * 9999, "broken JSON")):
        listed.write_text(line)
        assert call(monkeypatch, *generate, listed) == 2
        assert f"{listed}:1: {said}" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Convert: 2 km\n"))
    assert call(monkeypatch, "generate", tmp_path / "runs/sequential", "--max-new-tokens", 3) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1

    options = ("--examples", 2, "--out", tmp_path / "score")
    assert call(monkeypatch, "score", tmp_path / "runs/lcia-ema", "units", *options) == 0
    assert "All 2 examples by gain" in capsys.readouterr().out


def test_a_run_learns_more_tasks(config, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "run", config, "--set", "methods=[sequential]") == 0
    run = tmp_path / "runs/sequential"
    capsys.readouterr()
    for _ in range(2):  # the second call finds it done
        assert call(monkeypatch, "learn", run, "dates", "times") == 0
        assert "sequential" in capsys.readouterr().out
    assert json.loads((run / "run.json").read_text())["tasks"] == [*STREAM, "dates", "times"]
    assert len(list(run.glob("stages/*/stage.json"))) == 5
    for arguments, message in (
        (("learn", run, "nothing"), "nothing"),
        (("learn", tmp_path / "nowhere", "dates"), "run.json: not there"),
        (("learn", run, "plurals", "plurals"), "plurals"),
    ):
        capsys.readouterr()
        assert call(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
    assert len(list(run.glob("stages/*/stage.json"))) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.yaml"], "nothing.yaml: no such file"),
        (["run", "CONFIG", "--set", "seeed=1"], "seeed: unknown key; did you mean 'seed'?"),
        (["run", "CONFIG", "--set", "data.tasks=[unitz]"], "did you mean"),
        (["run", "CONFIG", "--set", "version=7"], "version: configuration version 7"),
        (["report", "nowhere"], "run.json: not there"),
        (["eval", "nowhere"], "run.json: not there"),
        (["generate", "nowhere", "--prompts", "missing.txt"], "missing.txt:1: no such file"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(config, monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *[config if a == "CONFIG" else a for a in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "out\n', "train.jsonl:2: "),
        ('{"instruction": "a"}\n', "train.jsonl:1: "),
        ("", "train.jsonl"),
    ],
)
def test_bad_data_names_file_and_line(config, monkeypatch, capsys, tmp_path, content, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text(content)
    tasks = json.dumps([{"path": str(tmp_path / "mine")}])
    assert call(monkeypatch, "run", config, "--set", f"data.tasks={tasks}") == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_unknown_metric(config, monkeypatch, capsys, tmp_path):
    tasks = json.dumps([{"builtin": "units", "metric": "exact_mach"}])
    assert call(monkeypatch, "run", config, "--set", f"data.tasks={tasks}") == 2
    assert "task 'units': metric: unknown metric 'exact_mach'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def tasks(tmp_path):
    """Three tasks: two folders and a file."""
    for name, instructions in (("one", "ab"), ("two", "bc"), ("three", "xyz")):
        lines = [json.dumps({"instruction": f"Write {each}.", "input": "1", "output": "2"}) for each in instructions]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path / "data"


def test_presets_are_listed_in_their_own_words(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "presets") == 0
    listed = capsys.readouterr().out
    assert all(name in listed and says in listed for name, says in descriptions().items())


def test_distances(tasks, tiny_model_folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    options = ["--embedder", tiny_model_folder, "--out", tmp_path / "out"]
    assert call(monkeypatch, "distances", tasks, *options) == 0
    printed = capsys.readouterr().out
    assert "3 tasks, 3 pairs" in " ".join(printed.split())
    assert str(tmp_path / "out" / "distances.html") in printed
    rows = [line.split(",") for line in (tmp_path / "out" / "distances.csv").read_text().splitlines()]
    assert rows[0] == ["task", "one", "three", "two"]
    distance = {
        (row[0], name): float(value) for row in rows[1:] for name, value in zip(rows[0][1:], row[1:], strict=True)
    }
    assert 0 < distance["one", "two"] < distance["one", "three"]
    assert list((tmp_path / "cache" / "embeddings").glob("*/*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"distances.{kind}" for kind in ("csv", "html", "parquet", "png")
    ]
    many = [*options, "--weights", "uniform", "--metric", "euclidean", "--method", "sinkhorn"]
    assert call(monkeypatch, "distances", "units", "dates", tasks / "one.jsonl", *many) == 0
    assert "above the exact one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA/one.jsonl"], "only one task (one); distances need at least two"),
        (["DATA", "unitz"], "did you mean 'units'"),
        (["DATA/none.jsonl", "DATA"], "none.jsonl: no such file or folder"),
        (["DATA", "--embedder", "tokenz"], "embedder (tokens, sentence or a model): no folder 'tokenz'"),
        (["DATA", "--weights", "equal"], "weights: 'equal' is unknown"),
        (["DATA", "--method", "emd"], "method: 'emd' is unknown; expected one of auto, exact, sinkhorn"),
        (["DATA", "--metric", "l1"], "metric: 'l1' is unknown"),
        (["DATA", "--embedder", "MODEL", "--out", "DATA/one.jsonl"], "cannot be written"),
        (["DATA", "empty"], "task 'empty' is empty"),
        (["DATA", "broken.jsonl"], "broken.jsonl:1: broken JSON"),
    ],
)
def test_errors_of_distances(tasks, tiny_model_folder, monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "test.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "broken.jsonl").write_text("{")
    named = [word.replace("DATA", str(tasks)).replace("MODEL", str(tiny_model_folder)) for word in arguments]
    assert call(monkeypatch, "distances", *named) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ")
    assert message in printed


def test_no_prompts(config, monkeypatch, capsys, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert call(monkeypatch, "generate", tmp_path, "--prompts", empty) == 2
    assert "no prompts" in capsys.readouterr().err


def test_doctor_names_every_backend(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert call(monkeypatch, "doctor") == 0
    printed = capsys.readouterr().out
    for name in ("reference", "native", "triton", "cuda"):
        assert name in printed


def test_interrupt_is_not_a_stack_trace(monkeypatch, capsys):
    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("cit_fast.run.environment.describe_environment", interrupted)
    assert call(monkeypatch, "doctor") == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_pool_is_made_once_and_can_be_used(monkeypatch, capsys, tmp_path, serve):
    def respond(prompt, attempt):
        evolution = prompt.partition("(rewording ")[2].partition(",")[0]
        said = [{"instruction": f"Wording {evolution}: in one word.", "key_parts": ["in one word"]}]
        return 200, {"choices": [{"message": {"content": json.dumps(said)}}]}, {}

    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "pool.json"
    with serve(respond) as server:
        chat = f"{{base_url: {server.url}, model: stub}}"
        assert call(monkeypatch, "pool", "numbers", "--chat", chat, "-o", str(output), "--size", "4") == 0
        assert len(server.requests) == 3
    printed = capsys.readouterr().out
    assert "numbers" in printed
    assert "4 wordings" in printed
    content = json.loads(output.read_text())
    assert [len(wordings) for wordings in content["tasks"].values()] == [4]
    assert content["made_by"]["model"] == "stub"
    assert read_pools(output)["numbers"][1].instruction == "Wording 1: in one word."
    assert call(monkeypatch, "pool", "numbers", "--chat", "stub") == 2
    assert "--chat: 'stub'; expected options" in capsys.readouterr().err


def test_every_command_has_an_example_that_it_takes():
    """Parsed, which must not fail, and not run; what stands behind a ``>`` is the shell's."""
    commands = typer.main.get_command(cli.app).commands
    assert len(commands) > 15
    for name, command in commands.items():
        program, called, *arguments = shlex.split(command.epilog.removeprefix("Example: ").partition(" > ")[0])
        assert (program, called) == ("cit-fast", name)
        command.make_context(name, arguments)
