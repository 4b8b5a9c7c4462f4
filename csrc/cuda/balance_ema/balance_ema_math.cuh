// What one thread of csrc/cuda/balance_ema/balance_ema_blocks.cuh does to the elements of a tensor, on a GPU or on the
// host.
#pragma once

#include <cmath>

#include "cuda/balance_ema/balance_ema.h"
#include "cuda/balance_ema/elements.cuh"

namespace cit::gpu {

// One tensor of the lists.
struct Tensor {
  Elements streams[kStreams];
  std::uint32_t key[3];  // of the rounding of average, exp_avg and exp_avg_sq
  bool nearest;          // the average is rounded to the nearest instead
};

CIT_HOST_DEVICE inline Tensor open_tensor(const Lists& lists, const Shape& shape, std::int64_t i,
                                          const Rounding& rounding) {
  Tensor tensor;
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    tensor.streams[s] = {reinterpret_cast<void*>(lists.addresses[s * lists.count + i]),
                         static_cast<int>(shape.dtypes >> (8 * s) & 0xff)};
  }
#pragma unroll
  for (int s = 0; s < 3; ++s) tensor.key[s] = rounding_key(rounding.seed, i, s);
  tensor.nearest = rounding.nearest;
  return tensor;
}

// The elements of one tensor, or of one piece of it, that a thread goes through: groups `lane`, `lane` + `lanes`, ...
struct Span {
  std::int64_t begin;
  int count;
  int lane, lanes;
};

CIT_HOST_DEVICE inline int group_count(int count, int i) {
  return count - i < kGroup ? count - i : kGroup;
}

// The part of a thread, or more, of the three norms. A sum that is not finite marks the tensor as one to leave out.
struct Partial {
  float distance, gradient, gradient_change;
};

CIT_HOST_DEVICE inline Partial operator+(const Partial& x, const Partial& y) {
  return {x.distance + y.distance, x.gradient + y.gradient, x.gradient_change + y.gradient_change};
}

// Adds |g| and |g - g_prev| of a group and, when `store_grads`, makes the gradient the previous one.
CIT_HOST_DEVICE inline void add_gradients(const Tensor& tensor, std::int64_t at, int n, const Group& g_group,
                                          const float (&g)[kGroup], const Group& previous_group, bool store_grads,
                                          Partial& sums) {
#pragma unroll
  for (int k = 0; k < kGroup; ++k) sums.gradient += absolute(g[k]);
  const Elements& previous = tensor.streams[kPreviousGrad];
  if (previous.data == nullptr) return;
  float before[kGroup];
  to_floats(previous_group, previous.dtype, before);
#pragma unroll
  for (int k = 0; k < kGroup; ++k) sums.gradient_change += absolute(g[k] - before[k]);
  if (!store_grads) return;
  const bool same = tensor.streams[kGrad].dtype == previous.dtype;
  store(previous, at, n, same ? g_group : from_floats(g, previous.dtype));
}

// The norms of a span; there, when `store_grads`, previous_grad becomes the gradient.
CIT_HOST_DEVICE inline Partial norms_of_span(const Tensor& tensor, bool store_grads, const Span& span) {
  const Elements* streams = tensor.streams;
  Partial sums{};
#pragma unroll 1
  for (int i = span.lane * kGroup; i < span.count; i += span.lanes * kGroup) {
    const std::int64_t at = span.begin + i;
    const int n = group_count(span.count, i);
    const Group p_group = load(streams[kParam], at, n);
    const Group e_group = load(streams[kAverage], at, n);
    const Group g_group = load(streams[kGrad], at, n);
    Group previous_group{};
    if (streams[kPreviousGrad].data != nullptr) previous_group = load(streams[kPreviousGrad], at, n);
    float p[kGroup], e[kGroup], g[kGroup];
    to_floats(p_group, streams[kParam].dtype, p);
    to_floats(e_group, streams[kAverage].dtype, e);
    to_floats(g_group, streams[kGrad].dtype, g);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) sums.distance += absolute(p[k] - e[k]);
    add_gradients(tensor, at, n, g_group, g, previous_group, store_grads, sums);
  }
  return sums;
}

// e += alpha (p - e) in `e`; returns e as it is to be stored, and leaves in `e` what that holds.
CIT_HOST_DEVICE inline Group move_average(const Tensor& tensor, float alpha, std::int64_t at, const float (&p)[kGroup],
                                          float (&e)[kGroup]) {
#pragma unroll
  for (int k = 0; k < kGroup; ++k) e[k] = e[k] + alpha * (p[k] - e[k]);
  const int dtype = tensor.streams[kAverage].dtype;
  const Group group = tensor.nearest ? from_floats(e, dtype) : from_state(e, dtype, at, tensor.key[0]);
  to_floats(group, dtype, e);
  return group;
}

