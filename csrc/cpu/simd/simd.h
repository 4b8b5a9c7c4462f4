// Sixteen float lanes, whatever the instruction set.
//
// A kernel source is compiled once per instruction set (CMakeLists.txt), each time with another CIT_SIMD_NAMESPACE. A
// vector always has 16 logical lanes: one AVX-512 register, two AVX2 registers, or four of SSE or NEON. With
// -ffp-contract=off every level then does the same additions in the same order, so results, sums included, are the same
// bits on every machine.
//
// Kernel sources include only this header and C headers: an inline function of the C++ library compiled here with
// AVX-512 could be the copy the linker keeps for everyone, and would stop an older processor.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef CIT_SIMD_NAMESPACE
#error "define CIT_SIMD_NAMESPACE: kernel sources are built through cit_fast_add_kernels in CMakeLists.txt"
#endif

namespace cit {
namespace CIT_SIMD_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;

typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVector __attribute__((vector_size(4 * kWidth)));
typedef uint32_t WordVector __attribute__((vector_size(4 * kWidth)));

struct F32x16 {
  Vector part[kParts];
};

// Vectors stay in registers only where everything is inlined.
#define CIT_INLINE static inline __attribute__((always_inline))

CIT_INLINE F32x16 splat(float value) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) out.part[k] = value - Vector{};
  return out;
}

CIT_INLINE F32x16 load(const float* source) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) memcpy(&out.part[k], source + k * kWidth, sizeof(Vector));
  return out;
}

CIT_INLINE void store(float* target, const F32x16& value) {
  for (int k = 0; k < kParts; ++k) memcpy(target + k * kWidth, &value.part[k], sizeof(Vector));
}

// The first `count` < 16 lanes from memory, the others 0. Masked where that exists: short rows are nothing but this.
#if defined(__AVX512F__)
CIT_INLINE F32x16 load_first(const float* source, int count) {
  return {{(Vector)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), source)}};
}

CIT_INLINE void store_first(float* target, const F32x16& value, int count) {
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1u), (__m512)value.part[0]);
}
#elif defined(__AVX2__)
CIT_INLINE __m256i mask_of_first(int count, int part) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count - part * kWidth), lane);
}

CIT_INLINE F32x16 load_first(const float* source, int count) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) {
    out.part[k] = (Vector)_mm256_maskload_ps(source + k * kWidth, mask_of_first(count, k));
  }
  return out;
}

CIT_INLINE void store_first(float* target, const F32x16& value, int count) {
  for (int k = 0; k < kParts; ++k) {
    _mm256_maskstore_ps(target + k * kWidth, mask_of_first(count, k), (__m256)value.part[k]);
  }
}
#else
CIT_INLINE F32x16 load_first(const float* source, int count) {
  float lanes[kLanes] = {};
  memcpy(lanes, source, sizeof(float) * static_cast<size_t>(count));
  return load(lanes);
}

CIT_INLINE void store_first(float* target, const F32x16& value, int count) {
  float lanes[kLanes];
  store(lanes, value);
  memcpy(target, lanes, sizeof(float) * static_cast<size_t>(count));
}
#endif

#define CIT_BINARY(op)                                                     \
  CIT_INLINE F32x16 operator op(const F32x16& x, const F32x16& y) {        \
    F32x16 out;                                                            \
    for (int k = 0; k < kParts; ++k) out.part[k] = x.part[k] op y.part[k]; \
    return out;                                                            \
  }
CIT_BINARY(+)
CIT_BINARY(-)
CIT_BINARY(*)
CIT_BINARY(/)
#undef CIT_BINARY

CIT_INLINE F32x16 absolute(const F32x16& x) {
  F32x16 out;
  const IntVector mask = 0x7fffffff - IntVector{};
  for (int k = 0; k < kParts; ++k) out.part[k] = (Vector)((IntVector)x.part[k] & mask);
  return out;
}

// Lane by lane: `value` where `condition` is finite, else `otherwise`.
CIT_INLINE F32x16 where_finite(const F32x16& condition, const F32x16& value, const F32x16& otherwise) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) {
    const IntVector finite = ((IntVector)condition.part[k] & 0x7fffffff) < 0x7f800000;
    out.part[k] = finite ? value.part[k] : otherwise.part[k];
  }
  return out;
}

CIT_INLINE F32x16 square_root(const F32x16& x) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) {
#if defined(__AVX512F__)
    // The masked form: GCC 12 warns about its own header's unmasked one. The code is the same.
    out.part[k] = (Vector)_mm512_maskz_sqrt_ps(static_cast<__mmask16>(-1), (__m512)x.part[k]);
#elif defined(__AVX2__)
    out.part[k] = (Vector)_mm256_sqrt_ps((__m256)x.part[k]);
#elif defined(__SSE2__)
    out.part[k] = (Vector)_mm_sqrt_ps((__m128)x.part[k]);
#else
    for (int i = 0; i < kWidth; ++i) out.part[k][i] = __builtin_sqrtf(x.part[k][i]);
#endif
  }
  return out;
}

// Lane by lane in double, always in the same order.
static inline double sum(const F32x16& x) {
  float lanes[kLanes];
  store(lanes, x);
  double total = 0.0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
