#include "logit_products.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"

namespace cit {
namespace {

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
      words_(static_cast<std::size_t>(groups_ * words_per_group_)) {
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

std::vector<float> widened_rows(const Matrix& matrix, std::int64_t begin, std::int64_t count, const float* row_weight,
                                std::int64_t stride) {
  std::vector<float> out(static_cast<std::size_t>(count * stride));
  for (std::int64_t row = 0; row < count; ++row) {
    if (row_weight != nullptr && row_weight[begin + row] == 0.0f) continue;
    widen_row(matrix, begin + row, 0, matrix.width, out.data() + row * stride);
  }
  return out;
}

HeadBlock::HeadBlock(const Matrix& weight, bool pairs) : weight_(weight), pairs_(pairs) {
  const bool direct = pairs || weight.data.dtype == DType::kFloat32;
  row_stride_ = direct ? weight.row_stride : weight.width;
  if (!direct) widened_.resize(static_cast<std::size_t>(kChunkRows * weight.width));
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

void HeadBlock::multiply(const float* group0, const float* group1, float* c0, float* c1) const {
#ifdef CIT_FAST_X86
  if (pairs_) {
    const std::uint32_t* const second = group1 == nullptr ? nullptr : words(group1);
    simd_avx512_bf16::pair_product({{words(group0), second},
                                    kGroup,
                                    words(at_),
                                    row_stride_ / 2,
                                    1,
                                    weight_.width / 2,
                                    rows_,
                                    {c0, c1},
                                    kGroup,
                                    false});
    return;
  }
#endif
  information_gain_kernels().product(
      {{group0, group1}, kGroup, at_, row_stride_, 1, weight_.width, rows_, {c0, c1}, kGroup, false});
}

HeadColumns::HeadColumns(const Matrix& weight, bool pairs, std::int64_t first, std::int64_t columns)
    : weight_(weight), pairs_(pairs), first_(first), columns_(columns) {
  const bool direct = !pairs && weight.data.dtype == DType::kFloat32;
  k_stride_ = direct ? weight.row_stride : columns;
  if (!direct) block_.resize(static_cast<std::size_t>(kRows / (pairs ? 2 : 1) * columns));
}

void HeadColumns::move_to(std::int64_t begin, std::int64_t rows) {
  rows_ = rows;
  at_ = reinterpret_cast<const float*>(row_of(weight_, begin, first_));
  if (block_.empty()) return;
  at_ = block_.data();
  if (pairs_) return interleave(begin);
  for (std::int64_t row = 0; row < rows; ++row) {
    widen_row(weight_, begin + row, first_, columns_, block_.data() + row * columns_);
  }
}

// Two neighbouring rows become pairs; a last odd row is paired with 0.
void HeadColumns::interleave(std::int64_t begin) {
  const std::vector<char> nothing(rows_ % 2 == 0 ? 0 : static_cast<std::size_t>(2 * columns_));
  for (std::int64_t row = 0; row < rows_; row += 2) {
    const bool both = row + 1 < rows_;
    information_gain_kernels().interleave(row_of(weight_, begin + row, first_),
                                          both ? row_of(weight_, begin + row + 1, first_) : nothing.data(), columns_,
                                          block_.data() + row / 2 * columns_);
  }
}

void HeadColumns::add_product(const float* gradient0, const float* gradient1, float* c0, float* c1) const {
#ifdef CIT_FAST_X86
  if (pairs_) {
    const std::uint32_t* const second = gradient1 == nullptr ? nullptr : words(gradient1);
    simd_avx512_bf16::pair_product({{words(gradient0), second},
                                    kGroup,
                                    words(at_),
                                    1,
                                    k_stride_,
                                    divide_up(rows_, 2),
                                    columns_,
                                    {c0, c1},
                                    kGroup,
                                    true});
    return;
  }
#endif
  information_gain_kernels().product(
      {{gradient0, gradient1}, kGroup, at_, 1, k_stride_, rows_, columns_, {c0, c1}, kGroup, true});
}

}  // namespace cit
