"""The configurations of papers: each plans without data or model, and runs at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from seq2seq_models import seq2seq_folder

from cit_fast import ContinualTrainer, cli
from cit_fast.data.streams import find_stream, stream_files
from cit_fast.evaluation import metrics, read_run, read_stages
from cit_fast.run import loop
from cit_fast.run.config import load_config
from cit_fast.run.plan import StagePlan, plan_run

FOLDER = Path(__file__).parents[2] / "examples" / "papers"
PAPERS = sorted(FOLDER.glob("*.yaml"))
each_paper = pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)


def toy_data(root: Path, stream: str, train: int = 4) -> None:
    """A few records of each task of a stream, in its format and where it looks for them."""
    for name, options in stream_files()[stream].tasks.items():
        path = root / options["path"]
        splits = options.get("splits", {"train": "train", "test": "test"})
        made = [record(options["format"], name, k) for k in range(train)]
        if options["format"] == "super_ni":
            made = [{**one, "output": [fitting(options, one["input"], one["output"][0])]} for one in made]
        records = dict.fromkeys(splits.values(), made)
        if options["format"] == "super_ni":
            records = {own: records_of(name, found) for own, found in records.items()}
        if path.suffix:  # one file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(records_of(name, [record("super_ni", name, k) for k in range(12)])))
            continue
        path.mkdir(parents=True, exist_ok=True)
        for own, found in records.items():
            (path / f"{own}.json").write_text(json.dumps(found))


def fitting(options: dict, given: str, answer: str) -> str:
    """An answer that keeps to what the stream says of the task's answers."""
    if options.get("extractive"):
        return given
    pattern = options.get("answer_pattern", "")
    return "a MemberOf b" if "MemberOf" in pattern else "a >causes> b" if "causes" in pattern else answer


def record(kind: str, name: str, k: int) -> dict:
    asked, answer = f"Say {name} and the number. {k}", f"{name.lower()} {k}"
    if kind == "super_ni":
        return {"input": f"text {k}", "output": [answer]}
    if kind == "trace":
        return {"prompt": asked, "answer": answer}
    if kind == "conversations":
        turn = f"Say: {asked}\nAnswer with {name} in a word."
        return {"conversations": [{"from": "human", "value": turn}, {"from": "gpt", "value": answer}]}
    return {"instruction": f"Say {name}.", "input": f"text {k}", "output": answer}


def records_of(name: str, instances: list[dict]) -> dict:
    shot = {"input": "text", "output": "x", "explanation": ""}
    return {"Definition": [f"Say {name} and the number."], "Positive Examples": [shot] * 2, "Instances": instances}


@pytest.fixture
def small(tmp_path, tiny_model_folder, monkeypatch):
    """``small(path)``: what makes a paper's configuration run here in seconds."""
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))

    def overrides(path: Path) -> list[str]:
        config = load_config(path)
        stream = config.data.stream.partition("/")[0]
        toy_data(tmp_path / stream, stream)
        encoder = "t5" in config.model.name
        model = seq2seq_folder(tmp_path / "t5", "t5") if encoder else tiny_model_folder
        return [
            f"data.root={tmp_path / stream}",
            f"output={tmp_path / 'runs'}",
            f"model={{name: {model}}}",
            "data.train=4",
            "data.test=1",
            f"data.max_length={1024 if encoder else 160}",  # whose tokens are bytes
            "data.on_overflow=truncate",
            "training={per_device_train_batch_size: 4, max_steps: 1, use_cpu: true, save_strategy: 'no'}",
            "evaluation={max_new_tokens: 2, tasks: {sample: 1}, untrained: false}",
        ]

    return overrides


