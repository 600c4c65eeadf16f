#include "train/sign_watch.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <bit>
#include <cstring>

#ifdef RABIT_CUDA
#include "train/gpu_ops.h"
#endif
#include "train/ranks.h"

namespace rabit::train {
namespace {

// Packs the linear layer's signs in place of earlier ones and counts those that differ.
at::Tensor look(const StudentLinear& linear, const at::Tensor& packed) {
#ifdef RABIT_CUDA
  if (packed.is_cuda()) {
    const at::NoGradGuard no_grad;
    if (!linear.independent()) {
      return gpu_coupled_signs({linear.latent, linear.g, linear.h}, packed);
    }
    at::Tensor sum;
    for (int64_t i = 0; i < linear.shape.paths; ++i) {
      const at::Tensor one = gpu_coupled_signs(
          {linear.latent.select(0, i), linear.g.narrow(0, i, 1), linear.h.narrow(0, i, 1)},
          packed.narrow(0, i, 1));
      sum = sum.defined() ? sum + one : one;
    }
    return sum;
  }
#endif
  const std::vector<uint32_t> now = student_signs(linear);
  auto* words = static_cast<uint32_t*>(packed.mutable_data_ptr());
  int64_t turned = 0;
  for (size_t i = 0; i < now.size(); ++i) {
    turned += std::popcount(words[i] ^ now[i]);
  }
  std::memcpy(words, now.data(), now.size() * sizeof(uint32_t));
  return at::scalar_tensor(turned, at::kLong);
}

}  // namespace

SignWatch::SignWatch(const Student& student) : student_(student) {
  for (const StudentBlock& block : student.blocks) {
    for (const StudentLinear& linear : block.linear) {
      const auto [d_out, d_in, paths] = linear.shape;
      packed_.push_back(at::zeros({paths, d_out, (d_in + 31) / 32},
                                  linear.latent.options().dtype(at::kInt).requires_grad(false)));
      signs_ += paths * d_out * d_in;
    }
  }
  (void)turned();
}

double SignWatch::turned() {
  std::vector<const StudentLinear*> layers;
  for (const StudentBlock& block : student_.blocks) {
    for (const StudentLinear& linear : block.linear) {
      layers.push_back(&linear);
    }
  }
  std::vector<at::Tensor> counts(layers.size());
  const auto look_at = [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      counts[i] = look(*layers[i], packed_[i]);
    }
  };
  if (packed_.front().is_cuda()) {
    look_at(0, static_cast<int64_t>(layers.size()));
  } else {
    at::parallel_for(0, static_cast<int64_t>(layers.size()), 1, look_at);
  }
  at::Tensor both = at::stack(counts).sum();
  both = at::stack({both, at::full_like(both, signs_)});
  if (const auto& ranks = student_.blocks.front().ranks) {
    ranks->sum(both);
  }
  both = both.to(at::kCPU);
  return static_cast<double>(both[0].item<int64_t>()) /
         static_cast<double>(both[1].item<int64_t>());
}

}  // namespace rabit::train
