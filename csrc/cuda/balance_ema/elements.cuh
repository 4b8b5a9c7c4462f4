// Reading and writing eight neighbouring elements of any dtype: 16 bytes of a 16-bit tensor, 32 of a float32 one. Free
// of everything that only exists on a GPU, so that the host tests run the same code.
//
// All streams of a group are loaded as they lie in memory before the first is converted, so that the loads are in
// flight together. Groups that are not aligned to 16 bytes, or the last of a tensor, go element by element, in the same
// order: the bits stay the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "balance_weight.h"
#include "cuda/balance_ema/layout.h"
#include "stochastic_rounding.h"

namespace cit::gpu {

constexpr int kFloat32 = static_cast<int>(DType::kFloat32), kBFloat16 = static_cast<int>(DType::kBFloat16);

// One of the streams of a tensor.
struct Elements {
  void* data;
  int dtype;
};

// Eight elements as they lie in memory: a float32 in each word, or two 16-bit elements in each of the first four.
struct Group {
  std::uint32_t word[kGroup];
};

CIT_HOST_DEVICE inline float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

CIT_HOST_DEVICE inline std::uint32_t bits_from_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

CIT_HOST_DEVICE inline float absolute(float x) {
  return float_from_bits(bits_from_float(x) & 0x7fffffffu);
}

CIT_HOST_DEVICE inline bool is_finite(float x) {
  return (bits_from_float(x) & 0x7f800000u) != 0x7f800000u;
}

CIT_HOST_DEVICE inline bool is_aligned(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

// The addresses come from a table, so the compiler cannot see that they are global memory and would use slower
// accesses.
CIT_HOST_DEVICE inline void assume_global([[maybe_unused]] const void* data) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(data));
#endif
}

// Elements [at, at + count) of `elements`, count <= 8; zeros after them.
CIT_HOST_DEVICE inline Group load(const Elements& elements, std::int64_t at, int count) {
  assume_global(elements.data);
  Group group{};
  if (elements.dtype == kFloat32) {
    const auto* source = static_cast<const std::uint32_t*>(elements.data) + at;
    if (count == kGroup && is_aligned(source)) {
      const auto* vectors = reinterpret_cast<const uint4*>(source);
      const uint4 low = vectors[0], high = vectors[1];
      return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (k < count) group.word[k] = source[k];
    }
    return group;
  }
  const auto* source = static_cast<const std::uint16_t*>(elements.data) + at;
  if (count == kGroup && is_aligned(source)) {
    const uint4 all = *reinterpret_cast<const uint4*>(source);
    return {{all.x, all.y, all.z, all.w, 0, 0, 0, 0}};
  }
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (k < count) group.word[k / 2] |= static_cast<std::uint32_t>(source[k]) << (16 * (k % 2));
  }
  return group;
}

// Sixteen bytes at once: a plain assignment the compiler may tear apart into words.
CIT_HOST_DEVICE inline void store_wide(void* target, const uint4& value) {
#ifdef __CUDA_ARCH__
  __stwb(static_cast<uint4*>(target), value);
#else
  *static_cast<uint4*>(target) = value;
#endif
}

CIT_HOST_DEVICE inline void store(const Elements& elements, std::int64_t at, int count, const Group& group) {
  assume_global(elements.data);
  const std::uint32_t* word = group.word;
  if (elements.dtype == kFloat32) {
    auto* target = static_cast<std::uint32_t*>(elements.data) + at;
    if (count == kGroup && is_aligned(target)) {
      store_wide(target, {word[0], word[1], word[2], word[3]});
      store_wide(target + 4, {word[4], word[5], word[6], word[7]});
      return;
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (k < count) target[k] = word[k];
    }
    return;
  }
  auto* target = static_cast<std::uint16_t*>(elements.data) + at;
  if (count == kGroup && is_aligned(target)) {
    store_wide(target, {word[0], word[1], word[2], word[3]});
    return;
  }
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (k < count) target[k] = static_cast<std::uint16_t>(word[k / 2] >> (16 * (k % 2)));
  }
}

CIT_HOST_DEVICE inline void to_floats(const Group& group, int dtype, float (&out)[kGroup]) {
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (dtype == kFloat32) {
      out[k] = float_from_bits(group.word[k]);
      continue;
    }
    const auto half = static_cast<std::uint16_t>(group.word[k / 2] >> (16 * (k % 2)));
    if (dtype == kBFloat16) {
      out[k] = float_from_bits(static_cast<std::uint32_t>(half) << 16);
    } else {
      out[k] = __half2float(__half(__half_raw{half}));
    }
  }
}

// To the nearest, ties to even.
CIT_HOST_DEVICE inline Group from_floats(const float (&values)[kGroup], int dtype) {
  Group group{};
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (dtype == kFloat32) {
      group.word[k] = bits_from_float(values[k]);
      continue;
    }
    const std::uint16_t half = dtype == kBFloat16 ? static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(values[k])).x
                                                  : static_cast<__half_raw>(__float2half_rn(values[k])).x;
    group.word[k / 2] |= static_cast<std::uint32_t>(half) << (16 * (k % 2));
  }
  return group;
}

// Stochastic rounding: csrc/stochastic_rounding.h has the random bits.

CIT_HOST_DEVICE inline std::uint32_t round_randomly(float value, std::uint32_t random16) {
  const std::uint32_t bits = bits_from_float(value);
  const std::uint32_t truncated = bits >> 16;
  if (!is_finite(value)) return value != value ? truncated | 0x40u : truncated;
  const std::uint32_t rounded = (bits + random16) >> 16;
  return (rounded & 0x7f80u) == 0x7f80u ? truncated : rounded;  // never from a finite value to infinity
}

// State as it is kept: float32 as it is, bfloat16 rounded at random.
CIT_HOST_DEVICE inline Group from_state(const float (&values)[kGroup], int dtype, std::int64_t at, std::uint32_t key) {
  if (dtype == kFloat32) return from_floats(values, kFloat32);
  Group group{};
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    const std::uint32_t random16 = mix((static_cast<std::uint32_t>(at) + k) ^ key) >> 16;
    group.word[k / 2] |= round_randomly(values[k], random16) << (16 * (k % 2));
  }
  return group;
}

}  // namespace cit::gpu
