// The random bits of stochastic rounding: a hash of seed, tensor and element, so that every backend draws the same ones
// in any order. The definition is stochastic_bfloat16 in cit_fast/ops/balance_ema/reference.py.
//
// Only for words without a sign; everything has internal linkage (see cpu/simd.h).
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define CIT_HOST_DEVICE_STATIC static __host__ __device__
#else
#define CIT_HOST_DEVICE_STATIC static
#endif

namespace cit {

// mix(x) >> 16: the last step of mix leaves the upper half as it is.
template <class Word>
CIT_HOST_DEVICE_STATIC inline Word mix_high(Word x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x >> 16;
}

// A bijection of 32-bit words in which every bit depends on every other (C. Wellons, "lowbias32"). Word: uint32_t, or a
// vector of them.
template <class Word>
CIT_HOST_DEVICE_STATIC inline Word mix(Word x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// What to combine with an element's index. stream: 0 average, 1 first and 2 second moment of AdamW.
CIT_HOST_DEVICE_STATIC inline uint32_t rounding_key(uint32_t seed, uint32_t tensor, uint32_t stream) {
  return mix(seed ^ mix(3u * tensor + stream + 1u));
}

}  // namespace cit
