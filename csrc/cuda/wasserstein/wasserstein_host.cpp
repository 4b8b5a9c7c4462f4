// The GPU code of wasserstein_team.cuh on the host, as a library for tests/ops/test_wasserstein_cuda.py: two warps a
// block, to be quick.
#include "cuda/wasserstein/host_team.h"
#include "cuda/wasserstein/wasserstein_team.cuh"

namespace {
constexpr int kThreads = 64;
}

extern "C" {

int transport_team(std::int64_t n, std::int64_t m, std::int64_t capacity, bool clusters, std::int64_t* bytes,
                   bool* resident) {
  const auto team = cit::gpu::transport_team(n, m, static_cast<std::size_t>(capacity), clusters, kThreads);
  *bytes = static_cast<std::int64_t>(team.shared_bytes);
  *resident = team.resident;
  return team.blocks;
}

std::int64_t transport_scratch(std::int64_t rows, std::int64_t columns) {
  return cit::gpu::transport_scratch(rows, columns);
}

// True: as it should be; false: the threads of a team lost each other.
bool transport(const cit::gpu::TransportWork* work, int blocks, int teams) {
  try {
    cit::gpu::HostTeams<kThreads> host;
    host.run(blocks, teams, work->shared_bytes, [&](auto& team) { cit::gpu::transport_of_team(team, *work); });
  } catch (const std::logic_error&) {
    return false;
  }
  return true;
}
}
