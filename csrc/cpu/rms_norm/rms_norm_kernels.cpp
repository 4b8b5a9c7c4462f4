// Inner loops of rms_norm.h, compiled once per instruction set. They wait for memory; a row is read twice and is still in
// the first-level cache the second time.

#include "cpu/rms_norm/rms_norm_kernels.h"

#include "cpu/simd/stream.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {
namespace {

// The factor of elements: the weight, or one more than it.
template <bool kFloat, class Lanes>
CIT_INLINE F32x16 factor(const RmsNorm& norm, const Stream<kFloat>& weight, int64_t column, Lanes lanes) {
  const F32x16 w = weight.load_at(column, lanes);
  return norm.from_one ? splat(1.0f) + w : w;
}

template <bool kFloat>
void forward_rows(const RmsNorm& norm, const Array& x_array, const Array& weight_array, const Array& y_array,
                  int64_t first, int64_t count) {
  const Stream<kFloat> x(x_array), weight(weight_array), y(y_array);
  for (int64_t row = first; row < first + count; ++row) {
    const int64_t begin = row * norm.width;
    F32x16 squares = splat(0.0f);
    for_each_vector(begin, norm.width, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const F32x16 value = x.load_at(i, lanes);
      squares = squares + value * value;
    });
    const double mean = sum(squares) / static_cast<double>(norm.width);
    const F32x16 inverse = splat(static_cast<float>(1.0 / __builtin_sqrt(mean + norm.eps)));
    for_each_vector(begin, norm.width, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      y.store_at(i, x.load_at(i, lanes) * inverse * factor(norm, weight, i - begin, lanes), lanes);
    });
  }
}

template <bool kFloat>
void backward_rows(const RmsNorm& norm, const Array& x_array, const Array& weight_array, const Array& grad_array,
                   const Array& grad_x_array, int64_t first, int64_t count) {
  const Stream<kFloat> x(x_array), weight(weight_array), grad(grad_array), grad_x(grad_x_array);
  for (int64_t row = first; row < first + count; ++row) {
    const int64_t begin = row * norm.width;
    F32x16 squares = splat(0.0f), products = splat(0.0f);
    for_each_vector(begin, norm.width, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const F32x16 value = x.load_at(i, lanes);
      squares = squares + value * value;
      products = products + grad.load_at(i, lanes) * factor(norm, weight, i - begin, lanes) * value;
    });
    const double width = static_cast<double>(norm.width);
    const double inverse = 1.0 / __builtin_sqrt(sum(squares) / width + norm.eps);
    const F32x16 size = splat(static_cast<float>(inverse));
    const F32x16 along = splat(static_cast<float>(inverse * inverse * inverse * (sum(products) / width)));
    for_each_vector(begin, norm.width, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const F32x16 scaled = grad.load_at(i, lanes) * factor(norm, weight, i - begin, lanes);
      grad_x.store_at(i, scaled * size - x.load_at(i, lanes) * along, lanes);
    });
  }
}

void forward(const RmsNorm& norm, const Array& x, const Array& weight, const Array& y, int64_t first, int64_t count) {
  x.dtype == DType::kFloat32 ? forward_rows<true>(norm, x, weight, y, first, count)
                             : forward_rows<false>(norm, x, weight, y, first, count);
}

void backward(const RmsNorm& norm, const Array& x, const Array& weight, const Array& grad, const Array& grad_x,
              int64_t first, int64_t count) {
  x.dtype == DType::kFloat32 ? backward_rows<true>(norm, x, weight, grad, grad_x, first, count)
                             : backward_rows<false>(norm, x, weight, grad, grad_x, first, count);
}

}  // namespace

extern const RmsNormKernels kRmsNorm;
const RmsNormKernels kRmsNorm = {forward, backward};

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
