"""The balance-weight EMA against what one would write in PyTorch, beside the memory bandwidth of the same run.

    pytest bench/bench_balance_ema.py --benchmark-only      timings of each contender
    python -m bench.bench_balance_ema [CASE...]             contenders in turns, ratios, a record in bench/results

Every contender makes whole optimizer steps, or whole updates of an average, on gradients that alternate between two
sets of tensors, as autograd gives them. Bytes counted per float32 parameter are what has to move when nothing stays in
a cache: 28 for AdamW, 40 for AdamW with the average in the same sweep, 28 for the average alone (norms read p, e, g,
g_prev; the update reads p, e and writes e). Tensors that fit a cache can show more GB/s than memory gives.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bench.ceilings import copy_bandwidth, in_place_bandwidth, record
from cit_fast.ops import balance_ema_
from cit_fast.optim import AdamWBalanceEMA, BalanceEMA

CASES: dict[str, list[tuple[int, ...]]] = {
    "one-67M": [(1 << 26,)],
    "25-24M": [(960, 1000)] * 25,
    "lora-224-7M": [(16, 2048)] * 223 + [(16, 1024)],
}
DECAY, FALLBACK = 0.99, 0.01
STEP, AVERAGE, FIXED = "optimizer step with the average", "average alone", "fixed-weight average alone"
BYTES = {
    "AdamWBalanceEMA": 40,
    "AdamWBalanceEMA, bf16 average": 36,
    "AdamWBalanceEMA, bf16 average and moments": 28,
    "AdamW fused, no average": 28,
    "balance_ema_": 28,
}


class Problem:
    """Parameters with two sets of gradients, and an average; the contenders of one table take turns on it."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.tensors = [param.detach() for param in self.params]
        self.averages = [tensor + 0.1 * torch.randn_like(tensor) for tensor in self.tensors]
        self.gradients = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
        self.numel = sum(tensor.numel() for tensor in self.tensors)
        self.turn = 0

    def another(self) -> Problem:
        return Problem([tuple(tensor.shape) for tensor in self.tensors])

    def next_gradients(self) -> None:
        self.turn ^= 1
        for param, grad in zip(self.params, self.gradients[self.turn], strict=True):
            param.grad = grad

    @property
    def grads(self) -> list[Tensor]:
        return self.gradients[self.turn]

    @property
    def previous_grads(self) -> list[Tensor]:
        return self.gradients[self.turn ^ 1]


def ours(x: Problem) -> None:
    balance_ema_(x.tensors, x.averages, x.grads, x.previous_grads, decay=DECAY, fallback=FALLBACK, store_grads=False)


def _one(p: Tensor, e: Tensor, g: Tensor, previous: Tensor) -> None:
    """One tensor, as the equations are written."""
    distance, gradient, change = ((t.abs().sum()) for t in (p - e, g, g - previous))
    weight = 2 * (1 + gradient) / (distance * change)
    e.lerp_(p, torch.where((weight > 0) & (weight < 1), weight, FALLBACK))


def eager(x: Problem) -> None:
    for tensors in zip(x.tensors, x.averages, x.grads, x.previous_grads, strict=True):
        _one(*tensors)


_compiled_one = torch.compile(_one, dynamic=False)


def compiled(x: Problem) -> None:
    for tensors in zip(x.tensors, x.averages, x.grads, x.previous_grads, strict=True):
        _compiled_one(*tensors)


def _all(*lists: list[Tensor]) -> None:
    for tensors in zip(*lists, strict=True):
        _one(*tensors)


_compiled_all = torch.compile(_all, dynamic=False)


def compiled_whole(x: Problem) -> None:
    """All tensors in one graph: no call per tensor, but minutes to compile for hundreds of them."""
    _compiled_all(x.tensors, x.averages, x.grads, x.previous_grads)


def foreach(x: Problem) -> None:
    distance = torch.stack(torch._foreach_norm(torch._foreach_sub(x.tensors, x.averages), 1))
    gradient = torch.stack(torch._foreach_norm(x.grads, 1))
    change = torch.stack(torch._foreach_norm(torch._foreach_sub(x.grads, x.previous_grads), 1))
    weight = 2 * (1 + gradient) / (distance * change)
    weight = torch.where((weight > 0) & (weight < 1), weight, FALLBACK)
    torch._foreach_lerp_(x.averages, x.tensors, weight.tolist())


PEERS: dict[str, Callable[[Problem], None]] = {
    "torch.compile per tensor": compiled,
    "torch.compile of the whole list": compiled_whole,
    "foreach": foreach,
    "eager": eager,
}

Contender = tuple[Problem, Callable[[], object]]


