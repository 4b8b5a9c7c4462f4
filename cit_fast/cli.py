"""The command line ``cit-fast``; ``cit-fast --help`` lists its commands."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cit_fast.errors import CitFastError, ConfigError, DataError, LeftOutWarning, RunError
from cit_fast.text import cut

if TYPE_CHECKING:
    from rich.progress import TaskID

    from cit_fast.evaluation import Rescored

app = typer.Typer(
    name="cit-fast",
    help="Continual instruction tuning that forgets less and costs almost nothing extra.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_debug = False


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error comes from.")] = False,
) -> None:
    """Continual instruction tuning that forgets less and costs almost nothing extra."""
    global _debug  # noqa: PLW0603  # an option of every command, read where errors are printed
    _debug = debug


OfStage = Annotated[int | None, typer.Option("--stage", min=1, help="Of this stage instead of the last.")]
Runs = Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold run folders.", metavar="RUN...")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The YAML configuration.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override one key; may be repeated.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be trained and what is not here yet; train nothing.")
    ] = False,
) -> None:
    """Train every method of CONFIG on its stream of tasks, or go on where an earlier call stopped. `cit-fast presets`
    lists the methods, `cit-fast streams` the streams of papers.
    """
    from cit_fast.report import collect, comparison_table, write_report
    from cit_fast.report.plan import print_plan
    from cit_fast.run.config import load_config
    from cit_fast.run.loop import ContinualTrainer

    settings = load_config(config, overrides or [])
    if plan:
        print_plan(settings, Console())
        return
    trainer = ContinualTrainer(settings)
    folders = trainer.run()
    if int(os.environ.get("RANK", "0")) != 0:
        return
    runs = collect(folders)
    report_path = write_report(runs, settings.folder / "report.html", title=settings.name)
    trainer.console.print(comparison_table(runs))
    trainer.console.print(f"Report: {report_path}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def learn(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    tasks: Annotated[list[str], typer.Argument(help="Task folders, data files or built-in names.", metavar="TASK...")],
) -> None:
    """Train more TASKs in a run that has ended or was interrupted, with its own method and settings. The data of its
    earlier tasks must still be there; the result is that of a run that had all tasks from the start.
    """
    from cit_fast.report import collect, comparison_table
    from cit_fast.run.learn import learn as learn_tasks

    console = Console()
    folder = learn_tasks(run, tasks, console)
    if int(os.environ.get("RANK", "0")) == 0:
        console.print(comparison_table(collect([folder])))


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a run has learned when, each task's score then and now, what has fallen, and the disk that it takes."""
    from cit_fast.report.status import status as of_run
    from cit_fast.report.status import status_table

    found = of_run(run)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        Console().print(status_table(found))


@app.command()
def streams(
    root: Annotated[
        Path | None, typer.Option(help="A folder with data: say which parts of each stream are there.")
    ] = None,
) -> None:
    """List the streams of tasks that papers use, for `data: {stream: NAME/ORDER, root: FOLDER}`."""
    from cit_fast.data.streams import missing_parts, stream_files

    console = Console()
    for stream in stream_files().values():
        order = next(iter(stream.orders))
        console.print(f"[bold]{stream.name}[/bold]  {escape(stream.says)}", highlight=False)
        console.print(f"  orders: {', '.join(stream.orders)} ({len(stream.orders[order])} tasks)", highlight=False)
        console.print(f"  from: {escape(stream.source)}", highlight=False)
        console.print(f"  data: {escape(stream.where)}", highlight=False)
        if root is not None:
            missing = missing_parts(stream, order, root)
            there = len(stream.orders[order]) - len(missing)
            said = f"  below {root}: {there} of {len(stream.orders[order])} tasks"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
            for problem in list(missing.values()) if there else []:
                console.print(f"    {problem}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def presets() -> None:
    """List the methods that a configuration can name: what each does, and whose it is."""
    from cit_fast.methods.config import descriptions, sources

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for (name, says), source in zip(descriptions().items(), sources().values(), strict=True):
        table.add_row(f"[bold]{name}[/bold]", says, f"[dim]{source}[/dim]")
    Console().print(table)


@app.command()
def report(
    runs: Runs,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file to write.")] = None,
) -> None:
    """Write one self-contained HTML page, and PNGs beside it, about one or several runs."""
    from cit_fast.report import collect, comparison_table, write_report

    read = collect(_run_folders(runs))
    console = Console()
    path = write_report(read, output)
    console.print(comparison_table(read))
    console.print(f"Report: {path}", highlight=False, markup=False, soft_wrap=True)


@app.command(name="eval")
def evaluate(
    runs: Runs,
    write: Annotated[bool, typer.Option("--write", help="Store the recomputed scores in the runs.")] = False,
    allow_custom_metrics: Annotated[
        bool, typer.Option("--allow-custom-metrics", help="Call metrics that a run names by dotted path.")
    ] = False,
) -> None:
    """Recompute every score and violation of RUN from its stored predictions, without the model; exit code 1 if any
    differs.
    """
    from cit_fast.evaluation import rescore

    console = Console()
    scores = violations = changed = 0
    for folder in _run_folders(runs):
        table = Table(title=escape(str(folder)))
        for column in ("stage", "task", "metric", "recorded", "recomputed", "V", "examples"):
            table.add_column(column, justify="left" if column in {"task", "metric"} else "right")
        for entry in rescore(folder, write=write, allow_custom_metrics=allow_custom_metrics):
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


@app.command()
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
    with _warnings_as_lines():
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


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.")],
    merge: Annotated[
        str | None, typer.Option(metavar="SET", help="Merge this adapter set into the base model's weights.")
    ] = None,
    stage: OfStage = None,
) -> None:
    """Write RUN's adapter sets as PEFT folders OUT/SET or, merged, as the transformers model OUT."""
    from cit_fast.inference.export import export_adapters, export_merged

    console = Console(soft_wrap=True)
    with _warnings_as_lines():
        if merge is None:
            names = export_adapters(run_folder, out, stage)
            console.print(f"PEFT adapters in {out}: {', '.join(names)}", highlight=False, markup=False)
        else:
            export_merged(run_folder, out, merge, stage=stage)
            console.print(f"Model and tokenizer with {merge} merged: {out}", highlight=False, markup=False)


