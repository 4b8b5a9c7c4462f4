"""One optimizer has one average; what hides its steps, gradients or state from a wrapper is refused or mended."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW
from toy_training import make_model, train

from cit_fast.errors import CitFastError
from cit_fast.optim import BalanceEMA, find_balance_ema


@pytest.mark.parametrize("first", [BalanceEMA, BalanceEMA.attach])
@pytest.mark.parametrize("second", [BalanceEMA, BalanceEMA.attach])
def test_a_second_average_is_refused(first: Any, second: Any) -> None:
    inner = SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    one = first(inner)
    with pytest.raises(CitFastError, match="this optimizer has an average already"):
        second(inner)
    assert one.optimizer is inner


def test_a_wrapper_that_is_gone_is_freed_and_makes_way() -> None:
    param = nn.Parameter(torch.ones(3))
    inner = SGD([param], lr=0.1)
    for _ in range(3):
        optimizer = BalanceEMA(inner)
        param.grad = torch.ones(3)
        optimizer.step()
        gone = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert gone() is None
    assert not inner._optimizer_load_state_dict_pre_hooks
    assert not inner._optimizer_load_state_dict_post_hooks
    BalanceEMA.attach(inner)
    gc.collect()
    assert find_balance_ema(inner) is not None  # the optimizer keeps what watches it


def test_detaching_ends_once_and_leaves_the_optimizer_as_it_was() -> None:
    inner = AdamW([nn.Parameter(torch.ones(3))], fused=True)
    assert inner._step_supports_amp_scaling
    handle = BalanceEMA.attach(inner)
    assert not inner._step_supports_amp_scaling
    handle.detach()
    assert inner._step_supports_amp_scaling
    other = BalanceEMA.attach(inner)
    with pytest.raises(CitFastError, match="is detached already"):
        handle.detach()
    assert find_balance_ema(inner) is other


def test_a_prepared_optimizer_is_not_wrapped() -> None:
    """Its step() does nothing while gradients accumulate."""
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True).prepare(SGD([nn.Parameter(torch.ones(3))], lr=0.1))
    with pytest.raises(CitFastError, match=r"use accelerator.prepare\(BalanceEMA\(optimizer\)\), or BalanceEMA.attach"):
        BalanceEMA(prepared)
    BalanceEMA.attach(prepared)


@pytest.mark.parametrize("make", [BalanceEMA, BalanceEMA.attach])
def test_an_optimizer_that_would_not_save_the_averages_is_refused(make: Any) -> None:
    redundancy = type("ZeroRedundancyOptimizer", (AdamW,), {})
    with pytest.raises(CitFastError, match="optimizer_class=AdamWBalanceEMA"):
        make(redundancy([nn.Parameter(torch.ones(3))]))


@pytest.mark.parametrize("foreach", [None, True])
def test_the_average_sees_the_gradients_that_nesterov_would_write_to(foreach: bool | None) -> None:
    def norms(foreach: bool | None) -> torch.Tensor:
        torch.manual_seed(0)
        param = nn.Parameter(torch.ones(9))
        optimizer = BalanceEMA(SGD([param], lr=0.1, momentum=0.9, nesterov=True, foreach=foreach))
        for _ in range(3):
            param.grad = torch.randn(9)
            given = param.grad.clone()
            optimizer.step()
            assert torch.equal(param.grad, given)
        return optimizer._last[0].weights.norms

    expected = norms(False)
    if foreach:
        with pytest.warns(UserWarning, match="foreach is False from now on"):
            assert torch.equal(norms(foreach), expected)
    else:
        assert torch.equal(norms(foreach), expected)


@pytest.mark.parametrize("flatten", [True, False])
def test_a_flattened_checkpoint_of_a_watched_optimizer_says_what_it_lost(flatten: bool) -> None:
    """torch.distributed.checkpoint asks a flattened state for the names that the optimizer's state has now."""
    model = make_model(torch.bfloat16)
    inner = AdamW(model.parameters())
    watcher = BalanceEMA.attach(inner)
    train(model, inner, range(3))
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = get_optimizer_state_dict(model, inner, options=options)
    if flatten:
        with pytest.warns(UserWarning, match="has no average of a parameter, so it starts anew"):
            set_optimizer_state_dict(model, inner, saved, options=options)
    else:
        set_optimizer_state_dict(model, inner, saved, options=options)
    assert watcher.has_averages() is not flatten
    train(model, inner, range(3, 4))
