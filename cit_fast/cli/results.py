"""Commands that report, score again, answer and export."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cit_fast.cli.app import OfStage, Runs, app, run_folders, warnings_as_lines
from cit_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cit_fast.evaluation import Rescored


@app.command(epilog="Example: cit-fast report runs/quickstart --output report.html")
def report(
    runs: Runs,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file to write.")] = None,
) -> None:
    """Write one self-contained HTML page, and PNGs beside it, about one or several runs."""
    from cit_fast.report import collect, comparison_table, write_report

    read = collect(run_folders(runs))
    console = Console()
    path = write_report(read, output)
    console.print(comparison_table(read))
    console.print(f"Report: {path}", highlight=False, markup=False, soft_wrap=True)


@app.command(name="eval", epilog="Example: cit-fast eval runs/quickstart/ema --stage 2")
def evaluate(
    runs: Runs,
    write: Annotated[bool, typer.Option("--write", help="Store the recomputed scores in the runs.")] = False,
    allow_custom_metrics: Annotated[
        bool, typer.Option("--allow-custom-metrics", help="Call metrics that a run names by dotted path.")
    ] = False,
    stage: OfStage = None,
) -> None:
    """Recompute every score and violation of RUN from its stored predictions, without the model; exit code 1 if any
    differs.
    """
    from cit_fast.evaluation import rescore

    console = Console()
    scores = violations = changed = 0
    for folder in run_folders(runs):
        table = Table(title=escape(str(folder)))
        for column in ("stage", "task", "metric", "recorded", "recomputed", "V", "examples"):
            table.add_column(column, justify="left" if column in {"task", "metric"} else "right")
        for entry in rescore(folder, write=write, allow_custom_metrics=allow_custom_metrics, stage=stage):
            scores += not entry.scores_agree
            violations += not entry.violations_agree
            changed += not entry.intact
            shown = ["-" if value is None else f"{value:.1f}" for value in (entry.recorded, entry.recomputed)]
            table.add_row(
                f"{entry.stage}", entry.task, entry.metric, *shown, _v_of(entry), f"{entry.examples}",
                style=None if entry.agrees else "bold red",
            )  # fmt: skip
        console.print(table)
    counts = {"scores": scores, "V-scores": violations, "files of predictions": changed}
    differ = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    console.print(f"Not as recorded: {differ}." if differ else "All recorded scores agree.")
    if differ:
        raise typer.Exit(1)


def _v_of(entry: Rescored) -> str:
    """The V-score of one task; as recorded and as recomputed where they differ."""
    was, again = ("-" if value is None else f"{value:.1f}" for value in (entry.v, entry.v_again))
    return was if entry.violations_agree else f"{was} ≠ {again}"


@app.command(epilog="Example: cit-fast generate runs/quickstart/ema --prompts prompts.txt --show-adapter")
def generate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file, one prompt per line, or .jsonl; otherwise standard input, one per line."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time, whatever their adapter sets.")] = 16,
    show_adapter: Annotated[
        bool, typer.Option("--show-adapter", help="Print the adapter set that answered, and a tab, before each answer.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per prompt: prompt, adapter, answer.")
    ] = False,
    stage: OfStage = None,
) -> None:
    """Answer prompts with the model of RUN's last stage, one answer per line."""
    from cit_fast.inference.continual_model import ContinualModel

    lines = _prompts(prompts)
    asked = [line for line in lines if line.strip()]
    with warnings_as_lines():
        model = ContinualModel.from_run(run_folder, stage=stage)
    sets = model.route(asked) if model.router is not None else None
    answers = model.generate(asked, max_new_tokens=max_new_tokens, batch_size=batch_size, adapters=sets)
    answered = iter(zip(sets or ["model"] * len(asked), answers, strict=True))
    for line in lines:  # a blank one has a blank answer, so that lines match
        name, answer = next(answered) if line.strip() else ("", "")
        if as_json:
            typer.echo(json.dumps({"prompt": line, "adapter": name, "answer": answer}, ensure_ascii=False))
        else:
            typer.echo((f"{name}\t" if show_adapter else "") + answer.replace("\n", "\\n"))


