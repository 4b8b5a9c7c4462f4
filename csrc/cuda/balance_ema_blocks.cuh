// What one block of threads does, for any `Block` that can exchange values between its threads: the GPU's own
// (balance_ema.cu) or its emulation on the host (host_block.h), so that the tests run all of this without a GPU.
//
// A Block has: thread(), index() of the block; sync(); shuffle_down(x, offset, lanes) among `lanes` <= 32 neighbouring
// threads; scratch(), memory of the block; fence(); add(counter), which returns the count before; fresh(slot), a read
// of what other blocks wrote. All threads of a block come to each exchange.
#pragma once

#include "cuda/balance_ema_math.cuh"

namespace cit::gpu {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// The sum of one piece of a row, and in the first slot of a row how many of its pieces are done.
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

// The index of the tensor that block `block` belongs to: the last with first_block[i] <= block, which no tensor without
// rows is.
CIT_HOST_DEVICE inline std::int64_t tensor_of_block(const Lists& lists, std::int64_t block) {
  std::int64_t low = 0, high = lists.count;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (lists.first_block[middle] <= block ? low : high) = middle;
  }
  return low;
}

// The part of the list that one block works on: `rows` whole rows, or one piece of one row.
struct Work {
  std::int64_t tensor;
  Shape shape;
  Cut cut;
  std::int64_t row, rows;
  std::int64_t piece;
  std::int64_t begin;  // of the piece in its row
  int count;           // elements of each row, or of the piece
};

CIT_HOST_DEVICE inline Work find_work(const Lists& lists, std::int64_t block) {
  Work work;
  work.tensor = tensor_of_block(lists, block);
  work.shape = lists.shapes[work.tensor];
  work.cut = cut(work.shape.row_size);
  const auto at = static_cast<std::uint32_t>(block - lists.first_block[work.tensor]);  // a launch has < 2^31 blocks
  if (work.cut.pieces > 1) {
    const auto pieces = static_cast<std::uint32_t>(work.cut.pieces);
    work.row = at / pieces;
    work.rows = 1;
    work.piece = at % pieces;
    work.begin = work.piece * kPiece;
    const std::int64_t rest = work.shape.row_size - work.begin;
    work.count = static_cast<int>(rest < kPiece ? rest : kPiece);
  } else {
    work.row = static_cast<std::int64_t>(at) * work.cut.rows_per_block;
    const std::int64_t rest = work.shape.rows - work.row;
    work.rows = rest < work.cut.rows_per_block ? rest : work.cut.rows_per_block;
    work.piece = 0;
    work.begin = 0;
    work.count = static_cast<int>(work.shape.row_size);
  }
  return work;
}

// The row of a thread when its block has come to row `base` of its work; `mine` is false past the last.
struct RowOfThread {
  std::int64_t row;  // in the tensor
  bool mine;
  Span span;
};

CIT_HOST_DEVICE inline RowOfThread row_of_thread(const Work& work, std::int64_t base, int thread) {
  const int lanes = work.cut.lanes;
  const std::int64_t offset = base + thread / lanes;
  const std::int64_t row = work.row + offset;
  return {row, offset < work.rows, {row * work.shape.row_size + work.begin, work.count, thread % lanes, lanes}};
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
  block.sync();  // of_warp may still be read for the row before
  if (block.thread() % kWarp == 0) of_warp[block.thread() / kWarp] = sum;
  block.sync();
  if (block.thread() != 0) return sum;
  Value total = of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) total = total + of_warp[warp];
  return total;
}

// Equations (2) and (3) of the reference, for one row.
CIT_HOST_DEVICE inline void finish_row(const Outcome& outcome, std::int64_t row, const Norms& norms) {
  outcome.norms[3 * row] = norms.distance;
  outcome.norms[3 * row + 1] = norms.gradient;
  outcome.norms[3 * row + 2] = norms.gradient_change;
  if (outcome.alphas == nullptr) return;
  const Weight weight = balance_weight(norms, outcome.rule);
  outcome.alphas[row] = weight.alpha;
  outcome.fallbacks[row] = weight.fallback;
}

