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

#include "dtype.h"

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

struct F32x16 {
  Vector part[kParts];
};

static inline F32x16 splat(float value) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) out.part[k] = value - Vector{};
  return out;
}

static inline F32x16 load(const float* source) {
  F32x16 out;
  memcpy(&out, source, sizeof(out));
  return out;
}

static inline void store(float* target, const F32x16& value) {
  memcpy(target, &value, sizeof(value));
}

// The first `count` < 16 lanes from memory, the others `fill`.
static inline F32x16 load_first(const float* source, int count, float fill = 0.0f) {
  F32x16 out = splat(fill);
  memcpy(&out, source, sizeof(float) * static_cast<size_t>(count));
  return out;
}

static inline void store_first(float* target, const F32x16& value, int count) {
  memcpy(target, &value, sizeof(float) * static_cast<size_t>(count));
}

#define CIT_BINARY(op)                                                     \
  static inline F32x16 operator op(const F32x16& x, const F32x16& y) {     \
    F32x16 out;                                                            \
    for (int k = 0; k < kParts; ++k) out.part[k] = x.part[k] op y.part[k]; \
    return out;                                                            \
  }
CIT_BINARY(+)
CIT_BINARY(-)
CIT_BINARY(*)
CIT_BINARY(/)
#undef CIT_BINARY

static inline F32x16 absolute(const F32x16& x) {
  F32x16 out;
  const IntVector mask = 0x7fffffff - IntVector{};
  for (int k = 0; k < kParts; ++k) out.part[k] = (Vector)((IntVector)x.part[k] & mask);
  return out;
}

static inline F32x16 square_root(const F32x16& x) {
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

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline float bfloat16_to_float(uint16_t half) {
  return float_of(static_cast<uint32_t>(half) << 16);
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
static inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

#if defined(__F16C__)
static inline float float16_to_float(uint16_t half) {
  return _cvtsh_ss(half);
}
static inline uint16_t float_to_float16(float value) {
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Same results as the F16C instructions, by exact scaling with powers of two.
static inline float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) {  // infinity, or a NaN, which becomes quiet
    return float_of(sign | 0x7f800000u | ((rest & 0x3ffu) << 13) | (rest > 0x7c00u ? 0x400000u : 0u));
  }
  const float magnitude = float_of(rest << 13) * 0x1p112f;  // exponent bias 15 -> 127; right for subnormals too
  return float_of(sign | bits_of(magnitude));
}

static inline uint16_t float_to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((rest >> 13) & 0x3ffu));
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 lets the adder round to the subnormal's last place, 2^-24
    return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u) >> 13));
}
#endif

static inline void half_to_float(const uint16_t* source, DType dtype, int64_t count, float* target) {
  int64_t i = 0;
  if (dtype == DType::kBFloat16) {
    for (; i < count; ++i) target[i] = bfloat16_to_float(source[i]);
    return;
  }
#if defined(__AVX2__) && defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
#endif
  for (; i < count; ++i) target[i] = float16_to_float(source[i]);
}

static inline void float_to_half(const float* source, DType dtype, int64_t count, uint16_t* target) {
  int64_t i = 0;
  if (dtype == DType::kBFloat16) {
    for (; i < count; ++i) target[i] = float_to_bfloat16(source[i]);
    return;
  }
#if defined(__AVX2__) && defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; ++i) target[i] = float_to_float16(source[i]);
}

// Elements [begin, begin + count) as floats: the array itself when it holds floats, else converted into `scratch`.
static inline const float* read(const Array& array, int64_t begin, int64_t count, float* scratch) {
  if (array.dtype == DType::kFloat32) return static_cast<const float*>(array.data) + begin;
  half_to_float(static_cast<const uint16_t*>(array.data) + begin, array.dtype, count, scratch);
  return scratch;
}

// Where a kernel writes floats that `write_back` then puts in place: the array itself when it holds floats.
static inline float* write_target(const Array& array, int64_t begin, float* scratch) {
  return array.dtype == DType::kFloat32 ? static_cast<float*>(array.data) + begin : scratch;
}

static inline void write_back(const Array& array, int64_t begin, int64_t count, const float* scratch) {
  if (array.dtype == DType::kFloat32) return;
  float_to_half(scratch, array.dtype, count, static_cast<uint16_t*>(array.data) + begin);
}

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
