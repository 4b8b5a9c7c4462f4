// Hidden states packed for the product with a language model's head, and the head a block of rows at a time.
#pragma once

#include <cstdint>

#include "cpu/aligned.h"
#include "cpu/information_gain/information_gain.h"
#include "cpu/information_gain/information_gain_kernels.h"

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
  // c[row][lane] of one or two groups; group1 may be null. Meanwhile the rows `ahead` of these come from memory; 0:
  // none.
  void multiply(const float* group0, const float* group1, float* c0, float* c1, std::int64_t ahead) const;

 private:
  const Matrix& weight_;
  bool pairs_;
  std::int64_t rows_ = 0, row_stride_;
  const float* at_ = nullptr;
  AlignedFloats widened_;
};

// Products of a few rows of the head with the gradient of the logits, a strip of columns after the other; each thread
// has its own.
class HeadStrips {
 public:
  static constexpr std::int64_t kColumns = 2 * kGroup;

  HeadStrips(const Matrix& weight, bool pairs) : weight_(weight), pairs_(pairs) {}

  // Elements from token to token of the sums.
  static std::int64_t stride(const Matrix& weight) { return divide_up(weight.width, kColumns) * kColumns; }

  // sums[token][column] += sum over the rows of gradient[row][token] head[row][column], for `groups` of 16 tokens.
  // gradient: of a group [kChunkRows][16] float32, or pairs of bfloat16 in half of that. Meanwhile the rows after these
  // up to `last` come from memory, if they are not there yet.
  void add_products(std::int64_t begin, std::int64_t rows, std::int64_t last, const float* gradient,
                    std::int64_t groups, float* sums);

 private:
  void pack(std::int64_t begin, std::int64_t rows, std::int64_t column, std::int64_t columns);
  void multiply(std::int64_t rows, const float* gradient, float* sums, std::int64_t stride) const;

  const Matrix& weight_;
  bool pairs_;
  alignas(64) float tile_[kChunkRows * kColumns] = {};
};

}  // namespace cit
