// The runtime as a source of losses for evaluations.
#pragma once

#include <memory>

#include "eval/logit_source.h"
#include "rabit/engine.h"

namespace rabit::cli {

class EngineLogitSource : public LogitSource {
 public:
  /// Contexts of at most `capacity` tokens. Errors: of Session::create.
  static Result<std::unique_ptr<EngineLogitSource>> create(std::shared_ptr<Model> model,
                                                           int64_t capacity);
  ~EngineLogitSource() override;

  int64_t vocab_size() const override;
  Status score(std::span<const int32_t> tokens, std::span<double> nll) override;

 private:
  struct State;
  explicit EngineLogitSource(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace rabit::cli
