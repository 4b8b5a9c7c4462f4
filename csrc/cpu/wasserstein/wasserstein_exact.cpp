// Exact transport by shortest augmenting paths, the Hungarian method for any weights.
//
// Potentials stay feasible, u_i + v_j <= C_ij, and mass lies only where that is an equation; so when all mass is
// placed, the plan is optimal. A few Sinkhorn iterations in float give potentials near the best ones: most mass is
// placed at once, and the searches for the rest are short. Each search is Dijkstra's over the columns, a row of the
// cost at a time (8 m bytes, no queue).
//
// Where bounds are enough, the potentials are the lower one at any time, and the upper one is what lies so far with
// the rest on the nearest columns left: the last and longest searches are spared.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/wasserstein/wasserstein.h"
#include "cpu/wasserstein/wasserstein_exact_kernels.h"

namespace cit {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Mass below this share of a point's mean weight is a rounding error.
constexpr double kNothing = 1e-14;

// Rows swept per point before the search is given up. Weights can make the paths many.
constexpr std::int64_t kMostSweeps = 400;

const ExactKernels& kernels() {
#ifdef CIT_FAST_X86
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      return simd_avx512::kExact;
    case SimdLevel::kAvx2:
      return simd_avx2::kExact;
    default:
      break;
  }
#endif
  return simd_baseline::kExact;
}

// A sparse plan: for each column the rows it gets mass from.
class Plan {
 public:
  struct Entry {
    std::int32_t row, next;
    double mass;
  };

  Plan(std::int64_t n, std::int64_t m) : first_(static_cast<std::size_t>(m), -1) {
    entries_.reserve(static_cast<std::size_t>(2 * (n + m)));
  }

  // step(entry) for a column.
  template <class Step>
  void for_each(std::int64_t column, const Step& step) const {
    for (std::int32_t at = first_[column]; at >= 0; at = entries_[at].next) step(entries_[at]);
  }

  double mass(std::int64_t row, std::int64_t column) const {
    for (std::int32_t at = first_[column]; at >= 0; at = entries_[at].next) {
      if (entries_[at].row == row) return entries_[at].mass;
    }
    return 0.0;
  }

  void add(std::int64_t row, std::int64_t column, double mass) {
    for (std::int32_t at = first_[column]; at >= 0; at = entries_[at].next) {
      if (entries_[at].row != row) continue;
      entries_[at].mass += mass;
      return;
    }
    const Entry entry{static_cast<std::int32_t>(row), first_[column], mass};
    if (unused_ >= 0) {
      first_[column] = unused_;
      unused_ = entries_[unused_].next;
      entries_[first_[column]] = entry;
    } else {
      first_[column] = static_cast<std::int32_t>(entries_.size());
      entries_.push_back(entry);
    }
  }

  // The entry exists; it goes, and the answer is false, where not more than `nothing` is left.
  bool remove(std::int64_t row, std::int64_t column, double mass, double nothing) {
    std::int32_t* link = &first_[column];
    while (entries_[*link].row != row) link = &entries_[*link].next;
    Entry& entry = entries_[*link];
    entry.mass -= mass;
    if (entry.mass > nothing) return true;
    const std::int32_t at = *link;
    *link = entry.next;
    entry.next = unused_;
    unused_ = at;
    return false;
  }

 private:
  std::vector<std::int32_t> first_;
  std::vector<Entry> entries_;
  std::int32_t unused_ = -1;
};

class Exact {
 public:
  Exact(const TransportPair& pair, const CostRange& range)
      : pair_(pair),
        range_(range),
        run_(kernels()),
        columns_((pair.m + kSearchColumns - 1) / kSearchColumns * kSearchColumns),
        nothing_(kNothing / static_cast<double>(std::max(pair.n, pair.m))),
        plan_(pair.n, pair.m),
        supply_(pair.a, pair.a + pair.n),
        demand_(pair.b, pair.b + pair.m),
        u_(pair.n),
        v_(columns_, -kInfinity),
        open_v_(columns_, -kInfinity),
        distance_(columns_, kInfinity),
        predecessor_(columns_, 0.0),
        settled_(pair.m),
        column_of_row_(pair.n, kUnreached),
        row_distance_(pair.n) {}

