"""The balance-weight EMA against what one would write in PyTorch, beside the memory bandwidth of the same run.

    pytest bench/bench_balance_ema.py --benchmark-only      timings of each contender
    python -m bench.bench_balance_ema                       contenders in turns, ratios, a record in bench/results

Bytes counted per float32 parameter: the average alone 32 (norms read p, e, g, g_prev and write g_prev; the update reads
p, e and writes e); with AdamW in the same sweep 44. Both are what has to move when nothing stays in a cache, so tensors
that fit a cache can show more GB/s than memory gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.ceilings import copy_bandwidth, in_place_bandwidth, record
from cit_fast.ops import adamw_balance_ema_, balance_ema_

EMA_BYTES, ADAMW_BYTES = 32, 44
CASES: dict[str, list[tuple[int, ...]]] = {
    "one-16M": [(1 << 24,)],
    "lora-224": [(16, 2048)] * 168 + [(16, 2048)] * 55 + [(16, 1024)],
}
DECAY, FALLBACK = 0.99, 0.01


@dataclass
class State:
    """The tensors of one case, in separately staggered allocations."""

    params: list[Tensor]
    averages: list[Tensor]
    grads: list[Tensor]
    previous_grads: list[Tensor]

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params)


def make(shapes: list[tuple[int, ...]]) -> State:
    torch.manual_seed(0)
    params = [torch.randn(shape) for shape in shapes]
    averages = [param + 0.1 * torch.randn_like(param) for param in params]
    return State(params, averages, [torch.randn_like(p) for p in params], [torch.randn_like(p) for p in params])


def native(x: State) -> None:
    balance_ema_(x.params, x.averages, x.grads, x.previous_grads, rule="released", decay=DECAY, fallback=FALLBACK)


def _one(p: Tensor, e: Tensor, g: Tensor, previous: Tensor) -> None:
    """One tensor, as the equations are written."""
    distance, gradient, change = ((t.abs().sum()) for t in (p - e, g, g - previous))
    weight = 2 * (1 + gradient) / (distance * change)
    e.lerp_(p, torch.where((weight > 0) & (weight < 1), weight, FALLBACK))
    previous.copy_(g)


def eager(x: State) -> None:
    for tensors in zip(x.params, x.averages, x.grads, x.previous_grads, strict=True):
        _one(*tensors)


_compiled_one = torch.compile(_one, dynamic=False)


def compiled(x: State) -> None:
    for tensors in zip(x.params, x.averages, x.grads, x.previous_grads, strict=True):
        _compiled_one(*tensors)


def foreach(x: State) -> None:
    distance = torch.stack(torch._foreach_norm(torch._foreach_sub(x.params, x.averages), 1))
    gradient = torch.stack(torch._foreach_norm(x.grads, 1))
    change = torch.stack(torch._foreach_norm(torch._foreach_sub(x.grads, x.previous_grads), 1))
    weight = 2 * (1 + gradient) / (distance * change)
    weight = torch.where((weight > 0) & (weight < 1), weight, FALLBACK)
    torch._foreach_lerp_(x.averages, x.params, weight.tolist())
    torch._foreach_copy_(x.previous_grads, x.grads)


def foreach_fixed(x: State) -> None:
    """Not the same result: the plain EMA with one decay for all, the least that any average costs."""
    torch._foreach_lerp_(x.averages, x.params, 1 - DECAY)


CONTENDERS: dict[str, Callable[[State], None]] = {
    "native": native,
    "compile-per-tensor": compiled,
    "eager": eager,
    "foreach": foreach,
    "foreach-fixed-decay": foreach_fixed,
}


class FusedAdamW:
    """AdamW and the average in one sweep."""

    def __init__(self, x: State) -> None:
        self.x, self.count = x, 0
        self.moments = [torch.zeros_like(p) for p in x.params], [torch.zeros_like(p) for p in x.params]
        self.alphas = torch.zeros(len(x.params))

    def __call__(self) -> None:
        self.count += 1
        x = self.x
        adamw_balance_ema_(
            x.params, x.grads, *self.moments, x.averages, x.previous_grads, self.alphas, step=self.count, lr=1e-4
        )


class TorchAdamW:
    """torch's fused AdamW, then an average by one of the contenders, or none."""

    def __init__(self, x: State, average: Callable[[State], None] | None) -> None:
        params = [torch.nn.Parameter(p) for p in x.params]
        for param, grad in zip(params, x.grads, strict=True):
            param.grad = grad
        x.params = [p.detach() for p in params]
        self.x, self.average, self.optimizer = x, average, torch.optim.AdamW(params, lr=1e-4, fused=True)

    def __call__(self) -> None:
        self.optimizer.step()
        if self.average is not None:
            self.average(self.x)


