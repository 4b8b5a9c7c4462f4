// Balance-weight EMA on a GPU: the launches of balance_ema.cu. Everything is enqueued on the stream; nothing is
// allocated, copied from the host's memory or waited for, so every call can be captured into a CUDA graph. Errors of
// the CUDA runtime are std::runtime_error.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/balance_ema/balance_ema.h"
#include "cuda/balance_ema/layout.h"

struct CUstream_st;  // what a cudaStream_t points to; the bindings are compiled without the CUDA headers

namespace cit::gpu {

// Where and on what a call runs. `table` (see Lists) and `slots` are device memory. The slots are 16 bytes each and all
// zero before the first call; calls leave them fit for the next one, so calls that may overlap need slots of their own.
struct Launch {
  const std::int64_t* table;
  std::int64_t count;   // tensors
  std::int64_t blocks;  // Layout::blocks
  void* slots;          // [Layout::slots]
  int device;
  CUstream_st* stream;
};

// What the norms kernels write, in device memory, one element for each tensor. alphas and fallbacks may be null: only
// the norms are wanted.
struct Outcome {
  double* norms;  // [tensors, 3]
  float* alphas;
  bool* fallbacks;
  float* remaining;  // [tensors]: a' of balance_weight.h, or null
  RuleOptions rule;
  bool store_grads;  // previous_grad <- grad
};

// How bfloat16 state is rounded: stochastically, averages to the nearest if `nearest`.
struct Rounding {
  std::uint32_t seed;
  bool nearest;
};

struct AdamW {
  double beta1, beta2, eps, weight_decay;
};

// AdamW at one step, as the inner loop needs it.
struct Step {
  float keep;     // 1 - lr * weight_decay
  float weight1;  // 1 - beta1
  float beta2;
  float weight2;     // 1 - beta2
  float root_scale;  // 1 / sqrt(1 - beta2^step)
  float eps;
  float step_size;  // lr / (1 - beta1^step)
  Rounding rounding;
};

// Writes words[0 .. count) to `target` in device memory. They travel as arguments of launches: no staging memory to
// keep alive, and a captured graph has them by value.
void upload(std::int64_t* target, const std::int64_t* words, std::int64_t count, int device, CUstream_st* stream);

void balance_norms(const Launch& launch, const Outcome& outcome);

// norms.alphas is not null. Moves the averages.
void balance_ema(const Launch& launch, const Outcome& outcome, const Rounding& rounding);

void flush_balance_ema(const Launch& launch, const float* alphas, const Rounding& rounding);

Step step_on_host(const AdamW& adamw, std::int64_t step, double lr, const Rounding& rounding);

// Step count and learning rate from device memory, for a graph that is replayed at other steps: `target` becomes the
// Step with seed + step. `step` is float or int64, `lr` float or double.
void step_on_device(const AdamW& adamw, const void* step, bool step_is_float, const void* lr, bool lr_is_float,
                    const Rounding& rounding, Step* target, int device, CUstream_st* stream);

// outcome.alphas holds the pending weights on entry and the new ones on return. `on_device`, when not null, is used
// instead of `step`.
void adamw_balance_ema(const Launch& launch, const Outcome& outcome, const Step& step, const Step* on_device);

// Empty when the kernels can run on the device, else why not in the words of the CUDA runtime. Loads the kernels, which
// must not happen first while a graph is captured. Asks the runtime once for each device.
std::string why_not(int device);

}  // namespace cit::gpu
