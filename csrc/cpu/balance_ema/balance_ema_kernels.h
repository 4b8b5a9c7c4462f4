// The kernels of one instruction set. Each works on elements [begin, begin + count) of one tensor and
// row; those that sum take count <= kChunk.
#pragma once

#include <stdint.h>

#include "cpu/balance_ema/balance_ema.h"

namespace cit {

constexpr int64_t kChunk = 16384;

struct Norms {
  double distance;         // a = |p - e|_1
  double gradient;         // b = |g|_1
  double gradient_change;  // c = |g - g_prev|_1
};

// AdamWOptions made ready for the inner loop.
struct AdamWStep {
  float keep;     // 1 - lr * weight_decay
  float weight1;  // 1 - beta1
  float beta2;
  float weight2;     // 1 - beta2
  float root_scale;  // 1 / sqrt(1 - beta2^step)
  float eps;
  float step_size;  // lr / (1 - beta1^step)
};

// Of one tensor, for the stochastic rounding of its bfloat16 state.
struct RoundingKeys {
  uint32_t average, exp_avg, exp_avg_sq;
  bool nearest;  // the average is rounded to the nearest instead
};

struct BalanceEmaKernels {
  // Sums the norms; previous_grad <- g if store_grads.
  Norms (*norms)(const EmaTensor& tensor, bool store_grads, int64_t begin, int64_t count);
  // e += alpha (p - e)
  void (*apply)(const EmaTensor& tensor, const RoundingKeys& keys, float alpha, int64_t begin, int64_t count);
  // e += pending (p - e), AdamW, norms with the new p; previous_grad <- g if store_grads.
  Norms (*adamw)(const AdamWTensor& tensor, const AdamWStep& step, const RoundingKeys& keys, float pending,
                 bool store_grads, int64_t begin, int64_t count);
};

namespace simd_baseline {
extern const BalanceEmaKernels kBalanceEma;
}
#ifdef CIT_FAST_X86
namespace simd_avx2 {
extern const BalanceEmaKernels kBalanceEma;
}
namespace simd_avx512 {
extern const BalanceEmaKernels kBalanceEma;
}
#endif

}  // namespace cit
