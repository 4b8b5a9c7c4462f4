// What one block of threads does, for any `Block` that can exchange values between its threads: the GPU's own
// (balance_ema.cu) or its emulation on the host (host_block.h), so that the tests run all of this without a GPU.
//
// A Block has: thread(), index() of the block; sync(); shuffle_down(x, offset, lanes) among `lanes` <= 32 neighbouring
// threads; scratch(), memory of the block; fence(); add(counter), which returns the count before; fresh(slot), a read
// of what other blocks wrote. All threads of a block come to each exchange.
#pragma once

#include "cuda/balance_ema/balance_ema_math.cuh"

namespace cit::gpu {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// The sum of one piece of a tensor, and in the first slot of a tensor how many of its pieces are done.
struct alignas(16) Slot {
  Partial sum;
  std::uint32_t done;
};

struct Scratch {
  Tensor tensor;  // what is the same for all threads: here and not in thirty registers of each
  Step step;
  Partial of_warp[kWarps];
  Norms norms_of_warp[kWarps];
  bool last;
};

// The index of the tensor that block `block` belongs to: the last with first_block[i] <= block.
CIT_HOST_DEVICE inline std::int64_t tensor_of_block(const Lists& lists, std::int64_t block) {
  std::int64_t low = 0, high = lists.count;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (lists.first_block[middle] <= block ? low : high) = middle;
  }
  return low;
}

// The part of the list that one block works on: a tensor, or one piece of it.
struct Work {
  std::int64_t tensor;
  Shape shape;
  std::int64_t piece, pieces;
  std::int64_t begin;  // of the piece in its tensor
  int count;           // elements of the piece
  int lanes;           // threads that share it
};

CIT_HOST_DEVICE inline Work find_work(const Lists& lists, std::int64_t block) {
  Work work;
  work.tensor = tensor_of_block(lists, block);
  work.shape = lists.shapes[work.tensor];
  work.pieces = pieces_of(work.shape.size);
  work.piece = block - lists.first_block[work.tensor];
  work.begin = work.piece * kPiece;
  const std::int64_t rest = work.shape.size - work.begin;
  work.count = static_cast<int>(rest < kPiece ? rest : kPiece);
  work.lanes = lanes_of(work.shape.size);
  return work;
}

// What a thread goes through; nothing where it is past the threads that share the work.
CIT_HOST_DEVICE inline Span span_of(const Work& work, int thread) {
  return {work.begin, thread < work.lanes ? work.count : 0, thread, work.lanes};
}

CIT_HOST_DEVICE inline Norms operator+(const Norms& x, const Norms& y) {
  return {x.distance + y.distance, x.gradient + y.gradient, x.gradient_change + y.gradient_change};
}

// The sum over each `lanes` neighbouring threads, in the first of them.
#pragma nv_exec_check_disable  // the functions of a Block are for one side only
template <class Block, class Value>
CIT_HOST_DEVICE Value sum_of_lanes(Block& block, Value sum, int lanes, Value (&of_warp)[kWarps]) {
  const int width = lanes < kWarp ? lanes : kWarp;
  for (int offset = width / 2; offset > 0; offset /= 2) sum = sum + block.shuffle_down(sum, offset, width);
  if (lanes <= kWarp) return sum;
  block.sync();  // of_warp may still be read for the sum before
  if (block.thread() % kWarp == 0) of_warp[block.thread() / kWarp] = sum;
  block.sync();
  if (block.thread() != 0) return sum;
  Value total = of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) total = total + of_warp[warp];
  return total;
}

// Equations (2) and (3) of the reference, for one tensor.
CIT_HOST_DEVICE inline void finish_tensor(const Outcome& outcome, std::int64_t tensor, const Norms& norms) {
  outcome.norms[3 * tensor] = norms.distance;
  outcome.norms[3 * tensor + 1] = norms.gradient;
  outcome.norms[3 * tensor + 2] = norms.gradient_change;
  if (outcome.alphas == nullptr) return;
  store_balance_weight(norms, outcome.rule, tensor, outcome.alphas, outcome.fallbacks, outcome.remaining);
}

