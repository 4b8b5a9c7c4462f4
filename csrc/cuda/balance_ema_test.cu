// Checks the arithmetic of the GPU kernels without a GPU: the threads of balance_ema.cu one after the other on the
// host, against the CPU kernels, which the Python tests check against the definition. Exit code 0: all agree.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cpu/balance_ema.h"
#include "cuda/balance_ema_math.cuh"

namespace {

using cit::Array;
using cit::DType;
using cit::EmaTensor;
using cit::gpu::Partial;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr std::int64_t kSizes[] = {0, 1, 7, 8, 9, 2047, 2048, 2049, 0, 16384, 16385, 40000, 3 * 16384};

int failures = 0;

void expect(bool right, const char* what, std::size_t tensor, std::int64_t element = -1) {
  if (right) return;
  ++failures;
  std::printf("%s differs in tensor %zu, element %lld\n", what, tensor, static_cast<long long>(element));
}

std::size_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// Memory of one tensor that starts `offset` elements after an address aligned to 16 bytes.
struct Memory {
  std::vector<uint4> storage;
  Array array;

  Memory(const std::vector<float>& values, DType dtype, int offset) : storage(values.size() / 2 + 4) {
    array = {reinterpret_cast<char*>(storage.data()) + offset * size_of(dtype), dtype};
    for (std::size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  // Not with the conversions under test.
  void set(std::size_t i, float value) {
    if (array.dtype == DType::kFloat32) {
      static_cast<float*>(array.data)[i] = value;
    } else if (array.dtype == DType::kBFloat16) {
      static_cast<__nv_bfloat16*>(array.data)[i] = __float2bfloat16(value);
    } else {
      static_cast<__half*>(array.data)[i] = __float2half(value);
    }
  }
  float get(std::size_t i) const {
    if (array.dtype == DType::kFloat32) return static_cast<const float*>(array.data)[i];
    if (array.dtype == DType::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(array.data)[i]);
    return __half2float(static_cast<const __half*>(array.data)[i]);
  }
};

struct Case {
  std::vector<Memory> p, e, g, previous;

  explicit Case(int offset) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto make = [&](std::int64_t size) {
      std::vector<float> values(static_cast<std::size_t>(size));
      for (float& value : values) value = normal(random);
      return values;
    };
    for (DType p_dtype : kDTypes) {
      for (DType g_dtype : kDTypes) {
        for (DType previous_dtype : kDTypes) {
          for (std::int64_t size : kSizes) {
            const std::vector<float> at = make(size);
            std::vector<float> average = make(size);
            for (std::int64_t i = 0; i < size; ++i) average[i] = at[i] + (average[i] > 0 ? 4.0f : -4.0f);
            p.emplace_back(at, p_dtype, offset);
            e.emplace_back(average, DType::kFloat32, 0);
            g.emplace_back(make(size), g_dtype, offset);
            previous.emplace_back(make(size), previous_dtype, offset);
          }
        }
      }
    }
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    p[5].set(2046, nan);
    g[7].set(2048, -infinity);
    previous[9].set(3, nan);
    p[11].set(39999, infinity);
  }
  std::vector<EmaTensor> tensors(bool with_previous) {
    std::vector<EmaTensor> rows;
    for (std::size_t i = 0; i < p.size(); ++i) {
      const std::int64_t size = kSizes[i % std::size(kSizes)];
      const Array before = with_previous ? previous[i].array : Array{nullptr, DType::kFloat32};
      rows.push_back({size, p[i].array, static_cast<float*>(e[i].array.data), g[i].array, before});
    }
    return rows;
  }
};

struct Weights {
  std::vector<float> alphas;
  std::vector<char> fallbacks;
};

Weights run_as_gpu(const std::vector<EmaTensor>& tensors, const cit::RuleOptions& options) {
  const auto count = static_cast<std::int64_t>(tensors.size());
  std::vector<std::int64_t> first{0};
  for (const EmaTensor& tensor : tensors)
    first.push_back(first.back() + (tensor.numel + cit::kChunk - 1) / cit::kChunk);

  const auto each_chunk = [&](const auto& body) {
    for (std::int64_t chunk = 0; chunk < first.back(); ++chunk) {
      const std::int64_t i = cit::gpu::tensor_of_chunk(first.data(), count, chunk);
      const std::int64_t begin = (chunk - first[i]) * cit::kChunk;
      expect(begin >= 0 && begin < tensors[i].numel, "the range of a chunk", i, begin);
      const std::int64_t rest = tensors[i].numel - begin;
      for (int t = 0; t < cit::gpu::kThreads; ++t) {
        body(chunk, i, begin, static_cast<int>(rest < cit::kChunk ? rest : cit::kChunk), t);
      }
    }
  };
  std::vector<Partial> partials(static_cast<std::size_t>(first.back()));
  each_chunk([&](std::int64_t chunk, std::int64_t i, std::int64_t begin, int n, int t) {
    partials[chunk] = partials[chunk] + cit::gpu::norms_of_thread(tensors[i], begin, n, t);
  });
  Weights weights{std::vector<float>(tensors.size()), std::vector<char>(tensors.size())};
  for (std::int64_t i = 0; i < count; ++i) {
    cit::Norms total{};
    for (int lane = 0; lane < 32; ++lane) {
      const cit::Norms part = cit::gpu::norms_of_lane(partials.data(), first[i], first[i + 1], lane);
      total.distance += part.distance;
      total.gradient += part.gradient;
      total.gradient_change += part.gradient_change;
    }
    const cit::Weight weight = cit::balance_weight(total, options);
    weights.alphas[i] = weight.alpha;
    weights.fallbacks[i] = weight.fallback;
  }
  each_chunk([&](std::int64_t, std::int64_t i, std::int64_t begin, int n, int t) {
    if (weights.alphas[i] != 0.0f) cit::gpu::apply_of_thread(tensors[i], weights.alphas[i], begin, n, t);
  });
  return weights;
}

void compare(int offset, cit::Rule rule) {
  Case here(offset), expected(offset);
  const bool with_previous = rule != cit::Rule::kFixed;
  const cit::RuleOptions options{rule, 0.9, 0.01};
  const Weights weights = run_as_gpu(here.tensors(with_previous), options);
  Weights right = weights;
  cit::balance_ema(expected.tensors(with_previous), options, 1, right.alphas.data(),
                   reinterpret_cast<bool*>(right.fallbacks.data()));
  for (std::size_t i = 0; i < right.alphas.size(); ++i) {
    expect(std::abs(weights.alphas[i] - right.alphas[i]) <= 1e-4f * right.alphas[i], "alpha", i);
    expect(weights.fallbacks[i] == right.fallbacks[i], "fallback", i);
    for (std::int64_t k = 0; k < kSizes[i % std::size(kSizes)]; ++k) {
      const float e = here.e[i].get(k), e_right = expected.e[i].get(k);
      expect(std::abs(e - e_right) <= 1e-3f, "the average", i, k);
      const float g = here.previous[i].get(k), g_right = expected.previous[i].get(k);
      expect(g == g_right || (std::isnan(g) && std::isnan(g_right)), "the previous gradient", i, k);
    }
  }
}

}  // namespace

int main() {
  for (int offset : {0, 1}) {
    for (cit::Rule rule : {cit::Rule::kReleased, cit::Rule::kPaper, cit::Rule::kFixed}) compare(offset, rule);
  }
  std::printf("%d differences\n", failures);
  return failures == 0 ? 0 : 1;
}
