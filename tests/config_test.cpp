// Model configuration: what a llama file says is read, and everything that contradicts itself, is
// missing or would be computed wrongly is refused by name.
#include "model/config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>

namespace rabit {
namespace {

/// A model file that a test changes before it is written.
struct Draft {
  struct Tensor {
    TensorType type;
    std::vector<int64_t> ne;
  };
  std::map<std::string, MetaValue> keys;
  std::map<std::string, Tensor> tensors;
};

// Two layers, 4 heads of 8 on 2 key-value heads, d_model 32, d_ff 48, 10 tokens.
Draft tiny() {
  Draft draft;
  auto& keys = draft.keys;
  keys["general.architecture"] = MetaValue::string("llama");
  keys["general.name"] = MetaValue::string("tiny");
  keys["llama.block_count"] = MetaValue::u32(2);
  keys["llama.embedding_length"] = MetaValue::u32(32);
  keys["llama.feed_forward_length"] = MetaValue::u32(48);
  keys["llama.attention.head_count"] = MetaValue::u32(4);
  keys["llama.attention.head_count_kv"] = MetaValue::u32(2);
  keys["llama.rope.dimension_count"] = MetaValue::u32(8);
  keys["llama.context_length"] = MetaValue::u32(128);
  keys["llama.attention.layer_norm_rms_epsilon"] = MetaValue::f32(1e-6F);
  keys["llama.rope.freq_base"] = MetaValue::f32(50000.0F);
  auto& tensors = draft.tensors;
  tensors["token_embd.weight"] = {TensorType::kF16, {32, 10}};
  tensors["output_norm.weight"] = {TensorType::kF32, {32}};
  for (const std::string block : {"blk.0.", "blk.1."}) {
    tensors[block + "attn_norm.weight"] = {TensorType::kF32, {32}};
    tensors[block + "ffn_norm.weight"] = {TensorType::kF32, {32}};
    tensors[block + "attn_q.weight"] = {TensorType::kQ4_1, {32, 32}};
    tensors[block + "attn_k.weight"] = {TensorType::kQ4_1, {32, 16}};
    tensors[block + "attn_v.weight"] = {TensorType::kQ4_1, {32, 16}};
    tensors[block + "attn_output.weight"] = {TensorType::kQ8_0, {32, 32}};
    tensors[block + "ffn_gate.weight"] = {TensorType::kBF16, {32, 48}};
    tensors[block + "ffn_up.weight"] = {TensorType::kF32, {32, 48}};
    tensors[block + "ffn_down.weight"] = {TensorType::kF32, {48, 32}};
  }
  return draft;
}

/// Replaces a linear layer by its packed form with `paths` paths.
void pack(Draft& draft, const std::string& name, int64_t paths) {
  const std::vector<int64_t> ne = draft.tensors.at(name + ".weight").ne;
  draft.tensors.erase(name + ".weight");
  draft.tensors[name + ".sign"] = {TensorType::kI32, {(ne[0] + 31) / 32, ne[1], paths}};
  draft.tensors[name + ".row_scale"] = {TensorType::kF16, {ne[1], paths}};
  draft.tensors[name + ".col_scale"] = {TensorType::kF16, {ne[0], paths}};
}

class Config : public testing::Test {
 protected:
  void SetUp() override {
    path_ = std::filesystem::path(testing::TempDir()) /
            ("rabit_config_" + std::to_string(::getpid()) + "_" +
             testing::UnitTest::GetInstance()->current_test_info()->name() + ".gguf");
  }
  void TearDown() override { std::filesystem::remove(path_); }

  Result<ModelConfig> read(const Draft& draft) {
    GgufWriter writer;
    for (const auto& [key, value] : draft.keys) {
      writer.set(key, value);
    }
    const std::vector<std::byte> zeros(1 << 20);
    for (const auto& [name, tensor] : draft.tensors) {
      RABIT_ASSIGN(const uint64_t bytes, tensor_bytes(tensor.type, tensor.ne));
      RABIT_CHECK(writer.add_tensor(name, tensor.type, tensor.ne, std::span(zeros).first(bytes)));
    }
    RABIT_CHECK(writer.write(path_));
    RABIT_ASSIGN(const auto file, GgufFile::open(path_));
    return read_model_config(*file);
  }

  void refused(const std::function<void(Draft&)>& change,
               std::initializer_list<std::string_view> parts) {
    Draft draft = tiny();
    change(draft);
    const auto config = read(draft);
    ASSERT_FALSE(config) << "accepted; expected " << *parts.begin();
    const std::string& message = config.error().message;
    EXPECT_EQ(message.rfind(path_.string() + ": ", 0), 0U) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    for (const std::string_view part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks " << part;
    }
  }
  /// The key with this value is refused by a message that names it.
  void key_refused(const std::string& key, const MetaValue& value,
                   std::initializer_list<std::string_view> parts) {
    refused([&](Draft& draft) { draft.keys[key] = value; }, parts);
  }

