#include "cpu/wasserstein/wasserstein.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/wasserstein/wasserstein_kernels.h"
#include "sinkhorn.h"

namespace cit {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Each level of the epsilon scaling is this much finer. The reference halves epsilon; a quarter is a third faster here.
constexpr double kCoarser = 4.0;

// What an exact solver starts from: first epsilon in standard deviations of the cost, and how it goes down.
constexpr double kSpreadsOfStart = 0.2, kStartRatio = 0.1;
constexpr int kStartLevels = 2;
constexpr std::int64_t kStartIterations[kStartLevels] = {8, 20};

// Costs below this leave no room for epsilon: the product plan is as good as any.
constexpr double kLeastCost = 1e-290;

// Epsilon goes down by this until the bounds are as near as asked for.
constexpr double kFiner = 2.0;

// The range of v in which it is kept, and the smallest column sum from which v is formed.
template <class Real>
struct Limits;
template <>
struct Limits<float> {
  static constexpr double kLeast = kLeastFloatV, kMost = kMostFloatV, kLeastSum = kLeastFloatSum;
};
template <>
struct Limits<double> {
  static constexpr double kLeast = 1e-20, kMost = 1e20, kLeastSum = 1e-200;
};

const WassersteinKernels& kernels() {
#ifdef CIT_FAST_X86
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      return simd_avx512::kWasserstein;
    case SimdLevel::kAvx2:
      return simd_avx2::kWasserstein;
    default:
      break;
  }
#endif
  return simd_baseline::kWasserstein;
}

template <class Real>
const ScalingKernels<Real>& scaling_kernels();
template <>
const ScalingKernels<float>& scaling_kernels() {
  return kernels().float_scaling;
}
template <>
const ScalingKernels<double>& scaling_kernels() {
  return kernels().double_scaling;
}

// Zeros at an address that is a multiple of a cache line.
template <class T>
class Array1 {
 public:
  explicit Array1(std::int64_t size) : data_(allocate(size)) { std::fill_n(data_.get(), size, T(0)); }
  T* get() const { return data_.get(); }
  T& operator[](std::int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  static T* allocate(std::int64_t size) {
    const std::size_t bytes = (sizeof(T) * static_cast<std::size_t>(size) + 63) / 64 * 64;
    void* data = std::aligned_alloc(64, std::max<std::size_t>(bytes, 64));
    if (data == nullptr) throw std::bad_alloc();
    return static_cast<T*>(data);
  }
  std::unique_ptr<T[], Free> data_;
};

std::int64_t padded(std::int64_t size, std::int64_t block) {
  return (size + block - 1) / block * block;
}

// One pair in double, and its column potential.
struct Problem {
  explicit Problem(const TransportPair& pair)
      : cost{pair.cost, pair.n, pair.m, pair.stride},
        columns(padded(pair.m, kColumnBlock)),
        a(pair.a),
        b(columns),
        g(columns) {
    std::copy_n(pair.b, pair.m, b.get());
    for (std::int64_t j = 0; j < columns; ++j) g[j] = takes_part(j) ? 0.0 : -kInfinity;
  }

  bool takes_part(std::int64_t j) const { return b[j] >= kLeastMass; }

  CostMatrix cost;
  std::int64_t columns;
  const double* a;
  Array1<double> b, g;
};

// omega - 1 of the next iteration from the errors so far.
class Relaxation {
 public:
  double next(double error) {
    if (error < 0.9 * best_) {
      best_ = error;
      idle_ = 0;
    } else {
      ++idle_;
    }
    if (++count_ < kSpan) return value_;
    const double rate = std::pow(error / start_, 1.0 / kSpan);
    count_ = 0;
    start_ = error;
    if (!(rate > 0.0)) return value_;
    if (rate >= 1.0) {
      // Too much of it, or no longer the problem it was found for.
      value_ = value_ > 0.0 ? 0.5 * value_ : 0.0;
    } else if (rate > value_ + kMargin) {
      const double omega = 1.0 + value_;
      const double slowest = std::min(kSlowest, (rate + value_) * (rate + value_) / (rate * omega * omega));
      value_ = std::max(value_, 2.0 / (1.0 + std::sqrt(1.0 - slowest)) - 1.0);
    }
    return value_;
  }

