// The decoder in torch operations, one set of functions for teacher and student: a block is
// computed from seven dense weight matrices, wherever they come from. The residual stream is
// float32; products run in the compute type (bf16 or f32).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <array>
#include <memory>
#include <vector>

#include "io/gguf.h"
#include "model/config.h"
#include "rabit/result.h"

namespace rabit::train {

inline constexpr size_t kRoleCount = kRoles.size();
constexpr size_t index_of(Role role) { return static_cast<size_t>(role); }

/// Weights of one block. Linear weights (d_out, d_in) in the compute type, norms (d_model) float32.
struct BlockWeights {
  std::array<at::Tensor, kRoleCount> linear;
  at::Tensor attn_norm;
  at::Tensor ffn_norm;
  // Weights of layers that share an input one below the other, where they were made so.
  at::Tensor qkv, gate_up;
  // Where the block is shared out (train/shards.h), this process's rows, and `linear` is empty.
  at::Tensor share;

  /// Another weight in one layer's place.
  void replace(Role role, const at::Tensor& weight) {
    linear[index_of(role)] = weight;
    qkv = gate_up = at::Tensor();
  }
};

/// The layers of BlockWeights::qkv and gate_up, in their order.
inline constexpr std::array kJoinedQkv = {Role::kAttnQ, Role::kAttnK, Role::kAttnV};
inline constexpr std::array kJoinedGateUp = {Role::kFfnGate, Role::kFfnUp};

class Ranks;

/// The original model, dequantized.
struct Network {
  ModelConfig config;
  std::vector<BlockWeights> blocks;
  std::shared_ptr<Ranks> ranks;  // that share its blocks out, or none
  at::Tensor embedding;          // (vocab, d_model), compute type
  at::Tensor head;               // (vocab, d_model), compute type; the embedding itself where tied
  at::Tensor output_norm;        // (d_model) float32
  at::Device device = at::kCPU;
  at::ScalarType compute = at::kFloat;
};

/// Reads every tensor of the model. Errors: a tensor that is missing or cannot be dequantized, a
/// linear layer that is already packed, an interrupt. ranks: to share the blocks out among, or
/// none.
Result<Network> load_network(const GgufFile& file, at::Device device, at::ScalarType compute,
                             const std::shared_ptr<Ranks>& ranks = {});

/// cos and sin of every position's angles, (positions, head_dim / 2) float32.
struct Rotary {
  at::Tensor cos, sin;
};
Rotary make_rotary(const ModelConfig& config, int64_t positions, at::Device device);

/// Rows of the embedding. ids (sequences, positions) int64 -> float32 (sequences, positions,
/// d_model)
at::Tensor embed(const Network& network, const at::Tensor& ids);

/// RMSNorm of the stream in float32, result in the compute type. Zhang and Sennrich,
/// arXiv 1910.07467.
at::Tensor norm(const ModelConfig& config, const at::Tensor& x, const at::Tensor& weight,
                at::ScalarType compute);

/// Rotary positions and causal grouped-query attention on products of the three projections.
/// q (S, T, heads * head_dim), k and v (S, T, kv_heads * head_dim) -> (S, T, heads * head_dim).
at::Tensor attend(const ModelConfig& config, const Rotary& rotary, const at::Tensor& q,
                  const at::Tensor& k, const at::Tensor& v);

/// silu(gate) * up. Shazeer, arXiv 2002.05202.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

/// Sees input and output of every linear layer of a block as it is computed, in the order of
/// kRoles.
class LinearTap {
 public:
  virtual ~LinearTap() = default;
  virtual void see(Role role, const at::Tensor& input, const at::Tensor& output) = 0;
};

/// One decoder block on the stream x (sequences, positions, d_model) float32.
at::Tensor block_forward(const ModelConfig& config, const BlockWeights& block, const Rotary& rotary,
                         const at::Tensor& x, at::ScalarType compute, LinearTap* tap = nullptr);

}  // namespace rabit::train
