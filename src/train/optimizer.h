// The optimizers: Muon or AdamW for the latents, AdamW for the scales. Parameters are the leaves
// themselves; a step reads their .grad() and clears it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "rabit/result.h"
#include "train/options.h"

namespace rabit::train {

/// Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) with Nesterov momentum and
/// five Newton-Schulz steps, updates scaled by 0.2 sqrt(max(d_out, d_in)) so that their RMS is that
/// of AdamW (Liu et al., arXiv 2502.16982). Matrices of equal sizes go through together.
class Muon {
 public:
  /// parameters: leaves float32, matrices (d_out, d_in) or stacks of them (k, d_out, d_in).
  explicit Muon(const std::vector<at::Tensor>& parameters, double momentum = 0.95);

  void step(double learning_rate);

  /// Momentum in the parameters' order and sizes, for checkpoints. Undefined before the first step.
  std::vector<at::Tensor> state() const;
  void load_state(const std::vector<at::Tensor>& momentum);

 private:
  struct Slice {
    size_t parameter;
    int64_t index;  // of the matrix in its stack
  };
  static at::Tensor matrix(const at::Tensor& parameter, const Slice& slice);
  struct Group {
    std::vector<Slice> members;
    at::Tensor momentum;  // (members, min side, max side)
  };
  std::vector<at::Tensor> parameters_;
  std::vector<Group> groups_;
  double momentum_;
};

/// Newton-Schulz iteration: X (batch, m, n), m <= n -> about U V^T of X = U S V^T, in X's type.
at::Tensor orthogonalize(const at::Tensor& x);

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) over all parameters as one flat vector.
class AdamW {
 public:
  struct Options {
    double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.0;
  };
  AdamW(std::vector<at::Tensor> parameters, const Options& options);

  void step(double learning_rate);

  struct State {
    at::Tensor mean, square;  // flat, in the parameters' order
    int64_t steps = 0;
  };
  State state() const { return state_; }
  void load_state(State state);

 private:
  std::vector<at::Tensor> parameters_;
  Options options_;
  State state_;
};

/// Square root of the sum of squares of all gradients, one synchronisation.
double gradient_norm(const std::vector<at::Tensor>& parameters);
/// Multiplies all gradients by a factor.
void scale_gradients(const std::vector<at::Tensor>& parameters, double factor);
void clear_gradients(const std::vector<at::Tensor>& parameters);

/// What a training leaves for its continuation.
struct TrainerState {
  std::vector<at::Tensor> momentum;  // Muon's; empty with AdamW and before the first step
  AdamW::State latents;              // AdamW's of the latents; undefined with Muon
  AdamW::State scales;
};

/// The optimizers of a phase behind one guard: the norm of the scales' gradients is bounded
/// (updates of latents have their own size), and no step is taken from a loss or gradient that is
/// not finite.
class Trainer {
 public:
  Trainer(Optimizer optimizer, const std::vector<at::Tensor>& latents,
          const std::vector<at::Tensor>& scales, double clip);

  struct Step {
    bool taken = false;
    double loss = 0.0;           // of `watched`
    double gradient_norm = 0.0;  // of the scales, before it was bounded
  };
  /// Backward from `loss`, then a step of both. `watched`: the number to report, often the loss
  /// itself. Errors: the fifth unusable step running.
  Result<Step> step(const at::Tensor& loss, const at::Tensor& watched, double latent_rate,
                    double scale_rate);

  TrainerState state() const;
  void load_state(const TrainerState& state);

 private:
  std::optional<Muon> muon_;
  std::optional<AdamW> latent_adam_;
  AdamW scale_adam_;
  std::vector<at::Tensor> latents_, scales_;
  double clip_;
  int unusable_ = 0;
};

/// Factor of the learning rate at `progress` in [0, 1]: linear warm-up over the first `warmup` of
/// the run, then half a cosine to zero.
double cosine_schedule(double progress, double warmup);

}  // namespace rabit::train
