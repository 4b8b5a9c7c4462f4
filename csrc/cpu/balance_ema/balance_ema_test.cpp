// Stand-alone test for the sanitizers: every kernel at every dtype, odd length and thread count, on buffers of
// exactly the right size. Whether the numbers are right in detail is tested from Python against the reference; here: no
// bad access, close to a plain double loop, and the same bits with any number of threads.
//
//   cmake -S . -B build/sanitize -DCIT_FAST_SANITIZE=ON && cmake --build build/sanitize && ctest --test-dir
//   build/sanitize

#include "cpu/balance_ema/balance_ema.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/testing.h"

namespace {

using cit::Array;
using cit::DType;
using cit::testing::Buffer;
using cit::testing::check;

std::vector<float> random_values(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<float> values(count);
  for (float& value : values) value = (static_cast<float>(generator() % 257) - 128.0f) / 8.0f;
  return values;
}

struct Dtypes {
  DType param, grad, state;
};

struct Sample {
  Sample(std::size_t count, const Dtypes& dtypes)
      : p(random_values(count, 1)),
        e(random_values(count, 2)),
        g(random_values(count, 3)),
        previous(random_values(count, 4)),
        param(p, dtypes.param),
        average(e, dtypes.state),
        grad(g, dtypes.grad),
        previous_grad(previous, dtypes.param),
        exp_avg(random_values(count, 5), dtypes.state),
        exp_avg_sq(std::vector<float>(count, 0.5f), dtypes.state),
        alphas(1, 0.25f),
        norms(3),
        remaining(1, 40.0f),
        fallbacks(std::make_unique<bool[]>(1)) {}

  cit::EmaTensor ema() {
    return {static_cast<std::int64_t>(p.size()), param.array(), average.array(), grad.array(), previous_grad.array()};
  }
  cit::AdamWTensor adamw() { return {ema(), exp_avg.array(), exp_avg_sq.array()}; }
  cit::Results results() { return {alphas.data(), fallbacks.get(), norms.data(), remaining.data()}; }
  bool same_bits(const Sample& other) const {
    return param.same_bits(other.param) && average.same_bits(other.average) &&
           previous_grad.same_bits(other.previous_grad) && exp_avg.same_bits(other.exp_avg) &&
           exp_avg_sq.same_bits(other.exp_avg_sq) && alphas == other.alphas && norms == other.norms &&
           remaining == other.remaining;
  }

