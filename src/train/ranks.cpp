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
#include <cstdlib>
#include <deque>
#include <stdexcept>

#include "train/guard.h"

namespace rabit::train {
namespace {

using std::chrono::seconds;

// What the engine throws in its own words, in ours.
template <typename Body>
auto with_others(const Body& body) -> decltype(body()) {
  const auto fail = [](const std::string& what) {
    throw std::runtime_error("another process has ended or does not answer (" +
                             what.substr(0, what.find('\n')) + ")");
  };
  try {
    return body();
  } catch (const c10::Error& error) {
    fail(error.what_without_backtrace());
  } catch (const std::exception& error) {
    fail(error.what());
  }
  return body();  // not reached
}

}  // namespace

Exchange::Exchange() = default;
Exchange::Exchange(c10::intrusive_ptr<c10d::Work> work) : work_(std::move(work)) {}
Exchange::Exchange(Exchange&&) noexcept = default;
Exchange& Exchange::operator=(Exchange&&) noexcept = default;
Exchange::~Exchange() = default;

void Exchange::wait() {
  if (work_) {
    with_others([&] { return work_->wait(); });
    work_.reset();
  }
}

struct Ranks::Group {
  c10::intrusive_ptr<c10d::Store> store;  // outlives the backend
  c10::intrusive_ptr<c10d::Backend> backend;
  std::deque<std::function<void()>> pending;
};

Ranks::Ranks(Place place, at::Device device)
    : place_(std::move(place)), device_(device), group_(std::make_unique<Group>()) {}
Ranks::~Ranks() = default;

Result<std::shared_ptr<Ranks>> Ranks::join(const Place& place, at::Device device) {
  // Its warnings carry stack traces; what fails comes as an exception, too.
  setenv("TORCH_CPP_LOG_LEVEL", "FATAL", 0);
  c10::initLogging();
  std::shared_ptr<Ranks> ranks(new Ranks(place, device));
  const Status joined = without_exceptions([&]() -> Status {
    c10d::TCPStoreOptions options;
    options.port = static_cast<uint16_t>(place.port);
    options.isServer = place.first();
    options.numWorkers = static_cast<size_t>(place.size);
    options.timeout = seconds(kJoinSeconds);
    Group& group = *ranks->group_;
    group.store = c10::make_intrusive<c10d::TCPStore>(place.host, options);
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
  with_others([&] { return Exchange(group_->backend->allreduce(tensors)); }).wait();
}

void Ranks::broadcast(const at::Tensor& tensor, int from) {
  std::vector<at::Tensor> tensors = {tensor};
  c10d::BroadcastOptions options;
  options.rootRank = from;
  with_others([&] { return Exchange(group_->backend->broadcast(tensors, options)); }).wait();
}

Exchange Ranks::gather(const at::Tensor& mine, const at::Tensor& all) {
  at::Tensor in = mine, out = all;
  return with_others([&] { return Exchange(group_->backend->_allgather_base(out, in)); });
}

Exchange Ranks::sum_parts(const at::Tensor& all, const at::Tensor& mine) {
  at::Tensor in = all, out = mine;
  return with_others([&] { return Exchange(group_->backend->_reduce_scatter_base(out, in)); });
}

void Ranks::swap_parts(const at::Tensor& in, const at::Tensor& out) {
  at::Tensor from = in, to = out;
  std::vector<int64_t> equal;  // none: parts of one size
  with_others([&] {
    return Exchange(group_->backend->alltoall_base(to, from, equal, equal));
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
