"""Key-part information gain and the losses of KPIG against what one would write in PyTorch, Liger and TRL.

    pytest bench/bench_information_gain.py --benchmark-only      timings of each contender, small
    python -m bench.bench_information_gain PART...               contenders in turns, ratios, merged into bench/results

    scoring          both contexts: log-probabilities, entropies, divergences
    jsd              Jensen-Shannon divergence of live and frozen hidden states, forward and backward
    kl               Kullback-Leibler divergence of live from frozen hidden states, forward and backward
    cross_entropy    cross-entropy, forward and backward
    memory           what each adds to a fresh process at its peak, beside the size of the logits
    error            of the probability gain, against float64 from the same (rounded) inputs

512 tokens, d = 1024 and vocabularies of 65,536 and 151,936, float32 and bfloat16. Beside them the matrix products that
nobody gets round, by torch.mm: in one go and in blocks of the vocabulary. Gradients go to the hidden states; the head
is frozen, as it is with LoRA. Rows that do more or less than that say so. Peers that are not installed are left out,
and named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ceilings import RESULTS, copy_bandwidth, gemm_rate, machine, record
from cit_fast import backend
from cit_fast.ops import linear_cross_entropy, linear_kl_divergence, masked_jsd, token_gain

TOKENS, WIDTH, VOCABULARIES = 512, 1024, (65536, 151936)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEMPERATURE = 1.5
BLOCK = 2048  # rows of the head; its logits of both contexts fit the second-level cache or nearly so
MISSING = [name for name in ("liger_kernel", "trl") if find_spec(name) is None]


class Problem:
    """Two contexts of the same tokens, with probabilities of the targets from next to nothing to nearly 1."""

    def __init__(self, vocabulary: int, dtype: torch.dtype, tokens: int = TOKENS, width: int = WIDTH) -> None:
        generator = torch.Generator().manual_seed(vocabulary)
        weight = torch.randn(vocabulary, width, generator=generator).mul_(1.6 / width**0.5)
        self.targets = torch.randint(vocabulary, (tokens,), generator=generator)
        towards = weight[self.targets]
        contexts = [
            torch.randn(tokens, width, generator=generator) + 8 * torch.rand(tokens, 1, generator=generator) * towards
            for _ in range(2)
        ]
        self.weight = weight.to(dtype)
        self.full, self.masked = (each.to(dtype) for each in contexts)
        self.both = torch.cat([self.full, self.masked])
        self.live = self.full.clone().requires_grad_()
        self.dtype = dtype
        self.vocabulary, self.tokens = vocabulary, tokens


# --- matrix products alone ---


def product(hidden: Tensor, weight: Tensor) -> None:
    torch.mm(hidden, weight.T)


def blocked_product(hidden: Tensor, weight: Tensor) -> None:
    out = hidden.new_empty(hidden.shape[0], BLOCK)
    for block in weight.split(BLOCK):
        torch.mm(hidden, block.T, out=out[:, : len(block)])


def gradient_product(x: Problem) -> Callable[[], None]:
    """d hidden = d logits @ weight, of one context."""
    gradient = torch.full((x.tokens, x.vocabulary), 1e-3, dtype=x.dtype)
    return lambda: torch.mm(gradient, x.weight)


def blocked_gradient_product(x: Problem) -> None:
    gradient = torch.full((x.tokens, BLOCK), 1e-3, dtype=x.dtype)
    out = torch.zeros_like(x.full)
    for block in x.weight.split(BLOCK):
        out.addmm_(gradient[:, : len(block)], block)


# --- scoring ---


def eager_gain(full: Tensor, masked: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """As one would write it: logits in the dtype of the model, the softmax in float32."""
    log_p, log_q = ((hidden @ weight.T).float().log_softmax(1) for hidden in (full, masked))
    p, q = log_p.exp(), log_q.exp()
    target_p, target_q = (each.gather(1, targets[:, None])[:, 0] for each in (log_p, log_q))
    return (
        target_p,
        target_q,
        target_p.exp() - target_q.exp(),
        -(p * log_p).sum(1),
        -(q * log_q).sum(1),
        (p * (log_p - log_q)).sum(1),
        (q * (log_q - log_p)).sum(1),
    )


compiled_gain = torch.compile(eager_gain, dynamic=False)


def native_gain(x: Problem) -> tuple[Tensor, ...]:
    with backend("native"):
        return token_gain(x.full, x.masked, x.weight, x.targets)


def as_gains(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, ...]:
    """The first three numbers only."""
    return log_p, log_q, log_p.float().exp() - log_q.float().exp()


def torch_gain(x: Problem, options: Any = None) -> tuple[Tensor, ...]:
    losses = (
        F.linear_cross_entropy(hidden, x.weight, x.targets, reduction="none", options=options)
        for hidden in (x.full, x.masked)
    )
    return as_gains(*(-each for each in losses))


def trl_gain(x: Problem) -> tuple[Tensor, ...]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    targets = torch.cat([x.targets, x.targets])
    log_probs = ChunkedLogProbFunction.apply(
        x.both, x.weight, None, targets, 1.0, BLOCK, None, 1.0, ("entropy",)
    )[0]  # fmt: skip
    return as_gains(*log_probs.split(x.tokens))


# --- losses, with backward ---


def eager_jsd(live: Tensor, frozen: Tensor, weight: Tensor) -> Tensor:
    log_p = ((live @ weight.T).float() / TEMPERATURE).log_softmax(1)
    with torch.no_grad():
        log_q = ((frozen @ weight.T).float() / TEMPERATURE).log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    both = F.kl_div(log_m, log_p, reduction="sum", log_target=True) + F.kl_div(
        log_m, log_q, reduction="sum", log_target=True
    )
    return both / (2 * torch.log(torch.tensor(2.0)) * len(live))


def eager_kl(live: Tensor, frozen: Tensor, weight: Tensor) -> Tensor:
    log_p = ((live @ weight.T).float() / TEMPERATURE).log_softmax(1)
    with torch.no_grad():
        log_q = ((frozen @ weight.T).float() / TEMPERATURE).log_softmax(1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def eager_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets)


compiled_jsd = torch.compile(eager_jsd, dynamic=False)
compiled_kl = torch.compile(eager_kl, dynamic=False)
compiled_cross_entropy = torch.compile(eager_cross_entropy, dynamic=False)


def with_backward(loss_of: Callable[[Problem], Tensor], x: Problem) -> tuple[Tensor, Tensor]:
    x.live.grad = None
    loss = loss_of(x)
    loss.backward()
    return loss.detach(), x.live.grad


def native_jsd(x: Problem) -> Tensor:
    with backend("native"):
        return masked_jsd(x.live, x.masked, x.weight, x.weight, TEMPERATURE)


def native_kl(x: Problem, without: bool = False) -> Tensor:
    with backend("native"):
        return linear_kl_divergence(
            x.live, x.masked, x.weight, x.weight, TEMPERATURE, targets=x.targets if without else None
        )


def liger_jsd(x: Problem, compiled: bool) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, temperature=TEMPERATURE, compiled=compiled)
    # In nats, and with a gradient of the head as well: it always computes that.
    return loss(x.live, x.weight, x.masked, x.weight, x.targets) / torch.log(torch.tensor(2.0))


def native_cross_entropy(x: Problem, entropy_gate: float = 0.0) -> Tensor:
    with backend("native"):
        return linear_cross_entropy(x.live, x.weight, x.targets, entropy_gate=entropy_gate)


def trl_cross_entropy(x: Problem) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return -ChunkedLogProbFunction.apply(x.live, x.weight, None, x.targets, 1.0, BLOCK, None, 1.0, ())[0].mean()


def torch_cross_entropy(x: Problem, options: Any = None) -> Tensor:
    return F.linear_cross_entropy(x.live, x.weight, x.targets, options=options)


Contenders = dict[str, Callable[[], Any]]
OURS, GATED, REST = "native", "native, with the entropy gate", "native, without the target"
SLOW = "torch linear_cross_entropy, chunked"
"""Timed once."""


def scoring(x: Problem) -> Contenders:
    return {
        OURS: partial(native_gain, x),
        "GEMM": partial(product, x.both, x.weight),
        "GEMM, blocks": partial(blocked_product, x.both, x.weight),
        "torch.compile": partial(compiled_gain, x.full, x.masked, x.weight, x.targets),
        "eager": partial(eager_gain, x.full, x.masked, x.weight, x.targets),
        "TRL chunked, log-probabilities and entropies only": partial(trl_gain, x),
        "torch linear_cross_entropy, log-probabilities only": partial(torch_gain, x),
    }


def jsd(x: Problem) -> Contenders:
    gradient = gradient_product(x)
    losses: dict[str, Callable[[Problem], Tensor]] = {
        "torch.compile": lambda x: compiled_jsd(x.live, x.masked, x.weight),
        "eager": lambda x: eager_jsd(x.live, x.masked, x.weight),
        "Liger chunked_loss, compiled, and the head's gradient": partial(liger_jsd, compiled=True),
        "Liger chunked_loss, eager, and the head's gradient": partial(liger_jsd, compiled=False),
    }
    return {
        OURS: partial(with_backward, native_jsd, x),
        "GEMM": lambda: (product(x.both, x.weight), gradient()),
        "GEMM, blocks": lambda: (blocked_product(x.both, x.weight), blocked_gradient_product(x)),
        **{name: partial(with_backward, loss, x) for name, loss in losses.items()},
    }


def kl(x: Problem) -> Contenders:
    gradient = gradient_product(x)
    losses: dict[str, Callable[[Problem], Tensor]] = {
        OURS: native_kl,
        REST: partial(native_kl, without=True),
        "torch.compile": lambda x: compiled_kl(x.live, x.masked, x.weight),
        "eager": lambda x: eager_kl(x.live, x.masked, x.weight),
    }
    return {
        **{name: partial(with_backward, loss, x) for name, loss in losses.items()},
        "GEMM": lambda: (product(x.both, x.weight), gradient()),
        "GEMM, blocks": lambda: (blocked_product(x.both, x.weight), blocked_gradient_product(x)),
    }


def cross_entropy(x: Problem) -> Contenders:
    gradient = gradient_product(x)
    losses: dict[str, Callable[[Problem], Tensor]] = {
        "torch.compile": lambda x: compiled_cross_entropy(x.live, x.weight, x.targets),
        "eager": lambda x: eager_cross_entropy(x.live, x.weight, x.targets),
        "torch linear_cross_entropy": torch_cross_entropy,
        "TRL chunked": trl_cross_entropy,
        SLOW: lambda x: torch_cross_entropy(x, torch.nn.LinearCrossEntropyOptions()),
    }
    return {
        OURS: partial(with_backward, native_cross_entropy, x),
        GATED: partial(with_backward, partial(native_cross_entropy, entropy_gate=1.0), x),
        "GEMM": lambda: (product(x.full, x.weight), gradient()),
        "GEMM, blocks": lambda: (blocked_product(x.full, x.weight), blocked_gradient_product(x)),
        **{name: partial(with_backward, loss, x) for name, loss in losses.items()},
    }


TABLES: dict[str, Callable[[Problem], Contenders]] = {
    "scoring": scoring,
    "jsd": jsd,
    "kl": kl,
    "cross_entropy": cross_entropy,
}


def installed(contenders: Contenders) -> Contenders:
    names = {"liger_kernel": "Liger", "trl": "TRL"}
    return {name: run for name, run in contenders.items() if not any(name.startswith(names[gone]) for gone in MISSING)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", TABLES)
def test_native(benchmark, part: str, dtype: str) -> None:
    problem = Problem(8192, DTYPES[dtype])
    benchmark.group = f"{part}, {dtype}"
    benchmark.pedantic(TABLES[part](problem)[OURS], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("part", TABLES)
def test_contenders_agree(part: str) -> None:
    contenders = installed(TABLES[part](Problem(3000, torch.float32, 24, 64)))
    expected = contenders[OURS]()
    for name, run in contenders.items():
        if name in (GATED, REST) or name.startswith("GEMM") or "compile" in name:
            continue
        # Log-probabilities and entropies go up to 10, and in float32 none of them is nearer to float64 than 4e-6.
        rtol, atol = (1e-6, 1e-5) if part == "scoring" else (1e-5, 1e-6)
        torch.testing.assert_close(run()[:7], expected[: len(run())], rtol=rtol, atol=atol, msg=name)


def in_turns(part: str, x: Problem, rounds: int, skip: list[str]) -> dict[str, Any]:
    """Contenders in turns, so that a slow moment of the machine meets all; ratios to the faster bare product."""
    contenders = {name: run for name, run in installed(TABLES[part](x)).items() if name not in skip}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            if turn != 1 and name == SLOW:
                continue
            start = time.perf_counter()
            run()
            if turn > 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(each) for name, each in times.items()}
    floor = min((medians[name] for name in ("GEMM", "GEMM, blocks") if name in medians), default=float("nan"))
    # Products of two contexts; of one for the cross-entropy; another one for the gradient.
    products = {"scoring": 2, "jsd": 3, "kl": 3, "cross_entropy": 2}[part]
    flop = 2 * products * x.tokens * x.vocabulary * x.weight.shape[1]
    rows = {}
    for name, median in medians.items():
        rows[name] = {
            "median_ms": round(median, 1),
            "best_ms": round(min(times[name]), 1),
            "of_GEMM": round(median / floor, 3),
            "ratio": round(median / medians[OURS], 2),
            "TFLOP/s": round(flop / median / 1e9, 3),
        }
        row = rows[name]
        print(
            f"  {name:54s} {row['median_ms']:9.1f} ms [{row['best_ms']:9.1f}]  GEMM x {row['of_GEMM']:<7} "
            f"native x {row['ratio']:<6} {row['TFLOP/s']} TFLOP/s",
            flush=True,
        )
    return rows


# --- memory ---


def high_water(field: str) -> int:
    """VmHWM or VmRSS of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_of(part: str, vocabulary: int, dtype: str, name: str) -> int:
    """Bytes that a contender adds at its peak. Run once on a small problem before: libraries and compilers stay out."""
    TABLES[part](Problem(4096, DTYPES[dtype], 32))[name]()
    run = TABLES[part](Problem(vocabulary, DTYPES[dtype]))[name]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = high_water("VmRSS")
    run()
    return high_water("VmHWM") - before


