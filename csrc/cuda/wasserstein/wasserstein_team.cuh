// What a team of blocks does with one pair; the tests run it on the host (host_team.h). Team: one block, or the blocks
// of a cluster, which read each other's shared memory.
//
//   K_ij = exp((g_j - C_ij) / eps + log b_j - max_j)     formed again when v leaves 1e-6 .. 1e6
//   u_i  = a_i / sum_j K_ij v_j,  v_j = b_j / sum_i u_i K_ij
//
// Each block has a part of the rows. A warp sums a row of K, then a thread sums a column of what the block holds: the
// second reading is of shared memory, so K comes from memory once an iteration, or never. Blocks exchange sums of
// columns and each forms all of v from them, in the same order, so all take the same decisions without being told.
// Exponents, sums of columns and all that the bounds are made of are float64; the plan of the bounds is formed with the
// same operations everywhere, so that its masses are right whatever the size of the exponents.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/wasserstein/wasserstein.h"
#include "sinkhorn.h"

namespace cit::gpu {

#ifdef __CUDACC__
#define CIT_TEAM __host__ __device__ __forceinline__
#define CIT_TEAM_LONG __host__ __device__
#else  // the tests
#define CIT_TEAM inline
#define CIT_TEAM_LONG
#endif

constexpr double kLeastDoubleSum = 1e-290;  // of a column whose v can be formed

template <class Team>
class Transport {
 public:
  CIT_TEAM_LONG Transport(Team& team, const TransportWork& work, std::int64_t row)
      : team_(team), work_(work), row_(row), at_(work.table[row]) {
    n_ = static_cast<int>(at_.n);
    m_ = static_cast<int>(at_.m);
    const int share = static_cast<int>(transport_rows(n_, team.size()));
    first_ = smaller(team.rank() * share, n_);
    count_ = smaller(share, n_ - first_);
    width_ = m_ > kThreads ? m_ : kThreads;
    groups_ = m_ < kThreads ? kThreads / m_ : 1;
    const std::size_t fixed = transport_fixed_bytes(m_, kThreads);
    const auto fits = static_cast<std::int64_t>((work.shared_bytes - fixed) / transport_row_bytes(m_));
    strip_ = static_cast<int>(fits < share ? fits : share);
    resident_ = strip_ == share;
    scratch_ = work.scratch + team.block() * transport_scratch(work.rows, work.columns);
  }

  CIT_TEAM_LONG void solve() {
    const double target = effective_epsilon(), tolerance = work_.tolerance;
    for (int j = team_.thread(); j < m_; j += kThreads) g()[j] = takes_part(j) ? 0.0 : -infinity();
    double iterations = 0.0, level = 1.0;
    for (; level > target; level /= 2) {
      iterations +=
          alternate(level, larger(tolerance, kCoarseTolerance), static_cast<double>(kCoarseIterations), false);
    }
    const double enough = larger(kFloatShare * tolerance, kFloatTolerance);
    double used = alternate(target, enough, work_.max_iterations, true);
    const double error = settle(target, used);
    bounds(target, iterations + used, error);
  }

 private:
  static constexpr int kThreads = Team::kThreads, kWarps = kThreads / 32;
  static constexpr int kRowsAtOnce = 4;  // of a warp: as many sums in flight

