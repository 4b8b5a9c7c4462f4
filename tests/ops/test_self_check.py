"""Kernels prove themselves before they serve: right and faster, wrong, slow, raising, hanging, crashing ones.

The CPU stands in for a GPU and PyTorch operations for its kernels; the processes of the check find them through a
``sitecustomize`` module.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cit_fast import cache
from cit_fast.cache import JsonCache
from cit_fast.errors import BackendError, RunError
from cit_fast.ops import backends, balance_ema, balance_norms_, self_check
from cit_fast.ops.backends import Backend, BackendStatus, Work, resolve
from cit_fast.ops.balance_ema import flat
from cit_fast.ops.self_check import Verdict, battery, trial
from cit_fast.optim import AdamWBalanceEMA, BalanceEMA

CPU = torch.device("cpu")
OPS = ("balance_norms_", "balance_ema_", "adamw_balance_ema_", "flush_balance_ema_")

# The kernels of the processes: those of `flat`, with something done before or after. What serves without them is slow.
STAND_INS = """
import os, pathlib, sys, time

def stand_in():
    import torch
    from cit_fast.ops import backends
    from cit_fast.ops.balance_ema import flat

    def slow(run):
        def call(*arguments):
            time.sleep(0.01)
            return run(*arguments)
        return call

    backends.PREFERENCE["cpu"] = (backends.Backend.TRITON, backends.Backend.CUDA, backends.Backend.REFERENCE)
    for op in {ops!r}:
        run = getattr(flat, op)
        table = backends._implementations[op]
        table[backends.Backend.REFERENCE] = slow(backends.implementation(op, backends.Backend.REFERENCE))
        table[backends.Backend.TRITON] = faulty(run, {faults!r}.get(op))
        table[backends.Backend.CUDA] = run

def faulty(run, fault):
    def call(*arguments):
        import torch
        if fault == "raises":
            raise RuntimeError("no kernel image\\nis available")
        if fault == "hangs":
            time.sleep(1000)
        if fault == "crashes":
            print("illegal memory access", file=sys.stderr, flush=True)
            os._exit(139)
        if fault == "has no memory" or fault == "has little" and sum(x.numel() for x in arguments[0]) > 30000:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        if fault == "finds no compiler":
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
        if fault == "slow":
            time.sleep(0.03)
        result = run(*arguments)
        if fault == "wrong":
            result += 1e-3
        if fault == "another each time":
            result[0, 0] *= 1 + 1e-7 * time.time() % 1e-6
        return result
    return call

if sys.orig_argv[1:3] == ["-m", "cit_fast.ops.self_check"]:
    with open({log!r}, "a") as log:
        log.write("a check\\n")
    print("a compiler's remark")
    stand_in()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Makes kernels with these faults, op by op, and gives the file that has a line for each process of the check."""
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CIT_FAST_SELFCHECK", raising=False)
    monkeypatch.setattr(self_check, "CHECKED", {"cpu"})
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(self_check, "_chosen", {})
    monkeypatch.setattr(backends, "_status", lambda *_: BackendStatus(True, "for the test"))
    monkeypatch.setitem(backends.PREFERENCE, "cpu", (Backend.TRITON, Backend.CUDA, Backend.REFERENCE))
    log = tmp_path / "log"
    kept = {op: dict(backends._implementations[op]) for op in OPS}

    def make(**faults: str) -> Path:
        text = STAND_INS.format(ops=OPS, faults=faults, log=str(log))
        (tmp_path / "sitecustomize.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        log.touch()
        for op in OPS:
            for which in (Backend.TRITON, Backend.CUDA):
                backends._implementations[op][which] = getattr(flat, op)
        return log

    yield make
    for op in OPS:
        backends._implementations[op] = kept[op]


def checks(log: Path) -> int:
    return len(log.read_text().splitlines())


def in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing were known but what is in the cache."""
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(self_check, "_chosen", {})


