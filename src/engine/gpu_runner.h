// What runs sessions of a model on a GPU: the arrays that a pass needs beside weights and caches,
// one set for all sessions, since they do not run at the same time.
#pragma once

#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/gpu_model.h"

namespace rabit {

/// A sequence's keys and values.
struct GpuCache {
  int64_t capacity = 0, position = 0;
  gpu::CacheRows keys;     // (layers, kv_heads, capacity, head_dim)
  gpu::CacheRows values;   // as keys
  float* turns = nullptr;  // (capacity, head_dim / 2): cos and sin
  gpu::Memory memory;      // of all three
};

class GpuRunner {
 public:
  explicit GpuRunner(const GpuModel& model) : model_(model), sizes_(model.sizes) {}

  /// Before all else. Errors: what cuBLAS lacks.
  Status start();
  /// Room for prompts of `tokens` tokens, in chunks of them if memory is short. Errors: memory that
  /// cannot be had.
  Status prepare(int64_t tokens);
  /// A cache without positions. Errors: memory that cannot be had.
  Result<GpuCache> make_cache(int64_t capacity);

  /// Tokens that run_chunk() takes at most.
  int64_t chunk() const { return chunk_; }
  /// Queues tokens through all blocks; their streams are then there for logits(). The position is
  /// not moved.
  Status run_chunk(const GpuCache& cache, std::span<const int32_t> tokens);
  /// Queues the logits of tokens [first, first + tokens) of the chunk, at most kLogitsTogether.
  Status run_head(int64_t first, int64_t tokens);
  /// Queues a token through all blocks and the head as one kernel. The position is not moved.
  /// false: nothing was done.
  Result<bool> run_whole(const GpuCache& cache, int32_t token);
  /// Queues a token of each of up to kEach sequences through all blocks and the head. No position
  /// is moved.
  Status run_each(std::span<const GpuCache* const> caches, std::span<const int32_t> tokens);
  /// What was queued last of logits, (tokens, vocab), on the host, until the next call of the
  /// runner.
  Result<const float*> logits(int64_t tokens);
  /// A token by the logits that were queued last, of one token.
  Result<int32_t> draw(Sampler& sampler);
  /// Sequences that one pass each serves sooner than run_each() all of them.
  size_t alone() const;

  static constexpr int64_t kLogitsTogether = 64;  // tokens whose logits are in memory at once
  static constexpr int64_t kEach = 64;            // sequences that run_each() takes at most

 private:
  Status allocate();
  Status begin() const;  // of every pass
  void plan_whole();
  Status fill_turns(const GpuCache& cache);
  template <typename Attend>
  Status run_block(int64_t layer, int64_t tokens, const Attend& attend);
  Status queue_each(int64_t tokens);
  Status multiply(std::initializer_list<const gpu::Linear*> linears, const uint16_t* x,
                  int64_t tokens, float* y, bool add = false);

  int64_t d_q() const { return int64_t{sizes_.heads} * sizes_.head_dim; }
  int64_t slices() const { return (int64_t{sizes_.vocab} + gpu::kSlice - 1) / gpu::kSlice; }
  int64_t d_kv() const { return int64_t{sizes_.kv_heads} * sizes_.head_dim; }

  const GpuModel& model_;
  const gpu::Sizes& sizes_;
  int64_t chunk_ = 0;  // tokens that go through the blocks together
  int64_t rows_ = 0;   // of the arrays below: tokens of a chunk, or of several sequences

  gpu::Memory memory_;            // all arrays of the device
  int32_t* tokens_ = nullptr;     // (rows)
  float* x_ = nullptr;            // (rows, d_model): the residual stream
  uint16_t* h_ = nullptr;         // F16 (rows, d_model): normed
  float* qkv_ = nullptr;          // (rows, d_q + 2 d_kv)
  uint16_t* q_ = nullptr;         // F16 (rows, d_q)
  uint16_t* attended_ = nullptr;  // F16 (rows, d_q)
  float* gate_up_ = nullptr;      // (rows, 2 d_ff)
  uint16_t* hidden_ = nullptr;    // F16 (rows, d_ff)
  uint16_t* unpacked_ = nullptr;  // F16: the packed weights of one product
  float* logits_ = nullptr;       // (kLogitsTogether, vocab)
  gpu::PackedWork packed_;        // of products with packed weights
  gpu::HostMemory host_logits_;   // (host_rows_, vocab)
  int64_t host_rows_ = 0;
  float* likely_ = nullptr;      // of slices the likeliest tokens: logits, then ids
  gpu::HostMemory host_likely_;  // as likely_

  // Of several sequences.
  gpu::Place* places_ = nullptr;                  // (kEach)
  float* partial_ = nullptr;                      // of attention
  uint32_t* counters_ = nullptr;                  // (kEach, kv_heads)
  gpu::HostMemory host_places_;                   // as places_
  std::map<int64_t, gpu::Recording> recordings_;  // by the number of sequences

  // Of whole tokens.
  bool planned_ = false;
  std::optional<gpu::DecodePlan> plan_;  // none: the sizes or the GPU do not allow them
  gpu::DecodeArgs args_;
  gpu::Job* jobs_ = nullptr;  // as in the plan, and the next
  int32_t* first_ = nullptr;
  float* work_ = nullptr;  // of bind_decode()
  uint64_t work_bytes_ = 0;
  int32_t* next_ = nullptr;    // (2): a token and its position
  gpu::HostMemory host_next_;  // as next_

  std::optional<gpu::Queue> queue_;  // last: what it still does ends before the memory goes
};

}  // namespace rabit
