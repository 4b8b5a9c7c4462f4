// A parallel loop. The caller passes the number of threads, so that torch.set_num_threads governs us as well.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cit {

// Calls body(index) for 0 <= index < count, each index exactly once, in no fixed order. Whoever needs the same bits
// with any number of threads writes results to a slot per index and combines the slots afterwards in a fixed order.
//
// A thread takes some neighbouring indices at a time: what it prefetches past the end of one is then its own next one.
template <class Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  constexpr std::int64_t kMost = 8;
  const std::int64_t together = std::clamp<std::int64_t>(count / (16 * std::max(threads, 1)), 1, kMost);
#pragma omp parallel for schedule(dynamic, together) num_threads(threads) if (threads > 1 && count > 1)
#else
  (void)threads;
#endif
  for (std::int64_t index = 0; index < count; ++index) body(index);
}

// The same in one block of indices per thread, the same blocks in every call with this count; from the last index of
// the block to the first where `backwards`. What a thread read in one call is in its own cache in the next.
template <class Body>
void parallel_for_blocks(std::int64_t count, int threads, bool backwards, const Body& body) {
  const std::int64_t blocks = std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(count, 1));
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (blocks > 1)
#endif
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t first = count * block / blocks, last = count * (block + 1) / blocks;
    for (std::int64_t k = 0; k < last - first; ++k) body(backwards ? last - 1 - k : first + k);
  }
}

}  // namespace cit
