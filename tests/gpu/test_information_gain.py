"""The Triton kernels of the information-gain family on a GPU: the cases of tests/kernels, and what only a GPU can show.

pytest tests/gpu
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_process import run_tests
from torch import Tensor

from cit_fast import backend
from cit_fast.ops import linear_cross_entropy, masked_jsd, token_gain
from cit_fast.ops.information_gain import TokenGain

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CASES = Path(__file__).parent.parent / "kernels" / "information_gain_cases.py"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Problem:
    """Two contexts of the same tokens, with probabilities of the targets from next to nothing to nearly 1."""

    def __init__(self, tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(tokens + vocabulary)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda")

        weight = random(vocabulary, width) * (1.6 / width**0.5)
        self.targets = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
        towards = weight[self.targets]
        self.full, self.masked = (
            (random(tokens, width) + 8 * torch.rand(tokens, 1, generator=generator, device="cuda") * towards).to(dtype)
            for _ in range(2)
        )
        self.weight = weight.to(dtype)

    def gain(self) -> TokenGain:
        return token_gain(self.full, self.masked, self.weight, self.targets)

    def losses(self, *, head: bool = False) -> list[Tensor]:
        """Both losses, each followed by its gradients."""
        out = []
        for loss_of in (self.jsd, self.cross_entropy):
            leaves = [self.full.detach().requires_grad_(), self.weight.detach().requires_grad_(head)]
            loss = loss_of(*leaves)
            out += [loss.detach(), *torch.autograd.grad(loss, leaves if head else leaves[:1])]
        return out

    def jsd(self, hidden: Tensor, head: Tensor) -> Tensor:
        return masked_jsd(hidden, self.masked, head, self.weight, 1.5)

    def cross_entropy(self, hidden: Tensor, head: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, head, self.targets)


def added_at_the_peak(call: Callable[[], object]) -> int:
    """Bytes, of a second call."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_all_cases_of_the_interpreter() -> None:
    run_tests(CASES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(512, 1024, 65536), (333, 576, 151_937)])
def test_large_vocabularies(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    problem = Problem(tokens, width, vocabulary, dtype)
    with backend("triton"):
        gain, losses = problem.gain(), problem.losses()
    problem.full, problem.masked, problem.weight = (
        each.double() for each in (problem.full, problem.masked, problem.weight)
    )
    with backend("reference"):
        exact, exact_losses = problem.gain(), problem.losses()
    assert (gain.probability_gain - exact.probability_gain).abs().max() < 1e-4
    for name, value, right in zip(TokenGain._fields, gain, exact, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=3e-4, msg=name)
    unit = max(1e-4, torch.finfo(dtype).eps)
    for value, right in zip(losses, exact_losses, strict=True):
        # Of a loss its own size, of a gradient that of the largest.
        bound = 1e-4 if value.dim() == 0 else 2 * unit
        assert (value.double() - right).abs().max() <= bound * right.abs().max()


def test_the_choice_for_cuda_tensors() -> None:
    problem = Problem(300, 256, 5000, torch.bfloat16)
    with backend("triton"):
        expected = [*problem.gain(), *problem.losses()]
    assert all(torch.equal(x, y) for x, y in zip([*problem.gain(), *problem.losses()], expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_gives_the_same_bits_on_any_stream(dtype: torch.dtype) -> None:
    problem = Problem(1000, 512, 50_257, dtype)
    with backend("triton"):
        first = [*problem.gain(), *problem.losses(head=True)]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            second = [*problem.gain(), *problem.losses(head=True)]
        stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_memory_is_bounded() -> None:
    from cit_fast.kernels.information_gain_losses import _workspace_bytes

    problem = Problem(4096, 512, 131_072, torch.bfloat16)
    logits = 2 * problem.full.shape[0] * problem.weight.shape[0] * 2  # of both contexts
    with backend("triton"):
        assert added_at_the_peak(problem.gain) < 0.05 * logits
        gradients = 8 * problem.full.numel()
        workspace = _workspace_bytes(torch.device("cuda", torch.cuda.current_device()))
        assert added_at_the_peak(problem.losses) < workspace + 2 * gradients + (16 << 20)


def test_cuda_graph() -> None:
    """Nothing waits for the host: values that are not checked need not be read."""
    problem = Problem(200, 256, 5000, torch.bfloat16)
    with backend("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            problem.gain(), problem.losses()  # compiles
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = [*problem.gain(), *problem.losses()]
        problem.full.copy_(problem.full.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        expected = [*problem.gain(), *problem.losses()]
    assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))


def test_compiled_with_torch() -> None:
    problem = Problem(100, 128, 3000, torch.bfloat16)
    with backend("triton"):
        expected = [*problem.gain(), problem.jsd(problem.full, problem.weight)]
        compiled = torch.compile(lambda: (*problem.gain(), problem.jsd(problem.full, problem.weight)), fullgraph=True)
        assert all(torch.equal(x, y) for x, y in zip(compiled(), expected, strict=True))


def test_no_new_compilation_for_other_sizes() -> None:
    """A first call is like every other: lengths of a batch must not be compiled for."""
    from cit_fast.kernels.information_gain import gain_kernel

    device = torch.cuda.current_device()
    counts = []
    with backend("triton"):
        for tokens in (300, 17, 1, 4096, 301):
            Problem(tokens, 256, 5000, torch.bfloat16).gain()
            counts.append(len(gain_kernel.device_caches[device][0]))
    assert counts[-1] == counts[0]
