// The kernels of one instruction set, each a sweep over one pair's matrix.
#pragma once

#include <stdint.h>

namespace cit {

// Columns are padded to a multiple of this and rows of K to kRowBlock; a padded column has weight and K 0.
constexpr int64_t kColumnBlock = 16;
constexpr int64_t kRowBlock = 4;

struct CostMatrix {
  const double* data;  // [n, m], not padded
  int64_t n, m, stride;
};

struct CostSums {
  double largest, mean;
  bool finite;
};

// The scaled problem of one pair. Real is the type of the kernel matrix: plan_ij = au_i K_ij v_j.
template <class Real>
struct Scaling {
  int64_t n, m;           // of the cost
  int64_t rows, columns;  // padded
  Real* kernel;           // [rows, columns]; the largest entry of a row is 1
  Real* a;                // [rows] weights
  Real* b;                // [columns] weights, 0 where the column takes no part
  Real* v;                // [columns]
  Real* next_v;           // [columns]
  Real* au;               // [rows] a_i u_i
  Real* row_sum;          // [rows] 1 / u_i
  Real* column_sum;       // [columns] sum_i au_i K_ij
  Real* block_sum;        // [columns] scratch
  double* long_sum;       // [columns] scratch
  double* row_shift;      // [rows] max_j of the exponent before K was formed
  Real relaxation;        // omega - 1, at least 0 and below 1
};

struct ColumnUpdate {
  double error;              // sum_j |v_j c_j - b_j| of v
  double smallest, largest;  // of next_v, and 1
};

// Potentials and weights of the rounding, all in double and padded to the columns.
struct Rounding {
  const double* a;  // [n]
  const double* b;  // [m]
  const double* v;
  double* au;               // [n]
  double* column_sum;       // sum_i au_i K_ij
  const double* clipped_v;  // v_j min(1, b_j / (v_j c_j))
  const double* missing_b;  // what the columns lack after clipping
  const double* g;          // -infinity where the column has no potential
  double* feasible_g;       // min_i C_ij - f_i with f_i = min_j C_ij - g_j
};

struct Bounds {
  double plan_cost, missing_cost, missing_mass, dual_rows;
};

template <class Real>
struct ScalingKernels {
  // K_ij = exp(h_j - C_ij / epsilon - max_j) and then as `scale`. h is padded with -infinity.
  void (*absorb)(const CostMatrix& cost, const double* h, double inverse_epsilon, const Scaling<Real>& x);
  // One iteration with v: row sums K v, au = a / (K v), column sums of au K. au goes omega times as far, if not relaxed
  // by more than half of itself; the same for next_v.
  void (*scale)(const Scaling<Real>& x);
  // next_v = b / column_sum.
  ColumnUpdate (*update)(const Scaling<Real>& x);
  // au = a / (K v) and column_sum in double.
  void (*balance)(const Scaling<Real>& x, const Rounding& y);
  // The cost of the rounded plan and the feasible potentials.
  Bounds (*bounds)(const CostMatrix& cost, const Scaling<Real>& x, const Rounding& y);
};

struct WassersteinKernels {
  CostSums (*range)(const CostMatrix& cost, const double* a, const double* b);
  // sum_ij a_i b_j ((C_ij - mean) scale)^2
  double (*variance)(const CostMatrix& cost, const double* a, const double* b, double mean, double scale);
  ScalingKernels<float> float_scaling;
  ScalingKernels<double> double_scaling;
};

namespace simd_baseline {
extern const WassersteinKernels kWasserstein;
}
#ifdef CIT_FAST_X86
namespace simd_avx2 {
extern const WassersteinKernels kWasserstein;
}
namespace simd_avx512 {
extern const WassersteinKernels kWasserstein;
}
#endif

}  // namespace cit
