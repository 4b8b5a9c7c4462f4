#include "products.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"
#include "products_kernels.h"

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

// Some columns of one pair.
struct Task {
  const CosineCost* pair;
  std::int64_t column, columns, work;
};

// Columns per task: many enough that the rows of X are read from the second-level cache, few enough to spread one
// pair over threads.
constexpr std::int64_t kTaskColumns = 8 * kPanelRows;

void run(const Task& task, double rounding) {
  const ProductKernels& kernel = kernels();
  const CosineCost& pair = *task.pair;
  for (std::int64_t k = 0; k < pair.d; k += kProductDepth) {
    const std::int64_t depth = std::min(kProductDepth, pair.d - k);
    for (std::int64_t j = task.column; j < task.column + task.columns; j += kPanelRows) {
      for (std::int64_t i = 0; i < pair.n; i += kTileRows) {
        const std::int64_t in_panel = i % kPanelRows;
        kernel.cosine_tile(
            {pair.x + (i - in_panel) * pair.d + k * kPanelRows + in_panel, pair.y + j * pair.d + k * kPanelRows, depth,
             pair.out + i * pair.m + j, std::min(kTileRows, pair.n - i), std::min(kPanelRows, pair.m - j), pair.m,
             k == 0, k + depth == pair.d},
            rounding);
      }
    }
  }
}

}  // namespace

std::int64_t packed_size(std::int64_t n, std::int64_t d) {
  return (n + kPanelRows - 1) / kPanelRows * kPanelRows * d;
}

void pack_clouds(const std::vector<Cloud>& clouds, int threads) {
  parallel_for(static_cast<std::int64_t>(clouds.size()), threads, [&](std::int64_t index) {
    const Cloud& cloud = clouds[static_cast<std::size_t>(index)];
    kernels().pack(cloud.points, cloud.n, cloud.d, cloud.panels);
  });
}

void cosine_costs(const std::vector<CosineCost>& pairs, double rounding, int threads) {
  std::vector<Task> tasks;
  for (const CosineCost& pair : pairs) {
    for (std::int64_t column = 0; column < pair.m; column += kTaskColumns) {
      const std::int64_t columns = std::min(kTaskColumns, pair.m - column);
      tasks.push_back({&pair, column, columns, pair.n * columns * pair.d});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.work > y.work; });
  parallel_for(static_cast<std::int64_t>(tasks.size()), threads,
               [&](std::int64_t index) { run(tasks[static_cast<std::size_t>(index)], rounding); });
}

}  // namespace cit
