// The Python module cit_fast._native_cuda: GPU kernels on addresses (torch.Tensor.data_ptr()), without torch. It can be
// imported where there is no driver. Arguments are checked in cit_fast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "cuda/balance_ema/balance_ema.h"
#include "cuda/wasserstein/wasserstein.h"

namespace py = pybind11;

namespace {

using cit::gpu::Launch;
using cit::gpu::Outcome;

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Launch launch(std::uintptr_t table, std::int64_t count, std::int64_t blocks, std::uintptr_t slots, int device,
              std::uintptr_t stream) {
  return {pointer<const std::int64_t>(table), count, blocks, pointer<void>(slots), device,
          pointer<CUstream_st>(stream)};
}

Outcome outcome(std::uintptr_t norms, std::uintptr_t alphas, std::uintptr_t fallbacks, std::uintptr_t remaining,
                std::int64_t rule, double decay, double fallback, double scale, bool store_grads) {
  return {pointer<double>(norms),
          pointer<float>(alphas),
          pointer<bool>(fallbacks),
          pointer<float>(remaining),
          {static_cast<cit::Rule>(rule), decay, fallback, scale},
          store_grads};
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "CUDA kernels of cit_fast; use them through cit_fast.ops.";

  m.attr("STREAMS") = static_cast<int>(cit::gpu::kStreams);
  m.attr("PIECE") = cit::gpu::kPiece;
  m.attr("SLOT_BYTES") = 16;
  m.attr("STEP_BYTES") = sizeof(cit::gpu::Step);

  m.def("architectures", [] { return CIT_FAST_CUDA_ARCHITECTURES; });
  m.def("why_not", &cit::gpu::why_not, py::arg("device"));

  m.def(
      "layout",
      [](const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& dtypes) {
        cit::gpu::Layout layout = cit::gpu::make_layout(sizes, dtypes);
        return std::make_tuple(std::move(layout.words), layout.slots, layout.blocks);
      },
      py::arg("sizes"), py::arg("dtypes"));

  m.def(
      "upload",
      [](std::uintptr_t target, const std::vector<std::int64_t>& words, int device, std::uintptr_t stream) {
        cit::gpu::upload(pointer<std::int64_t>(target), words.data(), static_cast<std::int64_t>(words.size()), device,
                         pointer<CUstream_st>(stream));
      },
      py::arg("target"), py::arg("words"), py::kw_only(), py::arg("device"), py::arg("stream"));

  m.def(
      "balance_norms",
      [](std::uintptr_t table, std::int64_t count, std::int64_t blocks, std::uintptr_t slots, int device,
         std::uintptr_t stream, std::uintptr_t norms, bool store_grads) {
        cit::gpu::balance_norms(launch(table, count, blocks, slots, device, stream),
                                outcome(norms, 0, 0, 0, 0, 0.0, 0.0, 0.0, store_grads));
      },
      py::arg("table"), py::kw_only(), py::arg("count"), py::arg("blocks"), py::arg("slots"), py::arg("device"),
      py::arg("stream"), py::arg("norms"), py::arg("store_grads"));

  m.def(
      "balance_ema",
      [](std::uintptr_t table, std::int64_t count, std::int64_t blocks, std::uintptr_t slots, int device,
         std::uintptr_t stream, std::uintptr_t norms, std::uintptr_t alphas, std::uintptr_t fallbacks,
         std::uintptr_t remaining, std::int64_t rule, double decay, double fallback, double scale, bool store_grads,
         bool nearest, std::uint32_t seed) {
        cit::gpu::balance_ema(launch(table, count, blocks, slots, device, stream),
                              outcome(norms, alphas, fallbacks, remaining, rule, decay, fallback, scale, store_grads),
                              {seed, nearest});
      },
      py::arg("table"), py::kw_only(), py::arg("count"), py::arg("blocks"), py::arg("slots"), py::arg("device"),
      py::arg("stream"), py::arg("norms"), py::arg("alphas"), py::arg("fallbacks"), py::arg("remaining"),
      py::arg("rule"), py::arg("decay"), py::arg("fallback"), py::arg("scale"), py::arg("store_grads"),
      py::arg("nearest"), py::arg("seed"));

  m.def(
      "adamw_balance_ema",
      [](std::uintptr_t table, std::int64_t count, std::int64_t blocks, std::uintptr_t slots, int device,
         std::uintptr_t stream, std::uintptr_t norms, std::uintptr_t alphas, std::uintptr_t fallbacks,
         std::uintptr_t remaining, std::int64_t rule, double decay, double fallback, double scale, bool store_grads,
         bool nearest, std::uint32_t seed, std::int64_t step, double lr, double beta1, double beta2, double eps,
         double weight_decay, std::uintptr_t step_on_device) {
        cit::gpu::adamw_balance_ema(
            launch(table, count, blocks, slots, device, stream),
            outcome(norms, alphas, fallbacks, remaining, rule, decay, fallback, scale, store_grads),
            cit::gpu::step_on_host({beta1, beta2, eps, weight_decay}, step, lr, {seed, nearest}),
            pointer<const cit::gpu::Step>(step_on_device));
      },
      py::arg("table"), py::kw_only(), py::arg("count"), py::arg("blocks"), py::arg("slots"), py::arg("device"),
      py::arg("stream"), py::arg("norms"), py::arg("alphas"), py::arg("fallbacks"), py::arg("remaining"),
      py::arg("rule"), py::arg("decay"), py::arg("fallback"), py::arg("scale"), py::arg("store_grads"),
      py::arg("nearest") = false, py::arg("seed") = 0, py::arg("step") = 1, py::arg("lr") = 0.0, py::arg("beta1") = 0.0,
      py::arg("beta2") = 0.0, py::arg("eps") = 0.0, py::arg("weight_decay") = 0.0, py::arg("step_on_device") = 0);

  m.def(
      "step_on_device",
      [](std::uintptr_t target, std::uintptr_t step, bool step_is_float, std::uintptr_t lr, bool lr_is_float,
         double beta1, double beta2, double eps, double weight_decay, bool nearest, std::uint32_t seed, int device,
         std::uintptr_t stream) {
        cit::gpu::step_on_device({beta1, beta2, eps, weight_decay}, pointer<const void>(step), step_is_float,
                                 pointer<const void>(lr), lr_is_float, {seed, nearest}, pointer<cit::gpu::Step>(target),
                                 device, pointer<CUstream_st>(stream));
      },
      py::arg("target"), py::kw_only(), py::arg("step"), py::arg("step_is_float"), py::arg("lr"),
      py::arg("lr_is_float"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
      py::arg("nearest"), py::arg("seed"), py::arg("device"), py::arg("stream"));

  m.def(
      "flush_balance_ema",
      [](std::uintptr_t table, std::int64_t count, std::int64_t blocks, std::uintptr_t slots, int device,
         std::uintptr_t stream, std::uintptr_t alphas, bool nearest, std::uint32_t seed) {
        cit::gpu::flush_balance_ema(launch(table, count, blocks, slots, device, stream), pointer<const float>(alphas),
                                    {seed, nearest});
      },
      py::arg("table"), py::kw_only(), py::arg("count"), py::arg("blocks"), py::arg("slots"), py::arg("device"),
      py::arg("stream"), py::arg("alphas"), py::arg("nearest"), py::arg("seed"));

  m.def(
      "transport_team",
      [](std::int64_t n, std::int64_t columns, int device) {
        const cit::gpu::TransportTeam team = cit::gpu::transport_team_on(n, columns, device);
        return std::make_tuple(team.blocks, team.threads, team.shared_bytes, team.resident);
      },
      py::arg("n"), py::arg("m"), py::arg("device"));

  m.def("transport_teams_at_once", &cit::gpu::transport_teams_at_once, py::arg("blocks"), py::arg("threads"),
        py::arg("shared_bytes"), py::arg("device"));

  m.def("transport_scratch", &cit::gpu::transport_scratch, py::arg("rows"), py::arg("columns"));

  m.def(
      "transport",
      [](std::uintptr_t table, std::uintptr_t order, std::uint32_t count, std::uintptr_t next, std::uintptr_t costs,
         std::uintptr_t kernels, std::uintptr_t weights, std::uintptr_t epsilons, std::uintptr_t results,
         std::uintptr_t scratch, std::int64_t rows, std::int64_t columns, std::size_t shared_bytes, double tolerance,
         std::int64_t max_iterations, int blocks, int threads, int teams, int device, std::uintptr_t stream) {
        cit::gpu::transport(
            {pointer<const cit::gpu::TransportRow>(table), pointer<const std::int32_t>(order), count,
             pointer<std::uint32_t>(next), pointer<const float>(costs), pointer<float>(kernels),
             pointer<const double>(weights), pointer<const double>(epsilons), pointer<double>(results),
             pointer<double>(scratch), rows, columns, shared_bytes, tolerance, static_cast<double>(max_iterations)},
            blocks, threads, teams, device, pointer<CUstream_st>(stream));
      },
      py::kw_only(), py::arg("table"), py::arg("order"), py::arg("count"), py::arg("next"), py::arg("costs"),
      py::arg("kernels"), py::arg("weights"), py::arg("epsilons"), py::arg("results"), py::arg("scratch"),
      py::arg("rows"), py::arg("columns"), py::arg("shared_bytes"), py::arg("tolerance"), py::arg("max_iterations"),
      py::arg("blocks"), py::arg("threads"), py::arg("teams"), py::arg("device"), py::arg("stream"));
}
