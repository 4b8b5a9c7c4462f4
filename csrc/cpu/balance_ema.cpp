#include "balance_ema.h"

#include <algorithm>
#include <cmath>

#include "balance_ema_kernels.h"
#include "balance_weight.h"
#include "dispatch.h"
#include "parallel.h"
#include "stochastic_rounding.h"

namespace cit {
namespace {

// Up to this many elements a row is one task: p and e (1 MiB) are still in the second-level cache when the average is
// updated.
constexpr std::int64_t kWholeRow = 131072;

// Longer rows are summed and updated in batches of this many elements, where the rows allow it: 8 MiB of p and e, that
// a third-level cache still has when the average is updated.
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

// A unit of work: a piece of one long row, or some whole rows.
struct Task {
  std::int64_t tensor;
  std::int64_t row;   // the first, counted over all tensors
  std::int64_t rows;  // 0: a piece of one
  std::int64_t begin;
  std::int64_t count;  // elements: of the piece, or of each row
};

// Rows longer than `whole_limit` are cut into chunks; shorter ones go together until they make a chunk.
template <class Tensors, class EmaOf>
std::vector<Task> split(const Tensors& tensors, std::int64_t whole_limit, const EmaOf& ema_of) {
  std::vector<Task> tasks;
  std::int64_t row = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const EmaTensor& tensor = ema_of(tensors[i]);
    const auto index = static_cast<std::int64_t>(i);
    const std::int64_t size = tensor.rows > 0 ? tensor.numel / tensor.rows : 0;
    if (size > whole_limit) {
      for (std::int64_t begin = 0; begin < tensor.numel; begin += size, ++row) {
        for (std::int64_t at = 0; at < size; at += kChunk) {
          tasks.push_back({index, row, 0, begin + at, std::min(kChunk, size - at)});
        }
      }
      continue;
    }
    const std::int64_t together = std::max<std::int64_t>(1, kChunk / std::max<std::int64_t>(1, size));
    for (std::int64_t first = 0; first < tensor.rows; first += together) {
      tasks.push_back({index, row + first, std::min(together, tensor.rows - first), first * size, size});
    }
    row += tensor.rows;
  }
  return tasks;
}

// Neighbouring tasks, whole rows only.
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
    size += tasks[k].count * std::max<std::int64_t>(1, tasks[k].rows);
    const bool row_ends = k + 1 == tasks.size() || tasks[k + 1].row != tasks[k].row;
    if (!row_ends || (size < elements && k + 1 < tasks.size())) continue;
    body(Tasks{tasks.data() + first, static_cast<std::int64_t>(k + 1 - first)});
    first = k + 1;
    size = 0;
  }
}

const EmaTensor& itself(const EmaTensor& tensor) {
  return tensor;
}

template <class Body>
void for_each_row(const Task& task, const Body& body) {
  for (std::int64_t k = 0; k < task.rows; ++k) body(task.row + k, task.begin + k * task.count);
}

void add(Norms& total, const Norms& part) {
  total.distance += part.distance;
  total.gradient += part.gradient;
  total.gradient_change += part.gradient_change;
}

// Adds the partial norms of the pieces of each long row in order and hands them over.
template <class Finish>
void finish_pieces(const Tasks& tasks, const std::vector<Norms>& partial, const Finish& finish) {
  for (std::int64_t k = 0; k < tasks.count;) {
    if (tasks.data[k].rows > 0) {
      ++k;
      continue;
    }
    const std::int64_t row = tasks.data[k].row;
    Norms total{};
    for (; k < tasks.count && tasks.data[k].rows == 0 && tasks.data[k].row == row; ++k) {
      add(total, partial[static_cast<std::size_t>(k)]);
    }
    finish(row, total);
  }
}

RoundingKeys rounding_keys(std::uint32_t seed, std::int64_t tensor) {
  const auto index = static_cast<std::uint32_t>(tensor);
  return {rounding_key(seed, index, 0), rounding_key(seed, index, 1), rounding_key(seed, index, 2)};
}

void store_norms(double* target, std::int64_t row, const Norms& norms) {
  target[3 * row] = norms.distance;
  target[3 * row + 1] = norms.gradient;
  target[3 * row + 2] = norms.gradient_change;
}

