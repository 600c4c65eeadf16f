// What a model is: its sizes, its tensors' names, and the role each plays. No arithmetic.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "io/gguf.h"
#include "rabit/result.h"

namespace rabit {

/// Sizes of a decoder-only transformer with RMSNorm, rotary positions, grouped-query attention and
/// a SwiGLU feed-forward part (architecture "llama").
struct ModelConfig {
  std::string architecture;  // GGUF general.architecture
  std::string name;          // GGUF general.name, may be empty
  int64_t layers = 0;
  int64_t d_model = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;  // also the rotary dimension
  int64_t d_ff = 0;
  int64_t vocab_size = 0;
  int64_t context_length = 0;
  float norm_epsilon = 1e-5F;
  float rope_theta = 10000.0F;
  bool tied_head = false;  // no output.weight: the head is the embedding

  int64_t d_q() const { return heads * head_dim; }
  int64_t d_kv() const { return kv_heads * head_dim; }
};

/// Linear layers of one decoder block, in the order in which they are computed.
enum class Role { kAttnQ, kAttnK, kAttnV, kAttnOutput, kFfnGate, kFfnUp, kFfnDown };
inline constexpr std::array kRoles = {Role::kAttnQ,      Role::kAttnK,   Role::kAttnV,
                                      Role::kAttnOutput, Role::kFfnGate, Role::kFfnUp,
                                      Role::kFfnDown};

/// "attn_q", "ffn_down", ...: the part of the tensor's name between "blk.N." and ".weight".
std::string role_name(Role role);

struct LinearShape {
  int64_t d_out = 0;
  int64_t d_in = 0;
};
LinearShape linear_shape(const ModelConfig& config, Role role);

/// Paths that a packed layer may have.
inline constexpr int64_t kMostPackedPaths = 4;

/// "blk.N.attn_q": tensors of a linear layer append ".weight", or ".sign", ".row_scale",
/// ".col_scale" where it is packed.
std::string linear_name(int64_t layer, Role role);

/// Reads and checks the configuration. Errors: an architecture that is not known (by name, with the
/// list of those that are), a missing or impossible size, rope scaling (not supported), tensors
/// missing or of sizes that contradict it.
Result<ModelConfig> read_model_config(const GgufFile& file);

}  // namespace rabit
