// The forward pass. A call is cut into chunks of at most kMostTogether tokens; each chunk goes
// through all blocks and leaves its keys and values in the cache, (layers, kv_heads, capacity,
// head_dim), so the next chunk sees them. All memory is taken when the session is made (that of
// forward_all's logits at its first call).
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <initializer_list>

#include "base/interrupt.h"
#include "engine/gpu.h"
#include "engine/input.h"
#include "engine/model.h"
#include "io/dequant.h"

namespace rabit {
namespace {

constexpr int64_t kLogitsChunk = 256;  // tokens whose logits are in memory at once

constexpr int64_t kMostProducts = 3;  // that share an input

/// Parts of an attention over so many positions: their number alone decides, so that values are the
/// same for any number of threads.
int64_t attention_parts(int64_t positions) {
  return (positions + kPartPositions - 1) / kPartPositions;
}

struct Product {
  const LinearWeights* weights = nullptr;
  float* y = nullptr;
};

/// Products that share their input.
class Products {
 public:
  Products() = default;
  Products(std::initializer_list<Product> all) {
    for (const Product& product : all) {
      push(product);
    }
  }
  void push(const Product& product) { all_[size_++] = product; }
  size_t size() const { return size_; }
  const Product* begin() const { return all_.data(); }
  const Product* end() const { return all_.data() + size_; }

 private:
  std::array<Product, kMostProducts> all_;
  size_t size_ = 0;
};

class LoadedSession : public Session {
 public:
  LoadedSession(std::shared_ptr<LoadedModel> model, int64_t capacity)
      : model_(std::move(model)),
        config_(model_->config),
        capacity_(capacity),
        chunk_(std::min(capacity, kMostTogether)) {}

  Status allocate();
  Status forward_all(std::span<const int32_t> tokens, const LogitSink& sink) override;
  Result<std::span<const float>> forward(std::span<const int32_t> tokens) override;
  const Model& model() const override { return *model_; }
  Status check(std::span<const int32_t> tokens) const override {
    return check_input(tokens, position_, capacity_, config_.vocab_size);
  }
  Result<std::span<const float>> lead(std::span<Session* const> sessions,
                                      std::span<const int32_t> tokens) override;
  int64_t position() const override { return position_; }
  void truncate(int64_t position) override {
    position_ = std::clamp<int64_t>(position, 0, position_);
  }

 private:
  Status run_blocks(std::span<const int32_t> tokens);
  void run_block(int64_t layer, int64_t tokens);
  /// Whose a token of the chunk is, and its position there.
  const LoadedSession& owner(int64_t token) const {
    return each_of_.empty() ? *this : *each_of_[static_cast<size_t>(token)];
  }
  int64_t position_of(int64_t token) const {
    return each_of_.empty() ? position_ + token : owner(token).position_;
  }
  void store_cache(int64_t layer, int64_t begin, int64_t end);
  AttentionInput attention_of(int64_t layer, int64_t token, int64_t tokens) const;
  void attend(int64_t layer, int64_t tokens);
  void attend_in_parts(const AttentionInput& input);
  void multiply(const float* x, int64_t tokens, const Products& products);
  void multiply_group(const float* all, int64_t first, int64_t tokens, const Products& products);
  void prepare(const float* x, int64_t tokens, const Products& products);
  void head(int64_t first, int64_t tokens, float* logits);
  template <typename Task>
  void share_tasks(int64_t count, const Task& task);
  template <typename Body>
  void over_tokens(int64_t tokens, const Body& body);

  std::shared_ptr<LoadedModel> model_;
  const ModelConfig& config_;
  const int64_t capacity_, chunk_;
  int64_t position_ = 0;
  std::span<LoadedSession* const> each_of_;  // whose a chunk's tokens are; none: all are its own

