// The optimizers: Muon or AdamW for the latents, AdamW for the scales. Parameters are the leaves
// themselves; a step reads their .grad() and clears it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "rabit/result.h"
#include "train/options.h"
#include "train/ranks.h"

namespace rabit::train {

/// Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) with Nesterov momentum and
/// five Newton-Schulz steps, updates scaled by 0.2 sqrt(max(d_out, d_in)) so that their RMS is that
/// of AdamW (Liu et al., arXiv 2502.16982). Matrices of equal sizes go through together, as many as
/// `kMuonElements` hold.
class Muon {
 public:
  /// parameters: leaves float32, matrices (d_out, d_in) or stacks of them (k, d_out, d_in).
  /// momentum_type: that the momentum is kept in, float32 or, in half of the memory, bf16. shared:
  /// where parameters are rows of matrices that several processes hold together; each matrix is
  /// then put together and made orthogonal by one of them.
  explicit Muon(const std::vector<at::Tensor>& parameters, double momentum = 0.95,
                at::ScalarType momentum_type = at::kFloat, const SharedLeaves& shared = {});

  void step(double learning_rate);

  /// Momentum in the parameters' order and sizes, for checkpoints. Empty before the first step.
  std::vector<at::Tensor> state() const { return momentum_; }
  void load_state(const std::vector<at::Tensor>& momentum);

 private:
  struct Slice {
    size_t parameter;
    int64_t index;  // of the matrix in its stack
  };
  static at::Tensor matrix(const at::Tensor& parameter, const Slice& slice);
  void step_together(const std::vector<Slice>& slices, double learning_rate);
  // Their Nesterov directions, from which the momentum has been brought up to date.
  std::vector<at::Tensor> directions(const std::vector<Slice>& slices);
  // Directions made orthogonal, in their sizes.
  std::vector<at::Tensor> orthogonal(const std::vector<at::Tensor>& directions) const;
  std::vector<at::Tensor> orthogonal_together(const std::vector<at::Tensor>& directions,
                                              int64_t rows) const;
  int64_t whole_rows(size_t parameter) const;

  std::vector<at::Tensor> parameters_, momentum_;
  SharedLeaves shared_;
  std::vector<std::vector<Slice>> batches_;  // of equal sizes
  double decay_;
  at::ScalarType momentum_type_;
};

/// Elements of the matrices that Newton-Schulz takes at once.
inline constexpr int64_t kMuonElements = int64_t{1} << 26;

/// Newton-Schulz iteration: X (batch, m, n), m <= n -> about U V^T of X = U S V^T, in X's type.
at::Tensor orthogonalize(const at::Tensor& x);

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) over all parameters as one flat vector.
class AdamW {
 public:
  struct Options {
    double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.0;
    at::ScalarType moments = at::kFloat;  // or bf16: the type that they are kept in
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

  // Of these tensors, moments in float32.
  void update(at::TensorList parameters, at::TensorList grads, at::TensorList means,
              at::TensorList squares, double learning_rate) const;
};

/// Square root of the sum of squares of all gradients, a number on their device.
at::Tensor gradient_norm(const std::vector<at::Tensor>& parameters);
/// Multiplies all gradients by a factor.
void scale_gradients(const std::vector<at::Tensor>& parameters, double factor);
void clear_gradients(const std::vector<at::Tensor>& parameters);

/// What a training leaves for its continuation; of leaves that are shared out, a process's share.
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
  /// shared: how these lie on the processes of a run; each then accumulates the gradients of its
  /// own windows' share of the loss, and takes the same steps.
  Trainer(const QuantizeOptions& options, const std::vector<at::Tensor>& latents,
          const std::vector<at::Tensor>& scales, const SharedLeaves& shared = {});

  struct Step {
    bool taken = false;
    double loss = 0.0;           // of `watched`
    double gradient_norm = 0.0;  // of the scales, before it was bounded
    double latent_gradient_norm = 0.0;
  };
  /// Adds the gradients of `loss`, a number, to those of the step to come.
  void accumulate(const at::Tensor& loss);
  /// A step of both from the gradients accumulated. `watched`: the number to report, the same on
  /// all processes; undefined: the losses accumulated on all. Errors: the fifth unusable step
  /// running.
  Result<Step> step(const at::Tensor& watched, double latent_rate, double scale_rate);

  TrainerState state() const;
  void load_state(const TrainerState& state);

 private:
  // Sums what each process has of the leaves that all have copies of.
  void sum_copies();
  // Sums of squares of the gradients: of scales and norms, and of latents, over all processes.
  std::pair<at::Tensor, at::Tensor> squares();

  std::optional<Muon> muon_;
  std::optional<AdamW> latent_adam_;
  AdamW scale_adam_;
  std::vector<at::Tensor> latents_, scales_;
  SharedLeaves shared_;
  at::Tensor accumulated_;  // the losses since the last step
  double clip_;
  int unusable_ = 0;
};

/// Factor of the learning rate at `progress` in [0, 1]: linear warm-up over the first `warmup` of
/// the run, then half a cosine to zero.
double cosine_schedule(double progress, double warmup);

}  // namespace rabit::train
