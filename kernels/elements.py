"""Elements of tensors whose address and dtype come out of a table: loads, stores, rounding. For the other kernels here.

A stream is one of the arrays that a kernel walks side by side: ``addresses`` has the address of each, a number,
``codes`` four bits for the dtype of each. The dtype is known at compile time (``DTYPES``) where all tensors of a list
agree; else it is MIXED, and the code decides at run time, for a whole program at once.

bfloat16 is loaded and stored as its 16 bits: conversions are shifts, and stochastic rounding is an addition to them.
(The Triton interpreter, which the tests use, has no bfloat16 of its own.)
"""

from __future__ import annotations

import triton
import triton.language as tl

# Dtypes of a stream; the code of a tensor is one of the first three.
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
MIXED = tl.constexpr(3)
ABSENT = tl.constexpr(4)

# Neighbours that a thread takes at once: 16 bytes of a 16-bit stream.
GROUP = tl.constexpr(8)


@triton.jit
def _pointers(address, begin, offs, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    if DTYPE == FLOAT32:
        base = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == BFLOAT16:
        base = address.to(tl.pointer_type(tl.uint16))
    else:
        base = address.to(tl.pointer_type(tl.float16))
    pointers = base + begin + offs
    if WIDE:  # said of the result, for what is known of an address does not survive the cast
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, 16]), [1, GROUP])
    return pointers


@triton.jit
def _code(codes, STREAM: tl.constexpr):
    return (codes >> (4 * STREAM)) & 15


@triton.jit
def load(addresses, codes, begin, offs, mask, STREAM: tl.constexpr, DTYPES: tl.constexpr, WIDE: tl.constexpr):
    """The elements as float32; zeros where the mask is off.

    ``begin`` is the first element, a number; ``offs`` are those of the lanes from there, [lanes], or [lanes, GROUP]
    with WIDE, which promises that groups are whole and start at a multiple of 16 bytes.
    """
    address = addresses[STREAM]
    if DTYPES[STREAM] == MIXED:
        code = _code(codes, STREAM)
        if code == FLOAT32:
            x = _load_as(address, begin, offs, mask, FLOAT32, WIDE)
        elif code == BFLOAT16:
            x = _load_as(address, begin, offs, mask, BFLOAT16, WIDE)
        else:
            x = _load_as(address, begin, offs, mask, FLOAT16, WIDE)
    else:
        x = _load_as(address, begin, offs, mask, DTYPES[STREAM], WIDE)
    return x


@triton.jit
def _load_as(address, begin, offs, mask, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    x = tl.load(_pointers(address, begin, offs, DTYPE, WIDE), mask, other=0)
    if DTYPE == BFLOAT16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def store(addresses, codes, begin, offs, mask, x, STREAM: tl.constexpr, DTYPES: tl.constexpr, WIDE: tl.constexpr):
    """Store rounded to the nearest, ties to even; returns the float32 values of what is stored."""
    address = addresses[STREAM]
    if DTYPES[STREAM] == MIXED:
        code = _code(codes, STREAM)
        if code == FLOAT32:
            stored = _store_as(address, begin, offs, mask, x, FLOAT32, WIDE)
        elif code == BFLOAT16:
            stored = _store_as(address, begin, offs, mask, x, BFLOAT16, WIDE)
        else:
            stored = _store_as(address, begin, offs, mask, x, FLOAT16, WIDE)
    else:
        stored = _store_as(address, begin, offs, mask, x, DTYPES[STREAM], WIDE)
    return stored


@triton.jit
def _store_as(address, begin, offs, mask, x, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    pointers = _pointers(address, begin, offs, DTYPE, WIDE)
    if DTYPE == BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = _store_bfloat16(pointers, mask, tl.where(x == x, rounded, (bits >> 16) | 0x40))
    else:
        narrow = x.to(pointers.dtype.element_ty)
        tl.store(pointers, narrow, mask)
        x = narrow.to(tl.float32)
    return x


@triton.jit
def store_state(
    addresses, codes, begin, offs, mask, x, index, key, STREAM: tl.constexpr, DTYPES: tl.constexpr, WIDE: tl.constexpr
):
    """Store float32, or bfloat16 rounded stochastically; returns the float32 values of what is stored."""
    address = addresses[STREAM]
    if DTYPES[STREAM] == MIXED:
        if _code(codes, STREAM) == FLOAT32:
            stored = _store_as(address, begin, offs, mask, x, FLOAT32, WIDE)
        else:
            pointers = _pointers(address, begin, offs, BFLOAT16, WIDE)
            stored = _store_bfloat16(pointers, mask, _stochastic_bits(x, index, key))
    elif DTYPES[STREAM] == FLOAT32:
        stored = _store_as(address, begin, offs, mask, x, FLOAT32, WIDE)
    else:
        pointers = _pointers(address, begin, offs, BFLOAT16, WIDE)
        stored = _store_bfloat16(pointers, mask, _stochastic_bits(x, index, key))
    return stored


@triton.jit
def _store_bfloat16(pointers, mask, bits):
    tl.store(pointers, bits.to(tl.uint16), mask)
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _stochastic_bits(x, index, key):
    """bfloat16 bits of float32 ``x``, rounded up with the probability of the fraction that is cut off.

    What is not finite stays what it is; what is finite stays finite.
    """
    bits = x.to(tl.uint32, bitcast=True)
    truncated = bits >> 16
    rounded = (bits + (_mix(index ^ key) >> 16)) >> 16
    truncated = tl.where(x == x, truncated, truncated | 0x40)  # NaN must not lose its last bit
    infinite = ((rounded & 0x7F80) == 0x7F80) | ((truncated & 0x7F80) == 0x7F80)  # by the carry, or from the start
    return tl.where(infinite, truncated, rounded)


@triton.jit
def random_key(seed, tensor, STREAM: tl.constexpr):
    """What the random bits of a whole stream have in common; ``STREAM`` counts what is rounded, as in the reference."""
    place = (3 * tensor + (STREAM + 1)).to(tl.uint32)
    return _mix(seed.to(tl.uint32) ^ _mix(place))


@triton.jit
def _mix(x):
    """A bijection of uint32 in which every bit depends on every other (C. Wellons, "lowbias32")."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def sum_neighbours(x, TIMES: tl.constexpr):
    """[n / 2^TIMES]: sums of neighbours, then of neighbouring sums, ...

    The order is the same in every layout, which tl.sum over more than two does not promise.
    """
    for _ in tl.static_range(TIMES):
        x = tl.sum(tl.reshape(x, (x.numel // 2, 2)), axis=1)
    return x


@triton.jit
def pairwise(sums, x, place):
    """Take in element ``place`` of each group: after the last, sums[2] is what sum_neighbours gives, bit for bit."""
    two, four, eight = sums
    two = tl.where(place % 2 == 0, x, two + x)
    four = tl.where(place % 4 == 1, two, tl.where(place % 4 == 3, four + two, four))
    eight = tl.where(place == 3, four, tl.where(place == 7, eight + four, eight))
    return two, four, eight
