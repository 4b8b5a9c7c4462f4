// Optimal transport of many pairs of weighted point clouds on the CPU: entropic, with bounds on the exact value, and
// exact. The definition is cit_fast/ops/wasserstein/reference.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace cit {

struct TransportPair {
  const double* cost;  // [n, m], rows `stride` apart, not negative
  std::int64_t n, m, stride;
  const double* a;  // [n], positive, sum 1
  const double* b;  // [m], positive, sum 1
  double* plan;     // [n, m], not strided; or nullptr: neither it nor f and g are wanted
  double* f;        // [n] potentials
  double* g;        // [m]
};

struct SinkhornOptions {
  double epsilon;    // brought into the range where float64 can tell the plan from its limit; 0: automatic
  double tolerance;  // L1 error of the marginals
  std::int64_t max_iterations;
  double gap;         // epsilon goes down until upper - lower is at most this share of upper; 0: it stays
  double cost_error;  // how far a cost may be from the true one: the bounds are those of the true costs
  int threads;
};

// A row of doubles for Python: iterations is a whole number.
struct TransportResult {
  double lower;  // <= min <pi, C>
  double upper;  // >= min <pi, C>: the cost of the rounded plan
  double iterations;
  double marginal_error;
  double epsilon;  // as used; 0 where all costs are 0; NaN where a cost is not finite, and all else is 0
};

struct CostRange {
  double largest, mean;
  bool finite;
};

CostRange cost_range(const TransportPair& pair);

// g [m]: the column potential after a few Sinkhorn iterations in float.
void coarse_potential(const TransportPair& pair, const CostRange& range, double* g);

// results: one per pair. The same bits with any number of threads.
void sinkhorn(const std::vector<TransportPair>& pairs, const SinkhornOptions& options, TransportResult* results);

struct ExactOptions {
  double gap;         // stop where upper - lower is at most this share of upper; 0: lower = upper = min <pi, C>
  double cost_error;  // as above; where gap is 0, so is this
};

// The bounds; all else 0, but epsilon as above. iterations is -1, and all else 0, where the search took too long:
// another solver should do it. A plan and potentials, where wanted, are those of gap 0.
void exact_transport(const std::vector<TransportPair>& pairs, const ExactOptions& options, int threads,
                     TransportResult* results);

// body(index) for all pairs, largest first.
void for_each_pair(const std::vector<TransportPair>& pairs, int threads, const std::function<void(std::size_t)>& body);

}  // namespace cit