  // No progress for long: rounding.
  bool stalled() const { return idle_ > kPatience; }

  void restart() {
    value_ = 0.0;
    count_ = 0;
    start_ = std::numeric_limits<double>::infinity();
  }

 private:
  static constexpr int kSpan = 6, kPatience = 200;
  static constexpr double kMargin = 0.05, kSlowest = 0.9995;
  double value_ = 0.0, start_ = std::numeric_limits<double>::infinity(), best_ = start_;
  int count_ = 0, idle_ = 0;
};

// Iterations with the kernel matrix in float or double.
template <class Real>
class Iteration {
 public:
  explicit Iteration(Problem& problem)
      : problem_(problem),
        run_(scaling_kernels<Real>()),
        rows_(padded(problem.cost.n, kRowBlock)),
        kernel_(rows_ * problem.columns),
        by_row_(3 * rows_),
        by_column_(5 * problem.columns),
        long_sum_(problem.columns),
        row_shift_(rows_),
        exponent_(problem.columns) {
    const std::int64_t columns = problem.columns;
    x_ = {problem.cost.n,
          problem.cost.m,
          rows_,
          columns,
          kernel_.get(),
          by_row_.get(),
          by_column_.get(),
          by_column_.get() + columns,
          by_column_.get() + 2 * columns,
          by_row_.get() + rows_,
          by_row_.get() + 2 * rows_,
          by_column_.get() + 3 * columns,
          by_column_.get() + 4 * columns,
          long_sum_.get(),
          row_shift_.get(),
          Real(0)};
    for (std::int64_t i = 0; i < x_.n; ++i) x_.a[i] = static_cast<Real>(problem.a[i]);
    for (std::int64_t j = 0; j < x_.m; ++j) {
      x_.b[j] = problem.takes_part(j) ? static_cast<Real>(problem.b[j]) : Real(0);
    }
  }

  // From problem.g until the columns are right to `tolerance`; afterwards K and v are those of the last iteration.
  //
  // Over-relaxed once the error falls at a steady rate: that of plain iterations gives the best omega (Young 1954;
  // Lehmann et al. 2021), and while it falls more slowly than it then should, omega rises. Where K was formed anew and
  // where the last iteration must tell the error of exact rows, a step is plain.
  std::int64_t alternate(double epsilon, double tolerance, std::int64_t most) {
    epsilon_ = epsilon;
    Relaxation relaxation;
    bool fresh = true;
    double confirm = tolerance;
    for (std::int64_t iterations = 1;; ++iterations) {
      fresh ? absorb() : run_.scale(x_);
      const ColumnUpdate update = run_.update(x_);
      const bool plain = fresh || x_.relaxation == Real(0);
      if ((plain && update.error <= tolerance) || iterations >= most) return iterations;
      if (sizeof(Real) < sizeof(double) && relaxation.stalled()) return iterations;
      fresh = !(update.smallest >= Limits<Real>::kLeast && update.largest <= Limits<Real>::kMost);
      if (fresh) {
        advance();
        relaxation.restart();
      } else {
        std::swap(x_.v, x_.next_v);
      }
      x_.relaxation = static_cast<Real>(relaxation.next(update.error));
      if (!plain && update.error <= confirm) {
        x_.relaxation = Real(0);
        confirm = update.error / 2;
      }
    }
  }

  // problem.g <- the potential that makes the columns right.
  void advance() {
    std::vector<std::int64_t> unreached;
    for (std::int64_t j = 0; j < x_.m; ++j) {
      if (!problem_.takes_part(j)) continue;
      const double sum = x_.column_sum[j];
      if (sum >= Limits<Real>::kLeastSum) {
        problem_.g[j] += epsilon_ * std::log(problem_.b[j] / sum);
      } else {
        unreached.push_back(j);
      }
    }
    if (!unreached.empty()) solve_columns(unreached);
  }