  CIT_TEAM static double infinity() { return HUGE_VAL; }
  CIT_TEAM static int smaller(int x, int y) { return x < y ? x : y; }
  CIT_TEAM static double larger(double x, double y) { return x > y ? x : y; }
  CIT_TEAM bool takes_part(int j) const { return b()[j] >= kLeastMass; }
  CIT_TEAM int warp() const { return team_.thread() / 32; }
  CIT_TEAM int lane() const { return team_.thread() % 32; }
  CIT_TEAM double cost(int row, int j) const {
    return static_cast<double>(work_.costs[at_.cost + (first_ + row) * at_.stride + j]);
  }
  // Where everything is. Formed anew at each use: as members these would be most of the registers of a thread.
  CIT_TEAM double* columns() const { return reinterpret_cast<double*>(team_.shared()); }
  CIT_TEAM double* more_columns() const { return columns() + width_; }
  CIT_TEAM double* warp_sums() const { return columns() + 2 * width_; }  // kWarpSums for each warp, and of the block
  CIT_TEAM float* v() const { return reinterpret_cast<float*>(warp_sums() + kWarpSums * (kWarps + 1)); }
  CIT_TEAM float* u() const { return v() + (m_ + 1) / 2 * 2; }
  CIT_TEAM float* k() const { return u() + strip_; }
  CIT_TEAM double* g() const { return scratch_; }
  CIT_TEAM double* h() const { return scratch_ + work_.columns; }
  CIT_TEAM double* kept() const { return scratch_ + 2 * work_.columns; }
  CIT_TEAM double* missing() const { return scratch_ + 3 * work_.columns; }
  CIT_TEAM double* top() const { return scratch_ + 4 * work_.columns; }
  CIT_TEAM double* ratio() const { return scratch_ + 4 * work_.columns + work_.rows; }
  CIT_TEAM double* f() const { return scratch_ + 4 * work_.columns + 2 * work_.rows; }
  CIT_TEAM const double* a() const { return work_.weights + at_.a + first_; }
  CIT_TEAM const double* b() const { return work_.weights + at_.b; }
  CIT_TEAM float* kernel(int row) const { return work_.kernels + at_.cost + (first_ + row) * at_.stride; }

  // Explicitly one rounding, because settle() and bounds() must see the same plan.
  CIT_TEAM double exponent(int row, int j, double inverse) const { return fma(cost(row, j), -inverse, h()[j]); }
  CIT_TEAM double plan(int row, int j, double inverse) const {
    return exp(exponent(row, j, inverse) - top()[row]) * ratio()[row];
  }

  // --- sums ---

  template <class Real>
  CIT_TEAM Real sum_lanes(Real x) {
    for (int mask = 16; mask > 0; mask /= 2) x += team_.shuffle_xor(x, mask);
    return x;
  }

  CIT_TEAM double max_lanes(double x) {
    for (int mask = 16; mask > 0; mask /= 2) x = larger(x, team_.shuffle_xor(x, mask));
    return x;
  }

  // Sums, then maxima, over the threads of this block. All of the team have come here when it returns.
  template <int kSums, int kMaxima>
  CIT_TEAM void reduce(double (&x)[kSums + kMaxima]) {
    for (int i = 0; i < kSums + kMaxima; ++i) {
      x[i] = i < kSums ? sum_lanes(x[i]) : max_lanes(x[i]);
      if (lane() == 0) warp_sums()[warp() * kWarpSums + i] = x[i];
    }
    team_.team_sync();
    for (int i = 0; i < kSums + kMaxima; ++i) {
      x[i] = warp_sums()[i];
      for (int w = 1; w < kWarps; ++w) {
        const double other = warp_sums()[w * kWarpSums + i];
        x[i] = i < kSums ? x[i] + other : larger(x[i], other);
      }
    }
  }

  // Sums over the threads of the team.
  template <int kSums>
  CIT_TEAM void reduce_team(double (&x)[kSums]) {
    reduce<kSums, 0>(x);
    double* const mine = warp_sums() + kWarps * kWarpSums;
    if (team_.thread() == 0) {
      for (int i = 0; i < kSums; ++i) mine[i] = x[i];
    }
    team_.team_sync();
    for (int i = 0; i < kSums; ++i) {
      x[i] = 0.0;
      for (int rank = 0; rank < team_.size(); ++rank) x[i] += team_.peer(mine, rank)[i];
    }
    team_.team_sync();
  }

  // Calls each(j, group): several threads share a column where there are few.
  template <class Each>
  CIT_TEAM void for_columns(const Each& each) {
    if (groups_ == 1) {
      for (int j = team_.thread(); j < m_; j += kThreads) each(j, 0);
    } else if (team_.thread() < groups_ * m_) {
      each(team_.thread() % m_, team_.thread() / m_);
    }
  }

  // Sums columns()[0 .. m) over the groups; the other blocks may read them then.
  CIT_TEAM void publish_sums() {
    if (groups_ > 1) {
      team_.sync();
      if (team_.thread() < m_) {
        double total = columns()[team_.thread()];
        for (int group = 1; group < groups_; ++group) total += columns()[group * m_ + team_.thread()];
        columns()[team_.thread()] = total;
      }
    }
    team_.team_sync();
  }

  CIT_TEAM double column_sum(int j) {
    double total = 0.0;
    for (int rank = 0; rank < team_.size(); ++rank) total += team_.peer(columns(), rank)[j];
    return total;
  }

