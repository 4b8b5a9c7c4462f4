// Inner loops of information_gain.h, compiled once per instruction set.
//
// A logit costs 2 d operations for the product and about 30 for its share of the statistics, so for d >= 512 all of
// this is the product's time. The statistics run over products that are still in the first-level cache: two passes over
// a chunk (maximum; exponentials) instead of one with a rescaling per entry.

#include "cpu/information_gain/information_gain_kernels.h"

#include "cpu/simd/product_tiles.h"
#include "cpu/simd/simd_math.h"
#include "cpu/simd/stream.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {
namespace {

// --- products ---

struct Engine {
  using Lanes = F32x16;
  using Sums = F32x16;

  CIT_INLINE Sums zero() { return splat(0.0f); }
  CIT_INLINE Lanes load(const float* a) { return CIT_SIMD_NAMESPACE::load(a); }
  CIT_INLINE Vector broadcast(const float* w) { return *w - Vector{}; }
  CIT_INLINE Sums load_sums(const float* c) { return CIT_SIMD_NAMESPACE::load(c); }
  CIT_INLINE void store_sums(float* c, const Sums& sums) { CIT_SIMD_NAMESPACE::store(c, sums); }
  CIT_INLINE Sums multiply_add(const Lanes& a, const Vector& w, const Sums& sums) {
    Sums out;
    for (int k = 0; k < kParts; ++k) {
#if defined(__AVX512F__)
      out.part[k] = (Vector)_mm512_fmadd_ps((__m512)a.part[k], (__m512)w, (__m512)sums.part[k]);
#elif defined(__AVX2__)
      out.part[k] = (Vector)_mm256_fmadd_ps((__m256)a.part[k], (__m256)w, (__m256)sums.part[k]);
#else
      out.part[k] = a.part[k] * w + sums.part[k];
#endif
    }
    return out;
  }
};

void product(const Product& p) {
#if defined(__AVX512F__)
  p.a[1] != nullptr ? product_rows<Engine, 2, kTileRows>(p) : product_rows<Engine, 1, kTileRows>(p);
#else
  // Sixteen registers hold no more than one group.
  constexpr int kRows = kParts == 2 ? 6 : 3;
  product_rows<Engine, 1, kRows>(p);
  if (p.a[1] == nullptr) return;
  Product second = p;
  second.a[0] = p.a[1];
  second.c[0] = p.c[1];
  product_rows<Engine, 1, kRows>(second);
#endif
}

void widen_elements(const Array& source, int64_t begin, int64_t count, float* target) {
  const Stream<false> values(source);
  for_each_vector(0, count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    store(target + i, values.load_at(begin + i, lanes), lanes);
  });
}

CIT_INLINE F32x16 pairs_of(const Halves& low, const Halves& high) {
  F32x16 pairs;
  for (int k = 0; k < kParts; ++k) pairs.part[k] = (Vector)(widen(low.part[k]) | (widen(high.part[k]) << 16));
  return pairs;
}

void widen_tile(const Array& source, int64_t begin, int64_t row_stride, int64_t rows, int64_t columns, float* target) {
  const Stream<false> values(source);
  for (int64_t row = 0; row < rows; ++row, begin += row_stride, target += 2 * kGroup) {
    for_each_vector(0, columns, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      store(target + i, values.load_at(begin + i, lanes), lanes);
    });
  }
}

void to_pairs(const float* values, int64_t rows, float* pairs) {
  for (int64_t row = 0; row < rows; row += 2) {
    const F32x16 low = load(values + row * kGroup);
    const F32x16 high = row + 1 < rows ? load(values + (row + 1) * kGroup) : splat(0.0f);
    store(pairs + row / 2 * kGroup, pairs_of(to_bfloat16(low), to_bfloat16(high)));
  }
}

// --- logits and their statistics ---

// The map from products to logits, chosen outside the loop.
template <bool kBias, bool kCap, bool kTemperature>
struct Map {
  explicit Map(const LogitMap& map)
      : bias(map.bias),
        scale(splat(map.scale)),
        cap(splat(map.softcap)),
        inverse_temperature(kTemperature ? load(map.inverse_temperature) : splat(1.0f)) {}

  __attribute__((always_inline)) F32x16 operator()(const float* at, int64_t row) const {
    F32x16 logit = load(at);
    if (kBias) logit = logit + splat(bias[row]);
    logit = logit * scale;
    if (kCap) logit = cap * hyperbolic_tangent(logit / cap);
    return kTemperature ? logit * inverse_temperature : logit;
  }

  const float* bias;
  F32x16 scale, cap, inverse_temperature;
};

template <bool kBias, bool kCap, class Use>
CIT_INLINE void with_temperature(const LogitMap& map, const Use& use) {
  if (map.inverse_temperature != nullptr) {
    use(Map<kBias, kCap, true>(map));
  } else {
    use(Map<kBias, kCap, false>(map));
  }
}

