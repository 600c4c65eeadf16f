#include "train/torch_logits.h"

#include <ATen/ATen.h>

#include "train/shards.h"

namespace rabit::train {
namespace {

constexpr int64_t kChunk = 128;  // positions whose logits exist at once

}  // namespace

TorchLogits::TorchLogits(const Network& network, const Student* student)
    : network_(network),
      student_(student),
      output_norm_(student != nullptr ? output_norm(*student, network).detach()
                                      : network.output_norm) {
  const at::NoGradGuard no_grad;
  if (student != nullptr ? !student->blocks.front().ranks : !network.ranks) {
    std::vector<BlockWeights> blocks;
    for (int64_t layer = 0; layer < network.config.layers; ++layer) {
      blocks.push_back(begin(layer)());
    }
    blocks_ = std::move(blocks);
  }
}

std::function<BlockWeights()> TorchLogits::begin(int64_t layer) const {
  const auto block = static_cast<size_t>(layer);
  if (!blocks_.empty()) {
    return [this, block] { return blocks_[block]; };
  }
  return student_ != nullptr
             ? begin_weights(student_->blocks[block], network_.blocks[block], network_.compute)
             : begin_weights(network_, layer);
}

Status TorchLogits::score(std::span<const int32_t> tokens, std::span<double> nll) {
  const at::NoGradGuard no_grad;
  const auto count = static_cast<int64_t>(tokens.size());
  if (!rotary_.cos.defined() || rotary_.cos.size(0) < count) {
    rotary_ = make_rotary(network_.config, count, network_.device);
  }
  at::Tensor host_ids = at::empty({1, count}, at::kLong);
  std::copy(tokens.begin(), tokens.end(), host_ids.mutable_data_ptr<int64_t>());
  const at::Tensor ids = host_ids.to(network_.device);
  at::Tensor x = embed(network_, ids);
  block_by_block(
      network_.config.layers, [this](int64_t layer) { return begin(layer); },
      [&](int64_t, const BlockWeights& weights) {
        x = block_forward(network_.config, weights, rotary_, x, network_.compute);
      });
  const at::Tensor hidden = norm(network_.config, x, output_norm_, network_.compute).squeeze(0);
  for (int64_t begin = 0; begin + 1 < count; begin += kChunk) {
    const int64_t size = std::min(kChunk, count - 1 - begin);
    const at::Tensor logits =
        at::matmul(hidden.narrow(0, begin, size), network_.head.t()).to(at::kFloat);
    const at::Tensor targets = ids[0].narrow(0, begin + 1, size).unsqueeze(1);
    const at::Tensor losses = (at::logsumexp(logits, -1) - logits.gather(1, targets).squeeze(1))
                                  .to(at::kCPU, at::kDouble);
    const double* values = losses.const_data_ptr<double>();
    std::copy(values, values + size, nll.begin() + begin);
  }
  return {};
}

}  // namespace rabit::train
