// Losses with their gradients, a few tokens at a time.
//
// A chunk of tokens needs two sweeps over the vocabulary: products and softmax statistics first; then, when these are
// known, the gradient of the logits and with it those of the head and of the hidden states. Both read the head from
// memory, so the second sweep of a chunk is the first one of the next chunk as well: a block of the head comes into the
// cache, the logits of the one chunk turn into their gradient, those of the other take their place, and the block is
// multiplied with the gradient. Stored: kChunkTokens logits per vocabulary entry and side at most, a twentieth of all
// of them where a gradient of the head does not ask for more.
//
// Tasks are slabs of the vocabulary, which do not depend on the number of threads; what they add up is merged in order.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/information_gain/information_gain.h"
#include "cpu/information_gain/logit_products.h"
#include "cpu/parallel.h"

namespace cit {
namespace {

constexpr std::int64_t kChunkTokens = 64;
constexpr std::int64_t kShareOfLogits = 20;
constexpr std::int64_t kFewestSlabs = 16, kMostSlabs = 64;
constexpr std::int64_t kSlabRows = 10 * kChunkRows;  // at least
constexpr std::int64_t kBlockBytes = 256 << 10;      // of the head: this one and the next fit the second-level cache

struct Side {
  const Matrix& hidden;
  const Head& head;
};

enum class Loss { kCrossEntropy, kJensenShannon, kKullbackLeibler };

// What the losses have in common; side 0 is the one that is trained.
struct Problem {
  Loss loss;
  std::vector<Side> sides;
  const float* temperature;     // null: 1
  const std::int64_t* targets;  // of the cross-entropy; of the Kullback-Leibler divergence what is taken out, or null
  const float* row_weight;
  float entropy_gate;  // of the cross-entropy; 0: none
  const LogitOptions& options;
  const Gradients& gradients;

  std::int64_t vocabulary() const { return sides[0].head.weight.count; }
  std::int64_t tokens() const { return sides[0].hidden.count; }
  std::int64_t width() const { return sides[0].hidden.width; }
  bool any_gradient() const {
    return gradients.hidden != nullptr || gradients.weight != nullptr || gradients.bias != nullptr;
  }
};

bool same_weight(const Matrix& one, const Matrix& other) {
  return one.data.data == other.data.data && one.row_stride == other.row_stride && one.width == other.width &&
         one.data.dtype == other.data.dtype;
}

// Every head row that is read from memory serves all tokens of a chunk, so the more the better; the head's gradient is
// read and written once per chunk as well.
std::int64_t chunk_tokens(const Problem& problem) {
  if (problem.gradients.weight != nullptr) return kChunkTokens;
  return std::clamp(problem.tokens() / kShareOfLogits / kGroup * kGroup, kGroup, kChunkTokens);
}

// Each slab has its own sums for the gradient of the hidden states: a quarter of the stored logits at most, unless the
// vocabulary is so small that it would leave threads without work.
std::int64_t slab_rows(const Problem& problem) {
  const std::int64_t vocabulary = problem.vocabulary();
  const std::int64_t cheap = static_cast<std::int64_t>(problem.sides.size()) * vocabulary / (4 * problem.width());
  const std::int64_t slabs = std::clamp(cheap, kFewestSlabs, kMostSlabs);
  return std::max(kSlabRows, divide_up(divide_up(vocabulary, slabs), kChunkRows) * kChunkRows);
}

std::int64_t block_rows(const Problem& problem) {
  std::int64_t bytes = 1;
  for (const Side& side : problem.sides) {
    const std::int64_t element = side.head.weight.data.dtype == DType::kFloat32 ? 4 : 2;
    bytes = std::max(bytes, side.head.weight.width * element);
  }
  std::int64_t rows = kChunkRows;
  while (rows > kChunkRows / 4 && rows * bytes > kBlockBytes) rows /= 2;
  return rows;
}

// Some tokens, and what is known of each.
class Chunk {
 public:
  Chunk(const Problem& problem, const std::vector<bool>& pairs, std::int64_t begin, std::int64_t count)
      : begin(begin),
        count(count),
        groups(divide_up(count, kGroup)),
        lanes(static_cast<std::size_t>(groups)),
        inverse_temperature(static_cast<std::size_t>(groups * kGroup), 1.0f),
        target_logits(static_cast<std::size_t>(groups * kGroup), 0.0f),
        entropies(static_cast<std::size_t>(groups * kGroup), 0.0f),
        excluded(static_cast<std::size_t>(excludes(problem) ? groups * kGroup : 0), -1),
        problem_(problem) {
    for (std::size_t side = 0; side < problem.sides.size(); ++side) {
      panels.emplace_back(problem.sides[side].hidden, begin, count, problem.row_weight, pairs[side],
                          problem.options.threads);
    }
    for (std::int64_t token = 0; token < count; ++token) {
      if (share(token) == 0.0f) continue;
      inverse_temperature[token] = 1.0f / temperature(token);
      if (!excluded.empty()) excluded[token] = problem.targets[begin + token];
    }
  }