  Buffer keys_, values_;             // (layers, kv_heads, capacity, head_dim)
  Buffer work_;                      // all below but the scratch
  float* x_ = nullptr;               // (chunk, d_model): the residual stream
  float* h_ = nullptr;               // (chunk, d_model): normed input, or a block part's output
  float* q_ = nullptr;               // (chunk, d_q)
  float* k_ = nullptr;               // (chunk, d_kv)
  float* v_ = nullptr;               // (chunk, d_kv)
  float* attended_ = nullptr;        // (chunk, d_q)
  float* gate_ = nullptr;            // (chunk, d_ff)
  float* up_ = nullptr;              // (chunk, d_ff)
  float* turns_ = nullptr;           // (chunk, head_dim): cos and sin of each pair
  float* last_ = nullptr;            // (vocab): logits of the last token
  std::vector<double> frequencies_;  // (head_dim / 2): radians a position
  Buffer input_;                     // (kMostProducts, input_bytes_): made ready for products
  int64_t input_bytes_ = 0;          // 0: products read floats, as with an F32 cache
  Buffer scratch_;                   // (threads, scratch_stride_)
  int64_t scratch_stride_ = 0;
  // Of an attention that is cut over positions, (parts, tokens, heads, head_dim) and (.., 2), and
  // by KV head or head how many parts are still to be done.
  Buffer part_outs_, part_states_;
  std::vector<std::atomic<int64_t>> parts_left_;
  Buffer logits_;            // (kLogitsChunk, vocab), from the first forward_all on
  std::vector<float> each_;  // logits of forward_each()
  int64_t logits_rows_ = 0;
};

Status LoadedSession::allocate() {
  const KernelTable& table = *model_->table;
  uint64_t bytes = 0;
  const auto per_position =
      static_cast<uint64_t>(cache_bytes(model_->cache, config_.layers * config_.d_kv()));
  const auto pages = static_cast<uint64_t>(std::max(0L, ::sysconf(_SC_PHYS_PAGES)));
  const auto page = static_cast<uint64_t>(std::max(0L, ::sysconf(_SC_PAGESIZE)));
  if (__builtin_mul_overflow(static_cast<uint64_t>(capacity_), 2 * per_position, &bytes) ||
      bytes > pages * page) {
    const auto gib = [](double size) { return std::to_string(std::llround(size * 0x1p-30)); };
    return Error{"a context of " + std::to_string(capacity_) + " positions needs " +
                 gib(2.0 * static_cast<double>(per_position) * static_cast<double>(capacity_)) +
                 " GiB for keys and values, this machine has " +
                 gib(static_cast<double>(pages) * static_cast<double>(page)) +
                 " GiB of memory; ask for a smaller one"};
  }
  RABIT_ASSIGN(keys_, Buffer::make(bytes / 2, 1, "the cache of keys"));
  RABIT_ASSIGN(values_, Buffer::make(bytes / 2, 1, "the cache of values"));
  // The pages that the first position goes to, of 2 MiB, take far longer to get than to fill: here,
  // not while it is timed.
  for (int64_t head = 0; head < config_.layers * config_.kv_heads; ++head) {
    const int64_t place = cache_bytes(model_->cache, head * capacity_ * config_.head_dim);
    keys_.as<std::byte>()[place] = values_.as<std::byte>()[place] = {};
  }

  const std::array<std::pair<float**, int64_t>, 10> parts = {{{&x_, chunk_ * config_.d_model},
                                                              {&h_, chunk_ * config_.d_model},
                                                              {&q_, chunk_ * config_.d_q()},
                                                              {&k_, chunk_ * config_.d_kv()},
                                                              {&v_, chunk_ * config_.d_kv()},
                                                              {&attended_, chunk_ * config_.d_q()},
                                                              {&gate_, chunk_ * config_.d_ff},
                                                              {&up_, chunk_ * config_.d_ff},
                                                              {&turns_, chunk_ * config_.head_dim},
                                                              {&last_, config_.vocab_size}}};
  const auto padded = [](int64_t floats) { return (floats + 15) / 16 * 16; };
  int64_t total = 0;
  for (const auto& part : parts) {
    total += padded(part.second);
  }
  RABIT_ASSIGN(work_, Buffer::make(static_cast<uint64_t>(total), 4, "activations"));
  float* next = work_.as<float>();
  for (const auto& [pointer, floats] : parts) {
    *pointer = next;
    next += padded(floats);
  }

  int64_t scratch =
      table.attention_scratch(chunk_, capacity_, config_.heads, config_.kv_heads, config_.head_dim);
  const auto grow = [&](const LinearWeights& w) {
    const int64_t group = std::min(chunk_, table.group_tokens);
    const int64_t bytes = model_->cache == CacheFormat::kF32 ? 0 : table.input_bytes(w, group);
    input_bytes_ = std::max(input_bytes_, bytes);
    // Small numbers of tokens may need more than large ones.
    for (int64_t tokens = 1; tokens <= chunk_ && bytes == 0; ++tokens) {
      scratch = std::max(scratch, table.matmul_scratch(w.d_in, tokens, w.paths));
    }
  };
  grow(model_->head.weights);
  for (const DecoderBlock& block : model_->blocks) {
    for (const Linear& linear : block.linears) {
      grow(linear.weights);
    }
  }
  input_bytes_ = (input_bytes_ + 63) / 64 * 64;
  RABIT_ASSIGN(input_, Buffer::make(static_cast<uint64_t>(kMostProducts * input_bytes_), 1,
                                    "inputs of products"));
  scratch_stride_ = padded(scratch);
  RABIT_ASSIGN(scratch_, Buffer::make(static_cast<uint64_t>(scratch_stride_) * model_->threads(), 4,
                                      "kernel scratch"));
  if (const int64_t most_parts = attention_parts(capacity_); most_parts > 1) {
    const auto rows = static_cast<uint64_t>(most_parts * config_.heads *
                                            std::min(chunk_, table.attention_token_grain));
    RABIT_ASSIGN(part_outs_, Buffer::make(rows, static_cast<uint64_t>(config_.head_dim) * 4,
                                          "parts of attention"));
    RABIT_ASSIGN(part_states_, Buffer::make(rows, 2 * 4, "parts of attention"));
    parts_left_ = std::vector<std::atomic<int64_t>>(static_cast<size_t>(config_.heads));
  }
  for (int64_t i = 0; i < config_.head_dim / 2; ++i) {
    const double power = -2.0 * static_cast<double>(i) / static_cast<double>(config_.head_dim);
    frequencies_.push_back(std::pow(static_cast<double>(config_.rope_theta), power));
  }
  return {};
}

/// body(begin, end) over ranges of tokens; a few tokens are not worth waking threads for.
template <typename Body>
void LoadedSession::over_tokens(int64_t tokens, const Body& body) {
  constexpr int64_t kWorthwhile = 16;
  if (tokens < kWorthwhile) {
    body(0, tokens);
  } else {
    model_->pool->parallel_for(tokens, 1,
                               [&](int64_t begin, int64_t end, int) { body(begin, end); });
  }
}

/// Runs task(i, thread) for all i in [0, count), each taken by the next free thread: a thread that
/// shares its core with something else must not hold up the rest.
template <typename Task>
void LoadedSession::share_tasks(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  model_->pool->parallel_for(model_->threads(), 1, [&](int64_t, int64_t, int thread) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      task(i, thread);
    }
  });
}

