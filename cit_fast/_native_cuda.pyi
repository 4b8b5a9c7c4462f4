"""Types of the CUDA module (csrc/cuda/bindings.cpp). Pointers are device addresses as integers; nothing is checked."""

STREAMS: int
PIECE: int
SLOT_BYTES: int
STEP_BYTES: int

def architectures() -> str: ...
def why_not(device: int) -> str: ...
def layout(sizes: list[int], dtypes: list[int]) -> tuple[list[int], int, int]: ...
def upload(target: int, words: list[int], *, device: int, stream: int) -> None: ...
def balance_norms(
    table: int,
    *,
    count: int,
    blocks: int,
    slots: int,
    device: int,
    stream: int,
    norms: int,
    store_grads: bool,
) -> None: ...
def balance_ema(
    table: int,
    *,
    count: int,
    blocks: int,
    slots: int,
    device: int,
    stream: int,
    norms: int,
    alphas: int,
    fallbacks: int,
    remaining: int,
    rule: int,
    decay: float,
    fallback: float,
    scale: float,
    store_grads: bool,
    nearest: bool,
    seed: int,
) -> None: ...
def adamw_balance_ema(
    table: int,
    *,
    count: int,
    blocks: int,
    slots: int,
    device: int,
    stream: int,
    norms: int,
    alphas: int,
    fallbacks: int,
    remaining: int,
    rule: int,
    decay: float,
    fallback: float,
    scale: float,
    store_grads: bool,
    nearest: bool = False,
    seed: int = 0,
    step: int = 1,
    lr: float = 0.0,
    beta1: float = 0.0,
    beta2: float = 0.0,
    eps: float = 0.0,
    weight_decay: float = 0.0,
    step_on_device: int = 0,
) -> None: ...
def step_on_device(
    target: int,
    *,
    step: int,
    step_is_float: bool,
    lr: int,
    lr_is_float: bool,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    nearest: bool,
    seed: int,
    device: int,
    stream: int,
) -> None: ...
def flush_balance_ema(
    table: int,
    *,
    count: int,
    blocks: int,
    slots: int,
    device: int,
    stream: int,
    alphas: int,
    nearest: bool,
    seed: int,
) -> None: ...
def transport_team(n: int, m: int, device: int) -> tuple[int, int, int, bool]: ...
def transport_teams_at_once(blocks: int, threads: int, shared_bytes: int, device: int) -> int: ...
def transport_scratch(rows: int, columns: int) -> int: ...
def transport(
    *,
    table: int,
    order: int,
    count: int,
    next: int,  # noqa: A002
    costs: int,
    kernels: int,
    weights: int,
    epsilons: int,
    results: int,
    scratch: int,
    rows: int,
    columns: int,
    shared_bytes: int,
    tolerance: float,
    max_iterations: int,
    blocks: int,
    threads: int,
    teams: int,
    device: int,
    stream: int,
) -> None: ...
