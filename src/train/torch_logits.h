// The fake-quant student, or the teacher, as a source of logits: perplexity on the training device,
// by other code than the packed runtime's.
#pragma once

#include <functional>
#include <vector>

#include "eval/logit_source.h"
#include "train/fake_quant.h"
#include "train/network.h"

namespace rabit::train {

class TorchLogits : public LogitSource {
 public:
  /// With `student` null: the teacher itself. Both must outlive this. Of blocks that are shared
  /// out, all processes score the same.
  TorchLogits(const Network& network, const Student* student);

  int64_t vocab_size() const override { return network_.config.vocab_size; }
  Status score(std::span<const int32_t> tokens, std::span<double> nll) override;

 private:
  std::function<BlockWeights()> begin(int64_t layer) const;

  const Network& network_;
  const Student* student_;
  std::vector<BlockWeights> blocks_;  // where they are not shared out
  at::Tensor output_norm_;
  Rotary rotary_;
};

}  // namespace rabit::train
