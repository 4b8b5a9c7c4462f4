// Inner loops of balance_ema.h, compiled once per instruction set.
//
// All of them wait for memory, so what counts is bytes per float32 parameter: norms 20 (read p, e, g, g_prev; write
// g_prev), apply 12 (read p, e; write e), AdamW with everything in one sweep 44 (read p, g, m, v, e, g_prev; write p,
// m, v, e, g_prev). Six read and five write streams are more than hardware prefetchers follow, hence the prefetch by
// hand. float32 tensors are used in place in one loop; 16-bit ones pass through float blocks that stay in the
// first-level cache.

#include "balance_ema_kernels.h"

#include "simd.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {
namespace {

constexpr int64_t kBlock = 1024;         // floats per conversion buffer: 4 KiB, five of them fit the first-level cache
constexpr int64_t kPrefetchAhead = 512;  // floats, 2 KiB: measured best on a two-core server part

template <class... Pointers>
inline void prefetch(int64_t i, const Pointers*... streams) {
  (__builtin_prefetch(streams + i + kPrefetchAhead), ...);
}

struct Sums {
  F32x16 distance = splat(0.0f);
  F32x16 gradient = splat(0.0f);
  F32x16 gradient_change = splat(0.0f);

  Norms total() const { return {sum(distance), sum(gradient), sum(gradient_change)}; }
};

template <bool kHasPrevious>
inline void norms_step(const F32x16& p, const F32x16& e, const F32x16& g, const F32x16& previous, Sums& sums) {
  sums.distance = sums.distance + absolute(p - e);
  sums.gradient = sums.gradient + absolute(g);
  if (kHasPrevious) sums.gradient_change = sums.gradient_change + absolute(g - previous);
}

// `previous` holds g_prev on entry and g on return.
template <bool kHasPrevious>
void norms_block(const float* p, const float* e, const float* g, float* previous, int64_t count, Sums& total) {
  Sums sums = total;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    prefetch(i, p, e, g);
    const F32x16 grad = load(g + i);
    F32x16 before = grad;
    if (kHasPrevious) {
      prefetch(i, previous);
      before = load(previous + i);
      store(previous + i, grad);
    }
    norms_step<kHasPrevious>(load(p + i), load(e + i), grad, before, sums);
  }
  if (const int rest = static_cast<int>(count - i); rest > 0) {
    const F32x16 grad = load_first(g + i, rest);
    F32x16 before = grad;
    if (kHasPrevious) {
      before = load_first(previous + i, rest);
      store_first(previous + i, grad, rest);
    }
    norms_step<kHasPrevious>(load_first(p + i, rest), load_first(e + i, rest), grad, before, sums);
  }
  total = sums;
}

inline void norms_block_any(const float* p, const float* e, const float* g, float* previous, int64_t count,
                            Sums& sums) {
  if (previous != nullptr) {
    norms_block<true>(p, e, g, previous, count, sums);
  } else {
    norms_block<false>(p, e, g, nullptr, count, sums);
  }
}

inline bool is_float(const Array& array) {
  return array.data == nullptr || array.dtype == DType::kFloat32;
}

// Blocks of whole vectors keep every element in the same lane as one long loop does.
inline int64_t block_size(bool in_place, int64_t count) {
  return in_place || count < kBlock ? count : kBlock;
}

inline int64_t smaller(int64_t x, int64_t y) {
  return x < y ? x : y;
}

// g_prev as floats that a kernel may overwrite with g; null when there is none.
inline float* open_previous(const Array& array, int64_t begin, int64_t count, float* scratch) {
  if (array.data == nullptr) return nullptr;
  read(array, begin, count, scratch);
  return write_target(array, begin, scratch);
}

inline void close_previous(const Array& array, int64_t begin, int64_t count, const float* scratch) {
  if (array.data != nullptr) write_back(array, begin, count, scratch);
}

Norms norms(const EmaTensor& tensor, int64_t begin, int64_t count) {
  alignas(64) float p_scratch[kBlock], g_scratch[kBlock], previous_scratch[kBlock];
  const bool in_place = is_float(tensor.param) && is_float(tensor.grad) && is_float(tensor.previous_grad);
  const int64_t block = block_size(in_place, count);
  Sums sums;
  for (int64_t at = begin; at < begin + count; at += block) {
    const int64_t n = smaller(block, begin + count - at);
    float* previous = open_previous(tensor.previous_grad, at, n, previous_scratch);
    norms_block_any(read(tensor.param, at, n, p_scratch), tensor.average + at, read(tensor.grad, at, n, g_scratch),
                    previous, n, sums);
    close_previous(tensor.previous_grad, at, n, previous_scratch);
  }
  return sums.total();
}

