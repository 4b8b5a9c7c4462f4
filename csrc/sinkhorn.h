// The constants of Sinkhorn's algorithm, for CPU and GPU. Those that the definition has too are the ones of
// cit_fast/ops/wasserstein/reference.py; tests/ops/test_wasserstein_native.py compares them.
#pragma once

#include <cstdint>

namespace cit {

// Automatic epsilon in standard deviations of the cost, and the range of epsilon in largest costs.
constexpr double kEpsilonOfSpread = 0.05, kSmallestEpsilon = 1e-9, kLargestEpsilon = 1e6;

// Effort of a level of the epsilon scaling before the last.
constexpr double kCoarseTolerance = 0.05;
constexpr std::int64_t kCoarseIterations = 10;

// Columns with less mass take no part in the iteration; the bounds are of all columns.
constexpr double kLeastMass = 1e-25;

// Where iterations in float stop, as a share of the tolerance, and the error they can reach. Double goes on from there.
constexpr double kFloatShare = 0.75, kFloatTolerance = 5e-7;

// The range of v in which it is kept in float, and the smallest column sum from which it is formed.
constexpr double kLeastFloatV = 1e-6, kMostFloatV = 1e6, kLeastFloatSum = 1e-30;

}  // namespace cit