@app.command(epilog="Example: cit-fast serve runs/quickstart/ema --port 8000 --follow")
def serve(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time, whatever their adapter sets.")] = 16,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused.")] = 256,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that a request may take.")] = 300.0,
    upstream: Annotated[
        str | None,
        typer.Option(help="Address of a vLLM or SGLang server that holds the sets; then only the router runs here."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Serve the last stage also when learning or a rollback makes it another.")
    ] = False,
    stage: OfStage = None,
) -> None:
    """Serve RUN to OpenAI-compatible clients: the model `auto` is, for each prompt, the set that the router chooses.
    Where CIT_FAST_API_KEY is set, clients must send it; CIT_FAST_UPSTREAM_API_KEY is sent to the server of --upstream.
    """
    missing = [name for name in ("starlette", "uvicorn", "httpx") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve: {', '.join(missing)} not installed; pip install 'cit-fast[serve]'")
    from cit_fast.inference.server import serve as serve_run

    with warnings_as_lines():
        serve_run(
            run_folder, host=host, port=port, stage=stage, batch_size=batch_size, most_waiting=waiting, timeout=timeout,
            upstream=upstream, follow=follow, say=typer.echo,
        )  # fmt: skip


def _prompts(path: Path | None) -> list[str]:
    """One prompt per line; of a ``.jsonl`` file a text, or the "prompt" of an object, which may have new lines."""
    from cit_fast.data.readers import kind, text_of_file

    where = path or "standard input"
    try:
        text = text_of_file(path) if path is not None else sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason})") from None
    lines = text.split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    lines = [line.removesuffix("\r") for line in lines]
    if path is not None and kind(path) == ".jsonl":
        lines = [_prompt_of_record(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if not any(map(str.strip, lines)):
        raise DataError(f"{where}: no prompts; give one per line")
    return lines


def _prompt_of_record(line: str, where: str) -> str:
    try:
        record = json.loads(line) if line.strip() else ""
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: broken JSON: {error}") from None
    prompt = record.get("prompt") if isinstance(record, dict) else record
    if not isinstance(prompt, str):
        raise DataError(f"{where}: a prompt must be a text, or an object with a text under 'prompt'")
    return prompt


@app.command(epilog="Example: cit-fast export runs/quickstart/ema exported --for vllm")
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.")],
    merge: Annotated[
        str | None, typer.Option(metavar="SET", help="Merge this adapter set into the base model's weights.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of merged weights; auto: the base model's. float32 loses nothing of a small update."),
    ] = "auto",
    license_: Annotated[
        str, typer.Option("--license", help="The weights' licence, for the model cards: apache-2.0, mit, ...")
    ] = "unknown",
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload OUT to the model hub, as `hf auth login` says.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that --push makes is private.")] = False,
    engine: Annotated[
        Literal["vllm"] | None, typer.Option("--for", help="Write a script beside the sets that serves them.")
    ] = None,
    router: Annotated[
        bool, typer.Option("--router", help="Write OUT/router.safetensors, too, and OUT/route.py, which needs numpy.")
    ] = False,
    stage: OfStage = None,
) -> None:
    """Write RUN's adapter sets as PEFT folders OUT/SET or, merged, as the transformers model OUT."""
    from cit_fast.inference.export import export_adapters, export_merged

    if engine is not None and merge is not None:
        raise ConfigError("export: --merge writes one model, which any engine serves; leave out --for")
    if router and merge is not None:
        raise ConfigError("export: --merge writes one model, which needs no router; leave out --router")

    console = Console(soft_wrap=True)
    with warnings_as_lines():
        if merge is None:
            names = export_adapters(run_folder, out, stage, engine, license_, router)
            console.print(f"PEFT adapters in {out}: {', '.join(names)}", highlight=False, markup=False)
            if engine is not None:
                start = f"Serve them: {out / 'start-vllm.sh'}; their router: cit-fast serve {run_folder} --upstream URL"
                console.print(start, highlight=False, markup=False)
        else:
            export_merged(run_folder, out, merge, stage=stage, dtype=dtype, license_=license_)
            console.print(f"Model and tokenizer with {merge} merged: {out}", highlight=False, markup=False)
        if push is not None:
            from cit_fast.inference.model_card import push as upload

            console.print(f"Pushed: {upload(out, push, private)}", highlight=False, markup=False)
