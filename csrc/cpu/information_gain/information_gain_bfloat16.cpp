// Products of bfloat16 pairs with float32 sums, for processors with AVX512-BF16. Compiled once, with those
// instructions.
#include <immintrin.h>

#define CIT_SIMD_NAMESPACE simd_avx512_bf16
#include "cpu/simd/product_tiles.h"

namespace cit {
namespace simd_avx512_bf16 {
namespace {

struct PairEngine {
  using Lanes = __m512bh;
  using Sums = __m512;

  static inline Sums zero() { return _mm512_setzero_ps(); }
  static inline Lanes load(const uint32_t* a) { return (__m512bh)_mm512_loadu_si512(a); }
  static inline Lanes broadcast(const uint32_t* w) {
    int pair;
    __builtin_memcpy(&pair, w, sizeof pair);  // rows of bfloat16 need not start at a multiple of 4 bytes
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static inline Sums multiply_add(Lanes a, Lanes w, Sums sums) { return _mm512_dpbf16_ps(sums, a, w); }
  static inline Sums load_sums(const float* c) { return _mm512_loadu_ps(c); }
  static inline void store_sums(float* c, Sums sums) { _mm512_storeu_ps(c, sums); }
};

}  // namespace

void pack_pairs(const uint16_t* source, int64_t row_stride, int64_t rows, int64_t columns, uint32_t* target) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 16; ++i) {
    for (int half = 0; half < 2; ++half) {
      order[half][2 * i] = static_cast<uint16_t>(16 * half + i);
      order[half][2 * i + 1] = static_cast<uint16_t>(32 + 16 * half + i);
    }
  }
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  const __mmask32 there = columns >= 32 ? 0xffffffffu : (1u << columns) - 1u;
  for (int64_t row = 0; row < rows; row += 2, source += 2 * row_stride, target += 32) {
    const __m512i one = _mm512_maskz_loadu_epi16(there, source);
    const __m512i other =
        row + 1 < rows ? _mm512_maskz_loadu_epi16(there, source + row_stride) : _mm512_setzero_si512();
    _mm512_storeu_si512(target, _mm512_permutex2var_epi16(one, low, other));
    _mm512_storeu_si512(target + 16, _mm512_permutex2var_epi16(one, high, other));
  }
}

void pair_product(const PairProduct& product) {
  if (product.a[1] == nullptr) {
    product_rows<PairEngine, 1, kPairTileRows>(product);
  } else if (product.rows % kPairTileRows == 0) {
    product_rows<PairEngine, 2, kPairTileRows>(product);
  } else {
    product_rows<PairEngine, 2, kTileRows>(product);
  }
}

}  // namespace simd_avx512_bf16
}  // namespace cit
