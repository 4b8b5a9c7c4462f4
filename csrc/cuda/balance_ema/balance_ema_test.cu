// Checks the GPU kernels without a GPU: all of what their blocks do, on the host (host_block.h), against the definition
// written out below element by element. Elements must have the same bits, norms the same value up to rounding. Exit
// code 0: all agree.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

#include "cuda/balance_ema/host_block.h"

namespace {

using namespace cit::gpu;
using cit::DType;
using cit::Rule;

// A thread adds 32 floats, then come 8 levels of a tree and the pieces in double.
constexpr double kNormTolerance = 48.0 / (1 << 24);

// No elements, a part of a group, lanes of a warp, a whole block, one piece and several.
constexpr std::int64_t kSizes[] = {0, 1, 5, 7, 8, 16, 33, 255, 300, 1800, 2047, 2050, 4100, 8191, 8192, 8193, 20000};

constexpr cit::RuleOptions kOptions(Rule rule) {
  return {rule, 0.9, 0.01, 2.0};
}

int failures = 0;

void expect(bool right, const char* what, std::size_t tensor, std::int64_t at) {
  if (right) return;
  if (++failures <= 20) std::printf("%s is wrong in tensor %zu at %lld\n", what, tensor, static_cast<long long>(at));
}

// The definition of the random bits, in 64-bit arithmetic.
std::uint32_t defined_mix(std::uint64_t x) {
  constexpr std::uint64_t kWord = 0xffffffffu;
  x ^= x >> 16;
  x = x * 0x7feb352d & kWord;
  x ^= x >> 15;
  x = x * 0x846ca68b & kWord;
  return static_cast<std::uint32_t>(x ^ x >> 16);
}

std::uint16_t defined_rounding(float value, std::uint32_t seed, std::size_t tensor, int state, std::int64_t i) {
  const std::uint32_t key = defined_mix(seed ^ defined_mix(3 * tensor + state + 1));
  const std::uint32_t random16 = defined_mix(static_cast<std::uint32_t>(i) ^ key) / 65536;
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  const auto below = static_cast<std::uint16_t>(bits >> 16);
  if (std::isinf(value)) return below;
  const auto rounded = static_cast<std::uint16_t>((static_cast<std::uint64_t>(bits) + random16) >> 16);
  return (rounded & 0x7fff) == 0x7f80 ? below : rounded;
}

// One stream of one tensor, `offset` elements after an address aligned to 16 bytes, between bytes that must stay.
struct Memory {
  std::vector<uint4> storage;
  std::size_t bytes, at;
  DType dtype;

  Memory(std::size_t count, DType its_dtype, int offset) : dtype(its_dtype) {
    const std::size_t size = dtype == DType::kFloat32 ? 4 : 2;
    bytes = count * size;
    at = 64 + offset * size;
    storage.resize((at + bytes) / sizeof(uint4) + 8);
    std::memset(storage.data(), 0xa5, storage.size() * sizeof(uint4));
  }
  char* data() { return reinterpret_cast<char*>(storage.data()) + at; }
  const char* data() const { return const_cast<Memory*>(this)->data(); }
  bool only_itself_changed() const {
    const auto* all = reinterpret_cast<const unsigned char*>(storage.data());
    for (std::size_t i = 0; i < storage.size() * sizeof(uint4); ++i) {
      if ((i < at || i >= at + bytes) && all[i] != 0xa5) return false;
    }
    return true;
  }
  void set(std::size_t i, float value) {
    if (dtype == DType::kFloat32) {
      reinterpret_cast<float*>(data())[i] = value;
    } else if (dtype == DType::kBFloat16) {
      reinterpret_cast<__nv_bfloat16*>(data())[i] = __float2bfloat16(value);
    } else {
      reinterpret_cast<__half*>(data())[i] = __float2half(value);
    }
  }
  float get(std::size_t i) const {
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(data())[i];
    if (dtype == DType::kBFloat16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data())[i]);
    return __half2float(reinterpret_cast<const __half*>(data())[i]);
  }
  void set_state(std::size_t i, float value, std::uint32_t seed, std::size_t tensor, int state) {
    if (dtype == DType::kFloat32) return set(i, value);
    reinterpret_cast<std::uint16_t*>(data())[i] = defined_rounding(value, seed, tensor, state, i);
  }
};

struct One {
  std::int64_t size;
  std::vector<Memory> streams;  // in the order of Stream; no elements where there is none
};

struct Case {
  std::vector<One> tensors;
  bool moments, previous;
};

