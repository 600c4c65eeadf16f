#include "train/place.h"

#include <fmt/format.h>

#include <charconv>
#include <cstdlib>
#include <string_view>

namespace rabit::train {
namespace {

Result<int> number_of(const char* name, int low, int high) {
  const char* text = std::getenv(name);
  if (text == nullptr) {
    return Error{
        fmt::format("WORLD_SIZE is set, and {} is not; start all processes by one launcher "
                    "(torchrun --no-python, or another by docs/training.md), or unset WORLD_SIZE",
                    name)};
  }
  const std::string_view digits(text);
  int value = 0;
  const auto [end, wrong] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (wrong != std::errc() || end != digits.data() + digits.size() || value < low || value > high) {
    return Error{fmt::format("{}={} is not a number from {} to {}", name, text, low, high)};
  }
  return value;
}

}  // namespace

Result<Place> Place::from_environment() {
  Place place;
  if (std::getenv("WORLD_SIZE") == nullptr) {
    if (std::getenv("RANK") != nullptr && std::getenv("MASTER_ADDR") != nullptr) {
      return Error{"RANK and MASTER_ADDR are set, and WORLD_SIZE is not"};
    }
    return place;
  }
  RABIT_ASSIGN(place.size, number_of("WORLD_SIZE", 1, 1 << 16));
  if (place.alone()) {
    return place;
  }
  RABIT_ASSIGN(place.rank, number_of("RANK", 0, place.size - 1));
  RABIT_ASSIGN(place.local_rank, number_of("LOCAL_RANK", 0, place.rank));
  RABIT_ASSIGN(place.port, number_of("MASTER_PORT", 1, 65535));
  const char* host = std::getenv("MASTER_ADDR");
  if (host == nullptr || *host == '\0') {
    return Error{"MASTER_ADDR is not set: the host of the process with RANK 0"};
  }
  place.host = host;
  if (std::getenv("LOCAL_WORLD_SIZE") != nullptr) {
    RABIT_ASSIGN(place.local_size, number_of("LOCAL_WORLD_SIZE", 1, place.size));
  }
  const char* meets = std::getenv("TORCHELASTIC_USE_AGENT_STORE");
  place.launcher_meets = meets != nullptr && std::string_view(meets) == "True";
  if (std::getenv("TORCHELASTIC_RESTART_COUNT") != nullptr) {
    RABIT_ASSIGN(place.attempt, number_of("TORCHELASTIC_RESTART_COUNT", 0, 1 << 20));
  }
  return place;
}

}  // namespace rabit::train
