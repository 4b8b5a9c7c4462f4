// The kernels of one instruction set: what the exact solver does with a row of the cost.
#pragma once

#include <stdint.h>

namespace cit {

// Arrays over columns are padded to a multiple of this.
constexpr int64_t kSearchColumns = 8;

// A shortest-path search. A column that is settled has v = -infinity and distance = infinity; so has the padding.
struct Search {
  const double* v;
  double* distance;     // from the source, of columns not yet settled
  double* predecessor;  // the row it comes from
  int64_t columns;      // padded
};

struct Nearest {
  double value;
  int64_t column;  // the first of those with that value
};

struct ExactKernels {
  // distance_j = min(distance_j, cost_j - v_j + base), the predecessor `row` where that is less; the nearest column.
  Nearest (*reach)(const double* cost, int64_t m, double base, int64_t row, const Search& search);
  Nearest (*nearest)(const Search& search);
  // min_j cost_j - v_j
  Nearest (*least_reduced)(const double* cost, int64_t m, const double* v);
  // v_j = min(v_j, cost_j - u)
  void (*lower_to_feasible)(const double* cost, int64_t m, double u, double* v);
};

namespace simd_baseline {
extern const ExactKernels kExact;
}
#ifdef CIT_FAST_X86
namespace simd_avx2 {
extern const ExactKernels kExact;
}
namespace simd_avx512 {
extern const ExactKernels kExact;
}
#endif

}  // namespace cit
