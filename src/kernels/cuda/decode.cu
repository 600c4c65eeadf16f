// The whole pass of a few tokens in one launch, see kernels/api/gpu_decode.h.
//
// A product of packed signs takes its input as 16 planes of bits for each path: the tensor cores
// multiply bits of weights, as they lie in memory, by bits of the input, and what they count, times
// the powers of two of the planes, is the sum over the columns whose sign is +1. With Q the sum of
// all columns, sum_c s_c q_c = 2 sum_{s_c = +1} q_c - Q: integers, exact; then the row's scale, and
// the step of the input's rounding, max |h x| / 32767 over the columns of a job.
//
// Every warp copies its own pieces of weights to its own ring in shared memory, always `stages` - 1
// ahead, over the ends of rows, matrices and phases: memory is read while blocks wait for each
// other.
#include "kernels/api/gpu_decode.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/decode_input.h"

namespace rabit::gpu {
namespace {

/// The pieces of weights that a warp reads in this launch, in order. What is to come next lies in
/// shared memory between phases, so that no register is held for it.
class Weights {
 public:
  __device__ __forceinline__ Weights(const Shared& shared, int stages, int count)
      : jobs_(shared.jobs()),
        end_(count),
        stages_(stages),
        ring_(shared.ring() + warp() * stages * 32 + lane()),
        kept_(shared.kept() + warp() * kKept) {}

  /// Asks for the first pieces.
  __device__ __forceinline__ void start() {
    job_ = 0, row_ = 0, write_ = 0, read_ = 0;
    if (job_ < end_) {
      row_ = jobs_[job_].row_begin + first_row(job_);
    }
    seek();
#pragma unroll 1
    for (int i = 1; i < stages_; ++i) {
      issue();
    }
    next_ = read();
  }
  __device__ __forceinline__ void keep() const {
    if (lane() == 0) {
      kept_[0] = job_, kept_[1] = row_, kept_[2] = inner_left_, kept_[3] = outer_left_;
      kept_[4] = write_, kept_[5] = read_;
    }
    __syncwarp();
  }
  __device__ __forceinline__ void go_on() {
    job_ = kept_[0], row_ = kept_[1], write_ = kept_[4], read_ = kept_[5];
    if (job_ < end_) {
      begin_row();
      outer_ += (outer_left_ - kept_[3]) * outer_stride_;
      at_ = outer_ + (inner_ - kept_[2]) * inner_stride_;
      inner_left_ = kept_[2], outer_left_ = kept_[3];
    }
    // Nobody has written there since it was read.
    next_ = ring_[(read_ == 0 ? stages_ - 1 : read_ - 1) * 32];
    __syncwarp();
  }

  /// The rows of a job that the first warp takes before others change from job to job.
  static __device__ __forceinline__ int first_row(int job) { return (warp() + 7 * job) % kWarps; }

  /// This lane's 16 bytes of the next piece.
  __device__ __forceinline__ uint4 take() {
    const uint4 piece = next_;
    next_ = read();
    return piece;
  }

 private:
  __device__ __forceinline__ uint4 read() {
    issue();
    switch (stages_) {
      case 16:
        await_copies<15>();
        break;
      case 8:
        await_copies<7>();
        break;
      case 4:
        await_copies<3>();
        break;
      default:
        await_copies<1>();
        break;
    }
    const uint4 piece = ring_[read_ * 32];
    read_ = read_ + 1 == stages_ ? 0 : read_ + 1;
    return piece;
  }

  __device__ __forceinline__ void issue() {
    if (job_ < end_) {
      copy_16(ring_ + write_ * 32, at_);
      at_ += inner_stride_;
      if (--inner_left_ == 0) {
        inner_left_ = inner_;
        outer_ += outer_stride_;
        at_ = outer_;
        if (--outer_left_ == 0) {
          row_ += kWarps;
          seek();
        }
      }
    }
    end_copies();
    write_ = write_ + 1 == stages_ ? 0 : write_ + 1;
  }

