// A block whose rows are spread over the processes of a run: of each linear layer a process holds
// ceil(d_out / processes) rows, the last ones what is left. Latents, row scales, their gradients
// and the optimizer's state exist once over all processes; column scales and norms are on each. The
// rows' weights are gathered for a pass through the block, in the compute type, and the gradients
// of the weights summed over the processes on their way back to the rows.
#pragma once

#include <memory>

#include "train/fake_quant.h"
#include "train/ranks.h"

namespace rabit::train {

/// Errors: a layer with fewer rows than there are processes to hold some.
Status check_shares(const ModelConfig& config, int size);

/// This process's share of a block that every process has made whole; what the first has made
/// counts. All processes call it.
StudentBlock shard_block(const StudentBlock& whole, const std::shared_ptr<Ranks>& ranks);

/// The whole block, on the host of the first process; elsewhere an empty one. Blocks that are not
/// shared out come back as they are. All processes call it.
StudentBlock whole_block(const StudentBlock& block);

/// As student_weights(), of a block that is shared out. All processes call it.
BlockWeights gathered_weights(const StudentBlock& student, const BlockWeights& teacher,
                              at::ScalarType compute);

/// How latents() and scales_and_norms() of a student lie on the processes.
SharedLeaves shared_leaves(const Student& student, const std::shared_ptr<Ranks>& ranks);

}  // namespace rabit::train
