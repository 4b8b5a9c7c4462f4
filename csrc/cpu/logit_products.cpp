#include "logit_products.h"

#include <algorithm>
#include <cstring>
#include <vector>

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
    : weight_(weight),
      pairs_(pairs),
      first_(first),
      columns_(columns),
      tiles_(divide_up(columns, kTile) * kStride),
      row_(divide_up(columns, kTile) * kTile) {}

void HeadColumns::move_to(std::int64_t begin, std::int64_t rows) {
  rows_ = rows;
  next_ = begin + rows;
  last_ = std::min(next_ + kRows, weight_.count);
#ifdef CIT_FAST_X86
  if (pairs_) {
    const auto bits = [&](std::int64_t row) {
      return row < rows ? reinterpret_cast<const std::uint16_t*>(row_of(weight_, begin + row, first_)) : nullptr;
    };
    for (std::int64_t row = 0; row < rows; row += 2) {
      auto* const target = reinterpret_cast<std::uint32_t*>(tiles_.data() + row / 2 * kTile);
      simd_avx512_bf16::pack_pairs(bits(row), bits(row + 1), columns_, target, kStride);
    }
    return;
  }
#endif
  for (std::int64_t row = 0; row < rows; ++row) {
    widen_row(weight_, begin + row, first_, columns_, row_.data());
    for (std::int64_t column = 0; column < columns_; column += kTile) {
      std::memcpy(tiles_.data() + column / kTile * kStride + row * kTile, row_.data() + column, sizeof(float) * kTile);
    }
  }
}

// The next rows come from memory while these are multiplied.
void HeadColumns::prefetch_rows(std::int64_t count) {
  const std::int64_t bytes = columns_ * size_of(weight_.data.dtype);
  for (const std::int64_t end = std::min(next_ + count, last_); next_ < end; ++next_) {
    const char* const row = row_of(weight_, next_, first_);
    for (std::int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

void HeadColumns::add_product(const float* gradient, float* c, std::int64_t ldc) {
  const std::int64_t rows_per_tile = divide_up(kRows, divide_up(columns_, kTile));
  for (std::int64_t column = 0; column < columns_; column += kTile) {
    const float* const tile = tiles_.data() + column / kTile * kStride;
    const std::int64_t some = std::min(kTile, columns_ - column);
    prefetch_rows(rows_per_tile);
    if (some == kTile) {
      multiply(tile, gradient, c + column, ldc);
      continue;
    }
    alignas(64) float sums[kGroup * kTile] = {};
    for (std::int64_t token = 0; token < kGroup; ++token) {
      std::copy_n(c + token * ldc + column, some, sums + token * kTile);
    }
    multiply(tile, gradient, sums, kTile);
    for (std::int64_t token = 0; token < kGroup; ++token) {
      std::copy_n(sums + token * kTile, some, c + token * ldc + column);
    }
  }
}

// Lanes of the product are columns here, its rows are tokens.
void HeadColumns::multiply(const float* tile, const float* gradient, float* c, std::int64_t ldc) const {
#ifdef CIT_FAST_X86
  if (pairs_) {
    const std::uint32_t* const pairs = words(tile);
    simd_avx512_bf16::pair_product({{pairs, pairs + kGroup},
                                    kTile,
                                    words(gradient),
                                    1,
                                    kGroup,
                                    divide_up(rows_, 2),
                                    kGroup,
                                    {c, c + kGroup},
                                    ldc,
                                    true});
    return;
  }
#endif
  information_gain_kernels().product(
      {{tile, tile + kGroup}, kTile, gradient, 1, kGroup, rows_, kGroup, {c, c + kGroup}, ldc, true});
}

}  // namespace cit