@app.command()
def distances(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Files and folders of instruction data, a task each; folders of such; 'builtin', or a built-in task.",
        ),
    ],
    embedder: Annotated[
        str,
        typer.Option(
            metavar="tokens|sentence|MODEL",
            help="What embeds an instruction: the mean token embedding of the quickstart's model, a sentence model, "
            "or a model folder or hub name.",
        ),
    ] = "tokens",
    weights: Annotated[
        str,
        typer.Option(metavar="real|uniform", help="An instruction counts by its share of the examples, or like any."),
    ] = "real",
    method: Annotated[
        str,
        typer.Option(
            metavar="auto|exact|sinkhorn", help="auto: exact unless that would take more than about a minute."
        ),
    ] = "auto",
    metric: Annotated[str, typer.Option(metavar="cosine|euclidean|sqeuclidean")] = "cosine",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the table, the picture and the page.")] = Path(
        "distances"
    ),
) -> None:
    """Measure how far instruction sets are from each other: a table, a clustered heat map, CSV and Parquet."""
    from cit_fast.analysis.distances import distances_between, how_measured
    from cit_fast.report.distances import distance_tables, write_distances

    _check_output(out)
    with _progress_bars() as progress:
        result = distances_between(data, embedder, weights=weights, metric=metric, method=method, progress=progress)
    console = Console()
    for table in distance_tables(result, console.width):
        console.print(table)
        console.print()
    console.print(how_measured(result), highlight=False, markup=False)
    console.print(f"Page: {write_distances(result, out)}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def pool(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Files and folders of instruction data, a task each; folders of such; 'builtin', or a built-in task.",
        ),
    ],
    chat: Annotated[
        str,
        typer.Option(
            metavar="{base_url: ..., model: ...}",
            help="Who rewords: an OpenAI-compatible endpoint, or '{local: a model folder or hub name}'.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")] = Path("pool.json"),
    size: Annotated[int, typer.Option(min=2, max=31, help="Wordings per task, its own included.")] = 31,
    seed: Annotated[int, typer.Option(help="Of what is reworded, and how, at each evolution.")] = 0,
) -> None:
    """Have the instruction of each task reworded into a pool for KPIG: one file, to be reviewed and shared."""
    from cit_fast.analysis.read_tasks import read_tasks
    from cit_fast.key_parts.sources import chat_of
    from cit_fast.key_parts.wordings import chat_pools, write_pools
    from cit_fast.models.pretrained import cache_folder
    from cit_fast.run.yaml_file import parse_yaml

    spec = parse_yaml(chat, "--chat")
    if not isinstance(spec, dict):
        raise ConfigError(f"--chat: {chat!r}; expected options such as '{{base_url: ..., model: ...}}'")
    asked = chat_of(spec, cache_folder())
    examples = [example for task in read_tasks(data) for example in task.train]
    pools = chat_pools(examples, asked, size, seed)
    if not pools:
        raise DataError(
            f"{' '.join(data)}: no task has an instruction that can be reworded (each example needs an input beside "
            "it, and a task at most 31 wordings)"
        )
    write_pools(output, pools, {**asked.identity, "size": size, "seed": seed})
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for task, wordings in pools.items():
        table.add_row(f"[bold]{task}[/bold]", f"{len(wordings)} wordings", cut(wordings[-1].instruction))
    console = Console()
    console.print(table)
    console.print(f"Pool: {output}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def score(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, a hub name, an adapter folder, or a run folder.")
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Files and folders of instruction data, a task each; folders of such; 'builtin', or a built-in task.",
        ),
    ],
    key_parts: Annotated[
        str,
        typer.Option(
            metavar="data|discover|{llm: ...}",
            help="The words to mask: those that the data marks; clauses that carry the most information, found under "
            "the model itself; or as a chat model names them, e.g. '{llm: {base_url: ..., model: ...}}'.",
        ),
    ] = "data",
    markers: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="OPEN CLOSE", help="Marks around key parts in the text of instructions, e.g. '[[' ']]'."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Examples per task.")] = 50,
    alpha: Annotated[float, typer.Option(help="Decay of the gain per token of the answer.")] = 0.3,
    threshold: Annotated[float, typer.Option(help="A gain below this counts as low.")] = 0.05,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens of an example at most; inputs are cut to fit. Default: 1024.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at a time.")] = 8,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the scores and the picture.")] = Path("score"),
) -> None:
    """Measure how far a model's answers depend on the words that define each task: a table, a histogram, JSONL."""
    from cit_fast.analysis.key_part_gains import how_scored, score_model
    from cit_fast.report.key_part_gains import score_tables, write_scores

    _check_output(out)
    with _progress_bars() as progress:
        result = score_model(
            model,
            data,
            key_parts=key_parts,
            markers=markers,
            examples=examples,
            alpha=alpha,
            threshold=threshold,
            max_length=max_length,
            batch_size=batch_size,
            progress=progress,
        )
    console = Console()
    for table in score_tables(result, console.width):
        console.print(table)
        console.print()
    console.print(how_scored(result), highlight=False, markup=False)
    if result.unseen is not None:
        console.print(result.unseen, highlight=False)
    console.print(f"Picture: {write_scores(result, out)}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say which backends exist on this machine, and why the others do not."""
    from cit_fast.ops.backends import available_backends
    from cit_fast.run.environment import describe_environment

    console = Console()
    environment = describe_environment()
    table = Table(title="Backends", title_justify="left")
    for column in ("backend", "here", "why"):
        table.add_column(column)
    for name, status in available_backends().items():
        table.add_row(name, "[green]yes[/green]" if status.available else "[red]no[/red]", escape(status.reason))
    console.print(table)
    console.print(
        f"CPU  {environment['cpu']}, {environment['cores']} cores, {environment['threads']} threads", highlight=False
    )
    console.print(f"GPU  {environment['gpu'] or 'none that torch can use'}", highlight=False, markup=False)
    versions = "  ".join(f"{name} {version}" for name, version in environment["versions"].items())
    console.print(versions, highlight=False, markup=False)


def _run_folders(paths: list[Path]) -> list[Path]:
    folders: list[Path] = []
    for path in paths:
        inner = sorted(child.parent for child in path.glob("*/run.json"))
        if (path / "run.json").exists() or not inner:
            folders.append(path)
        else:
            folders += inner
    return folders


def _check_output(folder: Path) -> None:
    """Refuse an output that is a file before anything is measured."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: cannot be written (it is no folder)")


@contextlib.contextmanager
def _progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows how far something has come: its name, how much is done, how much there is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        started: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in started:
                started[what] = bars.add_task(what)
            bars.update(started[what], completed=done, total=total)

        yield progress


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What was left out, as one line each without the place in the code."""
    console, show_others = Console(stderr=True, soft_wrap=True), warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, LeftOutWarning):
            console.print(f"[bold yellow]warning:[/bold yellow] {escape(str(message))}", highlight=False)
        else:
            show_others(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", LeftOutWarning)
        warnings.showwarning = show
        yield


class _Interrupted(BaseException):
    """Ctrl-C under a name that typer does not take for itself."""


@contextlib.contextmanager
def _interrupt_as_our_own() -> Iterator[None]:
    def interrupted(_signal: int, _frame: object) -> None:
        raise _Interrupted

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """Run the command line; an error a user can act on is one line and exit code 2."""
    # Hide deprecation warnings of transformers, PEFT and Accelerate: a user of the command cannot act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|accelerate")
    try:
        with _interrupt_as_our_own():
            app()
    except CitFastError as error:
        console = Console(stderr=True, soft_wrap=True)
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
        if _debug:
            traceback.print_exception(error)
        elif error.__cause__ is not None:
            console.print("(cit-fast --debug shows where it comes from)", style="dim", highlight=False)
        raise SystemExit(2) from None
    except _Interrupted:
        Console(stderr=True).print("Stopped. The same command goes on from the last checkpoint.")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
