// Stand-alone test for the sanitizers: the kernels at every dtype, odd size and thread count, on buffers of exactly the
// right size. Whether the numbers are right in detail is tested from Python; here: no bad access, close to a plain
// double loop in float32, and the same bits with any number of threads.

#include "cpu/rms_norm/rms_norm.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cpu/testing.h"

namespace {

using cit::DType;
using cit::testing::Buffer;
using cit::testing::check;

std::vector<float> random_values(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<float> values(count);
  for (float& value : values) value = (static_cast<float>(generator() % 65) - 32.0f) / 8.0f;
  return values;
}

bool close(double found, double right) {
  return std::abs(found - right) <= 1e-5 * (1.0 + std::abs(right));
}

struct Norm {
  std::vector<float> x, weight, grad;
  cit::RmsNorm options;

  // y and grad_x of an element.
  std::pair<double, double> right(std::size_t row, std::size_t column) const {
    const std::size_t width = static_cast<std::size_t>(options.width), begin = row * width;
    const double offset = options.from_one ? 1.0 : 0.0;
    double squares = 0.0, products = 0.0;
    for (std::size_t i = 0; i < width; ++i) {
      squares += static_cast<double>(x[begin + i]) * x[begin + i];
      products += static_cast<double>(grad[begin + i]) * (weight[i] + offset) * x[begin + i];
    }
    const double r = 1.0 / std::sqrt(squares / static_cast<double>(width) + options.eps);
    const double value = x[begin + column], w = weight[column] + offset, g = grad[begin + column] * w;
    return {value * r * w, r * (g - value * r * r * products / static_cast<double>(width))};
  }
};

void test_rms_norm(std::int64_t rows, std::int64_t width, DType dtype, bool from_one) {
  const auto count = static_cast<std::size_t>(rows * width);
  const Norm norm{random_values(count, 1), random_values(static_cast<std::size_t>(width), 2), random_values(count, 3),
                  {rows, width, 1e-6f, from_one}};
  std::vector<Buffer> ys, grads;
  for (int threads : {1, 3}) {
    Buffer x(norm.x, dtype), weight(norm.weight, dtype), grad(norm.grad, dtype);
    ys.emplace_back(std::vector<float>(count), dtype);
    grads.emplace_back(std::vector<float>(count), dtype);
    cit::rms_norm(norm.options, x.array(), weight.array(), ys.back().array(), threads);
    cit::rms_norm_backward(norm.options, x.array(), weight.array(), grad.array(), grads.back().array(), threads);
  }
  const std::string what = "rms_norm " + std::to_string(rows) + " x " + std::to_string(width);
  check(ys[0].same_bits(ys[1]) && grads[0].same_bits(grads[1]), what + ": other bits with other threads");
  if (dtype != DType::kFloat32) return;
  for (std::size_t i = 0; i < count; ++i) {
    const auto [y, grad_x] = norm.right(i / static_cast<std::size_t>(width), i % static_cast<std::size_t>(width));
    check(close(ys[0].floats()[i], y) && close(grads[0].floats()[i], grad_x), what);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return cit::testing::run(argc, argv, [] {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (std::int64_t rows : {0, 1, 2, 61}) {
        for (std::int64_t width : {1, 15, 16, 33, 600}) {
          for (bool from_one : {false, true}) test_rms_norm(rows, width, dtype, from_one);
        }
      }
    }
  });
}