Case make_case(bool moments, bool previous, int offset, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const auto any = [&](int n) { return static_cast<DType>(random() % n); };
  Case made{{}, moments, previous};
  for (const std::int64_t count : kSizes) {
    One one{count, {}};
    const DType dtypes[kStreams] = {any(3), any(2), any(3), any(3), any(2), any(2)};
    for (int s = 0; s < kStreams; ++s) one.streams.emplace_back(count, dtypes[s], offset);
    for (std::int64_t i = 0; i < count; ++i) {
      const float p = normal(random), g = normal(random);
      const float values[kStreams] = {p,
                                      p + std::copysign(4.0f, normal(random)),
                                      g,
                                      g + normal(random),
                                      0.1f * normal(random),
                                      0.01f * std::abs(normal(random))};
      for (int s = 0; s < kStreams; ++s) one.streams[s].set(i, values[s]);
    }
    made.tensors.push_back(std::move(one));
  }
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  made.tensors[4].streams[kGrad].set(3, nan);
  made.tensors[9].streams[kGrad].set(1700, -infinity);
  made.tensors[8].streams[kPreviousGrad].set(299, nan);
  made.tensors[10].streams[kParam].set(2046, infinity);
  made.tensors[16].streams[kGrad].set(19999, infinity);
  made.tensors[15].streams[kParam].set(8192, nan);
  return made;
}

struct Results {
  std::vector<double> norms;
  std::vector<float> alphas;
  std::vector<char> fallbacks;
  std::vector<float> remaining;

  explicit Results(std::size_t count)
      : norms(3 * count, -1.0), alphas(count, 0.0f), fallbacks(count), remaining(count, 2.0f) {}
};

// Runs what the kernels run, its blocks in random order.
struct Emulation {
  std::vector<std::int64_t> table;
  Layout layout;
  std::vector<Slot> slots;
  std::vector<std::int64_t> order;
  HostBlocks* blocks;

  Emulation(Case& on, HostBlocks* run_on, unsigned seed) : blocks(run_on) {
    for (int s = 0; s < kStreams; ++s) {
      const bool there = s >= kExpAvg ? on.moments : s != kPreviousGrad || on.previous;
      for (One& one : on.tensors) table.push_back(there ? reinterpret_cast<std::int64_t>(one.streams[s].data()) : 0);
    }
    std::vector<std::int64_t> sizes, dtypes;
    for (const One& one : on.tensors) {
      sizes.push_back(one.size);
      dtypes.push_back(0);
      for (int s = 0; s < kStreams; ++s) dtypes.back() |= static_cast<std::int64_t>(one.streams[s].dtype) << 8 * s;
    }
    layout = make_layout(sizes, dtypes);
    table.insert(table.end(), layout.words.begin(), layout.words.end());
    slots.resize(layout.slots);
    for (std::int64_t i = 0; i < layout.blocks; ++i) order.push_back(i);
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  }
  Lists lists() const { return open_table(table.data(), layout.count); }
  Outcome outcome(Results& results, Rule rule, bool store_grads) const {
    return {results.norms.data(),     results.alphas.data(), reinterpret_cast<bool*>(results.fallbacks.data()),
            results.remaining.data(), kOptions(rule),        store_grads};
  }
  void norms(const Outcome& outcome) {
    blocks->run(order, [&](auto& block) { norms_of_block(block, lists(), slots.data(), outcome); });
  }
  void apply(const float* alphas, const Rounding& rounding) {
    blocks->run(order, [&](auto& block) { apply_of_block(block, lists(), alphas, rounding); });
  }
  void adamw(const Outcome& outcome, const Step& step, bool on_device) {
    const Step none{};
    blocks->run(order, [&](auto& block) {
      adamw_of_block(block, lists(), slots.data(), outcome, on_device ? none : step, on_device ? &step : nullptr);
    });
  }
};

// Calls body(tensor number, tensor, element).
template <class Body>
void each_element(Case& on, const Body& body) {
  for (std::size_t t = 0; t < on.tensors.size(); ++t) {
    for (std::int64_t i = 0; i < on.tensors[t].size; ++i) body(t, on.tensors[t], i);
  }
}

void defined_apply(Case& on, const std::vector<float>& alphas, const Rounding& rounding) {
  each_element(on, [&](std::size_t t, One& one, std::int64_t i) {
    if (alphas[t] == 0.0f) return;
    const float p = one.streams[kParam].get(i), e = one.streams[kAverage].get(i);
    const float moved = e + alphas[t] * (p - e);
    if (rounding.nearest) {
      one.streams[kAverage].set(i, moved);
    } else {
      one.streams[kAverage].set_state(i, moved, rounding.seed, t, 0);
    }
  });
}

