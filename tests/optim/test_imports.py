"""The optimizers need torch alone; the callback needs transformers, and neither needs peft, trl or triton."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("transformers", "peft", "trl", "accelerate", "datasets", "triton", "deepspeed", "flash_attn")


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_optimizers_import_and_run_with_torch_alone() -> None:
    run(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY!r}))  # an import of one of these fails\n"
        "import torch, cit_fast\n"
        "from cit_fast.optim import AdamWBalanceEMA, BalanceEMA\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "for optimizer in AdamWBalanceEMA([p]), BalanceEMA(torch.optim.AdamW([p])):\n"
        "    p.grad = torch.ones(3)\n"
        "    optimizer.step()\n"
    )


def test_the_callback_imports_without_peft_and_trl() -> None:
    loaded = run(
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('peft', 'trl')))\n"
        "import cit_fast.optim\n"
        "print('transformers' in sys.modules)\n"
        "cit_fast.optim.BalanceEMACallback()\n"
        "print('transformers' in sys.modules)\n"
    )
    assert loaded.split() == ["False", "True"]
