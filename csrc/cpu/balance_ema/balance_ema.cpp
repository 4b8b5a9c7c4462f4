#include "cpu/balance_ema/balance_ema.h"

#include <algorithm>
#include <cmath>

#include "balance_weight.h"
#include "cpu/balance_ema/balance_ema_kernels.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "stochastic_rounding.h"

namespace cit {
namespace {

// Up to this many elements a tensor is one task: p and e (1 MiB) are still in the second-level cache when the average
// is updated.
constexpr std::int64_t kWhole = 131072;

// Longer tensors are summed and updated in batches of this many elements, where their ends allow it: 8 MiB of p and e,
// that a third-level cache still has when the average is updated.
constexpr std::int64_t kBatch = 1 << 20;

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

// A unit of work: a whole tensor, or a piece of a long one.
struct Task {
  std::int64_t tensor;
  bool whole;
  std::int64_t begin;
  std::int64_t count;
};

// Tensors longer than `whole_limit` are cut into chunks.
template <class Tensors, class EmaOf>
std::vector<Task> split(const Tensors& tensors, std::int64_t whole_limit, const EmaOf& ema_of) {
  std::vector<Task> tasks;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::int64_t size = ema_of(tensors[i]).numel;
    const auto index = static_cast<std::int64_t>(i);
    if (size <= whole_limit) {
      tasks.push_back({index, true, 0, size});
      continue;
    }
    for (std::int64_t at = 0; at < size; at += kChunk) tasks.push_back({index, false, at, std::min(kChunk, size - at)});
  }
  return tasks;
}

// Neighbouring tasks, whole tensors only.
struct Tasks {
  const Task* data;
  std::int64_t count;
};

Tasks all(const std::vector<Task>& tasks) {
  return {tasks.data(), static_cast<std::int64_t>(tasks.size())};
}

// Batches of about `elements`, in order.
template <class Body>
void for_each_batch(const std::vector<Task>& tasks, std::int64_t elements, const Body& body) {
  std::size_t first = 0;
  std::int64_t size = 0;
  for (std::size_t k = 0; k < tasks.size(); ++k) {
    size += tasks[k].count;
    const bool tensor_ends = k + 1 == tasks.size() || tasks[k + 1].tensor != tasks[k].tensor;
    if (!tensor_ends || (size < elements && k + 1 < tasks.size())) continue;
    body(Tasks{tasks.data() + first, static_cast<std::int64_t>(k + 1 - first)});
    first = k + 1;
    size = 0;
  }
}

const EmaTensor& itself(const EmaTensor& tensor) {
  return tensor;
}

void add(Norms& total, const Norms& part) {
  total.distance += part.distance;
  total.gradient += part.gradient;
  total.gradient_change += part.gradient_change;
}

// Adds the partial norms of the pieces of each long tensor in order and calls finish(tensor, norms).
template <class Finish>
void finish_pieces(const Tasks& tasks, const std::vector<Norms>& partial, const Finish& finish) {
  for (std::int64_t k = 0; k < tasks.count;) {
    if (tasks.data[k].whole) {
      ++k;
      continue;
    }
    const std::int64_t tensor = tasks.data[k].tensor;
    Norms total{};
    for (; k < tasks.count && tasks.data[k].tensor == tensor; ++k) add(total, partial[static_cast<std::size_t>(k)]);
    finish(tensor, total);
  }
}

RoundingKeys rounding_keys(const SweepOptions& sweep, std::int64_t tensor) {
  const auto index = static_cast<std::uint32_t>(tensor);
  return {rounding_key(sweep.seed, index, 0), rounding_key(sweep.seed, index, 1), rounding_key(sweep.seed, index, 2),
          sweep.nearest};
}

void store_norms(double* target, std::int64_t tensor, const Norms& norms) {
  target[3 * tensor] = norms.distance;
  target[3 * tensor + 1] = norms.gradient;
  target[3 * tensor + 2] = norms.gradient_change;
}

void store_weight(const Results& results, std::int64_t tensor, const Norms& norms, const RuleOptions& rule) {
  store_balance_weight(norms, rule, tensor, results.alphas, results.fallbacks, results.remaining);
  store_norms(results.norms, tensor, norms);
}

// Calls finish(task, norms) for each whole tensor as soon as it is summed, and afterwards finish_piece(tensor, norms)
// for each tensor in pieces.
template <class Finish, class FinishPieces>
void sum_norms(const std::vector<EmaTensor>& tensors, const Tasks& tasks, const SweepOptions& sweep,
               const Finish& finish, const FinishPieces& finish_piece) {
  const BalanceEmaKernels& run = kernels();
  std::vector<Norms> partial(static_cast<std::size_t>(tasks.count));
  parallel_for_blocks(tasks.count, sweep.threads, false, [&](std::int64_t k) {
    const Task& task = tasks.data[k];
    const EmaTensor& tensor = tensors[task.tensor];
    Norms total{};
    for (std::int64_t at = 0; at < task.count; at += kChunk) {
      add(total, run.norms(tensor, sweep.store_grads, task.begin + at, std::min(kChunk, task.count - at)));
    }
    task.whole ? finish(task, total) : void(partial[k] = total);
  });
  finish_pieces(tasks, partial, finish_piece);
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

void balance_norms(const std::vector<EmaTensor>& tensors, const SweepOptions& sweep, double* norms) {
  const auto store = [&](std::int64_t tensor, const Norms& total) { store_norms(norms, tensor, total); };
  const auto tasks = split(tensors, kChunk, itself);
  sum_norms(
      tensors, all(tasks), sweep, [&](const Task& task, const Norms& total) { store(task.tensor, total); }, store);
}

void balance_ema(const std::vector<EmaTensor>& tensors, const RuleOptions& rule, const SweepOptions& sweep,
                 const Results& results) {
  const BalanceEmaKernels& run = kernels();
  const auto tasks = split(tensors, kWhole, itself);
  const auto apply = [&](const Task& task) {
    const float alpha = results.alphas[task.tensor];
    if (alpha == 0.0f) return;
    run.apply(tensors[task.tensor], rounding_keys(sweep, task.tensor), alpha, task.begin, task.count);
  };
  for_each_batch(tasks, kBatch, [&](const Tasks& batch) {
    sum_norms(
        tensors, batch, sweep,
        [&](const Task& task, const Norms& norms) {
          store_weight(results, task.tensor, norms, rule);
          apply(task);
        },
        [&](std::int64_t tensor, const Norms& norms) { store_weight(results, tensor, norms, rule); });
    // Backwards: what was read last is what is still in the cache.
    parallel_for_blocks(batch.count, sweep.threads, true, [&](std::int64_t k) {
      if (!batch.data[k].whole) apply(batch.data[k]);
    });
  });
}

void adamw_balance_ema(const std::vector<AdamWTensor>& tensors, const AdamWOptions& adamw, const RuleOptions& rule,
                       const SweepOptions& sweep, const Results& results) {
  const BalanceEmaKernels& run = kernels();
  const AdamWStep step = prepare(adamw);
  const auto tasks = split(tensors, kChunk, [](const AdamWTensor& tensor) -> const EmaTensor& { return tensor.ema; });
  std::vector<Norms> partial(tasks.size());
  parallel_for(static_cast<std::int64_t>(tasks.size()), sweep.threads, [&](std::int64_t k) {
    const Task& task = tasks[k];
    partial[k] = run.adamw(tensors[task.tensor], step, rounding_keys(sweep, task.tensor), results.alphas[task.tensor],
                           sweep.store_grads, task.begin, task.count);
    if (task.whole) store_weight(results, task.tensor, partial[k], rule);
  });
  finish_pieces(all(tasks), partial,
                [&](std::int64_t tensor, const Norms& norms) { store_weight(results, tensor, norms, rule); });
}

void flush_balance_ema(const std::vector<EmaTensor>& tensors, const SweepOptions& sweep, const float* alphas) {
  const BalanceEmaKernels& run = kernels();
  const auto tasks = split(tensors, kChunk, itself);
  parallel_for(static_cast<std::int64_t>(tasks.size()), sweep.threads, [&](std::int64_t k) {
    const Task& task = tasks[k];
    const float alpha = alphas[task.tensor];
    if (alpha == 0.0f) return;
    run.apply(tensors[task.tensor], rounding_keys(sweep, task.tensor), alpha, task.begin, task.count);
  });
}

}  // namespace cit
