// What the headers of the kernels name, without a header of CUDA.
#pragma once

struct CUstream_st;

namespace rabit::cuda {

/// A cudaStream_t.
using Stream = CUstream_st*;

/// bfloat16 in the memory of a device.
struct Bf16;

}  // namespace rabit::cuda