def steps(x: Problem) -> dict[str, Contender]:
    """Whole optimizer steps. The rows with torch's AdamW share one: same parameters, same moments."""
    half = {"average_dtype": torch.bfloat16}
    contenders: dict[str, Contender] = {}
    for name, dtypes in {
        "AdamWBalanceEMA": {},
        "AdamWBalanceEMA, bf16 average": half,
        "AdamWBalanceEMA, bf16 average and moments": {**half, "state_dtype": torch.bfloat16},
    }.items():
        own = x.another()
        contenders[name] = own, AdamWBalanceEMA(own.params, lr=1e-4, decay=DECAY, fallback=FALLBACK, **dtypes).step
    wrapped = x.another()
    inner = torch.optim.AdamW(wrapped.params, lr=1e-4, fused=True)
    contenders["BalanceEMA(AdamW fused)"] = wrapped, BalanceEMA(inner, decay=DECAY, fallback=FALLBACK).step
    fused = torch.optim.AdamW(x.params, lr=1e-4, fused=True)
    for name, average in PEERS.items():
        contenders[f"AdamW fused + {name}"] = x, lambda average=average: (fused.step(), average(x))
    contenders["AdamW fused, no average"] = x, fused.step
    return contenders


def averages(x: Problem) -> dict[str, Contender]:
    """The average alone."""
    return {name: (x, lambda run=run: run(x)) for name, run in {"balance_ema_": ours, **PEERS}.items()}


def fixed(x: Problem) -> dict[str, Contender]:
    """One weight for all, what other packages offer; theirs keep a copy of a module."""
    module = nn.ParameterList(x.params)
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(module)
    contenders: dict[str, Contender] = {
        "balance_ema_": (x, lambda: balance_ema_(x.tensors, x.averages, x.grads, [], rule="fixed", decay=DECAY)),
        "torch AveragedModel": (x, lambda: averaged.update_parameters(module)),
        "torch._foreach_lerp_": (x, lambda: torch._foreach_lerp_(x.averages, x.tensors, 1 - DECAY)),
    }
    if find_spec("ema_pytorch"):
        from ema_pytorch import EMA

        theirs = EMA(module, beta=DECAY, update_after_step=0, update_every=1, use_foreach=True)
        contenders["ema-pytorch (foreach)"] = x, theirs.update
    return contenders


TABLES: dict[str, Callable[[Problem], dict[str, Contender]]] = {
    STEP: steps,
    AVERAGE: averages,
    FIXED: fixed,
}


@pytest.mark.parametrize("contender", ["balance_ema_", *PEERS])
@pytest.mark.parametrize("case", list(CASES)[1:])
def test_balance_ema(benchmark, case: str, contender: str) -> None:
    problem = Problem(CASES[case])
    benchmark.group = case
    _, run = averages(problem)[contender]
    benchmark.pedantic(run, setup=problem.next_gradients, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("contender", ["AdamWBalanceEMA", "AdamW fused, no average"])
@pytest.mark.parametrize("case", list(CASES)[1:])
def test_step(benchmark, case: str, contender: str) -> None:
    benchmark.group = f"{case}: step"
    problem, run = steps(Problem(CASES[case]))[contender]
    benchmark.pedantic(run, setup=problem.next_gradients, rounds=10, warmup_rounds=2)


def test_contenders_agree() -> None:
    shapes = CASES["lora-224-7M"][-3:]
    expected = Problem(shapes)
    expected.next_gradients()
    ours(expected)
    for contender in PEERS.values():
        problem = Problem(shapes)
        problem.next_gradients()
        contender(problem)
        torch.testing.assert_close(problem.averages, expected.averages, rtol=1e-5, atol=1e-6)


def in_turns(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the contenders in turns so that a slow moment of the machine meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 3):
        for name, (problem, run) in contenders.items():
            for _ in range(2):  # once to bring the caches into the state that one's own step leaves
                problem.next_gradients()
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
            if turn >= 3:
                times[name].append(seconds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all, and a record, without any")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    # Measured before and after: the machine may be shared.
    ceilings = {"copy_GB/s": [copy_bandwidth()], "in_place_lerp_GB/s": [in_place_bandwidth()]}
    results: dict[str, object] = {}
    for case in options.cases or CASES:
        tables = results[case] = {}
        for table, make in TABLES.items():
            problem = Problem(CASES[case])
            times = in_turns(make(problem), options.rounds)
            print(f"\n{case} ({problem.numel / 1e6:.1f} M parameters): {table}, {torch.get_num_threads()} threads")
            base = statistics.median(next(iter(times.values())))
            rows = tables[table] = {}
            for name, seconds in times.items():
                median = statistics.median(seconds)
                row = {"median_ms": median * 1e3, "best_ms": min(seconds) * 1e3, "ratio": median / base}
                if name in BYTES and table != FIXED:
                    row["GB/s"] = BYTES[name] * problem.numel / median / 1e9
                rows[name] = {key: round(value, 3) for key, value in row.items()}
                rate = f"{row['GB/s']:6.1f} GB/s" if "GB/s" in row else ""
                print(f"  {name:42s} {row['median_ms']:9.2f} ms [{row['best_ms']:8.2f}]  x {row['ratio']:<6.2f} {rate}")
            del problem
    ceilings["copy_GB/s"].append(copy_bandwidth())
    ceilings["in_place_lerp_GB/s"].append(in_place_bandwidth())
    ceilings = {name: [round(value, 1) for value in values] for name, values in ceilings.items()}
    print(f"\nceilings of this run, before and after: {ceilings}")
    if not options.cases:
        content = {"rounds": options.rounds, "ceilings": ceilings, "cases": results}
        print(f"recorded in {record('balance_ema', content)}")


if __name__ == "__main__":
    main()
