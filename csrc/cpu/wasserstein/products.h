// Cosine distances in double between many pairs of point clouds.
#pragma once

#include <cstdint>
#include <vector>

namespace cit {

// Numbers that a packed cloud takes.
std::int64_t packed_size(std::int64_t n, std::int64_t d);

template <class Real>
struct Cloud {
  const double* points;  // [n, d], row-major
  Real* panels;          // packed_size(n, d)
  std::int64_t n, d;
};

template <class Real>
void pack_clouds(const std::vector<Cloud<Real>>& clouds, int threads);

template <class Real>
struct CosineCost {
  const Real* x;  // panels of n unit vectors
  const Real* y;  // panels of m unit vectors
  double* out;    // [n, m]
  std::int64_t n, m, d;
};

// How far a distance from panels in float may be from the true one, whatever d is: with u = 2^-24, 2 u for the rounding
// of the points and (64 + 2) u for 64 products summed in float, both as a share of sum_k |x_k y_k| <= 1.
constexpr double kFloatCostError = 70.0 / (1 << 24);

// out = 1 - X Y^T, and 0 where that is below `rounding`. The same bits with any number of threads, and whatever the
// other pairs are.
template <class Real>
void cosine_costs(const std::vector<CosineCost<Real>>& pairs, double rounding, int threads);

}  // namespace cit