  // Whether all mass was placed, or as much as the bounds need, before the search was given up.
  bool solve(const ExactOptions& options) {
    place_on_equations();
    std::int64_t open = pair_.n - std::count(supply_.begin(), supply_.end(), 0.0), next_look = open;
    for (std::int64_t source = 0; source < pair_.n; ++source) {
      if (supply_[source] == 0.0) continue;
      if (options.gap > 0.0 && open <= next_look) {
        bound(options.cost_error);
        const double between = upper_ - lower_, allowed = options.gap * upper_;
        if (between <= allowed) return true;
        const double share = std::clamp(allowed / between, 0.25, 0.8);
        next_look = static_cast<std::int64_t>(share * static_cast<double>(open));
      }
      while (supply_[source] > 0.0) {
        if (sweeps_ > kMostSweeps * (pair_.n + pair_.m)) return false;
        if (!search(source)) break;  // the sums of the weights differ by rounding
      }
      --open;
    }
    upper_ = cost() + options.cost_error;
    lower_ = std::max(0.0, upper_ - 2 * options.cost_error);
    return true;
  }

  double lower() const { return lower_; }
  double upper() const { return upper_; }

  void hand_out() const {
    if (pair_.plan == nullptr) return;
    std::fill_n(pair_.plan, pair_.n * pair_.m, 0.0);
    for (std::int64_t j = 0; j < pair_.m; ++j) {
      plan_.for_each(j, [&](const Plan::Entry& entry) { pair_.plan[entry.row * pair_.m + j] = entry.mass; });
    }
    std::copy_n(u_.begin(), pair_.n, pair_.f);
    std::copy_n(v_.begin(), pair_.m, pair_.g);
  }

 private:
  static constexpr std::int32_t kUnreached = -2, kSource = -1;

  const double* row(std::int64_t i) const { return pair_.cost + i * pair_.stride; }

  double cost() const {
    double total = 0.0;
    for (std::int64_t j = 0; j < pair_.m; ++j) {
      plan_.for_each(j, [&](const Plan::Entry& entry) { total += entry.mass * row(entry.row)[j]; });
    }
    return total;
  }

  // lower_ and upper_ from the potentials and from the mass placed, the rest on the nearest columns with demand.
  void bound(double cost_error) {
    std::vector<double> demand;
    std::vector<std::int64_t> column;
    lower_ = 0.0;
    upper_ = cost();
    for (std::int64_t j = 0; j < pair_.m; ++j) {
      lower_ += pair_.b[j] * v_[j];
      if (demand_[j] == 0.0) continue;
      column.push_back(j);
      demand.push_back(demand_[j]);
    }
    for (std::int64_t i = 0; i < pair_.n; ++i) {
      // While others were served, v went down: u of a row that was not may go up.
      if (supply_[i] > 0.0) u_[i] = std::max(u_[i], run_.least_reduced(row(i), pair_.m, v_.data()).value);
      lower_ += pair_.a[i] * u_[i];
      for (double supply = supply_[i]; supply > 0.0 && !column.empty();) {
        std::size_t nearest = 0;
        for (std::size_t k = 1; k < column.size(); ++k) {
          if (row(i)[column[k]] - v_[column[k]] < row(i)[column[nearest]] - v_[column[nearest]]) nearest = k;
        }
        const double mass = std::min(supply, demand[nearest]);
        upper_ += mass * row(i)[column[nearest]];
        take(supply, mass);
        take(demand[nearest], mass);
        if (demand[nearest] > 0.0) continue;
        column[nearest] = column.back();
        demand[nearest] = demand.back();
        column.pop_back();
        demand.pop_back();
      }
    }
    upper_ += cost_error;
    lower_ = std::clamp(lower_ - cost_error, 0.0, upper_);
  }

  void place(std::int64_t i, std::int64_t j) {
    const double mass = std::min(supply_[i], demand_[j]);
    if (mass <= 0.0) return;
    plan_.add(i, j, mass);
    take(supply_[i], mass);
    take(demand_[j], mass);
  }

  void take(double& from, double mass) const {
    from -= mass;
    if (from <= nothing_) from = 0.0;
  }

  void place_on_equations() {
    coarse_potential(pair_, range_, v_.data());
    std::vector<std::int64_t> best(pair_.n);
    for (std::int64_t i = 0; i < pair_.n; ++i) {
      const Nearest least = run_.least_reduced(row(i), pair_.m, v_.data());
      u_[i] = least.value;
      best[i] = least.column;
    }
    std::fill_n(v_.begin(), pair_.m, kInfinity);
    for (std::int64_t i = 0; i < pair_.n; ++i) run_.lower_to_feasible(row(i), pair_.m, u_[i], v_.data());
    std::fill(v_.begin() + pair_.m, v_.end(), -kInfinity);
    for (std::int64_t i = 0; i < pair_.n; ++i) place(i, best[i]);
    for (std::int64_t i = 0; i < pair_.n; ++i) {
      for (std::int64_t j = 0; j < pair_.m && supply_[i] > 0.0; ++j) {
        if (demand_[j] > 0.0 && row(i)[j] - u_[i] <= v_[j]) place(i, j);
      }
    }
  }

