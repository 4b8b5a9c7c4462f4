// Stand-alone test for the sanitizers: every op at every dtype on odd sizes, in buffers of exactly the right size.
// Whether the numbers are right in detail is tested from Python against the reference; here: no bad access, close to
// plain double loops, and the same bits with any number of threads.

#include "cpu/information_gain/information_gain.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/testing.h"

namespace {

using cit::DType;
using cit::testing::check;
using cit::testing::to_half;

// A matrix whose last row ends where its memory does.
class Values {
 public:
  Values(std::int64_t rows, std::int64_t columns, DType dtype, unsigned seed)
      : floats_(static_cast<std::size_t>(rows * columns)), rows_(rows), columns_(columns), dtype_(dtype) {
    std::mt19937 generator(seed);
    for (float& value : floats_) value = (static_cast<float>(generator() % 17) - 8.0f) / 8.0f;
    bytes_ = std::make_unique<unsigned char[]>(floats_.size() * size());
    for (std::size_t i = 0; i < floats_.size(); ++i) {
      const std::uint16_t half = to_half(floats_[i], dtype);
      std::memcpy(bytes_.get() + i * size(), dtype == DType::kFloat32 ? static_cast<const void*>(&floats_[i]) : &half,
                  size());
    }
  }
  cit::Matrix matrix() const { return {{bytes_.get(), dtype_}, rows_, columns_, columns_}; }
  const float* row(std::int64_t index) const { return floats_.data() + index * columns_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t columns() const { return columns_; }

 private:
  std::size_t size() const { return dtype_ == DType::kFloat32 ? 4 : 2; }

  std::vector<float> floats_;
  std::int64_t rows_, columns_;
  DType dtype_;
  std::unique_ptr<unsigned char[]> bytes_;
};

constexpr double kScale = 0.75, kCap = 3.0;

std::vector<double> logits_of(const Values& hidden, std::int64_t token, const Values& weight, const float* bias,
                              bool cap) {
  std::vector<double> logits(static_cast<std::size_t>(weight.rows()));
  for (std::int64_t entry = 0; entry < weight.rows(); ++entry) {
    double sum = bias == nullptr ? 0.0 : bias[entry];
    for (std::int64_t k = 0; k < weight.columns(); ++k) sum += double(hidden.row(token)[k]) * weight.row(entry)[k];
    logits[entry] = cap ? kCap * std::tanh(kScale * sum / kCap) : kScale * sum;
  }
  return logits;
}

double log_sum(const std::vector<double>& logits, double temperature = 1.0) {
  double max = -1e300, sum = 0.0;
  for (const double logit : logits) max = std::max(max, logit / temperature);
  for (const double logit : logits) sum += std::exp(logit / temperature - max);
  return max + std::log(sum);
}

struct Case {
  std::int64_t tokens, width, vocabulary;
  DType dtype;
  bool cap;
  std::string name;
};

struct Results {
  std::vector<double> statistics;
  double jsd, cross_entropy, gated, kl, rest;
  std::vector<float> hidden, weight, bias, gated_hidden, kl_hidden;

