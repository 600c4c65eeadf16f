// The forward pass on a GPU. A call is cut into chunks; each goes through all blocks and leaves its
// keys and values in the cache, (layers, kv_heads, capacity, head_dim) in F16. The residual stream
// is F32, products read F16. Packed weights become an F16 matrix for the time of a product: for
// many tokens that is a small part of the work. A call of one token, as when text is generated, is
// one kernel that reads packed weights as they lie (kernels/api/gpu_decode.h), where the sizes and
// the GPU allow it. All device memory is taken when the session is made, but for what forward_all's
// logits need more.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>

#include "base/interrupt.h"
#include "engine/gpu_model.h"
#include "engine/input.h"

namespace rabit {
namespace {

constexpr int64_t kChunk = 1024;      // tokens that go through the blocks together
constexpr int64_t kLogitsChunk = 64;  // tokens whose logits are in memory at once
constexpr int32_t kWholeMajor = 8;    // compute capability that whole tokens need

class GpuSession : public Session {
 public:
  GpuSession(std::shared_ptr<GpuModel> model, int64_t capacity)
      : model_(std::move(model)),
        sizes_(model_->sizes),
        capacity_(capacity),
        chunk_(std::min(capacity, kChunk)) {}

  Status allocate();
  Status forward_all(std::span<const int32_t> tokens, const LogitSink& sink) override;
  Result<std::span<const float>> forward(std::span<const int32_t> tokens) override;
  int64_t position() const override { return position_; }
  void truncate(int64_t position) override {
    position_ = std::clamp<int64_t>(position, 0, position_);
  }
  int64_t whole_tokens() const { return whole_tokens_; }

 private:
  Status fill_turns();
  void plan_whole();
  Status prepare_whole();
  Result<bool> run_whole(int32_t token);
  Status run_blocks(std::span<const int32_t> tokens);
  Status run_block(int64_t layer, int64_t tokens);
  Status multiply(std::initializer_list<const gpu::Linear*> linears, const uint16_t* x,
                  int64_t tokens, float* y, bool add = false);
  Status head(int64_t first, int64_t tokens);

  int64_t d_q() const { return int64_t{sizes_.heads} * sizes_.head_dim; }
  int64_t d_kv() const { return int64_t{sizes_.kv_heads} * sizes_.head_dim; }

  std::shared_ptr<GpuModel> model_;
  const gpu::Sizes& sizes_;
  const int64_t capacity_, chunk_;
  int64_t position_ = 0;

  gpu::Memory memory_;            // all arrays of the device
  uint16_t* keys_ = nullptr;      // F16 (layers, kv_heads, capacity, head_dim)
  uint16_t* values_ = nullptr;    // as keys
  float* turns_ = nullptr;        // (capacity, head_dim / 2): cos and sin
  int32_t* tokens_ = nullptr;     // (chunk)
  float* x_ = nullptr;            // (chunk, d_model): the residual stream
  uint16_t* h_ = nullptr;         // F16 (chunk, d_model): normed
  float* qkv_ = nullptr;          // (chunk, d_q + 2 d_kv)
  uint16_t* q_ = nullptr;         // F16 (chunk, d_q)
  uint16_t* attended_ = nullptr;  // F16 (chunk, d_q)
  float* gate_up_ = nullptr;      // (chunk, 2 d_ff)
  uint16_t* hidden_ = nullptr;    // F16 (chunk, d_ff)
  uint16_t* unpacked_ = nullptr;  // F16: the packed weights of one product
  float* logits_ = nullptr;       // (at most kLogitsChunk, vocab)
  int64_t logits_rows_ = 0;
  gpu::HostMemory host_logits_;  // (host_rows_, vocab)
  int64_t host_rows_ = 0;

