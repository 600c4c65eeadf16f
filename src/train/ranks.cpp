#include "train/ranks.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Logging.h>
#include <fmt/format.h>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#ifdef RABIT_CUDA
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

#include "train/guard.h"

namespace rabit::train {
namespace {

using std::chrono::seconds;

constexpr auto kBeat = seconds(2);

// meets: as the process itself, of which each comes once.
c10::intrusive_ptr<c10d::Store> connect(const Place& place, bool meets) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(place.port);
  options.isServer = meets && place.first();
  options.numWorkers = static_cast<size_t>(place.size);
  options.waitWorkers = meets;
  options.timeout = seconds(Ranks::kJoinSeconds);
  return c10::make_intrusive<c10d::TCPStore>(place.host, options);
}

std::string first_line(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  const std::string what = of_torch != nullptr ? of_torch->what_without_backtrace() : error.what();
  return what.substr(0, what.find('\n'));
}

}  // namespace

// Tells through a connection of its own that this process lives, and looks whether the others do.
struct Ranks::Watch {
  Place place;
  c10::intrusive_ptr<c10d::Store> store;
  std::function<void(const std::string&)> lost;
  std::mutex mutex;  // of all below, and of the store
  std::condition_variable wake;
  bool ends = false, left = false;
  int64_t beat = 0;
  std::vector<std::string> seen;                             // the others' last beats
  std::vector<std::chrono::steady_clock::time_point> since;  // when they came
  std::thread thread;

  static std::string key(const char* what, int rank) { return fmt::format("{}/{}", what, rank); }

  static std::vector<uint8_t> bytes(const std::string& text) { return {text.begin(), text.end()}; }

  std::string value(const std::string& key) {
    const std::vector<uint8_t> found = store->get(key);
    return {found.begin(), found.end()};
  }

  // What is known of a process that was lost, "" if none was. Throws without the first process.
  std::string look() {
    store->set(key("beat", place.rank), bytes(std::to_string(++beat)));
    const auto now = std::chrono::steady_clock::now();
    for (int rank = 0; rank < place.size; ++rank) {
      if (rank == place.rank) {
        continue;
      }
      if (store->check({key("left", rank)})) {
        const std::string why = value(key("left", rank));
        if (!why.empty()) {
          return fmt::format("process {} has ended: {}", rank, why);
        }
        since[static_cast<size_t>(rank)] = now;  // has done its part
        continue;
      }
      const std::string now_seen =
          store->check({key("beat", rank)}) ? value(key("beat", rank)) : std::string();
      if (now_seen != seen[static_cast<size_t>(rank)]) {
        seen[static_cast<size_t>(rank)] = now_seen;
        since[static_cast<size_t>(rank)] = now;
      } else if (now - since[static_cast<size_t>(rank)] > seconds(kSilentSeconds)) {
        return fmt::format("process {} has not been heard of for {} s", rank, kSilentSeconds);
      }
    }
    return {};
  }

  void run() {
    std::unique_lock lock(mutex);
    while (!wake.wait_for(lock, kBeat, [&] { return ends; })) {
      std::string found;
      try {
        found = look();
      } catch (const std::exception& error) {
        found = "process 0 has ended (" + first_line(error) + ")";
      }
      // Who waits for the lost one has some time to find out by itself.
      if (!found.empty() && !wake.wait_for(lock, 2 * kBeat, [&] { return ends; })) {
        lost(fmt::format("process {} of {}: {}", place.rank, place.size, found));
        return;
      }
    }
  }

  void leave(const std::string& why) {
    const std::lock_guard lock(mutex);
    if (std::exchange(left, true)) {
      return;
    }
    try {
      store->set(key("left", place.rank), bytes(why));
    } catch (const std::exception&) {  // nobody is left to be told
    }
  }

  void end() {
    {
      const std::lock_guard lock(mutex);
      ends = true;
    }
    wake.notify_all();
    if (thread.joinable()) {
      thread.join();
    }
  }
};

