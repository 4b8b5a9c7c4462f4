// Stand-alone test for the sanitizers: odd sizes, strides, extreme epsilon and weights, on buffers of exactly the right
// size. Whether the distances are right is tested from Python against POT; here: no bad access, no NaN, bounds that
// enclose an analytic value, marginals as asked for, and the same bits with any number of threads.

#include "cpu/wasserstein/wasserstein.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/testing.h"
#include "cpu/wasserstein/products.h"

namespace {

using cit::testing::check;

// Points on a line, where the exact distance is the area between the two distribution functions.
struct Line {
  Line(std::int64_t n, std::int64_t m, std::int64_t gap, unsigned seed) : n(n), m(m), stride(m + gap) {
    std::mt19937 generator(seed);
    const auto random = [&] { return static_cast<double>(generator()) / 4294967296.0; };
    for (std::int64_t i = 0; i < n; ++i) x.push_back(random());
    for (std::int64_t j = 0; j < m; ++j) y.push_back(0.5 + random());
    a = weights(n, random);
    b = weights(m, random);
    cost.assign(static_cast<std::size_t>((n - 1) * stride + m), -1.0);
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < m; ++j) cost[i * stride + j] = std::fabs(x[i] - y[j]);
    }
  }

  template <class Random>
  static std::vector<double> weights(std::int64_t count, const Random& random) {
    std::vector<double> out;
    double total = 0.0;
    for (std::int64_t i = 0; i < count; ++i) total += out.emplace_back(0.1 + random());
    for (double& weight : out) weight /= total;
    return out;
  }

  cit::TransportPair pair() const { return {cost.data(), n, m, stride, a.data(), b.data(), nullptr, nullptr, nullptr}; }

  double exact() const {
    std::vector<std::pair<double, double>> steps;
    for (std::int64_t i = 0; i < n; ++i) steps.emplace_back(x[i], a[i]);
    for (std::int64_t j = 0; j < m; ++j) steps.emplace_back(y[j], -b[j]);
    std::sort(steps.begin(), steps.end());
    double area = 0.0, height = 0.0;
    for (std::size_t k = 0; k + 1 < steps.size(); ++k) {
      height += steps[k].second;
      area += std::fabs(height) * (steps[k + 1].first - steps[k].first);
    }
    return area;
  }

  std::int64_t n, m, stride;
  std::vector<double> x, y, a, b, cost;
};

void test_line(const Line& line, double epsilon, double tolerance, std::int64_t most) {
  const std::string name = std::to_string(line.n) + " x " + std::to_string(line.m) + ", epsilon " +
                           std::to_string(epsilon) + ", tolerance " + std::to_string(tolerance);
  const std::vector<cit::TransportPair> pairs(3, line.pair());
  cit::TransportResult one[3], three[3];
  cit::sinkhorn(pairs, {epsilon, tolerance, most, 0.0, 0.0, 1}, one);
  cit::sinkhorn(pairs, {epsilon, tolerance, most, 0.0, 0.0, 3}, three);
  check(std::memcmp(one, three, sizeof(one)) == 0, name + ": bits depend on the number of threads");
  const double exact = line.exact();
  for (const double value : {one->lower, one->upper, one->marginal_error, one->epsilon}) {
    check(std::isfinite(value), name + ": not finite");
  }
  check(one->lower <= exact + 1e-12 && one->upper >= exact - 1e-12, name + ": the bounds miss the exact distance");
  if (most >= 1000) check(one->marginal_error <= tolerance, name + ": marginals not as asked for");
}

void test_exact(const Line& line) {
  std::vector<double> plan(static_cast<std::size_t>(line.n * line.m)), f(line.n), g(line.m);
  std::vector<cit::TransportPair> pairs(3, line.pair());
  cit::TransportResult one[3], three[3];
  cit::exact_transport(pairs, {}, 3, three);
  pairs[0].plan = plan.data();
  pairs[0].f = f.data();
  pairs[0].g = g.data();
  cit::exact_transport(pairs, {}, 1, one);
  check(std::memcmp(one, three, sizeof(one)) == 0, "exact: bits depend on the number of threads");
  const std::string name = "exact, " + std::to_string(line.n) + " x " + std::to_string(line.m);
  // On a line nearly all plans are as good as one another, and the paths between large clouds are too many.
  check(one->iterations == 0.0 || line.n * line.m > 10000, name + ": given up");
  if (one->iterations < 0.0) return;
  const double exact = line.exact();
  check(std::fabs(one->upper - exact) < 1e-12 && one->lower == one->upper, name);
  double cost = 0.0, dual = 0.0;
  for (std::int64_t i = 0; i < line.n; ++i) {
    double row = 0.0;
    dual += line.a[i] * f[i];
    for (std::int64_t j = 0; j < line.m; ++j) {
      row += plan[i * line.m + j];
      cost += plan[i * line.m + j] * line.cost[i * line.stride + j];
      check(f[i] + g[j] <= line.cost[i * line.stride + j] + 1e-12, name + ": potentials are not feasible");
    }
    check(std::fabs(row - line.a[i]) < 1e-12, name + ": rows of the plan");
  }
  for (std::int64_t j = 0; j < line.m; ++j) dual += line.b[j] * g[j];
  check(std::fabs(cost - exact) < 1e-12 && std::fabs(dual - exact) < 1e-12, name + ": plan and potentials");
  cit::exact_transport({line.pair()}, {0.05, 1e-3}, 1, one);
  check(one->iterations == 0.0 && one->lower <= exact && exact <= one->upper, name + ": bounds");
  check(one->upper - one->lower <= std::max(0.05 * one->upper, 2.1e-3), name + ": bounds are too far apart");
}

