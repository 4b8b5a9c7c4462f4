// Inner loops of balance_ema.h, compiled once per instruction set.
//
// All of them wait for memory, so what counts is bytes per float32 parameter: norms 16 (read p, e, g, g_prev), apply 12
// (read p, e; write e), AdamW with everything in one sweep 40 (read p, g, m, v, e, g_prev; write p, m, v, e); 4 more
// where g_prev is overwritten. Six read and four write streams are more than hardware prefetchers follow, hence the
// prefetch by hand. 16-bit tensors are converted in registers.

#include "cpu/balance_ema/balance_ema_kernels.h"

#include "cpu/simd/stream.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {
namespace {

constexpr int64_t kPrefetchAhead = 512;  // elements: measured best on a two-core server part

template <class... Streams>
CIT_INLINE void prefetch(int64_t i, const Streams&... streams) {
  (streams.prefetch(i + kPrefetchAhead), ...);
}

// What happens to the previous gradient.
enum class Previous { kNone, kRead, kReplace };

inline bool is_float(const Array& array) {
  return array.data == nullptr || array.dtype == DType::kFloat32;
}

struct Sums {
  F32x16 distance = splat(0.0f);
  F32x16 gradient = splat(0.0f);
  F32x16 gradient_change = splat(0.0f);

  Norms total() const { return {sum(distance), sum(gradient), sum(gradient_change)}; }
};

template <Previous kPrevious, bool kFloat, class Lanes>
CIT_INLINE void add_norms(const F32x16& p, const F32x16& e, const F32x16& g, const Stream<kFloat>& previous, int64_t i,
                          Lanes lanes, Sums& sums) {
  sums.distance = sums.distance + absolute(only(p - e, lanes));
  sums.gradient = sums.gradient + absolute(g);
  if (kPrevious == Previous::kNone) return;
  prefetch(i, previous);
  sums.gradient_change = sums.gradient_change + absolute(g - previous.load_at(i, lanes));
  if (kPrevious == Previous::kReplace) previous.store_at(i, g, lanes);
}

template <bool kFloat, Previous kPrevious>
Norms norms_of(const EmaTensor& tensor, int64_t begin, int64_t count) {
  const Stream<kFloat> p(tensor.param), e(tensor.average), g(tensor.grad), previous(tensor.previous_grad);
  Sums sums;
  for_each_vector(begin, count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    prefetch(i, p, e, g);
    add_norms<kPrevious>(p.load_at(i, lanes), e.load_at(i, lanes), g.load_at(i, lanes), previous, i, lanes, sums);
  });
  return sums.total();
}

template <bool kFloat>
Norms norms_for(const EmaTensor& tensor, bool store_grads, int64_t begin, int64_t count) {
  if (tensor.previous_grad.data == nullptr) return norms_of<kFloat, Previous::kNone>(tensor, begin, count);
  if (!store_grads) return norms_of<kFloat, Previous::kRead>(tensor, begin, count);
  return norms_of<kFloat, Previous::kReplace>(tensor, begin, count);
}

Norms norms(const EmaTensor& tensor, bool store_grads, int64_t begin, int64_t count) {
  const bool floats =
      is_float(tensor.param) && is_float(tensor.average) && is_float(tensor.grad) && is_float(tensor.previous_grad);
  return floats ? norms_for<true>(tensor, store_grads, begin, count)
                : norms_for<false>(tensor, store_grads, begin, count);
}

// Stores an average and returns what is stored.
template <bool kFloat, class Lanes>
CIT_INLINE F32x16 store_average(const Stream<kFloat>& e, int64_t i, const F32x16& value, const RoundingKeys& keys,
                                Lanes lanes) {
  return kFloat || keys.nearest ? e.store_at(i, value, lanes) : e.store_state_at(i, value, keys.average, lanes);
}

template <bool kFloat>
void apply_for(const EmaTensor& tensor, const RoundingKeys& keys, float alpha, int64_t begin, int64_t count) {
  const Stream<kFloat> p(tensor.param), e(tensor.average);
  const F32x16 weight = splat(alpha);
  const RoundingKeys own = keys;
  for_each_vector(begin, count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    prefetch(i, p, e);
    const F32x16 average = e.load_at(i, lanes);
    store_average(e, i, average + weight * (p.load_at(i, lanes) - average), own, lanes);
  });
}