void store_weight(const Results& results, std::int64_t row, const Norms& norms, const RuleOptions& rule) {
  const Weight weight = balance_weight(norms, rule);
  results.alphas[row] = weight.alpha;
  results.fallbacks[row] = weight.fallback;
  store_norms(results.norms, row, norms);
}

// Calls finish(task, row, begin, norms) for each row of a task of whole rows as soon as it is summed, and afterwards
// finish_piece(row, norms) for each row in pieces.
template <class Finish, class FinishPieces>
void sum_norms(const std::vector<EmaTensor>& tensors, const Tasks& tasks, const SweepOptions& sweep,
               const Finish& finish, const FinishPieces& finish_piece) {
  const BalanceEmaKernels& run = kernels();
  std::vector<Norms> partial(static_cast<std::size_t>(tasks.count));
  parallel_for_blocks(tasks.count, sweep.threads, false, [&](std::int64_t k) {
    const Task& task = tasks.data[k];
    const EmaTensor& tensor = tensors[task.tensor];
    if (task.rows == 0) partial[k] = run.norms(tensor, sweep.store_grads, task.begin, task.count);
    for_each_row(task, [&](std::int64_t row, std::int64_t begin) {
      Norms total{};
      for (std::int64_t at = 0; at < task.count; at += kChunk) {
        add(total, run.norms(tensor, sweep.store_grads, begin + at, std::min(kChunk, task.count - at)));
      }
      finish(task, row, begin, total);
    });
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
  const auto store = [&](std::int64_t row, const Norms& total) { store_norms(norms, row, total); };
  const auto tasks = split(tensors, kChunk, itself);
  sum_norms(
      tensors, all(tasks), sweep,
      [&](const Task&, std::int64_t row, std::int64_t, const Norms& total) { store(row, total); }, store);
}

void balance_ema(const std::vector<EmaTensor>& tensors, const RuleOptions& rule, const SweepOptions& sweep,
                 const Results& results) {
  const BalanceEmaKernels& run = kernels();
  const auto tasks = split(tensors, kWholeRow, itself);
  const auto apply = [&](const Task& task, std::int64_t row, std::int64_t begin) {
    if (results.alphas[row] == 0.0f) return;
    run.apply(tensors[task.tensor], rounding_keys(sweep.seed, task.tensor), results.alphas[row], begin, task.count);
  };
  for_each_batch(tasks, kBatch, [&](const Tasks& batch) {
    sum_norms(
        tensors, batch, sweep,
        [&](const Task& task, std::int64_t row, std::int64_t begin, const Norms& norms) {
          store_weight(results, row, norms, rule);
          apply(task, row, begin);
        },
        [&](std::int64_t row, const Norms& norms) { store_weight(results, row, norms, rule); });
    // Backwards: what was read last is what is still in the cache.
    parallel_for_blocks(batch.count, sweep.threads, true, [&](std::int64_t k) {
      const Task& task = batch.data[k];
      if (task.rows == 0) apply(task, task.row, task.begin);
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
    const RoundingKeys keys = rounding_keys(sweep.seed, task.tensor);
    const auto piece = [&](std::int64_t row, std::int64_t begin) {
      return run.adamw(tensors[task.tensor], step, keys, results.alphas[row], sweep.store_grads, begin, task.count);
    };
    if (task.rows == 0) partial[k] = piece(task.row, task.begin);
    for_each_row(task,
                 [&](std::int64_t row, std::int64_t begin) { store_weight(results, row, piece(row, begin), rule); });
  });
  finish_pieces(all(tasks), partial,
                [&](std::int64_t row, const Norms& norms) { store_weight(results, row, norms, rule); });
}

void flush_balance_ema(const std::vector<EmaTensor>& tensors, const SweepOptions& sweep, const float* alphas) {
  const BalanceEmaKernels& run = kernels();
  const auto tasks = split(tensors, kChunk, itself);
  parallel_for(static_cast<std::int64_t>(tasks.size()), sweep.threads, [&](std::int64_t k) {
    const Task& task = tasks[k];
    const RoundingKeys keys = rounding_keys(sweep.seed, task.tensor);
    const auto apply = [&](std::int64_t row, std::int64_t begin) {
      if (alphas[row] != 0.0f) run.apply(tensors[task.tensor], keys, alphas[row], begin, task.count);
    };
    if (task.rows == 0) apply(task.row, task.begin);
    for_each_row(task, apply);
  });
}

}  // namespace cit