  /// To this row tile, or that of the next job that has one for this warp.
  __device__ __forceinline__ void seek() {
#pragma unroll 1
    while (job_ < end_ && row_ >= jobs_[job_].row_end) {
      if (++job_ < end_) {
        row_ = jobs_[job_].row_begin + first_row(job_);
      }
    }
    if (job_ < end_) {
      begin_row();
    }
  }

  __device__ __forceinline__ void begin_row() {
    const Job& job = jobs_[job_];
    const auto* base = static_cast<const char*>(job.weights);
    if (job.format == static_cast<int>(Format::kResidualBinary)) {
      const int tiles = (job.d_in + kTileColumns - 1) / kTileColumns;
      outer_ = base + (int64_t{row_} * tiles + job.column_begin) * (job.paths * 512) + lane() * 16;
      inner_ = job.column_end - job.column_begin;
      inner_stride_ = job.paths * 512;
      outer_left_ = job.paths;
      outer_stride_ = 512;
    } else {
      // 8 rows of 32 columns, then the 8 below; rows beyond the last are the last.
      const int low = row_ * kTileRows + lane() / 4, last = job.d_out - 1;
      const int first = low < last ? low : last, second = low + 8 < last ? low + 8 : last;
      const int columns =
          job.column_end * kTileColumns < job.d_in ? job.column_end * kTileColumns : job.d_in;
      outer_ = base + (int64_t{first} * job.d_in + job.column_begin * kTileColumns) * 2 +
               lane() % 4 * 16;
      inner_ = 2;
      inner_stride_ = (second - first) * job.d_in * 2;
      outer_left_ = (columns - job.column_begin * kTileColumns) / 32;
      outer_stride_ = 64;
    }
    at_ = outer_;
    inner_left_ = inner_;
  }