// From panels in Real, by one thread and by three.
template <class Real>
void test_cosine_costs(double error) {
  constexpr std::int64_t n = 19, m = 37, d = 801;
  std::vector<double> x(n * d), y(m * d), cost(n * m), other(n * m);
  std::mt19937 random(7);
  std::uniform_real_distribution<double> coordinate(-1.0, 3.0);
  for (auto* const points : {&x, &y}) {
    for (auto row = points->begin(); row != points->end(); row += d) {
      std::generate_n(row, d, [&] { return coordinate(random); });
      const double length = std::sqrt(std::inner_product(row, row + d, row, 0.0));
      std::for_each(row, row + d, [&](double& each) { each /= length; });
    }
  }
  std::vector<Real> px(cit::packed_size(n, d)), py(cit::packed_size(m, d));
  cit::pack_clouds<Real>({{x.data(), px.data(), n, d}, {y.data(), py.data(), m, d}}, 2);
  cit::cosine_costs<Real>({{px.data(), py.data(), cost.data(), n, m, d}}, 1e-14, 1);
  cit::cosine_costs<Real>({{px.data(), py.data(), other.data(), n, m, d}}, 1e-14, 3);
  check(cost == other, "costs: bits depend on the number of threads");
  for (std::int64_t k = 0; k < n * m; ++k) {
    const double* const row = x.data() + k / m * d;
    const double product = std::inner_product(row, row + d, y.data() + k % m * d, 0.0);
    check(std::fabs(cost[k] - std::max(0.0, 1.0 - product)) < error, "costs: a wrong product");
  }
}

void test_special_costs() {
  const std::vector<double> weight(3, 1.0 / 3), zero(9, 0.0), huge(9, 1e-300);
  std::vector<double> broken(9, 1.0);
  broken[8] = std::numeric_limits<double>::infinity();
  const cit::SinkhornOptions options{0.0, 1e-6, 100, 0.0, 0.0, 2};
  cit::TransportResult out[3];
  cit::sinkhorn({{zero.data(), 3, 3, 3, weight.data(), weight.data(), nullptr, nullptr, nullptr},
                 {huge.data(), 3, 3, 3, weight.data(), weight.data(), nullptr, nullptr, nullptr},
                 {broken.data(), 3, 3, 3, weight.data(), weight.data(), nullptr, nullptr, nullptr}},
                options, out);
  check(out[0].upper == 0.0 && out[0].epsilon == 0.0, "all costs 0");
  check(std::fabs(out[1].upper - 1e-300) < 1e-310 && out[1].lower == 0.0, "costs too small for epsilon");
  check(std::isnan(out[2].epsilon), "a cost that is not finite");
}

void test_weights_of_almost_nothing() {
  Line line(9, 21, 0, 5);
  // The sums stay 1.
  line.a[1] += line.a[0];
  line.b[1] += line.b[20];
  line.a[0] = 1e-300;
  line.b[20] = 1e-40;
  for (const double epsilon : {1e-300, 1e-4, 0.1, 1e300}) test_line(line, epsilon, 1e-6, 50);
}

}  // namespace

int main(int argc, char** argv) {
  return cit::testing::run(argc, argv, [] {
    for (const std::int64_t n : {1, 2, 3, 4, 5, 17, 270}) {
      for (const std::int64_t m : {1, 2, 7, 8, 9, 15, 16, 17, 33, 257}) {
        const Line line(n, m, n % 3, static_cast<unsigned>(31 * n + m));
        for (const double epsilon : {0.0, 1e-300, 1e-3, 1.0, 1e300}) test_line(line, epsilon, 1e-6, 20);
        test_line(line, 0.2, 1e-6, 2000);
        test_exact(line);
        if (n * m < 1000) test_line(line, 0.2, 1e-12, 4000);
      }
    }
    test_special_costs();
    test_cosine_costs<double>(1e-14);
    test_cosine_costs<float>(cit::kFloatCostError);
    test_weights_of_almost_nothing();
  });
}
