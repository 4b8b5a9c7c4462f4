"""Key-part information gain and the losses of KPIG on a GPU, beside the matrix products that nobody gets round.

    python -m bench.gpu_information_gain [PART...]      contenders in turns, ratios, merged into bench/results

    scoring          both contexts: log-probabilities, entropies, divergences
    jsd              Jensen-Shannon divergence of live and frozen hidden states, forward and backward
    kl               Kullback-Leibler divergence of live from frozen hidden states, forward and backward
    cross_entropy    cross-entropy, forward and backward

4096 tokens in bfloat16 and float32; the vocabularies and widths of Llama 3, Qwen 2.5 and Llama 2. Gradients go to the
hidden states; the head is frozen, as it is with LoRA. Contenders that do more or less than that say so. Peers that are
not installed are left out; what fails says why. The products are one torch.mm for each context and each gradient, to 16
bits where the operands have them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ceilings import RESULTS, record
from cit_fast import backend
from cit_fast.ops import linear_cross_entropy, linear_kl_divergence, masked_jsd, token_gain

SIZES = {"Llama 3 8B": (4096, 128_256), "Qwen 2.5 1.5B": (1536, 151_936), "Llama 2 7B": (4096, 32_000)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TEMPERATURE = 1.5
OURS = "triton"
PEERS = {"Liger": "liger_kernel", "CCE": "cut_cross_entropy", "QuACK": "quack"}

Contenders = dict[str, Callable[[], object]]


class Problem:
    """Two contexts of the same tokens, with probabilities of the targets from next to nothing to nearly 1."""

    def __init__(self, tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(vocabulary)
        weight = torch.randn(vocabulary, width, device=device).mul_(1.6 / width**0.5)
        self.targets = torch.randint(vocabulary, (tokens,), device=device)
        towards = weight[self.targets]
        self.full, self.masked = (
            (torch.randn_like(towards) + 8 * torch.rand(tokens, 1, device=device) * towards).to(dtype) for _ in range(2)
        )
        self.weight = weight.to(dtype)
        self.live = self.full.clone().requires_grad_()
        self.flop = 2 * tokens * width * vocabulary  # of one product


# --- what one would write in PyTorch ---


def eager_scoring(full: Tensor, masked: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    log_p, log_q = ((each @ weight.T).float().log_softmax(dim=1) for each in (full, masked))
    p, q = log_p.exp(), log_q.exp()
    at_p, at_q = (each.gather(1, targets[:, None])[:, 0] for each in (log_p, log_q))
    divergences = (p * (log_p - log_q)).sum(1), (q * (log_q - log_p)).sum(1)
    return at_p, at_q, at_p.exp() - at_q.exp(), -(p * log_p).sum(1), -(q * log_q).sum(1), *divergences


def eager_jsd(live: Tensor, frozen: Tensor, weight: Tensor) -> Tensor:
    log_p, log_q = (((each @ weight.T).float() / TEMPERATURE).log_softmax(dim=1) for each in (live, frozen))
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    total = F.kl_div(log_m, log_p, log_target=True, reduction="sum") + F.kl_div(
        log_m, log_q, log_target=True, reduction="sum"
    )
    return total / (2 * 0.6931471805599453 * len(live))


def eager_kl(live: Tensor, frozen: Tensor, weight: Tensor) -> Tensor:
    log_p, log_q = (((each @ weight.T).float() / TEMPERATURE).log_softmax(dim=1) for each in (live, frozen))
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def eager_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def with_backward(x: Problem, loss_of: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    loss = loss_of()
    return loss.detach(), *torch.autograd.grad(loss, x.live)


@torch.no_grad()
def scored(run: Callable[[], object]) -> object:
    return run()


# --- contenders ---


def products(x: Problem, contexts: int) -> None:
    """Logits of each context, and where there is a gradient that of the hidden states."""
    for hidden in (x.full, x.masked)[:contexts]:
        logits = torch.mm(hidden, x.weight.T)
    torch.mm(logits, x.weight)


def scoring(x: Problem) -> Contenders:
    def ours() -> object:
        with backend(OURS):
            return token_gain(x.full, x.masked, x.weight, x.targets)

    def cce() -> object:
        from cut_cross_entropy import linear_cross_entropy as cce

        return [cce(hidden, x.weight, x.targets, reduction="none") for hidden in (x.full, x.masked)]

    arguments = (x.full, x.masked, x.weight, x.targets)
    runs: Contenders = {
        OURS: ours,
        "products": lambda: [torch.mm(hidden, x.weight.T) for hidden in (x.full, x.masked)],
        "torch.compile": partial(torch.compile(eager_scoring), *arguments),
        "eager": partial(eager_scoring, *arguments),
        "CCE, log-probabilities only": cce,
    }
    return {name: partial(scored, run) for name, run in runs.items()}


def jsd(x: Problem) -> Contenders:
    def ours() -> Tensor:
        with backend(OURS):
            return masked_jsd(x.live, x.masked, x.weight, x.weight, TEMPERATURE)

    def liger() -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearJSD

        return LigerFusedLinearJSD(temperature=TEMPERATURE)(x.live, x.weight, x.masked, x.weight)

    losses = {
        OURS: ours,
        "torch.compile": partial(torch.compile(eager_jsd), x.live, x.masked, x.weight),
        "eager": partial(eager_jsd, x.live, x.masked, x.weight),
        "Liger fused_linear_jsd, in nats": liger,
    }
    return {"products": partial(products, x, 2), **{n: partial(with_backward, x, run) for n, run in losses.items()}}


def kl(x: Problem) -> Contenders:
    def ours(targets: Tensor | None) -> Tensor:
        with backend(OURS):
            return linear_kl_divergence(x.live, x.masked, x.weight, x.weight, TEMPERATURE, targets=targets)

    losses = {
        OURS: partial(ours, None),
        f"{OURS}, without the target": partial(ours, x.targets),
        "torch.compile": partial(torch.compile(eager_kl), x.live, x.masked, x.weight),
        "eager": partial(eager_kl, x.live, x.masked, x.weight),
    }
    return {"products": partial(products, x, 2), **{n: partial(with_backward, x, run) for n, run in losses.items()}}


def cross_entropy(x: Problem) -> Contenders:
    def ours() -> Tensor:
        with backend(OURS):
            return linear_cross_entropy(x.live, x.weight, x.targets)

    def liger() -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(x.weight, x.live, x.targets)

    def cce() -> Tensor:
        from cut_cross_entropy import linear_cross_entropy as cce

        return cce(x.live, x.weight, x.targets)

    def quack() -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy(x.live, x.weight, x.targets)

    losses = {
        OURS: ours,
        "torch.compile": partial(torch.compile(eager_cross_entropy), x.live, x.weight, x.targets),
        "eager": partial(eager_cross_entropy, x.live, x.weight, x.targets),
        "Liger fused_linear_cross_entropy": liger,
        "CCE": cce,
        "QuACK, chunked": quack,
    }
    return {"products": partial(products, x, 1), **{n: partial(with_backward, x, run) for n, run in losses.items()}}


TABLES: dict[str, tuple[Callable[[Problem], Contenders], int]] = {
    "scoring": (scoring, 2),
    "jsd": (jsd, 3),
    "kl": (kl, 3),
    "cross_entropy": (cross_entropy, 2),
}
"""Contenders, and how many products nobody gets round."""


def milliseconds(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end.record()
    end.synchronize()
    return start_event.elapsed_time(end)


def added_at_the_peak(run: Callable[[], object]) -> int | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) >> 20


def in_turns(part: str, x: Problem, rounds: int) -> dict[str, Any]:
    """Contenders in turns, so that a clock that falls meets all of them."""
    make, count = TABLES[part]
    rows: dict[str, Any] = {}
    running: Contenders = {}
    for name, run in make(x).items():
        peer = PEERS.get(name.split()[0].rstrip(","))
        if peer is not None and find_spec(peer) is None:
            continue
        try:
            run()  # compiles
            rows[name] = {"peak_MiB": added_at_the_peak(run)}
            running[name] = run
        except Exception as error:
            if name == OURS:
                raise
            # Of a peer, or out of memory: the others still count.
            rows[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            print(f"  {name:36s} {rows[name]['failed']}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, run in running.items():
            times[name].append(milliseconds(run))
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, median in medians.items():
        rows[name] |= {
            "median_ms": round(median, 3),
            "best_ms": round(min(times[name]), 3),
            "TFLOP/s": round(count * x.flop / median / 1e9, 1),
            "of_products": round(median / medians["products"], 3) if "products" in medians else None,
        }
        print(f"  {name:36s} {rows[name]}", flush=True)
    return rows


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*TABLES, []], help="all where none is given")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--tiny", action="store_true", help="a size that the interpreter can do; records nothing")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("no CUDA device")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = RESULTS / "information_gain_gpu.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for part in options.parts or TABLES:
        for name, (width, vocabulary) in {"tiny": (32, 500)}.items() if options.tiny else SIZES.items():
            for dtype in options.dtypes:
                tokens = 40 if options.tiny else options.tokens
                key = f"{part}, {name}: {tokens} tokens, d = {width}, V = {vocabulary}, {dtype}"
                print(key, flush=True)
                problem = Problem(tokens, width, vocabulary, DTYPES[dtype], device)
                results[key] = in_turns(part, problem, 2 if options.tiny else options.rounds)
                del problem
                if device == "cuda":
                    torch.cuda.empty_cache()
        if not options.tiny:
            record("information_gain_gpu", {"versions": versions(), "results": results})


if __name__ == "__main__":
    main()
