// Small random models of the "llama" architecture as GGUF files, dense or packed, and their forward
// pass in double, written from the equations: what tests of the engine and of training compare
// with.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/half.h"
#include "io/gguf.h"

namespace rabit {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

struct TinySizes {
  int64_t layers = 2, width = 48, heads = 4, kv_heads = 2, hidden = 80, vocab = 57, context = 64;
  double theta = 5000, norm_epsilon = 1e-5;

  int64_t head_dim() const { return width / heads; }
};

/// A small random model: what it is as floats, and the tensors that its file holds.
class SmallModel {
 public:
  /// paths 0: dense layers in F32; else packed with that many.
  SmallModel(uint64_t seed, bool tied, int64_t paths, const TinySizes& sizes = {})
      : sizes(sizes), generator_(seed), tied_(tied) {
    const int64_t d_q = sizes.width, d_kv = sizes.kv_heads * sizes.head_dim();
    add("token_embd.weight", sizes.width, sizes.vocab, 1.0F);
    norm("output_norm.weight");
    if (!tied) {
      add("output.weight", sizes.width, sizes.vocab, 0.15F);
    }
    for (int64_t layer = 0; layer < sizes.layers; ++layer) {
      const std::string block = "blk." + std::to_string(layer) + ".";
      norm(block + "attn_norm.weight");
      norm(block + "ffn_norm.weight");
      linear(block + "attn_q", sizes.width, d_q, paths);
      linear(block + "attn_k", sizes.width, d_kv, paths);
      linear(block + "attn_v", sizes.width, d_kv, paths);
      linear(block + "attn_output", d_q, sizes.width, paths);
      linear(block + "ffn_gate", sizes.width, sizes.hidden, paths);
      linear(block + "ffn_up", sizes.width, sizes.hidden, paths);
      linear(block + "ffn_down", sizes.hidden, sizes.width, paths);
    }
  }

  /// Writes the file; `reconstructed` replaces packed layers by their dense weights in F32.
  void write(const std::filesystem::path& path, bool reconstructed = false) const {
    GgufWriter writer;
    writer.set("general.architecture", MetaValue::string("llama"));
    writer.set("llama.block_count", MetaValue::u32(static_cast<uint32_t>(sizes.layers)));
    writer.set("llama.embedding_length", MetaValue::u32(static_cast<uint32_t>(sizes.width)));
    writer.set("llama.feed_forward_length", MetaValue::u32(static_cast<uint32_t>(sizes.hidden)));
    writer.set("llama.attention.head_count", MetaValue::u32(static_cast<uint32_t>(sizes.heads)));
    writer.set("llama.attention.head_count_kv",
               MetaValue::u32(static_cast<uint32_t>(sizes.kv_heads)));
    writer.set("llama.context_length", MetaValue::u32(static_cast<uint32_t>(sizes.context)));
    writer.set("llama.attention.layer_norm_rms_epsilon",
               MetaValue::f32(static_cast<float>(sizes.norm_epsilon)));
    writer.set("llama.rope.freq_base", MetaValue::f32(static_cast<float>(sizes.theta)));
    writer.set("llama.vocab_size", MetaValue::u32(static_cast<uint32_t>(sizes.vocab)));
    for (const auto& [name, weight] : dense) {
      const bool packed = signs.contains(name);
      const std::vector<int64_t> ne = extents.at(name);
      if (!packed || reconstructed || left_dense.contains(name)) {
        const std::string full = packed ? name + ".weight" : name;
        ASSERT_TRUE(
            writer.add_tensor(full, TensorType::kF32, ne, std::as_bytes(std::span(weight))));
        continue;
      }
      const auto paths = static_cast<int64_t>(rows.at(name).size()) / ne[1];
      ASSERT_TRUE(writer.add_tensor(name + ".sign", TensorType::kI32,
                                    {(ne[0] + 31) / 32, ne[1], paths},
                                    std::as_bytes(std::span(signs.at(name)))));
      ASSERT_TRUE(writer.add_tensor(name + ".row_scale", TensorType::kF16, {ne[1], paths},
                                    std::as_bytes(std::span(rows.at(name)))));
      ASSERT_TRUE(writer.add_tensor(name + ".col_scale", TensorType::kF16, {ne[0], paths},
                                    std::as_bytes(std::span(columns.at(name)))));
    }
    const Status status = writer.write(path);
    ASSERT_TRUE(status) << status.error().message;
  }

