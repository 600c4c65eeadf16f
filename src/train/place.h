// Which of a run's processes this one is; free of torch.
#pragma once

#include <string>

#include "rabit/result.h"

namespace rabit::train {

/// Where this process stands, as launchers say it: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
/// MASTER_PORT, and LOCAL_WORLD_SIZE if they like. WORLD_SIZE unset or 1: alone.
struct Place {
  int rank = 0, size = 1, local_rank = 0;
  int local_size = 1;  // processes on this machine, as far as is known
  std::string host;
  int port = 0;
  // torchrun's own process listens there, not the first of the run, and may start all anew.
  bool launcher_meets = false;
  int attempt = 0;

  bool alone() const { return size == 1; }
  bool first() const { return rank == 0; }
  /// Errors: a variable that is missing or no number, a rank outside the size.
  static Result<Place> from_environment();
};

}  // namespace rabit::train
