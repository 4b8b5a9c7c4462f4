// Scoring: the statistics of both contexts in one pass over the vocabulary.
//
// Tasks are pieces of the vocabulary by ranges of tokens. A task goes through its piece in blocks of kChunkRows rows of
// the head, each used for all of the range while it is in the cache. The statistics of the pieces are merged in order.

#include "cpu/information_gain/information_gain.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/information_gain/logit_products.h"
#include "cpu/parallel.h"

namespace cit {
namespace {

constexpr std::int64_t kPieceRows = 20 * kChunkRows;  // few enough to keep any number of threads busy
constexpr std::int64_t kRangeGroups = 16;             // reads of the head from memory: once per 256 tokens
constexpr std::int64_t kBatch = 2048;                 // tokens whose packed states and partial results exist at a time

GainState empty_state() {
  GainState state{};
  for (auto& maxima : state.max) std::fill(std::begin(maxima), std::end(maxima), kNowhere);
  return state;
}

struct Batch {
  const Head& head;
  const LogitOptions& options;
  const std::int64_t* targets;
  std::int64_t first_entry, begin, count, tokens;
  bool pairs;
  Panels full, masked;
  double* statistics;

  double* at(int statistic) const { return statistics + statistic * tokens + begin; }
};

// The logits of the targets that are among the entries [first, first + rows).
void pick_targets(const Batch& batch, std::int64_t group, std::int64_t first, std::int64_t rows,
                  const float* const (&logits)[2]) {
  for (std::int64_t lane = 0; lane < std::min(kGroup, batch.count - group * kGroup); ++lane) {
    const std::int64_t token = group * kGroup + lane;
    const std::int64_t row = batch.targets[batch.begin + token] - batch.first_entry - first;
    if (row < 0 || row >= rows) continue;
    batch.at(kTargetFull)[token] = logits[0][row * kGroup + lane];
    batch.at(kTargetMasked)[token] = logits[1][row * kGroup + lane];
  }
}

void run_task(const Batch& batch, std::int64_t piece, std::int64_t range, GainState* states) {
  const InformationGainKernels& run = information_gain_kernels();
  const std::int64_t vocabulary = batch.head.weight.count;
  const std::int64_t first_group = range * kRangeGroups;
  const std::int64_t last_group = std::min(first_group + kRangeGroups, batch.full.groups());
  HeadBlock block(batch.head.weight, batch.pairs);
  alignas(64) float logits[2][kChunkRows * kGroup];
  for (std::int64_t group = first_group; group < last_group; ++group) states[group] = empty_state();
  const std::int64_t end = std::min((piece + 1) * kPieceRows, vocabulary);
  for (std::int64_t first = piece * kPieceRows; first < end; first += kChunkRows) {
    const std::int64_t rows = std::min(kChunkRows, end - first);
    block.move_to(first, rows);
    const float* const bias = batch.head.bias == nullptr ? nullptr : batch.head.bias + first;
    const LogitMap map{bias, batch.options.scale, batch.options.softcap, nullptr, nullptr};
    for (std::int64_t group = first_group; group < last_group; ++group) {
      // The first tokens bring the next rows from memory a tile ahead.
      block.multiply(batch.full.group(group), batch.masked.group(group), logits[0], logits[1],
                     group == first_group ? kPairTileRows : 0);
      run.add_gain(logits[0], logits[1], rows, map, states[group]);
      pick_targets(batch, group, first, rows, {logits[0], logits[1]});
    }
  }
}

// Of all pieces, moved to the common maxima.
void merge(const Batch& batch, std::int64_t token, const std::vector<GainState>& states, std::int64_t pieces) {
  const std::int64_t groups = batch.full.groups(), lane = token % kGroup;
  double max[2] = {kNowhere, kNowhere}, sum[2] = {}, moment[2] = {}, cross[2] = {};
  const auto state = [&](std::int64_t piece) -> const GainState& { return states[piece * groups + token / kGroup]; };
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    for (int side = 0; side < 2; ++side) max[side] = std::max<double>(max[side], state(piece).max[side][lane]);
  }
  for (std::int64_t piece = 0; piece < pieces; ++piece) {
    const GainState& one = state(piece);
    const double moved[2] = {one.max[0][lane] - max[0], one.max[1][lane] - max[1]};
    for (int side = 0; side < 2; ++side) {
      const double shrink = std::exp(moved[side]), part = one.sum[side][lane];
      sum[side] += shrink * part;
      moment[side] += shrink * (one.moment[side][lane] + moved[side] * part);
      cross[side] += shrink * (one.cross[side][lane] + (moved[side] - moved[1 - side]) * part);
    }
  }
  for (int side = 0; side < 2; ++side) {
    batch.at(kMaxFull + side)[token] = max[side];
    batch.at(kSumFull + side)[token] = sum[side];
    batch.at(kMomentFull + side)[token] = moment[side];
    batch.at(kCrossFull + side)[token] = cross[side];
  }
}

}  // namespace

void token_gain_statistics(const Matrix& full, const Matrix& masked, const Head& head, const std::int64_t* targets,
                           std::int64_t first_entry, const LogitOptions& options, double* statistics) {
  const std::int64_t tokens = full.count, pieces = divide_up(head.weight.count, kPieceRows);
  const bool pairs = multiply_pairs(full, head.weight) && multiply_pairs(masked, head.weight);
  std::fill(statistics + kTargetFull * tokens, statistics + kGainStatistics * tokens,
            -std::numeric_limits<double>::infinity());
  for (std::int64_t begin = 0; begin < tokens; begin += kBatch) {
    const std::int64_t count = std::min(kBatch, tokens - begin);
    const Batch batch{head,
                      options,
                      targets,
                      first_entry,
                      begin,
                      count,
                      tokens,
                      pairs,
                      Panels(full, begin, count, nullptr, pairs, options.threads),
                      Panels(masked, begin, count, nullptr, pairs, options.threads),
                      statistics};
    const std::int64_t groups = batch.full.groups(), ranges = divide_up(groups, kRangeGroups);
    std::vector<GainState> states(static_cast<std::size_t>(pieces * groups));
    parallel_for(pieces * ranges, options.threads, [&](std::int64_t task) {
      run_task(batch, task / ranges, task % ranges, states.data() + task / ranges * groups);
    });
    parallel_for(count, options.threads, [&](std::int64_t token) { merge(batch, token, states, pieces); });
  }
}

}  // namespace cit
