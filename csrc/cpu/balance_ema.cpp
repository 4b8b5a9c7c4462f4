#include "balance_ema.h"

#include <algorithm>
#include <cmath>

#include "balance_ema_kernels.h"
#include "balance_weight.h"
#include "dispatch.h"
#include "parallel.h"

namespace cit {
namespace {

// Up to this many elements a tensor is one task: p and e (1 MiB) are still in the second-level cache when the average
// is updated.
constexpr std::int64_t kWholeTensor = 131072;

const BalanceEmaKernels& kernels() {
#ifdef CIT_FAST_X86
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      return simd_avx512::kBalanceEma;
    case SimdLevel::kAvx2:
      return simd_avx2::kBalanceEma;
    default:
      break;
  }
#endif
  return simd_baseline::kBalanceEma;
}

// A unit of work: one chunk of a large tensor, or a whole small tensor.
struct Task {
  std::int64_t tensor;
  std::int64_t begin;
  std::int64_t count;
  bool whole;
};

template <class NumelOf>
std::vector<Task> split(std::int64_t tensors, std::int64_t whole_limit, const NumelOf& numel_of) {
  std::vector<Task> tasks;
  for (std::int64_t i = 0; i < tensors; ++i) {
    const std::int64_t numel = numel_of(i);
    if (numel <= whole_limit) {
      tasks.push_back({i, 0, numel, true});
      continue;
    }
    for (std::int64_t begin = 0; begin < numel; begin += kChunk) {
      tasks.push_back({i, begin, std::min(kChunk, numel - begin), false});
    }
  }
  return tasks;
}

template <class Body>
void for_each_chunk(std::int64_t numel, const Body& body) {
  for (std::int64_t begin = 0; begin < numel; begin += kChunk) body(begin, std::min(kChunk, numel - begin));
}

void add(Norms& total, const Norms& part) {
  total.distance += part.distance;
  total.gradient += part.gradient;
  total.gradient_change += part.gradient_change;
}

// Adds the partial norms of each large tensor's chunks in order and stores its weight.
template <class Store>
void finish_large(const std::vector<Task>& tasks, const std::vector<Norms>& partial, const Store& store) {
  for (std::size_t k = 0; k < tasks.size();) {
    if (tasks[k].whole) {
      ++k;
      continue;
    }
    const std::int64_t tensor = tasks[k].tensor;
    Norms total{};
    for (; k < tasks.size() && tasks[k].tensor == tensor; ++k) add(total, partial[k]);
    store(tensor, total);
  }
}

AdamWStep prepare(const AdamWOptions& options) {
  const double step = static_cast<double>(options.step);
  AdamWStep out{};
  out.keep = static_cast<float>(1.0 - options.lr * options.weight_decay);
  out.weight1 = static_cast<float>(1.0 - options.beta1);
  out.beta2 = static_cast<float>(options.beta2);
  out.weight2 = static_cast<float>(1.0 - options.beta2);
  out.root_scale = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(options.beta2, step)));
  out.eps = static_cast<float>(options.eps);
  out.step_size = static_cast<float>(options.lr / (1.0 - std::pow(options.beta1, step)));
  return out;
}

}  // namespace

void balance_ema(const std::vector<EmaTensor>& tensors, const RuleOptions& options, int threads, float* alphas,
                 bool* fallbacks) {
  const BalanceEmaKernels& run = kernels();
  const auto tasks =
      split(static_cast<std::int64_t>(tensors.size()), kWholeTensor, [&](std::int64_t i) { return tensors[i].numel; });
  const auto count = static_cast<std::int64_t>(tasks.size());
  std::vector<Norms> partial(tasks.size());
  const auto store_weight = [&](std::int64_t i, const Norms& norms) {
    const Weight weight = balance_weight(norms, options);
    alphas[i] = weight.alpha;
    fallbacks[i] = weight.fallback;
  };
  parallel_for(count, threads, [&](std::int64_t k) {
    const Task& task = tasks[k];
    const EmaTensor& tensor = tensors[task.tensor];
    if (!task.whole) {
      partial[k] = run.norms(tensor, task.begin, task.count);
      return;
    }
    Norms total{};
    for_each_chunk(task.count, [&](std::int64_t begin, std::int64_t n) { add(total, run.norms(tensor, begin, n)); });
    store_weight(task.tensor, total);
    if (alphas[task.tensor] != 0.0f) run.apply(tensor, alphas[task.tensor], 0, task.count);
  });
  finish_large(tasks, partial, store_weight);
  parallel_for(count, threads, [&](std::int64_t k) {
    // Backwards: the chunks read last are the ones still in the cache.
    const Task& task = tasks[count - 1 - k];
    if (!task.whole && alphas[task.tensor] != 0.0f)
      run.apply(tensors[task.tensor], alphas[task.tensor], task.begin, task.count);
  });
}

void adamw_balance_ema(const std::vector<AdamWTensor>& tensors, const AdamWOptions& adamw, const RuleOptions& options,
                       int threads, float* alphas, bool* fallbacks) {
  const BalanceEmaKernels& run = kernels();
  const AdamWStep step = prepare(adamw);
  const auto tasks =
      split(static_cast<std::int64_t>(tensors.size()), kChunk, [&](std::int64_t i) { return tensors[i].ema.numel; });
  std::vector<Norms> partial(tasks.size());
  const auto store_weight = [&](std::int64_t i, const Norms& norms) {
    const Weight weight = balance_weight(norms, options);
    alphas[i] = weight.alpha;
    fallbacks[i] = weight.fallback;
  };
  parallel_for(static_cast<std::int64_t>(tasks.size()), threads, [&](std::int64_t k) {
    const Task& task = tasks[k];
    partial[k] = run.adamw(tensors[task.tensor], step, alphas[task.tensor], task.begin, task.count);
    if (task.whole) store_weight(task.tensor, partial[k]);
  });
  finish_large(tasks, partial, store_weight);
}

void flush_balance_ema(const std::vector<EmaTensor>& tensors, int threads, const float* alphas) {
  const BalanceEmaKernels& run = kernels();
  const auto tasks =
      split(static_cast<std::int64_t>(tensors.size()), kChunk, [&](std::int64_t i) { return tensors[i].numel; });
  parallel_for(static_cast<std::int64_t>(tasks.size()), threads, [&](std::int64_t k) {
    const Task& task = tasks[k];
    if (alphas[task.tensor] != 0.0f) run.apply(tensors[task.tensor], alphas[task.tensor], task.begin, task.count);
  });
}

}  // namespace cit
