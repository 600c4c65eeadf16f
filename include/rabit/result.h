// Result<T>: a value or one line that says what went wrong, where, and what to do about it.
// Every operation on files, models and requests returns one; assertions are kept for our own bugs.
#pragma once

#include <cassert>
#include <string>
#include <utility>
#include <variant>

namespace rabit {

/// A failure. `message` is one line without a trailing newline.
struct Error {
  std::string message;
  bool interrupted = false;  ///< true when the user asked to stop; nothing else is wrong
};

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}
  Result(Error error) : state_(std::move(error)) {}

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }

  T& value() & { return assert(ok()), std::get<0>(state_); }
  const T& value() const& { return assert(ok()), std::get<0>(state_); }
  T&& value() && { return assert(ok()), std::get<0>(std::move(state_)); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

  const Error& error() const { return assert(!ok()), std::get<1>(state_); }

 private:
  std::variant<T, Error> state_;
};

/// The result of an operation that returns nothing when it succeeds.
template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Error error) : error_(std::move(error)), failed_(true) {}

  bool ok() const { return !failed_; }
  explicit operator bool() const { return ok(); }
  const Error& error() const { return assert(failed_), error_; }

 private:
  Error error_;
  bool failed_ = false;
};

using Status = Result<void>;

}  // namespace rabit

#define RABIT_CONCAT_INNER(a, b) a##b
#define RABIT_CONCAT(a, b) RABIT_CONCAT_INNER(a, b)

/// Evaluates a Result expression and returns its error from the enclosing function if it failed.
#define RABIT_CHECK(expr)                            \
  do {                                               \
    if (auto rabit_status = (expr); !rabit_status) { \
      return rabit_status.error();                   \
    }                                                \
  } while (0)

/// `RABIT_ASSIGN(auto x, f());` declares x as the value of f(), or returns f()'s error.
#define RABIT_ASSIGN(decl, expr) \
  RABIT_ASSIGN_INNER(RABIT_CONCAT(rabit_result_, __LINE__), decl, expr)
#define RABIT_ASSIGN_INNER(tmp, decl, expr) \
  auto tmp = (expr);                        \
  if (!tmp) {                               \
    return tmp.error();                     \
  }                                         \
  decl = std::move(tmp).value()