template <class Use>
CIT_INLINE void with_map(const LogitMap& map, const Use& use) {
  if (map.bias != nullptr) {
    map.softcap > 0.0f ? with_temperature<true, true>(map, use) : with_temperature<true, false>(map, use);
  } else {
    map.softcap > 0.0f ? with_temperature<false, true>(map, use) : with_temperature<false, false>(map, use);
  }
}

// Products to logits in place; returns the larger of `max` and their maximum, lane by lane.
CIT_INLINE F32x16 to_logits(float* logits, int64_t rows, const LogitMap& map, F32x16 max) {
  with_map(map, [&](const auto& logit_of) {
    for (int64_t row = 0; row < rows; ++row) {
      const F32x16 logit = logit_of(logits + row * kGroup, row);
      store(logits + row * kGroup, logit);
      max = larger(max, logit);
    }
  });
  return max;
}

// Takes one entry of each lane out; returns the maximum without it.
CIT_INLINE F32x16 exclude(float* logits, int64_t rows, const int64_t* excluded, const F32x16& before,
                          const F32x16& max) {
  alignas(64) float all[kGroup], known[kGroup];
  store(all, max);
  store(known, before);
  for (int64_t lane = 0; lane < kGroup; ++lane) {
    if (excluded[lane] < 0 || excluded[lane] >= rows) continue;
    logits[excluded[lane] * kGroup + lane] = kNowhere;
    all[lane] = known[lane];
    for (int64_t row = 0; row < rows; ++row) {
      const float logit = logits[row * kGroup + lane];
      if (!(logit <= all[lane])) all[lane] = logit;  // NaN stays
    }
  }
  return load(all);
}

CIT_INLINE F32x16 below(const float* logits, int64_t row, const F32x16& max) {
  return at_least(load(logits + row * kGroup) - max, kNowhere);
}

void add_gain(float* full, float* masked, int64_t rows, const LogitMap& map, GainState& state) {
  float* const logits[2] = {full, masked};
  F32x16 max[2], moved[2], sum[2], moment[2], cross[2];
  for (int side = 0; side < 2; ++side) {
    const F32x16 before = load(state.max[side]);
    max[side] = to_logits(logits[side], rows, map, before);
    moved[side] = before - max[side];
    store(state.max[side], max[side]);
    sum[side] = moment[side] = cross[side] = splat(0.0f);
  }
  for (int64_t row = 0; row < rows; ++row) {
    F32x16 d[2], e[2];
    for (int side = 0; side < 2; ++side) {
      d[side] = below(logits[side], row, max[side]);
      e[side] = exponential(d[side]);
      sum[side] = sum[side] + e[side];
      moment[side] = multiply_add(d[side], e[side], moment[side]);
    }
    const F32x16 difference = d[0] - d[1];
    cross[0] = multiply_add(difference, e[0], cross[0]);
    cross[1] = multiply_add(d[1] - d[0], e[1], cross[1]);
  }
  // What was summed before, moved to the new maxima.
  for (int side = 0; side < 2; ++side) {
    const F32x16 shrink = exponential(moved[side]), before = load(state.sum[side]);
    const F32x16 apart = moved[side] - moved[1 - side];
    store(state.sum[side], before * shrink + sum[side]);
    store(state.moment[side], (load(state.moment[side]) + moved[side] * before) * shrink + moment[side]);
    store(state.cross[side], (load(state.cross[side]) + apart * before) * shrink + cross[side]);
  }
}

void add_softmax(float* logits, int64_t rows, const LogitMap& map, SoftmaxState& state) {
  const F32x16 before = load(state.max);
  F32x16 max = to_logits(logits, rows, map, before);
  if (map.excluded != nullptr) max = exclude(logits, rows, map.excluded, before, max);
  F32x16 sum = splat(0.0f), moment = splat(0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    const F32x16 d = below(logits, row, max), e = exponential(d);
    sum = sum + e;
    moment = multiply_add(d, e, moment);
  }
  const F32x16 moved = before - max, shrink = exponential(moved), sum_before = load(state.sum);
  store(state.max, max);
  store(state.sum, sum_before * shrink + sum);
  store(state.moment, (load(state.moment) + moved * sum_before) * shrink + moment);
}

// --- divergences and cross-entropy ---

struct Ratio {
  F32x16 p, q;
  F32x16 log_p, log_q;  // log(p / m), log(q / m), exact where p and q hardly differ
};

struct JsdLoop {
  explicit JsdLoop(const LossLanes& lanes)
      : max_p(load(lanes.max[0])),
        max_q(load(lanes.max[1])),
        log_sum_p(load(lanes.log_sum[0])),
        log_sum_q(load(lanes.log_sum[1])) {}