  // Serves the nearest columns with demand, until the source has no more or a path took all the mass of a step back
  // (then the tree of paths is no longer there); afterwards the potentials are such that all paths taken have only
  // equations. False: there is no such column.
  bool search(std::int64_t source) {
    for (const std::int32_t i : rows_) column_of_row_[i] = kUnreached;
    rows_.clear();
    settled_count_ = 0;
    std::copy(v_.begin(), v_.end(), open_v_.begin());
    std::fill(distance_.begin(), distance_.end(), kInfinity);
    const Search search{open_v_.data(), distance_.data(), predecessor_.data(), columns_};
    Nearest next = settle_row(source, kSource, 0.0, search);
    bool served = false, going_on = true;
    double last = 0.0;
    while (next.value < kInfinity) {
      const std::int64_t j = next.column;
      const double distance = next.value;
      if (demand_[j] > 0.0) {
        served = true;
        last = distance;
        going_on = augment(source, j) && supply_[source] > 0.0;
        if (!going_on) break;
      }
      settled_[settled_count_++] = {static_cast<std::int32_t>(j), distance};
      distance_[j] = kInfinity;
      open_v_[j] = -kInfinity;
      bool reached = false;
      plan_.for_each(j, [&](const Plan::Entry& entry) {
        if (column_of_row_[entry.row] != kUnreached) return;
        next = settle_row(entry.row, static_cast<std::int32_t>(j), distance, search);
        reached = true;
      });
      if (!reached) next = run_.nearest(search);
    }
    // Whatever was settled beyond the last column served keeps its potential.
    for (const std::int32_t i : rows_) u_[i] += std::max(0.0, last - row_distance_[i]);
    for (std::int64_t k = 0; k < settled_count_; ++k) {
      v_[settled_[k].column] -= std::max(0.0, last - settled_[k].distance);
    }
    return served;
  }

  Nearest settle_row(std::int64_t i, std::int32_t column, double distance, const Search& search) {
    rows_.push_back(static_cast<std::int32_t>(i));
    column_of_row_[i] = column;
    row_distance_[i] = distance;
    ++sweeps_;
    return run_.reach(row(i), pair_.m, distance - u_[i], i, search);
  }

  // As much mass as the path from source to sink carries: forward into each column, back out of the one before.
  // Whether every step back still has mass.
  bool augment(std::int64_t source, std::int64_t sink) {
    double mass = std::min(supply_[source], demand_[sink]);
    for (std::int64_t i = row_before(sink); i != source; i = row_before(column_of_row_[i])) {
      mass = std::min(mass, plan_.mass(i, column_of_row_[i]));
    }
    bool whole = true;
    for (std::int64_t j = sink;;) {
      const std::int64_t i = row_before(j);
      plan_.add(i, j, mass);
      if (i == source) break;
      j = column_of_row_[i];
      whole = plan_.remove(i, j, mass, nothing_) && whole;
    }
    take(supply_[source], mass);
    take(demand_[sink], mass);
    return whole;
  }

  std::int64_t row_before(std::int64_t column) const { return static_cast<std::int64_t>(predecessor_[column]); }

  struct Settled {
    std::int32_t column;
    double distance;
  };

  const TransportPair& pair_;
  const CostRange& range_;
  const ExactKernels& run_;
  std::int64_t columns_;
  double nothing_;
  Plan plan_;
  std::vector<double> supply_, demand_, u_, v_, open_v_, distance_, predecessor_;
  std::vector<Settled> settled_;
  std::vector<std::int32_t> column_of_row_, rows_;
  std::vector<double> row_distance_;
  std::int64_t settled_count_ = 0, sweeps_ = 0;
  double lower_ = 0.0, upper_ = 0.0;
};

TransportResult solve(const TransportPair& pair, const ExactOptions& options) {
  TransportResult out{};
  const CostRange range = cost_range(pair);
  if (!range.finite) {
    out.epsilon = std::numeric_limits<double>::quiet_NaN();
    return out;
  }
  if (range.largest == 0.0 && pair.plan == nullptr) {
    out.upper = options.cost_error;
    return out;
  }
  Exact exact(pair, range);
  if (!exact.solve(options)) {
    out.iterations = -1.0;
    return out;
  }
  out.lower = exact.lower();
  out.upper = exact.upper();
  exact.hand_out();
  return out;
}

}  // namespace

void exact_transport(const std::vector<TransportPair>& pairs, const ExactOptions& options, int threads,
                     TransportResult* results) {
  for_each_pair(pairs, threads, [&](std::size_t index) { results[index] = solve(pairs[index], options); });
}

}  // namespace cit
