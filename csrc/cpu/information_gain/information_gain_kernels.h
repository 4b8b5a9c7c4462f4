// The kernels of one instruction set for information_gain.h.
//
// Logits are computed in groups of 16 tokens, one per lane, for a few vocabulary entries at a time: memory [entry][16].
// The softmax statistics of a token then never leave their lane: no reduction across lanes, and the bits of a token do
// not depend on which tokens share its group.
#pragma once

#include <stdint.h>

#include "cpu/dtype.h"

namespace cit {

constexpr int64_t kGroup = 16;
// Vocabulary entries at a time: the logits of two groups fit the first-level cache, a block of the head the second. A
// multiple of every tile height.
constexpr int64_t kChunkRows = 96;
// With AVX-512: eight rows a power of two apart still fit the ways of a first-level cache; twelve of half the size do,
// and keep the multipliers busier.
constexpr int kTileRows = 8;
constexpr int kPairTileRows = 12;
// Stands for -infinity, whose difference to itself is no number.
constexpr float kNowhere = -1e30f;

// c_i[row][lane] (+)= sum_k w[row][k] a_i[k][lane] for one or two groups of lanes, in float32, k ascending. With
// bfloat16 pairs (PairProduct) an element of `a` and `w` holds two neighbouring k.
template <class Element>
struct ProductOf {
  const Element* a[2];  // a[1] null: one group
  int64_t lda;          // elements from k to k + 1
  const Element* w;
  int64_t row_stride, k_stride;
  int64_t depth, rows;
  float* c[2];
  int64_t ldc;
  bool accumulate;
  int64_t ahead;  // fetches what lies so many elements of `w` further on; 0: nothing
};
using Product = ProductOf<float>;
using PairProduct = ProductOf<uint32_t>;

// What turns a product into a logit: cap(scale * (product + bias)), then times inverse_temperature.
struct LogitMap {
  const float* bias;  // of the first entry; null: none
  float scale;
  float softcap;                     // 0: none
  const float* inverse_temperature;  // per lane; null: 1
  const int64_t* excluded;  // per lane the entry whose logit becomes kNowhere, if it is one of these; null: none
};

// Statistics of one group under both contexts. Maxima start at kNowhere, the rest at 0.
struct GainState {
  float max[2][kGroup];
  float sum[2][kGroup];     // sum of e^d, d = logit - max
  float moment[2][kGroup];  // sum of d e^d
  float cross[2][kGroup];   // sum of (d - other d) e^d
};

struct SoftmaxState {
  float max[kGroup];
  float sum[kGroup];     // of e^d
  float moment[kGroup];  // sum of d e^d
};

// Per lane what the sweeps after the first need.
struct LossLanes {
  float max[2][kGroup];
  float log_sum[2][kGroup];
  float divergence[kGroup];  // KL(p || m)
  float factor[kGroup];      // of the gradient
  float cap_factor[kGroup];  // temperature / softcap; 0 without a cap
};

struct InformationGainKernels {
  void (*product)(const Product& product);
  void (*widen)(const Array& source, int64_t begin, int64_t count, float* target);
  // Up to 32 columns of `rows` rows, the first element at `begin`, as float32 [rows][32]; columns beyond are left
  // alone.
  void (*widen_tile)(const Array& source, int64_t begin, int64_t row_stride, int64_t rows, int64_t columns,
                     float* target);
  // [rows][16] float32 to [rows / 2][16] pairs of bfloat16; a last odd row is paired with 0.
  void (*to_pairs)(const float* values, int64_t rows, float* pairs);
  // Turns the products of both contexts into logits, in place, and adds them to the statistics.
  void (*add_gain)(float* full, float* masked, int64_t rows, const LogitMap& map, GainState& state);
  // The same for one side: logits divided by the temperature.
  void (*add_softmax)(float* logits, int64_t rows, const LogitMap& map, SoftmaxState& state);
  // Adds sum p log(p / m) and sum q log(q / m) to `divergences`.
  void (*add_jsd)(const float* live, const float* frozen, int64_t rows, const LossLanes& lanes,
                  float (&divergences)[2][kGroup]);
  // Adds sum q log(q / p) to `divergences`.
  void (*add_kl)(const float* live, const float* frozen, int64_t rows, const LossLanes& lanes,
                 float (&divergences)[kGroup]);
  // Overwrite the (live) logits by the gradient.
  void (*jsd_gradient)(float* live, const float* frozen, int64_t rows, const LossLanes& lanes);
  void (*kl_gradient)(float* live, const float* frozen, int64_t rows, const LossLanes& lanes);
  void (*cross_entropy_gradient)(float* logits, int64_t rows, const LossLanes& lanes);
};

namespace simd_baseline {
extern const InformationGainKernels kInformationGain;
}
#ifdef CIT_FAST_X86
namespace simd_avx2 {
extern const InformationGainKernels kInformationGain;
}
namespace simd_avx512 {
extern const InformationGainKernels kInformationGain;
}
namespace simd_avx512_bf16 {
void pair_product(const PairProduct& product);
// Up to 32 columns of `rows` rows as [rows / 2][32] pairs of neighbouring rows, filled up with 0 to 32 columns and to
// an even number of rows.
void pack_pairs(const uint16_t* source, int64_t row_stride, int64_t rows, int64_t columns, uint32_t* target);
}  // namespace simd_avx512_bf16
#endif

}  // namespace cit
