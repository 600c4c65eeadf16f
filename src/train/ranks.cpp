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
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "base/interrupt.h"
#include "train/guard.h"

namespace rabit::train {
namespace {

using std::chrono::seconds;

constexpr auto kBeat = seconds(2);
constexpr char kHeard = '=';            // before a reason that another process has given
constexpr auto kSuspended = 5 * kBeat;  // a wait of one beat that took this long: so was all else

// meets: as the process itself, of which each comes once.
c10::intrusive_ptr<c10d::Store> connect(const Place& place, bool meets) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(place.port);
  options.isServer = meets && place.first() && !place.launcher_meets;
  options.numWorkers = static_cast<size_t>(place.size);
  options.waitWorkers = meets && !place.launcher_meets;
  options.timeout = seconds(Ranks::kJoinSeconds);
  // A launcher may start all anew and keep its store.
  return c10::make_intrusive<c10d::PrefixStore>(
      fmt::format("rabit/{}", place.attempt),
      c10::make_intrusive<c10d::TCPStore>(place.host, options));
}

std::string first_line(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  const std::string what = of_torch != nullptr ? of_torch->what_without_backtrace() : error.what();
  return what.substr(0, what.find('\n'));
}

}  // namespace

// Tells through a connection of its own that this process lives, and looks whether the others do.
// One thread speaks to the store, which may keep it waiting for ever; another watches the clock.
struct Ranks::Watch {
  using Time = std::chrono::steady_clock::time_point;

  Place place;
  c10::intrusive_ptr<c10d::Store> store;  // the pulse's alone
  std::function<void(const std::string&)> lost;
  int64_t beat = 0;               // the pulse's, as the next two
  std::vector<std::string> seen;  // the others' last beats
  std::vector<Time> since;        // when they came

  std::mutex mutex;  // of all below
  std::condition_variable changed;
  std::string found;                   // of a process that was lost
  Time answered;                       // by the store
  std::optional<std::string> leaving;  // what to tell the others, once
  bool told = false, all_left = false, ends = false, pulse_ended = false;
  std::thread pulse, guard;

  static Time now() { return std::chrono::steady_clock::now(); }
  static std::string key(const char* what, int rank) { return fmt::format("{}/{}", what, rank); }

  std::string value(const std::string& key) {
    const std::vector<uint8_t> found_bytes = store->get(key);
    return {found_bytes.begin(), found_bytes.end()};
  }
  void tell(const char* what, const std::string& text) {
    store->set(key(what, place.rank), std::vector<uint8_t>(text.begin(), text.end()));
  }

  // What is known of a process that was lost, "" if none was; others_left: whether all have ended.
  std::string look(bool& others_left) {
    tell("beat", std::to_string(++beat));
    others_left = true;
    std::string first_found;
    const auto find = [&](const std::string& what) {
      first_found = first_found.empty() ? what : first_found;
    };
    for (int rank = 0; rank < place.size; ++rank) {
      if (rank == place.rank) {
        continue;
      }
      const auto i = static_cast<size_t>(rank);
      if (store->check({key("left", rank)})) {
        if (const std::string why = value(key("left", rank)); !why.empty()) {
          find(why.front() == kHeard ? why.substr(1)
                                     : fmt::format("process {} has ended: {}", rank, why));
        }
        continue;
      }
      others_left = false;
      const std::string last =
          store->check({key("beat", rank)}) ? value(key("beat", rank)) : std::string();
      if (last != seen[i]) {
        seen[i] = last;
        since[i] = now();
      } else if (now() - since[i] > seconds(kSilentSeconds)) {
        find(fmt::format("process {} has not been heard of for {} s", rank, kSilentSeconds));
      }
    }
    return first_found;
  }

  void run_pulse() {
    std::unique_lock lock(mutex);
    while (!ends) {
      const Time before = now();
      changed.wait_for(lock, kBeat, [&] { return ends || (leaving && !told); });
      if (now() - before > kSuspended) {
        since.assign(since.size(), now());
      }
      const std::optional<std::string> say = told ? std::nullopt : leaving;
      lock.unlock();
      std::string what;
      bool others_left = false;
      try {
        if (say) {
          tell("left", *say);
        }
        what = look(others_left);
      } catch (const std::exception& error) {
        what = fmt::format("process 0 or the launcher has ended ({})", first_line(error));
      }
      lock.lock();
      answered = now();
      told = told || say;
      all_left = others_left;
      if (found.empty()) {
        found = what;
      }
      changed.notify_all();
    }
    pulse_ended = true;
    changed.notify_all();
  }

  void run_guard() {
    std::unique_lock lock(mutex);
    Time before = now();
    while (!changed.wait_for(lock, kBeat, [&] { return ends || !found.empty(); })) {
      if (now() - before > kSuspended) {
        answered = now();
      }
      before = now();
      if (now() - answered > seconds(kSilentSeconds)) {
        found = fmt::format("process 0 has not been heard of for {} s", kSilentSeconds);
      }
    }
    // Who waits for the lost one has some time to find out by itself, and to end what is under way.
    changed.wait_for(lock, 2 * kBeat, [&] { return ends || leaving; });
    if (!ends && leaving && !leaving->empty()) {
      changed.wait_for(lock, 5 * kBeat, [&] { return ends; });
    }
    if (!ends && !(leaving && leaving->empty())) {
      lost(fmt::format("process {} of {}: {}", place.rank, place.size, found));
    }
  }