  static bool excludes(const Problem& problem) {
    return problem.loss == Loss::kKullbackLeibler && problem.targets != nullptr;
  }

  float share(std::int64_t token) const { return token < count ? problem_.row_weight[begin + token] : 0.0f; }
  float temperature(std::int64_t token) const {
    return problem_.temperature == nullptr || share(token) == 0.0f ? 1.0f : problem_.temperature[begin + token];
  }

  const std::int64_t begin, count, groups;
  std::vector<Panels> panels;  // of each side
  std::vector<LossLanes> lanes;
  std::vector<float> inverse_temperature, target_logits;
  std::vector<float> entropies;        // of the trained side, in nats
  std::vector<std::int64_t> excluded;  // of each token the entry that is taken out; empty: none

 private:
  const Problem& problem_;
};

class Training {
 public:
  explicit Training(const Problem& problem)
      : run_(information_gain_kernels()),
        problem_(problem),
        sides_(problem.sides.size()),
        step_(chunk_tokens(problem)),
        groups_(divide_up(std::min(step_, problem.tokens()), kGroup)),
        slab_rows_(slab_rows(problem)),
        slabs_(divide_up(problem.vocabulary(), slab_rows_)),
        block_rows_(block_rows(problem)),
        stride_(HeadStrips::stride(problem.sides[0].head.weight)),
        logits_(static_cast<std::int64_t>(sides_) * groups_ * problem.vocabulary() * kGroup),
        sums_(problem.gradients.hidden == nullptr ? 0 : slabs_ * slab_sums()),
        states_(static_cast<std::size_t>(slabs_ * groups_) * sides_) {
    for (const Side& side : problem.sides) pairs_.push_back(multiply_pairs(side.hidden, side.head.weight));
    const bool shared = sides_ == 2 && pairs_[0] == pairs_[1] &&
                        same_weight(problem.sides[0].head.weight, problem.sides[1].head.weight);
    if (shared) {
      sides_of_head_ = {{0, 1}};
    } else {
      for (std::size_t side = 0; side < sides_; ++side) sides_of_head_.push_back({side});
    }
  }

  double loss() {
    double total = 0.0;
    std::unique_ptr<Chunk> known;  // whose logits are stored
    for (std::int64_t begin = 0;; begin += step_) {
      std::unique_ptr<Chunk> next;
      if (begin < problem_.tokens()) {
        next = std::make_unique<Chunk>(problem_, pairs_, begin, std::min(step_, problem_.tokens() - begin));
      }
      if (!problem_.any_gradient()) known.reset();
      if (known != nullptr || next != nullptr) sweep(known.get(), next.get());
      if (known != nullptr && problem_.gradients.hidden != nullptr) write_hidden(*known);
      if (next == nullptr) return total;
      for (std::size_t side = 0; side < sides_; ++side) {
        for (std::int64_t token = 0; token < next->groups * kGroup; ++token) merge(*next, side, token);
      }
      total += problem_.loss == Loss::kCrossEntropy ? cross_entropies(*next) : divergences(*next);
      known = std::move(next);
    }
  }

