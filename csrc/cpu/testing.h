// What the stand-alone tests of the sanitizers share: a count of failures, half-precision values, the level's name as
// the only argument.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

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
