// The rule that turns the three norms of a tensor into its weight: one definition for the CPU and the CUDA kernels.
#pragma once

#include <cfloat>

#include "cpu/balance_ema/balance_ema_kernels.h"

#ifdef __CUDACC__
#define CIT_HOST_DEVICE __host__ __device__
#else
#define CIT_HOST_DEVICE
#endif

namespace cit {

struct Weight {
  float alpha;  // 0: leave the tensor out
  bool fallback;
};

// The norms are not negative; false for NaN.
CIT_HOST_DEVICE inline bool is_finite_norm(double norm) {
  return norm <= DBL_MAX;
}

// `remaining`: the distance that the last update left, for the rule of the paper.
CIT_HOST_DEVICE inline Weight balance_weight(const Norms& norms, const RuleOptions& options, double remaining) {
  if (!is_finite_norm(norms.distance) || !is_finite_norm(norms.gradient)) return {0.0f, false};
  if (options.rule == Rule::kFixed) return {static_cast<float>(1.0 - options.decay), false};
  const double factor = options.rule == Rule::kPaper ? remaining : options.scale;
  const double weight = factor * (1.0 + norms.gradient) / (norms.distance * norms.gradient_change);
  const bool usable = weight > 0.0 && weight < 1.0;  // false for NaN
  // 0 means "left out" to our callers, so a weight too small for a float becomes the smallest one.
  const float rounded = static_cast<float>(usable ? weight : options.fallback);
  return {rounded < FLT_MIN ? FLT_MIN : rounded, !usable};
}

// The same for one of a list: decides alphas[i], fallbacks[i] and, where there are any, remaining[i] (of the last
// update on entry, of this one on return).
CIT_HOST_DEVICE inline void store_balance_weight(const Norms& norms, const RuleOptions& options, int64_t i,
                                                 float* alphas, bool* fallbacks, float* remaining) {
  const Weight weight = balance_weight(norms, options, remaining == nullptr ? 0.0 : remaining[i]);
  alphas[i] = weight.alpha;
  fallbacks[i] = weight.fallback;
  if (remaining != nullptr) remaining[i] = static_cast<float>((1.0 - weight.alpha) * norms.distance);
}

}  // namespace cit