def test_from_the_first_use_to_the_cache(
    stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = stand_in()
    few = OPS[::3]
    monkeypatch.setattr(battery.BATTERIES["balance_ema"], "OPS", few)
    p, e, g = [torch.ones(3)], [torch.zeros(3)], [torch.full((3,), 0.5)]
    assert balance_norms_(p, e, g, [torch.zeros(3)]).tolist() == [[3.0, 1.5, 1.5]]
    assert checks(log) == 2  # both kernel backends, all ops of the family and all dtypes each
    found = self_check.verdicts("balance_ema", Backend.TRITON, CPU)
    assert set(found) == {(op, dtype) for op in few for dtype in ("float32", "bfloat16", "float16")}
    for verdict in found.values():
        assert verdict.problem is None
        assert verdict.seconds.keys() == {"little", "much"}
        assert all(0 < kernel < without for kernel, without in verdict.seconds.values())
        assert verdict.gain("little") > 1
    said = [record.message for record in caplog.records if record.name.startswith("cit_fast")]
    assert said == [
        f"cpu: checking the {which} kernels of balance_ema, once for this device" for which in ("triton", "cuda")
    ]

    in_another_process(monkeypatch)
    for op in few:
        for dtype in (torch.float32, torch.bfloat16):
            assert resolve(op, CPU, work=lambda dtype=dtype: Work(dtype, 1 << 30)) is getattr(flat, op)
    assert checks(log) == 2

    monkeypatch.setenv("CIT_FAST_SELFCHECK", "always")
    in_another_process(monkeypatch)
    resolve("flush_balance_ema_", CPU)
    resolve("flush_balance_ema_", CPU)
    assert checks(log) == 4


def test_a_record_that_is_damaged_or_of_another_driver_is_none(
    stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = stand_in()
    units = [("flush_balance_ema_", "float32")]
    monkeypatch.setattr(battery.BATTERIES["balance_ema"], "OPS", ("flush_balance_ema_",))
    monkeypatch.setattr(battery.BATTERIES["balance_ema"], "DTYPES", ("float32",))
    assert list(self_check.verdicts("balance_ema", Backend.TRITON, CPU)) == units
    (kept,) = (self_check.cache_folder() / "kernels").rglob("*.json")
    kept.write_text(kept.read_text().replace("float32", "float64"))
    in_another_process(monkeypatch)
    self_check.verdicts("balance_ema", Backend.TRITON, CPU)
    assert checks(log) == 2
    assert json.loads(kept.read_text())["verdicts"][0]["dtype"] == "float32"
    monkeypatch.setattr(self_check, "_sources", lambda: "other kernels")
    in_another_process(monkeypatch)
    self_check.verdicts("balance_ema", Backend.TRITON, CPU)
    assert checks(log) == 3
    # What another version of the battery had left out is checked, and nothing else.
    monkeypatch.setattr(battery.BATTERIES["balance_ema"], "DTYPES", ("float32", "float16"))
    in_another_process(monkeypatch)
    before = self_check.verdicts("balance_ema", Backend.TRITON, CPU)
    assert checks(log) == 4
    in_another_process(monkeypatch)
    assert self_check.verdicts("balance_ema", Backend.TRITON, CPU) == before
    # A folder in which nothing can be kept: checked in each process.
    monkeypatch.setenv("CIT_FAST_CACHE", str(log))
    for count in (5, 6):
        in_another_process(monkeypatch)
        assert self_check.verdicts("balance_ema", Backend.TRITON, CPU)[units[0]].problem is None
        assert checks(log) == count


def test_faulty_kernels_are_refused(
    stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = stand_in(
        balance_norms_="wrong", balance_ema_="raises", adamw_balance_ema_="hangs", flush_balance_ema_="crashes"
    )
    monkeypatch.setattr(trial, "LIMIT_S", 8.0)
    monkeypatch.setattr(battery.BATTERIES["balance_ema"], "DTYPES", ("float32",))
    found = {op: verdict for (op, _), verdict in self_check.verdicts("balance_ema", Backend.TRITON, CPU).items()}
    assert checks(log) == 3  # the one that raised and the one that hung took their processes with them
    assert not any(verdict.postponed for verdict in found.values())
    assert (found["balance_norms_"].problem or "").startswith("as in training, released, stochastic: norms is ")
    assert found["balance_ema_"].problem == "RuntimeError: no kernel image is available"
    assert found["adamw_balance_ema_"].problem == "no answer within 8 s"
    assert found["flush_balance_ema_"].problem == "the check ended with code 139 (illegal memory access)"
    told = [record.message for record in caplog.records if "refused on this device" in record.message]
    assert len(told) == 4
    assert "the triton kernels of adamw_balance_ema_ (float32) are refused on this device: no answer" in "".join(told)
    for op in OPS:  # the other backend is right
        assert resolve(op, CPU) is backends._implementations[op][Backend.CUDA]
    in_another_process(monkeypatch)
    resolve(OPS[0], CPU)
    assert checks(log) == 4  # refusals are kept; the fourth was the other backend's
    with backends.backend("triton"):
        assert resolve("balance_ema_", CPU) is backends._implementations["balance_ema_"][Backend.TRITON]


def test_slow_and_uncertain_kernels_lose(stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(balance_norms_="another each time", flush_balance_ema_="slow")
    monkeypatch.setattr(battery.BATTERIES["balance_ema"], "OPS", ("balance_norms_", "flush_balance_ema_"))
    monkeypatch.setattr(battery.BATTERIES["balance_ema"], "DTYPES", ("float32",))
    monkeypatch.setitem(backends.PREFERENCE, "cpu", (Backend.TRITON, Backend.REFERENCE))
    found = self_check.verdicts("balance_ema", Backend.TRITON, CPU)
    problem = found["balance_norms_", "float32"].problem or ""
    assert problem.endswith(("norms has other bits when called again", "is right (1 of 15 elements)"))
    assert found["flush_balance_ema_", "float32"].problem is None
    assert found["flush_balance_ema_", "float32"].gain("little") < 1
    for op in ("balance_norms_", "flush_balance_ema_"):
        assert resolve(op, CPU) is backends._implementations[op][Backend.REFERENCE]


def test_without_memory_the_check_is_postponed(
    stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = stand_in(balance_norms_="has little", balance_ema_="has no memory", flush_balance_ema_="finds no compiler")
    monkeypatch.setattr(battery.BATTERIES["balance_ema"], "DTYPES", ("float32",))
    monkeypatch.setitem(backends.PREFERENCE, "cpu", (Backend.TRITON, Backend.REFERENCE))
    assert resolve("balance_ema_", CPU) is backends._implementations["balance_ema_"][Backend.REFERENCE]
    found = {op: verdict for (op, _), verdict in self_check.verdicts("balance_ema", Backend.TRITON, CPU).items()}
    assert [op for op, verdict in found.items() if verdict.postponed] == ["balance_ema_", "flush_balance_ema_"]
    assert found["adamw_balance_ema_"].problem is None  # the others are checked all the same
    # There was memory for little alone, which then stands for much.
    assert found["balance_norms_"].seconds.keys() == {"little"}
    for elements in (0, 1 << 30):
        work = Work(elements=elements)
        assert resolve("balance_norms_", CPU, work=lambda work=work: work) is flat.balance_norms_
    assert checks(log) == 1
    assert "not checked for now: tried to allocate 2 GiB" in caplog.text
    assert "not checked for now: RuntimeError: Failed to find C compiler" in caplog.text
    stand_in()  # another process, with memory
    in_another_process(monkeypatch)
    for op in OPS:
        assert resolve(op, CPU) is getattr(flat, op)
    assert checks(log) == 2


@pytest.mark.parametrize("problem", ["locked", "written"])
def test_where_nothing_can_be_kept_it_is_checked_once_a_process(
    stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    log = stand_in()
    monkeypatch.setattr(battery.BATTERIES["balance_ema"], "OPS", ("flush_balance_ema_",))
    monkeypatch.setattr(battery.BATTERIES["balance_ema"], "DTYPES", ("float32",))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied") if problem == "locked" else RunError("the disk is full")

    monkeypatch.setattr(*((cache.FileLock, "acquire") if problem == "locked" else (JsonCache, "put")), refuse)
    for _ in range(2):
        assert self_check.verdicts("balance_ema", Backend.TRITON, CPU)["flush_balance_ema_", "float32"].problem is None
    assert checks(log) == 1
    if problem == "locked":  # what is there can still be read
        monkeypatch.undo()
        return
    monkeypatch.setattr(self_check, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    in_another_process(monkeypatch)
    assert len(self_check.verdicts("balance_ema", Backend.TRITON, CPU)) == 1


def test_an_error_before_the_kernel_was_called_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the definition, or of the making of inputs: told, not kept, whatever its words."""

    def broken(*_: object) -> None:
        raise RuntimeError("an illegal memory access")

    told: list[dict[str, object]] = []
    monkeypatch.setattr(trial, "_say", told.append)
    for problem_of, postponed in ((Backend.REFERENCE, True), (Backend.TRITON, False)):
        both = dict.fromkeys((Backend.TRITON, Backend.REFERENCE), flat.flush_balance_ema_) | {problem_of: broken}
        monkeypatch.setattr(trial, "implementation", lambda op, which, both=both: both[which])
        answer, goes_on = trial._judged("balance_ema", "flush_balance_ema_", Backend.TRITON, torch.float32, CPU)
        assert answer["problem"] == "RuntimeError: an illegal memory access"
        assert answer["postponed"] is postponed
        assert not goes_on


def test_no_process_for_the_check(stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    found = self_check.verdicts("wasserstein", Backend.TRITON, CPU)
    assert {verdict.postponed for verdict in found.values()} == {True}
    assert "no process for the check could be started" in str(found)


def test_several_processes_check_once(stand_in: Callable[..., Path], tmp_path: Path) -> None:
    log = stand_in()
    code = (
        "import torch, sitecustomize; sitecustomize.stand_in()\n"
        "from cit_fast.ops import self_check; from cit_fast.ops.backends import Backend\n"
        "from cit_fast.ops.self_check.battery import BATTERIES\n"
        "BATTERIES['balance_ema'].OPS, BATTERIES['balance_ema'].DTYPES = ('flush_balance_ema_',), ('float32',)\n"
        "print(self_check.verdicts('balance_ema', Backend.TRITON, torch.device('cpu')))"
    )
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=paths) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0] for process in both)
    assert first == second
    assert "flush_balance_ema_" in first
    assert checks(log) == 1


def test_off_lets_kernels_serve_unchecked(stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    log = stand_in()
    monkeypatch.setenv("CIT_FAST_SELFCHECK", "off")
    assert resolve("balance_ema_", CPU) is flat.balance_ema_
    assert checks(log) == 0
    monkeypatch.setenv("CIT_FAST_SELFCHECK", "never")
    with pytest.raises(BackendError, match="CIT_FAST_SELFCHECK: unknown value 'never'; accepted: off, always"):
        resolve("balance_ema_", CPU)


def test_the_faster_kernel_serves_and_the_preferred_where_they_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = [Backend.CUDA, Backend.TRITON, Backend.TORCH, Backend.REFERENCE]
    monkeypatch.setattr(self_check, "CHECKED", {"cpu"})
    op = "balance_ema_"

    def choice(cuda: float, triton: float, elements: int = 0, problem: str | None = None) -> Backend:
        times = {Backend.CUDA: cuda, Backend.TRITON: triton}
        monkeypatch.setattr(self_check, "_chosen", {})
        monkeypatch.setattr(
            self_check,
            "verdicts",
            lambda family, which, device: {
                (op, "float32"): Verdict(
                    problem if which is Backend.CUDA else None,
                    False,
                    {"little": (times[which], 1.0), "much": (0.5, 1.0)},
                )
            },
        )
        chosen = self_check.proven(op, CPU, usable, Work(elements=elements))
        assert chosen[-2:] == usable[-2:]
        return chosen[0]

    assert choice(0.5, 0.3) is Backend.TRITON
    assert choice(0.31, 0.3) is Backend.CUDA
    assert choice(0.1, 0.3, problem="wrong") is Backend.TRITON
    assert choice(1.2, 1.01) is Backend.TORCH
    assert choice(1.2, 1.01, elements=1 << 30) is Backend.CUDA  # on much they are faster
    monkeypatch.setattr(self_check, "_chosen", {})
    assert self_check.proven(op, CPU, usable, Work(torch.float64)) == usable[2:]  # never checked


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(self_check, "_chosen", {})
    monkeypatch.setattr(self_check, "_known", {})
    device, usable = torch.device("cuda", 0), [Backend.CUDA, Backend.TORCH]
    assert self_check.proven("balance_ema_", device, usable, Work()) == [Backend.TORCH]
    assert self_check._chosen == {}
    # What is known serves in a graph as well, though the kernel that serves outside cannot be captured.
    right = {("balance_ema_", "float32"): Verdict(None, False, {"little": (1.0, 2.0)})}
    self_check._known["balance_ema", Backend.CUDA, device] = right
    assert self_check.proven("balance_ema_", device, usable, Work()) == usable


def test_the_optimizers_say_what_they_have_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Work]] = []

    def recorded(op: str, device: torch.device, *, work: Callable[[], Work], **options: object) -> object:
        asked.append((op, work()))
        return resolve(op, device)

    monkeypatch.setattr(balance_ema, "resolve", recorded)
    for make in (AdamWBalanceEMA, lambda params: BalanceEMA(torch.optim.SGD(params, lr=0.1))):
        params = [torch.nn.Parameter(torch.randn(3, 5).bfloat16()), torch.nn.Parameter(torch.randn(7).bfloat16())]
        optimizer = make(params)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
    assert {op for op, _ in asked} >= {"adamw_balance_ema_", "balance_ema_"}
    assert {work for op, work in asked if op != "flush_balance_ema_"} == {Work(torch.bfloat16, 22)}


def test_a_battery_sees_another_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated, to the nearest, and with the same bits for every element."""
    by_key = flat.round_by_key
    ways = (
        lambda values, key, index: (values.view(torch.int32) & -65536).view(torch.float32).bfloat16(),
        lambda values, key, index: values.bfloat16(),
        lambda values, key, index: by_key(values, key, torch.zeros_like(index)),
    )
    for way in ways:
        monkeypatch.setattr(flat, "round_by_key", way)
        for op in ("balance_ema_", "adamw_balance_ema_", "flush_balance_ema_"):
            reference = backends.implementation(op, Backend.REFERENCE)
            cases = battery.BATTERIES["balance_ema"].cases(op, torch.bfloat16, CPU)
            found = [battery.problem(case, getattr(flat, op), reference, CPU) for case in cases]
            assert any("is rounded another way" in (each or "") for each in found), op


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("family", "which"), [("balance_ema", "native"), ("information_gain", "native"), ("wasserstein", "native")]
)
def test_batteries_pass_what_is_right(family: str, which: str, dtype: str) -> None:
    cases = battery.BATTERIES[family]
    for op in cases.OPS:
        kernel, reference = (backends.implementation(op, Backend(each)) for each in (which, "reference"))
        for case in cases.cases(op, getattr(torch, dtype), CPU):
            assert battery.problem(case, kernel, reference, CPU) is None
        for size in battery.SIZES:
            cases.work(op, getattr(torch, dtype), CPU, size)(kernel)