struct Ranks::Group {
  c10::intrusive_ptr<c10d::Store> store;  // outlives the backend
  c10::intrusive_ptr<c10d::Backend> backend;
  std::deque<std::function<void()>> pending;
};

template <typename Body>
auto Ranks::with_others(const Body& body) const -> decltype(body()) {
  std::string what;
  try {
    return body();
  } catch (const std::exception& error) {
    what = first_line(error);
  }
  // It may have said why.
  std::string known;
  for (int attempt = 0; attempt < 20 && known.empty(); ++attempt) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    try {
      const std::lock_guard lock(watch_->mutex);
      known = watch_->look();
    } catch (const std::exception&) {
      known = "process 0 has ended";
    }
  }
  throw std::runtime_error(known.empty() ? "another process has ended (" + what + ")" : known);
}

Exchange::Exchange() = default;
Exchange::Exchange(const Ranks& ranks, c10::intrusive_ptr<c10d::Work> work)
    : ranks_(&ranks), work_(std::move(work)) {}
Exchange::Exchange(Exchange&&) noexcept = default;
Exchange& Exchange::operator=(Exchange&&) noexcept = default;
Exchange::~Exchange() = default;

void Exchange::wait() {
  if (work_) {
    ranks_->with_others([&] { return work_->wait(); });
    work_.reset();
  }
}

Ranks::Ranks(Place place, at::Device device)
    : watch_(std::make_shared<Watch>()),
      place_(std::move(place)),
      device_(device),
      group_(std::make_unique<Group>()) {}

Ranks::~Ranks() {
  leave("");
  watch_->end();
}

void Ranks::leave(const std::string& why) {
  if (watch_->store) {
    watch_->leave(why);
    if (!why.empty() && first()) {  // with this process the others' connection ends
      std::this_thread::sleep_for(3 * kBeat);
    }
  }
}

Result<std::shared_ptr<Ranks>> Ranks::join(const Place& place, at::Device device,
                                           std::function<void(const std::string&)> lost) {
  // Its warnings carry stack traces; what fails comes as an exception, too.
  setenv("TORCH_CPP_LOG_LEVEL", "FATAL", 0);
  c10::initLogging();
  std::shared_ptr<Ranks> ranks(new Ranks(place, device));
  const Status joined = without_exceptions([&]() -> Status {
    Group& group = *ranks->group_;
    group.store = connect(place, true);
    if (device.is_cuda()) {
#ifdef RABIT_CUDA
      auto nccl = c10d::ProcessGroupNCCL::Options::create();
      nccl->timeout = seconds(kJoinSeconds);
      auto made = c10::make_intrusive<c10d::ProcessGroupNCCL>(
          c10::make_intrusive<c10d::PrefixStore>("nccl", group.store), place.rank, place.size,
          nccl);
      made->setBoundDeviceId(device);
      made->eagerConnectSingleDevice(device);
      group.backend = made;
#endif
    } else {
      const auto gloo = c10d::ProcessGroupGloo::Options::create_default(seconds(kJoinSeconds));
      group.backend = c10::make_intrusive<c10d::ProcessGroupGloo>(
          c10::make_intrusive<c10d::PrefixStore>("gloo", group.store), place.rank, place.size,
          gloo);
    }
    group.backend->setTimeout(seconds(kAnswerSeconds));
    Watch& watch = *ranks->watch_;
    watch.place = place;
    watch.store = c10::make_intrusive<c10d::PrefixStore>("watch", connect(place, false));
    watch.lost = std::move(lost);
    watch.seen.resize(static_cast<size_t>(place.size));
    watch.since.assign(watch.seen.size(), std::chrono::steady_clock::now());
    watch.thread = std::thread([watch = ranks->watch_] { watch->run(); });
    return {};
  });
  if (!joined) {
    return Error{fmt::format("process {} of {} could not meet the others at {}:{}: {}", place.rank,
                             place.size, place.host, place.port, joined.error().message)};
  }
  return ranks;
}

