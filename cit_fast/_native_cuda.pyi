"""Types of the CUDA module (csrc/cuda/bindings.cpp). Pointers are device addresses as integers; nothing is checked."""

CHUNK: int

def architectures() -> str: ...
def why_not(device: int) -> str: ...
def balance_ema(
    table: int,
    *,
    count: int,
    chunks: int,
    rule: int,
    decay: float,
    fallback: float,
    partials: int,
    alphas: int,
    fallbacks: int,
    device: int,
    stream: int,
) -> None: ...
def flush_balance_ema(table: int, *, count: int, chunks: int, alphas: int, device: int, stream: int) -> None: ...
