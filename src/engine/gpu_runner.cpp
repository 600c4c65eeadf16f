// The forward pass on a GPU. A chunk of tokens goes through all blocks and leaves its keys and
// values in the cache. The residual stream is F32, products read F16. Packed weights are read as
// they lie, or, where the GPU has no kernel for so many tokens, become an F16 matrix for the time
// of a product. A call of one token, as when text is generated, is one kernel
// (kernels/api/gpu_decode.h), where the sizes and the GPU allow it; tokens of several sequences go
// together. All device memory is taken beforehand.
#include "engine/gpu_runner.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/interrupt.h"

namespace rabit {
namespace {

constexpr int64_t kChunk = 4096;        // tokens that go through the blocks together
constexpr int64_t kLeastChunk = 256;    // where memory is short
constexpr int64_t kWidened = 16 << 20;  // values of bytes that become F16 at a time
constexpr int32_t kWholeMajor = 8;      // compute capability that whole tokens need
static_assert(GpuRunner::kLogitsTogether >= GpuRunner::kEach);

/// Rows of an unpacked matrix lie this many elements apart.
int64_t stride_of(const gpu::Linear& w) { return (int64_t{w.d_in} + 7) / 8 * 8; }

/// Of bytes, that become F16 at a time.
int64_t rows_at_a_time(const gpu::Linear& w) {
  return std::clamp<int64_t>(kWidened / w.d_in, 1, w.d_out);
}

bool is_packed(const gpu::Linear& w) { return w.format == gpu::Format::kResidualBinary; }

}  // namespace

/// The plan of whole tokens, if there can be one, once.
void GpuRunner::plan_whole() {
  const gpu::DeviceInfo& info = model_.info;
  if (planned_ || info.major < kWholeMajor || !info.cooperative) {
    return;
  }
  planned_ = true;
  if (auto plan = gpu::plan_decode(sizes_, model_.blocks, model_.head, model_.output_norm,
                                   info.multiprocessors, 1, info.block_bytes, {})) {
    plan_ = std::move(*plan);
  }
}

Status GpuRunner::start() {
  RABIT_CHECK(gpu::activate(model_.info.index));
  RABIT_ASSIGN(queue_, gpu::Queue::make());
  return {};
}

Status GpuRunner::prepare(int64_t tokens) {
  RABIT_CHECK(gpu::activate(model_.info.index));
  const int64_t wanted = std::min(tokens, kChunk), before = chunk_;
  if (wanted <= before) {
    return {};
  }
  plan_whole();
  recordings_.clear();
  memory_ = {};
  chunk_ = 0;
  // What there was before fits again, for the sessions that have it.
  const int64_t least = before == 0 ? kLeastChunk : std::min(before, kLeastChunk);
  for (int64_t chunk = wanted;; chunk = (chunk + 1) / 2) {
    rows_ = std::max(chunk, kEach);
    if (const Status status = allocate(); status || chunk <= least) {
      RABIT_CHECK(status);
      chunk_ = chunk;
      break;
    }
  }
  return {};
}

Status GpuRunner::allocate() {
  int64_t unpacked = 0;
  gpu::PackedNeeds needs;
  const auto grow = [&](std::initializer_list<const gpu::Linear*> linears) {
    int64_t elements = 0;
    for (const gpu::Linear* linear : linears) {
      elements += is_packed(*linear) ? linear->d_out * stride_of(*linear) : 0;
      if (linear->format == gpu::Format::kQ8_0) {
        unpacked = std::max(unpacked, rows_at_a_time(*linear) * linear->d_in);
      }
    }
    if (!gpu::takes_packed(linears, rows_, model_.info)) {
      unpacked = std::max(unpacked, elements);
    }
    if (gpu::takes_packed(linears, 1, model_.info)) {
      const gpu::PackedNeeds own = gpu::packed_needs(linears, model_.info);
      needs.floats = std::max(needs.floats, own.floats);
      needs.counters = std::max(needs.counters, own.counters);
    }
  };
  for (const gpu::Block& block : model_.blocks) {
    grow({&block.q, &block.k, &block.v});
    grow({&block.output});
    grow({&block.gate, &block.up});
    grow({&block.down});
  }
  grow({&model_.head});
  DeviceParts parts;
  parts.add(tokens_, rows_);
  parts.add(x_, rows_ * sizes_.d_model);
  parts.add(h_, rows_ * sizes_.d_model);
  parts.add(qkv_, rows_ * (d_q() + 2 * d_kv()));
  parts.add(q_, rows_ * d_q());
  parts.add(attended_, rows_ * d_q());
  parts.add(gate_up_, rows_ * 2 * sizes_.d_ff);
  parts.add(hidden_, rows_ * sizes_.d_ff);
  parts.add(unpacked_, unpacked);
  parts.add(logits_, kLogitsTogether * sizes_.vocab);
  parts.add(likely_, 2 * slices() * gpu::kMostLikeliest);
  parts.add(packed_.partial, needs.floats);
  parts.add(packed_.counters, needs.counters);
  parts.add(places_, kEach);
  parts.add(partial_, gpu::each_work(sizes_, kEach, model_.info.multiprocessors));
  parts.add(counters_, kEach * sizes_.kv_heads);
  if (plan_) {
    parts.add(jobs_, static_cast<int64_t>(plan_->jobs.size()));
    parts.add(first_, static_cast<int64_t>(plan_->first.size()));
    const int64_t work = gpu::bind_decode(sizes_, *plan_, nullptr, args_);
    work_bytes_ = static_cast<uint64_t>(work) * sizeof(float);
    parts.add(work_, work);
    parts.add(next_, 2);
  }
  RABIT_ASSIGN(const gpu::DeviceInfo now, gpu::use_device(model_.info.index));
  if (parts.bytes() > now.free_bytes) {
    return too_little_memory("a pass of " + std::to_string(rows_) + " tokens", parts.bytes(), now);
  }
  RABIT_ASSIGN(memory_, gpu::Memory::make(parts.bytes(), "a pass"));
  parts.place(memory_);
  RABIT_CHECK(
      queue_->clear(packed_.counters, static_cast<uint64_t>(needs.counters) * sizeof(uint32_t)));
  RABIT_CHECK(
      queue_->clear(counters_, static_cast<uint64_t>(kEach * sizes_.kv_heads) * sizeof(uint32_t)));
  RABIT_ASSIGN(host_likely_,
               gpu::HostMemory::make(
                   static_cast<uint64_t>(2 * slices() * gpu::kMostLikeliest) * sizeof(float),
                   "the likeliest tokens"));
  RABIT_ASSIGN(host_places_,
               gpu::HostMemory::make(kEach * sizeof(gpu::Place), "several sequences"));
  if (plan_) {
    gpu::bind_decode(sizes_, *plan_, work_, args_);
    args_.pass = 0;
    args_.jobs = jobs_;
    args_.first = first_;
    args_.output_norm = model_.output_norm;
    args_.embedding = model_.embedding;
    args_.tokens = next_;
    args_.positions = next_ + 1;
    args_.logits = logits_;
    RABIT_CHECK(queue_->clear(work_, work_bytes_));
    RABIT_CHECK(queue_->upload(jobs_, plan_->jobs.data(), plan_->jobs.size() * sizeof(gpu::Job)));
    RABIT_CHECK(queue_->upload(first_, plan_->first.data(), plan_->first.size() * sizeof(int32_t)));
    RABIT_ASSIGN(host_next_, gpu::HostMemory::make(2 * sizeof(int32_t), "a token"));
  }
  return queue_->wait();
}

Result<GpuCache> GpuRunner::make_cache(int64_t capacity) {
  RABIT_CHECK(gpu::activate(model_.info.index));
  constexpr int64_t kMostPositions = int64_t{1} << 30;  // no product of sizes overflows below
  const std::string what = "a context of " + std::to_string(capacity) + " positions";
  if (capacity > kMostPositions) {
    return Error{what + " does not fit a GPU's memory; ask for a smaller one"};
  }
  GpuCache cache;
  cache.capacity = capacity;
  DeviceParts parts;
  for (gpu::CacheRows* cached : {&cache.keys, &cache.values}) {
    const int64_t elements = sizes_.layers * d_kv() * capacity;
    parts.add_bytes(cached->rows, static_cast<uint64_t>(elements) * (model_.byte_cache ? 1 : 2));
    if (model_.byte_cache) {
      parts.add(cached->scales, elements / 32);
    }
  }
  parts.add(cache.turns, capacity * sizes_.head_dim);
  RABIT_ASSIGN(const gpu::DeviceInfo now, gpu::use_device(model_.info.index));
  if (parts.bytes() > now.free_bytes) {
    Error error = too_little_memory(what, parts.bytes(), now);
    error.message += "; ask for a smaller one";
    return error;
  }
  RABIT_ASSIGN(cache.memory, gpu::Memory::make(parts.bytes(), "a sequence"));
  parts.place(cache.memory);
  RABIT_CHECK(fill_turns(cache));
  return cache;
}

/// cos and sin of every position's angles, in double as on the CPU.
Status GpuRunner::fill_turns(const GpuCache& cache) {
  const int64_t d = sizes_.head_dim;
  std::vector<double> frequencies;
  for (int64_t i = 0; i < d / 2; ++i) {
    const double power = -2.0 * static_cast<double>(i) / static_cast<double>(d);
    frequencies.push_back(std::pow(static_cast<double>(model_.config.rope_theta), power));
  }
  constexpr int64_t kPart = 1 << 16;  // positions that the host holds at once
  std::vector<float> turns(static_cast<size_t>(std::min(cache.capacity, kPart) * d));
  for (int64_t first = 0; first < cache.capacity; first += kPart) {
    RABIT_CHECK(check_interrupt());
    const int64_t count = std::min(kPart, cache.capacity - first);
    model_.pool->parallel_for(count, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t i = 0; i < d / 2; ++i) {
          const double angle = static_cast<double>(first + p) * frequencies[static_cast<size_t>(i)];
          turns[static_cast<size_t>(p * d + 2 * i)] = static_cast<float>(std::cos(angle));
          turns[static_cast<size_t>(p * d + 2 * i + 1)] = static_cast<float>(std::sin(angle));
        }
      }
    });
    RABIT_CHECK(queue_->upload(cache.turns + first * d, turns.data(),
                               static_cast<uint64_t>(count * d) * sizeof(float)));
  }
  return queue_->wait();
}

