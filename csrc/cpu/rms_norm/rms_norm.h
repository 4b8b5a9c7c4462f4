// RMSNorm of rows, forward and back, each in one pass over memory.
//
// Every array of a call has the same dtype. Products and sums are in float32, rounded once when a value is stored. A row
// is one thread's, so bits do not depend on their number.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace cit {

struct RmsNorm {
  std::int64_t rows, width;
  float eps;
  bool from_one;  // the factor is 1 + weight (Gemma)
};

// y = x / sqrt(mean(x^2) + eps) * weight, of each row. weight: [width].
void rms_norm(const RmsNorm& norm, const Array& x, const Array& weight, const Array& y, int threads);

// With r = 1 / sqrt(mean(x^2) + eps) and h = grad * weight: grad_x = r (h - x r^2 mean(h x)).
void rms_norm_backward(const RmsNorm& norm, const Array& x, const Array& weight, const Array& grad, const Array& grad_x,
                       int threads);

}  // namespace cit