  __attribute__((always_inline)) Ratio operator()(const float* live, const float* frozen, int64_t row) const {
    const F32x16 log_p = below(live, row, max_p) - log_sum_p, log_q = below(frozen, row, max_q) - log_sum_q;
    const F32x16 r = log_q - log_p;
    // log(larger / m) = -log(1 + (e^-|r| - 1) / 2), and the other one is |r| less.
    const F32x16 distance = absolute(r);
    const Exponential ratio = split_exponential(at_least(splat(0.0f) - distance, kLowestExponent));
    const F32x16 rest = multiply_add(ratio.power, ratio.rest, ratio.power - splat(1.0f));
    const F32x16 high = splat(0.0f) - logarithm_1_plus(rest * splat(0.5f));
    const F32x16 low = high - distance;
    const F32x16 larger_one = exponential(where_negative(r, log_p, log_q));
    const F32x16 smaller_one = larger_one * multiply_add(ratio.power, ratio.rest, ratio.power);
    return {where_negative(r, larger_one, smaller_one), where_negative(r, smaller_one, larger_one),
            where_negative(r, high, low), where_negative(r, low, high)};
  }

  F32x16 max_p, max_q, log_sum_p, log_sum_q;
};

void add_jsd(const float* live, const float* frozen, int64_t rows, const LossLanes& lanes,
             float (&divergences)[2][kGroup]) {
  const JsdLoop ratio_at(lanes);
  F32x16 p_sum = splat(0.0f), q_sum = splat(0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    const Ratio x = ratio_at(live, frozen, row);
    p_sum = multiply_add(x.p, x.log_p, p_sum);
    q_sum = multiply_add(x.q, x.log_q, q_sum);
  }
  store(divergences[0], load(divergences[0]) + p_sum);
  store(divergences[1], load(divergences[1]) + q_sum);
}

// Derivative of the cap, from the logit over the temperature.
CIT_INLINE F32x16 cap_slope(const F32x16& logit, const F32x16& cap_factor) {
  const F32x16 share = logit * cap_factor;
  return splat(1.0f) - share * share;
}

void jsd_gradient(float* live, const float* frozen, int64_t rows, const LossLanes& lanes) {
  const JsdLoop ratio_at(lanes);
  const F32x16 divergence = load(lanes.divergence), factor = load(lanes.factor), cap = load(lanes.cap_factor);
  for (int64_t row = 0; row < rows; ++row) {
    const Ratio x = ratio_at(live, frozen, row);
    const F32x16 slope = cap_slope(load(live + row * kGroup), cap);
    const F32x16 gradient = x.p * (x.log_p - divergence) * factor * slope;
    store(live + row * kGroup, unless_zero(x.p, gradient));
  }
}

void add_kl(const float* live, const float* frozen, int64_t rows, const LossLanes& lanes,
            float (&divergences)[kGroup]) {
  const F32x16 max_p = load(lanes.max[0]), max_q = load(lanes.max[1]);
  const F32x16 log_sum_p = load(lanes.log_sum[0]), log_sum_q = load(lanes.log_sum[1]);
  F32x16 sum = splat(0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    const F32x16 log_q = below(frozen, row, max_q) - log_sum_q;
    sum = multiply_add(exponential(log_q), log_q - (below(live, row, max_p) - log_sum_p), sum);
  }
  store(divergences, load(divergences) + sum);
}

void kl_gradient(float* live, const float* frozen, int64_t rows, const LossLanes& lanes) {
  const F32x16 max_p = load(lanes.max[0]), max_q = load(lanes.max[1]);
  const F32x16 log_sum_p = load(lanes.log_sum[0]), log_sum_q = load(lanes.log_sum[1]);
  const F32x16 factor = load(lanes.factor), cap = load(lanes.cap_factor);
  for (int64_t row = 0; row < rows; ++row) {
    const F32x16 p = exponential(below(live, row, max_p) - log_sum_p);
    const F32x16 difference = p - exponential(below(frozen, row, max_q) - log_sum_q);
    const F32x16 gradient = difference * factor * cap_slope(load(live + row * kGroup), cap);
    store(live + row * kGroup, unless_zero(difference, gradient));
  }
}

void cross_entropy_gradient(float* logits, int64_t rows, const LossLanes& lanes) {
  const F32x16 max = load(lanes.max[0]), log_sum = load(lanes.log_sum[0]);
  const F32x16 factor = load(lanes.factor), cap = load(lanes.cap_factor);
  for (int64_t row = 0; row < rows; ++row) {
    const F32x16 p = exponential(below(logits, row, max) - log_sum);
    const F32x16 gradient = p * factor * cap_slope(load(logits + row * kGroup), cap);
    store(logits + row * kGroup, unless_zero(p, gradient));
  }
}

}  // namespace

extern const InformationGainKernels kInformationGain;
const InformationGainKernels kInformationGain = {
    product,     widen_elements,        widen_tile, to_pairs, add_gain, add_softmax, add_jsd, add_kl, jsd_gradient,
    kl_gradient, cross_entropy_gradient};

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
