// Losses with their gradients, a few tokens at a time.
//
// For each chunk of tokens: products and softmax statistics (over pieces of the vocabulary), the divergences (the same
// pieces, from stored logits), the gradient over the logits in place together with its part of the head's gradient, and
// last the gradient of the hidden states (over columns of the head, so that each has one order of summation). Stored:
// kChunkTokens logits per vocabulary entry and side at most, a twentieth of all of them where a gradient of the head
// does not ask for more.

#include <algorithm>
#include <cmath>
#include <vector>

#include "information_gain.h"
#include "logit_products.h"
#include "parallel.h"

namespace cit {
namespace {

constexpr std::int64_t kPieceRows = 10 * kChunkRows;
constexpr std::int64_t kChunkTokens = 64;
constexpr std::int64_t kShareOfLogits = 20;
constexpr std::int64_t kColumns = 64;  // of the head per task: a multiple of this, cache lines of any dtype

struct Side {
  const Matrix& hidden;
  const Head& head;
};

// What the two losses have in common; side 0 is the one that is trained.
struct Problem {
  std::vector<Side> sides;
  const float* temperature;     // null: 1
  const std::int64_t* targets;  // null: Jensen-Shannon divergence between the two sides
  const float* row_weight;
  const LogitOptions& options;
  const Gradients& gradients;

  std::int64_t vocabulary() const { return sides[0].head.weight.count; }
  std::int64_t tokens() const { return sides[0].hidden.count; }
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

class Chunk {
 public:
  Chunk(const Problem& problem, std::int64_t begin, std::int64_t count, const AlignedFloats& store)
      : run_(information_gain_kernels()),
        problem_(problem),
        begin_(begin),
        count_(count),
        groups_(divide_up(count, kGroup)),
        pieces_(divide_up(problem.vocabulary(), kPieceRows)),
        store_(store),
        lanes_(static_cast<std::size_t>(groups_)),
        inverse_temperature_(static_cast<std::size_t>(groups_ * kGroup), 1.0f) {
    const int threads = problem.options.threads;
    for (const Side& side : problem.sides) {
      pairs_.push_back(multiply_pairs(side.hidden, side.head.weight));
      panels_.emplace_back(side.hidden, begin, count, problem.row_weight, pairs_.back(), threads);
    }
    for (std::int64_t token = 0; token < count; ++token) {
      if (share(token) != 0.0f) inverse_temperature_[token] = 1.0f / temperature(token);
    }
  }

  double loss() {
    logits();
    double total = problem_.targets == nullptr ? divergences() : cross_entropies();
    if (problem_.any_gradient()) {
      logit_gradients();
      if (problem_.gradients.hidden != nullptr) hidden_gradients();
    }
    return total;
  }

 private:
  std::size_t columns() const { return panels_.size() * static_cast<std::size_t>(groups_); }
  float share(std::int64_t token) const { return token < count_ ? problem_.row_weight[begin_ + token] : 0.0f; }
  float temperature(std::int64_t token) const {
    return problem_.temperature == nullptr || share(token) == 0.0f ? 1.0f : problem_.temperature[begin_ + token];
  }
  std::int64_t end_of(std::int64_t piece) const { return std::min((piece + 1) * kPieceRows, problem_.vocabulary()); }
  float* stored(std::size_t side, std::int64_t group, std::int64_t entry) const {
    const std::int64_t column = static_cast<std::int64_t>(side) * groups_ + group;
    return store_.data() + (column * problem_.vocabulary() + entry) * kGroup;
  }

  // Sides whose heads are the same weights, or each alone.
  std::vector<std::vector<std::size_t>> sides_by_head() const {
    if (panels_.size() == 1) return {{0}};
    if (pairs_[0] == pairs_[1] && same_weight(problem_.sides[0].head.weight, problem_.sides[1].head.weight)) {
      return {{0, 1}};
    }
    return {{0}, {1}};
  }

