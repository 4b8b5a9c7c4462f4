"""The server under load, beside ``transformers serve`` with the same model: does it lose anybody, and how fast is it?

    python -m bench.bench_server --results bench/results/server.json
    python -m bench.bench_server --tiny --change 5 --results bench/results/server-tiny.json    the first part alone

A short run of SmolLM2-135M-Instruct over three built-in tasks, a set each, is served by ``cit-fast serve --follow``.

1. ``--clients`` clients ask ``--requests`` each, of all tasks, while the run is rolled back beneath the server (its
   last set is gone) and forward again, by turns. Every request must have an answer. Answers are compared with those of
   the two stages in batches of the engine's size: in bfloat16 another batch may round otherwise, so it is a share.
2. The same clients ask both servers prompts of one task, ``--compared`` requests, in turns, ``--rounds`` times.
   transformers serves one model: that task's set merged into the base model. Ours chooses among three sets and the base
   for every prompt. ``transformers serve`` as it comes, and with its continuous batching where this machine can do it.

Each server is a process of its own with all cores; the clients, threads of this one, share them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
from rich.console import Console

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.files import write_file
from cit_fast.inference.export import export_merged
from cit_fast.run.environment import describe_environment
from cit_fast.run.rollback import rollback, undo_rollback
from tests.fuzz.models import model_folder

NEW = 24
TASKS = ["units", "records", "amounts"]
BATCH = 16


def trained(scratch: Path, steps: int, model: str) -> tuple[Path, list[str]]:
    """A run with a set for each task, and test prompts of all tasks in turns."""
    trainer = ContinualTrainer(
        {
            "methods": ["grouping-ema"],
            "output": str(scratch / "runs"),
            "model": {"name": model},
            "data": {"tasks": TASKS, "train": 128, "test": 32},
            "training": {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_steps": steps, "use_cpu": True},
            "evaluation": {"untrained": False, "tasks": {"sample": 1}, "max_new_tokens": NEW},
        },
        console=Console(quiet=True),
    )
    (folder,) = trainer.run()
    tasks = [[f"{each.instruction}\n\n{each.input}" for each in task.test] for task in trainer.stream]
    return folder, [prompt for prompts in zip(*tasks, strict=True) for prompt in prompts]


@contextlib.contextmanager
def served(command: Sequence[str], port: int) -> Iterator[str]:
    """A server in a process of its own; its address, once it answers."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        stack.callback(_ended, process)
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise RuntimeError(f"{' '.join(command)}: does not serve\n{log.read()[-2000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"


def _ended(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def asked(url: str, model: str, prompts: Sequence[str], clients: int) -> tuple[float, list[Any], int]:
    """Seconds, replies in order (``None`` for one that was lost), and answer tokens."""
    found: list[Any] = [None] * len(prompts)
    places = iter(range(len(prompts)))
    lock = threading.Lock()

    def work(_: int) -> None:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
            while True:
                with lock:
                    place = next(places, None)
                if place is None:
                    return
                said: Any = [{"role": "user", "content": prompts[place]}]
                with contextlib.suppress(openai.OpenAIError):
                    found[place] = client.chat.completions.create(
                        model=model, messages=said, max_tokens=NEW, temperature=0
                    )

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    seconds = time.perf_counter() - begun
    return seconds, found, sum(each.usage.completion_tokens for each in found if each is not None)


def under_load(folder: Path, prompts: Sequence[str], clients: int, requests: int, every_s: float) -> dict[str, Any]:
    """Many requests while a set goes and comes back every so many seconds."""
    right = []
    for stage in (2, None):
        model = ContinualModel.from_run(folder, device="cpu", stage=stage)
        right.append(dict(zip(prompts, model.generate(list(prompts), NEW, BATCH), strict=True)))
    every = [prompts[k % len(prompts)] for k in range(clients * requests)]
    port = free_port()
    command = [sys.executable, "-m", "cit_fast.cli", "serve", str(folder), "--port", str(port), "--follow"]
    with served([*command, "--batch-size", str(BATCH)], port) as url:
        ended, changes = threading.Event(), []

        def change() -> None:
            for step in itertools.count():
                if ended.wait(every_s):
                    return
                changes.append("rolled back" if step % 2 == 0 else "forward again")
                if step % 2 == 0:
                    rollback(folder, 2)
                else:
                    undo_rollback(folder)

        thread = threading.Thread(target=change)
        thread.start()
        seconds, replies, tokens = asked(url, "auto", every, clients)
        ended.set()
        thread.join()
        metrics = httpx.get(url.removesuffix("/v1") + "/metrics").text
    if len(changes) % 2:
        undo_rollback(folder)
    texts = ["" if each is None else each.choices[0].message.content for each in replies]
    alike = sum(text in (right[0][prompt], right[1][prompt]) for prompt, text in zip(every, texts, strict=True))
    counts = dict(line.rsplit(" ", 1) for line in metrics.splitlines())
    return {
        "clients": clients,
        "requests": len(every),
        "lost": sum(each is None for each in replies),
        "changes beneath": len(changes),
        "models taken over": int(counts.get("cit_fast_replaced_total", 0)),
        "answers as the run's own": alike / len(every),
        "rows a step": int(counts["cit_fast_rows_total"]) / int(counts["cit_fast_steps_total"]),
        "seconds": seconds,
        "requests a second": len(every) / seconds,
        "answer tokens a second": tokens / seconds,
    }


def beside(
    folder: Path, prompts: Sequence[str], clients: int, count: int, rounds: int, scratch: Path
) -> dict[str, Any]:
    """Requests and answer tokens a second of every server, by turns."""
    model = ContinualModel.from_run(folder, device="cpu")
    name = model.route(prompts[:1])[0]
    own = [prompt for prompt, chosen in zip(prompts, model.route(list(prompts)), strict=True) if chosen == name]
    export_merged(folder, scratch / "merged", name)
    port = free_port()
    peer = [str(Path(sys.executable).with_name("transformers")), "serve", str(scratch / "merged"), "--port", str(port)]
    peer += ["--device", "cpu"]
    servers = {
        "cit-fast serve": [sys.executable, "-m", "cit_fast.cli", "serve", str(folder), "--port", str(port)],
        "transformers serve": peer,
        "transformers serve, continuous batching": [*peer, "--continuous-batching"],
    }
    servers["cit-fast serve"] += ["--batch-size", str(BATCH)]
    found: dict[str, Any] = {each: [] for each in servers}
    every = [own[k % len(own)] for k in range(count)]
    for _ in range(rounds):
        for server, command in servers.items():
            if isinstance(found[server], str):
                continue
            try:
                with served(command, port) as url:
                    asked_for = "auto" if server == "cit-fast serve" else str(scratch / "merged")
                    asked(url, asked_for, every[:clients], clients)  # warm
                    seconds, replies, tokens = asked(url, asked_for, every, clients)
            except RuntimeError as error:
                found[server] = str(error)[-300:]
                continue
            lost = sum(each is None for each in replies)
            if lost == len(every):
                found[server] = "every request failed"
                continue
            found[server].append({"requests": len(every) / seconds, "tokens": tokens / seconds, "lost": lost})
            print(f"{server}: {len(every) / seconds:.1f} requests/s, {tokens / seconds:.0f} tokens/s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=200, help="of each client")
    parser.add_argument("--compared", type=int, default=256, help="requests that the servers are compared by")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of training, a task")
    parser.add_argument("--change", type=float, default=20.0, help="seconds between changes beneath the server")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, under load alone")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = str(model_folder(scratch / "model")) if options.tiny else "HuggingFaceTB/SmolLM2-135M-Instruct"
        run, prompts = trained(scratch, options.steps, model)
        if not options.tiny:
            found["beside"] = beside(run, prompts, options.clients, options.compared, options.rounds, scratch)
        found["under load"] = under_load(run, prompts, options.clients, options.requests, options.change)
    for server, of_server in found.get("beside", {}).items():
        if isinstance(of_server, str):
            print(f"{server}: {of_server}")
        else:
            print(f"{server}: median {statistics.median(each['requests'] for each in of_server):.1f} requests/s")
    print(json.dumps(found["under load"], indent=1))
    if options.results:
        record = {"model": "tiny" if options.tiny else model, **found, "environment": describe_environment()}
        write_file(options.results, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
