// How the lists of one call lie in device memory, and how they are cut into the work of single blocks.
//
// A tensor is `rows` rows of `row_size` neighbouring elements; each row has its own norms and weight. With one weight
// per tensor it is one row. A row of more than kPiece elements is cut into pieces, one block each; shorter rows go
// several to a block. So every block has about kPiece elements, whether the list is 224 small tensors or one large one,
// and neither the cut nor the order of summation depends on the GPU or on the other tensors of the list.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "balance_weight.h"

namespace cit::gpu {

constexpr int kThreads = 256;  // of a block; part of the order of summation, so the same on every GPU
constexpr int kGroup = 8;      // neighbouring elements that a thread takes at once: 16 bytes of a 16-bit tensor

// Small enough that a list of 7 M elements is many blocks for each processor, which evens out their load; large enough
// that finding its work costs a block little.
constexpr std::uint32_t kPiece = 8192;

// The numbers are part of the contract with cit_fast/ops/balance_ema/cuda.py: the order of the lists of addresses.
enum Stream { kParam, kAverage, kGrad, kPreviousGrad, kExpAvg, kExpAvgSq, kStreams };

struct Shape {
  std::int64_t rows, row_size;
  std::int64_t first_row;   // among the rows of all tensors: the place in alphas, fallbacks and norms
  std::int64_t first_slot;  // among the slots for the sums of pieces; rows of one piece have none
  std::int64_t dtypes;      // a byte for each stream
};

// The table in device memory: kStreams * count addresses (all parameters first, 0 where there is none), then `count`
// shapes, then count + 1 running sums of the blocks before each tensor.
struct Lists {
  const std::int64_t* addresses;
  const Shape* shapes;
  const std::int64_t* first_block;
  std::int64_t count;
};

// How one shape is cut. `lanes` neighbouring threads, a power of two, share a row.
struct Cut {
  std::int64_t pieces;          // of a row
  std::int64_t rows_per_block;  // 1 where a row has several pieces
  int lanes;
};

CIT_HOST_DEVICE inline Cut cut(std::int64_t row_size) {
  int lanes = 1;
  while (lanes < 32 && lanes * kGroup < row_size) lanes *= 2;
  if (row_size >= kThreads * kGroup) lanes = kThreads;
  if (row_size > kPiece) return {(row_size + kPiece - 1) / kPiece, 1, lanes};
  return {1, row_size > 0 ? kPiece / static_cast<std::uint32_t>(row_size) : kPiece, lanes};
}

// The part of the table after the addresses, with its sums.
struct Layout {
  std::vector<std::int64_t> words;
  std::int64_t count = 0, rows = 0, slots = 0, blocks = 0;
};

inline Layout make_layout(const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& row_sizes,
                          const std::vector<std::int64_t>& dtypes) {
  if (rows.size() != row_sizes.size() || rows.size() != dtypes.size()) {
    throw std::invalid_argument("rows, row_sizes and dtypes must be of one length");
  }
  Layout layout;
  layout.count = static_cast<std::int64_t>(rows.size());
  std::vector<std::int64_t> first_block{0};
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Cut each = cut(row_sizes[i]);
    layout.words.insert(layout.words.end(), {rows[i], row_sizes[i], layout.rows, layout.slots, dtypes[i]});
    layout.rows += rows[i];
    if (each.pieces > 1) layout.slots += rows[i] * each.pieces;
    layout.blocks +=
        each.pieces > 1 ? rows[i] * each.pieces : (rows[i] + each.rows_per_block - 1) / each.rows_per_block;
    first_block.push_back(layout.blocks);
  }
  layout.words.insert(layout.words.end(), first_block.begin(), first_block.end());
  return layout;
}

inline Lists open_table(const std::int64_t* table, std::int64_t count) {
  const std::int64_t* shapes = table + kStreams * count;
  static_assert(sizeof(Shape) == 5 * sizeof(std::int64_t));
  return {table, reinterpret_cast<const Shape*>(shapes), shapes + 5 * count, count};
}

}  // namespace cit::gpu