/// y = W x for products that share x (tokens, d_in), by as many tokens as kernels take together:
/// those of a prepared input a few, the others all.
void LoadedSession::multiply(const float* x, int64_t tokens, const Products& products) {
  const KernelTable& table = *model_->table;
  if (input_bytes_ == 0 || tokens <= table.group_tokens) {
    return multiply_group(x, 0, tokens, products);
  }
  for (const bool prepared : {false, true}) {
    Products some;
    for (const Product& product : products) {
      if ((table.input_bytes(*product.weights, 1) > 0) == prepared) {
        some.push(product);
      }
    }
    const int64_t group = prepared ? table.group_tokens : tokens;
    for (int64_t first = 0; first < tokens && some.size() > 0; first += group) {
      multiply_group(x, first, std::min(group, tokens - first), some);
    }
  }
}

/// The same for tokens [first, first + tokens), cut into tasks by rows. How rows are cut has no
/// influence on the values.
void LoadedSession::multiply_group(const float* all, int64_t first, int64_t tokens,
                                   const Products& products) {
  constexpr int64_t kTasksPerThread = 8, kFewestTasks = 2, kFewestRows = 64;
  const KernelTable& table = *model_->table;
  const int64_t parts = model_->threads() == 1 ? 1 : model_->threads() * kTasksPerThread;
  int64_t all_rows = 0;
  for (const Product& product : products) {
    all_rows += product.weights->d_out;
  }
  // Rows in the numbers that kernels like best, unless threads would go without.
  const int64_t likes = table.matmul_row_grain;
  const int64_t grain =
      all_rows / likes >= kFewestTasks * model_->threads() ? likes : std::min(likes, kFewestRows);
  const auto rows_per_task = [&](const LinearWeights& w) {
    const int64_t rows = std::max(kFewestRows, (w.d_out + parts - 1) / parts);
    return (rows + grain - 1) / grain * grain;
  };
  const float* x = all + first * products.begin()->weights->d_in;
  prepare(x, tokens, products);
  int64_t tasks = 0;
  for (const Product& product : products) {
    const int64_t rows = rows_per_task(*product.weights);
    tasks += (product.weights->d_out + rows - 1) / rows;
  }
  share_tasks(tasks, [&](int64_t task, int thread) {
    const std::byte* input = input_.as<std::byte>();
    for (const Product& product : products) {
      const LinearWeights& w = *product.weights;
      const int64_t rows = rows_per_task(w);
      const int64_t here = (w.d_out + rows - 1) / rows;
      if (task < here) {
        const bool prepared = input_bytes_ > 0 && table.input_bytes(w, 1) > 0;
        table.matmul(w, x, prepared ? input : nullptr, tokens, product.y + first * w.d_out,
                     task * rows, std::min(w.d_out, (task + 1) * rows),
                     scratch_.as<float>() + thread * scratch_stride_);
        return;
      }
      task -= here;
      input += input_bytes_;
    }
  });
}

