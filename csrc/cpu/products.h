// Cosine distances in double between many pairs of point clouds.
#pragma once

#include <cstdint>
#include <vector>

namespace cit {

// Doubles that a packed cloud takes.
std::int64_t packed_size(std::int64_t n, std::int64_t d);

struct Cloud {
  const double* points;  // [n, d], row-major
  double* panels;        // packed_size(n, d)
  std::int64_t n, d;
};

void pack_clouds(const std::vector<Cloud>& clouds, int threads);

struct CosineCost {
  const double* x;  // panels of n unit vectors
  const double* y;  // panels of m unit vectors
  double* out;      // [n, m]
  std::int64_t n, m, d;
};

// out = 1 - X Y^T, and 0 where that is below `rounding`. The same bits with any number of threads, and whatever the
// other pairs are.
void cosine_costs(const std::vector<CosineCost>& pairs, double rounding, int threads);

}  // namespace cit