@each_paper
def test_a_paper_plans_with_nothing_here(path, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    planned = plan_run(load_config(path))
    stream, order = find_stream(load_config(path).data.stream)
    for method, stages in planned.stages.items():
        named = [name for stage in stages for name in stage.tasks]
        assert named == stream.orders[order], method
    assert any(text.startswith("data ") for text in planned.missing)
    assert any("would be fetched from the hub" in text for text in planned.missing)
    monkeypatch.setattr("sys.argv", ["cit-fast", "run", str(path), "--plan"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr().out
    assert not ended.value.code
    assert "Not here: data" in printed
    assert "to be had from" in printed
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.slow
@each_paper
def test_a_paper_runs_at_toy_size(path, small, monkeypatch):
    monkeypatch.setattr(loop, "check_stream", lambda text, root: None)  # toy data has other digests
    monkeypatch.setitem(metrics.METRICS, "bertscore", metrics.METRICS["rouge_1"])  # its model is not here
    monkeypatch.setitem(metrics.METRICS, "iou", metrics.METRICS["exact_match"])  # toy answers are no boxes
    overrides = small(path)
    config = load_config(path, overrides)
    planned = plan_run(config)
    assert all("sha" in text.lower() or "another file" in text or "to be had" in text for text in planned.missing)
    raw = yaml.safe_load(path.read_text())
    methods = [reachable(method) for method in raw["methods"] if name_of(method) in RUN[path.stem]]
    values = {**config.model_dump(mode="json", exclude={"methods"}), "methods": methods}
    folders = ContinualTrainer(values, console=Console(quiet=True)).run()
    stream, order = find_stream(config.data.stream)
    for folder in folders:
        run, stages = read_run(folder), read_stages(folder)
        assert run.status == "finished"
        assert [name for stage in stages for name in stage.trained] == stream.orders[order]
        assert set(stages[-1].scores) == set(stream.tasks)


# Of every paper its own; the others run in other tests.
RUN = {
    "inscl-categories": ["inscl"],
    "kpig-ablations": ["kpig-no-mask"],
    "lcia-coin-llava7b": ["lcia"],
    "lcia-instrdialog": ["lcia-always"],
    "superni-15": ["kpig"],
    "switchcit-five": ["switchcit", "oracle"],
}


def name_of(method):
    return method if isinstance(method, str) else method.get("name", method["preset"])


def reachable(method):
    """A method of a paper without the models that only the hub has."""
    if isinstance(method, dict):
        method = json.loads(json.dumps(method))
        if method.get("router", {}).get("features"):
            method["router"]["features"] = "base"
        method.get("replay", {}).pop("tag_embedder", None)
    return method


def test_a_plan_is_what_the_run_does(settings, tmp_path, quick_collections):
    path = tmp_path / "run.yaml"
    training = {**settings["training"], "num_train_epochs": 2, "per_device_train_batch_size": 4}
    methods = ["sequential", {"preset": "random-replay", "replay": {"fraction": 0.5}}, "kpig", "joint"]
    data = {"tasks": ["units", "records"], "train": 8, "test": 2, "max_length": 256}
    path.write_text(yaml.safe_dump({**settings, "data": data, "methods": methods, "training": training}))
    config = load_config(path)
    planned = plan_run(config)
    assert planned.missing == []
    assert planned.exact
    assert planned.stages["sequential"][1] == StagePlan(
        ("records",), 8, 0, 4, planned.stages["joint"][0].tokens - planned.stages["sequential"][0].tokens, prompts=4
    )
    folders = ContinualTrainer(config, console=Console(quiet=True)).run()
    for folder in folders:
        stages = read_stages(folder)[1:]
        for stage, plan in zip(stages, planned.stages[folder.name], strict=True):
            assert (stage.steps, stage.train_examples) == (plan.steps, plan.examples)
            assert sum(stage.replayed.values()) == plan.replayed


def test_streams_are_listed(monkeypatch, capsys, tmp_path):
    toy_data(tmp_path, "trace-8")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["cit-fast", "streams", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert all(name in printed for name in stream_files())
    assert f"below {tmp_path}: 8 of 8 tasks" in printed
    assert f"below {tmp_path}: 0 of 15 tasks" in printed