/// What the products read beside x, in each thread some tokens, or of few tokens a range of one
/// token's columns, where that is worth it. Each of those that share columns looks for the largest
/// of all of them: half a microsecond for 4096 of them, about what one more barrier would take.
void LoadedSession::prepare(const float* x, int64_t tokens, const Products& products) {
  constexpr int64_t kWorthwhile = 256;  // words
  const KernelTable& table = *model_->table;
  if (input_bytes_ == 0) {
    return;
  }
  int64_t words = 0;
  for (const Product& product : products) {
    const LinearWeights& w = *product.weights;
    if (table.input_bytes(w, tokens) > 0) {
      words += (w.d_in + 31) / 32 * std::max<int64_t>(w.paths, 1) * tokens;
    }
  }
  const int64_t parts = words < kWorthwhile ? 1 : model_->threads();
  const int64_t groups = std::min(tokens, parts), ranges = (parts + groups - 1) / groups;
  const auto part = [&](int64_t i) {
    const int64_t group = i / ranges, range = i % ranges;
    const int64_t begin = tokens * group / groups, end = tokens * (group + 1) / groups;
    std::byte* input = input_.as<std::byte>();
    for (const Product& product : products) {
      const LinearWeights& w = *product.weights;
      if (const int64_t bytes = table.input_bytes(w, 1); bytes > 0) {
        const int64_t all = (w.d_in + 31) / 32;
        const int64_t first = all * range / ranges, last = all * (range + 1) / ranges;
        if (first < last) {
          table.prepare(w, x + begin * w.d_in, end - begin, input + begin * bytes, first, last);
        }
      }
      input += input_bytes_;
    }
  };
  if (words > 0 && parts == 1) {
    part(0);
  } else if (words > 0) {
    share_tasks(groups * ranges, [&](int64_t i, int) { part(i); });
  }
}

/// Keys and values of tokens [begin, end) of the chunk into the cache.
void LoadedSession::store_cache(int64_t layer, int64_t begin, int64_t end) {
  const int64_t d = config_.head_dim;
  for (int64_t t = begin; t < end; ++t) {
    const LoadedSession& own = owner(t);
    for (int64_t head = 0; head < config_.kv_heads; ++head) {
      const int64_t place = (layer * config_.kv_heads + head) * own.capacity_ + position_of(t);
      const int64_t to = cache_bytes(model_->cache, place * d);
      const int64_t from = (t * config_.kv_heads + head) * d;
      model_->table->to_cache(k_ + from, d, model_->cache, own.keys_.as<std::byte>() + to);
      model_->table->to_cache(v_ + from, d, model_->cache, own.values_.as<std::byte>() + to);
    }
  }
}