  const Job* jobs_;
  int job_ = 0, end_, row_ = 0, inner_ = 0, inner_left_ = 0, outer_left_ = 0;
  int inner_stride_ = 0, outer_stride_ = 0;
  const char* at_ = nullptr;
  const char* outer_ = nullptr;
  int stages_, read_ = 0, write_ = 0;
  uint4 next_;  // read before it is asked for
  uint4* ring_;
  int* kept_;
};

/// Where rows of a job's product go: out[token * stride + row], times `factor`.
template <int kTokens>
struct Output {
  float* out;
  int64_t stride;
  float factor[kTokens];
};

template <int kTokens>
__device__ __forceinline__ void packed_rows(const Job& job, int index, const Shared& shared,
                                            Weights& weights, const Output<kTokens>& output) {
  const int tiles = job.column_end - job.column_begin, paths = job.paths;
  const int group = lane() / 4, quad = lane() % 4;
  // Of token 0, column tile 0 and path 0, where this lane's bits are.
  const uint4* const bits = shared.bits<kTokens>(job) + group * 4 + (quad ^ ((group >> 1) & 3));
  for (int tile = job.row_begin + Weights::first_row(index); tile < job.row_end; tile += kWarps) {
    const int row = tile * kTileRows + group + 8 * (quad & 1);
    const int scaled = row < job.d_out ? row : job.d_out - 1;
    float sums[kTokens] = {};
#pragma unroll 1
    for (int path = 0; path < paths; ++path) {
      const float row_scale = from_half(job.row_scale[path * int64_t{job.d_out} + scaled]);
      int low[kTokens][4] = {}, high[kTokens][4] = {};
      const uint4* input = bits + path * 32;
      const int next = paths * 32, other = tiles * next;  // column tile, token
      if constexpr (kTokens == 1) {
        // Sums of two tiles, so that each waits less for the last.
        int low2[4] = {}, high2[4] = {};
#pragma unroll 1
        for (int column = 0; column < tiles; column += 2) {
          const int count = column + 1 < tiles ? 2 : 1;
          uint4 signs = make_uint4(0, 0, 0, 0), signs2 = signs;
#pragma unroll 1
          for (int i = 0; i < count; ++i) {
            signs = signs2;
            signs2 = weights.take();
          }
          const uint4 x = input[0], x2 = input[count == 2 ? next : 0];
          input += 2 * next;
          multiply_bits(low[0], signs, x.x, x.y, lane());
          multiply_bits(high[0], signs, x.z, x.w, lane());
          multiply_bits(low2, signs2, x2.x, x2.y, lane());
          multiply_bits(high2, signs2, x2.z, x2.w, lane());
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          low[0][i] += low2[i], high[0][i] += high2[i];
        }
      } else {
#pragma unroll 1
        for (int column = 0; column < tiles; ++column) {
          const uint4 signs = weights.take();
#pragma unroll
          for (int token = 0; token < kTokens; ++token) {
            const uint4 x = input[token * other];
            multiply_bits(low[token], signs, x.x, x.y, lane());
            multiply_bits(high[token], signs, x.z, x.w, lane());
          }
          input += next;
        }
      }
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        // Planes 2 quad and 2 quad + 1, and those 8 above; plane 15 counts -2^15.
        const auto place = [&](int l0, int l1, int h0, int h1) {
          return ((l0 + 2 * l1) + 256 * (h0 + (quad == 3 ? -2 : 2) * h1)) * (1 << 2 * quad);
        };
        const int upper = place(low[token][0], low[token][1], high[token][0], high[token][1]);
        const int lower = place(low[token][2], low[token][3], high[token][2], high[token][3]);
        int sum = (quad & 1) != 0 ? lower : upper;
        sum += __shfl_xor_sync(kAllLanes, (quad & 1) != 0 ? upper : lower, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        const int signed_sum = 2 * sum - shared.totals()[token * kMostPaths + path];
        sums[token] +=
            row_scale * shared.scales()[token * kMostPaths + path] * static_cast<float>(signed_sum);
      }
    }
    if (quad < 2 && row < job.d_out) {
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        output.out[token * output.stride + row] = output.factor[token] * sums[token];
      }
    }
  }
}

template <int kTokens>
__device__ __forceinline__ void dense_rows(const Job& job, int index, const Shared& shared,
                                           Weights& weights, const Output<kTokens>& output) {
  constexpr bool kSplit = kTokens <= 4;  // each token two columns: its halves, and what they left
  constexpr int kUsed = kSplit ? 2 * kTokens : kTokens;
  const int columns = (job.column_end - job.column_begin) * kTileColumns;
  const int end =
      job.column_end * kTileColumns < job.d_in ? job.column_end * kTileColumns : job.d_in;
  const int steps = (end - job.column_begin * kTileColumns) / 32;
  const int group = lane() / 4, quad = lane() % 4;
  const uint16_t* const input =
      shared.halves<kTokens>(job) + (group < kUsed ? group : 0) * (columns + 32) + quad * 8;
  for (int tile = job.row_begin + Weights::first_row(index); tile < job.row_end; tile += kWarps) {
    float even[4] = {}, odd[4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      uint4 upper = make_uint4(0, 0, 0, 0), lower = upper;
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        upper = lower;
        lower = weights.take();
      }
      const uint4 x = *reinterpret_cast<const uint4*>(input + step * 32);
      multiply_halves(even, upper.x, lower.x, upper.y, lower.y, x.x, x.y, lane());
      multiply_halves(odd, upper.z, lower.z, upper.w, lower.w, x.z, x.w, lane());
    }
    const int row = tile * kTileRows + group;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float a = even[2 * half] + odd[2 * half], b = even[2 * half + 1] + odd[2 * half + 1];
      if (row + 8 * half < job.d_out) {
        float* const to = output.out + row + 8 * half;
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          const float scale = output.factor[token] * shared.scales()[token * kMostPaths];
          if (kSplit && quad == token) {
            to[token * output.stride] = scale * (a + b);
          } else if (!kSplit && quad == token / 2) {
            to[token * output.stride] = scale * (token % 2 == 0 ? a : b);
          }
        }
      }
    }
  }
}

