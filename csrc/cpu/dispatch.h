// Which instruction set runs, chosen once at run time.
#pragma once

#include <string>
#include <vector>

namespace cit {

enum class SimdLevel { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best level of this processor, or the one named by the environment variable CIT_FAST_SIMD or by set_simd_level.
// Throws std::invalid_argument when the variable names an unknown level or one that this processor or build lacks.
SimdLevel simd_level();

// Whether kernels may use AVX512-BF16: the level is AVX-512 and the processor has it.
bool has_bfloat16_products();

// name: "baseline", "avx2" or "avx512"; "" goes back to the default. Throws like simd_level. For tests.
void set_simd_level(const std::string& name);

// Names of the levels this processor and this build have, slowest first.
std::vector<std::string> simd_levels();

// What a person reads: "AVX-512", "AVX2" or "baseline SIMD".
std::string simd_name();

}  // namespace cit
