// A block whose rows are spread over the processes of a run: of each linear layer a process holds
// ceil(d_out / processes) rows, the last ones what is left. Latents, row scales, their gradients
// and the optimizer's state exist once over all processes; column scales and norms are on each. The
// rows' weights are gathered for a pass through the block, in the compute type, and the gradients
// of the weights summed over the processes on their way back to the rows. Blocks of the original
// can be shared out in the same way.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "train/fake_quant.h"
#include "train/ranks.h"

namespace rabit::train {

/// Errors: a layer with fewer rows than there are processes to hold some.
Status check_shares(const ModelConfig& config, int size);

/// This process's share of a block that every process has made whole; what the first has made
/// counts. All processes call it.
StudentBlock shard_block(const StudentBlock& whole, const std::shared_ptr<Ranks>& ranks);

/// The whole block, on the host. Blocks that are not shared out come back as they are. All
/// processes call it; an empty one for those that only give what they have.
StudentBlock whole_block(const StudentBlock& block, bool gives_only = false);

/// Begins to put a block's weights together; what it returns gives them, while the arguments are
/// there, and is called once. All processes call both, in the same order.
std::function<BlockWeights()> begin_weights(const StudentBlock& student,
                                            const BlockWeights& teacher, at::ScalarType compute);
/// The same of a block of the original.
std::function<BlockWeights()> begin_weights(const Network& network, int64_t layer);
inline BlockWeights whole_weights(const Network& network, int64_t layer) {
  return begin_weights(network, layer)();
}

/// body(b, weights) of one block after the other, while the next one's weights, begin(b), are on
/// their way.
template <typename Begin, typename Body>
void block_by_block(int64_t blocks, const Begin& begin, const Body& body) {
  std::function<BlockWeights()> next = begin(int64_t{0});
  for (int64_t b = 0; b < blocks; ++b) {
    const BlockWeights weights = next();
    if (b + 1 < blocks) {
      next = begin(b + 1);
    }
    body(b, weights);
  }
}

/// Leaves of an original's block only this process's rows, in BlockWeights::share.
void share_out(BlockWeights& block, const ModelConfig& config, const Ranks& ranks);

/// How latents() of some blocks lie on the processes, and scales and norms among which are theirs.
SharedLeaves shared_leaves(std::span<const StudentBlock> blocks,
                           const std::vector<at::Tensor>& scales,
                           const std::shared_ptr<Ranks>& ranks);
inline SharedLeaves shared_leaves(const Student& student, const std::shared_ptr<Ranks>& ranks) {
  return shared_leaves(student.blocks, scales_and_norms(student), ranks);
}

}  // namespace rabit::train