 private:
  std::int64_t slab_sums() const { return groups_ * kGroup * stride_; }
  std::int64_t end_of(std::int64_t slab) const { return std::min((slab + 1) * slab_rows_, problem_.vocabulary()); }
  float* stored(std::size_t side, std::int64_t group, std::int64_t entry) const {
    const std::int64_t column = static_cast<std::int64_t>(side) * groups_ + group;
    return logits_.data() + (column * problem_.vocabulary() + entry) * kGroup;
  }
  SoftmaxState* state(std::int64_t slab, std::size_t side, std::int64_t group) {
    return states_.data() + (static_cast<std::size_t>(slab) * sides_ + side) * static_cast<std::size_t>(groups_) +
           static_cast<std::size_t>(group);
  }

  // From the logits of `known` to its gradients, from `next` to its logits; either may be null.
  void sweep(const Chunk* known, const Chunk* next) {
    const bool hidden_gradient = known != nullptr && problem_.gradients.hidden != nullptr;
    AlignedFloats hidden;
    if (known != nullptr && problem_.gradients.weight != nullptr) {
      hidden = widened_rows(problem_.sides[0].hidden, known->begin, known->count, problem_.row_weight, stride_);
    }
    parallel_for(slabs_, problem_.options.threads, [&](std::int64_t slab) {
      float* const sums = sums_.data() + slab * slab_sums();
      HeadStrips strips(problem_.sides[0].head.weight, pairs_[0]);
      AlignedFloats gradient(hidden_gradient ? groups_ * kChunkRows * kGroup : 0);
      std::vector<HeadBlock> blocks;
      for (const auto& sides : sides_of_head_)
        blocks.emplace_back(problem_.sides[sides[0]].head.weight, pairs_[sides[0]]);
      if (hidden_gradient) std::fill_n(sums, slab_sums(), 0.0f);
      if (next != nullptr) {
        for (SoftmaxState* one = state(slab, 0, 0); one != state(slab + 1, 0, 0); ++one) {
          *one = {};
          std::fill(std::begin(one->max), std::end(one->max), kNowhere);
        }
      }
      const std::int64_t last = end_of(slab);
      for (std::int64_t first = slab * slab_rows_; first < last; first += block_rows_) {
        const std::int64_t rows = std::min(block_rows_, last - first);
        if (known != nullptr) logit_gradients(*known, hidden.data(), first, rows);
        if (hidden_gradient) copy_gradients(*known, first, rows, gradient.data());
        if (next != nullptr) {
          for (std::size_t head = 0; head < blocks.size(); ++head) {
            blocks[head].move_to(first, rows);
            block_logits(*next, blocks[head], sides_of_head_[head], slab, first, rows);
          }
        }
        if (hidden_gradient) {
          strips.add_products(first, rows, next != nullptr ? first : last, gradient.data(), known->groups, sums);
        }
      }
    });
  }

