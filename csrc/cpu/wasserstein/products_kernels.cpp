// Inner loops of products.h, compiled once per instruction set.
//
// In double 8 x 16 entries of X Y^T stay in registers: per coordinate two loads, eight broadcasts from one cache line,
// 16 multiplications and additions. In float 16 x 16 entries do, one register a row; after kFloatDepth coordinates they
// are added to sums in double. Panels of a cloud are packed once for all of its pairs and read front to back. Every
// entry is summed in the order of the coordinates, whatever the shapes around it.

#include "cpu/wasserstein/products_kernels.h"

#include "cpu/simd/simd_double.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {
namespace {

template <class Real>
void pack(const double* points, int64_t n, int64_t d, Real* panels) {
  for (int64_t start = 0; start < d; start += kProductDepth) {
    const int64_t depth = d - start < kProductDepth ? d - start : kProductDepth;
    for (int64_t first = 0; first < n; first += kPanelRows, panels += kPanelRows * depth) {
      const int64_t rows = n - first < kPanelRows ? n - first : kPanelRows;
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t r = 0; r < kPanelRows; ++r) {
          panels[k * kPanelRows + r] = r < rows ? static_cast<Real>(points[(first + r) * d + start + k]) : Real(0);
        }
      }
    }
  }
}

template <class Real>
CIT_INLINE void finish(const Tile<Real>& tile, F64x8 sum, double* out, double rounding) {
  if (!tile.first) sum = load(out) + sum;
  if (tile.last) {
    const F64x8 distance = splat(1.0) - sum;
    sum = where_above(splat(rounding), distance, splat(0.0), distance);
  }
  store(out, sum);
}

// A row of the tile from its sums over the coordinates.
template <class Real>
CIT_INLINE void finish_row(const Tile<Real>& tile, int64_t row, F64x8 low, F64x8 high, double rounding) {
  double* const out = tile.out + row * tile.stride;
  double block[kPanelRows];
  double* const whole = tile.columns == kPanelRows ? out : block;
  if (!tile.first && whole == block) memcpy(block, out, sizeof(double) * static_cast<size_t>(tile.columns));
  finish(tile, low, whole, rounding);
  finish(tile, high, whole + kDoubleLanes, rounding);
  if (whole == block) memcpy(out, block, sizeof(double) * static_cast<size_t>(tile.columns));
}

template <int kCount>
CIT_INLINE void some_rows(const Tile<double>& tile, int64_t first, double rounding) {
  F64x8 low[kCount], high[kCount];
  for (int r = 0; r < kCount; ++r) low[r] = high[r] = splat(0.0);
  const double* x = tile.x + first;
  const double* y = tile.y;
  for (int64_t k = 0; k < tile.depth; ++k, x += kPanelRows, y += kPanelRows) {
    const F64x8 y0 = load(y), y1 = load(y + kDoubleLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const F64x8 value = splat(x[r]);
      low[r] = low[r] + value * y0;
      high[r] = high[r] + value * y1;
    }
  }
  for (int r = 0; r < kCount && first + r < tile.rows; ++r) finish_row(tile, first + r, low[r], high[r], rounding);
}

template <int kCount>
CIT_INLINE void some_rows(const Tile<float>& tile, int64_t first, double rounding) {
  double total[kCount][kPanelRows] = {};
  const float* x = tile.x + first;
  const float* y = tile.y;
  for (int64_t start = 0; start < tile.depth; start += kFloatDepth) {
    const int64_t depth = tile.depth - start < kFloatDepth ? tile.depth - start : kFloatDepth;
    F32x16 sum[kCount];
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r) sum[r] = splat(0.0f);
    for (int64_t k = 0; k < depth; ++k, x += kPanelRows, y += kPanelRows) {
      const F32x16 ys = load(y);
#pragma GCC unroll 16
      for (int r = 0; r < kCount; ++r) sum[r] = sum[r] + splat(x[r]) * ys;
    }
    float block[kCount][kPanelRows];
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r) store(block[r], sum[r]);
    // Seen through, halves of a register would be read from memory, and the sums kept there all along.
    asm volatile("" : : "r"(block) : "memory");
    for (int r = 0; r < kCount; ++r) {
      for (int64_t j = 0; j < kPanelRows; j += kDoubleLanes) {
        store(total[r] + j, load(total[r] + j) + load_doubles(block[r] + j));
      }
    }
  }
  for (int r = 0; r < kCount && first + r < tile.rows; ++r) {
    finish_row(tile, first + r, load(total[r]), load(total[r] + kDoubleLanes), rounding);
  }
}

// Fewer rows at a time where registers are narrow, and fewer for the last rows of a cloud.
void cosine_tile(const Tile<double>& tile, double rounding) {
  constexpr int kCount = kParts == 1 ? kTileRows<double> : 2;
  for (int64_t first = 0; first < tile.rows; first += kCount) some_rows<kCount>(tile, first, rounding);
}

void cosine_tile(const Tile<float>& tile, double rounding) {
  constexpr int kCount = kParts == 1 ? kTileRows<float> : 8 / kParts;
  constexpr int kHalf = kParts == 1 ? kCount / 2 : kCount, kQuarter = kParts == 1 ? kCount / 4 : kCount;
  if (tile.rows <= kQuarter) {
    some_rows<kQuarter>(tile, 0, rounding);
  } else if (tile.rows <= kHalf) {
    some_rows<kHalf>(tile, 0, rounding);
  } else {
    for (int64_t first = 0; first < tile.rows; first += kCount) some_rows<kCount>(tile, first, rounding);
  }
}

}  // namespace

extern const ProductKernels kProducts;
const ProductKernels kProducts = {{pack<float>, cosine_tile}, {pack<double>, cosine_tile}};

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
