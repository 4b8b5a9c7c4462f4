// The Python module cit_fast._native: the only file here that knows Python. Tensors arrive as addresses
// (torch.Tensor.data_ptr()), so this builds without torch and one binary serves every torch version. Arguments are
// checked in cit_fast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/balance_ema/balance_ema.h"
#include "cpu/dispatch.h"
#include "cpu/information_gain/information_gain.h"
#include "cpu/rms_norm/rms_norm.h"
#include "cpu/wasserstein/products.h"
#include "cpu/wasserstein/wasserstein.h"
#include "sinkhorn.h"

namespace py = pybind11;

namespace {

using Table = std::vector<std::int64_t>;
// The same by columns: for lists of hundreds of tensors Python makes these in less time.
using Columns = std::vector<std::vector<std::int64_t>>;

// One row per tensor: numel; then address and dtype of param, average, grad, previous_grad (address 0 = none).
constexpr std::size_t kEmaColumns = 9;
// The same, then address and dtype of exp_avg, exp_avg_sq.
constexpr std::size_t kAdamWColumns = 13;
// One row per pair of clouds: address of the cost (float64), n, m, elements between its rows; addresses of a and b; of
// the plan and the potentials f and g to be written (address 0 = none).
constexpr std::size_t kTransportColumns = 9;
// One row per cloud: address of the points (float64) and of the panels (float32 or float64), n, d.
constexpr std::size_t kCloudColumns = 4;
// One row per pair of clouds: address of the panels of both and of the cost, n, m, d.
constexpr std::size_t kCosineColumns = 6;

template <class T>
T* pointer(std::int64_t address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

cit::Array array(const std::int64_t* columns) {
  return {pointer<void>(columns[0]), static_cast<cit::DType>(columns[1])};
}

// Arrays of one dtype.
template <std::size_t kCount>
std::array<cit::Array, kCount> arrays(const std::array<std::int64_t, kCount>& addresses, std::int64_t dtype) {
  std::array<cit::Array, kCount> out{};
  for (std::size_t i = 0; i < kCount; ++i) out[i] = {pointer<void>(addresses[i]), static_cast<cit::DType>(dtype)};
  return out;
}

cit::EmaTensor ema_tensor(const std::int64_t* row) {
  return {row[0], array(row + 1), array(row + 3), array(row + 5), array(row + 7)};
}

cit::AdamWTensor adamw_tensor(const std::int64_t* row) {
  return {ema_tensor(row), array(row + 9), array(row + 11)};
}

template <class Tensor>
std::vector<Tensor> rows(const Table& table, std::size_t columns, Tensor (*make)(const std::int64_t*)) {
  if (table.size() % columns != 0)
    throw std::invalid_argument("table: expected rows of " + std::to_string(columns) + " integers");
  std::vector<Tensor> tensors;
  tensors.reserve(table.size() / columns);
  for (std::size_t at = 0; at < table.size(); at += columns) tensors.push_back(make(table.data() + at));
  return tensors;
}

Table by_rows(const Columns& columns) {
  const std::size_t count = columns.empty() ? 0 : columns.front().size();
  Table table(columns.size() * count);
  for (std::size_t column = 0; column < columns.size(); ++column) {
    if (columns[column].size() != count) throw std::invalid_argument("table: expected columns of one length");
    for (std::size_t row = 0; row < count; ++row) table[row * columns.size() + column] = columns[column][row];
  }
  return table;
}

cit::TransportPair transport_pair(const std::int64_t* row) {
  return {pointer<const double>(row[0]),
          row[1],
          row[2],
          row[3],
          pointer<const double>(row[4]),
          pointer<const double>(row[5]),
          pointer<double>(row[6]),
          pointer<double>(row[7]),
          pointer<double>(row[8])};
}

template <class Real>
cit::Cloud<Real> cloud(const std::int64_t* row) {
  return {pointer<const double>(row[0]), pointer<Real>(row[1]), row[2], row[3]};
}

template <class Real>
cit::CosineCost<Real> cosine_cost(const std::int64_t* row) {
  return {pointer<const Real>(row[0]), pointer<const Real>(row[1]), pointer<double>(row[2]), row[3], row[4], row[5]};
}

cit::RuleOptions rule_options(std::int64_t rule, double decay, double fallback, double scale) {
  return {static_cast<cit::Rule>(rule), decay, fallback, scale};
}

cit::Results results(std::int64_t alphas, std::int64_t fallbacks, std::int64_t norms, std::int64_t remaining) {
  return {pointer<float>(alphas), pointer<bool>(fallbacks), pointer<double>(norms), pointer<float>(remaining)};
}

// Address, dtype, rows, columns and elements from row to row.
using MatrixRow = std::array<std::int64_t, 5>;

cit::Matrix matrix(const MatrixRow& row) {
  return {array(row.data()), row[2], row[3], row[4]};
}

cit::Head head(const MatrixRow& weight, std::int64_t bias) {
  return {matrix(weight), pointer<const float>(bias)};
}

// Addresses of the gradients of hidden states, weight and bias; 0 = not needed.
cit::Gradients gradients(const std::array<std::int64_t, 3>& addresses) {
  return {pointer<float>(addresses[0]), pointer<float>(addresses[1]), pointer<float>(addresses[2])};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native CPU kernels of cit_fast; use them through cit_fast.ops.";

  m.def("simd_name", &cit::simd_name);
  m.def("simd_levels", &cit::simd_levels);
  m.def("set_simd_level", &cit::set_simd_level, py::arg("name"));

  m.def(
      "balance_norms",
      [](const Columns& table, bool store_grads, int threads, std::int64_t norms) {
        const auto tensors = rows(by_rows(table), kEmaColumns, ema_tensor);
        py::gil_scoped_release release;
        cit::balance_norms(tensors, {store_grads, false, 0, threads}, pointer<double>(norms));
      },
      py::arg("table"), py::kw_only(), py::arg("store_grads"), py::arg("threads"), py::arg("norms"));

  m.def(
      "balance_ema",
      [](const Columns& table, std::int64_t rule, double decay, double fallback, double scale, bool store_grads,
         bool nearest, std::uint32_t seed, int threads, std::int64_t alphas, std::int64_t fallbacks, std::int64_t norms,
         std::int64_t remaining) {
        const auto tensors = rows(by_rows(table), kEmaColumns, ema_tensor);
        py::gil_scoped_release release;
        cit::balance_ema(tensors, rule_options(rule, decay, fallback, scale), {store_grads, nearest, seed, threads},
                         results(alphas, fallbacks, norms, remaining));
      },
      py::arg("table"), py::kw_only(), py::arg("rule"), py::arg("decay"), py::arg("fallback"), py::arg("scale"),
      py::arg("store_grads"), py::arg("nearest"), py::arg("seed"), py::arg("threads"), py::arg("alphas"),
      py::arg("fallbacks"), py::arg("norms"), py::arg("remaining"));

  m.def(
      "adamw_balance_ema",
      [](const Columns& table, std::int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
         std::int64_t rule, double decay, double fallback, double scale, bool store_grads, bool nearest,
         std::uint32_t seed, int threads, std::int64_t alphas, std::int64_t fallbacks, std::int64_t norms,
         std::int64_t remaining) {
        const auto tensors = rows(by_rows(table), kAdamWColumns, adamw_tensor);
        py::gil_scoped_release release;
        cit::adamw_balance_ema(tensors, {step, lr, beta1, beta2, eps, weight_decay},
                               rule_options(rule, decay, fallback, scale), {store_grads, nearest, seed, threads},
                               results(alphas, fallbacks, norms, remaining));
      },
      py::arg("table"), py::kw_only(), py::arg("step"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
      py::arg("eps"), py::arg("weight_decay"), py::arg("rule"), py::arg("decay"), py::arg("fallback"), py::arg("scale"),
      py::arg("store_grads"), py::arg("nearest"), py::arg("seed"), py::arg("threads"), py::arg("alphas"),
      py::arg("fallbacks"), py::arg("norms"), py::arg("remaining"));

  m.def(
      "flush_balance_ema",
      [](const Columns& table, bool nearest, std::uint32_t seed, int threads, std::int64_t alphas) {
        const auto tensors = rows(by_rows(table), kEmaColumns, ema_tensor);
        py::gil_scoped_release release;
        cit::flush_balance_ema(tensors, {false, nearest, seed, threads}, pointer<float>(alphas));
      },
      py::arg("table"), py::kw_only(), py::arg("nearest"), py::arg("seed"), py::arg("threads"), py::arg("alphas"));

  m.def(
      "sinkhorn",
      [](const Table& table, double epsilon, double tolerance, std::int64_t max_iterations, double gap,
         double cost_error, int threads, std::int64_t results) {
        const auto pairs = rows(table, kTransportColumns, transport_pair);
        py::gil_scoped_release release;
        cit::sinkhorn(pairs, {epsilon, tolerance, max_iterations, gap, cost_error, threads},
                      pointer<cit::TransportResult>(results));
      },
      py::arg("table"), py::kw_only(), py::arg("epsilon"), py::arg("tolerance"), py::arg("max_iterations"),
      py::arg("gap"), py::arg("cost_error"), py::arg("threads"), py::arg("results"));

  m.def(
      "exact_transport",
      [](const Table& table, double gap, double cost_error, int threads, std::int64_t results) {
        const auto pairs = rows(table, kTransportColumns, transport_pair);
        py::gil_scoped_release release;
        cit::exact_transport(pairs, {gap, cost_error}, threads, pointer<cit::TransportResult>(results));
      },
      py::arg("table"), py::kw_only(), py::arg("gap"), py::arg("cost_error"), py::arg("threads"), py::arg("results"));

  m.def("packed_size", &cit::packed_size, py::arg("n"), py::arg("d"));

  m.def(
      "pack_clouds",
      [](const Table& table, bool use_float32, int threads) {
        const auto pack = [&](const auto& clouds) {
          py::gil_scoped_release release;
          cit::pack_clouds(clouds, threads);
        };
        use_float32 ? pack(rows(table, kCloudColumns, cloud<float>)) : pack(rows(table, kCloudColumns, cloud<double>));
      },
      py::arg("table"), py::kw_only(), py::arg("use_float32"), py::arg("threads"));

  m.def(
      "cosine_costs",
      [](const Table& table, bool use_float32, double rounding, int threads) {
        const auto build = [&](const auto& pairs) {
          py::gil_scoped_release release;
          cit::cosine_costs(pairs, rounding, threads);
        };
        use_float32 ? build(rows(table, kCosineColumns, cosine_cost<float>))
                    : build(rows(table, kCosineColumns, cosine_cost<double>));
      },
      py::arg("table"), py::kw_only(), py::arg("use_float32"), py::arg("rounding"), py::arg("threads"));
  m.attr("FLOAT_COST_ERROR") = cit::kFloatCostError;
  m.attr("SINKHORN") = py::dict(
      py::arg("EPSILON_OF_SPREAD") = cit::kEpsilonOfSpread,
      py::arg("EPSILON_RANGE") = py::make_tuple(cit::kSmallestEpsilon, cit::kLargestEpsilon),
      py::arg("COARSE_ITERATIONS") = cit::kCoarseIterations, py::arg("COARSE_TOLERANCE") = cit::kCoarseTolerance,
      py::arg("LEAST_MASS") = cit::kLeastMass, py::arg("FLOAT_SHARE") = cit::kFloatShare,
      py::arg("FLOAT_TOLERANCE") = cit::kFloatTolerance, py::arg("LEAST_V") = cit::kLeastFloatV,
      py::arg("MOST_V") = cit::kMostFloatV, py::arg("LEAST_SUM") = cit::kLeastFloatSum);

  m.def("has_bfloat16_products", &cit::has_bfloat16_products);

  m.def(
      "token_gain_statistics",
      [](const MatrixRow& full, const MatrixRow& masked, const MatrixRow& weight, std::int64_t bias,
         std::int64_t targets, std::int64_t first_entry, float scale, float softcap, int threads,
         std::int64_t statistics) {
        py::gil_scoped_release release;
        cit::token_gain_statistics(matrix(full), matrix(masked), head(weight, bias),
                                   pointer<const std::int64_t>(targets), first_entry, {scale, softcap, threads},
                                   pointer<double>(statistics));
      },
      py::arg("full"), py::arg("masked"), py::arg("weight"), py::kw_only(), py::arg("bias"), py::arg("targets"),
      py::arg("first_entry"), py::arg("scale"), py::arg("softcap"), py::arg("threads"), py::arg("statistics"));

  m.def(
      "masked_jsd",
      [](const MatrixRow& live, const MatrixRow& frozen, const MatrixRow& weight_live, const MatrixRow& weight_frozen,
         std::int64_t bias_live, std::int64_t bias_frozen, std::int64_t temperature, std::int64_t row_weight,
         float scale, float softcap, int threads, const std::array<std::int64_t, 3>& addresses) {
        py::gil_scoped_release release;
        return cit::masked_jsd(matrix(live), matrix(frozen), head(weight_live, bias_live),
                               head(weight_frozen, bias_frozen), pointer<const float>(temperature),
                               pointer<const float>(row_weight), {scale, softcap, threads}, gradients(addresses));
      },
      py::arg("live"), py::arg("frozen"), py::arg("weight_live"), py::arg("weight_frozen"), py::kw_only(),
      py::arg("bias_live"), py::arg("bias_frozen"), py::arg("temperature"), py::arg("row_weight"), py::arg("scale"),
      py::arg("softcap"), py::arg("threads"), py::arg("gradients"));

  m.def(
      "linear_kl_divergence",
      [](const MatrixRow& live, const MatrixRow& frozen, const MatrixRow& weight_live, const MatrixRow& weight_frozen,
         std::int64_t bias_live, std::int64_t bias_frozen, std::int64_t temperature, std::int64_t row_weight,
         std::int64_t targets, float scale, float softcap, int threads, const std::array<std::int64_t, 3>& addresses) {
        py::gil_scoped_release release;
        return cit::linear_kl_divergence(matrix(live), matrix(frozen), head(weight_live, bias_live),
                                         head(weight_frozen, bias_frozen), pointer<const float>(temperature),
                                         pointer<const float>(row_weight), pointer<const std::int64_t>(targets),
                                         {scale, softcap, threads}, gradients(addresses));
      },
      py::arg("live"), py::arg("frozen"), py::arg("weight_live"), py::arg("weight_frozen"), py::kw_only(),
      py::arg("bias_live"), py::arg("bias_frozen"), py::arg("temperature"), py::arg("row_weight"), py::arg("targets"),
      py::arg("scale"), py::arg("softcap"), py::arg("threads"), py::arg("gradients"));

  m.def(
      "linear_cross_entropy",
      [](const MatrixRow& hidden, const MatrixRow& weight, std::int64_t bias, std::int64_t targets,
         std::int64_t row_weight, float entropy_gate, float scale, float softcap, int threads,
         const std::array<std::int64_t, 3>& addresses) {
        py::gil_scoped_release release;
        return cit::linear_cross_entropy(matrix(hidden), head(weight, bias), pointer<const std::int64_t>(targets),
                                         pointer<const float>(row_weight), entropy_gate, {scale, softcap, threads},
                                         gradients(addresses));
      },
      py::arg("hidden"), py::arg("weight"), py::kw_only(), py::arg("bias"), py::arg("targets"), py::arg("row_weight"),
      py::arg("entropy_gate"), py::arg("scale"), py::arg("softcap"), py::arg("threads"), py::arg("gradients"));

  m.def(
      "rms_norm",
      [](const std::array<std::int64_t, 3>& addresses, std::int64_t dtype, std::int64_t rows, std::int64_t width,
         float eps, bool from_one, int threads) {
        py::gil_scoped_release release;
        const auto [x, weight, y] = arrays(addresses, dtype);
        cit::rms_norm({rows, width, eps, from_one}, x, weight, y, threads);
      },
      py::arg("addresses"), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("width"), py::arg("eps"),
      py::arg("from_one"), py::arg("threads"));

  m.def(
      "rms_norm_backward",
      [](const std::array<std::int64_t, 4>& addresses, std::int64_t dtype, std::int64_t rows, std::int64_t width,
         float eps, bool from_one, int threads) {
        py::gil_scoped_release release;
        const auto [x, weight, grad, grad_x] = arrays(addresses, dtype);
        cit::rms_norm_backward({rows, width, eps, from_one}, x, weight, grad, grad_x, threads);
      },
      py::arg("addresses"), py::kw_only(), py::arg("dtype"), py::arg("rows"), py::arg("width"), py::arg("eps"),
      py::arg("from_one"), py::arg("threads"));
}