def steps(case: str) -> dict[str, Callable[[], None]]:
    """Every contender with tensors of its own, by name."""
    shapes = CASES[case]
    out: dict[str, Callable[[], None]] = {name: partial(run, make(shapes)) for name, run in CONTENDERS.items()}
    out["adamw: one sweep"] = FusedAdamW(make(shapes))
    out["adamw: torch fused + native"] = TorchAdamW(make(shapes), native)
    out["adamw: torch fused + compile-per-tensor"] = TorchAdamW(make(shapes), compiled)
    out["adamw: torch fused, no average"] = TorchAdamW(make(shapes), None)
    return out


@pytest.mark.parametrize("contender", list(CONTENDERS))
@pytest.mark.parametrize("case", list(CASES))
def test_balance_ema(benchmark, case: str, contender: str) -> None:
    state = make(CASES[case])
    benchmark.group = case
    benchmark.pedantic(CONTENDERS[contender], args=(state,), rounds=10, warmup_rounds=2)
    benchmark.extra_info["GB/s"] = EMA_BYTES * state.numel / benchmark.stats.stats.min / 1e9


@pytest.mark.parametrize("case", list(CASES))
def test_contenders_agree(case: str) -> None:
    expected = make(CASES[case])
    native(expected)
    for contender in (eager, foreach, compiled):
        state = make(CASES[case])
        contender(state)
        torch.testing.assert_close(state.averages, expected.averages, rtol=1e-5, atol=1e-6)


def main(rounds: int = 15) -> None:
    """Time all contenders in turns, so that a slow moment of the machine meets all of them; print and record ratios."""
    results: dict[str, object] = {}
    for case, shapes in CASES.items():
        contenders = steps(case)
        numel = make(shapes).numel
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for round_number in range(rounds + 2):
            for name, run in contenders.items():
                start = time.perf_counter()
                run()
                if round_number >= 2:
                    times[name].append(time.perf_counter() - start)
        rows = {}
        print(f"\n{case}: {numel / 1e6:.1f} M parameters in {len(shapes)} tensors, {torch.get_num_threads()} threads")
        for name, seconds in times.items():
            bytes_moved = ADAMW_BYTES if name == "adamw: one sweep" else EMA_BYTES
            base = "adamw: one sweep" if name.startswith("adamw") else "native"
            best, median = min(seconds), sorted(seconds)[len(seconds) // 2]
            row = {
                "ms": round(best * 1e3, 3),
                "median_ms": round(median * 1e3, 3),
                "ratio": round(best / min(times[base]), 2),
            }
            if name in ("native", "adamw: one sweep"):
                row["GB/s"] = round(bytes_moved * numel / best / 1e9, 1)
            rows[name] = row
            rate = f"{row['GB/s']:6.1f} GB/s" if "GB/s" in row else ""
            print(f"  {name:42s} {row['ms']:9.2f} ms  x {row['ratio']:<6} {rate}")
        results[case] = rows
    ceilings = {"copy_GB/s": round(copy_bandwidth(), 1), "in_place_lerp_GB/s": round(in_place_bandwidth(), 1)}
    print(f"\nceilings of this run: {ceilings}")
    print(f"recorded in {record('balance_ema', {'ceilings': ceilings, 'cases': results})}")


if __name__ == "__main__":
    main()
