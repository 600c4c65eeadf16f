// A model in the memory of a GPU: the structs that kernels read, in host memory, over one piece of
// device memory that holds all weights.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/threads.h"
#include "engine/gpu.h"
#include "kernels/api/gpu.h"
#include "model/config.h"

namespace rabit {

/// Arrays that share one piece of device memory, each 256-byte aligned.
class DeviceParts {
 public:
  /// `pointer` is set by place(); it must stay where it is.
  template <typename T>
  void add(T*& pointer, int64_t count) {
    add_bytes(pointer, static_cast<uint64_t>(count) * sizeof(T));
  }
  template <typename T>
  void add_bytes(T*& pointer, uint64_t bytes) {
    constexpr uint64_t kAlignment = 256;
    places_.push_back(
        [&pointer, at = bytes_](std::byte* base) { pointer = reinterpret_cast<T*>(base + at); });
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  uint64_t bytes() const { return bytes_; }
  void place(const gpu::Memory& memory) const {
    for (const auto& place : places_) {
      place(memory.as<std::byte>());
    }
  }

 private:
  std::vector<std::function<void(std::byte*)>> places_;
  uint64_t bytes_ = 0;
};

class GpuRunner;

class GpuModel : public Model {
 public:
  int64_t vocab_size() const override { return config.vocab_size; }
  int64_t context_length() const override { return config.context_length; }
  int threads() const override { return pool->size(); }
  std::string kernels() const override { return "cuda"; }
  uint64_t weight_bytes() const override { return bytes_per_token; }
  bool on_gpu() const override { return true; }
  std::string device() const override { return info.name; }

  ModelConfig config;
  gpu::Sizes sizes;
  gpu::DeviceInfo info;
  gpu::Memory weights;                  // all that pointers below point into
  std::vector<gpu::Block> blocks;       // (layers)
  const uint16_t* embedding = nullptr;  // F16 (vocab, d_model); the head's weights where tied
  const float* output_norm = nullptr;   // (d_model)
  gpu::Linear head;                     // (vocab, d_model)
  bool byte_cache = false;              // keys and values in bytes with scales
  std::unique_ptr<ThreadPool> pool;     // for what the host does beside
  uint64_t bytes_per_token = 0;
  std::shared_ptr<GpuRunner> runner;  // last; from the first session on
};

/// Error of memory that a GPU has not: what needs how much, and what there is.
Error too_little_memory(const std::string& what, uint64_t needed, const gpu::DeviceInfo& device);

}  // namespace rabit