  std::filesystem::path path_;
};

TEST_F(Config, ReadsSizes) {
  const auto config = read(tiny());
  ASSERT_TRUE(config) << config.error().message;
  EXPECT_EQ(config->architecture, "llama");
  EXPECT_EQ(config->name, "tiny");
  EXPECT_EQ(config->layers, 2);
  EXPECT_EQ(config->d_model, 32);
  EXPECT_EQ(config->heads, 4);
  EXPECT_EQ(config->kv_heads, 2);
  EXPECT_EQ(config->head_dim, 8);
  EXPECT_EQ(config->d_ff, 48);
  EXPECT_EQ(config->vocab_size, 10);
  EXPECT_EQ(config->context_length, 128);
  EXPECT_EQ(config->norm_epsilon, 1e-6F);
  EXPECT_EQ(config->rope_theta, 50000.0F);
  EXPECT_TRUE(config->tied_head);
  EXPECT_EQ(config->d_q(), 32);
  EXPECT_EQ(config->d_kv(), 16);
}

TEST_F(Config, DefaultsOfMissingKeys) {
  Draft draft = tiny();
  draft.keys.erase("general.name");
  draft.keys.erase("llama.attention.head_count_kv");
  draft.keys.erase("llama.rope.dimension_count");
  draft.keys.erase("llama.rope.freq_base");
  for (const std::string block : {"blk.0.", "blk.1."}) {
    draft.tensors[block + "attn_k.weight"].ne = {32, 32};
    draft.tensors[block + "attn_v.weight"].ne = {32, 32};
  }
  draft.tensors["output.weight"] = {TensorType::kF16, {32, 10}};
  const auto config = read(draft);
  ASSERT_TRUE(config) << config.error().message;
  EXPECT_EQ(config->name, "");
  EXPECT_EQ(config->kv_heads, 4);
  EXPECT_EQ(config->head_dim, 8);
  EXPECT_EQ(config->rope_theta, 10000.0F);
  EXPECT_FALSE(config->tied_head);
}

TEST_F(Config, HeadDimensionMayDifferFromTheSplit) {
  Draft draft = tiny();
  draft.keys["llama.attention.key_length"] = MetaValue::u32(12);
  draft.keys["llama.attention.value_length"] = MetaValue::u32(12);
  draft.keys["llama.rope.dimension_count"] = MetaValue::u32(12);
  for (const std::string block : {"blk.0.", "blk.1."}) {
    draft.tensors[block + "attn_q.weight"] = {TensorType::kF32, {32, 48}};
    draft.tensors[block + "attn_k.weight"] = {TensorType::kF32, {32, 24}};
    draft.tensors[block + "attn_v.weight"] = {TensorType::kF32, {32, 24}};
    draft.tensors[block + "attn_output.weight"] = {TensorType::kF32, {48, 32}};
  }
  const auto config = read(draft);
  ASSERT_TRUE(config) << config.error().message;
  EXPECT_EQ(config->head_dim, 12);
  EXPECT_EQ(config->d_q(), 48);
}

TEST_F(Config, RequiredKeys) {
  for (const std::string key :
       {"general.architecture", "llama.block_count", "llama.embedding_length",
        "llama.feed_forward_length", "llama.attention.head_count", "llama.context_length",
        "llama.attention.layer_norm_rms_epsilon"}) {
    refused([&](Draft& draft) { draft.keys.erase(key); }, {key, "missing"});
    key_refused(key, MetaValue::strings({"x"}), {key, "array of string"});
  }
}

TEST_F(Config, UnknownArchitectureIsNamed) {
  key_refused("general.architecture", MetaValue::string("gpt2"),
              {"\"gpt2\"", "not known", "llama"});
  key_refused("general.architecture", MetaValue::string("a\nb"), {"\"a\\x0ab\""});
  key_refused("general.architecture", MetaValue::string(""), {"\"\"", "llama"});
}

TEST_F(Config, ImpossibleSizes) {
  for (const std::string key :
       {"llama.block_count", "llama.embedding_length", "llama.feed_forward_length",
        "llama.attention.head_count", "llama.attention.head_count_kv", "llama.context_length",
        "llama.attention.key_length", "llama.attention.value_length",
        "llama.rope.dimension_count"}) {
    key_refused(key, MetaValue::u32(0), {key, "is 0"});
    key_refused(key, MetaValue::i64(-4), {key, "is -4"});
    key_refused(key, MetaValue::u64(uint64_t{1} << 62), {key, "it must be"});
    key_refused(key, MetaValue::u64(~uint64_t{0}), {key, "2^63"});
  }
  key_refused("llama.attention.head_count_kv", MetaValue::u32(3), {"4 attention heads", "3"});
  key_refused("llama.attention.head_count", MetaValue::u32(6), {"key_length", "32", "6"});
  key_refused("llama.attention.head_count", MetaValue::u32(64), {"key_length", "64"});
  key_refused("llama.attention.key_length", MetaValue::u32(7), {"7", "odd"});
  key_refused("llama.attention.value_length", MetaValue::u32(4), {"value_length", "4", "8"});
  key_refused("llama.rope.dimension_count", MetaValue::u32(4), {"dimension_count", "4", "8"});
  for (const float value : {0.0F, -1.0F, std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN()}) {
    key_refused("llama.attention.layer_norm_rms_epsilon", MetaValue::f32(value),
                {"layer_norm_rms_epsilon", "positive"});
    key_refused("llama.rope.freq_base", MetaValue::f32(value), {"freq_base", "positive"});
  }
  key_refused("rabit.format_version", MetaValue::u32(2), {"rabit.format_version", "2", "1"});
}

TEST_F(Config, RopeScalingIsRefused) {
  for (const char* type : {"linear", "yarn", "longrope"}) {
    key_refused("llama.rope.scaling.type", MetaValue::string(type),
                {"llama.rope.scaling.type", type, "not supported"});
  }
  key_refused("llama.rope.scaling.factor", MetaValue::f32(4), {"rope.scaling.factor", "4"});
  key_refused("llama.rope.scale_linear", MetaValue::f32(2), {"rope.scale_linear", "2"});
  refused(
      [](Draft& draft) {
        draft.tensors["rope_freqs.weight"] = {TensorType::kF32, {4}};
      },
      {"\"rope_freqs.weight\"", "rope scaling is not supported"});
  Draft draft = tiny();
  draft.keys["llama.rope.scaling.type"] = MetaValue::string("none");
  draft.keys["llama.rope.scaling.factor"] = MetaValue::f32(4);
  EXPECT_TRUE(read(draft));
  draft.keys.erase("llama.rope.scaling.type");
  draft.keys["llama.rope.scaling.factor"] = MetaValue::f32(1);
  EXPECT_TRUE(read(draft));
}

TEST_F(Config, EveryTensorIsNeededWithItsExtents) {
  for (const auto& [name, tensor] : tiny().tensors) {
    refused([&](Draft& draft) { draft.tensors.erase(name); }, {name, "missing"});
    refused(
        [&](Draft& draft) {
          // One row or element more; of the embedding only the width is fixed.
          auto& changed = draft.tensors[name];
          changed.type = TensorType::kF32;
          changed.ne[name == "token_embd.weight" ? 0 : changed.ne.size() - 1] += 1;
        },
        {name, "extents", "needs"});
    refused([&](Draft& draft) { draft.tensors[name].type = TensorType::kI32; }, {name, "I32"});
  }
  refused(
      [](Draft& draft) {
        draft.tensors["output.weight"] = {TensorType::kF32, {32, 11}};
      },
      {"output.weight", "[32, 11]", "[32, 10]"});
  refused(
      [](Draft& draft) {
        draft.tensors["blk.0.attn_q.weight"].ne = {32, 32, 2};
      },
      {"blk.0.attn_q.weight", "[32, 32, 2]"});
}

TEST_F(Config, ForeignTensorsAreRefused) {
  for (const std::string name : {"blk.0.attn_q.bias", "blk.2.attn_norm.weight", "extra"}) {
    refused(
        [&](Draft& draft) {
          draft.tensors[name] = {TensorType::kF32, {32}};
        },
        {"\"" + name + "\"", "no place"});
  }
}

TEST_F(Config, PackedLayers) {
  for (int64_t paths = 1; paths <= 4; ++paths) {
    Draft draft = tiny();
    for (const Role role : kRoles) {
      pack(draft, linear_name(1, role), paths);
    }
    const auto config = read(draft);
    EXPECT_TRUE(config) << config.error().message;
  }
  // One path, and a writer that drops extents of 1 at the end.
  Draft draft = tiny();
  pack(draft, "blk.0.ffn_down", 1);
  EXPECT_EQ(draft.tensors["blk.0.ffn_down.sign"].ne, (std::vector<int64_t>{2, 32, 1}));
  for (const char* part : {".sign", ".row_scale", ".col_scale"}) {
    draft.tensors["blk.0.ffn_down" + std::string(part)].ne.pop_back();
  }
  EXPECT_TRUE(read(draft));
}

TEST_F(Config, DamagedPackedLayers) {
  const std::string name = "blk.0.ffn_down";
  const auto packed = [&](const std::function<void(Draft&)>& change) {
    return [&, change](Draft& draft) {
      pack(draft, name, 2);
      change(draft);
    };
  };
  for (const std::string part : {".row_scale", ".col_scale"}) {
    refused(packed([&](Draft& draft) { draft.tensors.erase(name + part); }),
            {name + part, "missing"});
    refused(packed([&](Draft& draft) { draft.tensors[name + part].type = TensorType::kF32; }),
            {name + part, "F32", "must be F16"});
    for (const size_t axis : {0U, 1U}) {
      refused(packed([&](Draft& draft) { draft.tensors[name + part].ne[axis] += 1; }),
              {name + part, "extents"});
    }
  }
  refused(packed([&](Draft& draft) { draft.tensors[name + ".sign"].type = TensorType::kF32; }),
          {name + ".sign", "F32", "must be I32"});
  for (const size_t axis : {0U, 1U}) {
    refused(packed([&](Draft& draft) { draft.tensors[name + ".sign"].ne[axis] += 1; }),
            {name + ".sign", "extents"});
  }
  refused(packed([&](Draft& draft) { draft.tensors[name + ".sign"].ne[2] = 5; }),
          {name + ".sign", "5 paths"});
  refused(packed([&](Draft& draft) { draft.tensors.erase(name + ".sign"); }),
          {name + ".weight", "missing", name + ".sign"});
  refused(packed([&](Draft& draft) {
            draft.tensors[name + ".weight"] = {TensorType::kF32, {48, 32}};
          }),
          {name, "twice"});
}

TEST_F(Config, RefusesKeysThatContradictTensors) {
  const std::string name = linear_name(1, Role::kFfnUp);
  const auto with_paths = [&](Draft& draft, uint32_t said) {
    pack(draft, name, 2);
    draft.keys["rabit.paths"] = MetaValue::u32(said);
  };
  Draft fits = tiny();
  with_paths(fits, 2);
  fits.keys["llama.vocab_size"] = MetaValue::u32(10);
  EXPECT_TRUE(read(fits));
  for (const uint32_t said : {0U, 7U, 1U << 31}) {
    refused([&](Draft& draft) { with_paths(draft, said); },
            {"\"rabit.paths\" is " + std::to_string(said), "1 to 4"});
  }
  refused([&](Draft& draft) { with_paths(draft, 1); },
          {name + ".sign\" has 2 paths", "\"rabit.paths\" is 1"});
  for (const uint32_t said : {9U, 11U}) {
    key_refused(
        "llama.vocab_size", MetaValue::u32(said),
        {"\"llama.vocab_size\" is " + std::to_string(said), "\"token_embd.weight\" has 10 rows"});
  }
  key_refused("llama.vocab_size", MetaValue::u32(0), {"llama.vocab_size", "1 to"});
}

TEST(ConfigModel, ReadsARealModel) {
  if (!std::filesystem::exists(RABIT_MODEL)) {
    GTEST_SKIP() << "no model at " << RABIT_MODEL;
  }
  const auto file = GgufFile::open(RABIT_MODEL);
  ASSERT_TRUE(file) << file.error().message;
  const auto config = read_model_config(**file);
  ASSERT_TRUE(config) << config.error().message;
  EXPECT_EQ(config->layers, 30);
  EXPECT_EQ(config->d_model, 576);
  EXPECT_EQ(config->d_ff, 1536);
  EXPECT_EQ(config->heads, 9);
  EXPECT_EQ(config->kv_heads, 3);
  EXPECT_EQ(config->head_dim, 64);
  EXPECT_EQ(config->vocab_size, 49152);
  EXPECT_EQ(config->rope_theta, 100000.0F);
  EXPECT_TRUE(config->tied_head);
}

TEST(ConfigNames, RolesShapesAndNames) {
  EXPECT_EQ(linear_name(3, Role::kAttnOutput), "blk.3.attn_output");
  ModelConfig config;
  config.d_model = 32, config.heads = 4, config.kv_heads = 2, config.head_dim = 12;
  config.d_ff = 48;
  const auto shape = [&](Role role) {
    const LinearShape s = linear_shape(config, role);
    return std::pair(s.d_out, s.d_in);
  };
  using Pair = std::pair<int64_t, int64_t>;
  EXPECT_EQ(shape(Role::kAttnQ), Pair(48, 32));
  EXPECT_EQ(shape(Role::kAttnK), Pair(24, 32));
  EXPECT_EQ(shape(Role::kAttnV), Pair(24, 32));
  EXPECT_EQ(shape(Role::kAttnOutput), Pair(32, 48));
  EXPECT_EQ(shape(Role::kFfnGate), Pair(48, 32));
  EXPECT_EQ(shape(Role::kFfnUp), Pair(48, 32));
  EXPECT_EQ(shape(Role::kFfnDown), Pair(32, 48));
}

}  // namespace
}  // namespace rabit
