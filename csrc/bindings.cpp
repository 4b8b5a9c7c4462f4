// The Python module cit_fast._native: the only file here that knows Python. Tensors arrive as addresses
// (torch.Tensor.data_ptr()), so this builds without torch and one binary serves every torch version. Arguments are
// checked in cit_fast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/balance_ema.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

using Table = std::vector<std::int64_t>;

// One row per tensor: numel, param, its dtype, average, grad, its dtype, previous_grad (0 = none), its dtype.
constexpr std::size_t kEmaColumns = 8;
// The same, then exp_avg, exp_avg_sq.
constexpr std::size_t kAdamWColumns = 10;

template <class T>
T* pointer(std::int64_t address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

cit::EmaTensor ema_tensor(const std::int64_t* row) {
  return {row[0],
          {pointer<void>(row[1]), static_cast<cit::DType>(row[2])},
          pointer<float>(row[3]),
          {pointer<void>(row[4]), static_cast<cit::DType>(row[5])},
          {pointer<void>(row[6]), static_cast<cit::DType>(row[7])}};
}

cit::AdamWTensor adamw_tensor(const std::int64_t* row) {
  return {ema_tensor(row), pointer<float>(row[8]), pointer<float>(row[9])};
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

cit::RuleOptions rule_options(std::int64_t rule, double decay, double fallback) {
  return {static_cast<cit::Rule>(rule), decay, fallback};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native CPU kernels of cit_fast; use them through cit_fast.ops.";

  m.def("simd_name", &cit::simd_name);
  m.def("simd_levels", &cit::simd_levels);
  m.def("set_simd_level", &cit::set_simd_level, py::arg("name"));

  m.def(
      "balance_ema",
      [](const Table& table, std::int64_t rule, double decay, double fallback, int threads, std::int64_t alphas,
         std::int64_t fallbacks) {
        const auto tensors = rows(table, kEmaColumns, ema_tensor);
        py::gil_scoped_release release;
        cit::balance_ema(tensors, rule_options(rule, decay, fallback), threads, pointer<float>(alphas),
                         pointer<bool>(fallbacks));
      },
      py::arg("table"), py::kw_only(), py::arg("rule"), py::arg("decay"), py::arg("fallback"), py::arg("threads"),
      py::arg("alphas"), py::arg("fallbacks"));

  m.def(
      "adamw_balance_ema",
      [](const Table& table, std::int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
         std::int64_t rule, double decay, double fallback, int threads, std::int64_t alphas, std::int64_t fallbacks) {
        const auto tensors = rows(table, kAdamWColumns, adamw_tensor);
        py::gil_scoped_release release;
        cit::adamw_balance_ema(tensors, {step, lr, beta1, beta2, eps, weight_decay},
                               rule_options(rule, decay, fallback), threads, pointer<float>(alphas),
                               pointer<bool>(fallbacks));
      },
      py::arg("table"), py::kw_only(), py::arg("step"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
      py::arg("eps"), py::arg("weight_decay"), py::arg("rule"), py::arg("decay"), py::arg("fallback"),
      py::arg("threads"), py::arg("alphas"), py::arg("fallbacks"));

  m.def(
      "flush_balance_ema",
      [](const Table& table, int threads, std::int64_t alphas) {
        const auto tensors = rows(table, kEmaColumns, ema_tensor);
        py::gil_scoped_release release;
        cit::flush_balance_ema(tensors, threads, pointer<float>(alphas));
      },
      py::arg("table"), py::kw_only(), py::arg("threads"), py::arg("alphas"));
}
