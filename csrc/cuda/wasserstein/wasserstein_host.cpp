// The GPU code of wasserstein_team.cuh on the host, as a library for tests/ops/test_wasserstein_cuda.py: two warps a
// block, or one, to be quick.
#include "cuda/wasserstein/host_team.h"
#include "cuda/wasserstein/wasserstein_team.cuh"

namespace {
constexpr int kThreads = 64;

template <int kBlockThreads>
void run(const cit::gpu::TransportWork& work, int blocks, int teams) {
  cit::gpu::HostTeams<kBlockThreads> host;
  host.run(blocks, teams, work.shared_bytes, [&](auto& team) { cit::gpu::transport_of_team(team, work); });
}

}  // namespace

extern "C" {

int transport_team(std::int64_t n, std::int64_t m, std::int64_t capacity, bool clusters, int* threads,
                   std::int64_t* bytes, bool* resident) {
  const auto team = cit::gpu::transport_team(n, m, static_cast<std::size_t>(capacity), clusters, kThreads);
  *threads = team.threads;
  *bytes = static_cast<std::int64_t>(team.shared_bytes);
  *resident = team.resident;
  return team.blocks;
}

std::int64_t transport_scratch(std::int64_t rows, std::int64_t columns) {
  return cit::gpu::transport_scratch(rows, columns);
}

// True: as it should be; false: the threads of a team lost each other.
bool transport(const cit::gpu::TransportWork* work, int blocks, int threads, int teams) {
  try {
    threads == kThreads ? run<kThreads>(*work, blocks, teams) : run<kThreads / 2>(*work, blocks, teams);
  } catch (const std::logic_error&) {
    return false;
  }
  return true;
}
}
