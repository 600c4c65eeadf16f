// In place of gpu_model.cpp and gpu_session.cpp where CUDA is left out.
#include "engine/gpu.h"

namespace rabit {
namespace {

Error without_cuda() {
  return Error{
      "this rabit was built without CUDA: build it with -DRABIT_CUDA=ON, or take the device cpu"};
}

}  // namespace

Result<std::shared_ptr<Model>> load_on_gpu(const std::filesystem::path& /*path*/,
                                           const EngineOptions& /*options*/, int32_t /*device*/) {
  return without_cuda();
}

Result<std::unique_ptr<Session>> create_gpu_session(std::shared_ptr<Model> /*model*/,
                                                    int64_t /*capacity*/) {
  return without_cuda();
}

int64_t whole_tokens(const Session& /*session*/) { return 0; }

Result<double> gpu_read_speed(const Model& /*model*/) { return without_cuda(); }

}  // namespace rabit
