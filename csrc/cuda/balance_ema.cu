// Balance-weight EMA (csrc/cpu/balance_ema.h has the equations) for a list of tensors of any size in three launches.
//
// Bytes per float32 element: norms 20 (read p, e, g, g_prev; write g_prev), apply 12 (read p, e; write e); no
// arithmetic to speak of, so all that counts is wide loads and enough of them in flight. The unit of work is a chunk of
// 16 Ki elements of one tensor; a grid that fills the GPU once walks over all chunks of all tensors, so 224 small
// tensors cost the same launches as one large one. Partial sums go to one slot per chunk and are added in double in a
// fixed order: no atomics, and the bits depend neither on the grid nor on the GPU. The weights never visit the host.
#include <stdexcept>
#include <string>

#include "cuda/balance_ema.h"
#include "cuda/balance_ema_math.cuh"

namespace cit::gpu {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

__device__ Partial shuffle_down(const Partial& x, int offset) {
  return {__shfl_down_sync(0xffffffffu, x.distance, offset), __shfl_down_sync(0xffffffffu, x.gradient, offset),
          __shfl_down_sync(0xffffffffu, x.gradient_change, offset)};
}

// The sum over the block, in thread 0.
__device__ Partial block_sum(Partial sum) {
  __shared__ Partial of_warp[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum = sum + shuffle_down(sum, offset);
  __syncthreads();  // of_warp may still be read for the chunk before
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return sum;
  Partial total = of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) total = total + of_warp[warp];
  return total;
}

struct Chunk {
  std::int64_t tensor;
  std::int64_t begin;
  int count;
};

__device__ Chunk find_chunk(const Lists& lists, std::int64_t chunk) {
  const std::int64_t i = tensor_of_chunk(lists.first_chunk, lists.count, chunk);
  const std::int64_t begin = (chunk - lists.first_chunk[i]) * kChunk;
  const std::int64_t rest = lists.tensors[i].numel - begin;
  return {i, begin, static_cast<int>(rest < kChunk ? rest : kChunk)};
}

__global__ void __launch_bounds__(kThreads) norms_kernel(Lists lists, Partial* partials) {
  for (std::int64_t k = blockIdx.x; k < lists.chunks; k += gridDim.x) {
    const Chunk chunk = find_chunk(lists, k);
    const EmaTensor tensor = lists.tensors[chunk.tensor];
    const Partial sum = block_sum(norms_of_thread(tensor, chunk.begin, chunk.count, threadIdx.x));
    if (threadIdx.x == 0) partials[k] = sum;
  }
}

// One warp per tensor.
__global__ void __launch_bounds__(kThreads)
    weights_kernel(Lists lists, RuleOptions options, const Partial* partials, float* alphas, bool* fallbacks) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i >= lists.count) return;
  const int lane = threadIdx.x % kWarp;
  Norms norms = norms_of_lane(partials, lists.first_chunk[i], lists.first_chunk[i + 1], lane);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    norms.distance += __shfl_down_sync(0xffffffffu, norms.distance, offset);
    norms.gradient += __shfl_down_sync(0xffffffffu, norms.gradient, offset);
    norms.gradient_change += __shfl_down_sync(0xffffffffu, norms.gradient_change, offset);
  }
  if (lane != 0) return;
  const Weight weight = balance_weight(norms, options);
  alphas[i] = weight.alpha;
  fallbacks[i] = weight.fallback;
}

__global__ void __launch_bounds__(kThreads) apply_kernel(Lists lists, const float* alphas) {
  for (std::int64_t k = blockIdx.x; k < lists.chunks; k += gridDim.x) {
    // Backwards: the chunks that norms_kernel read last are the ones still in the cache.
    const Chunk chunk = find_chunk(lists, lists.chunks - 1 - k);
    const float alpha = alphas[chunk.tensor];
    if (alpha == 0.0f) continue;
    const EmaTensor tensor = lists.tensors[chunk.tensor];
    apply_of_thread(tensor, alpha, chunk.begin, chunk.count, threadIdx.x);
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// As many blocks as the GPU runs at once, at most one per chunk.
template <class Kernel>
unsigned grid_size(Kernel kernel, std::int64_t chunks, int device) {
  int processors = 0, blocks = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
  const std::int64_t resident = static_cast<std::int64_t>(processors) * blocks;
  return static_cast<unsigned>(chunks < resident ? chunks : resident);
}

}  // namespace

void balance_ema(const Lists& lists, const RuleOptions& options, Partial* partials, float* alphas, bool* fallbacks,
                 int device, CUstream_st* stream) {
  if (lists.count == 0) return;
  check(cudaSetDevice(device));
  if (lists.chunks > 0) {
    norms_kernel<<<grid_size(norms_kernel, lists.chunks, device), kThreads, 0, stream>>>(lists, partials);
    check(cudaGetLastError());
  }
  const auto blocks = static_cast<unsigned>((lists.count + kWarps - 1) / kWarps);
  weights_kernel<<<blocks, kThreads, 0, stream>>>(lists, options, partials, alphas, fallbacks);
  check(cudaGetLastError());
  flush_balance_ema(lists, alphas, device, stream);
}

void flush_balance_ema(const Lists& lists, const float* alphas, int device, CUstream_st* stream) {
  if (lists.chunks == 0) return;
  check(cudaSetDevice(device));
  apply_kernel<<<grid_size(apply_kernel, lists.chunks, device), kThreads, 0, stream>>>(lists, alphas);
  check(cudaGetLastError());
}

std::string why_not(int device) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, norms_kernel);
  cudaGetLastError();  // or the next launch would report it
  return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

}  // namespace cit::gpu
