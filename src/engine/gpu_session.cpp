// A sequence on a GPU: its cache, and its calls cut into what the model's runner takes.
#include <algorithm>

#include "engine/gpu_runner.h"
#include "engine/input.h"

namespace rabit {
namespace {

/// A token each, one after the other. Logits to `logits`, (sessions, vocab). If one fails, none has
/// moved.
Status forward_in_turn(std::span<Session* const> sessions, std::span<const int32_t> tokens,
                       std::vector<float>& logits) {
  logits.clear();
  for (size_t i = 0; i < sessions.size(); ++i) {
    const auto own = sessions[i]->forward(tokens.subspan(i, 1));
    if (!own) {
      for (size_t j = 0; j < i; ++j) {
        sessions[j]->truncate(sessions[j]->position() - 1);
      }
      return own.error();
    }
    logits.insert(logits.end(), own->begin(), own->end());
  }
  return {};
}

class GpuSession : public Session {
 public:
  GpuSession(std::shared_ptr<GpuModel> model, GpuCache cache)
      : model_(std::move(model)), runner_(*model_->runner), cache_(std::move(cache)) {}

  Status forward_all(std::span<const int32_t> tokens, const LogitSink& sink) override;
  Result<std::span<const float>> forward(std::span<const int32_t> tokens) override;
  Result<int32_t> next(std::span<const int32_t> tokens, Sampler& sampler) override;
  int64_t position() const override { return cache_.position; }
  void truncate(int64_t position) override {
    cache_.position = std::clamp<int64_t>(position, 0, cache_.position);
  }
  int64_t whole_tokens() const { return whole_tokens_; }

 protected:
  const Model& model() const override { return *model_; }
  Status check(std::span<const int32_t> tokens) const override {
    return check_input(tokens, cache_.position, cache_.capacity, vocab());
  }
  Result<std::span<const float>> lead(std::span<Session* const> sessions,
                                      std::span<const int32_t> tokens) override;

 private:
  Result<bool> run_alone(std::span<const int32_t> tokens);
  template <typename Take>
  auto append(std::span<const int32_t> tokens, const Take& take) -> decltype(take());
  int64_t vocab() const { return model_->sizes.vocab; }

