// The options by which every command that runs a model chooses how.
#pragma once

#include <CLI/CLI.hpp>
#include <filesystem>
#include <memory>
#include <string>

#include "rabit/engine.h"

namespace rabit::cli {

struct EngineFlags {
  std::string device = "cpu", kernels, cache_type = "f16";
  bool dense_f32 = false, verbose = false;
};

/// `--device`, `--dense-f32`, `--cache-type`, `--kernels`, `-v/--verbose`.
void add_engine_flags(CLI::App* app, EngineFlags& flags);

/// A model to be run so; with --verbose, a line on stderr says with what. Errors: those of
/// Model::load.
Result<std::shared_ptr<Model>> load_model(const std::filesystem::path& path,
                                          const EngineFlags& flags, int64_t threads);

/// "2 threads, avx2 kernels", or "NVIDIA H200": what computes, for messages.
std::string runs_on(const Model& model);

/// Type of dense weights that are not quantized, and of the KV cache, for reports.
std::string dense_type(const EngineFlags& flags);
std::string cache_type(const EngineFlags& flags);

}  // namespace rabit::cli
