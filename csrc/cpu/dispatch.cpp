#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace cit {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
constexpr int kUnset = -1;

std::atomic<int> g_level{kUnset};

bool supported(int level) {
#ifdef CIT_FAST_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return level == 0 || (level == 1 && avx2) || (level == 2 && avx512);
#else
  return level == 0;
#endif
}

int best() {
  for (int level = 2; level > 0; --level) {
    if (supported(level)) return level;
  }
  return 0;
}

int parse(const std::string& name, const char* where) {
  for (int level = 0; level <= 2; ++level) {
    if (name != kNames[level]) continue;
    if (!supported(level)) {
      throw std::invalid_argument(std::string(where) + "=" + name + ": this processor or build does not have it");
    }
    return level;
  }
  throw std::invalid_argument(std::string(where) + "=" + name + ": unknown; accepted: baseline, avx2, avx512");
}

int default_level() {
  const char* wanted = std::getenv("CIT_FAST_SIMD");
  return wanted != nullptr && *wanted != '\0' ? parse(wanted, "CIT_FAST_SIMD") : best();
}

}  // namespace

SimdLevel simd_level() {
  int level = g_level.load(std::memory_order_relaxed);
  if (level == kUnset) {
    level = default_level();
    g_level.store(level, std::memory_order_relaxed);
  }
  return static_cast<SimdLevel>(level);
}

bool has_bfloat16_products() {
#ifdef CIT_FAST_X86
  __builtin_cpu_init();
  return simd_level() == SimdLevel::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void set_simd_level(const std::string& name) {
  g_level.store(name.empty() ? kUnset : parse(name, "simd level"));
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (int level = 0; level <= 2; ++level) {
    if (supported(level)) names.emplace_back(kNames[level]);
  }
  return names;
}

std::string simd_name() {
  switch (simd_level()) {
    case SimdLevel::kAvx512:
      return "AVX-512";
    case SimdLevel::kAvx2:
      return "AVX2";
    default:
      return "baseline SIMD";
  }
}

}  // namespace cit