void Ranks::sum(const at::Tensor& tensor) {
  std::vector<at::Tensor> tensors = {tensor};
  with_others([&] { return Exchange(*this, group_->backend->allreduce(tensors)); }).wait();
}

void Ranks::broadcast(const at::Tensor& tensor, int from) {
  std::vector<at::Tensor> tensors = {tensor};
  c10d::BroadcastOptions options;
  options.rootRank = from;
  with_others([&] { return Exchange(*this, group_->backend->broadcast(tensors, options)); }).wait();
}

Exchange Ranks::gather(const at::Tensor& mine, const at::Tensor& all) {
  at::Tensor in = mine, out = all;
  return with_others([&] { return Exchange(*this, group_->backend->_allgather_base(out, in)); });
}

Exchange Ranks::sum_parts(const at::Tensor& all, const at::Tensor& mine) {
  at::Tensor in = all, out = mine;
  return with_others(
      [&] { return Exchange(*this, group_->backend->_reduce_scatter_base(out, in)); });
}

void Ranks::swap_parts(const at::Tensor& in, const at::Tensor& out) {
  at::Tensor from = in, to = out;
  std::vector<int64_t> equal;  // none: parts of one size
  with_others([&] {
    return Exchange(*this, group_->backend->alltoall_base(to, from, equal, equal));
  }).wait();
}

bool Ranks::any(bool value) {
  const at::Tensor count =
      at::full({1}, value ? 1.0F : 0.0F, at::TensorOptions(device_).dtype(at::kFloat));
  sum(count);
  return count.item<float>() > 0.0F;
}

void Ranks::later(std::function<void()> work, size_t most) {
  group_->pending.push_back(std::move(work));
  while (group_->pending.size() > most) {
    const auto oldest = std::move(group_->pending.front());
    group_->pending.pop_front();
    oldest();
  }
}

void Ranks::finish() {
  while (!group_->pending.empty()) {
    const auto oldest = std::move(group_->pending.front());
    group_->pending.pop_front();
    oldest();
  }
}

int64_t rows_each(int64_t rows, int size) { return (rows + size - 1) / size; }

RowShare rows_of(int64_t rows, int rank, int size) {
  const int64_t each = rows_each(rows, size);
  const int64_t begin = std::min(rows, rank * each);
  return {begin, std::min(each, rows - begin)};
}

at::Tensor share_of(const at::Tensor& whole, const LeafLayout& layout, const Ranks& ranks) {
  if (layout.dim < 0) {
    return whole;
  }
  const RowShare share = rows_of(layout.rows, ranks.rank(), ranks.size());
  return whole.narrow(layout.dim, share.begin, share.count);
}

at::Tensor whole_of(const at::Tensor& share, const LeafLayout& layout, Ranks& ranks) {
  const at::NoGradGuard no_grad;
  if (layout.dim < 0) {
    return ranks.first() ? share.detach().to(at::kCPU) : at::Tensor();
  }
  // Rows first, as long as the longest share.
  const at::Tensor rows = share.detach().movedim(layout.dim, 0);
  std::vector<int64_t> sizes = rows.sizes().vec();
  sizes[0] = rows_each(layout.rows, ranks.size());
  const at::Tensor mine = at::zeros(sizes, rows.options());
  mine.narrow(0, 0, rows.size(0)).copy_(rows);
  sizes[0] *= ranks.size();
  const at::Tensor all = at::empty(sizes, rows.options());
  ranks.gather(mine.flatten(), all.view(-1)).wait();
  if (!ranks.first()) {
    return {};
  }
  // All shares but the last are as long as the first: no gaps.
  return all.narrow(0, 0, layout.rows).movedim(0, layout.dim).to(at::kCPU).contiguous();
}

}  // namespace rabit::train