  void block_logits(const Chunk& chunk, const HeadBlock& block, const std::vector<std::size_t>& sides,
                    std::int64_t slab, std::int64_t first, std::int64_t rows) {
    const std::int64_t all = static_cast<std::int64_t>(sides.size()) * chunk.groups;
    // Column by column, two at a time: group 0 of all sides, group 1 of all sides, ...
    const auto side_of = [&](std::int64_t k) { return sides[k % sides.size()]; };
    const auto group_of = [&](std::int64_t k) { return k / static_cast<std::int64_t>(sides.size()); };
    const auto panel = [&](std::int64_t k) { return k < all ? chunk.panels[side_of(k)].group(group_of(k)) : nullptr; };
    const auto out = [&](std::int64_t k) { return k < all ? stored(side_of(k), group_of(k), first) : nullptr; };
    std::vector<std::int64_t> excluded(chunk.excluded);  // counted from the first entry of the block
    for (std::int64_t& entry : excluded) entry -= first;
    for (std::int64_t k = 0; k < all; k += 2) {
      block.multiply(panel(k), panel(k + 1), out(k), out(k + 1), k == 0 ? block_rows_ : 0);
      for (std::int64_t one = k; one < std::min(k + 2, all); ++one) {
        const float* const bias = problem_.sides[side_of(one)].head.bias;
        const LogitMap map{
            bias == nullptr ? nullptr : bias + first, problem_.options.scale, problem_.options.softcap,
            problem_.temperature == nullptr ? nullptr : chunk.inverse_temperature.data() + group_of(one) * kGroup,
            excluded.empty() ? nullptr : excluded.data() + group_of(one) * kGroup};
        run_.add_softmax(out(one), rows, map, *state(slab, side_of(one), group_of(one)));
      }
    }
  }

  void merge(Chunk& chunk, std::size_t side, std::int64_t token) {
    const std::int64_t group = token / kGroup, lane = token % kGroup;
    float max = kNowhere;
    for (std::int64_t slab = 0; slab < slabs_; ++slab) max = std::max(max, state(slab, side, group)->max[lane]);
    double sum = 0.0, moment = 0.0;
    for (std::int64_t slab = 0; slab < slabs_; ++slab) {
      const SoftmaxState& one = *state(slab, side, group);
      const double moved = static_cast<double>(one.max[lane]) - max, shrink = std::exp(moved);
      sum += one.sum[lane] * shrink;
      moment += (one.moment[lane] + moved * one.sum[lane]) * shrink;
    }
    const double log_sum = std::log(sum);
    chunk.lanes[group].max[side][lane] = max;
    chunk.lanes[group].log_sum[side][lane] = static_cast<float>(log_sum);
    if (side == 0) chunk.entropies[token] = static_cast<float>(log_sum - moment / sum);
  }

  // The divergences, and what the gradient needs of them.
  double divergences(Chunk& chunk) {
    struct Sums {
      float of[2][kGroup];
    };
    std::vector<Sums> sums(static_cast<std::size_t>(slabs_ * chunk.groups));
    parallel_for(slabs_, problem_.options.threads, [&](std::int64_t slab) {
      for (std::int64_t first = slab * slab_rows_; first < end_of(slab); first += kChunkRows) {
        const std::int64_t rows = std::min(kChunkRows, end_of(slab) - first);
        for (std::int64_t group = 0; group < chunk.groups; ++group) {
          const float* const live = stored(0, group, first);
          const float* const frozen = stored(1, group, first);
          Sums& into = sums[slab * chunk.groups + group];
          if (problem_.loss == Loss::kJensenShannon) {
            run_.add_jsd(live, frozen, rows, chunk.lanes[group], into.of);
          } else {
            run_.add_kl(live, frozen, rows, chunk.lanes[group], into.of[0]);
          }
        }
      }
    });
    double total = 0.0;
    for (std::int64_t token = 0; token < chunk.groups * kGroup; ++token) {
      const std::int64_t group = token / kGroup, lane = token % kGroup;
      double divergence[2] = {};
      for (std::int64_t slab = 0; slab < slabs_; ++slab) {
        for (int side = 0; side < 2; ++side) divergence[side] += sums[slab * chunk.groups + group].of[side][lane];
      }
      const double unit = problem_.loss == Loss::kJensenShannon ? 2.0 * std::log(2.0) : 1.0;
      const double factor = chunk.share(token) / unit;
      if (chunk.share(token) != 0.0f) total += factor * (divergence[0] + divergence[1]);
      set_gradient(chunk, token, divergence[0], factor);
    }
    return total;
  }

