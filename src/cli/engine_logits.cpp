// Losses from the runtime's logits, with the same kernels and as many threads as the model runs
// with; of a GPU's logits, with the best kernels of the CPU.
#include "cli/engine_logits.h"

#include <algorithm>
#include <string>
#include <vector>

#include "base/threads.h"
#include "kernels/api/kernels.h"

namespace rabit::cli {
struct EngineLogitSource::State {
  std::shared_ptr<Model> model;
  std::unique_ptr<Session> session;
  std::unique_ptr<Session> teacher;
  int64_t together = 0;
  int64_t compared = 0;  // positions whose logits of both models are in memory at once
  const KernelTable* table = &reference_kernels();
  ThreadPool pool;
  std::vector<float> teacher_logits;  // (compared, vocab)
  DivergenceResult divergence;
};

EngineLogitSource::EngineLogitSource(std::unique_ptr<State> state) : state_(std::move(state)) {}
EngineLogitSource::~EngineLogitSource() = default;

Result<std::unique_ptr<EngineLogitSource>> EngineLogitSource::create(
    std::shared_ptr<Model> model, int64_t capacity, int64_t together,
    std::shared_ptr<Model> teacher) {
  RABIT_ASSIGN(std::unique_ptr<Session> session, Session::create(model, capacity));
  constexpr int64_t kCompared = 32;
  const int64_t step = std::min(
      {together > 0 ? together : (teacher ? kCompared : kMostTogether), capacity, kMostTogether});
  std::unique_ptr<State> state(new State{.model = model,
                                         .session = std::move(session),
                                         .together = step,
                                         .compared = std::max<int64_t>(kCompared / step, 1) * step,
                                         .pool = ThreadPool(model->threads())});
  if (teacher) {
    if (teacher->vocab_size() != model->vocab_size()) {
      return Error{"the teacher has a vocabulary of " + std::to_string(teacher->vocab_size()) +
                   " tokens, the model one of " + std::to_string(model->vocab_size())};
    }
    RABIT_ASSIGN(state->teacher, Session::create(std::move(teacher), capacity));
    state->teacher_logits.resize(static_cast<size_t>(state->compared * model->vocab_size()));
  }
  const std::string name = model->kernels();
  for (const KernelTable* table : cpu_kernels()) {
    if (table->name == name || (model->on_gpu() && table == cpu_kernels().front())) {
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
  State& state = *state_;
  state.session->truncate(0);
  if (state.teacher) {
    state.teacher->truncate(0);
  }
  const int64_t compared = state.teacher ? state.compared : count;
  for (int64_t begin = 0; begin < count; begin += compared) {
    const auto part = tokens.subspan(begin, std::min(compared, count - begin));
    if (state.teacher) {
      RABIT_CHECK(
          state.teacher->forward_all(part, [&](int64_t first, int64_t rows, const float* logits) {
            std::copy_n(logits, rows * vocab, state.teacher_logits.data() + first * vocab);
          }));
    }
    const auto size = static_cast<int64_t>(part.size());
    for (int64_t from = 0; from < size; from += state.together) {
      RABIT_CHECK(state.session->forward_all(
          part.subspan(from, std::min(state.together, size - from)),
          [&](int64_t first, int64_t rows, const float* logits) {
            first += from;
            const int64_t scored = std::max<int64_t>(0, std::min(rows, count - 1 - begin - first));
            std::vector<Divergence> divergences(state.teacher ? static_cast<size_t>(scored) : 0);
            state.pool.parallel_for(scored, 1, [&](int64_t low, int64_t high, int) {
              for (int64_t i = low; i < high; ++i) {
                const int64_t at = begin + first + i;
                nll[at] = state.table->cross_entropy(logits + i * vocab, vocab, tokens[at + 1]);
                if (state.teacher) {
                  const auto length = static_cast<size_t>(vocab);
                  divergences[static_cast<size_t>(i)] =
                      divergence_of({state.teacher_logits.data() + (first + i) * vocab, length},
                                    {logits + i * vocab, length}, tokens[at + 1]);
                }
              }
            });
            for (const Divergence& divergence : divergences) {
              state.divergence.add(divergence);
            }
          }));
    }
  }
  return {};
}

int64_t EngineLogitSource::together() const { return state_->together; }

const DivergenceResult& EngineLogitSource::divergence() const { return state_->divergence; }

}  // namespace rabit::cli
