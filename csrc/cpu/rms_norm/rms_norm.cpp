#include "cpu/rms_norm/rms_norm.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/rms_norm/rms_norm_kernels.h"

namespace cit {
namespace {

constexpr std::int64_t kPiece = 16384;  // elements that are worth a thread's while

const RmsNormKernels& kernels() {
#ifdef CIT_FAST_X86
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      return simd_avx512::kRmsNorm;
    case SimdLevel::kAvx2:
      return simd_avx2::kRmsNorm;
    default:
      break;
  }
#endif
  return simd_baseline::kRmsNorm;
}

// Calls body(first, count) for pieces of the rows.
template <class Body>
void for_each_piece(const RmsNorm& norm, int threads, const Body& body) {
  const std::int64_t piece = std::max<std::int64_t>(1, kPiece / std::max<std::int64_t>(norm.width, 1));
  parallel_for_blocks((norm.rows + piece - 1) / piece, threads, false,
                      [&](std::int64_t k) { body(k * piece, std::min(piece, norm.rows - k * piece)); });
}

}  // namespace

void rms_norm(const RmsNorm& norm, const Array& x, const Array& weight, const Array& y, int threads) {
  const RmsNormKernels& run = kernels();
  for_each_piece(norm, threads, [&](std::int64_t first, std::int64_t count) {
    run.forward(norm, x, weight, y, first, count);
  });
}

void rms_norm_backward(const RmsNorm& norm, const Array& x, const Array& weight, const Array& grad, const Array& grad_x,
                       int threads) {
  const RmsNormKernels& run = kernels();
  for_each_piece(norm, threads, [&](std::int64_t first, std::int64_t count) {
    run.backward(norm, x, weight, grad, grad_x, first, count);
  });
}

}  // namespace cit