void apply(const EmaTensor& tensor, float alpha, int64_t begin, int64_t count) {
  alignas(64) float scratch[kBlock];
  const int64_t block = block_size(is_float(tensor.param), count);
  const F32x16 weight = splat(alpha);
  for (int64_t at = begin; at < begin + count; at += block) {
    const int64_t n = smaller(block, begin + count - at);
    const float* p = read(tensor.param, at, n, scratch);
    float* e = tensor.average + at;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      prefetch(i, p, e);
      const F32x16 average = load(e + i);
      store(e + i, average + weight * (load(p + i) - average));
    }
    if (const int rest = static_cast<int>(n - i); rest > 0) {
      const F32x16 average = load_first(e + i, rest);
      store_first(e + i, average + weight * (load_first(p + i, rest) - average), rest);
    }
  }
}

struct Lanes {
  F32x16 p, m, v, e;
};

template <bool kPending>
inline void adamw_step(Lanes& x, const F32x16& g, const AdamWStep& step, float pending) {
  if (kPending) x.e = x.e + splat(pending) * (x.p - x.e);
  x.m = x.m + splat(step.weight1) * (g - x.m);
  x.v = splat(step.beta2) * x.v + splat(step.weight2) * (g * g);
  const F32x16 root = square_root(x.v) * splat(step.root_scale) + splat(step.eps);
  x.p = x.p * splat(step.keep) - splat(step.step_size) * (x.m / root);
}

struct AdamWBlock {
  const float* p;
  float* p_out;
  const float* g;
  float *m, *v, *e, *previous;
};

// kNorms: sum the norms in the same loop. Not for 16-bit parameters, whose norms are those of the rounded new value.
template <bool kPending, bool kNorms>
void adamw_block(const AdamWBlock& block, const AdamWStep& step, float pending, int64_t count, Sums& total) {
  const float *p = block.p, *g = block.g;
  float *p_out = block.p_out, *m = block.m, *v = block.v, *e = block.e, *previous = block.previous;
  Sums sums = total;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    prefetch(i, p, g, m, v, e);
    Lanes x{load(p + i), load(m + i), load(v + i), load(e + i)};
    const F32x16 grad = load(g + i);
    adamw_step<kPending>(x, grad, step, pending);
    store(p_out + i, x.p);
    store(m + i, x.m);
    store(v + i, x.v);
    if (kPending) store(e + i, x.e);
    if (kNorms) {
      prefetch(i, previous);
      norms_step<true>(x.p, x.e, grad, load(previous + i), sums);
      store(previous + i, grad);
    }
  }
  if (const int rest = static_cast<int>(count - i); rest > 0) {
    // v = 1 in the lanes past the end: eps may be 0, and 0 / 0 would spoil the norms.
    Lanes x{load_first(p + i, rest), load_first(m + i, rest), load_first(v + i, rest, 1.0f), load_first(e + i, rest)};
    const F32x16 grad = load_first(g + i, rest);
    adamw_step<kPending>(x, grad, step, pending);
    store_first(p_out + i, x.p, rest);
    store_first(m + i, x.m, rest);
    store_first(v + i, x.v, rest);
    if (kPending) store_first(e + i, x.e, rest);
    if (kNorms) {
      norms_step<true>(x.p, x.e, grad, load_first(previous + i, rest), sums);
      store_first(previous + i, grad, rest);
    }
  }
  total = sums;
}

template <bool kNorms>
inline void adamw_block_any(const AdamWBlock& block, const AdamWStep& step, float pending, int64_t count, Sums& sums) {
  if (pending != 0.0f) {
    adamw_block<true, kNorms>(block, step, pending, count, sums);
  } else {
    adamw_block<false, kNorms>(block, step, pending, count, sums);
  }
}

Norms adamw(const AdamWTensor& tensor, const AdamWStep& step, float pending, int64_t begin, int64_t count) {
  alignas(64) float p_scratch[kBlock], g_scratch[kBlock], previous_scratch[kBlock];
  const EmaTensor& ema = tensor.ema;
  const bool in_place = is_float(ema.param) && is_float(ema.grad) && is_float(ema.previous_grad);
  const bool fused = is_float(ema.param) && ema.previous_grad.data != nullptr;
  const int64_t block = block_size(in_place, count);
  Sums sums;
  for (int64_t at = begin; at < begin + count; at += block) {
    const int64_t n = smaller(block, begin + count - at);
    const float* p = read(ema.param, at, n, p_scratch);
    const float* g = read(ema.grad, at, n, g_scratch);
    float* previous = open_previous(ema.previous_grad, at, n, previous_scratch);
    float* e = ema.average + at;
    const AdamWBlock streams{
        p, write_target(ema.param, at, p_scratch), g, tensor.exp_avg + at, tensor.exp_avg_sq + at, e, previous};
    if (fused) {
      adamw_block_any<true>(streams, step, pending, n, sums);
    } else {
      adamw_block_any<false>(streams, step, pending, n, sums);
      write_back(ema.param, at, n, p_scratch);
      norms_block_any(read(ema.param, at, n, p_scratch), e, g, previous, n, sums);
    }
    close_previous(ema.previous_grad, at, n, previous_scratch);
  }
  return sums.total();
}

}  // namespace

extern const BalanceEmaKernels kBalanceEma;
const BalanceEmaKernels kBalanceEma = {norms, apply, adamw};

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
