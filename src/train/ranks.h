// The processes of one run, by torch's distributed engine (c10d): Gloo between CPUs, NCCL between
// GPUs. All of them call the same operations in the same order. A process alone has no Ranks.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "rabit/result.h"
#include "train/place.h"

namespace c10d {
class Work;
}

namespace rabit::train {

class Ranks;

/// An operation under way; its tensors stay as they are until it was waited for.
class Exchange {
 public:
  Exchange(const Ranks& ranks, c10::intrusive_ptr<c10d::Work> work);
  Exchange(Exchange&&) noexcept;
  Exchange& operator=(Exchange&&) noexcept;
  ~Exchange();
  /// On a GPU the stream waits, not the host.
  void wait();

 private:
  const Ranks* ranks_ = nullptr;
  c10::intrusive_ptr<c10d::Work> work_;
};

/// Between CPUs an operation throws what without_exceptions() turns into an Error as soon as
/// another process has ended. Between GPUs it may wait for ever; but threads of each process tell
/// the others that it lives, and look whether they do.
class Ranks {
 public:
  static constexpr int kJoinSeconds = 300;
  static constexpr int kAnswerSeconds = 1800;  // a process may be that much later than another
  static constexpr int kSilentSeconds = 30;    // its sign of life may not

  /// Meets the others. device: what the tensors will be on. lost: called from another thread, once,
  /// with what to say when a process was lost and this one has not come to an end by itself soon
  /// after. Errors: they did not come.
  /// waiting: called once where that takes more than a moment. Errors: an interrupt.
  static Result<std::shared_ptr<Ranks>> join(
      const Place& place, at::Device device, std::function<void(const std::string&)> lost,
      const std::function<void(const std::string&)>& waiting);
  /// Leaves, without a reason if neither of the next two has been called: then the others end, too.
  ~Ranks();
  /// Tells the others that this process has failed, and why.
  void leave(const std::string& why);
  /// All have done what they were to do: waits for all of them, and leaves.
  void part();

  int rank() const { return place_.rank; }
  int size() const { return place_.size; }
  bool first() const { return place_.first(); }

  /// In place, over all processes; any type and sizes.
  void sum(const at::Tensor& tensor);
  /// What process `from` has, in place.
  void broadcast(const at::Tensor& tensor, int from = 0);
  /// mine (n) -> all (size * n), flat and contiguous, the processes one after the other.
  Exchange gather(const at::Tensor& mine, const at::Tensor& all);
  /// all (size * n) -> mine (n): of the sum over all processes, this one's part.
  Exchange sum_parts(const at::Tensor& all, const at::Tensor& mine);
  /// Part r of `out` (size * n) becomes part `rank()` of process r's `in`.
  void swap_parts(const at::Tensor& in, const at::Tensor& out);
  /// Which of these are true anywhere, in place.
  void any(std::span<bool> values);

  /// Work that an exchange under way holds up: done by finish(), or before, where more than `most`
  /// have come after it. So a backward pass goes on while gradients are under way.
  void later(std::function<void()> work, size_t most = 2);
  void finish();

 private:
  struct Group;
  struct Watch;
  Ranks(Place place, at::Device device);
  // What `body` returns. Throws an exception of its own in words that say which process was lost.
  template <typename Body>
  auto with_others(const Body& body) const -> decltype(body());
  friend class Exchange;

  std::shared_ptr<Watch> watch_;  // outlives the group
  Place place_;
  at::Device device_;
  std::unique_ptr<Group> group_;
};

/// Rows of a matrix that each process holds; the last ones what is left.
int64_t rows_each(int64_t rows, int size);
/// Rows [begin, begin + count).
struct RowShare {
  int64_t begin = 0, count = 0;
};
RowShare rows_of(int64_t rows, int rank, int size);

/// How a leaf of the graph lies on the processes: its rows along `dim`, `rows` in all; or, with
/// dim < 0, a copy on each.
struct LeafLayout {
  int64_t dim = -1, rows = 0;
};
/// This process's part of a tensor that is whole, and the whole of it (all processes call it).
at::Tensor share_of(const at::Tensor& whole, const LeafLayout& layout, const Ranks& ranks);
at::Tensor whole_of(const at::Tensor& share, const LeafLayout& layout, Ranks& ranks);

/// The leaves that optimizers step, in their order. Without `ranks` all are whole and here.
struct SharedLeaves {
  std::shared_ptr<Ranks> ranks;
  std::vector<LeafLayout> latents, scales;
};

}  // namespace rabit::train