// Whichever block is the last of a tensor to get here adds up the pieces, always in the same order, and so finishes the
// tensor in the same launch. `sum` counts in thread 0.
#pragma nv_exec_check_disable  // the functions of a Block are for one side only
template <class Block>
CIT_HOST_DEVICE void finish_piece(Block& block, const Work& work, const Partial& sum, Slot* slots,
                                  const Outcome& outcome) {
  Slot* of_tensor = slots + work.shape.first_slot;
  Scratch& scratch = block.scratch();
  if (block.thread() == 0) {
    of_tensor[work.piece].sum = sum;
    block.fence();
    scratch.last = block.add(&of_tensor->done) + 1 == work.pieces;
    block.fence();
  }
  block.sync();
  if (!scratch.last) return;
  Norms norms{};
#pragma unroll 1
  for (std::int64_t piece = block.thread(); piece < work.pieces; piece += kThreads) {
    const Partial part = block.fresh(of_tensor[piece]);
    norms = norms + Norms{part.distance, part.gradient, part.gradient_change};
  }
  norms = sum_of_lanes(block, norms, kThreads, scratch.norms_of_warp);
  if (block.thread() != 0) return;
  of_tensor->done = 0;
  finish_tensor(outcome, work.tensor, norms);
}

// Goes through a block's work with `sweep(span)`, a thread's share of the norms, and finishes them.
#pragma nv_exec_check_disable  // the functions of a Block are for one side only
template <class Block, class Sweep>
CIT_HOST_DEVICE void sweep_work(Block& block, const Work& work, Slot* slots, const Outcome& outcome,
                                const Sweep& sweep) {
  Partial sum = sweep(span_of(work, block.thread()));
  sum = sum_of_lanes(block, sum, work.lanes, block.scratch().of_warp);
  if (work.pieces > 1) {
    finish_piece(block, work, sum, slots, outcome);
  } else if (block.thread() == 0) {
    finish_tensor(outcome, work.tensor, {sum.distance, sum.gradient, sum.gradient_change});
  }
}

#pragma nv_exec_check_disable  // the functions of a Block are for one side only
template <class Block>
CIT_HOST_DEVICE void norms_of_block(Block& block, const Lists& lists, Slot* slots, const Outcome& outcome) {
  const Work work = find_work(lists, block.index());
  Tensor& tensor = block.scratch().tensor;
  if (block.thread() == 0) tensor = open_tensor(lists, work.shape, work.tensor, {});
  block.sync();
  sweep_work(block, work, slots, outcome,
             [&](const Span& span) { return norms_of_span(tensor, outcome.store_grads, span); });
}

#pragma nv_exec_check_disable  // the functions of a Block are for one side only
template <class Block>
CIT_HOST_DEVICE void adamw_of_block(Block& block, const Lists& lists, Slot* slots, const Outcome& outcome,
                                    const Step& by_value, const Step* on_device) {
  const Work work = find_work(lists, block.index());
  Tensor& tensor = block.scratch().tensor;
  Step& step = block.scratch().step;
  if (block.thread() == 0) {
    if (on_device != nullptr) {
      step = *on_device;
    } else {
      step = by_value;
    }
    tensor = open_tensor(lists, work.shape, work.tensor, step.rounding);
  }
  block.sync();
  // Every thread has read the pending weight before the tensor is finished: the sums come in between.
  sweep_work(block, work, slots, outcome, [&](const Span& span) {
    return adamw_on_span(tensor, step, outcome.alphas[work.tensor], outcome.store_grads, span);
  });
}

#pragma nv_exec_check_disable  // the functions of a Block are for one side only
template <class Block>
CIT_HOST_DEVICE void apply_of_block(Block& block, const Lists& lists, const float* alphas, const Rounding& rounding) {
  const Work work = find_work(lists, block.index());
  const Tensor tensor = open_tensor(lists, work.shape, work.tensor, rounding);
  const float alpha = alphas[work.tensor];
  if (alpha != 0.0f) apply_to_span(tensor, alpha, span_of(work, block.thread()));
}

}  // namespace cit::gpu
