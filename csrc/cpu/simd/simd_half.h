// Sixteen lanes to and from the 16-bit formats, the same bits on every instruction set. For bfloat16 also by stochastic
// rounding.
#pragma once

#include "cpu/dtype.h"
#include "cpu/simd/simd.h"
#include "stochastic_rounding.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {

typedef uint16_t HalfVector __attribute__((vector_size(2 * kWidth)));

// Sixteen numbers of 16 bits.
struct Halves {
  HalfVector part[kParts];
};

CIT_INLINE Halves load_halves(const uint16_t* source) {
  Halves out;
  for (int k = 0; k < kParts; ++k) memcpy(&out.part[k], source + k * kWidth, sizeof(HalfVector));
  return out;
}

CIT_INLINE void store_halves(uint16_t* target, const Halves& value) {
  for (int k = 0; k < kParts; ++k) memcpy(target + k * kWidth, &value.part[k], sizeof(HalfVector));
}

// The first `count` < 16 lanes from memory, the others 0.
CIT_INLINE Halves load_first_halves(const uint16_t* source, int count) {
  uint16_t lanes[kLanes] = {};
  memcpy(lanes, source, sizeof(uint16_t) * static_cast<size_t>(count));
  return load_halves(lanes);
}

CIT_INLINE void store_first_halves(uint16_t* target, const Halves& value, int count) {
  uint16_t lanes[kLanes];
  store_halves(lanes, value);
  memcpy(target, lanes, sizeof(uint16_t) * static_cast<size_t>(count));
}

// By hand, where compilers go a long way round.
CIT_INLINE WordVector widen(const HalfVector& halves) {
#if defined(__AVX512F__)
  return (WordVector)_mm512_maskz_cvtepu16_epi32(static_cast<__mmask16>(-1), (__m256i)halves);
#elif defined(__AVX2__)
  return (WordVector)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  return __builtin_convertvector(halves, WordVector);
#endif
}

// Words below 2^16.
CIT_INLINE HalfVector narrow(const WordVector& words) {
#if defined(__AVX512F__)
  return (HalfVector)_mm512_maskz_cvtepi32_epi16(static_cast<__mmask16>(-1), (__m512i)words);
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)words), high = _mm256_extracti128_si256((__m256i)words, 1);
  return (HalfVector)_mm_packus_epi32(low, high);
#else
  return __builtin_convertvector(words, HalfVector);
#endif
}

CIT_INLINE F32x16 from_bfloat16(const Halves& value) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) out.part[k] = (Vector)(widen(value.part[k]) << 16);
  return out;
}

// A NaN must not lose its last bit: it becomes quiet. Other values are cut off.
CIT_INLINE WordVector truncate_to_bfloat16(const WordVector& bits) {
  const auto nan = (WordVector)((IntVector)(bits & 0x7fffffffu) > 0x7f800000);
  return (bits >> 16) | (nan & 0x40u);
}

// To the nearest, ties to even.
CIT_INLINE Halves to_bfloat16(const F32x16& value) {
  Halves out;
  for (int k = 0; k < kParts; ++k) {
    const WordVector bits = (WordVector)value.part[k];
    const WordVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const IntVector nan = (IntVector)(bits & 0x7fffffffu) > 0x7f800000;
    out.part[k] = narrow(nan ? truncate_to_bfloat16(bits) : rounded);
  }
  return out;
}

// Up with the probability of the fraction that is cut off. `index` is that of the first element in its tensor. What is
// not finite is truncated, and so is what the carry would make infinite.
CIT_INLINE Halves to_bfloat16_stochastically(const F32x16& value, uint32_t index, uint32_t key) {
  WordVector lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(i);
  Halves out;
  for (int k = 0; k < kParts; ++k) {
    const WordVector bits = (WordVector)value.part[k];
    const WordVector random = mix_high((lane + (index + static_cast<uint32_t>(k * kWidth))) ^ key);
    const WordVector rounded = (bits + random) >> 16;
    const IntVector cut = ((rounded & 0x7f80u) == 0x7f80u) | ((bits & 0x7f800000u) == 0x7f800000u);
    out.part[k] = narrow(cut ? truncate_to_bfloat16(bits) : rounded);
  }
  return out;
}

#if defined(__AVX512F__)
// The masked forms: GCC 12 warns about its own header's unmasked ones. The code is the same.
CIT_INLINE F32x16 from_float16(const Halves& value) {
  return {{(Vector)_mm512_maskz_cvtph_ps(static_cast<__mmask16>(-1), (__m256i)value.part[0])}};
}

CIT_INLINE Halves to_float16(const F32x16& value) {
  return {{(HalfVector)_mm512_maskz_cvtps_ph(static_cast<__mmask16>(-1), (__m512)value.part[0],
                                             _MM_FROUND_TO_NEAREST_INT)}};
}
#elif defined(__AVX2__) && defined(__F16C__)
CIT_INLINE F32x16 from_float16(const Halves& value) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) out.part[k] = (Vector)_mm256_cvtph_ps((__m128i)value.part[k]);
  return out;
}

CIT_INLINE Halves to_float16(const F32x16& value) {
  Halves out;
  for (int k = 0; k < kParts; ++k) {
    out.part[k] = (HalfVector)_mm256_cvtps_ph((__m256)value.part[k], _MM_FROUND_TO_NEAREST_INT);
  }
  return out;
}
#else
// Same results as the F16C instructions, by exact scaling with powers of two.
CIT_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

CIT_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

CIT_INLINE float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) {  // infinity, or a NaN, which becomes quiet
    return float_of(sign | 0x7f800000u | ((rest & 0x3ffu) << 13) | (rest > 0x7c00u ? 0x400000u : 0u));
  }
  const float magnitude = float_of(rest << 13) * 0x1p112f;  // exponent bias 15 -> 127; right for subnormals too
  return float_of(sign | bits_of(magnitude));
}

CIT_INLINE uint16_t float_to_float16(float value) {
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

CIT_INLINE F32x16 from_float16(const Halves& value) {
  uint16_t halves[kLanes];
  store_halves(halves, value);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = float16_to_float(halves[i]);
  return load(lanes);
}

CIT_INLINE Halves to_float16(const F32x16& value) {
  float lanes[kLanes];
  store(lanes, value);
  uint16_t halves[kLanes];
  for (int i = 0; i < kLanes; ++i) halves[i] = float_to_float16(lanes[i]);
  return load_halves(halves);
}
#endif

CIT_INLINE F32x16 from_halves(const Halves& value, DType dtype) {
  return dtype == DType::kBFloat16 ? from_bfloat16(value) : from_float16(value);
}

CIT_INLINE Halves to_halves(const F32x16& value, DType dtype) {
  return dtype == DType::kBFloat16 ? to_bfloat16(value) : to_float16(value);
}

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
