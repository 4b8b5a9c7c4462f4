// What one thread of csrc/cuda/balance_ema.cu does, free of everything that only exists on a GPU, so that
// balance_ema_test.cu runs the same arithmetic on the host.
//
// A thread takes groups of eight neighbouring elements: 16 bytes of a 16-bit tensor, 32 of a float32 one. All streams
// of a group are loaded as they are before the first is converted, so that the loads are in flight together. Groups
// that are not aligned to 16 bytes, or the last of a tensor, go element by element, in the same order: the bits stay
// the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "balance_weight.h"

namespace cit::gpu {

constexpr int kThreads = 256;  // a block; part of the order of summation, so the same on every GPU
constexpr int kGroup = 8;

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

// Elements [at, at + count) of `array`, count <= 8; zeros after them. `at` is a multiple of 8.
CIT_HOST_DEVICE inline Group load(const Array& array, std::int64_t at, int count) {
  assume_global(array.data);
  Group group{};
  const bool whole = count == kGroup && is_aligned(array.data);
  if (array.dtype == DType::kFloat32) {
    const auto* source = static_cast<const std::uint32_t*>(array.data) + at;
    if (whole) {
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
  const auto* source = static_cast<const std::uint16_t*>(array.data) + at;
  if (whole) {
    const uint4 all = *reinterpret_cast<const uint4*>(source);
    return {{all.x, all.y, all.z, all.w, 0, 0, 0, 0}};
  }
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (k < count) group.word[k / 2] |= static_cast<std::uint32_t>(source[k]) << (16 * (k % 2));
  }
  return group;
}

CIT_HOST_DEVICE inline void store(const Array& array, std::int64_t at, int count, const Group& group) {
  assume_global(array.data);
  const std::uint32_t* word = group.word;
  const bool whole = count == kGroup && is_aligned(array.data);
  if (array.dtype == DType::kFloat32) {
    auto* target = static_cast<std::uint32_t*>(array.data) + at;
    if (whole) {
      auto* vectors = reinterpret_cast<uint4*>(target);
      vectors[0] = {word[0], word[1], word[2], word[3]};
      vectors[1] = {word[4], word[5], word[6], word[7]};
      return;
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (k < count) target[k] = word[k];
    }
    return;
  }
  auto* target = static_cast<std::uint16_t*>(array.data) + at;
  if (whole) {
    *reinterpret_cast<uint4*>(target) = {word[0], word[1], word[2], word[3]};
    return;
  }
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (k < count) target[k] = static_cast<std::uint16_t>(word[k / 2] >> (16 * (k % 2)));
  }
}

CIT_HOST_DEVICE inline void to_floats(const Group& group, DType dtype, float (&out)[kGroup]) {
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (dtype == DType::kFloat32) {
      out[k] = float_from_bits(group.word[k]);
      continue;
    }
    const auto half = static_cast<std::uint16_t>(group.word[k / 2] >> (16 * (k % 2)));
    if (dtype == DType::kBFloat16) {
      out[k] = float_from_bits(static_cast<std::uint32_t>(half) << 16);
    } else {
      out[k] = __half2float(__half(__half_raw{half}));
    }
  }
}

// To the nearest, ties to even.
CIT_HOST_DEVICE inline Group from_floats(const float (&values)[kGroup], DType dtype) {
  Group group{};
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (dtype == DType::kFloat32) {
      group.word[k] = bits_from_float(values[k]);
      continue;
    }
    const std::uint16_t half = dtype == DType::kBFloat16
                                   ? static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(values[k])).x
                                   : static_cast<__half_raw>(__float2half_rn(values[k])).x;
    group.word[k / 2] |= static_cast<std::uint32_t>(half) << (16 * (k % 2));
  }
  return group;
}

CIT_HOST_DEVICE inline int group_count(int count, int i) {
  return count - i < kGroup ? count - i : kGroup;
}

CIT_HOST_DEVICE inline float absolute(float x) {
  return float_from_bits(bits_from_float(x) & 0x7fffffffu);
}

// The index of the tensor that chunk `chunk` belongs to: the last with first_chunk[i] <= chunk, which no empty tensor
// is.
CIT_HOST_DEVICE inline std::int64_t tensor_of_chunk(const std::int64_t* first_chunk, std::int64_t tensors,
                                                    std::int64_t chunk) {
  std::int64_t low = 0, high = tensors;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (first_chunk[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

// The sums of one chunk. One that is not finite marks the tensor as one to leave out.
struct Partial {
  float distance, gradient, gradient_change;
};

CIT_HOST_DEVICE inline Partial operator+(const Partial& x, const Partial& y) {
  return {x.distance + y.distance, x.gradient + y.gradient, x.gradient_change + y.gradient_change};
}

// Sums of the elements of [begin, begin + count) that are thread `thread`'s; there previous_grad becomes the gradient.
CIT_HOST_DEVICE inline Partial norms_of_thread(const EmaTensor& tensor, std::int64_t begin, int count, int thread) {
  const bool has_previous = tensor.previous_grad.data != nullptr;
  Partial sums{};
  for (int i = thread * kGroup; i < count; i += kThreads * kGroup) {
    const std::int64_t at = begin + i;
    const int n = group_count(count, i);
    const Group p_group = load(tensor.param, at, n);
    const Group e_group = load({tensor.average, DType::kFloat32}, at, n);
    const Group g_group = load(tensor.grad, at, n);
    Group previous_group{};
    if (has_previous) previous_group = load(tensor.previous_grad, at, n);
    float p[kGroup], e[kGroup], g[kGroup], previous[kGroup];
    to_floats(p_group, tensor.param.dtype, p);
    to_floats(e_group, DType::kFloat32, e);
    to_floats(g_group, tensor.grad.dtype, g);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      sums.distance += absolute(p[k] - e[k]);
      sums.gradient += absolute(g[k]);
    }
    if (!has_previous) continue;
    to_floats(previous_group, tensor.previous_grad.dtype, previous);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) sums.gradient_change += absolute(g[k] - previous[k]);
    const bool same = tensor.grad.dtype == tensor.previous_grad.dtype;
    store(tensor.previous_grad, at, n, same ? g_group : from_floats(g, tensor.previous_grad.dtype));
  }
  return sums;
}

// The part of lane `lane` of 32 in the sum over the chunks of a tensor.
CIT_HOST_DEVICE inline Norms norms_of_lane(const Partial* partials, std::int64_t first, std::int64_t last, int lane) {
  Norms norms{};
  for (std::int64_t chunk = first + lane; chunk < last; chunk += 32) {
    norms.distance += partials[chunk].distance;
    norms.gradient += partials[chunk].gradient;
    norms.gradient_change += partials[chunk].gradient_change;
  }
  return norms;
}

// e += alpha (p - e)
CIT_HOST_DEVICE inline void apply_of_thread(const EmaTensor& tensor, float alpha, std::int64_t begin, int count,
                                            int thread) {
  const Array average{tensor.average, DType::kFloat32};
  for (int i = thread * kGroup; i < count; i += kThreads * kGroup) {
    const std::int64_t at = begin + i;
    const int n = group_count(count, i);
    const Group p_group = load(tensor.param, at, n);
    const Group e_group = load(average, at, n);
    float p[kGroup], e[kGroup];
    to_floats(p_group, tensor.param.dtype, p);
    to_floats(e_group, DType::kFloat32, e);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) e[k] = e[k] + alpha * (p[k] - e[k]);
    store(average, at, n, from_floats(e, DType::kFloat32));
  }
}

}  // namespace cit::gpu