/// Every part of some heads is a task; the thread that ends the last of them puts them together.
void LoadedSession::attend_in_parts(const AttentionInput& input) {
  const KernelTable& table = *model_->table;
  const int64_t positions = input.first_position + input.tokens;
  const int64_t parts = attention_parts(positions), rows = input.tokens * input.heads;
  const int64_t group = input.heads / input.kv_heads;
  // Heads that share keys stay together where there are enough of them.
  const int64_t together = input.kv_heads * parts >= 2 * model_->threads() ? group : 1;
  const int64_t sets = input.heads / together;
  for (int64_t set = 0; set < sets && parts > 1; ++set) {
    parts_left_[static_cast<size_t>(set)] = parts;
  }
  share_tasks(sets * parts, [&](int64_t task, int thread) {
    const int64_t set = task / parts, part = task % parts;
    const int64_t begin = set * together, end = begin + together;
    float* const scratch = scratch_.as<float>() + thread * scratch_stride_;
    if (parts == 1) {
      return table.attention(input, begin, end, 0, input.tokens, scratch, attended_);
    }
    float *outs = part_outs_.as<float>(), *states = part_states_.as<float>();
    table.attention_part(input, begin, end, part * kPartPositions,
                         std::min(positions, (part + 1) * kPartPositions), scratch,
                         outs + part * rows * input.head_dim, states + part * rows * 2);
    if (parts_left_[static_cast<size_t>(set)].fetch_sub(1) == 1) {
      table.merge_parts(input, begin, end, parts, outs, states, attended_);
    }
  });
}

/// Of tokens [token, token + tokens) of the chunk, all of one sequence.
AttentionInput LoadedSession::attention_of(int64_t layer, int64_t token, int64_t tokens) const {
  const LoadedSession& own = owner(token);
  const int64_t offset = cache_bytes(model_->cache, layer * own.capacity_ * config_.d_kv());
  return {.q = q_ + token * config_.d_q(),
          .cache = model_->cache,
          .k = own.keys_.as<std::byte>() + offset,
          .v = own.values_.as<std::byte>() + offset,
          .tokens = tokens,
          .first_position = position_of(token),
          .heads = config_.heads,
          .kv_heads = config_.kv_heads,
          .head_dim = config_.head_dim,
          .capacity = own.capacity_};
}

void LoadedSession::attend(int64_t layer, int64_t tokens) {
  const KernelTable& table = *model_->table;
  if (!each_of_.empty()) {
    const int64_t group = config_.heads / config_.kv_heads;
    share_tasks(tokens * config_.kv_heads, [&](int64_t task, int thread) {
      const int64_t token = task / config_.kv_heads, head = task % config_.kv_heads * group;
      table.attention(attention_of(layer, token, 1), head, head + group, 0, 1,
                      scratch_.as<float>() + thread * scratch_stride_,
                      attended_ + token * config_.d_q());
    });
    return;
  }
  const AttentionInput input = attention_of(layer, 0, tokens);
  const int64_t grain = table.attention_token_grain;
  const int64_t blocks = (tokens + grain - 1) / grain;
  const int64_t group = config_.heads / config_.kv_heads;
  float* const scratch = scratch_.as<float>();
  if (blocks == 1) {  // too few tokens to split: split the heads and the positions
    return attend_in_parts(input);
  }
  // Heads that share keys stay together where that leaves every thread something to do.
  const int64_t together = blocks * config_.kv_heads >= 2 * model_->threads() ? group : 1;
  const int64_t sets = config_.heads / together;
  share_tasks(blocks * sets, [&](int64_t task, int thread) {
    // The last blocks see the most positions: they come first.
    const int64_t block = blocks - 1 - task / sets, head = task % sets * together;
    table.attention(input, head, head + together, block * grain,
                    std::min(tokens, (block + 1) * grain), scratch + thread * scratch_stride_,
                    attended_);
  });
}

