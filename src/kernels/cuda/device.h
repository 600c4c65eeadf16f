// What device.cpp needs of the kernels' sources.
#pragma once

#include <cstdint>

#include "kernels/api/gpu.h"

namespace rabit::gpu {

/// Whether this build has code for the device at hand.
bool code_fits();

/// Whether its tensor cores take products of warpgroups, and this build has code for them.
bool has_warpgroups();

/// Reads all bytes once, a multiple of 16. out: one word, written if at all.
Status start_reading(const void* data, int64_t bytes, uint32_t* out, Stream stream);

}  // namespace rabit::gpu