/// A job, once the values of its columns lie in shared memory.
template <int kTokens>
__device__ __forceinline__ void multiply(const DecodeArgs& args, Product product, int index,
                                         const Shared& shared, int stages) {
  const Job& job = shared.jobs()[index];
  make_operand<kTokens>(args, product, job, shared);
  Weights weights(shared, stages, shared.first()[args.products]);
  weights.go_on();
  Output<kTokens> output;
  const bool head = product == kHead;
  const int runs = (job.column_end - job.column_begin) * kTileColumns / kRun;
  output.stride = head ? args.sizes.vocab : args.widths[product];
  output.out =
      (head ? args.logits : args.outputs[product] + job.split * kTokens * output.stride) + job.out;
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    output.factor[token] =
        head ? reciprocal_root(block_squares(shared, token, runs), args.sizes) : 1.0F;
  }
  if (job.format == static_cast<int>(Format::kResidualBinary)) {
    packed_rows<kTokens>(job, index, shared, weights, output);
  } else {
    dense_rows<kTokens>(job, index, shared, weights, output);
  }
  weights.keep();
}

/// Brings near what the block will read of a product beside weights and what others write.
__device__ __forceinline__ void fetch_scales(const Shared& shared, int product) {
  constexpr int kLine = 128;
  const auto fetch = [](const void* at, int bytes) {
#pragma unroll 1
    for (int i = lane() * kLine; i < bytes; i += 32 * kLine) {
      fetch_ahead(static_cast<const char*>(at) + i);
    }
  };
#pragma unroll 1
  for (int index = shared.first()[product]; index < shared.first()[product + 1]; ++index) {
    const Job& job = shared.jobs()[index];
    const int first = job.column_begin * kTileColumns, row = job.row_begin * kTileRows;
    const int end =
        job.column_end * kTileColumns < job.d_in ? job.column_end * kTileColumns : job.d_in;
    const int last = job.row_end * kTileRows < job.d_out ? job.row_end * kTileRows : job.d_out;
    if (job.format == static_cast<int>(Format::kResidualBinary)) {
      if (const int path = warp() % kMostPaths; path < job.paths && warp() < kMostPaths) {
        fetch(job.col_scale + path * int64_t{job.d_in} + first, 2 * (end - first));
      } else if (path < job.paths && warp() < 2 * kMostPaths) {
        fetch(job.row_scale + path * int64_t{job.d_out} + row, 2 * (last - row));
      }
    }
    if (warp() >= 2 * kMostPaths && job.norm != nullptr) {
      const int begin = first + (warp() - 2 * kMostPaths) * kTileColumns;
#pragma unroll 1
      for (int at = begin; at < end; at += (kWarps - 2 * kMostPaths) * kTileColumns) {
        fetch(job.norm + at, 4 * (end - at < kTileColumns ? end - at : kTileColumns));
      }
    }
  }
}

