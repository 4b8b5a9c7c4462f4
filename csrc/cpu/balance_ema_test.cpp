// Stand-alone test for the sanitizers: every kernel at every dtype, odd length and thread count, on buffers of exactly
// the right size. Whether the numbers are right in detail is tested from Python against the reference; here: no bad
// access, close to a plain double loop, and the same bits with any number of threads.
//
//   cmake -S . -B build/sanitize -DCIT_FAST_SANITIZE=ON && cmake --build build/sanitize && ctest --test-dir
//   build/sanitize

#include "cpu/balance_ema.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace {

using cit::Array;
using cit::DType;

int g_failures = 0;

void check(bool right, const std::string& what) {
  if (right) return;
  ++g_failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// 16-bit values here are small integers over 8, exact in both half formats.
std::uint16_t to_half(float value, DType dtype) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::kBFloat16) return static_cast<std::uint16_t>(bits >> 16);
  if (value == 0.0f) return 0;
  return static_cast<std::uint16_t>(((bits >> 16) & 0x8000u) | (((bits & 0x7fffffffu) - 0x38000000u) >> 13));
}

class Buffer {
 public:
  Buffer(const std::vector<float>& values, DType dtype)
      : dtype_(dtype), bytes_(values.size() * (dtype == DType::kFloat32 ? 4 : 2)) {
    data_ = std::make_unique<unsigned char[]>(bytes_);
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (dtype == DType::kFloat32) {
        std::memcpy(data_.get() + 4 * i, &values[i], 4);
      } else {
        const std::uint16_t half = to_half(values[i], dtype);
        std::memcpy(data_.get() + 2 * i, &half, 2);
      }
    }
  }
  Array array() { return {data_.get(), dtype_}; }
  float* floats() { return reinterpret_cast<float*>(data_.get()); }
  bool same_bits(const Buffer& other) const {
    return bytes_ == other.bytes_ && std::memcmp(data_.get(), other.data_.get(), bytes_) == 0;
  }

 private:
  DType dtype_;
  std::size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
};

std::vector<float> random_values(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<float> values(count);
  for (float& value : values) value = (static_cast<float>(generator() % 257) - 128.0f) / 8.0f;
  return values;
}

struct Sample {
  Sample(std::size_t count, DType param_dtype, DType grad_dtype)
      : p(random_values(count, 1)),
        e(random_values(count, 2)),
        g(random_values(count, 3)),
        previous(random_values(count, 4)),
        param(p, param_dtype),
        average(e, DType::kFloat32),
        grad(g, grad_dtype),
        previous_grad(previous, param_dtype),
        exp_avg(random_values(count, 5), DType::kFloat32),
        exp_avg_sq(std::vector<float>(count, 0.5f), DType::kFloat32) {}

  cit::EmaTensor ema() {
    return {static_cast<std::int64_t>(p.size()), param.array(), average.floats(), grad.array(), previous_grad.array()};
  }
  cit::AdamWTensor adamw() { return {ema(), exp_avg.floats(), exp_avg_sq.floats()}; }
  bool same_bits(const Sample& other) const {
    return param.same_bits(other.param) && average.same_bits(other.average) &&
           previous_grad.same_bits(other.previous_grad) && exp_avg.same_bits(other.exp_avg) &&
           exp_avg_sq.same_bits(other.exp_avg_sq);
  }

  std::vector<float> p, e, g, previous;
  Buffer param, average, grad, previous_grad, exp_avg, exp_avg_sq;
};

const cit::RuleOptions kPaper{cit::Rule::kPaper, 0.99, 0.01};

void test_balance_ema(std::size_t count, DType param_dtype, DType grad_dtype, const std::string& name) {
  Sample one(count, param_dtype, grad_dtype), three(count, param_dtype, grad_dtype);
  float alpha[2] = {-1.0f, -1.0f};
  bool fell_back[2] = {};
  cit::balance_ema({one.ema()}, kPaper, 1, &alpha[0], &fell_back[0]);
  cit::balance_ema({three.ema()}, kPaper, 3, &alpha[1], &fell_back[1]);
  check(one.same_bits(three) && alpha[0] == alpha[1], name + ": bits depend on the number of threads");

  double a = 0.0, b = 0.0, c = 0.0;
  for (std::size_t i = 0; i < count; ++i) {
    a += std::fabs(one.p[i] - one.e[i]);
    b += std::fabs(one.g[i]);
    c += std::fabs(one.g[i] - one.previous[i]);
  }
  const double beta = (1.0 + b) / (a * c);
  const double expected = beta > 0.0 && beta < 1.0 ? 1.0 - beta : 0.01;
  check(std::fabs(alpha[0] - expected) < 1e-6, name + ": wrong weight");
  for (std::size_t i = 0; i < count; ++i) {
    const double moved = one.e[i] + expected * (one.p[i] - one.e[i]);
    check(std::fabs(one.average.floats()[i] - moved) < 1e-4, name + ": wrong average");
  }
}

void test_adamw(std::size_t count, DType param_dtype, DType grad_dtype, const std::string& name) {
  Sample one(count, param_dtype, grad_dtype), three(count, param_dtype, grad_dtype);
  const cit::AdamWOptions options{3, 1e-3, 0.9, 0.999, 0.0, 0.01};
  float alpha[2] = {0.25f, 0.25f};
  bool fell_back[2] = {};
  for (int step = 0; step < 2; ++step) {
    cit::adamw_balance_ema({one.adamw()}, options, kPaper, 1, &alpha[0], &fell_back[0]);
    cit::adamw_balance_ema({three.adamw()}, options, kPaper, 3, &alpha[1], &fell_back[1]);
  }
  check(alpha[0] > 0.0f && alpha[0] <= 1.0f, name + ": AdamW weight out of range");
  cit::flush_balance_ema({one.ema()}, 1, &alpha[0]);
  cit::flush_balance_ema({three.ema()}, 3, &alpha[1]);
  check(one.same_bits(three) && alpha[0] == alpha[1], name + ": AdamW bits depend on the number of threads");
}

void test_not_finite() {
  Sample sample(100, DType::kFloat32, DType::kFloat32);
  const Buffer before(sample.e, DType::kFloat32);
  sample.grad.floats()[99] = std::numeric_limits<float>::quiet_NaN();
  float alpha = -1.0f;
  bool fell_back = true;
  cit::balance_ema({sample.ema()}, kPaper, 1, &alpha, &fell_back);
  check(alpha == 0.0f && !fell_back && sample.average.same_bits(before), "a NaN gradient reached the average");
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kSkipped = 77;
  try {
    cit::set_simd_level(argc > 1 ? argv[1] : "");
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "skipped: %s\n", error.what());
    return kSkipped;
  }
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (const std::size_t count : {0, 1, 15, 16, 17, 1023, 1025, 16384, 16385, 140001}) {
    for (const DType param : dtypes) {
      for (const DType grad : dtypes) {
        const std::string name = std::to_string(count) + " elements, dtypes " +
                                 std::to_string(static_cast<int>(param)) + " and " +
                                 std::to_string(static_cast<int>(grad));
        test_balance_ema(count, param, grad, name);
        test_adamw(count, param, grad, name);
      }
    }
  }
  test_not_finite();
  std::printf("%s: %d failures\n", cit::simd_name().c_str(), g_failures);
  return g_failures == 0 ? 0 : 1;
}
