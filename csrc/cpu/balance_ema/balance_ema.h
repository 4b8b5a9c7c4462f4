// Exponential moving average of parameters with a weight per tensor that follows from the gradients (LCIA).
//
//   a = |p - e|_1,  b = |g|_1,  c = |g - g_prev|_1          per tensor, e before its update
//   alpha = paper: a' (1 + b) / (a c)    released: scale (1 + b) / (a c)    fixed: 1 - decay
//   e <- e + alpha (p - e),  g_prev <- g,  a' <- (1 - alpha) a
//
// The definition that this is tested against is cit_fast/ops/balance_ema/reference.py. Sums: 16 float lanes over each
// chunk of 16 Ki elements of a tensor, then double over the chunks in order, so the number of threads never changes a
// bit.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dtype.h"

namespace cit {

// The values are the positions in BALANCE_RULES of cit_fast/ops/balance_ema/checks.py.
enum class Rule : std::int64_t { kReleased = 0, kPaper = 1, kFixed = 2 };

struct RuleOptions {
  Rule rule;
  double decay;     // beta of `fixed`
  double fallback;  // alpha where `paper` and `released` give none in (0, 1)
  double scale;     // of `released`
};

struct EmaTensor {
  std::int64_t numel;
  Array param;
  Array average;  // float32 or bfloat16, like the moments
  Array grad;
  Array previous_grad;  // data is null when the rule does not need it
};

struct AdamWTensor {
  EmaTensor ema;
  Array exp_avg;
  Array exp_avg_sq;
};

struct AdamWOptions {
  std::int64_t step;  // 1 for the first
  double lr, beta1, beta2, eps, weight_decay;
};

// How to treat memory and threads.
struct SweepOptions {
  bool store_grads;    // previous_grad <- grad; otherwise previous_grad is only read
  bool nearest;        // round bfloat16 averages to the nearest, not stochastically
  std::uint32_t seed;  // for stochastic rounding of bfloat16 state
  int threads;
};

// Where results go: one entry for each tensor.
struct Results {
  float* alphas;     // 0 where a tensor was left out because p or g held a value that is not finite
  bool* fallbacks;   // the rule gave no usable weight
  double* norms;     // a, b, c of each tensor
  float* remaining;  // a' of each tensor, of the last step on entry and of this one on return; null: not wanted
};

void balance_norms(const std::vector<EmaTensor>& tensors, const SweepOptions& sweep, double* norms);

void balance_ema(const std::vector<EmaTensor>& tensors, const RuleOptions& rule, const SweepOptions& sweep,
                 const Results& results);

// One sweep: the pending average update of the step before (results.alphas, 0 = none), AdamW, the norms, the new
// alphas. An element whose gradient is not finite keeps its parameter and moments.
void adamw_balance_ema(const std::vector<AdamWTensor>& tensors, const AdamWOptions& adamw, const RuleOptions& rule,
                       const SweepOptions& sweep, const Results& results);

// Applies pending updates; reads only param and average.
void flush_balance_ema(const std::vector<EmaTensor>& tensors, const SweepOptions& sweep, const float* alphas);

}  // namespace cit
