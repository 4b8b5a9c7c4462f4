// The kernels of one instruction set.
#pragma once

#include <stdint.h>

namespace cit {

// Rows of a matrix in one panel: coordinate after coordinate, each of all the rows. A tile of the result is half a
// panel of X by a panel of Y.
constexpr int64_t kPanelRows = 16;
constexpr int64_t kTileRows = 8;
constexpr int64_t kProductDepth = 384;  // of d at a time: a panel of Y is 48 KiB, near the first-level cache

struct Tile {
  const double* x;  // panels, from the tile's first row and coordinate on
  const double* y;
  int64_t depth;
  double* out;  // rows `stride` apart
  int64_t rows, columns, stride;
  bool first, last;  // of the coordinates: out is set, not added to; 1 - the sum, 0 where below `rounding`
};

struct ProductKernels {
  // points [n, d] to panels; rows beyond n are 0.
  void (*pack)(const double* points, int64_t n, int64_t d, double* panels);
  void (*cosine_tile)(const Tile& tile, double rounding);
};

namespace simd_baseline {
extern const ProductKernels kProducts;
}
#ifdef CIT_FAST_X86
namespace simd_avx2 {
extern const ProductKernels kProducts;
}
namespace simd_avx512 {
extern const ProductKernels kProducts;
}
#endif

}  // namespace cit
