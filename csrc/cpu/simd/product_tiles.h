// Matrix products for operands that are already where they are wanted: tiles of 16 or 32 lanes by a few rows that live
// in registers for the whole depth.
//
// The libraries behind torch.mm reach 20 to 40 % of what AMD's recent processors can do, and give half-precision
// products rounded to half precision, too coarse for a difference of probabilities. Here the sums stay in float32, the
// head is read where it lies, and the tile is used while it is in the first-level cache.
#pragma once

#include "cpu/information_gain/information_gain_kernels.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {

constexpr int64_t kLine = 16;  // elements of a cache line

// Engine: type Lanes (16 of them) and, for one element, broadcast; see information_gain_kernels.cpp.
template <class Engine, int kGroups, int kRows, class Element>
__attribute__((always_inline)) static inline void product_tile(const ProductOf<Element>& p, int64_t row) {
  using Lanes = typename Engine::Lanes;
  using Sums = typename Engine::Sums;
  Sums sums[kRows][kGroups];
#pragma GCC unroll 24
  for (int j = 0; j < kRows; ++j) {
    for (int g = 0; g < kGroups; ++g) {
      sums[j][g] = p.accumulate ? Engine::load_sums(p.c[g] + (row + j) * p.ldc) : Engine::zero();
    }
  }
  const Element* const w = p.w + row * p.row_stride;
  const int64_t row_stride = p.row_stride, k_stride = p.k_stride, depth = p.depth, lda = p.lda;
  for (int64_t begin = 0; begin < depth; begin += kLine) {
    if (p.ahead != 0) {
      // From memory, and too many streams for the hardware to follow.
      for (int j = 0; j < kRows; ++j) __builtin_prefetch(w + j * row_stride + p.ahead + begin, 0, 2);
    }
    const int64_t end = begin + kLine < depth ? begin + kLine : depth;
    for (int64_t k = begin; k < end; ++k) {
      Lanes lanes[kGroups];
      for (int g = 0; g < kGroups; ++g) {
        lanes[g] = Engine::load(p.a[g] + k * lda);
      }
#pragma GCC unroll 24
      for (int j = 0; j < kRows; ++j) {
        const auto factor = Engine::broadcast(w + j * row_stride + k * k_stride);
        for (int g = 0; g < kGroups; ++g) sums[j][g] = Engine::multiply_add(lanes[g], factor, sums[j][g]);
      }
    }
  }
#pragma GCC unroll 24
  for (int j = 0; j < kRows; ++j) {
    for (int g = 0; g < kGroups; ++g) Engine::store_sums(p.c[g] + (row + j) * p.ldc, sums[j][g]);
  }
}

// kRows: height of the tile.
template <class Engine, int kGroups, int kRows, class Element>
static void product_rows(const ProductOf<Element>& p) {
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) product_tile<Engine, kGroups, kRows>(p, row);
  for (; row + 4 <= p.rows; row += 4) product_tile<Engine, kGroups, 4>(p, row);
  for (; row < p.rows; ++row) product_tile<Engine, kGroups, 1>(p, row);
}

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