  // What is known of a lost process, for one that has noticed that something is wrong.
  std::string reason() {
    std::unique_lock lock(mutex);
    changed.wait_for(lock, 2 * kBeat, [&] { return !found.empty(); });
    return found;
  }

  void leave(const std::string& why) {
    std::unique_lock lock(mutex);
    if (leaving) {
      return;
    }
    const bool heard = !found.empty() && why.find(found) != std::string::npos;
    leaving = heard ? kHeard + found : why;
    changed.notify_all();
    changed.wait_for(lock, 3 * kBeat, [&] { return told; });
    if (place.first() && !place.launcher_meets) {  // with this process the store ends
      changed.wait_for(lock, why.empty() ? seconds(kSilentSeconds) : 3 * kBeat,
                       [&] { return all_left || (why.empty() && !found.empty()); });
    }
  }

  void end() {
    std::unique_lock lock(mutex);
    ends = true;
    changed.notify_all();
    changed.wait_for(lock, 2 * kBeat, [&] { return pulse_ended; });
    const bool joins = pulse_ended;
    lock.unlock();
    guard.join();
    joins ? pulse.join() : pulse.detach();  // it has its own share of this
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
  } catch (const c10::OutOfMemoryError&) {  // this process's own
    throw;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    what = first_line(error);
  }
  const std::string known = watch_->reason();
  throw std::runtime_error(known.empty() ? "another process has ended (" + what + ")" : known);
}

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
  if (watch_->pulse.joinable()) {
    leave("it did not say why");
    group_.reset();  // may wait for what is under way, which the guard ends
    watch_->end();
  }
}

void Ranks::leave(const std::string& why) { watch_->leave(why); }

void Ranks::part() {
  try {
    std::array done = {true};
    any(done);
    group_->backend->shutdown();
  } catch (const std::exception&) {  // all that was to be done together is done
  }
  leave("");
}

namespace {

// What `body` returns, computed in a thread that an interrupt leaves to itself: torch waits where
// it does not look at signals. waiting: called once after a moment.
Status interruptible(const std::function<Status()>& body, const std::function<void()>& waiting) {
  struct Shared {
    std::mutex mutex;
    std::condition_variable ended;
    std::optional<Status> status;
  };
  const auto shared = std::make_shared<Shared>();
  std::thread([shared, body] {
    const Status status = without_exceptions(body);
    const std::lock_guard lock(shared->mutex);
    shared->status = status;
    shared->ended.notify_all();
  }).detach();
  constexpr auto kLook = std::chrono::milliseconds(100), kMoment = std::chrono::milliseconds(3000);
  std::unique_lock lock(shared->mutex);
  for (auto waited = kLook;; waited += kLook) {
    if (shared->ended.wait_for(lock, kLook, [&] { return shared->status.has_value(); })) {
      return *shared->status;
    }
    RABIT_CHECK(check_interrupt());
    if (waited == kMoment) {
      waiting();
    }
  }
}

}  // namespace

Result<std::shared_ptr<Ranks>> Ranks::join(const Place& place, at::Device device,
                                           std::function<void(const std::string&)> lost,
                                           const std::function<void(const std::string&)>& waiting) {
  // Its warnings carry stack traces; what fails comes as an exception, too.
  setenv("TORCH_CPP_LOG_LEVEL", "FATAL", 0);
  c10::initLogging();
  std::shared_ptr<Ranks> ranks(new Ranks(place, device));
  const auto meet = [ranks, place, device, lost = std::move(lost)]() -> Status {
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
    watch.lost = lost;
    watch.seen.resize(static_cast<size_t>(place.size));
    watch.since.assign(watch.seen.size(), Watch::now());
    watch.answered = Watch::now();
    watch.pulse = std::thread([watch = ranks->watch_] { watch->run_pulse(); });
    watch.guard = std::thread([watch = ranks->watch_] { watch->run_guard(); });
    return {};
  };
  const Status joined = interruptible(meet, [&] {
    waiting(fmt::format("process {} of {} waits for the others at {}:{}", place.rank, place.size,
                        place.host, place.port));
  });
  if (!joined) {
    if (joined.error().interrupted) {
      return joined.error();
    }
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

void Ranks::any(std::span<bool> values) {
  at::Tensor counts = at::zeros({static_cast<int64_t>(values.size())}, at::kFloat);
  std::copy(values.begin(), values.end(), counts.mutable_data_ptr<float>());
  counts = counts.to(device_);
  sum(counts);
  counts = counts.to(at::kCPU);
  std::transform(counts.const_data_ptr<float>(), counts.const_data_ptr<float>() + counts.numel(),
                 values.begin(), [](float count) { return count > 0.0F; });
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
    return share.detach();
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
  // All shares but the last are as long as the first: no gaps.
  return all.narrow(0, 0, layout.rows).movedim(0, layout.dim).contiguous();
}

}  // namespace rabit::train
