// Elementary functions on sixteen lanes, NaN in and out, errors below 2 units in the last place.
//
// All arguments that the softmax family needs are at most 0, so nothing here overflows. Unlike simd.h this uses fused
// multiply-add where there is one: the products before it differ between instruction sets as well.
#pragma once

#include "cpu/simd/simd.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {

// x * y + z
CIT_INLINE F32x16 multiply_add(const F32x16& x, const F32x16& y, const F32x16& z) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) {
#if defined(__AVX512F__)
    out.part[k] = (Vector)_mm512_fmadd_ps((__m512)x.part[k], (__m512)y.part[k], (__m512)z.part[k]);
#elif defined(__AVX2__)
    out.part[k] = (Vector)_mm256_fmadd_ps((__m256)x.part[k], (__m256)y.part[k], (__m256)z.part[k]);
#else
    out.part[k] = x.part[k] * y.part[k] + z.part[k];
#endif
  }
  return out;
}

// Lane by lane: the larger; x where y is NaN, and y where x is.
CIT_INLINE F32x16 larger(const F32x16& x, const F32x16& y) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) out.part[k] = y.part[k] > x.part[k] ? y.part[k] : x.part[k];
  return out;
}

// `low` where x is below it; NaN stays.
CIT_INLINE F32x16 at_least(const F32x16& x, float low) {
  F32x16 out;
  const F32x16 bound = splat(low);
  for (int k = 0; k < kParts; ++k) out.part[k] = x.part[k] < bound.part[k] ? bound.part[k] : x.part[k];
  return out;
}

// Lane by lane: x where `condition` < 0, else y.
CIT_INLINE F32x16 where_negative(const F32x16& condition, const F32x16& x, const F32x16& y) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) out.part[k] = condition.part[k] < Vector{} ? x.part[k] : y.part[k];
  return out;
}

// Lane by lane: 0 where `factor` is 0, else the value; so that 0 times infinity is 0.
CIT_INLINE F32x16 unless_zero(const F32x16& factor, const F32x16& value) {
  F32x16 out;
  for (int k = 0; k < kParts; ++k) out.part[k] = factor.part[k] == Vector{} ? Vector{} : value.part[k];
  return out;
}

struct Exponential {
  F32x16 power;  // 2^n
  F32x16 rest;   // e^f - 1, where x = n ln 2 + f
};

constexpr float kLowestExponent = -87.0f;  // e^x is a normal number from here on

// x in [kLowestExponent, 88] or NaN.
CIT_INLINE Exponential split_exponential(const F32x16& x) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the last bits.
  const F32x16 magic = splat(12582912.0f);
  const F32x16 shifted = multiply_add(x, splat(1.44269504f), magic);
  const F32x16 n = shifted - magic;
  const F32x16 f = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
  F32x16 series = splat(1.0f / 5040.0f);
  constexpr float kSeries[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f};
  for (int i = 0; i < 5; ++i) series = multiply_add(series, f, splat(kSeries[i]));
  Exponential out;
  out.rest = multiply_add(f * f, series, f);
  for (int k = 0; k < kParts; ++k) {
    out.power.part[k] = (Vector)(((WordVector)shifted.part[k] << 23) + 0x3f800000u);
  }
  return out;
}

// e^x for x <= 88; 0 below kLowestExponent, so that what is far from the maximum costs no denormal numbers.
CIT_INLINE F32x16 exponential(const F32x16& x) {
  const Exponential e = split_exponential(at_least(x, kLowestExponent));
  const F32x16 value = multiply_add(e.power, e.rest, e.power);
  return where_negative(x - splat(kLowestExponent), splat(0.0f), value);
}

// e^x - 1 for x <= 0, exact to the last digits near 0.
CIT_INLINE F32x16 exponential_minus_1(const F32x16& x) {
  const Exponential e = split_exponential(at_least(x, kLowestExponent));
  return multiply_add(e.power, e.rest, e.power - splat(1.0f));
}

// log(1 + x) for -1/2 <= x <= 0: 2 atanh(x / (2 + x)), whose argument is at most 1/3 in size.
CIT_INLINE F32x16 logarithm_1_plus(const F32x16& x) {
  const F32x16 s = x / (x + splat(2.0f));
  const F32x16 square = s * s;
  F32x16 series = splat(2.0f / 15.0f);
  constexpr float kSeries[] = {2.0f / 13.0f, 2.0f / 11.0f, 2.0f / 9.0f, 2.0f / 7.0f, 2.0f / 5.0f, 2.0f / 3.0f};
  for (int i = 0; i < 6; ++i) series = multiply_add(series, square, splat(kSeries[i]));
  return multiply_add(s * square, series, s * splat(2.0f));
}

CIT_INLINE F32x16 hyperbolic_tangent(const F32x16& x) {
  const F32x16 rest = exponential_minus_1(absolute(x) * splat(-2.0f));
  const F32x16 size = (splat(0.0f) - rest) / (rest + splat(2.0f));
  return where_negative(x, splat(0.0f) - size, size);
}

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