  // Of whole tokens.
  std::optional<gpu::DecodePlan> plan_;  // none: the sizes or the GPU do not allow them
  gpu::DecodeArgs args_;
  gpu::Job* jobs_ = nullptr;  // as in the plan, and the next
  int32_t* first_ = nullptr;
  float* work_ = nullptr;  // of bind_decode()
  uint64_t work_bytes_ = 0;
  int32_t* next_ = nullptr;    // (2): a token and its position
  gpu::HostMemory host_next_;  // as next_
  int64_t whole_tokens_ = 0;

  gpu::Queue queue_;  // last: what it still does ends before the memory goes
};

/// Rows of an unpacked matrix lie this many elements apart.
int64_t stride_of(const gpu::Linear& w) { return (int64_t{w.d_in} + 7) / 8 * 8; }

bool is_packed(const gpu::Linear& w) { return w.format == gpu::Format::kResidualBinary; }

/// The plan of whole tokens, if there can be one, once for the session.
void GpuSession::plan_whole() {
  const gpu::DeviceInfo& info = model_->info;
  if (info.major < kWholeMajor || !info.cooperative) {
    return;
  }
  if (auto plan = gpu::plan_decode(sizes_, model_->blocks, model_->head, model_->output_norm,
                                   info.multiprocessors, 1, info.block_bytes, {})) {
    plan_ = std::move(*plan);
  }
}

/// Fills what whole tokens need, once it has its place.
Status GpuSession::prepare_whole() {
  gpu::bind_decode(sizes_, *plan_, work_, args_);
  args_.jobs = jobs_;
  args_.first = first_;
  args_.output_norm = model_->output_norm;
  args_.embedding = model_->embedding;
  args_.cos_sin = turns_;
  args_.keys = keys_;
  args_.values = values_;
  args_.sequence_stride = int64_t{sizes_.layers} * d_kv() * capacity_;
  args_.capacity = static_cast<int32_t>(capacity_);
  args_.tokens = next_;
  args_.positions = next_ + 1;
  args_.logits = logits_;
  RABIT_CHECK(queue_.clear(work_, work_bytes_));
  RABIT_CHECK(queue_.upload(jobs_, plan_->jobs.data(), plan_->jobs.size() * sizeof(gpu::Job)));
  RABIT_CHECK(queue_.upload(first_, plan_->first.data(), plan_->first.size() * sizeof(int32_t)));
  RABIT_ASSIGN(host_next_, gpu::HostMemory::make(2 * sizeof(int32_t), "a token"));
  return {};
}

Status GpuSession::allocate() {
  RABIT_CHECK(gpu::activate(model_->info.index));
  constexpr int64_t kMostPositions = int64_t{1} << 30;  // no product of sizes overflows below
  const std::string what = "a context of " + std::to_string(capacity_) + " positions";
  if (capacity_ > kMostPositions) {
    return Error{what + " does not fit a GPU's memory; ask for a smaller one"};
  }
  int64_t unpacked = 0;
  const auto grow = [&](std::initializer_list<const gpu::Linear*> linears) {
    int64_t elements = 0;
    for (const gpu::Linear* linear : linears) {
      elements += is_packed(*linear) ? linear->d_out * stride_of(*linear) : 0;
    }
    unpacked = std::max(unpacked, elements);
  };
  for (const gpu::Block& block : model_->blocks) {
    grow({&block.q, &block.k, &block.v});
    grow({&block.output});
    grow({&block.gate, &block.up});
    grow({&block.down});
  }
  DeviceParts parts;
  const int64_t cached = sizes_.layers * d_kv();
  logits_rows_ = std::min(chunk_, kLogitsChunk);
  parts.add(keys_, cached * capacity_);
  parts.add(values_, cached * capacity_);
  parts.add(turns_, capacity_ * sizes_.head_dim);
  parts.add(tokens_, chunk_);
  parts.add(x_, chunk_ * sizes_.d_model);
  parts.add(h_, chunk_ * sizes_.d_model);
  parts.add(qkv_, chunk_ * (d_q() + 2 * d_kv()));
  parts.add(q_, chunk_ * d_q());
  parts.add(attended_, chunk_ * d_q());
  parts.add(gate_up_, chunk_ * 2 * sizes_.d_ff);
  parts.add(hidden_, chunk_ * sizes_.d_ff);
  parts.add(unpacked_, unpacked);
  parts.add(logits_, logits_rows_ * sizes_.vocab);
  plan_whole();
  if (plan_) {
    parts.add(jobs_, static_cast<int64_t>(plan_->jobs.size()));
    parts.add(first_, static_cast<int64_t>(plan_->first.size()));
    const int64_t work = gpu::bind_decode(sizes_, *plan_, nullptr, args_);
    work_bytes_ = static_cast<uint64_t>(work) * sizeof(float);
    parts.add(work_, work);
    parts.add(next_, 2);
  }
  RABIT_ASSIGN(const gpu::DeviceInfo now, gpu::use_device(model_->info.index));
  if (parts.bytes() > now.free_bytes) {
    Error error = too_little_memory(what, parts.bytes(), now);
    error.message += "; ask for a smaller one";
    return error;
  }
  RABIT_ASSIGN(memory_, gpu::Memory::make(parts.bytes(), "a session"));
  parts.place(memory_);
  RABIT_ASSIGN(queue_, gpu::Queue::make());
  host_rows_ = 1;
  RABIT_ASSIGN(host_logits_, gpu::HostMemory::make(
                                 static_cast<uint64_t>(sizes_.vocab) * sizeof(float), "logits"));
  if (plan_) {
    RABIT_CHECK(prepare_whole());
  }
  return fill_turns();
}

/// cos and sin of every position's angles, in double as on the CPU.
Status GpuSession::fill_turns() {
  const int64_t d = sizes_.head_dim;
  std::vector<double> frequencies;
  for (int64_t i = 0; i < d / 2; ++i) {
    const double power = -2.0 * static_cast<double>(i) / static_cast<double>(d);
    frequencies.push_back(std::pow(static_cast<double>(model_->config.rope_theta), power));
  }
  constexpr int64_t kPart = 1 << 16;  // positions that the host holds at once
  std::vector<float> turns(static_cast<size_t>(std::min(capacity_, kPart) * d));
  for (int64_t first = 0; first < capacity_; first += kPart) {
    RABIT_CHECK(check_interrupt());
    const int64_t count = std::min(kPart, capacity_ - first);
    model_->pool->parallel_for(count, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t i = 0; i < d / 2; ++i) {
          const double angle = static_cast<double>(first + p) * frequencies[static_cast<size_t>(i)];
          turns[static_cast<size_t>(p * d + 2 * i)] = static_cast<float>(std::cos(angle));
          turns[static_cast<size_t>(p * d + 2 * i + 1)] = static_cast<float>(std::sin(angle));
        }
      }
    });
    RABIT_CHECK(queue_.upload(turns_ + first * d, turns.data(),
                              static_cast<uint64_t>(count * d) * sizeof(float)));
  }
  return queue_.wait();
}

