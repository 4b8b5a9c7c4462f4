"""Commands about data, models and this machine: what there is, and what can be measured without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cit_fast.cli.app import OfStage, app, check_output, progress_bars
from cit_fast.errors import ConfigError, DataError
from cit_fast.text import cut

DataPlaces = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="Files and folders of instruction data, a task each; folders of such; 'builtin', or a built-in task.",
    ),
]


@app.command(epilog="Example: cit-fast streams --root data")
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


@app.command(epilog="Example: cit-fast presets")
def presets() -> None:
    """List the methods that a configuration can name: what each does, and whose it is."""
    from cit_fast.methods.config import descriptions, sources

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for (name, says), source in zip(descriptions().items(), sources().values(), strict=True):
        table.add_row(f"[bold]{name}[/bold]", says, f"[dim]{source}[/dim]")
    Console().print(table)


@app.command(epilog="Example: cit-fast distances units dates data/mine --out distances")
def distances(
    data: DataPlaces,
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

    check_output(out)
    with progress_bars() as progress:
        result = distances_between(data, embedder, weights=weights, metric=metric, method=method, progress=progress)
    console = Console()
    for table in distance_tables(result, console.width):
        console.print(table)
        console.print()
    console.print(how_measured(result), highlight=False, markup=False)
    console.print(f"Page: {write_distances(result, out)}", highlight=False, markup=False, soft_wrap=True)


@app.command(
    epilog="Example: cit-fast pool data/mine --chat '{base_url: http://localhost:8000/v1, model: m}' --output pool.json"
)
def pool(
    data: DataPlaces,
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
    from cit_fast.cache import cache_folder
    from cit_fast.key_parts.sources import chat_of
    from cit_fast.key_parts.wordings import chat_pools, write_pools
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


@app.command(epilog="Example: cit-fast score HuggingFaceTB/SmolLM2-135M-Instruct units intents")
def score(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, a hub name, an adapter folder, or a run folder.")
    ],
    data: DataPlaces,
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
    stage: OfStage = None,
) -> None:
    """Measure how far a model's answers depend on the words that define each task: a table, a histogram, JSONL."""
    from cit_fast.analysis.key_part_gains import how_scored, score_model
    from cit_fast.report.key_part_gains import score_tables, write_scores

    check_output(out)
    with progress_bars() as progress:
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
            stage=stage,
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


@app.command(epilog="Example: cit-fast doctor")
def doctor() -> None:
    """Say which backends exist on this machine, and why the others do not; check and time the kernels of its GPU."""
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
    kernels = _kernels_here()
    if kernels.row_count:
        console.print(kernels)
    console.print(
        f"CPU  {environment['cpu']}, {environment['cores']} cores, {environment['threads']} threads", highlight=False
    )
    console.print(f"GPU  {environment['gpu'] or 'none that torch can use'}", highlight=False, markup=False)
    versions = "  ".join(f"{name} {version}" for name, version in environment["versions"].items())
    console.print(versions, highlight=False, markup=False)


def _kernels_here() -> Table:
    """What is known of the kernels on the current GPU, each op in a row; without a GPU no rows."""
    import torch

    from cit_fast.ops import self_check

    table = Table(title="Kernels on this GPU, and how many times faster they are than what serves without them")
    table.title_justify = "left"
    for column in ("op", "dtype", "backend", "state"):
        table.add_column(column)
    for size in self_check.SIZES:
        table.add_column(f"on {size}", justify="right")
    if not torch.cuda.is_available():
        return table
    for op, dtype, backend, verdict in self_check.every_verdict(torch.device("cuda", torch.cuda.current_device())):
        state = "[green]verified[/green]" if verdict.problem is None else f"[red]{escape(verdict.problem)}[/red]"
        gains = [f"{verdict.gain(size):.2f}" if size in verdict.seconds else "" for size in self_check.SIZES]
        table.add_row(op, dtype, backend.value, state, *gains)
    return table