/// All blocks have come here, and what they wrote can be read.
__device__ __forceinline__ void wait_for_grid(uint32_t* counter, uint32_t goal) {
  __syncthreads();
#if defined(__CUDA_ARCH__)
  if (threadIdx.x == 0) {
#if __CUDA_ARCH__ >= 700
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
    uint32_t now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (static_cast<int32_t>(now - goal) < 0);
#endif
  }
  __syncthreads();
#else
  (void)counter, (void)goal;
#endif
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeArgs args, int stages, int most_jobs) {
  RABIT_DYNAMIC_SHARED(memory);
  const Shared shared(memory, stages, most_jobs, args.products);
  const Sizes& sizes = args.sizes;
  const auto product_of = [&](int phase) {  // or of the next phase that has one
    return phase / 5 * 4 + (phase % 5 < 2 ? phase % 5 : phase % 5 - 1);
  };
  const int* const first = args.first + blockIdx.x * (args.products + 1);
  const int begin = first[product_of(args.phase_begin)];
  const int end = first[product_of(args.phase_end)];
  constexpr int kWords = sizeof(Job) / sizeof(uint4);
  for (int i = threadIdx.x; i < (end - begin) * kWords; i += kThreads) {
    reinterpret_cast<uint4*>(shared.jobs())[i] =
        reinterpret_cast<const uint4*>(args.jobs + begin)[i];
  }
  for (int i = threadIdx.x; i <= args.products; i += kThreads) {
    shared.first()[i] = (first[i] < end ? first[i] : end) - begin;
  }
  if (const int token = threadIdx.x; token < kTokens) {
    shared.tokens()[token] = args.tokens[token];
    shared.positions()[token] = args.positions[token];
    shared.sequences()[token] = args.sequences != nullptr ? args.sequences[token] : token;
  }
  __syncthreads();
  {
    Weights weights(shared, stages, shared.first()[args.products]);
    weights.start();
    weights.keep();
  }

  const bool watched = args.clocks != nullptr && blockIdx.x == 0 && threadIdx.x == 0;
  if (watched) {
    args.clocks[args.phase_begin] = clock64();
  }
  for (int phase = args.phase_begin; phase < args.phase_end; ++phase) {
    const int layer = phase / 5, part = phase % 5;
    const int from = shared.first()[product_of(phase)], to = shared.first()[product_of(phase) + 1];
    if (phase + 1 < args.phase_end) {
      if (part == 0 && layer < sizes.layers) {
        fetch_cache<kTokens>(args, layer, shared);
      }
      fetch_scales(shared, product_of(phase + 1));
    }
    const bool head = layer == sizes.layers;
    if (part == 1 && !head) {
      attend<kTokens>(args, layer, shared);
    } else {
      const Product product = head ? kHead : part == 0 ? kQkv : static_cast<Product>(part - 1);
#pragma unroll 1
      for (int index = from; index < to; ++index) {
        const Job& job = shared.jobs()[index];
        if (index > from) {
          __syncthreads();  // the last job's input has been read
        }
        if (product == kOutput) {
          read_values<kTokens>(job, shared, AttendedInput<kTokens>(args, shared));
        } else if (product == kDown) {
          read_values<kTokens>(job, shared, GatedInput<kTokens>(args));
        } else {
          read_values<kTokens>(job, shared,
                               StreamInput<kTokens>(args, shared, phase == 0, product));
        }
        multiply<kTokens>(args, product, index, shared, stages);
      }
    }
    if (phase + 1 < args.phase_end) {
      wait_for_grid(args.barrier, args.barrier_start + (phase - args.phase_begin + 1) * gridDim.x);
    }
    if (watched) {
      args.clocks[phase + 1] = clock64();
    }
  }
}

template <int kTokens>
int launch(const DecodeArgs& args, const DecodePlan& plan, CUstream_st* stream) {
#ifdef RABIT_CUDA_EMULATOR
  // Blocks run one after the other: each phase in a launch of its own.
  for (int phase = args.phase_begin; phase < args.phase_end; ++phase) {
    DecodeArgs one = args;
    one.phase_begin = phase, one.phase_end = phase + 1;
    RABIT_LAUNCH(decode_kernel<kTokens>, dim3(plan.blocks), dim3(kThreads), stream, one,
                 plan.stages, plan.most_jobs);
  }
  return 0;
#else
  const auto kernel = decode_kernel<kTokens>;
  const auto bytes = static_cast<int>(plan.shared_bytes);
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) {
    return status;
  }
  DecodeArgs copy = args;
  int stages = plan.stages, most_jobs = plan.most_jobs;
  void* parameters[] = {&copy, &stages, &most_jobs};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(plan.blocks),
                                     dim3(kThreads), parameters, static_cast<size_t>(bytes),
                                     stream);
#endif
}

}  // namespace

int launch_decode(const DecodeArgs& args, const DecodePlan& plan, CUstream_st* stream) {
  switch (plan.tokens) {
    case 1:
      return launch<1>(args, plan, stream);
    case 2:
      return launch<2>(args, plan, stream);
    case 4:
      return launch<4>(args, plan, stream);
    default:
      return launch<8>(args, plan, stream);
  }
}

}  // namespace rabit::gpu
