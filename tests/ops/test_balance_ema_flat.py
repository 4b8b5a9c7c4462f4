"""The balance-weight EMA by PyTorch operations on tensors laid end to end, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cit_fast.errors import CitFastError
from cit_fast.ops.balance_ema import battery, flat, reference
from cit_fast.ops.balance_ema.reference import AdamWLists, BalanceOptions
from cit_fast.ops.self_check.battery import problem

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", battery.OPS)
def test_every_case_of_the_battery(op: str, dtype: torch.dtype) -> None:
    for case in battery.cases(op, dtype, CPU):
        assert problem(case, getattr(flat, op), getattr(reference, op), CPU) is None


def lists_of(shapes: list[tuple[int, ...]], dtype: torch.dtype, state: torch.dtype, seed: int = 0) -> AdamWLists:
    generator = torch.Generator().manual_seed(seed)

    def some(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    squares = [tensor.abs() for tensor in some(state)]
    return AdamWLists(some(dtype), some(dtype), some(state), squares, some(state), some(dtype))


def step(run: object, lists: AdamWLists, **options: object) -> tuple[list[list[Tensor]], list[Tensor]]:
    copies = AdamWLists(*([tensor.clone() for tensor in tensors] for tensors in lists))
    alphas = torch.linspace(0, 0.9, len(lists.params))
    remaining = torch.full_like(alphas, 2.0)
    weights = run(copies, alphas, remaining, battery.ADAMW, BalanceOptions(seed=3, **options))  # type: ignore[operator]
    return list(copies), [*weights, remaining]


# Around the cut: a tensor of a whole piece and one element, several short ones in a piece, nothing at all.
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_cut_anywhere(state: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(30,), (3, 5), (0,), (100,), (101,), (7, 43), (1,), (99,), ()]
    lists = lists_of(shapes, torch.float32, state)
    whole = step(flat.adamw_balance_ema_, lists)
    monkeypatch.setattr(flat, "CHUNK", 100)
    cut = step(flat.adamw_balance_ema_, lists)
    expected = step(reference.adamw_balance_ema_, lists)
    for got in (whole, cut):
        for tensors, right in zip(got[0], expected[0], strict=True):
            assert all(map(torch.equal, tensors, right))  # to the bit: elements do not know what they lie beside
        torch.testing.assert_close(got[1], expected[1], rtol=2e-7, atol=0)


def test_lists_of_several_dtypes_and_strides() -> None:
    lists = lists_of([(4, 6), (5,), (6, 4), (8, 3)], torch.float32, torch.float32)
    for tensors in lists:
        tensors[1] = tensors[1].to(torch.bfloat16)
        tensors[2] = tensors[2].t().contiguous().t()
    lists.grads[3] = lists.grads[3].half()
    got, weights = step(flat.adamw_balance_ema_, lists)
    expected, right = step(reference.adamw_balance_ema_, lists)
    for tensors, those in zip(got, expected, strict=True):
        assert all(map(torch.equal, tensors, those))
        assert [each.dtype for each in tensors] == [each.dtype for each in those]
    torch.testing.assert_close(weights, right, rtol=2e-7, atol=0)


class Count(TorchDispatchMode):
    """Operations that would be launches on a GPU: views and allocations are none."""

    FREE = (
        "view",
        "empty",
        "detach",
        "unbind",
        "slice",
        "narrow",
        "alias",
        "unflatten",
        "squeeze",
        "as_strided",
        "select",
    )

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.operations += not any(part in str(func) for part in self.FREE)
        return func(*args, **(kwargs or {}))


def test_few_operations_for_many_tensors() -> None:
    lists = lists_of([(16, 24) if i % 2 else (24, 16) for i in range(224)], torch.float32, torch.float32)
    step(flat.adamw_balance_ema_, lists)
    counts = {}
    for module in (flat, reference):
        with Count() as count:
            step(module.adamw_balance_ema_, lists)
        counts[module] = count.operations - 6 * 224  # those of the copies
    assert counts[flat] < 120
    assert counts[reference] > 5000


def test_a_graph_freezes_nothing_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    flat._check_capture("op", cuda, steps=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    flat._check_capture("op", cuda)
    flat._check_capture("op", CPU, steps=True)
    with pytest.raises(CitFastError, match="op: a CUDA graph would freeze the step count"):
        flat._check_capture("op", cuda, steps=True)
    with pytest.raises(CitFastError, match="the random bits"):
        flat._check_capture("op", cuda, by_chance=True)


def test_tables_do_not_follow_the_default_device() -> None:
    with torch.device("meta"):
        assert [each.tolist() for each in flat._place((0, 2), (0, 5), (3, 4), CPU)] == [[0, 2], [0, 5], [3, 4]]
