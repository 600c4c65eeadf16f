#include "cli/engine_flags.h"

#include <fmt/format.h>

#include "cli/common.h"

namespace rabit::cli {
namespace {

/// A check that a value is a name, and that `check` knows it.
template <typename Check>
auto named(const Check& check) {
  return [check](const std::string& name) {
    const Status status = name.empty() ? Status(Error{"needs a name"}) : check(name);
    return status ? std::string() : status.error().message;
  };
}

}  // namespace

void add_engine_flags(CLI::App* app, EngineFlags& flags) {
  app->add_option("--device", flags.device,
                  "What computes: cpu; cuda or cuda:N, an NVIDIA GPU, in a build with CUDA")
      ->check(named(Model::check_device))
      ->type_name("NAME")
      ->capture_default_str();
  CLI::Option* exact =
      app->add_flag("--dense-f32", flags.dense_f32,
                    "Hold dense weights and the cache in F32, and sum floats throughout");
  app->add_option("--cache-type", flags.cache_type, "KV cache: f16, or q8_0 in half the memory")
      ->check(one_of({"f16", "q8_0"}))
      ->type_name("TYPE")
      ->capture_default_str()
      ->excludes(exact);
  app->add_option("--kernels", flags.kernels,
                  "Kernel table instead of the best that runs here, or that RABIT_ISA names")
      ->check(named(Model::check_kernels))
      ->type_name("NAME");
  app->add_flag("-v,--verbose", flags.verbose, "Say on stderr which kernels run, and how");
}

Result<std::shared_ptr<Model>> load_model(const std::filesystem::path& path,
                                          const EngineFlags& flags, int64_t threads) {
  const double started = now_seconds();
  RABIT_ASSIGN(auto model, Model::load(path, {.threads = static_cast<int>(threads),
                                              .dense_as_f32 = flags.dense_f32,
                                              .kernels = flags.kernels,
                                              .cache_q8_0 = flags.cache_type == "q8_0",
                                              .device = flags.device}));
  if (flags.verbose) {
    note(fmt::format("{}: {}, dense weights {}, KV cache {}; loaded in {:.2f} s", path.string(),
                     model->on_gpu() ? model->device()
                                     : fmt::format("kernels {}, {}", model->kernels(),
                                                   counted(model->threads(), "thread")),
                     dense_type(flags), cache_type(flags), now_seconds() - started));
  }
  return model;
}

std::string runs_on(const Model& model) {
  return model.on_gpu()
             ? model.device()
             : fmt::format("{}, {} kernels", counted(model.threads(), "thread"), model.kernels());
}

std::string dense_type(const EngineFlags& flags) {
  const bool gpu = !flags.device.empty() && flags.device != "cpu";
  return flags.dense_f32 ? "F32" : gpu ? "F16" : "as in the file, or F16";
}

std::string cache_type(const EngineFlags& flags) {
  return flags.dense_f32 ? "F32" : flags.cache_type == "q8_0" ? "Q8_0" : "F16";
}

}  // namespace rabit::cli