  void logits() {
    std::vector<SoftmaxState> states(static_cast<std::size_t>(pieces_) * columns());
    const auto heads = sides_by_head();
    parallel_for(pieces_, problem_.options.threads, [&](std::int64_t piece) {
      SoftmaxState* const state = states.data() + static_cast<std::size_t>(piece) * columns();
      for (std::size_t c = 0; c < columns(); ++c) {
        std::fill(std::begin(state[c].max), std::end(state[c].max), kNowhere);
      }
      for (const auto& sides : heads) piece_logits(sides, piece, state);
    });
    for (std::size_t side = 0; side < panels_.size(); ++side) {
      for (std::int64_t token = 0; token < groups_ * kGroup; ++token) merge(states, side, token);
    }
  }

  void piece_logits(const std::vector<std::size_t>& sides, std::int64_t piece, SoftmaxState* states) const {
    HeadBlock block(problem_.sides[sides[0]].head.weight, pairs_[sides[0]]);
    const std::int64_t all = static_cast<std::int64_t>(sides.size()) * groups_;
    for (std::int64_t first = piece * kPieceRows; first < end_of(piece); first += kChunkRows) {
      const std::int64_t rows = std::min(kChunkRows, end_of(piece) - first);
      block.move_to(first, rows);
      // Column by column, two at a time: group 0 of all sides, group 1 of all sides, ...
      const auto side_of = [&](std::int64_t k) { return sides[k % sides.size()]; };
      const auto group_of = [&](std::int64_t k) { return k / static_cast<std::int64_t>(sides.size()); };
      const auto panel = [&](std::int64_t k) { return k < all ? panels_[side_of(k)].group(group_of(k)) : nullptr; };
      const auto out = [&](std::int64_t k) { return k < all ? stored(side_of(k), group_of(k), first) : nullptr; };
      for (std::int64_t k = 0; k < all; k += 2) {
        block.multiply(panel(k), panel(k + 1), out(k), out(k + 1));
        for (std::int64_t one = k; one < std::min(k + 2, all); ++one) {
          const float* const bias = problem_.sides[side_of(one)].head.bias;
          const LogitMap map{
              bias == nullptr ? nullptr : bias + first, problem_.options.scale, problem_.options.softcap,
              problem_.temperature == nullptr ? nullptr : inverse_temperature_.data() + group_of(one) * kGroup};
          run_.add_softmax(out(one), rows, map,
                           states[side_of(one) * static_cast<std::size_t>(groups_) + group_of(one)]);
        }
      }
    }
  }

  void merge(const std::vector<SoftmaxState>& states, std::size_t side, std::int64_t token) {
    const std::int64_t group = token / kGroup, lane = token % kGroup;
    const auto state = [&](std::int64_t piece) -> const SoftmaxState& {
      return states[static_cast<std::size_t>(piece) * columns() + side * static_cast<std::size_t>(groups_) + group];
    };
    float max = kNowhere;
    for (std::int64_t piece = 0; piece < pieces_; ++piece) max = std::max(max, state(piece).max[lane]);
    double sum = 0.0;
    for (std::int64_t piece = 0; piece < pieces_; ++piece) {
      sum += state(piece).sum[lane] * std::exp(static_cast<double>(state(piece).max[lane]) - max);
    }
    lanes_[group].max[side][lane] = max;
    lanes_[group].log_sum[side][lane] = static_cast<float>(std::log(sum));
  }

  // The divergences, and what the gradient needs of them.
  double divergences() {
    struct Sums {
      float of[2][kGroup];
    };
    std::vector<Sums> sums(static_cast<std::size_t>(pieces_ * groups_));
    parallel_for(pieces_, problem_.options.threads, [&](std::int64_t piece) {
      for (std::int64_t first = piece * kPieceRows; first < end_of(piece); first += kChunkRows) {
        const std::int64_t rows = std::min(kChunkRows, end_of(piece) - first);
        for (std::int64_t group = 0; group < groups_; ++group) {
          run_.add_jsd(stored(0, group, first), stored(1, group, first), rows, lanes_[group],
                       sums[piece * groups_ + group].of);
        }
      }
    });
    double total = 0.0;
    for (std::int64_t token = 0; token < groups_ * kGroup; ++token) {
      const std::int64_t group = token / kGroup, lane = token % kGroup;
      double divergence[2] = {};
      for (std::int64_t piece = 0; piece < pieces_; ++piece) {
        for (int side = 0; side < 2; ++side) divergence[side] += sums[piece * groups_ + group].of[side][lane];
      }
      const double factor = share(token) / (2.0 * std::log(2.0));
      if (share(token) != 0.0f) total += factor * (divergence[0] + divergence[1]);
      set_gradient(token, divergence[0], factor);
    }
    return total;
  }

