// Exponential moving average of parameters with a weight per tensor that follows from the gradients (LCIA).
//
//   a = |p - e|_1,  b = |g|_1,  c = |g - g_prev|_1          per tensor, e before its update
//   alpha = released: 2 (1 + b) / (a c)    paper: 1 - (1 + b) / (a c)    fixed: 1 - decay
//   e <- e + alpha (p - e),  g_prev <- g
//
// The definition that this is tested against is cit_fast/reference/balance_ema.py. Sums: 16 float lanes over each chunk
// of 16 Ki elements, then double over the chunks in order, so the number of threads never changes a bit.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace cit {

// The values are part of the contract with cit_fast/ops/balance_ema.py.
enum class Rule : std::int64_t { kReleased = 0, kPaper = 1, kFixed = 2 };

struct RuleOptions {
  Rule rule;
  double decay;     // beta of `fixed`, and what `paper` falls back to
  double fallback;  // alpha that `released` falls back to
};

struct EmaTensor {
  std::int64_t numel;
  Array param;
  float* average;
  Array grad;
  Array previous_grad;  // data is null when the rule does not need it
};

struct AdamWTensor {
  EmaTensor ema;
  float* exp_avg;
  float* exp_avg_sq;
};

struct AdamWOptions {
  std::int64_t step;  // 1 for the first
  double lr, beta1, beta2, eps, weight_decay;
};

// alphas[i] is 0 where a tensor was left out because p or g held a value that is not finite.
void balance_ema(const std::vector<EmaTensor>& tensors, const RuleOptions& options, int threads, float* alphas,
                 bool* fallbacks);

// One sweep: the pending average update of the step before (alphas, 0 = none), AdamW, the norms, the new alphas.
void adamw_balance_ema(const std::vector<AdamWTensor>& tensors, const AdamWOptions& adamw, const RuleOptions& options,
                       int threads, float* alphas, bool* fallbacks);

// Applies pending updates; reads only numel, param and average.
void flush_balance_ema(const std::vector<EmaTensor>& tensors, int threads, const float* alphas);

}  // namespace cit
