// A GPU as the engine uses it: memory, a queue of work, and the operations of a decoder on many
// tokens. No header of CUDA. Pointers named so are of the device; operations only queue their work,
// and what fails then is told by a later call, at the latest by Queue::wait(). All work on the
// device that use_device() chose in the calling thread. Activations that products read are F16, and
// what is too large for it becomes the largest F16; the residual stream is F32.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "kernels/api/gpu_decode.h"
#include "kernels/api/gpu_weights.h"
#include "kernels/api/kernels.h"
#include "rabit/result.h"

struct CUstream_st;

namespace rabit::gpu {

/// A cudaStream_t.
using Stream = CUstream_st*;

struct DeviceInfo {
  int32_t index = 0;
  std::string name;              // "NVIDIA H200"
  int32_t major = 0, minor = 0;  // compute capability
  int32_t multiprocessors = 0;
  bool cooperative = false;  // blocks of a kernel may wait for each other
  int64_t block_bytes = 0;   // of shared memory that one block may have
  bool warpgroups = false;   // packed products by those of warpgroups: 9.0
  uint64_t total_bytes = 0, free_bytes = 0;

  std::string label() const { return "cuda:" + std::to_string(index) + " (" + name + ")"; }
};

/// All devices; free_bytes of none. Errors: no driver, or one too old; no device.
Result<std::vector<DeviceInfo>> devices();

/// Makes this the device of the calling thread. Errors: no such device, one that no code of this
/// build fits, by name.
Result<DeviceInfo> use_device(int32_t index);

/// The same, in no time, for a device that was used before.
Status activate(int32_t index);

/// Memory of the device, 256-byte aligned, not initialised.
class Memory {
 public:
  Memory() = default;
  /// Errors: memory that cannot be had, with how much was asked for and is free.
  static Result<Memory> make(uint64_t bytes, const char* what);
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }
  uint64_t size() const { return bytes_; }

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> data_;
  uint64_t bytes_ = 0;
};

/// Memory of the host that the device copies to without a detour.
class HostMemory {
 public:
  HostMemory() = default;
  static Result<HostMemory> make(uint64_t bytes, const char* what);
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> data_;
};

/// Work that was recorded to be queued again as one.
class Recording {
 public:
  Recording() = default;

 private:
  friend class Queue;
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> graph_;
};

/// Work in the order in which it was queued, with what products need beside.
class Queue {
 public:
  /// Errors: memory that cannot be had.
  static Result<Queue> make();

  Stream stream() const;
  /// From ordinary memory of the host, which may change again when this returns.
  Status upload(void* to, const void* from, uint64_t bytes) const;
  /// The memory may change again after wait().
  Status upload(void* to, const HostMemory& from, uint64_t bytes) const;
  /// Done after wait().
  Status download(HostMemory& to, const void* from, uint64_t bytes) const;
  /// Zeros.
  Status clear(void* at, uint64_t bytes) const;
  /// Until all is done. Errors: what went wrong on the device since the last wait.
  Status wait() const;

  /// y[t, r] (+)= sum_c w[r, c] x[t, c]. w: F16 (d_out, d_in), rows `w_stride` elements apart; x:
  /// F16 (tokens, d_in); y: F32, rows `y_stride` apart. Sums are of F32; `add`: onto what is there.
  struct Product {
    const uint16_t* w = nullptr;
    int64_t d_out = 0, d_in = 0, w_stride = 0;
    const uint16_t* x = nullptr;
    int64_t tokens = 0;
    float* y = nullptr;
    int64_t y_stride = 0;
    bool add = false;
  };
  Status multiply(const Product& product) const;

  /// What `work` queues, which it must have queued before; it is not done now. Pointers and numbers
  /// stay as they are, what pointers lead to is read when it is replayed. Errors: those of `work`,
  /// what cannot be recorded.
  Result<Recording> record(const std::function<Status()>& work) const;
  Status replay(const Recording& recording) const;

 private:
  struct State;
  struct Free {
    void operator()(State* state) const;
  };
  std::unique_ptr<State, Free> state_;
};

/// Starts launch_decode() on the queue; false: the GPU does not take it now, say because others use
/// it, too, and nothing was queued.
bool start_decode(const DecodeArgs& args, const DecodePlan& plan, const Queue& queue);

/// 32-bit words of the signs of a layer in tiles.
int64_t sign_words(int64_t d_out, int64_t d_in, int64_t paths);

/// Signs as a file has them, (k, d_out, ceil(d_in/32)) words, into tiles (gpu_weights.h). Bits
/// beyond d_in become zero.
Status tile_signs(int64_t d_out, int64_t d_in, int64_t paths, const uint32_t* rows, uint32_t* tiles,
                  Stream stream);

/// W = sum_p g_p h_p B_p of packed weights as F16 (d_out, stride), stride a multiple of 8, at least
/// d_in; zeros beyond d_in. Products and sums are rounded to F32 each, in the order of the paths.
Status unpack(const Linear& w, uint16_t* out, int64_t stride, Stream stream);

/// Blocks of Q8_0 or Q4_0, `count` values, as F16.
Status unpack_blocks(WeightFormat format, const void* blocks, int64_t count, uint16_t* out,
                     Stream stream);