  double cross_entropies() {
    double total = 0.0;
    target_logits_.assign(static_cast<std::size_t>(groups_ * kGroup), 0.0f);
    for (std::int64_t token = 0; token < groups_ * kGroup; ++token) {
      const std::int64_t group = token / kGroup, lane = token % kGroup;
      if (share(token) != 0.0f) {
        const float logit = stored(0, group, problem_.targets[begin_ + token])[lane];
        target_logits_[token] = logit;
        const double max = lanes_[group].max[0][lane], log_sum = lanes_[group].log_sum[0][lane];
        total += share(token) * (log_sum - (logit - max));
      }
      set_gradient(token, 0.0, share(token));
    }
    return total;
  }

  void set_gradient(std::int64_t token, double divergence, double factor) {
    JsdLanes& lanes = lanes_[token / kGroup];
    const std::int64_t lane = token % kGroup;
    const float softcap = problem_.options.softcap;
    lanes.divergence[lane] = static_cast<float>(divergence);
    lanes.factor[lane] = static_cast<float>(factor / temperature(token) * problem_.options.scale);
    lanes.cap_factor[lane] = softcap > 0.0f ? temperature(token) / softcap : 0.0f;
  }

  void logit_gradients() {
    const std::int64_t width = problem_.sides[0].hidden.width, stride = divide_up(width, kGroup) * kGroup;
    AlignedFloats hidden;
    if (problem_.gradients.weight != nullptr) {
      hidden = widened_rows(problem_.sides[0].hidden, begin_, count_, problem_.row_weight, stride);
    }
    parallel_for(pieces_, problem_.options.threads, [&](std::int64_t piece) {
      const std::int64_t first = piece * kPieceRows, rows = end_of(piece) - first;
      for (std::int64_t group = 0; group < groups_; ++group) {
        float* const gradient = stored(0, group, first);
        if (problem_.targets == nullptr) {
          run_.jsd_gradient(gradient, stored(1, group, first), rows, lanes_[group]);
        } else {
          run_.cross_entropy_gradient(gradient, rows, lanes_[group]);
          subtract_targets(group, first, rows);
        }
        if (problem_.gradients.bias != nullptr) add_to_bias(gradient, rows, problem_.gradients.bias + first);
      }
      if (problem_.gradients.weight != nullptr) add_to_weight(hidden.data(), stride, first, rows);
      if (problem_.gradients.hidden == nullptr || !pairs_[0]) return;
      for (std::int64_t group = 0; group < groups_; ++group) run_.to_pairs(stored(0, group, first), rows);
    });
  }