  // Value and bounds of the plan that K and v give once the rows are right; the plan and potentials where wanted.
  TransportResult finish(const TransportPair& pair) {
    const std::int64_t columns = x_.columns, n = x_.n, m = x_.m;
    Array1<double> v(columns), au(n), sum(columns), clipped(columns), missing(columns), g(columns), feasible(columns);
    for (std::int64_t j = 0; j < columns; ++j) {
      v[j] = static_cast<double>(x_.v[j]);
      g[j] = v[j] > 0.0 ? problem_.g[j] + epsilon_ * std::log(v[j]) : -kInfinity;
    }
    const Rounding rounding{problem_.a,    problem_.b.get(), v.get(), au.get(),      sum.get(),
                            clipped.get(), missing.get(),    g.get(), feasible.get()};
    run_.balance(x_, rounding);
    TransportResult out{};
    for (std::int64_t j = 0; j < m; ++j) {
      const double mass = v[j] * sum[j], wanted = problem_.b[j];
      out.marginal_error += std::fabs(mass - wanted);
      clipped[j] = mass > wanted ? v[j] * (wanted / mass) : v[j];
      missing[j] = mass < wanted ? wanted - mass : 0.0;
    }
    const Bounds bounds = run_.bounds(problem_.cost, x_, rounding);
    out.upper = bounds.plan_cost;
    if (bounds.missing_mass > 0.0) out.upper += bounds.missing_cost / bounds.missing_mass;
    double dual = bounds.dual_rows;
    for (std::int64_t j = 0; j < m; ++j) dual += problem_.b[j] * feasible[j];
    out.lower = std::max(0.0, std::min(dual, out.upper));
    out.epsilon = epsilon_;
    if (pair.plan != nullptr) {
      for (std::int64_t j = 0; j < m; ++j) pair.g[j] = v[j] > 0.0 ? g[j] : feasible[j];
      for (std::int64_t i = 0; i < n; ++i) {
        pair.f[i] = epsilon_ * (std::log(au[i] / problem_.a[i]) - row_shift_[i]);
        for (std::int64_t j = 0; j < m; ++j) {
          pair.plan[i * m + j] = au[i] * static_cast<double>(x_.kernel[i * columns + j]) * v[j];
        }
      }
    }
    return out;
  }

  // problem.g <- the potential of K and v, for another Iteration to start from.
  void hand_over() {
    for (std::int64_t j = 0; j < x_.m; ++j) {
      if (x_.v[j] > Real(0)) problem_.g[j] += epsilon_ * std::log(static_cast<double>(x_.v[j]));
    }
  }

 private:
  void absorb() {
    for (std::int64_t j = 0; j < x_.columns; ++j) {
      const bool takes_part = problem_.takes_part(j);
      exponent_[j] = takes_part ? problem_.g[j] / epsilon_ + std::log(problem_.b[j]) : -kInfinity;
      x_.v[j] = takes_part ? Real(1) : Real(0);
    }
    run_.absorb(problem_.cost, exponent_.get(), 1.0 / epsilon_, x_);
  }

  // g_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon) for columns where K is 0.
  void solve_columns(const std::vector<std::int64_t>& columns) {
    const CostMatrix& cost = problem_.cost;
    std::vector<double> most(columns.size(), -kInfinity), total(columns.size(), 0.0);
    for (int pass = 0; pass < 2; ++pass) {
      for (std::int64_t i = 0; i < x_.n; ++i) {
        const double row = std::log(problem_.a[i]) - std::log(static_cast<double>(x_.row_sum[i])) - x_.row_shift[i];
        for (std::size_t k = 0; k < columns.size(); ++k) {
          const double exponent = row - cost.data[i * cost.stride + columns[k]] / epsilon_;
          if (pass == 0) {
            most[k] = std::max(most[k], exponent);
          } else {
            total[k] += std::exp(exponent - most[k]);
          }
        }
      }
    }
    for (std::size_t k = 0; k < columns.size(); ++k) {
      problem_.g[columns[k]] = -epsilon_ * (most[k] + std::log(total[k]));
    }
  }