  double cross_entropies(Chunk& chunk) const {
    double total = 0.0;
    for (std::int64_t token = 0; token < chunk.groups * kGroup; ++token) {
      const std::int64_t group = token / kGroup, lane = token % kGroup;
      const double weight = chunk.share(token) * gate(chunk.entropies[token]);
      if (chunk.share(token) != 0.0f) {
        const float logit = stored(0, group, problem_.targets[chunk.begin + token])[lane];
        chunk.target_logits[token] = logit;
        const double max = chunk.lanes[group].max[0][lane], log_sum = chunk.lanes[group].log_sum[0][lane];
        total += weight * (log_sum - (logit - max));
      }
      set_gradient(chunk, token, 0.0, weight);
    }
    return total;
  }

  double gate(double entropy) const {
    static const double full = std::log(20.0);
    if (problem_.entropy_gate == 0.0f) return 1.0;
    const double part = entropy < 0.0 ? 0.0 : entropy > full ? 1.0 : entropy / full;  // NaN stays
    return std::pow(part, static_cast<double>(problem_.entropy_gate));
  }

  void set_gradient(Chunk& chunk, std::int64_t token, double divergence, double factor) const {
    LossLanes& lanes = chunk.lanes[token / kGroup];
    const std::int64_t lane = token % kGroup;
    const float softcap = problem_.options.softcap;
    lanes.divergence[lane] = static_cast<float>(divergence);
    lanes.factor[lane] = static_cast<float>(factor / chunk.temperature(token) * problem_.options.scale);
    lanes.cap_factor[lane] = softcap > 0.0f ? chunk.temperature(token) / softcap : 0.0f;
  }

  // Of some rows, in place, with their part of the gradients of bias and head.
  void logit_gradients(const Chunk& chunk, const float* hidden, std::int64_t first, std::int64_t rows) const {
    for (std::int64_t group = 0; group < chunk.groups; ++group) {
      float* const gradient = stored(0, group, first);
      switch (problem_.loss) {
        case Loss::kJensenShannon:
          run_.jsd_gradient(gradient, stored(1, group, first), rows, chunk.lanes[group]);
          break;
        case Loss::kKullbackLeibler:
          run_.kl_gradient(gradient, stored(1, group, first), rows, chunk.lanes[group]);
          break;
        case Loss::kCrossEntropy:
          run_.cross_entropy_gradient(gradient, rows, chunk.lanes[group]);
          subtract_targets(chunk, group, first, rows);
      }
      if (problem_.gradients.bias != nullptr) add_to_bias(gradient, rows, problem_.gradients.bias + first);
    }
    if (problem_.gradients.weight != nullptr) add_to_weight(chunk, hidden, first, rows);
  }

  void subtract_targets(const Chunk& chunk, std::int64_t group, std::int64_t first, std::int64_t rows) const {
    for (std::int64_t lane = 0; lane < kGroup; ++lane) {
      const std::int64_t token = group * kGroup + lane;
      if (chunk.share(token) == 0.0f) continue;
      const std::int64_t target = problem_.targets[chunk.begin + token];
      if (target < first || target >= first + rows) continue;
      const float part = chunk.target_logits[token] * chunk.lanes[group].cap_factor[lane];
      stored(0, group, target)[lane] -= chunk.lanes[group].factor[lane] * (1.0f - part * part);
    }
  }

  static void add_to_bias(const float* gradient, std::int64_t rows, float* bias) {
    for (std::int64_t row = 0; row < rows; ++row) {
      float sum = 0.0f;
      for (std::int64_t lane = 0; lane < kGroup; ++lane) sum += gradient[row * kGroup + lane];
      bias[row] += sum;
    }
  }

