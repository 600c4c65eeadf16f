#include "train/network.h"

#include <cmath>

#include "base/half.h"
#include "base/interrupt.h"
#ifdef RABIT_CUDA
#include "train/gpu_ops.h"
#endif
#include "train/host_tensor.h"
#include "train/shards.h"

namespace rabit::train {
namespace {

Result<at::Tensor> load_tensor(const GgufFile& file, const std::string& name,
                               std::vector<int64_t> ne, at::Device device, at::ScalarType type) {
  RABIT_CHECK(check_interrupt());
  const std::vector<int64_t> sizes(ne.rbegin(), ne.rend());
  RABIT_ASSIGN(const at::Tensor tensor, read_tensor(file, name, sizes));
  // Not finite, or more than a scale in a packed file can be.
  if (!(tensor.abs().max().item<float>() <= kHalfMax)) {
    return Error{file.path().string() + ": tensor " + name +
                 " holds values that are not finite or beyond 65504; the file is damaged"};
  }
  return tensor.to(device, type);
}

// The weights of these layers one below the other; they become views of it.
at::Tensor join(BlockWeights& block, std::span<const Role> roles) {
  std::vector<at::Tensor> parts;
  for (const Role role : roles) {
    parts.push_back(block.linear[index_of(role)]);
  }
  at::Tensor all = at::cat(parts);
  int64_t row = 0;
  for (const Role role : roles) {
    at::Tensor& part = block.linear[index_of(role)];
    const int64_t rows = part.size(0);
    part = all.narrow(0, row, rows);
    row += rows;
  }
  return all;
}

}  // namespace

Result<Network> load_network(const GgufFile& file, at::Device device, at::ScalarType compute,
                             const std::shared_ptr<Ranks>& ranks) {
  Network network;
  network.ranks = ranks;
  RABIT_ASSIGN(network.config, read_model_config(file));
  network.device = device;
  network.compute = compute;
  const ModelConfig& config = network.config;
  const auto load = [&](const std::string& name, std::vector<int64_t> ne, at::ScalarType type) {
    return load_tensor(file, name, std::move(ne), device, type);
  };
  RABIT_ASSIGN(network.embedding,
               load("token_embd.weight", {config.d_model, config.vocab_size}, compute));
  RABIT_ASSIGN(network.output_norm, load("output_norm.weight", {config.d_model}, at::kFloat));
  if (config.tied_head) {
    network.head = network.embedding;
  } else {
    RABIT_ASSIGN(network.head, load("output.weight", {config.d_model, config.vocab_size}, compute));
  }
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    BlockWeights block;
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    RABIT_ASSIGN(block.attn_norm, load(prefix + "attn_norm.weight", {config.d_model}, at::kFloat));
    RABIT_ASSIGN(block.ffn_norm, load(prefix + "ffn_norm.weight", {config.d_model}, at::kFloat));
    for (const Role role : kRoles) {
      const LinearShape shape = linear_shape(config, role);
      const std::string name = linear_name(layer, role);
      if (file.find_tensor(name + ".sign") != nullptr) {
        return Error{file.path().string() + ": " + name +
                     " is packed already; give the original model"};
      }
      RABIT_ASSIGN(block.linear[index_of(role)],
                   load(name + ".weight", {shape.d_in, shape.d_out}, compute));
    }
    if (ranks) {
      share_out(block, config, *ranks);
    } else if (device.is_cuda()) {
      block.qkv = join(block, kJoinedQkv);
      block.gate_up = join(block, kJoinedGateUp);
    }
    network.blocks.push_back(std::move(block));
  }
  return network;
}

Rotary make_rotary(const ModelConfig& config, int64_t positions, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kDouble);
  const at::Tensor exponent =
      at::arange(0, config.head_dim, 2, options) / static_cast<double>(config.head_dim);
  const at::Tensor frequency = at::pow(static_cast<double>(config.rope_theta), -exponent);
  const at::Tensor angle = at::outer(at::arange(positions, options), frequency);
  return {at::cos(angle).to(device, at::kFloat), at::sin(angle).to(device, at::kFloat)};
}