/// y (+)= W x of layers that share x, side by side in y. x: F16 (tokens, d_in); y: (tokens, sum of
/// d_out).
Status GpuSession::multiply(std::initializer_list<const gpu::Linear*> linears, const uint16_t* x,
                            int64_t tokens, float* y, bool add) {
  int64_t all = 0;
  bool packed = true;
  for (const gpu::Linear* linear : linears) {
    all += linear->d_out;
    packed = packed && is_packed(*linear);
  }
  const auto product = [&](const gpu::Linear& w, const uint16_t* weights, int64_t d_out,
                           int64_t stride, int64_t column) {
    return queue_.multiply({.w = weights,
                            .d_out = d_out,
                            .d_in = w.d_in,
                            .w_stride = stride,
                            .x = x,
                            .tokens = tokens,
                            .y = y + column,
                            .y_stride = all,
                            .add = add});
  };
  int64_t column = 0;
  for (const gpu::Linear* linear : linears) {
    const int64_t stride = is_packed(*linear) ? stride_of(*linear) : linear->d_in;
    uint16_t* const place = unpacked_ + (packed ? column * stride : 0);
    if (is_packed(*linear)) {
      RABIT_CHECK(gpu::unpack(*linear, place, stride, queue_.stream()));
    }
    if (!packed) {
      RABIT_CHECK(product(
          *linear, is_packed(*linear) ? place : static_cast<const uint16_t*>(linear->weights),
          linear->d_out, stride, column));
    }
    column += linear->d_out;
  }
  // Unpacked matrices lie below each other, as one.
  const gpu::Linear& first = **linears.begin();
  return packed ? product(first, unpacked_, all, stride_of(first), 0) : Status();
}