void LoadedSession::run_block(int64_t layer, int64_t tokens) {
  const KernelTable& table = *model_->table;
  const DecoderBlock& block = model_->blocks[static_cast<size_t>(layer)];
  const int64_t d = config_.d_model;
  const auto add_to_stream = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * d; i < end * d; ++i) {
      x_[i] += h_[i];
    }
  };
  const auto norm = [&](const std::vector<float>& weight, int64_t begin, int64_t end) {
    table.rms_norm(x_ + begin * d, weight.data(), end - begin, d, config_.norm_epsilon,
                   h_ + begin * d);
  };

  over_tokens(tokens, [&](int64_t begin, int64_t end) { norm(block.attn_norm, begin, end); });
  multiply(h_, tokens,
           {{&block.at(Role::kAttnQ), q_},
            {&block.at(Role::kAttnK), k_},
            {&block.at(Role::kAttnV), v_}});
  over_tokens(tokens, [&](int64_t begin, int64_t end) {
    const float* turns = turns_ + begin * config_.head_dim;
    table.rope(q_ + begin * config_.d_q(), turns, end - begin, config_.heads, config_.head_dim);
    table.rope(k_ + begin * config_.d_kv(), turns, end - begin, config_.kv_heads, config_.head_dim);
    store_cache(layer, begin, end);
  });
  attend(layer, tokens);
  multiply(attended_, tokens, {{&block.at(Role::kAttnOutput), h_}});
  over_tokens(tokens, [&](int64_t begin, int64_t end) {
    add_to_stream(begin, end);
    norm(block.ffn_norm, begin, end);
  });
  multiply(h_, tokens, {{&block.at(Role::kFfnGate), gate_}, {&block.at(Role::kFfnUp), up_}});
  constexpr int64_t kWorthwhile = 1024;  // values for a thread
  model_->pool->parallel_for(tokens * config_.d_ff, kWorthwhile,
                             [&](int64_t begin, int64_t end, int) {
                               table.swiglu(gate_ + begin, up_ + begin, end - begin);
                             });
  multiply(gate_, tokens, {{&block.at(Role::kFfnDown), h_}});
  over_tokens(tokens, add_to_stream);
}

/// A chunk through all blocks; x_ then holds the stream after the last. The position is not moved.
Status LoadedSession::run_blocks(std::span<const int32_t> tokens) {
  const int64_t d = config_.d_model;
  const auto count = static_cast<int64_t>(tokens.size());
  for (int64_t t = 0; t < count; ++t) {
    const std::span<float> row(x_ + t * d, static_cast<size_t>(d));
    RABIT_CHECK(dequantize(*model_->embedding, tokens[static_cast<size_t>(t)] * d, row));
    for (int64_t i = 0; i < config_.head_dim / 2; ++i) {
      const double angle =
          static_cast<double>(position_of(t)) * frequencies_[static_cast<size_t>(i)];
      turns_[t * config_.head_dim + 2 * i] = static_cast<float>(std::cos(angle));
      turns_[t * config_.head_dim + 2 * i + 1] = static_cast<float>(std::sin(angle));
    }
  }
  for (int64_t layer = 0; layer < config_.layers; ++layer) {
    RABIT_CHECK(check_interrupt());
    run_block(layer, count);
  }
  return {};
}

/// Logits (tokens, vocab) of tokens [first, first + tokens) of the chunk.
void LoadedSession::head(int64_t first, int64_t tokens, float* logits) {
  const int64_t d = config_.d_model;
  over_tokens(tokens, [&](int64_t begin, int64_t end) {
    model_->table->rms_norm(x_ + (first + begin) * d, model_->output_norm.data(), end - begin, d,
                            config_.norm_epsilon, h_ + begin * d);
  });
  multiply(h_, tokens, {{&model_->head.weights, logits}});
}

