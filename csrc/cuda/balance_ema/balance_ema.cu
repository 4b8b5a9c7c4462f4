// Balance-weight EMA (csrc/cpu/balance_ema/balance_ema.h has the equations) for a list of tensors of any size: the
// norms with the weights in one launch, the update of the averages in another; with AdamW everything in one.
//
// Bytes per float32 element: norms 20 (read p, e, g, g_prev; write g_prev), apply 12 (read p, e; write e), AdamW with
// everything 44 (read p, g, m, v, e, g_prev; write p, m, v, e, g_prev); 4 less where g_prev is not written. There is no
// arithmetic to speak of, so all that counts is wide loads and enough of them in flight: two blocks of 256 threads on a
// processor, each thread with up to twelve 16-byte loads. One block works on about 8 Ki elements of one tensor
// (layout.h); the GPU's scheduler hands the blocks out, which evens out the load of lists that are small.
//
// Sums go to one slot for each piece of a tensor and are added in double in a fixed order by whichever block of the
// tensor is last: the only atomic operation counts blocks, and the bits depend neither on the order of the blocks nor
// on the GPU. The weights never visit the host.
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "cuda/balance_ema/balance_ema.h"
#include "cuda/balance_ema/balance_ema_blocks.cuh"

namespace cit::gpu {
namespace {

__shared__ Scratch shared_scratch;

struct DeviceBlock {
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  // Backwards in the second of two kernels: what the first read last is still in the cache.
  __device__ std::int64_t index() const { return backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x; }
  __device__ void sync() { __syncthreads(); }
  __device__ float shuffle_down(float x, int offset, int lanes) { return __shfl_down_sync(~0u, x, offset, lanes); }
  __device__ double shuffle_down(double x, int offset, int lanes) { return __shfl_down_sync(~0u, x, offset, lanes); }
  template <class Sums>
  __device__ Sums shuffle_down(const Sums& x, int offset, int lanes) {
    return {shuffle_down(x.distance, offset, lanes), shuffle_down(x.gradient, offset, lanes),
            shuffle_down(x.gradient_change, offset, lanes)};
  }
  __device__ Scratch& scratch() { return shared_scratch; }
  __device__ void fence() { __threadfence(); }
  __device__ std::uint32_t add(std::uint32_t* counter) { return atomicAdd(counter, 1u); }
  // Past the first-level cache, which does not see what other processors write.
  __device__ Partial fresh(const Slot& slot) {
    const float4 bits = __ldcg(reinterpret_cast<const float4*>(&slot));
    return {bits.x, bits.y, bits.z};
  }

  bool backwards = false;
};

__global__ void __launch_bounds__(kThreads, 3) norms_kernel(Lists lists, Slot* slots, Outcome outcome) {
  DeviceBlock block;
  norms_of_block(block, lists, slots, outcome);
}

__global__ void __launch_bounds__(kThreads, 2)
    adamw_kernel(Lists lists, Slot* slots, Outcome outcome, Step step, const Step* on_device) {
  DeviceBlock block;
  adamw_of_block(block, lists, slots, outcome, step, on_device);
}

__global__ void __launch_bounds__(kThreads, 4) apply_kernel(Lists lists, const float* alphas, Rounding rounding) {
  DeviceBlock block{true};
  apply_of_block(block, lists, alphas, rounding);
}

// As many as fit the arguments of a launch: 4 KiB, and 32 KiB since CUDA 12.1.
#if CUDART_VERSION >= 12010
constexpr int kWords = 4000;
#else
constexpr int kWords = 500;
#endif

struct Words {
  std::int64_t word[kWords];
};

__global__ void __launch_bounds__(kThreads)
    upload_kernel(std::int64_t* target, const __grid_constant__ Words words, int count) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i < count) target[i] = words.word[i];
}

__global__ void step_kernel(AdamW adamw, const void* step, bool step_is_float, const void* lr, bool lr_is_float,
                            Rounding rounding, Step* target) {
  const auto at = step_is_float ? static_cast<std::int64_t>(*static_cast<const float*>(step))
                                : *static_cast<const std::int64_t*>(step);
  const double rate = lr_is_float ? *static_cast<const float*>(lr) : *static_cast<const double*>(lr);
  rounding.seed += static_cast<std::uint32_t>(at);
  *target = make_step(adamw, static_cast<double>(at), rate, rounding);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), const Launch& launch, const Arguments&... arguments) {
  if (launch.blocks == 0) return;
  if (launch.blocks > 0x7fffffff) throw std::runtime_error("CUDA: the tensors of one call hold too many elements");
  check(cudaSetDevice(launch.device));
  const Lists lists = open_table(launch.table, launch.count);
  kernel<<<static_cast<unsigned>(launch.blocks), kThreads, 0, launch.stream>>>(lists, arguments...);
  check(cudaGetLastError());
}

}  // namespace

void upload(std::int64_t* target, const std::int64_t* words, std::int64_t count, int device, CUstream_st* stream) {
  if (count == 0) return;
  check(cudaSetDevice(device));
  Words some;
  for (std::int64_t at = 0; at < count; at += kWords) {
    const int n = static_cast<int>(count - at < kWords ? count - at : kWords);
    std::memcpy(some.word, words + at, n * sizeof *words);
    upload_kernel<<<(n + kThreads - 1) / kThreads, kThreads, 0, stream>>>(target + at, some, n);
    check(cudaGetLastError());
  }
}

void balance_norms(const Launch& launch, const Outcome& outcome) {
  start(norms_kernel, launch, static_cast<Slot*>(launch.slots), outcome);
}

void balance_ema(const Launch& launch, const Outcome& outcome, const Rounding& rounding) {
  balance_norms(launch, outcome);
  flush_balance_ema(launch, outcome.alphas, rounding);
}

void flush_balance_ema(const Launch& launch, const float* alphas, const Rounding& rounding) {
  start(apply_kernel, launch, alphas, rounding);
}

Step step_on_host(const AdamW& adamw, std::int64_t step, double lr, const Rounding& rounding) {
  return make_step(adamw, static_cast<double>(step), lr, rounding);
}

void step_on_device(const AdamW& adamw, const void* step, bool step_is_float, const void* lr, bool lr_is_float,
                    const Rounding& rounding, Step* target, int device, CUstream_st* stream) {
  check(cudaSetDevice(device));
  step_kernel<<<1, 1, 0, stream>>>(adamw, step, step_is_float, lr, lr_is_float, rounding, target);
  check(cudaGetLastError());
}

void adamw_balance_ema(const Launch& launch, const Outcome& outcome, const Step& step, const Step* on_device) {
  start(adamw_kernel, launch, static_cast<Slot*>(launch.slots), outcome, step, on_device);
}

std::string why_not(int device) {
  static std::mutex mutex;
  static std::unordered_map<int, std::string> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(device); found != known.end()) return found->second;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(device);
  const auto load = [&](auto* kernel) {
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  };
  load(norms_kernel);
  load(adamw_kernel);
  load(apply_kernel);
  load(upload_kernel);
  load(step_kernel);
  cudaGetLastError();  // or the next launch would report it
  return known[device] = error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

}  // namespace cit::gpu
