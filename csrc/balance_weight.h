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

CIT_HOST_DEVICE inline Weight balance_weight(const Norms& norms, const RuleOptions& options) {
  if (!is_finite_norm(norms.distance) || !is_finite_norm(norms.gradient)) return {0.0f, false};
  if (options.rule == Rule::kFixed) return {static_cast<float>(1.0 - options.decay), false};
  const double numerator = options.rule == Rule::kReleased ? 2.0 * (1.0 + norms.gradient) : 1.0 + norms.gradient;
  const double weight = numerator / (norms.distance * norms.gradient_change);
  const bool usable = weight > 0.0 && weight < 1.0;  // false for NaN
  double alpha = 0.0;
  if (options.rule == Rule::kReleased) {
    alpha = usable ? weight : options.fallback;
  } else {
    alpha = 1.0 - (usable ? weight : options.decay);
  }
  // 0 means "left out" to our callers, so a weight too small for a float becomes the smallest one.
  const float rounded = static_cast<float>(alpha);
  return {rounded < FLT_MIN ? FLT_MIN : rounded, !usable};
}

}  // namespace cit
