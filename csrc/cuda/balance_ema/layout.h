// How the lists of one call lie in device memory, and how they are cut into the work of single blocks.
//
// A tensor of more than kPiece elements is cut into pieces, one block each; a shorter one is the work of one block. So
// neither the cut nor the order of summation depends on the GPU or on the other tensors of the list.
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
  std::int64_t size;        // elements
  std::int64_t first_slot;  // among the slots for the sums of pieces; tensors of one piece have none
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

CIT_HOST_DEVICE inline std::int64_t pieces_of(std::int64_t size) {
  return size > kPiece ? (size + kPiece - 1) / kPiece : 1;
}

// How many neighbouring threads share a tensor: a power of two up to a warp for a short one, else the whole block.
CIT_HOST_DEVICE inline int lanes_of(std::int64_t size) {
  int lanes = 1;
  while (lanes < 32 && lanes * kGroup < size) lanes *= 2;
  return size >= kThreads * kGroup ? kThreads : lanes;
}

// The part of the table after the addresses, with its sums.
struct Layout {
  std::vector<std::int64_t> words;
  std::int64_t count = 0, slots = 0, blocks = 0;
};

inline Layout make_layout(const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& dtypes) {
  if (sizes.size() != dtypes.size()) throw std::invalid_argument("sizes and dtypes must be of one length");
  Layout layout;
  layout.count = static_cast<std::int64_t>(sizes.size());
  std::vector<std::int64_t> first_block{0};
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const std::int64_t pieces = pieces_of(sizes[i]);
    layout.words.insert(layout.words.end(), {sizes[i], layout.slots, dtypes[i]});
    if (pieces > 1) layout.slots += pieces;
    layout.blocks += pieces;
    first_block.push_back(layout.blocks);
  }
  layout.words.insert(layout.words.end(), first_block.begin(), first_block.end());
  return layout;
}

inline Lists open_table(const std::int64_t* table, std::int64_t count) {
  const std::int64_t* shapes = table + kStreams * count;
  static_assert(sizeof(Shape) == 3 * sizeof(std::int64_t));
  return {table, reinterpret_cast<const Shape*>(shapes), shapes + 3 * count, count};
}

}  // namespace cit::gpu
