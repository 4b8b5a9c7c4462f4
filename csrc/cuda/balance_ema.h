// Balance-weight EMA on a GPU: the launches of balance_ema.cu. Everything is enqueued on the stream; nothing is
// allocated, copied or waited for. Errors of the CUDA runtime are std::runtime_error.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/balance_ema.h"

struct CUstream_st;  // what a cudaStream_t points to; the bindings are compiled without the CUDA headers

namespace cit::gpu {

struct Partial;  // three floats: the sums of one chunk

// The lists of one call. Both arrays are in device memory.
struct Lists {
  const EmaTensor* tensors;         // [count]
  const std::int64_t* first_chunk;  // [count + 1]: running sum of ceil(numel / kChunk), from 0
  std::int64_t count;
  std::int64_t chunks;  // first_chunk[count]
};

// partials [chunks], alphas [count] and fallbacks [count] are device memory; partials is scratch.
void balance_ema(const Lists& lists, const RuleOptions& options, Partial* partials, float* alphas, bool* fallbacks,
                 int device, CUstream_st* stream);

void flush_balance_ema(const Lists& lists, const float* alphas, int device, CUstream_st* stream);

// Empty when the kernels can run on the device, else why not in the words of the CUDA runtime.
std::string why_not(int device);

}  // namespace cit::gpu
