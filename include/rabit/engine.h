// The runtime: load a GGUF model, packed or ordinary, and run it on the CPU or on a GPU. Token ids
// in, logits out; text is the tokenizer's business. No torch, no CUDA, no intrinsics in this
// header.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "rabit/result.h"

namespace rabit {

struct EngineOptions {
  int threads = 0;  ///< 0: one for each core that the process may use; at most 1024
  /// Dense weights and the KV cache in F32 instead of F16: logits at float accuracy (relative error
  /// below 1e-4) for twice the memory, or more where the file's are smaller than F16, and sums of
  /// floats in packed layers, which take far longer. F16 moves logits by 1e-3 of their norm on
  /// average, up to 1e-2 at single positions.
  bool dense_as_f32 = false;
  std::string kernels;  ///< name of a kernel table, empty: the best that runs here
  /// The KV cache in blocks of 32 bytes and a scale (Q8_0) instead of F16: half the memory, and
  /// half of what a token reads of it. Not with dense_as_f32.
  bool cache_q8_0 = false;
  /// "" or "cpu"; "cuda" or "cuda:N": an NVIDIA GPU, the first or that of this number, in a build
  /// with CUDA. There dense weights and the KV cache are F16, and so is what products read, with
  /// sums in F32; the options above but `threads` are the CPU's alone.
  std::string device;
};

/// Tokens that go through a model on the CPU together at most; longer inputs are split inside. A
/// GPU takes more.
inline constexpr int64_t kMostTogether = 512;

class Sampler;

/// A model in memory with its thread pool. Sessions on one model must not run at the same time.
class Model {
 public:
  /// Errors: what the file reader refuses, an unknown architecture, a missing tensor, a tensor type
  /// that cannot be used where it stands, a weight or scale that is not finite (or, dense as F16,
  /// too large for it), an unknown kernel table, a bad number of threads or more than can be
  /// started, a cache of Q8_0 for heads that are not a multiple of 32 wide; a device that is not
  /// known, not there, too small, or not in this build.
  static Result<std::shared_ptr<Model>> load(const std::filesystem::path& path,
                                             const EngineOptions& options);
  /// Whether load() would find these kernels (see EngineOptions). Errors: an unknown kernel table.
  static Status check_kernels(const std::string& kernels);
  /// Whether a device may be called so, there or not. Errors: a name that none can have.
  static Status check_device(const std::string& device);
  virtual ~Model() = default;

  virtual int64_t vocab_size() const = 0;
  virtual int64_t context_length() const = 0;  ///< positions it was trained for
  virtual int threads() const = 0;             ///< of the host
  virtual bool on_gpu() const = 0;
  virtual std::string device() const = 0;     ///< "CPU", or the GPU's name
  virtual std::string kernels() const = 0;    ///< name of the kernel table in use
  virtual uint64_t weight_bytes() const = 0;  ///< bytes of weights read for one token
};

/// One sequence: its KV cache and position.
class Session {
 public:
  /// `capacity`: most positions it can hold; it may exceed the model's context_length, where
  /// quality falls off. Errors: capacity < 1, or memory that cannot be had.
  static Result<std::unique_ptr<Session>> create(std::shared_ptr<Model> model, int64_t capacity);
  virtual ~Session() = default;

  /// Called with logits of `count` consecutive positions of the input: (count, vocab).
  using LogitSink = std::function<void(int64_t first, int64_t count, const float* logits)>;

  /// Appends the tokens and hands on the logits after each. Long inputs are split inside. Errors:
  /// no tokens, an id outside the vocabulary, more positions than capacity, an interrupt of the
  /// program (base/interrupt.h) after which the sink may have seen some; nothing is appended.
  virtual Status forward_all(std::span<const int32_t> tokens, const LogitSink& sink) = 0;

  /// Appends the tokens and returns the logits after the last, valid until the next call of any
  /// session of the model. Errors as forward_all.
  virtual Result<std::span<const float>> forward(std::span<const int32_t> tokens) = 0;

  /// Appends the tokens and draws the one that follows: what sampler.sample() of forward() gives. A
  /// GPU finds the likeliest itself, so that no row of logits needs to leave it.
  virtual Result<int32_t> next(std::span<const int32_t> tokens, Sampler& sampler);

  /// Appends a token to each of several sessions of one model, all of them different, and returns
  /// their logits, (sessions, vocab), valid until the next call of any session of the model.
  /// Weights are read once for many sessions. Errors: as forward_all; sessions of several models,
  /// or one of them twice; nothing is appended then.
  static Result<std::span<const float>> forward_each(std::span<Session* const> sessions,
                                                     std::span<const int32_t> tokens);

  virtual int64_t position() const = 0;
  /// Forgets all positions from `position` on; nothing happens if there are none.
  virtual void truncate(int64_t position) = 0;

 protected:
  virtual const Model& model() const = 0;
  /// Errors: tokens that forward() would refuse.
  virtual Status check(std::span<const int32_t> tokens) const = 0;
  /// What a session does as the first of forward_each(), whose arguments have been checked:
  /// sessions of its model, each with room for its token.
  virtual Result<std::span<const float>> lead(std::span<Session* const> sessions,
                                              std::span<const int32_t> tokens) = 0;
};

/// How the next token is drawn; names and defaults as llama.cpp's.
struct SamplingOptions {
  float temperature = 0.8F;  ///< <= 0: the most likely token
  int64_t top_k = 40;        ///< <= 0: all
  float top_p = 0.95F;       ///< >= 1: all
  float min_p = 0.05F;       ///< <= 0: all
  uint64_t seed = 0;
};

/// Draws tokens: top-k, then top-p, then min-p, then temperature. The same seed and logits give the
/// same tokens on every machine whose C library computes the same exp().
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);
  ~Sampler();
  /// The next token. logits: (vocab), one or more. NaN and -infinity are never drawn, unless there
  /// is nothing else: then token 0. The first +infinity always is.
  int32_t sample(std::span<const float> logits);
  /// How many of the likeliest tokens decide; 0: all.
  int64_t deciding() const;
  /// The same from the logits of these tokens alone, in any order, which include the deciding()
  /// likeliest; -infinity stands for none.
  int32_t sample(std::span<const float> logits, std::span<const int32_t> tokens);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace rabit