std::vector<double> defined_norms(Case& on, bool store_grads) {
  std::vector<double> norms(3 * on.tensors.size());
  each_element(on, [&](std::size_t t, One& one, std::int64_t i) {
    const float g = one.streams[kGrad].get(i);
    norms[3 * t] += std::abs(one.streams[kParam].get(i) - one.streams[kAverage].get(i));
    norms[3 * t + 1] += std::abs(g);
    if (!on.previous) return;
    norms[3 * t + 2] += std::abs(g - one.streams[kPreviousGrad].get(i));
    if (store_grads) one.streams[kPreviousGrad].set(i, g);
  });
  return norms;
}

void defined_adamw(Case& on, int step, double lr, const AdamW& adamw, std::uint32_t seed) {
  const auto weight1 = static_cast<float>(1 - adamw.beta1), weight2 = static_cast<float>(1 - adamw.beta2);
  const auto beta2 = static_cast<float>(adamw.beta2), eps = static_cast<float>(adamw.eps);
  const auto keep = static_cast<float>(1 - lr * adamw.weight_decay);
  const auto root_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(adamw.beta2, step)));
  const auto step_size = static_cast<float>(lr / (1 - std::pow(adamw.beta1, step)));
  each_element(on, [&](std::size_t t, One& one, std::int64_t i) {
    const float g = one.streams[kGrad].get(i);
    if (!std::isfinite(g)) return;
    float p = one.streams[kParam].get(i), m = one.streams[kExpAvg].get(i), v = one.streams[kExpAvgSq].get(i);
    m = m + weight1 * (g - m);
    v = beta2 * v + weight2 * (g * g);
    p = p * keep - step_size * (m / (std::sqrt(v) * root_scale + eps));
    one.streams[kParam].set(i, p);
    one.streams[kExpAvg].set_state(i, m, seed, t, 1);
    one.streams[kExpAvgSq].set_state(i, v, seed, t, 2);
  });
}

void compare(const Case& here, const Case& expected) {
  for (std::size_t t = 0; t < here.tensors.size(); ++t) {
    for (int s = 0; s < kStreams; ++s) {
      static const char* const names[] = {"param", "average", "grad", "previous_grad", "exp_avg", "exp_avg_sq"};
      const Memory &is = here.tensors[t].streams[s], &right = expected.tensors[t].streams[s];
      const std::size_t size = is.dtype == DType::kFloat32 ? 4 : 2;
      for (std::size_t i = 0; i < is.bytes / size; ++i) {
        const float x = is.get(i), y = right.get(i);  // the bits of a NaN are the hardware's
        const bool same = std::memcmp(is.data() + i * size, right.data() + i * size, size) == 0;
        expect(same || (std::isnan(x) && std::isnan(y)), names[s], t, i);
      }
      expect(is.only_itself_changed(), names[s], t, -1);
    }
  }
}

// `remaining`: before the call.
void compare_weights(const Results& is, const std::vector<double>& norms, Rule rule,
                     const std::vector<float>& remaining) {
  for (std::size_t t = 0; t < is.alphas.size(); ++t) {
    for (int k = 0; k < 3; ++k) {
      const double x = is.norms[3 * t + k], y = norms[3 * t + k];
      expect(std::isfinite(y) ? std::abs(x - y) <= kNormTolerance * y : !std::isfinite(x), "a norm", t, k);
    }
    const cit::Weight right =
        cit::balance_weight({is.norms[3 * t], is.norms[3 * t + 1], is.norms[3 * t + 2]}, kOptions(rule), remaining[t]);
    expect(is.alphas[t] == right.alpha, "alpha", t, 0);
    expect(static_cast<bool>(is.fallbacks[t]) == right.fallback, "fallback", t, 0);
    const double left = (1.0 - right.alpha) * is.norms[3 * t];
    expect(std::isfinite(left) ? is.remaining[t] == static_cast<float>(left) : !std::isfinite(is.remaining[t]),
           "the distance left", t, 0);
  }
}

void check_slots(const Emulation& emulation) {
  for (const Slot& slot : emulation.slots) expect(slot.done == 0, "a counter after the call", 0, slot.done);
}

void check_ema(HostBlocks* blocks, Rule rule, bool store_grads, int offset, unsigned seed) {
  const bool previous = rule != Rule::kFixed;
  Case here = make_case(false, previous, offset, seed), expected = make_case(false, previous, offset, seed);
  Emulation emulation(here, blocks, seed);
  Results results(here.tensors.size()), only_norms(here.tensors.size());
  Outcome outcome = emulation.outcome(only_norms, rule, false);
  outcome.alphas = nullptr;
  emulation.norms(outcome);
  compare(here, expected);
  const std::vector<float> remaining = results.remaining;
  emulation.norms(emulation.outcome(results, rule, store_grads));
  expect(std::memcmp(only_norms.norms.data(), results.norms.data(), 24 * here.tensors.size()) == 0, "the second run", 0,
         0);
  compare_weights(results, defined_norms(expected, store_grads), rule, remaining);
  compare(here, expected);
  const Rounding rounding{seed, seed % 3 == 0};
  emulation.apply(results.alphas.data(), rounding);
  defined_apply(expected, results.alphas, rounding);
  compare(here, expected);
  check_slots(emulation);
}