at::Tensor embed(const Network& network, const at::Tensor& ids) {
  return at::embedding(network.embedding, ids).to(at::kFloat);
}

at::Tensor norm(const ModelConfig& config, const at::Tensor& x, const at::Tensor& weight,
                at::ScalarType compute) {
#ifdef RABIT_CUDA
  if (x.is_cuda() && compute == at::kBFloat16) {
    return gpu_norm(x, weight, config.norm_epsilon);
  }
#endif
  return at::rms_norm(x, {config.d_model}, weight, config.norm_epsilon).to(compute);
}

namespace {

// Turns the pairs (2i, 2i+1) of each head, GGUF's order for "llama". x (S, T, heads * head_dim) ->
// (S, heads, T, head_dim)
at::Tensor rotate(const ModelConfig& config, const Rotary& rotary, const at::Tensor& x,
                  int64_t heads) {
  const int64_t sequences = x.size(0), positions = x.size(1), half = config.head_dim / 2;
  const at::Tensor pairs =
      x.to(at::kFloat).view({sequences, positions, heads, half, 2}).transpose(1, 2);
  const at::Tensor even = pairs.select(-1, 0), odd = pairs.select(-1, 1);
  const at::Tensor cos = rotary.cos.narrow(0, 0, positions);
  const at::Tensor sin = rotary.sin.narrow(0, 0, positions);
  // The order of a head's features does not matter to the dot products as long as q and k agree.
  return at::cat({even * cos - odd * sin, even * sin + odd * cos}, -1).to(x.scalar_type());
}

at::Tensor split_heads(const at::Tensor& x, int64_t heads, int64_t head_dim) {
  return x.view({x.size(0), x.size(1), heads, head_dim}).transpose(1, 2);
}

}  // namespace

at::Tensor attend(const ModelConfig& config, const Rotary& rotary, const at::Tensor& q,
                  const at::Tensor& k, const at::Tensor& v) {
  const int64_t group = config.heads / config.kv_heads;
  const at::Tensor queries = rotate(config, rotary, q, config.heads);
  at::Tensor keys = rotate(config, rotary, k, config.kv_heads);
  at::Tensor values = split_heads(v, config.kv_heads, config.head_dim);
  if (group > 1) {
    keys = keys.repeat_interleave(group, 1);
    values = values.repeat_interleave(group, 1);
  }
  const at::Tensor out = at::scaled_dot_product_attention(queries, keys, values, {}, 0.0,
                                                          /*is_causal=*/true);
  return out.transpose(1, 2).reshape({q.size(0), q.size(1), config.d_q()});
}

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) { return at::silu(gate) * up; }

at::Tensor block_forward(const ModelConfig& config, const BlockWeights& block, const Rotary& rotary,
                         const at::Tensor& x, at::ScalarType compute, LinearTap* tap) {
#ifdef RABIT_CUDA
  if (x.is_cuda() && compute == at::kBFloat16 && tap == nullptr) {
    return gpu_block_forward(config, block, rotary, x);
  }
#endif
  const auto linear = [&](Role role, const at::Tensor& input) {
    at::Tensor output = at::matmul(input, block.linear[index_of(role)].t());
    if (tap != nullptr) {
      tap->see(role, input, output);
    }
    return output;
  };
  const at::Tensor a = norm(config, x, block.attn_norm, compute);
  const at::Tensor q = linear(Role::kAttnQ, a), k = linear(Role::kAttnK, a);
  const at::Tensor attended = attend(config, rotary, q, k, linear(Role::kAttnV, a));
  const at::Tensor middle = x + linear(Role::kAttnOutput, attended);
  const at::Tensor f = norm(config, middle, block.ffn_norm, compute);
  const at::Tensor gate = linear(Role::kFfnGate, f);
  const at::Tensor hidden = swiglu(gate, linear(Role::kFfnUp, f));
  return middle + linear(Role::kFfnDown, hidden);
}

}  // namespace rabit::train
