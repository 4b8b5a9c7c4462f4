// Products of bfloat16 pairs with float32 sums, for processors with AVX512-BF16. Compiled once, with those
// instructions.
#include <immintrin.h>

#define CIT_SIMD_NAMESPACE simd_avx512_bf16
#include "product_tiles.h"

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

void pair_product(const PairProduct& product) {
  if (product.a[1] != nullptr) {
    product_rows<PairEngine, 2, 12>(product);
  } else {
    product_rows<PairEngine, 1, 24>(product);
  }
}

}  // namespace simd_avx512_bf16
}  // namespace cit
