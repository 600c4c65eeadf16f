// Models and sessions on a GPU, as the rest of the engine asks for them. In a build without CUDA
// (no_gpu.cpp) each is an error that says so.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>

#include "rabit/engine.h"

namespace rabit {

/// Errors: those of Model::load on the CPU; options that only the CPU has; no such device, or too
/// little memory there.
Result<std::shared_ptr<Model>> load_on_gpu(const std::filesystem::path& path,
                                           const EngineOptions& options, int32_t device);

/// model: of load_on_gpu(). Errors: of Session::create.
Result<std::unique_ptr<Session>> create_gpu_session(std::shared_ptr<Model> model, int64_t capacity);

/// How many tokens the session has run as one kernel each. For tests: results do not show it.
int64_t whole_tokens(const Session& session);

/// Bytes a second at which the model's GPU reads memory that no cache holds, measured now. Errors:
/// memory that cannot be had.
Result<double> gpu_read_speed(const Model& model);

}  // namespace rabit
