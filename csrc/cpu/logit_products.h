// Hidden states packed for the product with a language model's head, and the head a block of rows at a time.
#pragma once

#include <cstdint>

#include "aligned.h"
#include "information_gain.h"
#include "information_gain_kernels.h"

namespace cit {

const InformationGainKernels& information_gain_kernels();

inline std::int64_t divide_up(std::int64_t count, std::int64_t size) {
  return (count + size - 1) / size;
}

// Whether products run on pairs of bfloat16: both sides are, the width is even and the processor can. Everything else
// is widened to float32.
bool multiply_pairs(const Matrix& hidden, const Matrix& weight);

// Groups of 16 rows, transposed: per group [width][16] float32, or [width / 2][16] pairs of bfloat16 in 32 bits.
class Panels {
 public:
  // Rows [begin, begin + count) of `hidden`; the lanes left over are 0, and so are rows whose `row_weight` is 0,
  // whatever they hold. row_weight: of all rows, or null.
  Panels(const Matrix& hidden, std::int64_t begin, std::int64_t count, const float* row_weight, bool pairs,
         int threads);

  std::int64_t groups() const { return groups_; }
  const float* group(std::int64_t index) const { return words_.data() + index * words_per_group_; }

 private:
  std::int64_t groups_, words_per_group_;
  AlignedFloats words_;  // pairs are copied in and out as bits
};

// Rows of `matrix` as float32 [count rounded up to a group][stride], the rest 0; rows whose weight is 0 are 0.
AlignedFloats widened_rows(const Matrix& matrix, std::int64_t begin, std::int64_t count, const float* row_weight,
                           std::int64_t stride);

// One block of rows of the head; each thread has its own.
class HeadBlock {
 public:
  HeadBlock(const Matrix& weight, bool pairs);

  void move_to(std::int64_t begin, std::int64_t rows);
  // c[row][lane] of one or two groups; group1 may be null.
  void multiply(const float* group0, const float* group1, float* c0, float* c1) const;

 private:
  const Matrix& weight_;
  bool pairs_;
  std::int64_t rows_ = 0, row_stride_;
  const float* at_ = nullptr;
  AlignedFloats widened_;
};

// Some columns of the head, a few rows at a time, for products with the gradient of the logits; each thread has its
// own. Rows are read along their length, as memory likes it, and laid out in tiles of 32 columns.
class HeadColumns {
 public:
  static constexpr std::int64_t kRows = 64;  // the sums are read and written once for so many

  HeadColumns(const Matrix& weight, bool pairs, std::int64_t first, std::int64_t columns);

  void move_to(std::int64_t begin, std::int64_t rows);
  // c[token][column] += sum over rows of gradient[row][token] head[row][column] for the 16 tokens of a group. gradient:
  // [rows][16] float32, or [rows / 2][16] pairs of bfloat16; c: at the first column, ldc elements from token to token.
  void add_product(const float* gradient, float* c, std::int64_t ldc);

 private:
  static constexpr std::int64_t kTile = 2 * kGroup;
  // Words from tile to tile: one line more than a tile has, or all would begin in the same set of the cache.
  static constexpr std::int64_t kStride = kRows * kTile + kGroup;

  void prefetch_rows(std::int64_t count);
  void multiply(const float* tile, const float* gradient, float* c, std::int64_t ldc) const;

  const Matrix& weight_;
  bool pairs_;
  std::int64_t first_, columns_, rows_ = 0, next_ = 0, last_ = 0;
  AlignedFloats tiles_, row_;
};

}  // namespace cit