// Whichever block is the last of a row to get here adds up the pieces, always in the same order, and so finishes the
// row in the same launch. `sum` counts in thread 0.
#pragma nv_exec_check_disable  // the functions of a Block are for one side only
template <class Block>
CIT_HOST_DEVICE void finish_piece(Block& block, const Work& work, const Partial& sum, Slot* slots,
                                  const Outcome& outcome) {
  Slot* of_row = slots + work.shape.first_slot + work.row * work.cut.pieces;
  Scratch& scratch = block.scratch();
  if (block.thread() == 0) {
    of_row[work.piece].sum = sum;
    block.fence();
    scratch.last = block.add(&of_row->done) + 1 == work.cut.pieces;
    block.fence();
  }
  block.sync();
  if (!scratch.last) return;
  Norms norms{};
#pragma unroll 1
  for (std::int64_t piece = block.thread(); piece < work.cut.pieces; piece += kThreads) {
    const Partial part = block.fresh(of_row[piece]);
    norms = norms + Norms{part.distance, part.gradient, part.gradient_change};
  }
  norms = sum_of_lanes(block, norms, kThreads, scratch.norms_of_warp);
  if (block.thread() != 0) return;
  of_row->done = 0;
  finish_row(outcome, work.shape.first_row + work.row, norms);
}

// Goes through the rows of a block's work with `sweep(row, span)`, a thread's share of the norms of a row, and finishes
// them.
#pragma nv_exec_check_disable  // the functions of a Block are for one side only
template <class Block, class Sweep>
CIT_HOST_DEVICE void sweep_rows(Block& block, const Work& work, Slot* slots, const Outcome& outcome,
                                const Sweep& sweep) {
  const int lanes = work.cut.lanes;
  for (std::int64_t base = 0; base < work.rows; base += kThreads / lanes) {
    const RowOfThread at = row_of_thread(work, base, block.thread());
    Partial sum{};
    if (at.mine) sum = sweep(work.shape.first_row + at.row, at.span);
    sum = sum_of_lanes(block, sum, lanes, block.scratch().of_warp);
    if (work.cut.pieces > 1) {
      finish_piece(block, work, sum, slots, outcome);
    } else if (at.mine && at.span.lane == 0) {
      finish_row(outcome, work.shape.first_row + at.row, {sum.distance, sum.gradient, sum.gradient_change});
    }
  }
}

#pragma nv_exec_check_disable  // the functions of a Block are for one side only
template <class Block>
CIT_HOST_DEVICE void norms_of_block(Block& block, const Lists& lists, Slot* slots, const Outcome& outcome) {
  const Work work = find_work(lists, block.index());
  Tensor& tensor = block.scratch().tensor;
  if (block.thread() == 0) tensor = open_tensor(lists, work.shape, work.tensor, 0);
  block.sync();
  sweep_rows(block, work, slots, outcome,
             [&](std::int64_t, const Span& span) { return norms_of_span(tensor, outcome.store_grads, span); });
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
    tensor = open_tensor(lists, work.shape, work.tensor, step.seed);
  }
  block.sync();
  // Every thread has read the pending weight of its row before the row is finished: the sums come in between.
  sweep_rows(block, work, slots, outcome, [&](std::int64_t row, const Span& span) {
    return adamw_on_span(tensor, step, outcome.alphas[row], outcome.store_grads, span);
  });
}

#pragma nv_exec_check_disable  // the functions of a Block are for one side only
template <class Block>
CIT_HOST_DEVICE void apply_of_block(Block& block, const Lists& lists, const float* alphas, std::uint32_t seed) {
  const Work work = find_work(lists, block.index());
  const Tensor tensor = open_tensor(lists, work.shape, work.tensor, seed);
  for (std::int64_t base = 0; base < work.rows; base += kThreads / work.cut.lanes) {
    const RowOfThread at = row_of_thread(work, base, block.thread());
    if (!at.mine) continue;
    const float alpha = alphas[work.shape.first_row + at.row];
    if (alpha != 0.0f) apply_to_span(tensor, alpha, at.span);
  }
}

}  // namespace cit::gpu