  // --- iterations with K in float ---

  CIT_TEAM double effective_epsilon() {
    double mean[1] = {0.0}, variance[1] = {0.0};
    for (int row = warp(); row < count_; row += kWarps) {
      for (int j = lane(); j < m_; j += 32) mean[0] += a()[row] * b()[j] * cost(row, j);
    }
    reduce_team(mean);
    for (int row = warp(); row < count_; row += kWarps) {
      for (int j = lane(); j < m_; j += 32) {
        const double centred = cost(row, j) - mean[0];
        variance[0] += a()[row] * b()[j] * centred * centred;
      }
    }
    reduce_team(variance);
    const double given = work_.epsilons[row_];
    return given > 0.0 ? given : larger(kEpsilonOfSpread * sqrt(variance[0]), kSmallestEpsilon);
  }

  // What follows from g.
  CIT_TEAM void begin(double epsilon) {
    const double inverse = 1.0 / epsilon;
    for (int j = team_.thread(); j < m_; j += kThreads) {
      h()[j] = fma(g()[j], inverse, log(b()[j]));
      v()[j] = takes_part(j) ? 1.0f : 0.0f;
    }
    team_.sync();
  }

  // From g until the columns are right to `tolerance`; then g is that of the plan (`last`) or the next one. Returns the
  // iterations.
  CIT_TEAM_LONG double alternate(double epsilon, double tolerance, double most, bool last) {
    bool fresh = true;
    for (double used = 1.0;; used += 1.0) {
      if (fresh) begin(epsilon);
      for (int row = 0; row == 0 || row < count_; row += strip_) {
        const int rows = smaller(strip_, count_ - row);
        if (fresh) {
          form(row, rows, 1.0 / epsilon);
        } else {
          if (!resident_) fetch(row, rows);
          scale(row, rows);
        }
        team_.sync();
        add_columns(rows, row == 0);
        if (!resident_) team_.sync();
      }
      publish_sums();
      double x[4] = {0.0, -1.0, 1.0, -1.0};  // error; -smallest and largest of v; -smallest sum of a column
      double* const before = more_columns();
      for (int j = team_.thread(); j < m_; j += kThreads) {
        const double sum = column_sum(j), v_now = v()[j];
        before[j] = v_now;
        if (!takes_part(j)) continue;
        const double next = b()[j] / larger(sum, 1e-300);
        x[0] += fabs(v_now * sum - b()[j]);
        x[1] = larger(x[1], -next);
        x[2] = larger(x[2], next);
        x[3] = larger(x[3], -sum);
        v()[j] = static_cast<float>(next);
      }
      reduce<1, 3>(x);
      const bool stop = x[0] <= tolerance || used >= most;
      if (!stop && -x[1] >= kLeastFloatV && x[2] <= kMostFloatV) {
        fresh = false;
        continue;
      }
      const bool reached = -x[3] >= kLeastFloatSum, at_end = stop && last;
      for (int j = team_.thread(); j < m_; j += kThreads) {
        if (takes_part(j)) g()[j] += epsilon * log(at_end || !reached ? before[j] : static_cast<double>(v()[j]));
      }
      if (at_end) return used;
      if (!reached) reach(epsilon);
      if (stop) return used;
      fresh = true;
    }
  }

  // K and u of the rows of a strip.
  CIT_TEAM void form(int first, int rows, double inverse) {
    for (int row = warp(); row < rows; row += kWarps) {
      double most = -infinity();
      for (int j = lane(); j < m_; j += 32) most = larger(most, exponent(first + row, j, inverse));
      most = max_lanes(most);
      float sum = 0.0f;
      for (int j = lane(); j < m_; j += 32) {
        const float value = expf(static_cast<float>(exponent(first + row, j, inverse) - most));
        k()[row * m_ + j] = value;
        if (!resident_) kernel(first + row)[j] = value;
        sum += value;
      }
      sum = sum_lanes(sum);
      if (lane() == 0) u()[row] = static_cast<float>(a()[first + row]) / sum;
    }
  }

  CIT_TEAM void fetch(int first, int rows) {
    for (int row = warp(); row < rows; row += kWarps) {
      for (int j = lane(); j < m_; j += 32) k()[row * m_ + j] = kernel(first + row)[j];
    }
    team_.sync();
  }