Status GpuSession::run_block(int64_t layer, int64_t tokens) {
  const gpu::Block& block = model_->blocks[static_cast<size_t>(layer)];
  const gpu::Stream stream = queue_.stream();
  const int64_t d = sizes_.d_model, plane = layer * d_kv() * capacity_;
  const gpu::CacheView cache = {
      .k = keys_ + plane, .v = values_ + plane, .capacity = capacity_, .first_position = position_};
  RABIT_CHECK(gpu::rms_norm(x_, block.attn_norm, tokens, d, sizes_.norm_epsilon, h_, stream));
  RABIT_CHECK(multiply({&block.q, &block.k, &block.v}, h_, tokens, qkv_));
  RABIT_CHECK(gpu::rope(sizes_, qkv_, tokens, turns_, cache, q_, stream));
  RABIT_CHECK(gpu::attention(sizes_, q_, tokens, cache, attended_, stream));
  RABIT_CHECK(multiply({&block.output}, attended_, tokens, x_, true));
  RABIT_CHECK(gpu::rms_norm(x_, block.ffn_norm, tokens, d, sizes_.norm_epsilon, h_, stream));
  RABIT_CHECK(multiply({&block.gate, &block.up}, h_, tokens, gate_up_));
  RABIT_CHECK(gpu::swiglu(gate_up_, tokens, sizes_.d_ff, hidden_, stream));
  return multiply({&block.down}, hidden_, tokens, x_, true);
}

/// Queues a chunk through all blocks; x_ then holds the stream after the last. The position is not
/// moved.
Status GpuSession::run_blocks(std::span<const int32_t> tokens) {
  const auto count = static_cast<int64_t>(tokens.size());
  RABIT_CHECK(gpu::activate(model_->info.index));
  RABIT_CHECK(queue_.upload(tokens_, tokens.data(), tokens.size_bytes()));
  RABIT_CHECK(gpu::embed(model_->embedding, tokens_, count, sizes_.d_model, x_, queue_.stream()));
  for (int64_t layer = 0; layer < sizes_.layers; ++layer) {
    RABIT_CHECK(check_interrupt());
    RABIT_CHECK(run_block(layer, count));
  }
  return {};
}

/// A token through all blocks and the head as one kernel, its logits on the host when this returns:
/// one copy there, one back, one wait. The position is not moved. false: nothing was done.
Result<bool> GpuSession::run_whole(int32_t token) {
  if (!plan_) {
    return false;
  }
  RABIT_CHECK(check_interrupt());
  RABIT_CHECK(gpu::activate(model_->info.index));
  auto* const next = host_next_.as<int32_t>();
  next[0] = token;
  next[1] = static_cast<int32_t>(position_);
  RABIT_CHECK(queue_.upload(next_, host_next_, 2 * sizeof(int32_t)));
  if (!gpu::start_decode(args_, *plan_, queue_)) {
    plan_.reset();  // this session does without
    return false;
  }
  ++args_.pass;
  RABIT_CHECK(
      queue_.download(host_logits_, logits_, static_cast<uint64_t>(sizes_.vocab) * sizeof(float)));
  RABIT_CHECK(queue_.wait());
  ++whole_tokens_;
  return true;
}

