// Key-part information gain and the losses of KPIG from hidden states, without the logits.
//
// The definitions that this is tested against are in cit_fast/ops/information_gain/reference.py. A token's logits exist
// for kChunkRows vocabulary entries at a time where only statistics are wanted (token_gain), and for a few tokens at a
// time where a gradient needs normalised probabilities (the losses): a stored logit costs less than computing it again.
//
// The same bits with any number of threads: every sum has one order, and pieces of the vocabulary whose results are
// merged are the same pieces always.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace cit {

// [count, width], rows of `row_stride` elements, neighbouring elements within one.
struct Matrix {
  Array data;
  std::int64_t count, width, row_stride;
};

struct Head {
  Matrix weight;      // [V, d]
  const float* bias;  // [V], or null
};

// logits = cap(scale (h w + bias)), cap(z) = softcap tanh(z / softcap); softcap 0: no cap.
struct LogitOptions {
  float scale, softcap;
  int threads;
};

// Of one vocabulary, or of one piece of it: rows of `statistics`, [kGainStatistics, T]. d = logit - maximum.
enum GainStatistic : int {
  kMaxFull,
  kMaxMasked,
  kSumFull,  // sum of e^d
  kSumMasked,
  kMomentFull,  // sum of d e^d
  kMomentMasked,
  kCrossFull,  // sum of (d - d of the other context) e^d
  kCrossMasked,
  kTargetFull,  // the target's logit; -infinity where it is outside the piece
  kTargetMasked,
  kGainStatistics
};

// targets: [T], of which `first_entry` is the head's first.
void token_gain_statistics(const Matrix& full, const Matrix& masked, const Head& head, const std::int64_t* targets,
                           std::int64_t first_entry, const LogitOptions& options, double* statistics);

// Where gradients go, in float32; null where not needed. hidden: [T, d]; weight [V, d] and bias [V] are added to.
struct Gradients {
  float* hidden;
  float* weight;
  float* bias;
};

// Returns sum_r row_weight_r JSD_r in bits.
double masked_jsd(const Matrix& live, const Matrix& frozen, const Head& live_head, const Head& frozen_head,
                  const float* temperature, const float* row_weight, const LogitOptions& options,
                  const Gradients& gradients);

// Returns sum_r row_weight_r KL(q_r || p_r), p the live side's; `targets` [T]: a token of each row that is taken out of
// the vocabulary of both sides, or null.
double linear_kl_divergence(const Matrix& live, const Matrix& frozen, const Head& live_head, const Head& frozen_head,
                            const float* temperature, const float* row_weight, const std::int64_t* targets,
                            const LogitOptions& options, const Gradients& gradients);

// Returns sum_r row_weight_r g_r (-log p_r(target_r)), g_r = min(1, H(p_r) / ln 20)^entropy_gate, a constant.
double linear_cross_entropy(const Matrix& hidden, const Head& head, const std::int64_t* targets,
                            const float* row_weight, float entropy_gate, const LogitOptions& options,
                            const Gradients& gradients);

}  // namespace cit
