// Entropic transport of many pairs of point clouds on a GPU: the launches of wasserstein.cu. The definition is
// cit_fast/ops/wasserstein/reference.py, the same steps on the CPU are csrc/cpu/wasserstein/wasserstein.cpp. Everything
// is enqueued on the stream; nothing is allocated, copied or waited for. Errors of the CUDA runtime are
// std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>

#include "balance_weight.h"  // CIT_HOST_DEVICE

struct CUstream_st;

namespace cit::gpu {

constexpr int kTransportThreads = 256;  // of a block at most; part of the order of summation
constexpr int kMostBlocks = 8;          // of a team: a cluster of that size runs on every GPU that has clusters
constexpr int kWarpSums = 8;            // numbers that a warp leaves for the others of its block

// A row of the table in device memory.
struct TransportRow {
  std::int64_t cost;    // first entry in costs and kernels
  std::int64_t stride;  // between rows of costs and of kernels
  std::int64_t n, m;
  std::int64_t a, b;  // first weight
};

// Costs are shares of the largest cost of their pair. All pointers are to device memory.
struct TransportWork {
  const TransportRow* table;
  const std::int32_t* order;  // [count] rows of the table, the longest work first
  std::uint32_t count;
  std::uint32_t* next;  // [1] 0 before the launch: where in `order` the next free team goes on
  const float* costs;
  float* kernels;              // as large as costs; used by pairs that do not fit the shared memory
  const double* weights;       // positive, sum 1 in each cloud
  const double* epsilons;      // [rows of the table]; 0: automatic
  double* results;             // [rows of the table, 5], see cpu/wasserstein.h: lower .. epsilon
  double* scratch;             // transport_scratch(rows, columns) for each block
  std::int64_t rows, columns;  // most rows that a block has of a pair, most columns
  std::size_t shared_bytes;    // of a block
  double tolerance, max_iterations;
};

// What a block holds in shared memory for a pair with m columns, but for K: sums of columns, v, sums of warps.
CIT_HOST_DEVICE inline std::size_t transport_fixed_bytes(std::int64_t m, int threads) {
  const std::int64_t width = m > threads ? m : threads;
  return 2 * sizeof(double) * static_cast<std::size_t>(width) + sizeof(double) * kWarpSums * (threads / 32 + 1) +
         sizeof(float) * static_cast<std::size_t>((m + 1) / 2 * 2);
}

// And for each row of K that it holds at a time, with the row's scaling.
CIT_HOST_DEVICE inline std::size_t transport_row_bytes(std::int64_t m) {
  return sizeof(float) * static_cast<std::size_t>(m + 1);
}

CIT_HOST_DEVICE inline std::int64_t transport_rows(std::int64_t n, int blocks) {
  return (n + blocks - 1) / blocks;
}

// Doubles: four vectors of columns, three of rows.
CIT_HOST_DEVICE inline std::int64_t transport_scratch(std::int64_t rows, std::int64_t columns) {
  return 4 * columns + 3 * rows;
}

struct TransportTeam {
  int blocks;                // 0: the pair has too many columns
  int threads;               // of each of them
  std::size_t shared_bytes;  // that each of them asks for
  bool resident;             // else `kernels` is needed
};

// The team for a pair. K stays in shared memory for all iterations if one block takes it with an eighth of what a
// processor has, a quarter or half, so that eight, four or two run at a time, with as many threads together; or with
// all of it (`capacity`); or if two, four or eight blocks do. Else it is read from memory once an iteration.
inline TransportTeam transport_team(std::int64_t n, std::int64_t m, std::size_t capacity, bool clusters,
                                    int most_threads) {
  constexpr std::size_t kReserved = 1024;  // of a processor's shared memory, for each block
  constexpr int kWarpThreads = 32;
  const auto bytes = [&](int blocks, int threads) {
    return transport_fixed_bytes(m, threads) +
           transport_row_bytes(m) * static_cast<std::size_t>(transport_rows(n, blocks));
  };
  for (const int share : {8, 4, 2, 1}) {
    const int wanted = share == 1 ? most_threads : 2 * most_threads / share;
    const int threads = wanted > kWarpThreads ? wanted : kWarpThreads;
    const std::size_t whole = capacity + kReserved;
    if (bytes(1, threads) + kReserved <= whole / share) return {1, threads, whole / share - kReserved, true};
  }
  const int most = clusters ? kMostBlocks : 1;
  for (int blocks = 2; blocks <= most; blocks *= 2) {
    if (bytes(blocks, most_threads) <= capacity) return {blocks, most_threads, capacity, true};
  }
  if (transport_fixed_bytes(m, most_threads) + transport_row_bytes(m) <= capacity) {
    return {most, most_threads, capacity, false};
  }
  return {0, 0, 0, false};
}

// transport_team() on a device, and how many such teams it runs at a time (none on a slice of a GPU that is too small).
TransportTeam transport_team_on(std::int64_t n, std::int64_t m, int device);
int transport_teams_at_once(int blocks, int threads, std::size_t shared_bytes, int device);

void transport(const TransportWork& work, int blocks, int threads, int teams, int device, CUstream_st* stream);

}  // namespace cit::gpu