  // weight[first + row][column] += sum over tokens of gradient[row][token] hidden[token][column].
  void add_to_weight(const Chunk& chunk, const float* hidden, std::int64_t first, std::int64_t rows) const {
    const std::int64_t width = problem_.width(), whole = width / kGroup * kGroup;
    float* const weight = problem_.gradients.weight + first * width;
    for (std::int64_t group = 0; group < chunk.groups; ++group) {
      const float* const gradient = stored(0, group, first);
      const float* const a = hidden + group * kGroup * stride_;
      for (std::int64_t column = 0; column < whole; column += 2 * kGroup) {
        const bool two = column + kGroup < whole;
        float* const c = weight + column;
        run_.product({{a + column, two ? a + column + kGroup : nullptr},
                      stride_,
                      gradient,
                      kGroup,
                      1,
                      kGroup,
                      rows,
                      {c, c + kGroup},
                      width,
                      true,
                      0});
      }
      if (whole == width) continue;
      alignas(64) float rest[kChunkRows * kGroup];
      run_.product(
          {{a + whole, nullptr}, stride_, gradient, kGroup, 1, kGroup, rows, {rest, nullptr}, kGroup, false, 0});
      for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t column = whole; column < width; ++column) {
          weight[row * width + column] += rest[row * kGroup + column - whole];
        }
      }
    }
  }

  // To where the logits of the next chunk do not overwrite them.
  void copy_gradients(const Chunk& chunk, std::int64_t first, std::int64_t rows, float* gradient) const {
    for (std::int64_t group = 0; group < chunk.groups; ++group, gradient += kChunkRows * kGroup) {
      if (pairs_[0]) {
        run_.to_pairs(stored(0, group, first), rows, gradient);
      } else {
        std::copy_n(stored(0, group, first), rows * kGroup, gradient);
      }
    }
  }

  void write_hidden(const Chunk& chunk) const {
    const std::int64_t width = problem_.width();
    parallel_for(chunk.count, problem_.options.threads, [&](std::int64_t token) {
      float* const out = problem_.gradients.hidden + (chunk.begin + token) * width;
      std::copy_n(sums_.data() + token * stride_, width, out);
      for (std::int64_t slab = 1; slab < slabs_; ++slab) {
        const float* const part = sums_.data() + slab * slab_sums() + token * stride_;
        for (std::int64_t column = 0; column < width; ++column) out[column] += part[column];
      }
    });
  }

  const InformationGainKernels& run_;
  const Problem& problem_;
  const std::size_t sides_;
  const std::int64_t step_, groups_, slab_rows_, slabs_, block_rows_, stride_;
  const AlignedFloats logits_, sums_;
  std::vector<SoftmaxState> states_;                     // of the sweep that is on: slab, side, group
  std::vector<bool> pairs_;                              // of each side
  std::vector<std::vector<std::size_t>> sides_of_head_;  // both where their heads are the same weights
};

}  // namespace

double masked_jsd(const Matrix& live, const Matrix& frozen, const Head& live_head, const Head& frozen_head,
                  const float* temperature, const float* row_weight, const LogitOptions& options,
                  const Gradients& gradients) {
  const Problem problem{Loss::kJensenShannon,
                        {{live, live_head}, {frozen, frozen_head}},
                        temperature,
                        nullptr,
                        row_weight,
                        0.0f,
                        options,
                        gradients};
  return Training(problem).loss();
}

double linear_kl_divergence(const Matrix& live, const Matrix& frozen, const Head& live_head, const Head& frozen_head,
                            const float* temperature, const float* row_weight, const std::int64_t* targets,
                            const LogitOptions& options, const Gradients& gradients) {
  const Problem problem{Loss::kKullbackLeibler,
                        {{live, live_head}, {frozen, frozen_head}},
                        temperature,
                        targets,
                        row_weight,
                        0.0f,
                        options,
                        gradients};
  return Training(problem).loss();
}

double linear_cross_entropy(const Matrix& hidden, const Head& head, const std::int64_t* targets,
                            const float* row_weight, float entropy_gate, const LogitOptions& options,
                            const Gradients& gradients) {
  const Problem problem{Loss::kCrossEntropy, {{hidden, head}}, nullptr, targets,
                        row_weight,          entropy_gate,     options, gradients};
  return Training(problem).loss();
}

}  // namespace cit
