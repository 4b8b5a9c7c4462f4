"""The Triton kernels of the information-gain family compiled ahead of time, with no GPU: what they use of one.

Not collected by itself: test_information_gain.py runs it in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import triton
from cit_fast.kernels import information_gain, information_gain_losses, information_gain_rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

REGISTERS = 65536  # of a processor
SHARED = {"any": 99 << 10, "sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # that a program may have
ARCHITECTURES = (80, 90)
STACK = 32  # bytes that another version of the compiler may keep there
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
OPERANDS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
LAUNCH = ("num_warps", "num_stages", "enable_fp_fusion")
RICH = "bias and cap"
HEADS = {"plain": {"BIAS": False, "CAP": False}, RICH: {"BIAS": True, "CAP": True}}
DTYPES = ("bfloat16", "float32")


def build(kernel: Any, architecture: int, types: dict[str, str], **options: Any) -> tuple[Any, str]:
    """What the compiler made, and what the machine code uses; "i32:16" is a multiple of 16."""
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    types = {"scale": "fp32", "softcap": "fp32", "entropy_gate": "fp32", "lift": "fp32", "targets": "*i64", **types}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind.endswith(":16")]
    signature = {arg: kind.removesuffix(":16") for arg, kind in signature.items()}
    # As the launcher does: memory that torch allocates is aligned.
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    launch = {name: options[name] for name in LAUNCH if name in options}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, check=True)
    return compiled, done.stdout.decode()


def check(usage: str, warps: int, programs: int = 1) -> None:
    """Nothing spilled, and so many programs on a processor at a time."""
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    print(f"{registers} registers")  # noqa: T201 - pytest -rA shows it
    assert int(re.search(r"STACK:(\d+)", usage).group(1)) <= STACK
    assert "LOCAL:0 " in usage
    assert registers * 32 * warps * programs <= REGISTERS


# Kind of tiling, architecture, dtypes of hidden states and head, whether the width is whole tiles, and the head.
GAINS = [
    *((f"sm_{each}", each, "bfloat16", True, "plain") for each in ARCHITECTURES),
    *((f"sm_{each}", each, dtype, even, RICH) for each in ARCHITECTURES for dtype in DTYPES for even in (True, False)),
    *(("any", 80, dtype, even, RICH) for dtype in DTYPES for even in (True, False)),
    *(("unaligned", each, dtype, False, RICH) for each in ARCHITECTURES for dtype in DTYPES),
    ("sm_90", 90, "float16", True, RICH),
    ("sm_100", 100, "bfloat16", True, RICH),
    ("sm_100", 100, "bfloat16", False, RICH),
    ("sm_80", 80, "float32 by bfloat16", True, RICH),
    ("sm_90", 90, "float32 by bfloat16", False, RICH),
]


@pytest.mark.parametrize(("kind", "architecture", "dtype", "even", "head"), GAINS)
def test_gain(kind: str, architecture: int, dtype: str, even: bool, head: str) -> None:
    hidden, weight = (OPERANDS[each] for each in (dtype.split(" by ") * 2)[:2])
    precise = hidden == "*fp32"
    tiling = information_gain._TILINGS[kind, 32 if precise else 16]
    aligned = kind != "unaligned"
    counts = dict.fromkeys(("width", "full_stride", "masked_stride", "weight_stride"), "i32:16" if aligned else "i32")
    compiled, usage = build(
        information_gain.gain_kernel,
        architecture,
        {"full": hidden, "masked": hidden, "weight": weight, "bias": "*fp32", "partials": "*fp32", **counts},
        EVEN=even,
        PRECISE=precise,
        **HEADS[head],
        **tiling._asdict(),
        **information_gain.FUSED,
    )
    print(f"{compiled.metadata.shared} bytes of shared memory")  # noqa: T201
    check(usage, tiling.num_warps)
    assert compiled.metadata.shared <= SHARED.get(kind, SHARED["any"])
    # On tensor cores, sums in float32; 16 bytes at a time while they work on what came before.
    ptx = compiled.asm["ptx"]
    operand = {"*fp32": "tf32", "*bf16": "bf16", "*fp16": "f16"}[hidden]
    instruction = {
        "sm_90": rf"wgmma\.mma_async\S*\.f32\.{operand}\.{operand}",
        "sm_100": r"tcgen05\.mma\S*kind::f16",  # of both dtypes
    }.get(kind, rf"mma\.sync\S*\.f32\.{operand}\.{operand}")
    assert re.search(instruction, ptx)
    assert ("cp.async.cg.shared.global" in ptx) == aligned


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gain_of_one_column(architecture: int) -> None:
    """Triton makes a constant of an argument that is 1."""
    tiling = information_gain._TILINGS["unaligned", 16]
    ones = dict.fromkeys(("width", "full_stride", "masked_stride", "weight_stride"), 1)
    types = {**dict.fromkeys(("full", "masked", "weight"), "*bf16"), "bias": "*fp32", "partials": "*fp32"}
    flags = {"EVEN": False, "PRECISE": False, **HEADS["plain"]}
    _, usage = build(information_gain.gain_kernel, architecture, types, **ones, **flags, **tiling._asdict())
    check(usage, tiling.num_warps)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["gains_kernel", "statistics_kernel"])
def test_merge(name: str, architecture: int) -> None:
    kernel = getattr(information_gain, name)
    results = {arg: "*fp32" for arg in kernel.arg_names if arg not in ("tokens", "splits", "BLOCK")}
    _, usage = build(kernel, architecture, {**results, "statistics": "*fp64"}, **information_gain._MERGE)
    check(usage, information_gain._MERGE["num_warps"])


LOSSES = [("*bf16", "plain"), ("*bf16", RICH), ("*fp16", RICH), ("*fp32", RICH), (None, RICH)]


@pytest.mark.parametrize(
    ("gradient", "head", "architecture"), [*((*each, 90) for each in LOSSES), ("*bf16", RICH, 80), ("*fp32", RICH, 80)]
)
@pytest.mark.parametrize("loss", ["cross_entropy", "jsd", "kl"])
def test_losses(loss: str, gradient: str | None, architecture: int, head: str) -> None:
    kernel = getattr(information_gain_rows, f"{loss}_kernel")
    names = ("logits", "live", "frozen", "bias", "bias_live", "bias_frozen", "temperature", "row_weight", "losses")
    types = {**dict.fromkeys(names, "*fp32"), "gradient": gradient or "*fp32", "stride": "i32:16"}
    biases = {f"BIAS{side}": HEADS[head]["BIAS"] for side in ("", "_LIVE", "_FROZEN")}
    tiling = information_gain_losses._CROSS_ENTROPY if loss == "cross_entropy" else information_gain_losses._DIVERGENCE
    options = {**tiling, **biases, "CAP": HEADS[head]["CAP"], "GATE": head == RICH, "WITHOUT": head == RICH}
    options["GRADIENT"] = gradient is not None
    types["gradient_stride"] = "i32:16"
    compiled, usage = build(kernel, architecture, types, **options)
    check(usage, tiling["num_warps"])
    ptx = compiled.asm["ptx"]
    assert re.search(r"ld\.global(?:\.\w+)*\.v4\.[bfu]32", ptx)
    if gradient is not None:
        assert re.search(r"st\.global(?:\.\w+)*\.v[24]\.[bfu]32", ptx)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("gradient", ["*bf16", "*fp32"])
def test_bias(gradient: str, architecture: int) -> None:
    types = {"gradient": gradient, "factors": "*fp32", "grad_bias": "*fp32", "stride": "i32:16"}
    _, usage = build(information_gain_rows.bias_kernel, architecture, types, **information_gain_losses._BIAS)
    check(usage, information_gain_losses._BIAS["num_warps"])
