// torch reports what goes wrong, running out of memory above all, by exceptions; ours is Result.
#pragma once

#include <c10/util/Exception.h>

#include <new>
#include <string>

#include "rabit/result.h"

namespace rabit::train {

/// What `body`, which returns a Status or Result, returns; an exception becomes an Error of one
/// line.
template <typename Body>
auto without_exceptions(const Body& body) -> decltype(body()) try {
  return body();
} catch (const c10::Error& error) {
  const std::string what = error.what_without_backtrace();
  return Error{"torch: " + what.substr(0, what.find('\n'))};
} catch (const std::bad_alloc&) {
  return Error{"out of memory"};
} catch (const std::exception& error) {
  return Error{error.what()};
}

}  // namespace rabit::train
