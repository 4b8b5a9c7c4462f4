// The kernels of one instruction set. Each works on elements [begin, begin + count) of one tensor, count <= kChunk.
#pragma once

#include <stdint.h>

#include "balance_ema.h"

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

struct BalanceEmaKernels {
  // Sums the norms and copies the gradient to previous_grad.
  Norms (*norms)(const EmaTensor& tensor, int64_t begin, int64_t count);
  // e += alpha (p - e)
  void (*apply)(const EmaTensor& tensor, float alpha, int64_t begin, int64_t count);
  // e += pending (p - e), AdamW, norms with the new p, previous_grad <- g.
  Norms (*adamw)(const AdamWTensor& tensor, const AdamWStep& step, float pending, int64_t begin, int64_t count);
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