  std::vector<float> p, e, g, previous;
  Buffer param, average, grad, previous_grad, exp_avg, exp_avg_sq;
  std::vector<float> alphas;
  std::vector<double> norms;
  std::vector<float> remaining;
  std::unique_ptr<bool[]> fallbacks;
};

const cit::RuleOptions kPaper{cit::Rule::kPaper, 0.99, 0.01, 2.0};

cit::SweepOptions threads(int count, bool store_grads = true, bool nearest = false) {
  return {store_grads, nearest, 7u, count};
}

void test_balance_ema(std::size_t count, const Dtypes& dtypes, const std::string& name) {
  Sample one(count, dtypes), three(count, dtypes);
  std::vector<double> norms(3, -1.0);
  cit::balance_norms({one.ema()}, threads(2, false), norms.data());
  cit::balance_ema({one.ema()}, kPaper, threads(1), one.results());
  cit::balance_ema({three.ema()}, kPaper, threads(3), three.results());
  check(one.same_bits(three), name + ": bits depend on the number of threads");
  check(norms == one.norms, name + ": balance_norms differs from the norms of balance_ema");

  double a = 0.0, b = 0.0, c = 0.0;
  for (std::size_t i = 0; i < count; ++i) {
    a += std::fabs(one.p[i] - one.e[i]);
    b += std::fabs(one.g[i]);
    c += std::fabs(one.g[i] - one.previous[i]);
  }
  const double fraction = 40.0 * (1.0 + b) / (a * c);
  const double expected = fraction > 0.0 && fraction < 1.0 ? fraction : 0.01;
  check(std::fabs(one.alphas[0] - expected) < 1e-6, name + ": wrong weight");
  check(std::fabs(one.remaining[0] - (1.0 - expected) * a) <= 1e-6 * (1.0 + a), name + ": wrong distance left");
  if (dtypes.state != DType::kFloat32) return;  // rounded at random: tested from Python
  for (std::size_t i = 0; i < count; ++i) {
    const double moved = one.e[i] + expected * (one.p[i] - one.e[i]);
    check(std::fabs(one.average.floats()[i] - moved) < 1e-4, name + ": wrong average");
  }
}

void test_adamw(std::size_t count, const Dtypes& dtypes, const std::string& name) {
  Sample one(count, dtypes), three(count, dtypes);
  const cit::AdamWOptions options{3, 1e-3, 0.9, 0.999, 0.0, 0.01};
  for (const bool store_grads : {true, false}) {
    const bool nearest = store_grads;
    cit::adamw_balance_ema({one.adamw()}, options, kPaper, threads(1, store_grads, nearest), one.results());
    cit::adamw_balance_ema({three.adamw()}, options, kPaper, threads(3, store_grads, nearest), three.results());
  }
  for (const float alpha : one.alphas) check(alpha > 0.0f && alpha <= 1.0f, name + ": AdamW weight out of range");
  cit::flush_balance_ema({one.ema()}, threads(1), one.alphas.data());
  cit::flush_balance_ema({three.ema()}, threads(3), three.alphas.data());
  check(one.same_bits(three), name + ": AdamW bits depend on the number of threads");
}

void test_without_previous_gradients() {
  const cit::RuleOptions fixed{cit::Rule::kFixed, 0.75, 0.01, 2.0};
  Sample sample(1030, {DType::kFloat32, DType::kBFloat16, DType::kFloat32});
  cit::AdamWTensor tensor = sample.adamw();
  tensor.ema.previous_grad = {};
  cit::balance_ema({tensor.ema}, fixed, threads(1), sample.results());
  cit::adamw_balance_ema({tensor}, {1, 1e-3, 0.9, 0.999, 1e-8, 0.01}, fixed, threads(1), sample.results());
  check(sample.alphas[0] == 0.25f && sample.norms[2] == 0.0, "fixed without previous gradients");
}

void test_not_finite() {
  const Dtypes floats{DType::kFloat32, DType::kFloat32, DType::kFloat32};
  Sample sample(100, floats);
  const Sample before(100, floats);
  sample.grad.floats()[99] = std::numeric_limits<float>::quiet_NaN();
  cit::balance_ema({sample.ema()}, kPaper, threads(1, false), sample.results());
  check(sample.alphas[0] == 0.0f && !sample.fallbacks[0] && sample.average.same_bits(before.average),
        "a NaN gradient reached the average");
  cit::adamw_balance_ema({sample.adamw()}, {1, 1e-3, 0.9, 0.999, 1e-8, 0.01}, kPaper, threads(1), sample.results());
  check(sample.param.floats()[99] == before.p[99] && sample.exp_avg_sq.floats()[99] == 0.5f,
        "a NaN gradient reached a parameter or a moment");
}

}  // namespace

int main(int argc, char** argv) {
  return cit::testing::run(argc, argv, [] {
    const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    for (const std::size_t count : {0, 1, 15, 16, 17, 1023, 1025, 16384, 16385, 49155, 393219}) {
      for (const DType param : dtypes) {
        for (const DType grad : dtypes) {
          if (count > 100000 && param != grad) continue;  // for the time it takes
          for (const DType state : {DType::kFloat32, DType::kBFloat16}) {
            const std::string name =
                std::to_string(count) + " elements, dtypes " + std::to_string(static_cast<int>(param)) + ", " +
                std::to_string(static_cast<int>(grad)) + ", " + std::to_string(static_cast<int>(state));
            test_balance_ema(count, {param, grad, state}, name);
            test_adamw(count, {param, grad, state}, name);
          }
        }
      }
    }
    test_without_previous_gradients();
    test_not_finite();
  });
}
