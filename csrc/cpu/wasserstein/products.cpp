#include "cpu/wasserstein/products.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/wasserstein/products_kernels.h"

namespace cit {
namespace {

const ProductKernels& kernels() {
#ifdef CIT_FAST_X86
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      return simd_avx512::kProducts;
    case SimdLevel::kAvx2:
      return simd_avx2::kProducts;
    default:
      break;
  }
#endif
  return simd_baseline::kProducts;
}

template <class Real>
const TileKernels<Real>& tile_kernels();
template <>
const TileKernels<float>& tile_kernels() {
  return kernels().float_tiles;
}
template <>
const TileKernels<double>& tile_kernels() {
  return kernels().double_tiles;
}

// Some columns of one pair.
template <class Real>
struct Task {
  const CosineCost<Real>* pair;
  std::int64_t column, columns, work;
};

// Columns per task: many enough that the rows of X are read from the second-level cache, few enough to spread one
// pair over threads.
constexpr std::int64_t kTaskColumns = 8 * kPanelRows;

template <class Real>
void run(const Task<Real>& task, double rounding) {
  const TileKernels<Real>& kernel = tile_kernels<Real>();
  const CosineCost<Real>& pair = *task.pair;
  for (std::int64_t k = 0; k < pair.d; k += kProductDepth) {
    const std::int64_t depth = std::min(kProductDepth, pair.d - k);
    const Real* const x = pair.x + packed_size(pair.n, k);
    const Real* const y = pair.y + packed_size(pair.m, k);
    for (std::int64_t j = task.column; j < task.column + task.columns; j += kPanelRows) {
      for (std::int64_t i = 0; i < pair.n; i += kTileRows<Real>) {
        const std::int64_t in_panel = i % kPanelRows;
        kernel.cosine_tile({x + (i - in_panel) * depth + in_panel, y + j * depth, depth, pair.out + i * pair.m + j,
                            std::min(kTileRows<Real>, pair.n - i), std::min(kPanelRows, pair.m - j), pair.m, k == 0,
                            k + depth == pair.d},
                           rounding);
      }
    }
  }
}

}  // namespace

std::int64_t packed_size(std::int64_t n, std::int64_t d) {
  return (n + kPanelRows - 1) / kPanelRows * kPanelRows * d;
}

template <class Real>
void pack_clouds(const std::vector<Cloud<Real>>& clouds, int threads) {
  parallel_for(static_cast<std::int64_t>(clouds.size()), threads, [&](std::int64_t index) {
    const Cloud<Real>& cloud = clouds[static_cast<std::size_t>(index)];
    tile_kernels<Real>().pack(cloud.points, cloud.n, cloud.d, cloud.panels);
  });
}

template <class Real>
void cosine_costs(const std::vector<CosineCost<Real>>& pairs, double rounding, int threads) {
  std::vector<Task<Real>> tasks;
  for (const CosineCost<Real>& pair : pairs) {
    for (std::int64_t column = 0; column < pair.m; column += kTaskColumns) {
      const std::int64_t columns = std::min(kTaskColumns, pair.m - column);
      tasks.push_back({&pair, column, columns, pair.n * columns * pair.d});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task<Real>& x, const Task<Real>& y) { return x.work > y.work; });
  parallel_for(static_cast<std::int64_t>(tasks.size()), threads,
               [&](std::int64_t index) { run(tasks[static_cast<std::size_t>(index)], rounding); });
}

template void pack_clouds(const std::vector<Cloud<float>>&, int);
template void pack_clouds(const std::vector<Cloud<double>>&, int);
template void cosine_costs(const std::vector<CosineCost<float>>&, double, int);
template void cosine_costs(const std::vector<CosineCost<double>>&, double, int);

}  // namespace cit