  // u of the rows of a strip.
  CIT_TEAM void scale(int first, int rows) {
    for (int row = warp() * kRowsAtOnce; row < rows; row += kWarps * kRowsAtOnce) {
      float sum[kRowsAtOnce] = {};
      const float* its[kRowsAtOnce];
      for (int i = 0; i < kRowsAtOnce; ++i) its[i] = k() + smaller(row + i, rows - 1) * m_;
      for (int j = lane(); j < m_; j += 32) {
        for (int i = 0; i < kRowsAtOnce; ++i) sum[i] = fmaf(its[i][j], v()[j], sum[i]);
      }
      for (int i = 0; i < kRowsAtOnce; ++i) {
        sum[i] = sum_lanes(sum[i]);
        if (lane() == i && row + i < rows) u()[row + i] = static_cast<float>(a()[first + row + i]) / sum[i];
      }
    }
  }

  CIT_TEAM void add_columns(int rows, bool begin) {
    constexpr int kFloats = 32;  // summed in float before they go to double
    for_columns([&](int j, int group) {
      double& sum = columns()[group * m_ + j];
      double total = begin ? 0.0 : sum;
      for (int row = group; row < rows;) {
        float some = 0.0f;
        for (const int end = smaller(rows, row + kFloats * groups_); row < end; row += groups_) {
          some = fmaf(u()[row], k()[row * m_ + j], some);
        }
        total += static_cast<double>(some);
      }
      sum = total;
    });
  }

  // --- in double ---

  // top and ratio, which make the plan's rows right.
  CIT_TEAM void balance_rows(double inverse) {
    for (int row = warp(); row < count_; row += kWarps) {
      double most = -infinity(), sum = 0.0;
      for (int j = lane(); j < m_; j += 32) most = larger(most, exponent(row, j, inverse));
      most = max_lanes(most);
      for (int j = lane(); j < m_; j += 32) sum += exp(exponent(row, j, inverse) - most);
      sum = sum_lanes(sum);
      if (lane() == 0) {
        top()[row] = most;
        ratio()[row] = a()[row] / sum;
      }
    }
    team_.sync();
  }

  // g_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon), for columns whose mass is below the smallest number.
  CIT_TEAM_LONG void reach(double epsilon) {
    const double inverse = 1.0 / epsilon;
    begin(epsilon);
    balance_rows(inverse);
    double* const rest = more_columns();
    for_columns([&](int j, int group) {
      double most = -infinity(), sum = 0.0;
      for (int row = group; row < count_; row += groups_) {
        merge(most, sum, log(ratio()[row]) - top()[row] - cost(row, j) * inverse, 1.0);
      }
      columns()[group * m_ + j] = most;
      rest[group * m_ + j] = sum;
    });
    team_.sync();
    if (groups_ > 1 && team_.thread() < m_) {
      const int j = team_.thread();
      for (int group = 1; group < groups_; ++group) {
        merge(columns()[j], rest[j], columns()[group * m_ + j], rest[group * m_ + j]);
      }
    }
    team_.team_sync();
    for (int j = team_.thread(); j < m_; j += kThreads) {
      double most = -infinity(), sum = 0.0;
      for (int rank = 0; rank < team_.size(); ++rank) {
        merge(most, sum, team_.peer(columns(), rank)[j], team_.peer(rest, rank)[j]);
      }
      if (takes_part(j)) g()[j] = -epsilon * (most + log(sum));
    }
    team_.team_sync();
  }

  // sum e^top + other_sum e^other_top, as sum e^top.
  CIT_TEAM static void merge(double& top, double& sum, double other_top, double other_sum) {
    if (other_top > top) {
      sum = sum * exp(top - other_top) + other_sum;
      top = other_top;
    } else if (other_sum > 0.0) {
      sum += other_sum * exp(other_top - top);
    }
  }

