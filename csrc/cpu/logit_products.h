// Hidden states packed for the product with a language model's head, and the head a block of rows at a time.
#pragma once

#include <cstdint>
#include <vector>

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
  std::vector<float> words_;  // pairs are copied in and out as bits
};

// Rows of `matrix` as float32 [count][stride], stride a multiple of 16 and the rest of each row 0; rows whose weight is
// 0 are 0.
std::vector<float> widened_rows(const Matrix& matrix, std::int64_t begin, std::int64_t count, const float* row_weight,
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
  std::vector<float> widened_;
};

// c_i[column][lane] += sum over the pairs, or single rows, of gradient_i with the columns [first, first + columns) of
// the head's rows from `begin` on. gradient_i: [rows][16] float32, or [rows / 2][16] pairs.
class HeadColumns {
 public:
  static constexpr std::int64_t kRows = 2 * kChunkRows;

  HeadColumns(const Matrix& weight, bool pairs, std::int64_t first, std::int64_t columns);

  void move_to(std::int64_t begin, std::int64_t rows);
  void add_product(const float* gradient0, const float* gradient1, float* c0, float* c1) const;

 private:
  void interleave(std::int64_t begin);

  const Matrix& weight_;
  bool pairs_;
  std::int64_t first_, columns_, rows_ = 0;
  const float* at_ = nullptr;
  std::int64_t k_stride_ = 0;
  std::vector<float> block_;
};

}  // namespace cit