/// Logits of tokens [first, first + tokens) of the chunk, on the host when this returns.
Status GpuSession::head(int64_t first, int64_t tokens) {
  const int64_t d = sizes_.d_model;
  RABIT_CHECK(gpu::rms_norm(x_ + first * d, model_->output_norm, tokens, d, sizes_.norm_epsilon, h_,
                            queue_.stream()));
  RABIT_CHECK(multiply({&model_->head}, h_, tokens, logits_));
  RABIT_CHECK(queue_.download(host_logits_, logits_,
                              static_cast<uint64_t>(tokens * sizes_.vocab) * sizeof(float)));
  return queue_.wait();
}

Status GpuSession::forward_all(std::span<const int32_t> tokens, const LogitSink& sink) {
  RABIT_CHECK(check_input(tokens, position_, capacity_, sizes_.vocab));
  const auto total = static_cast<int64_t>(tokens.size());
  if (const int64_t rows = std::min(total, logits_rows_); rows > host_rows_) {
    RABIT_CHECK(gpu::activate(model_->info.index));
    RABIT_ASSIGN(host_logits_,
                 gpu::HostMemory::make(static_cast<uint64_t>(rows * sizes_.vocab) * sizeof(float),
                                       "logits"));
    host_rows_ = rows;
  }
  const int64_t start = position_;
  const auto run = [&]() -> Status {
    if (total == 1) {
      RABIT_ASSIGN(const bool done, run_whole(tokens[0]));
      if (done) {
        sink(0, 1, host_logits_.as<float>());
        ++position_;
        return {};
      }
    }
    for (int64_t first = 0; first < total; first += chunk_) {
      const int64_t count = std::min(chunk_, total - first);
      RABIT_CHECK(run_blocks(tokens.subspan(first, count)));
      for (int64_t t = 0; t < count; t += host_rows_) {
        const int64_t rows = std::min(host_rows_, count - t);
        RABIT_CHECK(head(t, rows));
        sink(first + t, rows, host_logits_.as<float>());
      }
      position_ += count;
    }
    return {};
  };
  const Status status = run();
  position_ = status ? position_ : start;
  return status;
}

Result<std::span<const float>> GpuSession::forward(std::span<const int32_t> tokens) {
  RABIT_CHECK(check_input(tokens, position_, capacity_, sizes_.vocab));
  const auto total = static_cast<int64_t>(tokens.size());
  const int64_t start = position_;
  const auto run = [&]() -> Status {
    if (total == 1) {
      RABIT_ASSIGN(const bool done, run_whole(tokens[0]));
      if (done) {
        ++position_;
        return {};
      }
    }
    int64_t count = 0;
    for (int64_t first = 0; first < total; first += count) {
      count = std::min(chunk_, total - first);
      RABIT_CHECK(run_blocks(tokens.subspan(first, count)));
      position_ += count;
    }
    return head(count - 1, 1);
  };
  if (const Status status = run(); !status) {
    position_ = start;
    return status.error();
  }
  return std::span<const float>(host_logits_.as<float>(), static_cast<size_t>(sizes_.vocab));
}

}  // namespace

Result<std::unique_ptr<Session>> create_gpu_session(std::shared_ptr<Model> model,
                                                    int64_t capacity) {
  auto on_gpu = std::dynamic_pointer_cast<GpuModel>(std::move(model));
  if (on_gpu == nullptr) {
    return Error{"the model is not on a GPU"};
  }
  if (capacity < 1) {
    return Error{"a context needs at least one position, not " + std::to_string(capacity)};
  }
  auto session = std::make_unique<GpuSession>(std::move(on_gpu), capacity);
  RABIT_CHECK(session->allocate());
  return std::unique_ptr<Session>(std::move(session));
}

int64_t whole_tokens(const Session& session) {
  const auto* on_gpu = dynamic_cast<const GpuSession*>(&session);
  return on_gpu == nullptr ? 0 : on_gpu->whole_tokens();
}

}  // namespace rabit