  bool operator==(const Results& other) const {
    return statistics == other.statistics && jsd == other.jsd && cross_entropy == other.cross_entropy &&
           gated == other.gated && kl == other.kl && rest == other.rest && hidden == other.hidden &&
           weight == other.weight && bias == other.bias && gated_hidden == other.gated_hidden &&
           kl_hidden == other.kl_hidden;
  }
};

void test(const Case& x) {
  const Values full(x.tokens, x.width, x.dtype, 1), masked(x.tokens, x.width, x.dtype, 2);
  const Values weight(x.vocabulary, x.width, x.dtype, 3), other(x.vocabulary, x.width, x.dtype, 4);
  const Values bias(1, x.vocabulary, DType::kFloat32, 5);
  std::vector<std::int64_t> targets;
  for (std::int64_t token = 0; token < x.tokens; ++token) targets.push_back(token * 7 % x.vocabulary);
  const std::vector<float> temperature(static_cast<std::size_t>(x.tokens), 1.5f);
  std::vector<float> row_weight(static_cast<std::size_t>(x.tokens), 0.5f);
  if (x.tokens > 1) row_weight.back() = 0.0f;
  const cit::Head head{weight.matrix(), bias.row(0)}, frozen{other.matrix(), nullptr};

  const auto run = [&](int threads, bool one_head) {
    const cit::LogitOptions options{static_cast<float>(kScale), x.cap ? static_cast<float>(kCap) : 0.0f, threads};
    Results out;
    out.statistics.resize(static_cast<std::size_t>(cit::kGainStatistics * x.tokens));
    cit::token_gain_statistics(full.matrix(), masked.matrix(), head, targets.data(), 0, options, out.statistics.data());
    out.hidden.resize(static_cast<std::size_t>(x.tokens * x.width));
    out.weight.resize(static_cast<std::size_t>(x.vocabulary * x.width));
    out.bias.resize(static_cast<std::size_t>(x.vocabulary));
    const cit::Gradients gradients{out.hidden.data(), out.weight.data(), out.bias.data()};
    out.jsd = cit::masked_jsd(full.matrix(), masked.matrix(), head, one_head ? head : frozen, temperature.data(),
                              row_weight.data(), options, gradients);
    out.cross_entropy =
        cit::linear_cross_entropy(full.matrix(), head, targets.data(), row_weight.data(), 0.0f, options, gradients);
    out.gated_hidden.resize(out.hidden.size());
    const cit::Gradients only_hidden{out.gated_hidden.data(), nullptr, nullptr};
    out.gated =
        cit::linear_cross_entropy(full.matrix(), head, targets.data(), row_weight.data(), 1.5f, options, only_hidden);
    const cit::Head& second = one_head ? head : frozen;
    const auto divergence = [&](const std::int64_t* without, const cit::Gradients& into) {
      return cit::linear_kl_divergence(full.matrix(), masked.matrix(), head, second, temperature.data(),
                                       row_weight.data(), without, options, into);
    };
    out.kl = divergence(nullptr, {nullptr, out.weight.data(), out.bias.data()});
    out.kl_hidden.resize(out.hidden.size());
    out.rest = divergence(targets.data(), {out.kl_hidden.data(), nullptr, nullptr});
    return out;
  };
  const Results one = run(1, true);
  check(one == run(3, true), x.name + ": bits depend on the number of threads");
  check(run(1, false) == run(2, false), x.name + ": bits depend on the number of threads, two heads");

  double jsd = 0.0, cross_entropy = 0.0, gated = 0.0, slope = 0.0, kl = 0.0, rest = 0.0, rest_slope = 0.0;
  for (std::int64_t token = 0; token < x.tokens; ++token) {
    const auto z = logits_of(full, token, weight, bias.row(0), x.cap);
    const auto w = logits_of(masked, token, weight, bias.row(0), x.cap);
    const double* const at = one.statistics.data() + token;
    const double lse = at[cit::kMaxFull * x.tokens] + std::log(at[cit::kSumFull * x.tokens]);
    check(std::fabs(lse - log_sum(z)) < 1e-4, x.name + ": wrong normaliser");
    check(std::fabs(at[cit::kTargetMasked * x.tokens] - w[targets[token]]) < 1e-4, x.name + ": wrong target logit");
    const double lse_z = log_sum(z, 1.5), lse_w = log_sum(w, 1.5);
    for (std::size_t i = 0; i < z.size(); ++i) {
      const double log_p = z[i] / 1.5 - lse_z, log_q = w[i] / 1.5 - lse_w;
      const double p = std::exp(log_p), q = std::exp(log_q), log_m = std::log((p + q) / 2);
      jsd += row_weight[token] / (2 * std::log(2.0)) * (p * (log_p - log_m) + q * (log_q - log_m));
    }
    auto without_z = z, without_w = w;
    without_z[targets[token]] = without_w[targets[token]] = -1e30;
    const double rest_z = log_sum(without_z, 1.5), rest_w = log_sum(without_w, 1.5);
    for (std::size_t i = 0; i < z.size(); ++i) {
      const double log_p = z[i] / 1.5 - lse_z, log_q = w[i] / 1.5 - lse_w;
      kl += row_weight[token] * std::exp(log_q) * (log_q - log_p);
      if (static_cast<std::int64_t>(i) == targets[token]) continue;
      const double rest_p = z[i] / 1.5 - rest_z, rest_q = w[i] / 1.5 - rest_w;
      rest += row_weight[token] * std::exp(rest_q) * (rest_q - rest_p);
      if (token != 0) continue;
      const double difference = (std::exp(rest_p) - std::exp(rest_q)) / 1.5;
      rest_slope += row_weight[0] * difference * kScale * (x.cap ? 1 - z[i] * z[i] / (kCap * kCap) : 1.0) *
                    weight.row(static_cast<std::int64_t>(i))[0];
    }
    cross_entropy += row_weight[token] * (log_sum(z) - z[targets[token]]);
    double entropy = log_sum(z);
    for (const double logit : z) entropy -= std::exp(logit - log_sum(z)) * logit;
    const double gate = std::pow(std::clamp(entropy / std::log(20.0), 0.0, 1.0), 1.5);
    gated += row_weight[token] * gate * (log_sum(z) - z[targets[token]]);
    // Along the first hidden element.
    for (std::int64_t i = 0; i < x.vocabulary && token == 0; ++i) {
      const double p = std::exp(z[i] - log_sum(z)) - (i == targets[0] ? 1.0 : 0.0);
      slope += row_weight[0] * p * kScale * (x.cap ? 1 - z[i] * z[i] / (kCap * kCap) : 1.0) * weight.row(i)[0];
    }
  }
  check(std::fabs(one.jsd - jsd) < 1e-4 * (1 + jsd), x.name + ": wrong divergence");
  check(std::fabs(one.cross_entropy - cross_entropy) < 1e-4 * (1 + cross_entropy), x.name + ": wrong cross-entropy");
  check(std::fabs(one.kl - kl) < 1e-4 * (1 + kl), x.name + ": wrong Kullback-Leibler divergence");
  check(std::fabs(one.rest - rest) < 1e-4 * (1 + rest), x.name + ": wrong divergence of the rest");
  check(std::fabs(one.kl_hidden[0] - rest_slope) < (x.dtype == DType::kBFloat16 ? 1e-2 : 1e-4),
        x.name + ": wrong gradient of the rest");
  check(std::fabs(one.gated - gated) < 1e-4 * (1 + gated), x.name + ": wrong gated cross-entropy");
  check(std::fabs(one.hidden[0] - slope) < (x.dtype == DType::kBFloat16 ? 1e-2 : 1e-4), x.name + ": wrong gradient");
}

}  // namespace

int main(int argc, char** argv) {
  return cit::testing::run(argc, argv, [] {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const bool cap : {false, true}) {
        for (const auto& [tokens, width, vocabulary] : std::vector<std::array<std::int64_t, 3>>{
                 {1, 1, 1}, {3, 2, 7}, {16, 32, 96}, {17, 33, 97}, {35, 70, 965}, {70, 18, 1923}, {18, 1430, 131}}) {
          test({tokens, width, vocabulary, dtype, cap,
                std::to_string(tokens) + " tokens of " + std::to_string(width) + ", " + std::to_string(vocabulary) +
                    " entries, dtype " + std::to_string(static_cast<int>(dtype)) + (cap ? ", capped" : "")});
        }
      }
    }
  });
}