void apply(const EmaTensor& tensor, const RoundingKeys& keys, float alpha, int64_t begin, int64_t count) {
  if (is_float(tensor.param) && is_float(tensor.average)) {
    apply_for<true>(tensor, keys, alpha, begin, count);
  } else {
    apply_for<false>(tensor, keys, alpha, begin, count);
  }
}

struct Element {
  F32x16 p, m, v, e;
};

template <bool kPending>
CIT_INLINE void adamw_step(Element& x, const F32x16& g, const AdamWStep& step, float pending) {
  if (kPending) x.e = x.e + splat(pending) * (x.p - x.e);
  const F32x16 m = x.m + splat(step.weight1) * (g - x.m);
  const F32x16 v = splat(step.beta2) * x.v + splat(step.weight2) * (g * g);
  const F32x16 root = square_root(v) * splat(step.root_scale) + splat(step.eps);
  const F32x16 p = x.p * splat(step.keep) - splat(step.step_size) * (m / root);
  x.m = where_finite(g, m, x.m);
  x.v = where_finite(g, v, x.v);
  x.p = where_finite(g, p, x.p);
}

// The arguments of `adamw`.
struct Sweep {
  const AdamWTensor& tensor;
  const AdamWStep& step;
  const RoundingKeys& keys;
  float pending;
  int64_t begin, count;
};

template <bool kFloat, bool kPending, Previous kPrevious>
Norms adamw_of(const Sweep& sweep) {
  const EmaTensor& ema = sweep.tensor.ema;
  const Stream<kFloat> p(ema.param), e(ema.average), g(ema.grad), previous(ema.previous_grad);
  const Stream<kFloat> m(sweep.tensor.exp_avg), v(sweep.tensor.exp_avg_sq);
  const AdamWStep step = sweep.step;
  const RoundingKeys keys = sweep.keys;
  const float pending = sweep.pending;
  Sums sums;
  for_each_vector(sweep.begin, sweep.count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    prefetch(i, p, g, m, v, e);
    Element x{p.load_at(i, lanes), m.load_at(i, lanes), v.load_at(i, lanes), e.load_at(i, lanes)};
    const F32x16 grad = g.load_at(i, lanes);
    adamw_step<kPending>(x, grad, step, pending);
    m.store_state_at(i, x.m, keys.exp_avg, lanes);
    v.store_state_at(i, x.v, keys.exp_avg_sq, lanes);
    // The norms are those of the values as they are stored.
    x.p = p.store_at(i, x.p, lanes);
    if (kPending) x.e = store_average(e, i, x.e, keys, lanes);
    add_norms<kPrevious>(x.p, x.e, grad, previous, i, lanes, sums);
  });
  return sums.total();
}

template <bool kFloat, bool kPending>
Norms adamw_for(const Sweep& sweep, bool store_grads) {
  if (sweep.tensor.ema.previous_grad.data == nullptr) return adamw_of<kFloat, kPending, Previous::kNone>(sweep);
  if (!store_grads) return adamw_of<kFloat, kPending, Previous::kRead>(sweep);
  return adamw_of<kFloat, kPending, Previous::kReplace>(sweep);
}

Norms adamw(const AdamWTensor& tensor, const AdamWStep& step, const RoundingKeys& keys, float pending, bool store_grads,
            int64_t begin, int64_t count) {
  const Sweep sweep{tensor, step, keys, pending, begin, count};
  const EmaTensor& ema = tensor.ema;
  const bool floats = is_float(ema.param) && is_float(ema.average) && is_float(ema.grad) &&
                      is_float(ema.previous_grad) && is_float(tensor.exp_avg) && is_float(tensor.exp_avg_sq);
  if (floats) {
    return pending != 0.0f ? adamw_for<true, true>(sweep, store_grads) : adamw_for<true, false>(sweep, store_grads);
  }
  return pending != 0.0f ? adamw_for<false, true>(sweep, store_grads) : adamw_for<false, false>(sweep, store_grads);
}

}  // namespace

extern const BalanceEmaKernels kBalanceEma;
const BalanceEmaKernels kBalanceEma = {norms, apply, adamw};

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
