// Entropic transport of pairs of any sizes (wasserstein_team.cuh has the equations): one launch for all iterations of
// all pairs that ask for the same shared memory.
//
// An iteration reads K twice from shared memory, 8 bytes and two multiply-adds an entry, where memory would give 4
// bytes of it at a fiftieth of the rate of all processors' shared memories together. One block keeps a pair of up to
// 227 KB (sm_90; 163 KB on sm_80), which is some 230 x 230; small ones share a processor, eight of 80 x 80, with as
// many threads together. On sm_90 the eight blocks of a cluster keep up to some 650 x 650 and exchange sums of columns
// through distributed shared memory; beyond that they read K from memory, as one block does on GPUs without clusters.
// As many teams as run at a time take pairs from a queue, the longest work first, and stop with each pair by itself.
// The only atomic operation takes from that queue.
#include <cooperative_groups.h>

#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/wasserstein/wasserstein.h"
#include "cuda/wasserstein/wasserstein_team.cuh"

namespace cit::gpu {
namespace {

extern __shared__ __align__(16) unsigned char shared_memory[];

template <int kBlockThreads>
class BlockTeam {
 public:
  static constexpr int kThreads = kBlockThreads;
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ std::int64_t block() const { return blockIdx.x; }
  __device__ void sync() { __syncthreads(); }
  __device__ void team_sync() { __syncthreads(); }
  template <class Value>
  __device__ Value shuffle_xor(Value x, int mask) {
    return __shfl_xor_sync(~0u, x, mask);
  }
  template <class Value>
  __device__ Value* peer(Value* mine, int) {
    return mine;
  }
  __device__ unsigned char* shared() { return shared_memory; }
  __device__ std::uint32_t take(std::uint32_t* next) { return atomicAdd(next, 1u); }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
class ClusterTeam : public BlockTeam<kTransportThreads> {
 public:
  __device__ int rank() const { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
  __device__ int size() const { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
  __device__ void team_sync() { cooperative_groups::this_cluster().sync(); }
  template <class Value>
  __device__ Value* peer(Value* mine, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
  }
};
#endif

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 2 * kTransportThreads / kThreads)
    block_kernel(const __grid_constant__ TransportWork work) {
  BlockTeam<kThreads> team;
  transport_of_team(team, work);
}

using Kernel = void (*)(TransportWork);

Kernel block_kernel_of(int threads) {
  switch (threads) {
    case kTransportThreads / 4:
      return block_kernel<kTransportThreads / 4>;
    case kTransportThreads / 2:
      return block_kernel<kTransportThreads / 2>;
    default:
      return block_kernel<kTransportThreads>;
  }
}

__global__ void __launch_bounds__(kTransportThreads, 1) cluster_kernel(const __grid_constant__ TransportWork work) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  ClusterTeam team;
  transport_of_team(team, work);
#endif
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

bool has_clusters(int device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9 && attribute(cudaDevAttrClusterLaunch, device) != 0;
}

void allow(const void* kernel, std::size_t shared_bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  // Or the first-level cache keeps a part, and of two blocks that would fit a processor one waits.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

// `attribute` must live as long as the configuration.
cudaLaunchConfig_t configuration(int blocks, int teams, std::size_t shared_bytes, CUstream_st* stream,
                                 cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(blocks * teams));
  launch.blockDim = dim3(kTransportThreads);
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = stream;
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  launch.attrs = attribute;
  launch.numAttrs = 1;
  return launch;
}

}  // namespace

TransportTeam transport_team_on(std::int64_t n, std::int64_t m, int device) {
  const auto capacity = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return transport_team(n, m, capacity, has_clusters(device), kTransportThreads);
}

int transport_teams_at_once(int blocks, int threads, std::size_t shared_bytes, int device) {
  check(cudaSetDevice(device));
  int teams = 0;
  if (blocks == 1) {
    const Kernel kernel = block_kernel_of(threads);
    allow(reinterpret_cast<const void*>(kernel), shared_bytes);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&teams, kernel, threads, shared_bytes));
    teams *= attribute(cudaDevAttrMultiProcessorCount, device);
  } else {
    allow(reinterpret_cast<const void*>(cluster_kernel), shared_bytes);
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t launch = configuration(blocks, 1, shared_bytes, nullptr, &cluster);
    check(cudaOccupancyMaxActiveClusters(&teams, cluster_kernel, &launch));
  }
  return teams;
}

void transport(const TransportWork& work, int blocks, int threads, int teams, int device, CUstream_st* stream) {
  if (work.count == 0) return;
  check(cudaSetDevice(device));
  if (blocks == 1) {
    const Kernel kernel = block_kernel_of(threads);
    allow(reinterpret_cast<const void*>(kernel), work.shared_bytes);
    kernel<<<static_cast<unsigned>(teams), static_cast<unsigned>(threads), work.shared_bytes, stream>>>(work);
    check(cudaGetLastError());
  } else {
    allow(reinterpret_cast<const void*>(cluster_kernel), work.shared_bytes);
    cudaLaunchAttribute cluster;
    const cudaLaunchConfig_t launch = configuration(blocks, teams, work.shared_bytes, stream, &cluster);
    check(cudaLaunchKernelEx(&launch, cluster_kernel, work));
  }
}

}  // namespace cit::gpu