  Problem& problem_;
  const ScalingKernels<Real>& run_;
  std::int64_t rows_;
  Array1<Real> kernel_, by_row_, by_column_;
  Array1<double> long_sum_, row_shift_, exponent_;
  Scaling<Real> x_{};
  double epsilon_ = 0.0;
};

CostRange range_of(const Problem& problem) {
  const CostSums sums = kernels().range(problem.cost, problem.a, problem.b.get());
  return {sums.largest, sums.mean, sums.finite};
}

double standard_deviation(const Problem& problem, const CostRange& range) {
  const double variance = kernels().variance(problem.cost, problem.a, problem.b.get(), range.mean, 1.0 / range.largest);
  return range.largest * std::sqrt(variance);
}

double effective_epsilon(double epsilon, const Problem& problem, const CostRange& range) {
  if (epsilon == 0.0) epsilon = kEpsilonOfSpread * standard_deviation(problem, range);
  return std::max(std::min(epsilon, kLargestEpsilon * range.largest), kSmallestEpsilon * range.largest);
}

TransportResult solve(const TransportPair& pair, const SinkhornOptions& options) {
  Problem problem(pair);
  const CostRange range = range_of(problem);
  TransportResult out{};
  if (!range.finite) {
    out.epsilon = std::numeric_limits<double>::quiet_NaN();
    return out;
  }
  if (range.largest < kLeastCost) {
    out.upper = range.mean + options.cost_error;
    out.epsilon = range.largest;
    if (pair.plan != nullptr) {
      for (std::int64_t k = 0; k < pair.n * pair.m; ++k) pair.plan[k] = pair.a[k / pair.m] * pair.b[k % pair.m];
      std::fill_n(pair.f, pair.n, 0.0);
      std::fill_n(pair.g, pair.m, 0.0);
    }
    return out;
  }
  double epsilon = effective_epsilon(options.epsilon, problem, range);
  const double tolerance = options.tolerance;
  Iteration<float> in_float(problem);
  std::unique_ptr<Iteration<double>> in_double;
  std::int64_t coarse = 0, used = 0;
  for (double level = range.largest; level > epsilon; level /= kCoarser) {
    coarse += in_float.alternate(level, std::max(tolerance, kCoarseTolerance), kCoarseIterations);
    in_float.advance();
  }
  while (true) {
    used +=
        in_float.alternate(epsilon, std::max(kFloatShare * tolerance, kFloatTolerance), options.max_iterations - used);
    out = in_float.finish(pair);
    if (out.marginal_error > tolerance && used < options.max_iterations) {
      in_float.hand_over();
      if (!in_double) in_double = std::make_unique<Iteration<double>>(problem);
      used += in_double->alternate(epsilon, tolerance, options.max_iterations - used);
      out = in_double->finish(pair);
      in_double->hand_over();
    } else {
      in_float.hand_over();
    }
    out.upper += options.cost_error;
    out.lower = std::max(0.0, out.lower - options.cost_error);
    const bool certified = options.gap == 0.0 || out.upper - out.lower <= options.gap * out.upper;
    if (certified || used >= options.max_iterations || epsilon <= kSmallestEpsilon * range.largest) break;
    epsilon = std::max(epsilon / kFiner, kSmallestEpsilon * range.largest);
  }
  out.iterations = static_cast<double>(coarse + used);
  return out;
}

}  // namespace

CostRange cost_range(const TransportPair& pair) {
  const Problem problem(pair);
  return range_of(problem);
}

void coarse_potential(const TransportPair& pair, const CostRange& range, double* g) {
  Problem problem(pair);
  if (range.largest >= kLeastCost) {
    Iteration<float> in_float(problem);
    double level = kSpreadsOfStart * standard_deviation(problem, range);
    for (int k = 0; k < kStartLevels; ++k, level *= kStartRatio) {
      in_float.alternate(std::max(level, kSmallestEpsilon * range.largest), 0.0, kStartIterations[k]);
      in_float.advance();
    }
  }
  for (std::int64_t j = 0; j < pair.m; ++j) g[j] = problem.takes_part(j) ? problem.g[j] : 0.0;
}

void for_each_pair(const std::vector<TransportPair>& pairs, int threads, const std::function<void(std::size_t)>& body) {
  std::vector<std::size_t> order(pairs.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t i, std::size_t j) { return pairs[i].n * pairs[i].m > pairs[j].n * pairs[j].m; });
  std::atomic<bool> out_of_memory{false};
  parallel_for(static_cast<std::int64_t>(order.size()), threads, [&](std::int64_t k) {
    try {
      body(order[static_cast<std::size_t>(k)]);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

void sinkhorn(const std::vector<TransportPair>& pairs, const SinkhornOptions& options, TransportResult* results) {
  for_each_pair(pairs, options.threads, [&](std::size_t index) { results[index] = solve(pairs[index], options); });
}

}  // namespace cit
