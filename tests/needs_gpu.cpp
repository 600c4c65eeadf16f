// Linked into tests that use CUDA without asking whether it is there: each is skipped where there
// is no GPU, or one without code in this build.
#include <gtest/gtest.h>

#include "kernels/api/gpu.h"

namespace rabit {
namespace {

class NeedsGpu : public testing::EmptyTestEventListener {
 public:
  void OnTestStart(const testing::TestInfo& /*test*/) override {
    if (const auto device = gpu::use_device(0); !device) {
      GTEST_SKIP() << device.error().message;
    }
  }
};

[[maybe_unused]] const bool kListens = [] {
  testing::UnitTest::GetInstance()->listeners().Append(new NeedsGpu);
  return true;
}();

}  // namespace
}  // namespace rabit
