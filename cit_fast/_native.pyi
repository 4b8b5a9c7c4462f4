"""Types of the native module (csrc/bindings.cpp). Pointers are `Tensor.data_ptr()` integers; nothing is checked."""

def simd_name() -> str: ...
def simd_levels() -> list[str]: ...
def set_simd_level(name: str) -> None: ...
def balance_norms(table: list[list[int]], *, store_grads: bool, threads: int, norms: int) -> None: ...
def balance_ema(
    table: list[list[int]],
    *,
    rule: int,
    decay: float,
    fallback: float,
    scale: float,
    store_grads: bool,
    nearest: bool,
    seed: int,
    threads: int,
    alphas: int,
    fallbacks: int,
    norms: int,
    remaining: int,
) -> None: ...
def adamw_balance_ema(
    table: list[list[int]],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rule: int,
    decay: float,
    fallback: float,
    scale: float,
    store_grads: bool,
    nearest: bool,
    seed: int,
    threads: int,
    alphas: int,
    fallbacks: int,
    norms: int,
    remaining: int,
) -> None: ...
def flush_balance_ema(table: list[list[int]], *, nearest: bool, seed: int, threads: int, alphas: int) -> None: ...
def sinkhorn(
    table: list[int],
    *,
    epsilon: float,
    tolerance: float,
    max_iterations: int,
    gap: float,
    cost_error: float,
    threads: int,
    results: int,
) -> None: ...
def exact_transport(table: list[int], *, gap: float, cost_error: float, threads: int, results: int) -> None: ...
def packed_size(n: int, d: int) -> int: ...
def pack_clouds(table: list[int], *, use_float32: bool, threads: int) -> None: ...
def cosine_costs(table: list[int], *, use_float32: bool, rounding: float, threads: int) -> None: ...

FLOAT_COST_ERROR: float
SINKHORN: dict[str, float | tuple[float, float]]  # csrc/sinkhorn.h

def has_bfloat16_products() -> bool: ...

# Address, dtype, rows, columns and elements from row to row.
_Matrix = tuple[int, int, int, int, int]

def token_gain_statistics(
    full: _Matrix,
    masked: _Matrix,
    weight: _Matrix,
    *,
    bias: int,
    targets: int,
    first_entry: int,
    scale: float,
    softcap: float,
    threads: int,
    statistics: int,
) -> None: ...
def masked_jsd(
    live: _Matrix,
    frozen: _Matrix,
    weight_live: _Matrix,
    weight_frozen: _Matrix,
    *,
    bias_live: int,
    bias_frozen: int,
    temperature: int,
    row_weight: int,
    scale: float,
    softcap: float,
    threads: int,
    gradients: tuple[int, int, int],
) -> float: ...
def linear_kl_divergence(
    live: _Matrix,
    frozen: _Matrix,
    weight_live: _Matrix,
    weight_frozen: _Matrix,
    *,
    bias_live: int,
    bias_frozen: int,
    temperature: int,
    row_weight: int,
    targets: int,
    scale: float,
    softcap: float,
    threads: int,
    gradients: tuple[int, int, int],
) -> float: ...
def linear_cross_entropy(
    hidden: _Matrix,
    weight: _Matrix,
    *,
    bias: int,
    targets: int,
    row_weight: int,
    entropy_gate: float,
    scale: float,
    softcap: float,
    threads: int,
    gradients: tuple[int, int, int],
) -> float: ...
def rms_norm(
    addresses: tuple[int, int, int],
    *,
    dtype: int,
    rows: int,
    width: int,
    eps: float,
    from_one: bool,
    threads: int,
) -> None: ...
def rms_norm_backward(
    addresses: tuple[int, int, int, int],
    *,
    dtype: int,
    rows: int,
    width: int,
    eps: float,
    from_one: bool,
    threads: int,
) -> None: ...
