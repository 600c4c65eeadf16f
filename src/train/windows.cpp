#include "train/windows.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>

namespace rabit::train {

std::vector<int64_t> shuffled(int64_t count, uint64_t seed) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(seed);
  for (int64_t i = count - 1; i > 0; --i) {
    std::swap(order[static_cast<size_t>(i)],
              order[static_cast<size_t>(random() % static_cast<uint64_t>(i + 1))]);
  }
  return order;
}

Result<TextWindows> TextWindows::cut(TrainingText text, std::span<const double> weights,
                                     int64_t seq_len, int64_t vocab, std::optional<uint64_t> seed) {
  if (!weights.empty() && weights.size() != text.sources.size()) {
    return Error{fmt::format("--data-weights: {} weights for {} sources of --data", weights.size(),
                             text.sources.size())};
  }
  TextWindows out;
  out.seq_len_ = seq_len;
  for (const TokenSource& source : text.sources) {
    const auto wrong = std::find_if(source.tokens.begin(), source.tokens.end(),
                                    [&](int32_t id) { return id < 0 || id >= vocab; });
    if (wrong != source.tokens.end()) {
      return Error{
          fmt::format("{}: token {} of the text is {}, outside the model's vocabulary of {}",
                      source.name, wrong - source.tokens.begin(), *wrong, vocab)};
    }
    if (out.parts_.empty() || !weights.empty()) {
      out.parts_.emplace_back();
    }
    out.parts_.back().texts.push_back(source.tokens);
  }
  const auto too_short = [&](const std::string& what, size_t tokens) {
    return Error{
        fmt::format("{} has {} tokens, less than one window of {}; give more text or a "
                    "smaller --seq-len",
                    what, tokens, seq_len)};
  };
  if (out.parts_.empty()) {
    return too_short("the text", 0);
  }
  int64_t epoch = 0;
  for (size_t p = 0; p < out.parts_.size(); ++p) {
    Part& part = out.parts_[p];
    const std::string name = weights.empty() ? "the text" : text.sources[p].name;
    size_t tokens = 0;
    for (const auto& one : part.texts) {
      tokens += one.size();
    }
    part.windows = static_cast<int64_t>(tokens) / seq_len;
    if (part.windows == 0) {
      return too_short(name, tokens);
    }
    const double weight = weights.empty() ? 1.0 : weights[p];
    part.drawn = std::llround(weight * static_cast<double>(part.windows));
    if (part.drawn == 0) {
      return Error{fmt::format("--data-weights: {} leaves not one of the {} windows of {}", weight,
                               part.windows, name)};
    }
    if (part.drawn % part.windows != 0) {
      part.order = shuffled(part.windows, seed.value_or(0) + p + 1);
    }
    epoch += part.drawn;
  }
  if (seed) {
    out.order_ = shuffled(epoch, *seed);
  } else {
    out.order_.resize(static_cast<size_t>(epoch));
    std::iota(out.order_.begin(), out.order_.end(), 0);
  }
  std::set<Place> seen;
  for (int64_t place = 0; place < epoch; ++place) {
    if (weights.empty() || seen.insert(out.find(place)).second) {
      out.distinct_.push_back(place);
    }
  }
  out.text_ = std::move(text);
  return out;
}

TextWindows::Place TextWindows::find(int64_t place) const {
  const int64_t epoch = place / count();
  int64_t drawn = order_[static_cast<size_t>(place % count())];
  size_t p = 0;
  for (; drawn >= parts_[p].drawn; ++p) {
    drawn -= parts_[p].drawn;
  }
  const Part& part = parts_[p];
  const int64_t at = (epoch * part.drawn + drawn) % part.windows;
  return {p, part.order.empty() ? at : part.order[static_cast<size_t>(at)]};
}

void TextWindows::copy_window(int64_t place, int64_t* ids) const {
  const auto [p, window] = find(place);
  auto skip = static_cast<size_t>(window * seq_len_);
  auto left = static_cast<size_t>(seq_len_);
  for (const auto& text : parts_[p].texts) {
    if (skip >= text.size()) {
      skip -= text.size();
      continue;
    }
    const auto piece = text.subspan(skip, std::min(left, text.size() - skip));
    ids = std::copy(piece.begin(), piece.end(), ids);
    left -= piece.size();
    skip = 0;
    if (left == 0) {
      return;
    }
  }
}

at::Tensor TextWindows::pick(std::span<const int64_t> places) const {
  at::Tensor windows = at::empty({static_cast<int64_t>(places.size()), seq_len_}, at::kLong);
  int64_t* ids = windows.mutable_data_ptr<int64_t>();
  for (const int64_t place : places) {
    copy_window(place, ids);
    ids += seq_len_;
  }
  return windows;
}

at::Tensor TextWindows::pick_distinct(std::span<const int64_t> indices) const {
  std::vector<int64_t> places;
  for (const int64_t index : indices) {
    places.push_back(distinct_[static_cast<size_t>(index)]);
  }
  return pick(places);
}

at::Tensor TextWindows::distinct_range(int64_t begin, int64_t count) const {
  return pick(std::span(distinct_).subspan(static_cast<size_t>(begin), static_cast<size_t>(count)));
}

std::vector<int64_t> WindowOrder::batch(int64_t step, int64_t batch) {
  std::vector<int64_t> places;
  for (int64_t position = step * batch; position < (step + 1) * batch; ++position) {
    if (position / windows_ != epoch_) {
      epoch_ = position / windows_;
      order_ = shuffled(windows_, seed_ + static_cast<uint64_t>(epoch_));
    }
    places.push_back(epoch_ * windows_ + order_[static_cast<size_t>(position % windows_)]);
  }
  return places;
}

}  // namespace rabit::train
