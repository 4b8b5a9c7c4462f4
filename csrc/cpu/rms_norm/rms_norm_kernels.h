// The kernels of one instruction set.
#pragma once

#include <stdint.h>

#include "cpu/rms_norm/rms_norm.h"

namespace cit {

// Both for rows [first, first + count).
struct RmsNormKernels {
  void (*forward)(const RmsNorm& norm, const Array& x, const Array& weight, const Array& y, int64_t first,
                  int64_t count);
  void (*backward)(const RmsNorm& norm, const Array& x, const Array& weight, const Array& grad, const Array& grad_x,
                   int64_t first, int64_t count);
};

namespace simd_baseline {
extern const RmsNormKernels kRmsNorm;
}
#ifdef CIT_FAST_X86
namespace simd_avx2 {
extern const RmsNormKernels kRmsNorm;
}
namespace simd_avx512 {
extern const RmsNormKernels kRmsNorm;
}
#endif

}  // namespace cit
