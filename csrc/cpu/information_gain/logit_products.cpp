#include "cpu/information_gain/logit_products.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace cit {
namespace {

// Words of a panel at a time: those of two groups stay in the first-level cache while the rows of a block go by.
constexpr std::int64_t kDepth = 256;

constexpr std::int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

const char* row_of(const Matrix& matrix, std::int64_t row, std::int64_t column = 0) {
  return static_cast<const char*>(matrix.data.data) + (row * matrix.row_stride + column) * size_of(matrix.data.dtype);
}

void widen_row(const Matrix& matrix, std::int64_t row, std::int64_t column, std::int64_t count, float* target) {
  information_gain_kernels().widen(matrix.data, row * matrix.row_stride + column, count, target);
}

#ifdef CIT_FAST_X86
const std::uint32_t* words(const float* pairs) {
  return reinterpret_cast<const std::uint32_t*>(pairs);  // only ever read as bits, by vector loads and memcpy
}
#endif

}  // namespace

const InformationGainKernels& information_gain_kernels() {
#ifdef CIT_FAST_X86
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      return simd_avx512::kInformationGain;
    case SimdLevel::kAvx2:
      return simd_avx2::kInformationGain;
    default:
      break;
  }
#endif
  return simd_baseline::kInformationGain;
}

bool multiply_pairs(const Matrix& hidden, const Matrix& weight) {
  return hidden.data.dtype == DType::kBFloat16 && weight.data.dtype == DType::kBFloat16 && hidden.width % 2 == 0 &&
         weight.row_stride % 2 == 0 && has_bfloat16_products();
}

Panels::Panels(const Matrix& hidden, std::int64_t begin, std::int64_t count, const float* row_weight, bool pairs,
               int threads)
    : groups_(divide_up(count, kGroup)),
      words_per_group_(kGroup * hidden.width / (pairs ? 2 : 1)),
      words_(groups_ * words_per_group_) {
  parallel_for(groups_, threads, [&](std::int64_t g) {
    float* const group = words_.data() + g * words_per_group_;
    std::vector<float> widened(static_cast<std::size_t>(pairs ? 0 : hidden.width));
    for (std::int64_t lane = 0; lane < std::min(kGroup, count - g * kGroup); ++lane) {
      const std::int64_t row = begin + g * kGroup + lane;
      if (row_weight != nullptr && row_weight[row] == 0.0f) continue;
      const char* source = row_of(hidden, row);
      if (!pairs) {
        widen_row(hidden, row, 0, hidden.width, widened.data());
        source = reinterpret_cast<const char*>(widened.data());
      }
      for (std::int64_t k = 0; k < words_per_group_ / kGroup; ++k) {
        std::memcpy(group + k * kGroup + lane, source + 4 * k, 4);
      }
    }
  });
}

AlignedFloats widened_rows(const Matrix& matrix, std::int64_t begin, std::int64_t count, const float* row_weight,
                           std::int64_t stride) {
  AlignedFloats out(divide_up(count, kGroup) * kGroup * stride);
  for (std::int64_t row = 0; row < count; ++row) {
    if (row_weight != nullptr && row_weight[begin + row] == 0.0f) continue;
    widen_row(matrix, begin + row, 0, matrix.width, out.data() + row * stride);
  }
  return out;
}

HeadBlock::HeadBlock(const Matrix& weight, bool pairs) : weight_(weight), pairs_(pairs) {
  const bool direct = pairs || weight.data.dtype == DType::kFloat32;
  row_stride_ = direct ? weight.row_stride : weight.width;
  if (!direct) widened_ = AlignedFloats(kChunkRows * weight.width);
}

void HeadBlock::move_to(std::int64_t begin, std::int64_t rows) {
  rows_ = rows;
  at_ = reinterpret_cast<const float*>(row_of(weight_, begin));
  if (widened_.empty()) return;
  for (std::int64_t row = 0; row < rows; ++row) {
    widen_row(weight_, begin + row, 0, weight_.width, widened_.data() + row * weight_.width);
  }
  at_ = widened_.data();
}

void HeadBlock::multiply(const float* group0, const float* group1, float* c0, float* c1, std::int64_t ahead) const {
  const std::int64_t depth = weight_.width / (pairs_ ? 2 : 1);
  if (!widened_.empty()) ahead = 0;
  for (std::int64_t k = 0; k < depth; k += kDepth) {
    const std::int64_t some = std::min(kDepth, depth - k);
    const float* const a[2] = {group0 + k * kGroup, group1 == nullptr ? nullptr : group1 + k * kGroup};
#ifdef CIT_FAST_X86
    if (pairs_) {
      simd_avx512_bf16::pair_product({{words(a[0]), a[1] == nullptr ? nullptr : words(a[1])},
                                      kGroup,
                                      words(at_) + k,
                                      row_stride_ / 2,
                                      1,
                                      some,
                                      rows_,
                                      {c0, c1},
                                      kGroup,
                                      k > 0,
                                      ahead * row_stride_ / 2});
      continue;
    }
#endif
    information_gain_kernels().product(
        {{a[0], a[1]}, kGroup, at_ + k, row_stride_, 1, some, rows_, {c0, c1}, kGroup, k > 0, ahead * row_stride_});
  }
}

void HeadStrips::pack(std::int64_t begin, std::int64_t rows, std::int64_t column, std::int64_t columns) {
#ifdef CIT_FAST_X86
  if (pairs_) {
    simd_avx512_bf16::pack_pairs(reinterpret_cast<const std::uint16_t*>(row_of(weight_, begin, column)),
                                 weight_.row_stride, rows, columns, reinterpret_cast<std::uint32_t*>(tile_));
    return;
  }
#endif
  information_gain_kernels().widen_tile(weight_.data, begin * weight_.row_stride + column, weight_.row_stride, rows,
                                        columns, tile_);
}

void HeadStrips::add_products(std::int64_t begin, std::int64_t rows, std::int64_t last, const float* gradient,
                              std::int64_t groups, float* sums) {
  const std::int64_t width = weight_.width, stride = HeadStrips::stride(weight_);
  const std::int64_t fetched_per_strip = divide_up(rows * kColumns, stride);
  std::int64_t next = begin + rows;
  for (std::int64_t column = 0; column < width; column += kColumns) {
    pack(begin, rows, column, std::min(kColumns, width - column));
    for (const std::int64_t end = std::min(next + fetched_per_strip, last); next < end; ++next) {
      const char* const row = row_of(weight_, next);
      for (std::int64_t byte = 0; byte < width * size_of(weight_.data.dtype); byte += 64) {
        __builtin_prefetch(row + byte, 0, 2);
      }
    }
    for (std::int64_t group = 0; group < groups; ++group) {
      multiply(rows, gradient + group * kChunkRows * kGroup, sums + group * kGroup * stride + column, stride);
    }
  }
}

// Lanes of the product are columns here, its rows are tokens.
void HeadStrips::multiply(std::int64_t rows, const float* gradient, float* sums, std::int64_t stride) const {
#ifdef CIT_FAST_X86
  if (pairs_) {
    simd_avx512_bf16::pair_product({{words(tile_), words(tile_) + kGroup},
                                    kColumns,
                                    words(gradient),
                                    1,
                                    kGroup,
                                    divide_up(rows, 2),
                                    kGroup,
                                    {sums, sums + kGroup},
                                    stride,
                                    true,
                                    0});
    return;
  }
#endif
  information_gain_kernels().product(
      {{tile_, tile_ + kGroup}, kColumns, gradient, 1, kGroup, rows, kGroup, {sums, sums + kGroup}, stride, true, 0});
}

}  // namespace cit
