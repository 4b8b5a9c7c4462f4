// The kernels of one instruction set.
#pragma once

#include <stdint.h>

namespace cit {

// Rows of a matrix in one panel: coordinate after coordinate, each of all the rows. All panels of the first
// kProductDepth coordinates come first, then those of the next: what is used together lies together, whatever power of
// two d is. A tile of the result is some rows of a panel of X by a panel of Y.
constexpr int64_t kPanelRows = 16;
constexpr int64_t kProductDepth = 384;  // of d at a time: a panel of Y is 48 KiB, near the first-level cache

// Coordinates whose products are summed in float before they are added in double.
constexpr int64_t kFloatDepth = 64;

template <class Real>
constexpr int64_t kTileRows = sizeof(Real) == 8 ? 8 : 16;  // as many as there are registers for

template <class Real>
struct Tile {
  const Real* x;  // panels, from the tile's first row and coordinate on
  const Real* y;
  int64_t depth;
  double* out;  // rows `stride` apart
  int64_t rows, columns, stride;
  bool first, last;  // of the coordinates: out is set, not added to; 1 - the sum, 0 where below `rounding`
};

template <class Real>
struct TileKernels {
  // points [n, d] to panels; rows beyond n are 0.
  void (*pack)(const double* points, int64_t n, int64_t d, Real* panels);
  void (*cosine_tile)(const Tile<Real>& tile, double rounding);
};

struct ProductKernels {
  TileKernels<float> float_tiles;
  TileKernels<double> double_tiles;
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