  // Goes on until the columns are right to the tolerance of the call. Returns their error; what of each column is kept
  // and what it lacks is left in kept() and missing().
  CIT_TEAM_LONG double settle(double epsilon, double& used) {
    const double inverse = 1.0 / epsilon;
    double* const masses = more_columns();
    for (;;) {
      begin(epsilon);
      balance_rows(inverse);
      for_columns([&](int j, int group) {
        double sum = 0.0;
        for (int row = group; row < count_; row += groups_) sum += plan(row, j, inverse);
        columns()[group * m_ + j] = sum;
      });
      publish_sums();
      double x[2] = {0.0, -1.0};
      for (int j = team_.thread(); j < m_; j += kThreads) {
        const double mass = column_sum(j);
        masses[j] = mass;
        x[0] += fabs(mass - b()[j]);
        if (takes_part(j)) x[1] = larger(x[1], -mass);
      }
      reduce<1, 1>(x);
      if (x[0] <= work_.tolerance || used >= work_.max_iterations) {
        for (int j = team_.thread(); j < m_; j += kThreads) {
          kept()[j] = masses[j] > b()[j] ? b()[j] / masses[j] : 1.0;
          missing()[j] = larger(b()[j] - masses[j], 0.0);
        }
        team_.sync();
        return x[0];
      }
      used += 1.0;
      if (-x[1] >= kLeastDoubleSum) {
        for (int j = team_.thread(); j < m_; j += kThreads) {
          if (takes_part(j)) g()[j] += epsilon * log(b()[j] / masses[j]);
        }
      } else {
        reach(epsilon);
      }
    }
  }

  // The cost of the plan after rounding, and the potentials made feasible by two c-transforms.
  CIT_TEAM_LONG void bounds(double epsilon, double iterations, double error) {
    const double inverse = 1.0 / epsilon;
    double x[4] = {};  // cost of what is kept; of what is missing; what is missing; dual
    for (int row = warp(); row < count_; row += kWarps) {
      double mass = 0.0, plan_cost = 0.0, to_missing = 0.0, minus_f = -infinity();
      for (int j = lane(); j < m_; j += 32) {
        const double stays = plan(row, j, inverse) * kept()[j], c = cost(row, j);
        mass += stays;
        plan_cost += stays * c;
        to_missing += missing()[j] * c;
        minus_f = larger(minus_f, g()[j] - c);
      }
      mass = sum_lanes(mass);
      plan_cost = sum_lanes(plan_cost);
      to_missing = sum_lanes(to_missing);
      minus_f = max_lanes(minus_f);
      if (lane() == 0) {
        const double lacks = larger(a()[row] - mass, 0.0);
        x[0] += plan_cost;
        x[1] += lacks * to_missing;
        x[2] += lacks;
        x[3] -= a()[row] * minus_f;
        f()[row] = -minus_f;
      }
    }
    team_.sync();
    for_columns([&](int j, int group) {
      double least = infinity();
      for (int row = group; row < count_; row += groups_) least = -larger(-least, f()[row] - cost(row, j));
      columns()[group * m_ + j] = least;
    });
    team_.team_sync();
    if (team_.rank() == 0) {
      for (int j = team_.thread(); j < m_; j += kThreads) {
        double least = infinity();
        for (int rank = 0; rank < team_.size(); ++rank) {
          for (int group = 0; group < groups_; ++group) {
            least = -larger(-least, -team_.peer(columns(), rank)[group * m_ + j]);
          }
        }
        x[3] += b()[j] * least;
      }
    }
    reduce_team(x);
    if (team_.rank() == 0 && team_.thread() == 0) {
      double* const out = work_.results + 5 * row_;
      const double upper = x[0] + (x[2] > 0.0 ? x[1] / x[2] : 0.0);
      out[0] = larger(x[3] < upper ? x[3] : upper, 0.0);
      out[1] = upper;
      out[2] = iterations;
      out[3] = error;
      out[4] = epsilon;
    }
  }

  Team& team_;
  const TransportWork& work_;
  const std::int64_t row_;
  const TransportRow at_;
  int n_, m_, first_, count_, width_, groups_, strip_;
  bool resident_;
  double* scratch_;
};

// Takes pairs until there are no more.
template <class Team>
CIT_TEAM_LONG void transport_of_team(Team& team, const TransportWork& work) {
  auto* const item = reinterpret_cast<std::uint32_t*>(team.shared());
  for (;;) {
    if (team.rank() == 0 && team.thread() == 0) *item = team.take(work.next);
    team.team_sync();
    const std::uint32_t at = *team.peer(item, 0);
    team.team_sync();
    if (at >= work.count) return;
    Transport<Team>(team, work, work.order[at]).solve();
    team.team_sync();
  }
}

}  // namespace cit::gpu
