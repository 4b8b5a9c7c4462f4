// Eight double lanes, the same at every instruction set, and the exponential of float and double lanes.
#pragma once

#include "cpu/simd/simd.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {

constexpr int kDoubleLanes = 8;

// As many doubles as kParts registers hold; a Half has as many floats as a DoubleVector has doubles.
typedef double DoubleVector __attribute__((vector_size(4 * kWidth)));
typedef int64_t LongVector __attribute__((vector_size(4 * kWidth)));
typedef float Half __attribute__((vector_size(2 * kWidth)));

struct F64x8 {
  DoubleVector part[kParts];
};

CIT_INLINE F64x8 splat(double value) {
  F64x8 out;
  for (int k = 0; k < kParts; ++k) out.part[k] = value - DoubleVector{};
  return out;
}

CIT_INLINE F64x8 load(const double* source) {
  F64x8 out;
  for (int k = 0; k < kParts; ++k) memcpy(&out.part[k], source + k * kWidth / 2, sizeof(DoubleVector));
  return out;
}

CIT_INLINE void store(double* target, const F64x8& value) {
  for (int k = 0; k < kParts; ++k) memcpy(target + k * kWidth / 2, &value.part[k], sizeof(DoubleVector));
}

CIT_INLINE F64x8 load_doubles(const double* source) {
  return load(source);
}

CIT_INLINE F64x8 load_doubles(const float* source) {
  F64x8 out;
  for (int k = 0; k < kParts; ++k) {
    Half half;
    memcpy(&half, source + k * kWidth / 2, sizeof(Half));
    out.part[k] = __builtin_convertvector(half, DoubleVector);
  }
  return out;
}

CIT_INLINE void store_doubles(double* target, const F64x8& value) {
  store(target, value);
}

CIT_INLINE void store_doubles(float* target, const F64x8& value) {
  for (int k = 0; k < kParts; ++k) {
    const Half half = __builtin_convertvector(value.part[k], Half);
    memcpy(target + k * kWidth / 2, &half, sizeof(Half));
  }
}

#define CIT_BINARY(op)                                                     \
  CIT_INLINE F64x8 operator op(const F64x8& x, const F64x8& y) {           \
    F64x8 out;                                                             \
    for (int k = 0; k < kParts; ++k) out.part[k] = x.part[k] op y.part[k]; \
    return out;                                                            \
  }
CIT_BINARY(+)
CIT_BINARY(-)
CIT_BINARY(*)
CIT_BINARY(/)
#undef CIT_BINARY

template <class Lanes>
CIT_INLINE Lanes smaller(const Lanes& x, const Lanes& y) {
  Lanes out;
  for (int k = 0; k < kParts; ++k) out.part[k] = x.part[k] < y.part[k] ? x.part[k] : y.part[k];
  return out;
}

template <class Lanes>
CIT_INLINE Lanes larger(const Lanes& x, const Lanes& y) {
  Lanes out;
  for (int k = 0; k < kParts; ++k) out.part[k] = x.part[k] > y.part[k] ? x.part[k] : y.part[k];
  return out;
}

// Lane by lane: `value` where `condition` is above `limit`, else `otherwise`.
template <class Lanes>
CIT_INLINE Lanes where_above(const Lanes& condition, const Lanes& limit, const Lanes& value, const Lanes& otherwise) {
  Lanes out;
  for (int k = 0; k < kParts; ++k) {
    out.part[k] = condition.part[k] > limit.part[k] ? value.part[k] : otherwise.part[k];
  }
  return out;
}

CIT_INLINE F64x8 absolute(const F64x8& x) {
  return larger(x, splat(0.0) - x);
}

// Sums over lanes by halves (0 with 8, 1 with 9, ...; then 4, 2, 1 apart): the same order at every width.
CIT_INLINE float fold(const F32x16& x) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad q[4];
  memcpy(q, &x, sizeof(q));
  const Quad r = (q[0] + q[2]) + (q[1] + q[3]);
  return (r[0] + r[2]) + (r[1] + r[3]);
}

CIT_INLINE double fold(const F64x8& x) {
  typedef double Pair __attribute__((vector_size(16)));
  Pair q[4];
  memcpy(q, &x, sizeof(q));
  const Pair r = (q[0] + q[2]) + (q[1] + q[3]);
  return r[0] + r[1];
}

template <class Lanes>
CIT_INLINE double largest_lane(const Lanes& x) {
  double lanes[kDoubleLanes];
  store(lanes, x);
  double most = lanes[0];
  for (int i = 1; i < kDoubleLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// e^x for x <= 0: relative error below 2e-7; exactly 0 below -60, so that no product of a few of them is subnormal.
// x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial of degree 6 for e^r; adding 1.5 * 2^23 leaves n in the low
// bits.
CIT_INLINE F32x16 exponential(const F32x16& x) {
  const F32x16 magic = splat(12582912.0f);
  const F32x16 shifted = larger(x, splat(-60.0f)) * splat(1.44269504f) + magic;
  const F32x16 n = shifted - magic;
  const F32x16 r = (larger(x, splat(-60.0f)) - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  F32x16 p = splat(1.0f / 720.0f);
  p = p * r + splat(1.0f / 120.0f);
  p = p * r + splat(1.0f / 24.0f);
  p = p * r + splat(1.0f / 6.0f);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  F32x16 out;
  for (int k = 0; k < kParts; ++k) {
    const IntVector exponent = (IntVector)(((WordVector)shifted.part[k]) << 23);
    out.part[k] = (Vector)((IntVector)p.part[k] + exponent);
  }
  return where_above(x, splat(-60.0f), out, splat(0.0f));
}

// The same in double: relative error below 1e-15; exactly 0 below -600. Degree 13.
CIT_INLINE F64x8 exponential(const F64x8& x) {
  const F64x8 magic = splat(6755399441055744.0);
  const F64x8 clamped = larger(x, splat(-600.0));
  const F64x8 shifted = clamped * splat(1.4426950408889634) + magic;
  const F64x8 n = shifted - magic;
  const F64x8 r = (clamped - n * splat(6.93147180369123816490e-01)) - n * splat(1.90821492927058770002e-10);
  F64x8 p = splat(1.0 / 6227020800.0);
  p = p * r + splat(1.0 / 479001600.0);
  p = p * r + splat(1.0 / 39916800.0);
  p = p * r + splat(1.0 / 3628800.0);
  p = p * r + splat(1.0 / 362880.0);
  p = p * r + splat(1.0 / 40320.0);
  p = p * r + splat(1.0 / 5040.0);
  p = p * r + splat(1.0 / 720.0);
  p = p * r + splat(1.0 / 120.0);
  p = p * r + splat(1.0 / 24.0);
  p = p * r + splat(1.0 / 6.0);
  p = p * r + splat(0.5);
  p = p * r + splat(1.0);
  p = p * r + splat(1.0);
  F64x8 out;
  for (int k = 0; k < kParts; ++k) {
    typedef uint64_t LongWords __attribute__((vector_size(4 * kWidth)));
    const LongWords exponent = ((LongWords)shifted.part[k]) << 52;
    out.part[k] = (DoubleVector)((LongWords)p.part[k] + exponent);
  }
  return where_above(x, splat(-600.0), out, splat(0.0));
}

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
