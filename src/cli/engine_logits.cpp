// Losses from the runtime's logits, with the same kernels and as many threads as the model runs
// with.
#include "cli/engine_logits.h"

#include <string>

#include "base/threads.h"
#include "kernels/api/kernels.h"

namespace rabit::cli {

struct EngineLogitSource::State {
  std::shared_ptr<Model> model;
  std::unique_ptr<Session> session;
  const KernelTable* table = &reference_kernels();
  ThreadPool pool;
};

EngineLogitSource::EngineLogitSource(std::unique_ptr<State> state) : state_(std::move(state)) {}
EngineLogitSource::~EngineLogitSource() = default;

Result<std::unique_ptr<EngineLogitSource>> EngineLogitSource::create(std::shared_ptr<Model> model,
                                                                     int64_t capacity) {
  RABIT_ASSIGN(std::unique_ptr<Session> session, Session::create(model, capacity));
  std::unique_ptr<State> state(
      new State{model, std::move(session), &reference_kernels(), ThreadPool(model->threads())});
  const std::string name = model->kernels();
  for (const KernelTable* table : cpu_kernels()) {
    if (table->name == name) {
      state->table = table;
    }
  }
  return std::unique_ptr<EngineLogitSource>(new EngineLogitSource(std::move(state)));
}

int64_t EngineLogitSource::vocab_size() const { return state_->model->vocab_size(); }

Status EngineLogitSource::score(std::span<const int32_t> tokens, std::span<double> nll) {
  const auto count = static_cast<int64_t>(tokens.size());
  if (count < 2 || static_cast<int64_t>(nll.size()) < count - 1) {
    return Error{"a context to score needs two tokens at least, and room for their losses"};
  }
  const int64_t vocab = vocab_size();
  state_->session->truncate(0);
  return state_->session->forward_all(
      tokens, [&](int64_t first, int64_t rows, const float* logits) {
        state_->pool.parallel_for(rows, 1, [&](int64_t begin, int64_t end, int) {
          for (int64_t i = begin; i < end && first + i + 1 < count; ++i) {
            nll[first + i] =
                state_->table->cross_entropy(logits + i * vocab, vocab, tokens[first + i + 1]);
          }
        });
      });
}

}  // namespace rabit::cli
