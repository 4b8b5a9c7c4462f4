// What the stand-alone tests of the sanitizers share: a count of failures, half-precision values, the level's name as
// the only argument.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace cit::testing {

inline int failures = 0;

inline void check(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// Exact for small integers over 8, which both half formats have.
inline std::uint16_t to_half(float value, DType dtype) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::kBFloat16) return static_cast<std::uint16_t>(bits >> 16);
  if (value == 0.0f) return 0;
  return static_cast<std::uint16_t>(((bits >> 16) & 0x8000u) | (((bits & 0x7fffffffu) - 0x38000000u) >> 13));
}

// Values in a dtype, in a buffer of exactly their size.
class Buffer {
 public:
  Buffer(const std::vector<float>& values, DType dtype)
      : dtype_(dtype), bytes_(values.size() * (dtype == DType::kFloat32 ? 4 : 2)) {
    data_ = std::make_unique<unsigned char[]>(bytes_);
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (dtype == DType::kFloat32) {
        std::memcpy(data_.get() + 4 * i, &values[i], 4);
      } else {
        const std::uint16_t half = to_half(values[i], dtype);
        std::memcpy(data_.get() + 2 * i, &half, 2);
      }
    }
  }
  Array array() { return {data_.get(), dtype_}; }
  float* floats() { return reinterpret_cast<float*>(data_.get()); }
  bool same_bits(const Buffer& other) const {
    return bytes_ == other.bytes_ && std::memcmp(data_.get(), other.data_.get(), bytes_) == 0;
  }

 private:
  DType dtype_;
  std::size_t bytes_;
  std::unique_ptr<unsigned char[]> data_;
};

// Runs the tests at the SIMD level that the first argument names; 77 tells CTest that this machine lacks it.
template <typename Tests>
int run(int argc, char** argv, Tests tests) {
  try {
    set_simd_level(argc > 1 ? argv[1] : "");
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "skipped: %s\n", error.what());
    return 77;
  }
  tests();
  std::printf("%s: %d failures\n", simd_name().c_str(), failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace cit::testing