  std::shared_ptr<GpuModel> model_;
  GpuRunner& runner_;
  GpuCache cache_;
  int64_t whole_tokens_ = 0;
  std::vector<float> each_;  // logits of forward_each()
};

/// Queues a token by itself, if it can be one kernel; else false. The position is not moved.
Result<bool> GpuSession::run_alone(std::span<const int32_t> tokens) {
  if (tokens.size() != 1) {
    return false;
  }
  RABIT_ASSIGN(const bool whole, runner_.run_whole(cache_, tokens[0]));
  whole_tokens_ += whole ? 1 : 0;
  return whole;
}

Status GpuSession::forward_all(std::span<const int32_t> tokens, const LogitSink& sink) {
  RABIT_CHECK(check(tokens));
  const auto total = static_cast<int64_t>(tokens.size());
  const int64_t start = cache_.position;
  const auto run = [&]() -> Status {
    RABIT_ASSIGN(const bool whole, run_alone(tokens));
    if (whole) {
      RABIT_ASSIGN(const float* const logits, runner_.logits(1));
      sink(0, 1, logits);
      ++cache_.position;
      return {};
    }
    for (int64_t first = 0; first < total; first += runner_.chunk()) {
      const int64_t count = std::min(runner_.chunk(), total - first);
      RABIT_CHECK(runner_.run_chunk(cache_, tokens.subspan(first, count)));
      for (int64_t t = 0; t < count; t += GpuRunner::kLogitsTogether) {
        const int64_t rows = std::min(GpuRunner::kLogitsTogether, count - t);
        RABIT_CHECK(runner_.run_head(t, rows));
        RABIT_ASSIGN(const float* const logits, runner_.logits(rows));
        sink(first + t, rows, logits);
      }
      cache_.position += count;
    }
    return {};
  };
  const Status status = run();
  cache_.position = status ? cache_.position : start;
  return status;
}

/// Appends the tokens; take() gets what it returns from the logits after the last, which are
/// queued.
template <typename Take>
auto GpuSession::append(std::span<const int32_t> tokens, const Take& take) -> decltype(take()) {
  RABIT_CHECK(check(tokens));
  const auto total = static_cast<int64_t>(tokens.size());
  const int64_t start = cache_.position;
  const auto run = [&]() -> decltype(take()) {
    RABIT_ASSIGN(const bool whole, run_alone(tokens));
    if (whole) {
      ++cache_.position;
      return take();
    }
    int64_t count = 0;
    for (int64_t first = 0; first < total; first += count) {
      count = std::min(runner_.chunk(), total - first);
      RABIT_CHECK(runner_.run_chunk(cache_, tokens.subspan(first, count)));
      cache_.position += count;
    }
    RABIT_CHECK(runner_.run_head(count - 1, 1));
    return take();
  };
  auto taken = run();
  cache_.position = taken ? cache_.position : start;
  return taken;
}

Result<std::span<const float>> GpuSession::forward(std::span<const int32_t> tokens) {
  return append(tokens, [this]() -> Result<std::span<const float>> {
    RABIT_ASSIGN(const float* const logits, runner_.logits(1));
    return std::span<const float>(logits, static_cast<size_t>(vocab()));
  });
}

Result<int32_t> GpuSession::next(std::span<const int32_t> tokens, Sampler& sampler) {
  return append(tokens, [&] { return runner_.draw(sampler); });
}

Result<std::span<const float>> GpuSession::lead(std::span<Session* const> sessions,
                                                std::span<const int32_t> tokens) {
  std::vector<GpuSession*> all;
  std::vector<const GpuCache*> caches;
  for (Session* session : sessions) {
    auto* const own = static_cast<GpuSession*>(session);
    all.push_back(own);
    caches.push_back(&own->cache_);
  }
  if (all.size() <= runner_.alone()) {
    RABIT_CHECK(forward_in_turn(sessions, tokens, each_));
    return std::span<const float>(each_);
  }
  const bool together = all.size() <= GpuRunner::kEach;  // else in groups, logits put side by side
  std::span<const float> logits;
  each_.clear();
  for (size_t first = 0; first < all.size(); first += GpuRunner::kEach) {
    const size_t count = std::min<size_t>(GpuRunner::kEach, all.size() - first);
    RABIT_CHECK(
        runner_.run_each(std::span(caches).subspan(first, count), tokens.subspan(first, count)));
    RABIT_ASSIGN(const float* const some, runner_.logits(static_cast<int64_t>(count)));
    logits = {some, count * static_cast<size_t>(vocab())};
    if (!together) {
      each_.insert(each_.end(), logits.begin(), logits.end());
    }
  }
  for (GpuSession* own : all) {  // not before all have gone well
    ++own->cache_.position;
  }
  return together ? logits : std::span<const float>(each_);
}

}  // namespace

Result<std::unique_ptr<Session>> create_gpu_session(std::shared_ptr<Model> model,
                                                    int64_t capacity) {
  auto on_gpu = std::dynamic_pointer_cast<GpuModel>(std::move(model));
  if (on_gpu == nullptr) {
    return Error{"the model is not on a GPU"};
  }
  if (capacity < 1) {
    return Error{"a context needs at least one position, not " + std::to_string(capacity)};
  }
  if (on_gpu->runner == nullptr) {
    auto runner = std::make_shared<GpuRunner>(*on_gpu);
    RABIT_CHECK(runner->start());
    on_gpu->runner = std::move(runner);
  }
  RABIT_ASSIGN(GpuCache cache, on_gpu->runner->make_cache(capacity));
  RABIT_CHECK(on_gpu->runner->prepare(capacity));
  return std::unique_ptr<Session>(new GpuSession(std::move(on_gpu), std::move(cache)));
}

int64_t whole_tokens(const Session& session) {
  const auto* on_gpu = dynamic_cast<const GpuSession*>(&session);
  return on_gpu == nullptr ? 0 : on_gpu->whole_tokens();
}

}  // namespace rabit
