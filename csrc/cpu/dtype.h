// Element types that cross the boundary from Python, and an untyped array of them.
#pragma once

#include <cstdint>

namespace cit {

// The values are part of the contract with cit_fast/ops/balance_ema/native.py.
enum class DType : std::int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Array {
  void* data;
  DType dtype;
};

}  // namespace cit