Result<std::span<const float>> LoadedSession::lead(std::span<Session* const> sessions,
                                                   std::span<const int32_t> tokens) {
  std::vector<LoadedSession*> all;
  LoadedSession* largest = this;  // whose scratch is enough for all
  for (Session* session : sessions) {
    auto* const own = static_cast<LoadedSession*>(session);
    largest = own->capacity_ > largest->capacity_ ? own : largest;
    all.push_back(own);
  }
  each_.resize(all.size() * static_cast<size_t>(config_.vocab_size));
  const auto together = static_cast<size_t>(largest->chunk_);
  for (size_t first = 0; first < all.size(); first += together) {
    const size_t count = std::min(together, all.size() - first);
    largest->each_of_ = std::span(all).subspan(first, count);
    const Status status = largest->run_blocks(tokens.subspan(first, count));
    largest->each_of_ = {};
    RABIT_CHECK(status);
    largest->head(0, static_cast<int64_t>(count),
                  each_.data() + first * static_cast<size_t>(config_.vocab_size));
  }
  for (LoadedSession* own : all) {  // not before all have gone well
    ++own->position_;
  }
  return std::span<const float>(each_);
}

Status LoadedSession::forward_all(std::span<const int32_t> tokens, const LogitSink& sink) {
  RABIT_CHECK(check(tokens));
  const auto total = static_cast<int64_t>(tokens.size());
  if (const int64_t rows = std::min({total, chunk_, kLogitsChunk}); rows > logits_rows_) {
    RABIT_ASSIGN(logits_, Buffer::make(static_cast<uint64_t>(rows),
                                       static_cast<uint64_t>(config_.vocab_size) * 4, "logits"));
    logits_rows_ = rows;
  }
  const int64_t start = position_;
  for (int64_t first = 0; first < total; first += chunk_) {
    const int64_t count = std::min(chunk_, total - first);
    if (const Status status = run_blocks(tokens.subspan(first, count)); !status) {
      position_ = start;
      return status;
    }
    position_ += count;
    for (int64_t t = 0; t < count; t += kLogitsChunk) {
      const int64_t rows = std::min(kLogitsChunk, count - t);
      head(t, rows, logits_.as<float>());
      sink(first + t, rows, logits_.as<float>());
    }
  }
  return {};
}

Result<std::span<const float>> LoadedSession::forward(std::span<const int32_t> tokens) {
  RABIT_CHECK(check(tokens));
  const auto total = static_cast<int64_t>(tokens.size());
  const int64_t start = position_;
  int64_t count = 0;
  for (int64_t first = 0; first < total; first += count) {
    count = std::min(chunk_, total - first);
    if (const Status status = run_blocks(tokens.subspan(first, count)); !status) {
      position_ = start;
      return status.error();
    }
    position_ += count;
  }
  head(count - 1, 1, last_);
  return std::span<const float>(last_, static_cast<size_t>(config_.vocab_size));
}

}  // namespace

Result<int32_t> Session::next(std::span<const int32_t> tokens, Sampler& sampler) {
  RABIT_ASSIGN(const auto logits, forward(tokens));
  return sampler.sample(logits);
}

Result<std::span<const float>> Session::forward_each(std::span<Session* const> sessions,
                                                     std::span<const int32_t> tokens) {
  if (sessions.empty() || sessions.size() != tokens.size()) {
    return Error{std::to_string(tokens.size()) + " tokens for " + std::to_string(sessions.size()) +
                 " sessions"};
  }
  std::vector<Session*> sorted(sessions.begin(), sessions.end());
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    return Error{"a session cannot take two tokens at once"};
  }
  for (size_t i = 0; i < sessions.size(); ++i) {
    if (&sessions[i]->model() != &sessions.front()->model()) {
      return Error{"sessions of several models cannot take a token at once"};
    }
    RABIT_CHECK(sessions[i]->check(tokens.subspan(i, 1)));
  }
  return sessions.front()->lead(sessions, tokens);
}

Result<std::unique_ptr<Session>> Session::create(std::shared_ptr<Model> model, int64_t capacity) {
  if (model != nullptr && model->on_gpu()) {
    return create_gpu_session(std::move(model), capacity);
  }
  auto loaded = std::dynamic_pointer_cast<LoadedModel>(std::move(model));
  if (loaded == nullptr) {
    return Error{"a session needs a model made by Model::load"};
  }
  if (capacity < 1) {
    return Error{"a context needs at least one position, not " + std::to_string(capacity)};
  }
  auto session = std::make_unique<LoadedSession>(std::move(loaded), capacity);
  RABIT_CHECK(session->allocate());
  return std::unique_ptr<Session>(std::move(session));
}

}  // namespace rabit
