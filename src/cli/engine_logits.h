// The runtime as a source of losses for evaluations.
#pragma once

#include <memory>

#include "eval/divergence.h"
#include "eval/logit_source.h"
#include "rabit/engine.h"

namespace rabit::cli {

class EngineLogitSource : public LogitSource {
 public:
  /// Contexts of at most `capacity` tokens, which go through the model `together` at a time, at
  /// most kMostTogether; 0: as many as that, or 32 beside a teacher. teacher: a model to compare
  /// with, of the same vocabulary, or null. Errors: of Session::create, another vocabulary.
  static Result<std::unique_ptr<EngineLogitSource>> create(std::shared_ptr<Model> model,
                                                           int64_t capacity, int64_t together = 0,
                                                           std::shared_ptr<Model> teacher = {});
  ~EngineLogitSource() override;

  int64_t vocab_size() const override;
  Status score(std::span<const int32_t> tokens, std::span<double> nll) override;

  /// Tokens that go through the model at once, at most.
  int64_t together() const;

  /// From the teacher, over all positions that were scored.
  const DivergenceResult& divergence() const;

 private:
  struct State;
  explicit EngineLogitSource(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace rabit::cli
