"""Triton kernels compiled ahead of time, for GPUs that need not be here: what the machine code uses of one.

The tests hold the kernels to it (``tests/kernels/*_builds.py``), ``bench/gpu_predictions.py`` reckons times from it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from cit_fast.kernels import (
    balance_ema,
    balance_ema_tables,
    information_gain,
    information_gain_losses,
    information_gain_rows,
    wasserstein,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

REGISTERS = 65536
"""Of a processor, 32 bits each."""
THREADS = 2048
"""Of a processor."""
SHARED = 227 << 10
"""Bytes of a processor of an H100, for programs."""
STACK = 32
"""Bytes that another version of the compiler may keep there."""
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_LABEL = re.compile(r"\s*(\.L_\S+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);")
_BRANCH = re.compile(r"BRA\S*.*`\((\.L_\S+)\)")


class MachineCode(NamedTuple):
    """What the compiler made of a kernel."""

    ptx: str
    sass: str
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread: what did not fit into registers, and a few that some versions always keep."""
    local: int
    shared: int
    """Bytes of a program."""
    warps: int

    def programs(self, shared: int) -> int:
        """How many programs are on a processor at a time, with so much shared memory in bytes."""
        # Registers go to a warp in units of 256.
        of_warp = -(-self.registers * 32 // 256) * 256
        fit = [REGISTERS // (of_warp * self.warps), THREADS // (32 * self.warps)]
        return min([*fit, shared // self.shared] if self.shared else fit)

    def loops(self) -> list[Counter[str]]:
        """The operations of each loop, without those of loops within it, as the SASS names them (``LDG.E.128``)."""
        places: dict[str, int] = {}
        operations: list[str] = []
        ends: list[tuple[int, int]] = []
        for line in self.sass.splitlines():
            if found := _LABEL.match(line):
                places[found[1]] = len(operations)
            elif found := _INSTRUCTION.search(line):
                operations.append(found[1].split()[0])
                back = _BRANCH.match(found[1])
                if back and back[1] in places:
                    ends.append((places[back[1]], len(operations)))
        found = {span: Counter(operations[slice(*span)]) for span in sorted(set(ends))}
        for begin, end in sorted(found, key=lambda span: span[1] - span[0]):  # a loop before those around it
            for other, of_other in found.items():
                if other[0] <= begin and end <= other[1] and other != (begin, end):
                    of_other.subtract(found[begin, end])
        return [+loop for loop in found.values()]


def compiled(
    kernel: Any, architecture: int, types: Mapping[str, str], constants: Mapping[str, Any], **options: Any
) -> MachineCode:
    """Compile a kernel as its launcher does, where torch has allocated its tensors, which are aligned.

    Args:
        architecture: 90 for sm_90.
        types: of the other arguments: ``"*fp32"``, ``"i32"``, or ``"i32:16"`` for multiples of 16.
        constants: of those that the launcher makes constants.
        options: of the launch (``num_warps``, ...).
    """
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        kernel,
        {name: kind.removesuffix(":16") for name, kind in signature.items()},
        dict(constants),
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return MachineCode(
        made.asm["ptx"],
        sass,
        *(used[name] for name in ("REG", "STACK", "LOCAL")),
        made.metadata.shared,
        made.metadata.num_warps,
    )


def of_balance_ema(name: str, architecture: int, **constants: Any) -> MachineCode:
    """A kernel of the averages."""
    kernel = getattr(balance_ema, name)
    constants["CHUNK"] = balance_ema_tables.CHUNK
    if name != "weights_kernel":
        constants.setdefault("NEAREST", False)
        constants["LOG_GROUPS"] = balance_ema_tables.LOG_GROUPS
    types = {
        **dict.fromkeys(kernel.arg_names, "fp32"),
        **dict.fromkeys(("sizes", "streams"), "*i64"),
        **dict.fromkeys(("slots", "alphas", "remaining"), "*fp32"),
        "chunks": "*i32",
        "norms": "*fp64",
        "fallbacks": "*u8",
        "seed": "i32",
    }
    return compiled(kernel, architecture, types, constants, **balance_ema._OPTIONS)


def of_information_gain(kernel: Any, architecture: int, types: Mapping[str, str], **options: Any) -> MachineCode:
    """A kernel of the gain or the losses; ``options``: its constants and the launch's."""
    scalars = dict.fromkeys(("scale", "softcap", "entropy_gate", "lift"), "fp32")
    types = {**dict.fromkeys(kernel.arg_names, "i32"), **scalars, "targets": "*i64", **types}
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    launch = {name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in options}
    return compiled(kernel, architecture, types, constants, **launch)


def of_gain(
    tiling: str,
    architecture: int,
    hidden: str,
    weight: str,
    *,
    even: bool = True,
    bias: bool = False,
    cap: bool = False,
    **ones: int,
) -> MachineCode:
    """``gain_kernel`` for hidden states and a head of these types; ``ones``: strides that are 1."""
    precise = hidden == "*fp32"
    strides = ("width", "full_stride", "masked_stride", "weight_stride")
    types = {
        **dict.fromkeys(strides, "i32" if tiling == "unaligned" else "i32:16"),
        **dict.fromkeys(("full", "masked"), hidden),
        "weight": weight,
        "bias": "*fp32",
        "partials": "*fp32",
    }
    return of_information_gain(
        information_gain.gain_kernel,
        architecture,
        types,
        BIAS=bias,
        CAP=cap,
        EVEN=even,
        PRECISE=precise,
        **ones,
        **information_gain._TILINGS[tiling, 32 if precise else 16]._asdict(),
        **information_gain.FUSED,
    )


def of_losses(
    loss: str, gradient: str | None, architecture: int, *, bias: bool = False, cap: bool = False, gate: bool = False
) -> MachineCode:
    """The kernel of a loss, ``cross_entropy``, ``jsd`` or ``kl``, whose gradient is of this type; ``gate``: of the
    entropy, or an entry that is taken out.
    """
    kernel = getattr(information_gain_rows, f"{loss}_kernel")
    one_side = loss == "cross_entropy"
    pointers = ("logits", "live", "frozen", "bias", "bias_live", "bias_frozen", "temperature", "row_weight", "losses")
    types = {**dict.fromkeys(pointers, "*fp32"), **dict.fromkeys(("stride", "gradient_stride"), "i32:16")}
    return of_information_gain(
        kernel,
        architecture,
        {**types, "gradient": gradient or "*fp32"},
        **dict.fromkeys(("BIAS", "BIAS_LIVE", "BIAS_FROZEN"), bias),
        **dict.fromkeys(("GATE", "WITHOUT"), gate),
        CAP=cap,
        GRADIENT=gradient is not None,
        **(information_gain_losses._CROSS_ENTROPY if one_side else information_gain_losses._DIVERGENCE),
    )


def of_wasserstein(name: str, architecture: int, options: Mapping[str, Any]) -> MachineCode:
    """A kernel of the distances; ``options``: its constants and the launch's."""
    kernel = getattr(wasserstein, name)
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    pointers = {"order": "*i32", "table": "*i64", "costs": "*fp32", "kernels": "*fp32"}
    types = {**dict.fromkeys(kernel.arg_names, "*fp64"), **pointers}
    launch = {name: options[name] for name in ("num_warps", "maxnreg", "enable_fp_fusion")}
    return compiled(kernel, architecture, types, constants, **launch)


def check(code: MachineCode, programs: int = 1) -> None:
    """Nothing spilled, and so many programs on a processor of an H100 at a time.

    Raises:
        AssertionError: else.
    """
    print(f"{code.registers} registers, {code.shared} bytes of shared memory")
    assert code.stack <= STACK
    assert code.local == 0
    assert code.programs(SHARED) >= programs


def count(loop: Counter[str], *beginnings: str) -> int:
    """How many operations of a loop begin so."""
    return sum(number for name, number in loop.items() if name.startswith(beginnings))


def heaviest(loops: Iterable[Counter[str]]) -> Counter[str]:
    """The loop with the most operations."""
    return max(loops, key=Counter.total)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, check=True, text=True).stdout
