// Entropic optimal transport of many pairs of weighted point clouds on the CPU, with bounds on the exact value. The
// definition is cit_fast/reference/wasserstein.py.
#pragma once

#include <cstdint>
#include <vector>

namespace cit {

struct TransportPair {
  const double* cost;  // [n, m], rows `stride` apart, not negative
  std::int64_t n, m, stride;
  const double* a;  // [n], positive, sum 1
  const double* b;  // [m], positive, sum 1
  double epsilon;   // 0: automatic
};

struct SinkhornOptions {
  double tolerance;  // L1 error of the marginals
  std::int64_t max_iterations;
  bool clamp_epsilon;  // into the range relative to the largest cost where float64 can tell the plan from its limit
  int threads;
};

// A row of doubles for Python: iterations is a whole number.
struct TransportResult {
  double lower;           // <= min <pi, C>
  double upper;           // >= min <pi, C>: the cost of the rounded plan
  double entropic_value;  // min <pi, C> + epsilon KL(pi || a b^T)
  double iterations;
  double marginal_error;
  double epsilon;  // as used; 0 where all costs are 0; NaN where a cost is not finite, and all else is 0
};

// results: one per pair. The same bits with any number of threads.
void sinkhorn(const std::vector<TransportPair>& pairs, const SinkhornOptions& options, TransportResult* results);

}  // namespace cit