/// y (+)= W x of layers that share x, side by side in y. x: F16 (tokens, d_in); y: (tokens, sum of
/// d_out).
Status GpuRunner::multiply(std::initializer_list<const gpu::Linear*> linears, const uint16_t* x,
                           int64_t tokens, float* y, bool add) {
  int64_t all = 0;
  bool packed = true;
  for (const gpu::Linear* linear : linears) {
    all += linear->d_out;
    packed = packed && is_packed(*linear);
  }
  if (gpu::takes_packed(linears, tokens, model_.info)) {
    return gpu::multiply_packed(linears, x, tokens, y, add, packed_, model_.info, queue_->stream());
  }
  const auto product = [&](const gpu::Linear& w, const uint16_t* weights, int64_t d_out,
                           int64_t stride, int64_t column) {
    return queue_->multiply({.w = weights,
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
    if (linear->format == gpu::Format::kQ8_0) {
      const int64_t most = rows_at_a_time(*linear);
      for (int64_t first = 0; first < linear->d_out; first += most) {
        const int64_t rows = std::min(most, linear->d_out - first);
        RABIT_CHECK(gpu::widen(*linear, first, rows, unpacked_, queue_->stream()));
        RABIT_CHECK(product(*linear, unpacked_, rows, linear->d_in, column + first));
      }
      column += linear->d_out;
      continue;
    }
    const int64_t stride = is_packed(*linear) ? stride_of(*linear) : linear->d_in;
    uint16_t* const place = unpacked_ + (packed ? column * stride : 0);
    if (is_packed(*linear)) {
      RABIT_CHECK(gpu::unpack(*linear, place, stride, queue_->stream()));
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

/// attend(): from qkv_ to attended_, with keys and values to where they belong.
template <typename Attend>
Status GpuRunner::run_block(int64_t layer, int64_t tokens, const Attend& attend) {
  const gpu::Block& block = model_.blocks[static_cast<size_t>(layer)];
  const gpu::Stream stream = queue_->stream();
  const int64_t d = sizes_.d_model;
  RABIT_CHECK(gpu::rms_norm(x_, block.attn_norm, tokens, d, sizes_.norm_epsilon, h_, stream));
  RABIT_CHECK(multiply({&block.q, &block.k, &block.v}, h_, tokens, qkv_));
  RABIT_CHECK(attend());
  RABIT_CHECK(multiply({&block.output}, attended_, tokens, x_, true));
  RABIT_CHECK(gpu::rms_norm(x_, block.ffn_norm, tokens, d, sizes_.norm_epsilon, h_, stream));
  RABIT_CHECK(multiply({&block.gate, &block.up}, h_, tokens, gate_up_));
  RABIT_CHECK(gpu::swiglu(gate_up_, tokens, sizes_.d_ff, hidden_, stream));
  return multiply({&block.down}, hidden_, tokens, x_, true);
}

Status GpuRunner::begin() const {
  if (chunk_ == 0) {
    return Error{"the GPU has no memory left for a pass"};
  }
  RABIT_CHECK(check_interrupt());
  return gpu::activate(model_.info.index);
}

Status GpuRunner::run_chunk(const GpuCache& cache, std::span<const int32_t> tokens) {
  RABIT_CHECK(begin());
  const auto count = static_cast<int64_t>(tokens.size());
  const gpu::Stream stream = queue_->stream();
  RABIT_CHECK(queue_->upload(tokens_, tokens.data(), tokens.size_bytes()));
  RABIT_CHECK(gpu::embed(model_.embedding, tokens_, count, sizes_.d_model, x_, stream));
  for (int64_t layer = 0; layer < sizes_.layers; ++layer) {
    RABIT_CHECK(check_interrupt());
    RABIT_CHECK(run_block(layer, count, [&]() -> Status {
      const int64_t plane = layer * d_kv() * cache.capacity;
      const gpu::CacheView view = {.k = cache.keys.from(plane),
                                   .v = cache.values.from(plane),
                                   .capacity = cache.capacity,
                                   .first_position = cache.position};
      RABIT_CHECK(gpu::rope(sizes_, qkv_, count, cache.turns, view, q_, stream));
      return gpu::attention(sizes_, q_, count, view, attended_, stream);
    }));
  }
  return {};
}

Result<bool> GpuRunner::run_whole(const GpuCache& cache, int32_t token) {
  if (!plan_) {
    return false;
  }
  RABIT_CHECK(begin());
  auto* const next = host_next_.as<int32_t>();
  next[0] = token;
  next[1] = static_cast<int32_t>(cache.position);
  RABIT_CHECK(queue_->upload(next_, host_next_, 2 * sizeof(int32_t)));
  args_.cos_sin = cache.turns;
  args_.keys = cache.keys;
  args_.values = cache.values;
  args_.sequence_stride = int64_t{sizes_.layers} * d_kv() * cache.capacity;
  args_.capacity = static_cast<int32_t>(cache.capacity);
  if (!gpu::start_decode(args_, *plan_, *queue_)) {
    plan_.reset();  // from now on without
    return false;
  }
  ++args_.pass;
  return true;
}

Status GpuRunner::run_head(int64_t first, int64_t tokens) {
  const int64_t d = sizes_.d_model;
  RABIT_CHECK(gpu::rms_norm(x_ + first * d, model_.output_norm, tokens, d, sizes_.norm_epsilon, h_,
                            queue_->stream()));
  return multiply({&model_.head}, h_, tokens, logits_);
}

Result<const float*> GpuRunner::logits(int64_t tokens) {
  if (tokens > host_rows_) {
    RABIT_ASSIGN(host_logits_,
                 gpu::HostMemory::make(static_cast<uint64_t>(tokens * sizes_.vocab) * sizeof(float),
                                       "logits"));
    host_rows_ = tokens;
  }
  RABIT_CHECK(queue_->download(host_logits_, logits_,
                               static_cast<uint64_t>(tokens * sizes_.vocab) * sizeof(float)));
  RABIT_CHECK(queue_->wait());
  return host_logits_.as<const float>();
}

Result<int32_t> GpuRunner::draw(Sampler& sampler) {
  const int64_t count = sampler.deciding(), likely = slices() * count;
  if (count == 0 || count > gpu::kMostLikeliest || likely >= sizes_.vocab) {
    RABIT_ASSIGN(const float* const all, logits(1));
    return sampler.sample(std::span(all, static_cast<size_t>(sizes_.vocab)));
  }
  auto* const tokens = reinterpret_cast<int32_t*>(likely_ + likely);
  RABIT_CHECK(gpu::likeliest(logits_, sizes_.vocab, static_cast<int32_t>(count), likely_, tokens,
                             queue_->stream()));
  constexpr uint64_t kBytes = sizeof(float) + sizeof(int32_t);
  RABIT_CHECK(queue_->download(host_likely_, likely_, static_cast<uint64_t>(likely) * kBytes));
  RABIT_CHECK(queue_->wait());
  const auto* const host = host_likely_.as<const float>();
  const auto each = static_cast<size_t>(likely);
  return sampler.sample({host, each}, {reinterpret_cast<const int32_t*>(host + each), each});
}

size_t GpuRunner::alone() const {
  if (sizes_.head_dim % 8 != 0) {  // which attention of several sequences does not take
    return std::numeric_limits<size_t>::max();
  }
  // Measured, see docs/results/cuda.md: two whole tokens take less than one pass of a few tokens.
  return plan_ && is_packed(model_.blocks.front().q) ? 2 : 1;
}

/// Queues a token of each sequence that places_ and tokens_ name, embedding to logits.
Status GpuRunner::queue_each(int64_t tokens) {
  const gpu::Stream stream = queue_->stream();
  RABIT_CHECK(gpu::embed(model_.embedding, tokens_, tokens, sizes_.d_model, x_, stream));
  for (int64_t layer = 0; layer < sizes_.layers; ++layer) {
    RABIT_CHECK(run_block(layer, tokens, [&]() -> Status {
      RABIT_CHECK(gpu::rope_each(sizes_, layer, qkv_, tokens, places_, q_, stream));
      return gpu::attention_each(sizes_, layer, q_, tokens, places_, model_.byte_cache,
                                 model_.info.multiprocessors, partial_, counters_, attended_,
                                 stream);
    }));
  }
  return run_head(0, tokens);
}

Status GpuRunner::run_each(std::span<const GpuCache* const> caches,
                           std::span<const int32_t> tokens) {
  RABIT_CHECK(begin());
  const auto count = static_cast<int64_t>(caches.size());
  auto* const places = host_places_.as<gpu::Place>();
  for (int64_t i = 0; i < count; ++i) {
    const GpuCache& cache = *caches[static_cast<size_t>(i)];
    places[i] = {.k = cache.keys,
                 .v = cache.values,
                 .turn = cache.turns + cache.position * sizes_.head_dim,
                 .capacity = cache.capacity,
                 .position = cache.position};
  }
  RABIT_CHECK(
      queue_->upload(places_, host_places_, static_cast<uint64_t>(count) * sizeof(gpu::Place)));
  RABIT_CHECK(queue_->upload(tokens_, tokens.data(), tokens.size_bytes()));
  // The first time with so many, the work is recorded for the next.
  if (const auto found = recordings_.find(count); found != recordings_.end()) {
    return queue_->replay(found->second);
  }
  RABIT_CHECK(queue_each(count));
  RABIT_ASSIGN(recordings_[count], queue_->record([this, count] { return queue_each(count); }));
  return {};
}

}  // namespace rabit
