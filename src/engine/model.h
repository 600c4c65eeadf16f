// A loaded model as sessions see it: pointers to weights that lie in the mapped file or in buffers
// of our own, the kernel table and the thread pool.
#pragma once

#include <array>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/threads.h"
#include "engine/buffer.h"
#include "io/gguf.h"
#include "kernels/api/kernels.h"
#include "model/config.h"
#include "rabit/engine.h"

namespace rabit {

/// Weights and, where they are not in the file as kernels want them, the memory that holds them.
struct Linear {
  LinearWeights weights;
  std::vector<Buffer> owned;
};

struct DecoderBlock {
  std::vector<float> attn_norm;               // (d_model)
  std::vector<float> ffn_norm;                // (d_model)
  std::array<Linear, kRoles.size()> linears;  // in the order of kRoles

  const LinearWeights& at(Role role) const { return linears[static_cast<size_t>(role)].weights; }
};

class LoadedModel : public Model {
 public:
  int64_t vocab_size() const override { return config.vocab_size; }
  int64_t context_length() const override { return config.context_length; }
  int threads() const override { return pool->size(); }
  std::string kernels() const override { return std::string(table->name); }
  uint64_t weight_bytes() const override { return bytes_per_token; }
  bool on_gpu() const override { return false; }
  std::string device() const override { return "CPU"; }

  ModelConfig config;
  std::shared_ptr<GgufFile> file;
  const TensorInfo* embedding = nullptr;  // (vocab, d_model); rows are decoded when asked for
  std::vector<DecoderBlock> blocks;
  std::vector<float> output_norm;  // (d_model)
  Linear head;                     // (vocab, d_model)
  const KernelTable* table = nullptr;
  CacheFormat cache = CacheFormat::kF16;
  std::unique_ptr<ThreadPool> pool;
  uint64_t bytes_per_token = 0;
};

/// Model::load for these kernels, whatever device and kernels the options name.
Result<std::shared_ptr<LoadedModel>> load_on_host(const std::filesystem::path& path,
                                                  const EngineOptions& options,
                                                  const KernelTable& table);

/// The embedding as a matrix that products take, checked as any other. (vocab, d_model)
Result<Linear> load_embedding(const LoadedModel& model);

}  // namespace rabit