/// Blocks of Q8_0 or Q4_0, `count` values of rows of a multiple of kQ8Columns, as Format::kQ8_0.
Status arrange_blocks(WeightFormat format, const void* blocks, int64_t count, int8_t* bytes,
                      uint16_t* scales, Stream stream);

/// Rows [first, first + rows) of a matrix of Format::kQ8_0 as F16 (rows, d_in).
Status widen(const Linear& w, int64_t first, int64_t rows, uint16_t* out, Stream stream);

/// Tokens that multiply_packed() takes at most where a GPU has no products of warpgroups.
inline constexpr int64_t kFewTokens = 64;

/// Device memory that packed products need beside their operands.
struct PackedNeeds {
  int64_t floats = 0, counters = 0;
};
struct PackedWork {
  float* partial = nullptr;
  uint32_t* counters = nullptr;  // zero
};

/// Whether multiply_packed() can: packed layers of one width, a multiple of 8, and number of paths;
/// up to kFewTokens tokens also layers of bytes of one width.
bool takes_packed(std::initializer_list<const Linear*> linears, int64_t tokens,
                  const DeviceInfo& device);
/// For any number of tokens.
PackedNeeds packed_needs(std::initializer_list<const Linear*> linears, const DeviceInfo& device);

/// y (+)= W x of layers that share x, side by side in y, (tokens, sum of d_out), weights read as
/// they lie; x: F16 (tokens, d_in), 16-byte aligned. A row's weights are sums of its paths in F16,
/// in units of its largest scale, or a byte times its scale in F16; sums over columns are of F32,
/// in one order.
Status multiply_packed(std::initializer_list<const Linear*> linears, const uint16_t* x,
                       int64_t tokens, float* y, bool add, const PackedWork& work,
                       const DeviceInfo& device, Stream stream);

/// x[t, :] = table[ids[t], :]. table: F16 (vocab, d); ids: (tokens); x: (tokens, d).
Status embed(const uint16_t* table, const int32_t* ids, int64_t tokens, int64_t d, float* x,
             Stream stream);

/// y[t, :] = x[t, :] / sqrt(mean(x[t, :]^2) + epsilon) * weight. x: (tokens, d); y: F16 (tokens,
/// d).
Status rms_norm(const float* x, const float* weight, int64_t tokens, int64_t d, float epsilon,
                uint16_t* y, Stream stream);

/// A KV cache's part of one layer, and where new positions go.
struct CacheView {
  CacheRows k;  // (kv_heads, capacity, head_dim)
  CacheRows v;  // as k
  int64_t capacity = 0;
  int64_t first_position = 0;
};

/// Queries and keys turned by their positions, as KernelTable::rope has it, keys and values into
/// the cache. qkv: (tokens, (heads + 2 kv_heads) * head_dim), queries, keys, values; turns:
/// (capacity, head_dim/2) pairs (cos, sin); q: F16 (tokens, heads, head_dim).
Status rope(const Sizes& sizes, const float* qkv, int64_t tokens, const float* turns,
            const CacheView& cache, uint16_t* q, Stream stream);

/// Where a token's key and value go, and what turns it.
struct Place {
  CacheRows k;                  // (layers, kv_heads, capacity, head_dim); of one layer in kernels
  CacheRows v;                  // as k
  const float* turn = nullptr;  // (head_dim/2) pairs (cos, sin) of the position
  int64_t capacity = 0;
  int64_t position = 0;
};

/// As rope(), each token of another sequence. places: (tokens), in device memory.
Status rope_each(const Sizes& sizes, int64_t layer, const float* qkv, int64_t tokens,
                 const Place* places, uint16_t* q, Stream stream);

/// As attention(), each token of another sequence, over all positions up to its own, all caches of
/// one type (`bytes`: with scales). head_dim: a multiple of 8. partial: each_work() floats;
/// counters: (tokens, kv_heads) zeros, which they are again after it.
Status attention_each(const Sizes& sizes, int64_t layer, const uint16_t* q, int64_t tokens,
                      const Place* places, bool bytes, int32_t multiprocessors, float* partial,
                      uint32_t* counters, uint16_t* out, Stream stream);
int64_t each_work(const Sizes& sizes, int64_t most_tokens, int32_t multiprocessors);

/// Causal attention of q, F16 (tokens, heads, head_dim), over the cache up to each token's
/// position. out: F16, as q.
Status attention(const Sizes& sizes, const uint16_t* q, int64_t tokens, const CacheView& cache,
                 uint16_t* out, Stream stream);

/// out[t, i] = silu(gate[t, i]) * up[t, i]. gate_up: (tokens, 2 * d), gate before up; out: F16
/// (tokens, d).
Status swiglu(const float* gate_up, int64_t tokens, int64_t d, uint16_t* out, Stream stream);

/// Tokens of which likeliest() finds some, and how many it finds at most.
inline constexpr int32_t kSlice = 4096, kMostLikeliest = 256;

/// Of each slice of kSlice tokens the `count` likeliest, in no order: their logits and ids,
/// (slices, count); of equals the first. NaN and -infinity are not among them: where there are too
/// few, the rest is -infinity, of token -1. logits: (vocab).
Status likeliest(const float* logits, int64_t vocab, int32_t count, float* out, int32_t* tokens,
                 Stream stream);

/// Bytes a second at which `memory` of some size is read once.
Result<double> read_speed(const Queue& queue, const Memory& memory);

}  // namespace rabit::gpu
