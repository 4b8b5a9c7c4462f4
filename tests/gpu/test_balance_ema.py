"""The CUDA kernels of the balance-weight EMA against the definition, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from cit_fast import available_backends, backend
from cit_fast.errors import BackendError, CitFastError
from cit_fast.ops import (
    BALANCE_RULES,
    BalanceWeights,
    adamw_balance_ema_,
    adamw_balance_ema_capturable_,
    balance_ema_,
    balance_norms_,
    flush_balance_ema_,
)
from cit_fast.ops.balance_ema import reference
from cit_fast.ops.balance_ema.reference import AdamWLists, AdamWOptions, BalanceOptions, balance_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not available_backends()["cuda"].available, reason=available_backends()["cuda"].reason),
]

# A thread adds 32 floats, then come 8 levels of a tree, all positive, and double: a norm is off by 48 * 2^-24 at most,
# relatively; half as much again for the differences themselves.
NORM_RTOL = 72 * 2**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STATE_DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1,), (0,), (3, 5), (7,), (9, 8), (16, 2), (2047,), (4, 4, 17), (3, 255), (2, 8192), (8193,), (2, 20_000)]
SHAPES += [(0, 7), (5, 0), (300, 500), (4096, 16), (16, 4096), (9000, 1)]
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@dataclass
class Lists:
    """The tensors of one call."""

    params: list[Tensor]
    averages: list[Tensor]
    grads: list[Tensor]
    previous_grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    rule: str = "released"
    store_grads: bool = True
    alphas: Tensor = field(default_factory=lambda: torch.zeros(0))
    remaining: Tensor = field(default_factory=lambda: torch.zeros(0))

    def on(self, device: str) -> Lists:
        """A copy on another device, or on this one."""
        copies = {each: [t.to(device, copy=True) for t in getattr(self, each)] for each in NAMES}
        own = {each: getattr(self, each).to(device, copy=True) for each in ("alphas", "remaining")}
        return replace(self, **copies, **own)

    def adamw_lists(self) -> tuple[Any, ...]:
        ema = (self.averages, self.previous_grads, self.alphas)
        return (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, *ema)

    def options(self) -> dict[str, Any]:
        return {"rule": self.rule, "store_grads": self.store_grads, "remaining": self.remaining}

    def norms(self) -> Tensor:
        ema = (self.params, self.averages, self.grads, self.previous_grads)
        return balance_norms_(*ema, store_grads=self.store_grads)

    def ema(self, seed: int = 0) -> BalanceWeights:
        ema = (self.params, self.averages, self.grads, self.previous_grads)
        return balance_ema_(*ema, **self.options(), seed=seed)

    def adamw(self, step: int, lr: float = 1e-2, seed: int = 0) -> BalanceWeights:
        return adamw_balance_ema_(*self.adamw_lists(), step=step, lr=lr, seed=seed, **ADAMW, **self.options())

    def flush(self, seed: int = 0) -> None:
        flush_balance_ema_(self.params, self.averages, self.alphas, seed=seed)


NAMES = [each.name for each in fields(Lists)][:6]


def make(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    *,
    grad_dtype: torch.dtype | None = None,
    previous_dtype: torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> Lists:
    """Random tensors on the GPU whose distance gives the rules usable weights, and pending weights."""
    generator = torch.Generator().manual_seed(seed)
    lists = Lists([], [], [], [], [], [], **options)
    for shape in shapes:
        param, offset, grad, change, m, v = (torch.randn(shape, generator=generator) for _ in range(6))
        dtypes = (dtype, state_dtype, grad_dtype or dtype, previous_dtype or grad_dtype or dtype, *[state_dtype] * 2)
        values = (param, param + 4 * offset.sign(), grad, grad + change, 0.1 * m, 0.01 * v.abs())
        for name, value, its_dtype in zip(NAMES, values, dtypes, strict=True):
            getattr(lists, name).append(value.to(its_dtype).cuda())
    lists.alphas = torch.rand(len(lists.params), generator=generator).cuda()
    lists.alphas[::3] = 0  # nothing pending
    lists.remaining = torch.full_like(lists.alphas, 2.0)
    return lists


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with backend("cuda"):
        yield


def assert_same(lists: Lists, expected: Lists, params_ulps: int = 0) -> None:
    """Every element has the same bits, except that a NaN is a NaN; parameters may be ``params_ulps`` off.

    The square root of torch on a CPU is not rounded correctly, that of the kernels is.
    """
    for name in NAMES:
        for i, (x, y) in enumerate(zip(getattr(lists, name), getattr(expected, name), strict=True)):
            ulps = params_ulps if name == "params" else 0
            close = {"rtol": ulps * torch.finfo(x.dtype).eps, "atol": ulps * 5e-7, "equal_nan": True}
            torch.testing.assert_close(x.cpu(), y.cpu(), **close, msg=lambda m, at=(name, i): f"{at}: {m}")


def assert_norms(norms: Tensor, expected: Tensor) -> None:
    norms, expected = norms.cpu(), expected.cpu()
    assert torch.equal(norms.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(norms[finite], expected[finite], rtol=NORM_RTOL, atol=0)


def assert_weights(weights: BalanceWeights, lists: Lists, remaining: Tensor) -> None:
    """The weights, and what remains of the distances, are those of the norms; ``remaining`` before, on the CPU."""
    assert weights.norms.is_cuda
    alphas, fallbacks = balance_weight(weights.norms.cpu(), remaining, BalanceOptions(lists.rule))
    torch.testing.assert_close(lists.remaining.cpu(), remaining, rtol=2**-22, atol=0, equal_nan=True)
    torch.testing.assert_close(weights.alphas.cpu(), alphas.float(), rtol=2**-23, atol=0)
    assert torch.equal(weights.fallbacks.cpu(), fallbacks)


def check_adamw(lists: Lists, steps: int = 2) -> None:
    """Some steps, each against the reference on the CPU with the same pending weights."""
    for step in range(1, steps + 1):
        expected = lists.on("cpu")
        before = [each.clone() for each in expected.previous_grads]
        options = BalanceOptions(expected.rule, store_grads=expected.store_grads, seed=40 + step)
        remaining = expected.remaining.clone()
        adamw = AdamWOptions(step, 1e-2, *ADAMW["betas"], ADAMW["eps"], ADAMW["weight_decay"])
        *lists_of_step, alphas = expected.adamw_lists()
        reference.adamw_balance_ema_(AdamWLists(*lists_of_step), alphas, expected.remaining, adamw, options)
        weights = lists.adamw(step, seed=40 + step)
        assert weights.alphas is lists.alphas
        assert_same(lists, expected, params_ulps=2)
        params = [each.cpu() for each in lists.params]  # p - e may be as small as what they are off
        ema = (params, expected.averages, expected.grads, before)
        assert_norms(weights.norms, reference.balance_norms_(*ema, store_grads=False))
        assert_weights(weights, lists, remaining)


def check_ema(lists: Lists) -> None:
    expected = lists.on("cpu")
    ema = (expected.params, expected.averages, expected.grads, expected.previous_grads)
    right = reference.balance_norms_(*ema, expected.store_grads)
    norms_alone = lists.on("cuda").norms()
    remaining = expected.remaining.clone()
    weights = lists.ema(seed=7)
    assert_norms(weights.norms, right)
    assert torch.equal(weights.norms.nan_to_num(), norms_alone.nan_to_num())
    assert_weights(weights, lists, remaining)
    alphas = weights.alphas.cpu()
    reference.flush_balance_ema_(expected.params, expected.averages, alphas, seed=7)
    assert_same(lists, expected)


@pytest.mark.parametrize("rule", BALANCE_RULES)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(dtype: torch.dtype, state_dtype: torch.dtype, rule: str) -> None:
    check_ema(make(SHAPES, dtype, state_dtype, rule=rule))
    check_adamw(make(SHAPES, dtype, state_dtype, rule=rule, seed=1))


@pytest.mark.parametrize(("grad_dtype", "previous_dtype"), list(product(DTYPES, DTYPES)), ids=str)
def test_mixed_dtypes(grad_dtype: torch.dtype, previous_dtype: torch.dtype) -> None:
    dtypes = {"grad_dtype": grad_dtype, "previous_dtype": previous_dtype}
    check_ema(make(SHAPES, torch.bfloat16, **dtypes))
    check_adamw(make(SHAPES, torch.bfloat16, **dtypes), steps=1)


def test_every_tensor_its_own_state_dtype() -> None:
    lists = make(SHAPES[:6], seed=2)
    for i, tensors in enumerate((lists.averages, lists.exp_avgs, lists.exp_avg_sqs)):
        tensors[i::3] = [each.bfloat16() for each in tensors[i::3]]
    check_adamw(lists)


def test_gradients_that_are_not_to_be_stored() -> None:
    lists = make(SHAPES, store_grads=False)
    before = [each.clone() for each in lists.previous_grads]
    check_ema(lists)
    check_adamw(lists)
    assert all(torch.equal(x, y) for x, y in zip(lists.previous_grads, before, strict=True))


def test_fixed_needs_no_previous_gradients() -> None:
    lists = make(SHAPES, rule="fixed")
    lists.previous_grads = []
    check_ema(lists)
    check_adamw(lists)


def test_many_tensors() -> None:
    check_adamw(make([(1 + 997 * i % 40_009,) for i in range(224)], torch.bfloat16, seed=2))
    check_adamw(make([(8 + i % 9, 1 + 97 * i % 409) for i in range(1000)], seed=3), steps=1)


def test_a_large_tensor() -> None:
    check_ema(make([(2048, 8193)], torch.bfloat16, seed=3))
    check_adamw(make([(512, 8193)], torch.bfloat16, torch.bfloat16, seed=3), steps=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_are_not_aligned_give_the_same_bits(dtype: torch.dtype) -> None:
    aligned = make([(30, 1001), (5, 8)], dtype, seed=4)
    shifted = aligned.on("cuda")
    for name in NAMES:
        for i, tensor in enumerate(getattr(shifted, name)):
            moved = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
            getattr(shifted, name)[i] = moved
    x, y = aligned.adamw(3), shifted.adamw(3)
    assert_same(aligned, shifted)
    assert torch.equal(x.norms, y.norms)


def test_same_bits_every_time_and_in_any_company() -> None:
    lists = make([(300_001,), (5,), (16_384,), (100, 33)], seed=5)
    once, again = lists.on("cuda"), lists.on("cuda")
    company = make([(100_000,)] * 64, seed=6)
    crowd = company.on("cuda")
    for name in NAMES:
        getattr(crowd, name).extend(getattr(lists.on("cuda"), name))
    crowd.alphas = torch.cat([company.alphas, lists.alphas])
    x, y, z = once.adamw(1), again.adamw(1), crowd.adamw(1)
    assert torch.equal(x.norms, y.norms)
    assert torch.equal(x.norms, z.norms[-4:])
    assert_same(once, again)
    for name in NAMES:
        assert all(torch.equal(a, b) for a, b in zip(getattr(once, name), getattr(crowd, name)[-4:], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["params", "grads", "previous_grads"])
def test_values_that_are_not_finite(where: str, value: float) -> None:
    lists = make([(4, 10), (2, 100_000), (7,)], seed=7)
    for tensor in getattr(lists, where)[:2]:
        tensor.view(-1)[-1] = value
    check_ema(lists.on("cuda"))
    if where == "params":
        lists.alphas.zero_()  # or the pending update, which is of the step before, would take it in
    check_adamw(lists, steps=1)
    bad = [0, 1]
    assert (lists.alphas[bad] == 0).all().item() == (where != "previous_grads")
    assert lists.alphas[-1].item() > 0
    if where == "grads":
        assert all(each.isfinite().all().item() for each in (*lists.params, *lists.averages, *lists.exp_avgs))


def test_only_empty_tensors() -> None:
    weights = make([(0,), (0, 3)]).ema()
    assert weights.fallbacks.tolist() == [True, True]


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_flush(state_dtype: torch.dtype) -> None:
    lists = make(SHAPES, torch.bfloat16, state_dtype)
    expected = lists.on("cpu")
    reference.flush_balance_ema_(expected.params, expected.averages, expected.alphas, seed=3)
    lists.flush(seed=3)
    assert_same(lists, expected)
    assert not lists.alphas.any().item()


def test_bfloat16_averages_follow_small_updates_in_the_mean() -> None:
    n = 1 << 20
    p, e = torch.full((n,), 2.0, device="cuda"), torch.ones(n, device="cuda", dtype=torch.bfloat16)
    for seed in range(20):
        flush_balance_ema_([p], [e], torch.full((1,), 2**-12, device="cuda"), seed=seed)  # half of the last place: 2^-8
    assert abs(e.double().mean().item() - 2 + (1 - 2**-12) ** 20) < 1e-5


def test_runs_on_the_current_stream_and_never_waits() -> None:
    lists = make([(100_000,)] * 20)
    expected = lists.on("cuda")
    stream = torch.cuda.Stream()
    results = []
    for each, run_on in ((expected, torch.cuda.current_stream()), (lists, stream)):
        with no_waiting(), torch.cuda.stream(run_on):
            results.append((each.norms(), each.ema(), each.adamw(1), each.flush()))
    torch.cuda.synchronize()
    assert_same(lists, expected)
    assert torch.equal(results[0][0], results[1][0])


def test_gradients_may_move_between_calls() -> None:
    lists = make([(1000,), (50, 30)])
    kept = []
    for step in range(1, 6):
        kept.append(lists.grads)  # so that the next ones are elsewhere
        lists.grads = [torch.full_like(each, step) for each in lists.grads]
        check_adamw(lists, steps=1)


# CUDA graphs


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_graph_of_the_average() -> None:
    lists = make(SHAPES)
    expected = lists.on("cuda")
    graph, weights = capture(lists.ema)
    assert_same(lists, expected)  # a capture runs nothing
    other = make([(77,), (300, 40)], seed=9)
    for step in range(4):
        for tensors in zip(lists.grads, expected.grads, strict=True):
            value = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(step)).cuda()
            for tensor in tensors:
                tensor.copy_(value)
        graph.replay()
        other.ema()  # calls in between take their own table, and memory that is not the graph's
        right = expected.ema()
        assert torch.equal(weights.norms, right.norms)
        assert torch.equal(weights.alphas, right.alphas)
        assert_same(lists, expected)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.int64], ids=str)
def test_graph_of_adamw(step_dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    lists = make(SHAPES, torch.bfloat16, state_dtype)
    expected = lists.on("cuda")
    step, lr = torch.zeros((), device="cuda", dtype=step_dtype), torch.zeros((), device="cuda", dtype=torch.float64)

    def call() -> BalanceWeights:
        step.add_(1)
        options = {**ADAMW, **lists.options(), "seed": 90}
        return adamw_balance_ema_capturable_(*lists.adamw_lists(), step=step, lr=lr, **options)

    graph, weights = capture(call)
    for count in range(1, 5):
        lr.fill_(0.1 / count)
        graph.replay()
        right = expected.adamw(count, lr=0.1 / count, seed=90 + count)
        assert torch.equal(weights.norms, right.norms)
        assert torch.equal(lists.alphas, expected.alphas)
        assert_same(lists, expected)


def test_graph_with_the_backward_pass() -> None:
    layer = torch.nn.Linear(64, 64, device="cuda")
    x = torch.randn(8, 64, device="cuda")
    params = list(layer.parameters())
    state = [[torch.zeros_like(p) for p in params] for _ in range(4)]
    alphas = torch.zeros(2, device="cuda")
    step, lr = torch.zeros((), device="cuda"), torch.full((), 1e-2, device="cuda")

    def train() -> Tensor:
        step.add_(1)
        loss = layer(x).square().mean()
        grads = torch.autograd.grad(loss, params)
        m, v, e, previous = state
        adamw_balance_ema_capturable_(params, grads, m, v, e, previous, alphas, step=step, lr=lr)
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train()
    torch.cuda.current_stream().wait_stream(side)
    graph, loss = capture(train)
    graph.replay()
    first = loss.item()
    for _ in range(50):
        graph.replay()
    assert loss.item() < 0.9 * first
    assert step.item() == 52


def test_a_replay_waits_for_nothing() -> None:
    lists = make([(1000,)] * 224)
    graph, _ = capture(lists.ema)
    with no_waiting():
        graph.replay()
    torch.cuda.synchronize()


def test_what_a_graph_would_freeze_is_refused() -> None:
    lists = make([(100,)], state_dtype=torch.bfloat16)
    calls = {lists.ema: "random bits", lists.flush: "random bits", lambda: lists.adamw(1): "step count"}
    for call, message in calls.items():
        with pytest.raises(CitFastError, match=message):
            capture(lambda call=call: (lists.alphas.add_(0), call()))  # torch warns of an empty graph


def test_without_force_the_cuda_kernels_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from cit_fast.ops import backends
    from cit_fast.ops.balance_ema import cuda as kernels

    monkeypatch.setattr(backends, "forced_backend", lambda: None)
    assert backends.resolve("balance_ema_", torch.device("cuda")) is not kernels._balance_ema


def test_what_the_kernels_do_not_take_is_refused() -> None:
    lists = make([(4, 6)])
    lists.averages = [each.double() for each in lists.averages]
    with pytest.raises(BackendError, match="float32 or bfloat16, not"):
        lists.ema()
