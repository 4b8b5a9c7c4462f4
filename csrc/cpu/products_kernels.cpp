// Inner loops of products.h, compiled once per instruction set.
//
// 8 x 16 entries of X Y^T stay in registers: per coordinate two loads, eight broadcasts from one cache line, 16
// multiplications and additions. Panels of a cloud are packed once for all of its pairs and read front to back. Every
// entry is summed in the order of the coordinates, whatever the shapes around it.

#include "products_kernels.h"

#include "simd_double.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {
namespace {

void pack(const double* points, int64_t n, int64_t d, double* panels) {
  for (int64_t first = 0; first < n; first += kPanelRows, panels += kPanelRows * d) {
    const int64_t rows = n - first < kPanelRows ? n - first : kPanelRows;
    for (int64_t k = 0; k < d; ++k) {
      for (int64_t r = 0; r < kPanelRows; ++r) {
        panels[k * kPanelRows + r] = r < rows ? points[(first + r) * d + k] : 0.0;
      }
    }
  }
}

// Fewer rows at a time where registers are narrow.
constexpr int kRows = kParts == 1 ? kTileRows : 2;

CIT_INLINE void finish(const Tile& tile, F64x8 sum, double* out, double rounding) {
  if (!tile.first) sum = load(out) + sum;
  if (tile.last) {
    const F64x8 distance = splat(1.0) - sum;
    sum = where_above(splat(rounding), distance, splat(0.0), distance);
  }
  store(out, sum);
}

CIT_INLINE void some_rows(const Tile& tile, int64_t first, double rounding) {
  F64x8 low[kRows], high[kRows];
  for (int r = 0; r < kRows; ++r) low[r] = high[r] = splat(0.0);
  const double* x = tile.x + first;
  const double* y = tile.y;
  for (int64_t k = 0; k < tile.depth; ++k, x += kPanelRows, y += kPanelRows) {
    const F64x8 y0 = load(y), y1 = load(y + kDoubleLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F64x8 value = splat(x[r]);
      low[r] = low[r] + value * y0;
      high[r] = high[r] + value * y1;
    }
  }
  for (int r = 0; r < kRows && first + r < tile.rows; ++r) {
    double* const out = tile.out + (first + r) * tile.stride;
    double block[kPanelRows];
    double* const whole = tile.columns == kPanelRows ? out : block;
    if (!tile.first && whole == block) memcpy(block, out, sizeof(double) * static_cast<size_t>(tile.columns));
    finish(tile, low[r], whole, rounding);
    finish(tile, high[r], whole + kDoubleLanes, rounding);
    if (whole == block) memcpy(out, block, sizeof(double) * static_cast<size_t>(tile.columns));
  }
}

void cosine_tile(const Tile& tile, double rounding) {
  for (int64_t first = 0; first < kTileRows && first < tile.rows; first += kRows) some_rows(tile, first, rounding);
}

}  // namespace

extern const ProductKernels kProducts;
const ProductKernels kProducts = {pack, cosine_tile};

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
