// Inner loops of wasserstein.h, compiled once per instruction set.
//
// One Sinkhorn iteration is  u = 1 / (K v),  c_j = sum_i a_i u_i K_ij,  v = b / c.  Four rows at a time: their sums
// with v, then their share of c while the rows are still in the first-level cache, so K is read once from wherever it
// lives: 4 bytes, two multiplications and two additions per entry, no exponential. v and c are touched once for four
// rows. K is formed anew from the cost, which is kept in double, when v leaves the range of its type; exponents are
// formed in double and only their distance from the row's largest is rounded, so epsilon may be as small as one likes.

#include "cpu/wasserstein/wasserstein_kernels.h"

#include "cpu/simd/simd_double.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {
namespace {

// Rows whose contributions to a column are summed in float before they are added in double.
constexpr int64_t kFloatRows = 256;

template <class Real>
struct Of;
template <>
struct Of<float> {
  using Lanes = F32x16;
  static constexpr int kCount = kLanes;
};
template <>
struct Of<double> {
  using Lanes = F64x8;
  static constexpr int kCount = kDoubleLanes;
};

// step(j, costs) for a row of the cost, eight at a time; `fill` beyond its end.
template <class Step>
CIT_INLINE void for_each_cost(const double* row, int64_t m, const Step& step) {
  int64_t j = 0;
  for (; j + kDoubleLanes <= m; j += kDoubleLanes) step(j, load(row + j));
  if (j == m) return;
  double rest[kDoubleLanes] = {};
  for (int64_t k = j; k < m; ++k) rest[k - j] = row[k];
  step(j, load(rest));
}

CIT_INLINE const double* row_of(const CostMatrix& cost, int64_t i) {
  return cost.data + i * cost.stride;
}

// --- iteration ---

// c += sum of four rows of K with the weights au.
template <class Real>
CIT_INLINE void add_rows(const Real* k, int64_t columns, const Real* au, Real* c) {
  using Lanes = typename Of<Real>::Lanes;
  const Lanes w0 = splat(au[0]), w1 = splat(au[1]), w2 = splat(au[2]), w3 = splat(au[3]);
  for (int64_t j = 0; j < columns; j += Of<Real>::kCount) {
    const Lanes low = load(k + j) * w0 + load(k + columns + j) * w1;
    const Lanes high = load(k + 2 * columns + j) * w2 + load(k + 3 * columns + j) * w3;
    store(c + j, load(c + j) + (low + high));
  }
}

// row_sum = K v of four rows.
template <class Real>
CIT_INLINE void sum_rows(const Real* k, int64_t columns, const Real* v, Real* row_sum) {
  using Lanes = typename Of<Real>::Lanes;
  Lanes s0 = splat(Real(0)), s1 = s0, s2 = s0, s3 = s0;
  for (int64_t j = 0; j < columns; j += Of<Real>::kCount) {
    const Lanes x = load(v + j);
    s0 = s0 + load(k + j) * x;
    s1 = s1 + load(k + columns + j) * x;
    s2 = s2 + load(k + 2 * columns + j) * x;
    s3 = s3 + load(k + 3 * columns + j) * x;
  }
  row_sum[0] = fold(s0);
  row_sum[1] = fold(s1);
  row_sum[2] = fold(s2);
  row_sum[3] = fold(s3);
}

// now (now / before)^relaxation of four rows, to second order and with now / before - 1 cut at a half: enough near the
// solution, and far from it a step that is only a little shorter.
template <class Real>
CIT_INLINE void relax(const Real* before, Real* now, Real relaxation) {
  const Real curvature = (relaxation - Real(1)) * Real(0.5);
  for (int64_t r = 0; r < kRowBlock; ++r) {
    Real change = before[r] > Real(0) ? now[r] / before[r] - Real(1) : Real(0);
    change = change < Real(-0.5) ? Real(-0.5) : change;
    change = change > Real(0.5) ? Real(0.5) : change;
    now[r] = now[r] * (Real(1) + relaxation * change * (Real(1) + curvature * change));
  }
}

// Calls fill(i, k) to bring row_sum of rows [i, i + 4) up to date, and adds their columns.
template <class Real, class Fill>
CIT_INLINE void iterate(const Scaling<Real>& x, Real relaxation, const Fill& fill) {
  const bool in_blocks = sizeof(Real) < sizeof(double) && x.rows > kFloatRows;
  const int64_t together = in_blocks ? kFloatRows : x.rows;
  Real* const c = in_blocks ? x.block_sum : x.column_sum;
  if (in_blocks) memset(x.long_sum, 0, sizeof(double) * static_cast<size_t>(x.columns));
  for (int64_t first = 0; first < x.rows; first += together) {
    const int64_t last = first + together < x.rows ? first + together : x.rows;
    memset(c, 0, sizeof(Real) * static_cast<size_t>(x.columns));
    for (int64_t i = first; i < last; i += kRowBlock) {
      Real* const k = x.kernel + i * x.columns;
      fill(i, k);
      Real now[kRowBlock];
      for (int64_t r = 0; r < kRowBlock; ++r) {
        now[r] = x.a[i + r] > Real(0) ? x.a[i + r] / x.row_sum[i + r] : Real(0);
      }
      if (relaxation > Real(0)) relax(x.au + i, now, relaxation);
      memcpy(x.au + i, now, sizeof(now));
      add_rows(k, x.columns, x.au + i, c);
    }
    if (!in_blocks) continue;
    for (int64_t j = 0; j < x.columns; j += kDoubleLanes) {
      store(x.long_sum + j, load(x.long_sum + j) + load_doubles(c + j));
    }
  }
  if (!in_blocks) return;
  for (int64_t j = 0; j < x.columns; j += kDoubleLanes) store_doubles(x.column_sum + j, load(x.long_sum + j));
}

template <class Real>
void scale(const Scaling<Real>& x) {
  iterate(x, x.relaxation,
          [&](int64_t i, Real* k) __attribute__((always_inline)) { sum_rows(k, x.columns, x.v, x.row_sum + i); });
}

// K of one row; the columns beyond m stay as they are, 0.
template <class Real>
CIT_INLINE void form_row(const CostMatrix& cost, int64_t i, const double* h, double inverse_epsilon,
                         const Scaling<Real>& x, Real* k) {
  using Lanes = typename Of<Real>::Lanes;
  const F64x8 inverse = splat(inverse_epsilon);
  F64x8 most = splat(-__builtin_inf());
  for_each_cost(row_of(cost, i), cost.m, [&](int64_t j, const F64x8& costs) __attribute__((always_inline)) {
    most = larger(most, load(h + j) - costs * inverse);
  });
  const double shift = largest_lane(most);
  x.row_shift[i] = shift;
  const F64x8 shifts = splat(shift);
  for_each_cost(row_of(cost, i), cost.m, [&](int64_t j, const F64x8& costs) __attribute__((always_inline)) {
    store_doubles(k + j, (load(h + j) - costs * inverse) - shifts);
  });
  Lanes total = splat(Real(0));
  for (int64_t j = 0; j < x.columns; j += Of<Real>::kCount) {
    const Lanes value = exponential(load(k + j));
    store(k + j, value);
    total = total + value;
  }
  x.row_sum[i] = fold(total);
}

template <class Real>
void absorb(const CostMatrix& cost, const double* h, double inverse_epsilon, const Scaling<Real>& x) {
  iterate(x, Real(0), [&](int64_t i, Real* k) __attribute__((always_inline)) {
    for (int r = 0; r < kRowBlock; ++r) {
      if (i + r < x.n) {
        // Between m and a whole vector the exponent must be very small; the rest of the row is made so here.
        for (int64_t j = x.columns - kColumnBlock; j < x.columns; ++j) k[r * x.columns + j] = Real(-1e4);
        form_row(cost, i + r, h, inverse_epsilon, x, k + r * x.columns);
      } else {
        x.row_sum[i + r] = Real(1);
      }
    }
  });
}

template <class Real>
ColumnUpdate update(const Scaling<Real>& x) {
  using Lanes = typename Of<Real>::Lanes;
  const Lanes zero = splat(Real(0)), one = splat(Real(1));
  const Lanes half_more = splat(Real(0.5)), half_less = splat(Real(-0.5)), relaxation = splat(x.relaxation),
              curvature = splat((x.relaxation - Real(1)) * Real(0.5));
  Lanes error = zero, least = one, most = one;
  for (int64_t j = 0; j < x.columns; j += Of<Real>::kCount) {
    const Lanes b = load(x.b + j), c = load(x.column_sum + j);
    const Lanes difference = load(x.v + j) * c - b;
    const Lanes next = b / c;
    error = error + where_above(b, zero, absolute(difference), zero);
    least = smaller(least, where_above(b, zero, next, one));
    most = larger(most, where_above(b, zero, next, one));
    const Lanes change = smaller(larger(next / load(x.v + j) - one, half_less), half_more);
    const Lanes relaxed = next * (one + relaxation * change * (one + curvature * change));
    store(x.next_v + j, where_above(b, zero, relaxed, zero));
  }
  ColumnUpdate out{fold(error), 1.0, 1.0};
  Real low[Of<Real>::kCount], high[Of<Real>::kCount];
  store(low, least);
  store(high, most);
  for (int i = 0; i < Of<Real>::kCount; ++i) {
    out.smallest = low[i] < out.smallest ? low[i] : out.smallest;
    out.largest = high[i] > out.largest ? high[i] : out.largest;
  }
  return out;
}

// --- before and after the iterations ---

CostSums range(const CostMatrix& cost, const double* a, const double* b) {
  F64x8 most = splat(0.0), broken = splat(0.0);
  double mean = 0.0;
  for (int64_t i = 0; i < cost.n; ++i) {
    F64x8 row = splat(0.0);
    for_each_cost(row_of(cost, i), cost.m, [&](int64_t j, const F64x8& costs) __attribute__((always_inline)) {
      most = larger(most, costs);
      broken = broken + (costs - costs);
      row = row + costs * load(b + j);
    });
    mean += a[i] * fold(row);
  }
  return {largest_lane(most), mean, fold(broken) == 0.0};
}

double variance(const CostMatrix& cost, const double* a, const double* b, double mean, double scale) {
  double total = 0.0;
  for (int64_t i = 0; i < cost.n; ++i) {
    F64x8 row = splat(0.0);
    for_each_cost(row_of(cost, i), cost.m, [&](int64_t j, const F64x8& costs) __attribute__((always_inline)) {
      const F64x8 centred = (costs - splat(mean)) * splat(scale);
      row = row + centred * centred * load(b + j);
    });
    total += a[i] * fold(row);
  }
  return total;
}

template <class Real>
void balance(const Scaling<Real>& x, const Rounding& y) {
  memset(y.column_sum, 0, sizeof(double) * static_cast<size_t>(x.columns));
  for (int64_t i = 0; i < x.n; ++i) {
    const Real* k = x.kernel + i * x.columns;
    F64x8 total = splat(0.0);
    for (int64_t j = 0; j < x.columns; j += kDoubleLanes) total = total + load_doubles(k + j) * load(y.v + j);
    y.au[i] = y.a[i] / fold(total);
    const F64x8 weight = splat(y.au[i]);
    for (int64_t j = 0; j < x.columns; j += kDoubleLanes) {
      store(y.column_sum + j, load(y.column_sum + j) + weight * load_doubles(k + j));
    }
  }
}

template <class Real>
Bounds bounds(const CostMatrix& cost, const Scaling<Real>& x, const Rounding& y) {
  Bounds out{0.0, 0.0, 0.0, 0.0};
  const F64x8 infinity = splat(__builtin_inf());
  for (int64_t j = 0; j < x.columns; j += kDoubleLanes) store(y.feasible_g + j, infinity);
  for (int64_t i = 0; i < x.n; ++i) {
    const Real* k = x.kernel + i * x.columns;
    F64x8 mass = splat(0.0), plan_cost = mass, missing_cost = mass, least = infinity;
    for_each_cost(row_of(cost, i), cost.m, [&](int64_t j, const F64x8& costs) __attribute__((always_inline)) {
      const F64x8 plan = load_doubles(k + j) * load(y.clipped_v + j);
      mass = mass + plan;
      plan_cost = plan_cost + plan * costs;
      missing_cost = missing_cost + costs * load(y.missing_b + j);
      least = smaller(least, costs - load(y.g + j));
    });
    const double missing = y.a[i] - y.au[i] * fold(mass);
    out.plan_cost += y.au[i] * fold(plan_cost);
    if (missing > 0.0) {
      out.missing_cost += missing * fold(missing_cost);
      out.missing_mass += missing;
    }
    const double f = -largest_lane(splat(0.0) - least);
    out.dual_rows += y.a[i] * f;
    const F64x8 fs = splat(f);
    for_each_cost(row_of(cost, i), cost.m, [&](int64_t j, const F64x8& costs) __attribute__((always_inline)) {
      store(y.feasible_g + j, smaller(load(y.feasible_g + j), costs - fs));
    });
  }
  return out;
}

}  // namespace

extern const WassersteinKernels kWasserstein;
const WassersteinKernels kWasserstein = {
    range,
    variance,
    {absorb<float>, scale<float>, update<float>, balance<float>, bounds<float>},
    {absorb<double>, scale<double>, update<double>, balance<double>, bounds<double>},
};

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