  const Floats& weight(const std::string& name) const {
    const auto it = dense.find(name);
    return it != dense.end() ? it->second : dense.at(name + ".weight");
  }
  const Floats& head() const { return dense.at(tied_ ? "token_embd.weight" : "output.weight"); }

  TinySizes sizes;
  std::map<std::string, Floats> dense;  // packed layers under their bare name
  std::set<std::string> left_dense;     // packed layers that the file has reconstructed
  std::map<std::string, std::vector<int64_t>> extents;
  std::map<std::string, std::vector<uint32_t>> signs;
  std::map<std::string, std::vector<uint16_t>> rows, columns;

 private:
  float normal() { return normal_(generator_); }

  void add(const std::string& name, int64_t d_in, int64_t d_out, float scale) {
    Floats& weight = dense[name];
    for (int64_t i = 0; i < d_in * d_out; ++i) {
      weight.push_back(scale * normal());
    }
    extents[name] = {d_in, d_out};
  }

  void norm(const std::string& name) {
    for (int64_t i = 0; i < sizes.width; ++i) {
      dense[name].push_back(1.0F + 0.1F * normal());
    }
    extents[name] = {sizes.width};
  }

  void linear(const std::string& name, int64_t d_in, int64_t d_out, int64_t paths) {
    if (paths == 0) {
      return add(name + ".weight", d_in, d_out, 0.15F);
    }
    extents[name] = {d_in, d_out};
    Floats& weight = dense[name];
    weight.assign(static_cast<size_t>(d_in * d_out), 0.0F);
    for (int64_t path = 0; path < paths; ++path) {
      for (int64_t r = 0; r < d_out; ++r) {
        rows[name].push_back(float_to_half(0.15F * (1.0F + 0.2F * normal()) / (1.0F + path)));
      }
      for (int64_t c = 0; c < d_in; ++c) {
        columns[name].push_back(float_to_half(1.0F + 0.2F * normal()));
      }
      for (int64_t r = 0; r < d_out; ++r) {
        for (int64_t c = 0; c < d_in; ++c) {
          if (c % 32 == 0) {
            signs[name].push_back(0);
          }
          const bool plus = (generator_() & 1U) != 0;
          signs[name].back() |= static_cast<uint32_t>(plus) << (c % 32);
          const float magnitude = half_to_float(rows[name][path * d_out + r]) *
                                  half_to_float(columns[name][path * d_in + c]);
          weight[r * d_in + c] += plus ? magnitude : -magnitude;
        }
      }
    }
  }