  void subtract_targets(std::int64_t group, std::int64_t first, std::int64_t rows) const {
    for (std::int64_t lane = 0; lane < kGroup; ++lane) {
      const std::int64_t token = group * kGroup + lane;
      if (share(token) == 0.0f) continue;
      const std::int64_t target = problem_.targets[begin_ + token];
      if (target < first || target >= first + rows) continue;
      const float part = target_logits_[token] * lanes_[group].cap_factor[lane];
      stored(0, group, target)[lane] -= lanes_[group].factor[lane] * (1.0f - part * part);
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
  void add_to_weight(const float* hidden, std::int64_t stride, std::int64_t first, std::int64_t rows) const {
    const std::int64_t width = problem_.sides[0].hidden.width, whole = width / kGroup * kGroup;
    float* const weight = problem_.gradients.weight + first * width;
    for (std::int64_t begin = 0; begin < rows; begin += kChunkRows) {
      const std::int64_t some = std::min(kChunkRows, rows - begin);
      for (std::int64_t group = 0; group < groups_; ++group) {
        const float* const gradient = stored(0, group, first + begin);
        const float* const a = hidden + group * kGroup * stride;
        for (std::int64_t column = 0; column < whole; column += 2 * kGroup) {
          const bool two = column + kGroup < whole;
          float* const c = weight + begin * width + column;
          run_.product({{a + column, two ? a + column + kGroup : nullptr},
                        stride,
                        gradient,
                        kGroup,
                        1,
                        kGroup,
                        some,
                        {c, c + kGroup},
                        width,
                        true});
        }
        if (whole == width) continue;
        alignas(64) float rest[kChunkRows * kGroup];
        run_.product({{a + whole, nullptr}, stride, gradient, kGroup, 1, kGroup, some, {rest, nullptr}, kGroup, false});
        for (std::int64_t row = 0; row < some; ++row) {
          for (std::int64_t column = whole; column < width; ++column) {
            weight[(begin + row) * width + column] += rest[row * kGroup + column - whole];
          }
        }
      }
    }
  }

  void hidden_gradients() const {
    const Matrix& weight = problem_.sides[0].head.weight;
    const std::int64_t width = weight.width, threads = std::max(problem_.options.threads, 1);
    // How the columns are shared out changes no bits: every column is a sum of its own.
    const std::int64_t columns = std::max(kColumns, divide_up(divide_up(width, threads), kColumns) * kColumns);
    // All lanes of the last group, though there may be fewer tokens.
    const AlignedFloats sums(groups_ * kGroup * width);
    parallel_for(divide_up(width, columns), problem_.options.threads, [&](std::int64_t task) {
      const std::int64_t column = task * columns, some = std::min(columns, width - column);
      HeadColumns head(weight, pairs_[0], column, some);
      for (std::int64_t piece = 0; piece < pieces_; ++piece) {
        const std::int64_t start = piece * kPieceRows;
        for (std::int64_t first = start; first < end_of(piece); first += HeadColumns::kRows) {
          head.move_to(first, std::min(HeadColumns::kRows, end_of(piece) - first));
          // Pairs lie at the beginning of their piece, in half of its space.
          const std::int64_t at = pairs_[0] ? start + (first - start) / 2 : first;
          for (std::int64_t group = 0; group < groups_; ++group) {
            head.add_product(stored(0, group, at), sums.data() + group * kGroup * width + column, width);
          }
        }
      }
    });
    std::copy_n(sums.data(), count_ * width, problem_.gradients.hidden + begin_ * width);
  }

  const InformationGainKernels& run_;
  const Problem& problem_;
  const std::int64_t begin_, count_, groups_, pieces_;
  const AlignedFloats& store_;
  std::vector<bool> pairs_;
  std::vector<Panels> panels_;
  std::vector<JsdLanes> lanes_;
  std::vector<float> inverse_temperature_, target_logits_;
};

double run(const Problem& problem) {
  const std::int64_t step = chunk_tokens(problem);
  const std::int64_t groups = divide_up(std::min(step, problem.tokens()), kGroup);
  const AlignedFloats store(static_cast<std::int64_t>(problem.sides.size()) * groups * problem.vocabulary() * kGroup);
  double total = 0.0;
  for (std::int64_t begin = 0; begin < problem.tokens(); begin += step) {
    total += Chunk(problem, begin, std::min(step, problem.tokens() - begin), store).loss();
  }
  return total;
}

}  // namespace

double masked_jsd(const Matrix& live, const Matrix& frozen, const Head& live_head, const Head& frozen_head,
                  const float* temperature, const float* row_weight, const LogitOptions& options,
                  const Gradients& gradients) {
  return run({{{live, live_head}, {frozen, frozen_head}}, temperature, nullptr, row_weight, options, gradients});
}

double linear_cross_entropy(const Matrix& hidden, const Head& head, const std::int64_t* targets,
                            const float* row_weight, const LogitOptions& options, const Gradients& gradients) {
  return run({{{hidden, head}}, nullptr, targets, row_weight, options, gradients});
}

}  // namespace cit
