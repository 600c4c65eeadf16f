// What a model writes, for the report of a run.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "rabit/result.h"

namespace rabit::cli {

inline constexpr double kSampleTemperature = 0.7;
inline constexpr uint64_t kSampleSeed = 1;

/// Continuations of `prompts` by the model file, `count` tokens each at most, sampled with a fixed
/// seed. `done` hears after each.
Result<std::vector<std::string>> write_samples(const std::string& model,
                                               const std::vector<std::string>& prompts,
                                               int64_t count, int64_t threads,
                                               const std::function<void()>& done);

}  // namespace rabit::cli