  std::mt19937_64 generator_;
  std::normal_distribution<float> normal_;
  bool tied_;
};

inline Doubles product(const Floats& w, const Doubles& x) {
  Doubles y(w.size() / x.size());
  for (size_t i = 0; i < w.size(); ++i) {
    y[i / x.size()] += w[i] * x[i % x.size()];
  }
  return y;
}

inline Doubles normed(const Doubles& x, const Floats& weight, double epsilon) {
  double squares = 0;
  for (const double value : x) {
    squares += value * value;
  }
  Doubles y;
  for (size_t i = 0; i < x.size(); ++i) {
    y.push_back(x[i] / std::sqrt(squares / static_cast<double>(x.size()) + epsilon) * weight[i]);
  }
  return y;
}

inline void turn(Doubles& x, int64_t position, const TinySizes& sizes) {
  const auto head_dim = static_cast<size_t>(sizes.head_dim());
  for (size_t i = 0; i < x.size(); i += 2) {
    const double exponent = static_cast<double>(i % head_dim) / static_cast<double>(head_dim);
    const double angle = static_cast<double>(position) * std::pow(sizes.theta, -exponent);
    const double a = x[i], b = x[i + 1];
    x[i] = a * std::cos(angle) - b * std::sin(angle);
    x[i + 1] = a * std::sin(angle) + b * std::cos(angle);
  }
}

/// Logits after every token, (tokens, vocab), in double.
inline std::vector<Doubles> forward_in_double(const SmallModel& model,
                                              const std::vector<int32_t>& tokens) {
  const TinySizes& sizes = model.sizes;
  const int64_t head_dim = sizes.head_dim();
  std::vector<std::vector<Doubles>> keys(sizes.layers), values(sizes.layers);
  std::vector<Doubles> logits;
  for (size_t position = 0; position < tokens.size(); ++position) {
    const Floats& embedding = model.weight("token_embd.weight");
    Doubles x(embedding.begin() + tokens[position] * sizes.width,
              embedding.begin() + (tokens[position] + 1) * sizes.width);
    for (int64_t layer = 0; layer < sizes.layers; ++layer) {
      const std::string block = "blk." + std::to_string(layer) + ".";
      const Doubles h = normed(x, model.weight(block + "attn_norm.weight"), sizes.norm_epsilon);
      Doubles q = product(model.weight(block + "attn_q"), h);
      Doubles k = product(model.weight(block + "attn_k"), h);
      turn(q, static_cast<int64_t>(position), sizes);
      turn(k, static_cast<int64_t>(position), sizes);
      keys[layer].push_back(k);
      values[layer].push_back(product(model.weight(block + "attn_v"), h));
      Doubles attended(sizes.heads * head_dim);
      for (int64_t head = 0; head < sizes.heads; ++head) {
        const int64_t kv = head * sizes.kv_heads / sizes.heads;
        Doubles weights;
        double total = 0;
        for (const Doubles& key : keys[layer]) {
          double dot = 0;
          for (int64_t i = 0; i < head_dim; ++i) {
            dot += q[head * head_dim + i] * key[kv * head_dim + i];
          }
          weights.push_back(std::exp(dot / std::sqrt(static_cast<double>(head_dim))));
          total += weights.back();
        }
        for (size_t p = 0; p < weights.size(); ++p) {
          for (int64_t i = 0; i < head_dim; ++i) {
            attended[head * head_dim + i] +=
                weights[p] / total * values[layer][p][kv * head_dim + i];
          }
        }
      }
      const Doubles out = product(model.weight(block + "attn_output"), attended);
      for (int64_t i = 0; i < sizes.width; ++i) {
        x[i] += out[i];
      }
      const Doubles f = normed(x, model.weight(block + "ffn_norm.weight"), sizes.norm_epsilon);
      Doubles gate = product(model.weight(block + "ffn_gate"), f);
      const Doubles up = product(model.weight(block + "ffn_up"), f);
      for (int64_t i = 0; i < sizes.hidden; ++i) {
        gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      }
      const Doubles down = product(model.weight(block + "ffn_down"), gate);
      for (int64_t i = 0; i < sizes.width; ++i) {
        x[i] += down[i];
      }
    }
    logits.push_back(
        product(model.head(), normed(x, model.weight("output_norm.weight"), sizes.norm_epsilon)));
  }
  return logits;
}

inline std::vector<int32_t> random_tokens(int64_t count, uint64_t seed, int64_t vocab) {
  std::mt19937_64 generator(seed);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<int32_t>(generator() % static_cast<uint64_t>(vocab)));
  }
  return tokens;
}

/// ||got - want|| / ||want||; NaN if either is.
template <typename A, typename B>
double relative_error(const A& got, const B& want) {
  EXPECT_EQ(got.size(), want.size());
  double off = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    off += std::pow(static_cast<double>(got[i]) - want[i], 2);
    norm += std::pow(static_cast<double>(want[i]), 2);
  }
  return std::sqrt(off / norm);
}

}  // namespace rabit