void check_adamw(HostBlocks* blocks, Rule rule, bool store_grads, int offset, unsigned seed) {
  const bool previous = rule != Rule::kFixed;
  Case here = make_case(true, previous, offset, seed), expected = make_case(true, previous, offset, seed);
  Emulation emulation(here, blocks, seed);
  Results results(here.tensors.size());
  const AdamW adamw{0.9, 0.95, seed % 2 == 0 ? 0.0 : 1e-8, 0.1};
  for (int step = 1; step <= 3; ++step) {
    const std::vector<float> pending = results.alphas, remaining = results.remaining;  // from the step before
    const Rounding rounding{seed * 1000003u + step, seed % 3 == 0};
    emulation.adamw(emulation.outcome(results, rule, store_grads), make_step(adamw, step, 0.01, rounding), step == 2);
    defined_apply(expected, pending, rounding);
    defined_adamw(expected, step, 0.01, adamw, rounding.seed);
    compare_weights(results, defined_norms(expected, store_grads), rule, remaining);
    compare(here, expected);
  }
  check_slots(emulation);
}

// More pieces than threads that add them up.
void check_many_pieces(HostBlocks* blocks) {
  const std::int64_t count = (kThreads + 9) * kPiece + 3;
  Case one{{{count, {}}}, false, true};
  for (int s = 0; s < kStreams; ++s) one.tensors[0].streams.emplace_back(s < kExpAvg ? count : 0, DType::kFloat32, 0);
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform;
  for (int s = 0; s < kExpAvg; ++s) {
    for (std::int64_t i = 0; i < count; ++i) one.tensors[0].streams[s].set(i, uniform(random));
  }
  Emulation emulation(one, blocks, 1);
  Results results(1);
  emulation.norms(emulation.outcome(results, Rule::kReleased, false));
  compare_weights(results, defined_norms(one, false), Rule::kReleased, {2.0f});
}

void check_rounding() {
  std::mt19937 random(3);
  std::vector<std::uint32_t> values = {0x00000000, 0x80000000, 0x00000001, 0x7f7fffff, 0xff7fffff, 0x7f7f0001,
                                       0x7f800000, 0xff800000, 0x7f800001, 0xffc00000, 0x3f80ffff, 0x3f808000};
  while (values.size() < 4096) values.push_back(random());
  for (const std::uint32_t seed : {0u, 12345u, 0xffffffffu}) {
    for (std::size_t i = 0; i + kGroup <= values.size(); i += kGroup) {
      const std::int64_t at = 0xfffffff0u + i;  // the index wraps around
      float floats[kGroup];
      for (int k = 0; k < kGroup; ++k) floats[k] = float_from_bits(values[i + k]);
      const Group group = from_state(floats, kBFloat16, at, cit::rounding_key(seed, i, 2));
      for (int k = 0; k < kGroup; ++k) {
        const auto is = static_cast<std::uint16_t>(group.word[k / 2] >> (16 * (k % 2)));
        expect(is == defined_rounding(floats[k], seed, i, 2, at + k), "the rounding", i, k);
      }
    }
  }
}

// The bits must not depend on the order of the blocks.
void check_order(HostBlocks* blocks) {
  Case once = make_case(false, true, 0, 5), again = make_case(false, true, 0, 5);
  Emulation first(once, blocks, 1), second(again, blocks, 2);
  expect(first.order != second.order, "the order of the blocks", 0, 0);
  Results x(once.tensors.size()), y(once.tensors.size());
  first.norms(first.outcome(x, Rule::kReleased, true));
  second.norms(second.outcome(y, Rule::kReleased, true));
  expect(std::memcmp(x.norms.data(), y.norms.data(), 24 * once.tensors.size()) == 0, "norms in another order", 0, 0);
}

}  // namespace

int main() {
  HostBlocks blocks;
  unsigned seed = 1;
  for (const Rule rule : {Rule::kReleased, Rule::kPaper, Rule::kFixed}) {
    for (const bool store_grads : {true, false}) {
      for (const int offset : {0, 1, 4}) {
        check_ema(&blocks, rule, store_grads, offset, seed++);
        check_adamw(&blocks, rule, store_grads, offset, seed++);
      }
    }
  }
  check_order(&blocks);
  check_many_pieces(&blocks);
  check_rounding();
  std::printf("%d differences\n", failures);
  return failures == 0 ? 0 : 1;
}