CIT_HOST_DEVICE inline void apply_to_span(const Tensor& tensor, float alpha, const Span& span) {
  const Elements* streams = tensor.streams;
#pragma unroll 1
  for (int i = span.lane * kGroup; i < span.count; i += span.lanes * kGroup) {
    const std::int64_t at = span.begin + i;
    const int n = group_count(span.count, i);
    const Group p_group = load(streams[kParam], at, n);
    const Group e_group = load(streams[kAverage], at, n);
    float p[kGroup], e[kGroup];
    to_floats(p_group, streams[kParam].dtype, p);
    to_floats(e_group, streams[kAverage].dtype, e);
    store(streams[kAverage], at, n, move_average(tensor, alpha, at, p, e));
  }
}

// AdamW (Loshchilov and Hutter, 2019, algorithm 2) made ready for the inner loop.
CIT_HOST_DEVICE inline Step make_step(const AdamW& adamw, double step, double lr, const Rounding& rounding) {
  return {static_cast<float>(1.0 - lr * adamw.weight_decay),
          static_cast<float>(1.0 - adamw.beta1),
          static_cast<float>(adamw.beta2),
          static_cast<float>(1.0 - adamw.beta2),
          static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(adamw.beta2, step))),
          static_cast<float>(adamw.eps),
          static_cast<float>(lr / (1.0 - std::pow(adamw.beta1, step))),
          rounding};
}

// The whole step for a span: the pending update of the average, AdamW, the norms with the new parameter.
CIT_HOST_DEVICE inline Partial adamw_on_span(const Tensor& tensor, const Step& step, float pending, bool store_grads,
                                             const Span& span) {
  const Elements* streams = tensor.streams;
  const int p_dtype = streams[kParam].dtype;
  Partial sums{};
#pragma unroll 1
  for (int i = span.lane * kGroup; i < span.count; i += span.lanes * kGroup) {
    const std::int64_t at = span.begin + i;
    const int n = group_count(span.count, i);
    const Group p_group = load(streams[kParam], at, n);
    const Group e_group = load(streams[kAverage], at, n);
    const Group g_group = load(streams[kGrad], at, n);
    const Group m_group = load(streams[kExpAvg], at, n);
    const Group v_group = load(streams[kExpAvgSq], at, n);
    Group previous_group{};
    if (streams[kPreviousGrad].data != nullptr) previous_group = load(streams[kPreviousGrad], at, n);
    float p[kGroup], e[kGroup], g[kGroup], m[kGroup], v[kGroup];
    to_floats(p_group, p_dtype, p);
    to_floats(e_group, streams[kAverage].dtype, e);
    if (pending != 0.0f) store(streams[kAverage], at, n, move_average(tensor, pending, at, p, e));
    to_floats(g_group, streams[kGrad].dtype, g);
    to_floats(m_group, streams[kExpAvg].dtype, m);
    to_floats(v_group, streams[kExpAvgSq].dtype, v);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const float new_m = m[k] + step.weight1 * (g[k] - m[k]);
      const float new_v = step.beta2 * v[k] + step.weight2 * (g[k] * g[k]);
      const float root = std::sqrt(new_v) * step.root_scale + step.eps;
      const float new_p = p[k] * step.keep - step.step_size * (new_m / root);
      const bool usable = is_finite(g[k]);  // or the element stays as it is
      m[k] = usable ? new_m : m[k];
      v[k] = usable ? new_v : v[k];
      p[k] = usable ? new_p : p[k];
    }
    store(streams[kExpAvg], at, n, from_state(m, streams[kExpAvg].dtype, at, tensor.key[1]));
    store(streams[kExpAvgSq], at, n, from_state(v, streams[kExpAvgSq].dtype, at, tensor.key[2]));
    const Group new_p = from_floats(p, p_dtype);
    store(streams[kParam], at, n, new_p);
    to_floats(new_p, p_dtype, p);
    // Past the end of the tensor p is 0 / 0 when eps is 0.
#pragma unroll
    for (int k = 0; k < kGroup; ++k) sums.distance += k < n ? absolute(p[k] - e[k]) : 0.0f;
    add_gradients(tensor, at, n, g_group, g, previous_group, store_grads, sums);
  }
  return sums;
}

}  // namespace cit::gpu
