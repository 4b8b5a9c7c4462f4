// A tensor as a stream of vectors of 16 floats, whatever its dtype.
#pragma once

#include "cpu/dtype.h"
#include "cpu/simd/simd_half.h"

namespace cit {
namespace CIT_SIMD_NAMESPACE {

// Which lanes of a vector are elements: all, or the first `count` < 16 at the end of a row.
struct All {};
struct First {
  int count;
};

// Calls step(i, All or First) for the elements [begin, begin + count), 16 at a time.
template <class Step>
CIT_INLINE void for_each_vector(int64_t begin, int64_t count, const Step& step) {
  const int64_t end = begin + count;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) step(i, All{});
  if (i < end) step(i, First{static_cast<int>(end - i)});
}

CIT_INLINE F32x16 load(const float* source, All) {
  return load(source);
}
CIT_INLINE F32x16 load(const float* source, First lanes) {
  return load_first(source, lanes.count);
}
CIT_INLINE void store(float* target, const F32x16& value, All) {
  store(target, value);
}
CIT_INLINE void store(float* target, const F32x16& value, First lanes) {
  store_first(target, value, lanes.count);
}
CIT_INLINE Halves load(const uint16_t* source, All) {
  return load_halves(source);
}
CIT_INLINE Halves load(const uint16_t* source, First lanes) {
  return load_first_halves(source, lanes.count);
}
CIT_INLINE void store(uint16_t* target, const Halves& value, All) {
  store_halves(target, value);
}
CIT_INLINE void store(uint16_t* target, const Halves& value, First lanes) {
  store_first_halves(target, value, lanes.count);
}

// 0 in the lanes that are no elements.
CIT_INLINE F32x16 only(const F32x16& value, All) {
  return value;
}
CIT_INLINE F32x16 only(const F32x16& value, First lanes) {
  float all[kLanes];
  store(all, value);
  return load_first(all, lanes.count);
}

// kFloat: the tensor is known to hold floats, which saves the choice at every vector. That choice is always the same
// and costs little; a loop for every combination of dtypes would be hundreds of loops.
template <bool kFloat>
class Stream {
 public:
  explicit Stream(const Array& array) : data_(array.data), dtype_(array.dtype) {}

  template <class Lanes>
  __attribute__((always_inline)) F32x16 load_at(int64_t i, Lanes lanes) const {
    if (is_float()) return load(floats() + i, lanes);
    return from_halves(load(halves() + i, lanes), dtype_);
  }

  // To the nearest. Returns the values as they are stored.
  template <class Lanes>
  __attribute__((always_inline)) F32x16 store_at(int64_t i, const F32x16& value, Lanes lanes) const {
    if (is_float()) {
      store(floats() + i, value, lanes);
      return value;
    }
    const Halves rounded = to_halves(value, dtype_);
    store(halves() + i, rounded, lanes);
    return from_halves(rounded, dtype_);
  }

  // By stochastic rounding, for state of the optimizer in float32 or bfloat16.
  template <class Lanes>
  __attribute__((always_inline)) F32x16 store_state_at(int64_t i, const F32x16& value, uint32_t key,
                                                       Lanes lanes) const {
    if (is_float()) {
      store(floats() + i, value, lanes);
      return value;
    }
    const Halves rounded = to_bfloat16_stochastically(value, static_cast<uint32_t>(i), key);
    store(halves() + i, rounded, lanes);
    return from_bfloat16(rounded);
  }

  void prefetch(int64_t i) const { __builtin_prefetch(static_cast<const char*>(data_) + (is_float() ? 4 : 2) * i); }

 private:
  bool is_float() const { return kFloat || dtype_ == DType::kFloat32; }
  float* floats() const { return static_cast<float*>(data_); }
  uint16_t* halves() const { return static_cast<uint16_t*>(data_); }

  void* data_;
  DType dtype_;
};

}  // namespace CIT_SIMD_NAMESPACE
}  // namespace cit
