// The Python module cit_fast._native_cuda: GPU kernels on addresses (torch.Tensor.data_ptr()), without torch. It can be
// imported where there is no driver. Arguments are checked in cit_fast/ops.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/balance_ema_kernels.h"
#include "cuda/balance_ema.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A row of the table in device memory is an EmaTensor as it lies in memory: the eight columns of csrc/bindings.cpp.
// After the rows come count + 1 integers, the running sum of chunks.
constexpr std::size_t kColumns = 8;
static_assert(sizeof(cit::EmaTensor) == kColumns * sizeof(std::int64_t));

cit::gpu::Lists lists(std::uintptr_t table, std::int64_t count, std::int64_t chunks) {
  return {pointer<const cit::EmaTensor>(table), pointer<const std::int64_t>(table) + kColumns * count, count, chunks};
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "CUDA kernels of cit_fast; use them through cit_fast.ops.";

  m.attr("CHUNK") = cit::kChunk;

  m.def("architectures", [] { return CIT_FAST_CUDA_ARCHITECTURES; });
  m.def("why_not", &cit::gpu::why_not, py::arg("device"));

  m.def(
      "balance_ema",
      [](std::uintptr_t table, std::int64_t count, std::int64_t chunks, std::int64_t rule, double decay,
         double fallback, std::uintptr_t partials, std::uintptr_t alphas, std::uintptr_t fallbacks, int device,
         std::uintptr_t stream) {
        cit::gpu::balance_ema(lists(table, count, chunks), {static_cast<cit::Rule>(rule), decay, fallback},
                              pointer<cit::gpu::Partial>(partials), pointer<float>(alphas), pointer<bool>(fallbacks),
                              device, pointer<CUstream_st>(stream));
      },
      py::arg("table"), py::kw_only(), py::arg("count"), py::arg("chunks"), py::arg("rule"), py::arg("decay"),
      py::arg("fallback"), py::arg("partials"), py::arg("alphas"), py::arg("fallbacks"), py::arg("device"),
      py::arg("stream"));

  m.def(
      "flush_balance_ema",
      [](std::uintptr_t table, std::int64_t count, std::int64_t chunks, std::uintptr_t alphas, int device,
         std::uintptr_t stream) {
        cit::gpu::flush_balance_ema(lists(table, count, chunks), pointer<const float>(alphas), device,
                                    pointer<CUstream_st>(stream));
      },
      py::arg("table"), py::kw_only(), py::arg("count"), py::arg("chunks"), py::arg("alphas"), py::arg("device"),
      py::arg("stream"));
}
