// Inner loops of wasserstein_exact.cpp, compiled once per instruction set: sweeps over one row of the cost in double.
// Row and column numbers travel as doubles, so that they sit in the same lanes as what they belong to.

#include "cpu/wasserstein/wasserstein_exact_kernels.h"

#include "cpu/simd/simd_double.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {
namespace {

constexpr double kInfinity = __builtin_inf();

// step(j, costs), eight at a time; 0 beyond the row's end.
template <class Step>
CIT_INLINE void for_each_cost(const double* row, int64_t m, const Step& step) {
  int64_t j = 0;
  for (; j + kDoubleLanes <= m; j += kDoubleLanes) step(j, load(row + j));
  if (j == m) return;
  double rest[kDoubleLanes] = {};
  for (int64_t k = j; k < m; ++k) rest[k - j] = row[k];
  step(j, load(rest));
}

// The smallest of values taken in turns, and where it was.
struct Least {
  F64x8 value = splat(kInfinity), block = splat(0.0), at = splat(0.0);

  __attribute__((always_inline)) void take(const F64x8& values) {
    at = where_above(value, values, block, at);
    value = smaller(values, value);
    block = block + splat(double(kDoubleLanes));
  }

  __attribute__((always_inline)) Nearest fold() const {
    static const double lanes[kDoubleLanes] = {0, 1, 2, 3, 4, 5, 6, 7};
    const double least = smallest_lane(value);
    const F64x8 columns = where_above(value, splat(least), splat(kInfinity), at + load(lanes));
    const double column = smallest_lane(columns);
    return {least, column < kInfinity ? static_cast<int64_t>(column) : 0};
  }

 private:
  static __attribute__((always_inline)) inline double smallest_lane(const F64x8& x) {
    typedef double Pair __attribute__((vector_size(16)));
    Pair q[4];
    memcpy(q, &x, sizeof(q));
    const Pair r = q[0] < q[1] ? q[0] : q[1], s = q[2] < q[3] ? q[2] : q[3];
    const Pair t = r < s ? r : s;
    return t[0] < t[1] ? t[0] : t[1];
  }
};

Nearest reach(const double* cost, int64_t m, double base, int64_t row, const Search& search) {
  Least least;
  const F64x8 start = splat(base), from = splat(static_cast<double>(row));
  for_each_cost(cost, m, [&](int64_t j, const F64x8& costs) __attribute__((always_inline)) {
    const F64x8 through = (costs - load(search.v + j)) + start, before = load(search.distance + j);
    store(search.predecessor + j, where_above(before, through, from, load(search.predecessor + j)));
    const F64x8 now = smaller(through, before);
    store(search.distance + j, now);
    least.take(now);
  });
  return least.fold();
}

Nearest nearest(const Search& search) {
  Least least;
  for (int64_t j = 0; j < search.columns; j += kDoubleLanes) least.take(load(search.distance + j));
  return least.fold();
}

Nearest least_reduced(const double* cost, int64_t m, const double* v) {
  Least least;
  for_each_cost(cost, m,
                [&](int64_t j, const F64x8& costs) __attribute__((always_inline)) { least.take(costs - load(v + j)); });
  return least.fold();
}

void lower_to_feasible(const double* cost, int64_t m, double u, double* v) {
  const F64x8 us = splat(u);
  for_each_cost(cost, m, [&](int64_t j, const F64x8& costs) __attribute__((always_inline)) {
    store(v + j, smaller(load(v + j), costs - us));
  });
}

}  // namespace

extern const ExactKernels kExact;
const ExactKernels kExact = {reach, nearest, least_reduced, lower_to_feasible};

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