MEASURED = (OURS, "eager")


def memory(vocabulary: int, dtype: str) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for part in TABLES:
        contexts = 1 if part == "cross_entropy" else 2
        logits = contexts * TOKENS * vocabulary * torch.finfo(DTYPES[dtype]).bits // 8
        for name in MEASURED if vocabulary == VOCABULARIES[0] else (OURS,):
            command = [sys.executable, "-m", "bench.bench_information_gain", "peak", part, str(vocabulary), dtype, name]
            peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            rows[f"{part}: {name}"] = {"MiB": round(peak / 2**20, 1), "of_logits": round(peak / logits, 4)}
            print(f"  {part:14s} {name:8s} {peak / 2**20:9.1f} MiB  {peak / logits:7.2%} of {logits / 2**20:.0f} MiB")
    return rows


# --- error ---


def error(x: Problem) -> dict[str, Any]:
    with backend("reference"):
        exact = token_gain(x.full.double(), x.masked.double(), x.weight.double(), x.targets)
    contenders = installed(scoring(x))
    rows = {}
    for name, run in contenders.items():
        if name.startswith("GEMM"):
            continue
        out = [each.detach().double() for each in run()]
        fields = exact._fields[: len(out)]  # some give the first three only
        errors = {
            field: (value - getattr(exact, field)).abs().max().item() for field, value in zip(fields, out, strict=True)
        }
        rows[name] = {field: float(f"{each:.2g}") for field, each in errors.items()}
        print(f"  {name:54s} {rows[name]}")
    rows["largest gain"] = exact.probability_gain.abs().max().item()
    return rows


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("torch", "liger-kernel", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*TABLES, "memory", "error"], nargs="+")
    parser.add_argument("--vocabulary", type=int, nargs="*", default=VOCABULARIES)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="*", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="contenders")
    options = parser.parse_args()
    if MISSING:
        print(f"not installed, left out: {', '.join(MISSING)}")
    path = RESULTS / "information_gain.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    # Measured before and after: the machine may be shared.
    before = copy_bandwidth(), gemm_rate(), gemm_rate(dtype=torch.bfloat16)
    for part in options.part:
        for vocabulary in options.vocabulary:
            for dtype in options.dtype:
                print(f"\n{part}: V = {vocabulary}, {dtype}, {torch.get_num_threads()} thread(s)", flush=True)
                if part == "memory":
                    rows = memory(vocabulary, dtype)
                elif part == "error":
                    rows = error(Problem(vocabulary, DTYPES[dtype]))
                else:
                    rows = in_turns(part, Problem(vocabulary, DTYPES[dtype]), options.rounds, options.skip)
                content.setdefault(part, {}).setdefault(f"V={vocabulary} {dtype}", {}).update(rows)
                record("information_gain", {key: value for key, value in content.items() if key != "machine"})
    after = copy_bandwidth(), gemm_rate(), gemm_rate(dtype=torch.bfloat16)
    names = ("copy_GB/s", "fp32_gemm_TFLOP/s", "bf16_gemm_TFLOP/s")
    ceilings = {name: [round(each, 3) for each in pair] for name, *pair in zip(names, before, after, strict=True)}
    print(f"\nceilings of this run, before and after: {ceilings}")
    content.pop("machine", None)
    content.update(tokens=TOKENS, width=WIDTH, versions=versions())
    content.setdefault("ceilings", {})[" ".join(options.part)] = {**ceilings, "load_average": machine()["load_average"]}
    print(f"recorded in {record('information_gain', content)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print(peak_of(sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
    else:
        main()
