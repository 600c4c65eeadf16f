// `rabit diagnose`: how the paths of a quantized model work together, layer by layer, beside its
// teacher. Free of torch, so that the command line compiles without it.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>

#include "io/gguf.h"
#include "rabit/result.h"
#include "train/options.h"

namespace rabit::train {

inline constexpr int64_t kDefaultDiagnoseWindow = 512;

struct DiagnoseOptions {
  int64_t tokens = 4096;  // from the start of the text, in whole windows, one at least
  int64_t seq_len = 0;    // 0: kDefaultDiagnoseWindow, or the model's context where that is less
  std::string device = "cpu";
  int64_t threads = 0;  // 0: as many as the process may use
  Compute compute = Compute::kAuto;
};

/// Measures every layer of `student`, a packed file or a run's checkpoint (its finished blocks), on
/// the text's tokens. Returns the object of to_json (eval/diagnostics.h) with the protocol beside
/// it; docs/diagnose.md has the keys. Errors: a student of another model, a text shorter than one
/// window, a missing device, a damaged file, an interrupt.
Result<nlohmann::json> diagnose_file(const GgufFile& student, const GgufFile& teacher,
                                     std::span<const int32_t> tokens,
                                     const DiagnoseOptions& options,
                                     const std::function<void(int64_t, int64_t)>& progress);

}  // namespace rabit::train
