// The whole pass of a few tokens in one launch, see kernels/api/gpu_decode.h.
//
// A product of packed signs takes its input as 16 planes of bits for each path: the tensor cores
// multiply bits of weights, as they lie in memory, by bits of the input, and what they count, times
// the powers of two of the planes, is the sum over the columns whose sign is +1. With Q the sum of
// all columns, sum_c s_c q_c = 2 sum_{s_c = +1} q_c - Q: integers, exact; then the row's scale, and
// the step of the input's rounding, max |h x| / 32767 over the columns of a job.
//
// Every warp copies its own pieces of weights to its own ring in shared memory, always as far ahead
// as the ring holds, over the ends of rows, matrices and phases: memory is read while blocks wait
// for each other.
#include "kernels/api/gpu_decode.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/decode_input.h"

namespace rabit::gpu {
namespace {

/// The weights that a warp reads in this launch, two pieces of 512 bytes at a time. What is to come
/// next lies in shared memory between phases, so that no register is held for it.
template <int kStages>
class Weights {
 public:
  /// Stages of what comes after a job that are asked for before it ends. More would stand before
  /// what other blocks write in the queues of memory.
  static constexpr int kEarly = kStages / 2;

  __device__ __forceinline__ Weights(const Shared& shared, int count)
      : jobs_(shared.jobs()),
        end_(count),
        ring_(shared.ring() + warp() * kStages * 64 + lane()),
        kept_(shared.kept() + warp() * kKept) {}

  /// Leaves all for go_on() to ask for.
  __device__ __forceinline__ void start() {
    job_ = 0, row_ = 0, slot_ = 0;
    if (job_ < end_) {
      row_ = jobs_[job_].row_begin + first_row(job_);
    }
    seek();
    later_ = kStages;
  }
  __device__ __forceinline__ void keep() const {
    if (lane() == 0) {
      kept_[0] = job_, kept_[1] = row_, kept_[2] = left_, kept_[3] = slot_, kept_[4] = later_;
    }
    __syncwarp();
  }
  __device__ __forceinline__ void go_on() {
    job_ = kept_[0], row_ = kept_[1], slot_ = kept_[3], later_ = kept_[4];
    const int left = kept_[2];
    if (job_ < end_) {
      begin_row();
      at_ += int64_t{left_ - left} * step_;
      left_ = left;
    }
    __syncwarp();
    slot_ = (slot_ - later_) & (kStages - 1);
#pragma unroll 1
    for (; later_ > 0; --later_) {
      ask();
    }
  }

  /// The rows of a job that the first warp takes before others change from job to job.
  static __device__ __forceinline__ int first_row(int job) {
    return (warp() + 7 * job) & (kWarps - 1);
  }

  /// Until this lane's part of the next kCount times two pieces is there.
  template <int kCount>
  __device__ __forceinline__ void await() const {
    await_copies<kStages - kCount>();
  }
  /// This lane's 16 bytes of piece `which` of the stage that is `ahead` of the next.
  __device__ __forceinline__ uint4 piece(int ahead, int which) const {
    return ring_[((slot_ + ahead) & (kStages - 1)) * 64 + which * 32];
  }
  /// As ask(), but of what comes after this job only kEarly stages; more wait for go_on().
  __device__ __forceinline__ void ask_soon(int job) {
    if (later_ > 0 || (job_ > job && ++early_ > kEarly)) {
      ++later_;
      end_copies();  // await() counts
      slot_ = (slot_ + 1) & (kStages - 1);
    } else {
      ask();
    }
  }
  /// The next stage has been used: its place is for what comes after all that was asked for.
  __device__ __forceinline__ void ask() {
    if (job_ < end_) {
      const bool half = left_ == 1 && odd_;
      copy_16(ring_ + slot_ * 64, at_);
      copy_16(ring_ + slot_ * 64 + 32, at_ + (half ? 0 : second_));
      at_ += step_;
      if (--left_ == 0) {
        row_ += kWarps;
        seek();
      }
    }
    end_copies();
    slot_ = (slot_ + 1) & (kStages - 1);
  }

 private:
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
    left_ = (job.pieces + 1) / 2;
    odd_ = job.pieces % 2 != 0;
    if (job.format == static_cast<int>(Format::kResidualBinary)) {
      at_ = base + int64_t{row_} * job.row_bytes + lane() * 16;
      second_ = 512, step_ = 1024;
    } else {
      // 8 rows of 32 columns, then the 8 below; rows beyond the last are the last.
      const int low = row_ * kTileRows + lane() / 4, last = job.d_out - 1;
      const int first = low < last ? low : last, second = low + 8 < last ? low + 8 : last;
      at_ = base + int64_t{first} * job.row_bytes + lane() % 4 * 16;
      second_ = (second - first) * job.row_bytes, step_ = 64;
    }
  }

  const Job* jobs_;
  int job_ = 0, end_, row_ = 0, left_ = 0, second_ = 0, step_ = 0, slot_ = 0, later_ = 0;
  int early_ = 0;
  bool odd_ = false;
  const char* at_ = nullptr;
  uint4* ring_;
  int* kept_;
};

/// Where rows of a job's product go: out[token * stride + row], times `factor`.
template <int kTokens>
struct Output {
  float* out;
  int64_t stride;
  bool head;  // logits, which are not tagged
  uint32_t tag;
  float factor[kTokens];

  __device__ __forceinline__ void put(float* at, float value) const {
    if (head) {
      *at = value;
    } else {
      write_tagged(at, value, tag);
    }
  }
};

/// The row scales of this lane's row of a row tile, asked for before they are used.
struct RowScales {
  uint16_t scales[kMostPaths];

  __device__ __forceinline__ void ask(const Job& job, int tile) {
    const int row = tile * kTileRows + lane() / 4 + 8 * (lane() & 1);
    const int inside = row < job.d_out ? row : job.d_out - 1;
#pragma unroll
    for (int path = 0; path < kMostPaths; ++path) {
      scales[path] =
          path < job.paths ? job.row_scale[path * int64_t{job.d_out} + inside] : uint16_t{0};
    }
  }
};

template <int kTokens, int kPaths, int kStages>
__device__ __forceinline__ void packed_rows(const Job& job, int index, const Shared& shared,
                                            Weights<kStages>& weights, RowScales scales,
                                            const Output<kTokens>& output) {
  // Column tiles that come in whole stages, and those stages.
  constexpr int kTiles = kPaths % 2 == 0 ? 1 : 2, kUsed = kTiles * kPaths / 2;
  const int tiles = job.column_end - job.column_begin;
  const int group = lane() / 4, quad = lane() % 4;
  // Of token 0, column tile 0 and path 0, where this lane's bits are.
  const uint4* const bits = shared.bits<kTokens>(job) + group * 4 + (quad ^ ((group >> 1) & 3));
#pragma unroll 1
  for (int tile = job.row_begin + Weights<kStages>::first_row(index); tile < job.row_end;
       tile += kWarps) {
    const int row = tile * kTileRows + group + 8 * (quad & 1);
    const RowScales own = scales;
    if (tile + kWarps < job.row_end) {
      scales.ask(job, tile + kWarps);
    }
    int low[kPaths][kTokens][4] = {}, high[kPaths][kTokens][4] = {};
    const uint4* input = bits;
#pragma unroll 1
    for (int column = 0; column < tiles; column += kTiles) {
      weights.template await<kUsed>();
#pragma unroll
      for (int i = 0; i < kTiles * kPaths; ++i) {
        const int path = i % kPaths, next = i / kPaths;
        uint4 signs = weights.piece(i / 2, i % 2);
        const bool there = next == 0 || column + next < tiles;
        if (!there) {
          signs = make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
          const uint4 x = input[((token * tiles + (there ? next : 0)) * kPaths + path) * 32];
          multiply_bits(low[path][token], signs, x.x, x.y, lane());
          multiply_bits(high[path][token], signs, x.z, x.w, lane());
        }
      }
      const int used = kPaths == 3 && column + 1 == tiles ? 2 : kUsed;  // stages that there are
#pragma unroll
      for (int i = 0; i < kUsed; ++i) {
        if (i < used) {
          weights.ask_soon(index);
        }
      }
      input += kTiles * kPaths * 32;
    }
    float sums[kTokens] = {};
#pragma unroll
    for (int path = 0; path < kPaths; ++path) {
      const float row_scale = half_to_float(own.scales[path]);
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        // Planes 2 quad and 2 quad + 1, and those 8 above; plane 15 counts -2^15.
        const int(&l)[4] = low[path][token];
        const int(&h)[4] = high[path][token];
        const auto place = [&](int l0, int l1, int h0, int h1) {
          return ((l0 + 2 * l1) + 256 * (h0 + (quad == 3 ? -2 : 2) * h1)) * (1 << 2 * quad);
        };
        const int upper = place(l[0], l[1], h[0], h[1]), lower = place(l[2], l[3], h[2], h[3]);
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
        output.put(output.out + token * output.stride + row, output.factor[token] * sums[token]);
      }
    }
  }
}

/// Sums of rows `row` and `row` + 8 with a token's halves and with what these left.
template <int kTokens>
__device__ __forceinline__ void put_pairs(const Job& job, const Shared& shared,
                                          const Output<kTokens>& output, int row,
                                          const float (&sums)[4]) {
  const int quad = lane() % 4;
  if (quad < kTokens) {
    const float scale = shared.scales()[quad * kMostPaths];
    float factor = 0;
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      factor = quad == token ? output.factor[token] : factor;
    }
    float* const to = output.out + quad * output.stride + row;
    if (row < job.d_out) {
      output.put(to, factor * scale * (sums[0] + sums[1]));
    }
    if (row + 8 < job.d_out) {
      output.put(to + 8, factor * scale * (sums[2] + sums[3]));
    }
  }
}

template <int kTokens, int kStages>
__device__ __forceinline__ void dense_rows(const Job& job, int index, const Shared& shared,
                                           Weights<kStages>& weights,
                                           const Output<kTokens>& output) {
  // Each token has two columns of the fragment: its halves, and what they left.
  const int columns = (job.column_end - job.column_begin) * kTileColumns;
  const int group = lane() / 4, quad = lane() % 4;
  const uint16_t* const input =
      shared.halves<kTokens>(job) + (group < 2 * kTokens ? group : 0) * (columns + 32) + quad * 8;
#pragma unroll 1
  for (int tile = job.row_begin + Weights<kStages>::first_row(index); tile < job.row_end;
       tile += kWarps) {
    float even[4] = {}, odd[4] = {};
#pragma unroll 2
    for (int step = 0; step < job.pieces / 2; ++step) {
      weights.template await<1>();
      const uint4 upper = weights.piece(0, 0), lower = weights.piece(0, 1);
      const uint4 x = *reinterpret_cast<const uint4*>(input + step * 32);
      multiply_tile(even, {upper.x, lower.x, upper.y, lower.y}, {x.x, x.y});
      multiply_tile(odd, {upper.z, lower.z, upper.w, lower.w}, {x.z, x.w});
      weights.ask();
    }
    const float sums[4] = {even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]};
    put_pairs<kTokens>(job, shared, output, tile * kTileRows + group, sums);
  }
}

/// Two products of four bytes of rows g and g + 8, as multiply_tile() has them, with halves of the
/// same columns.
__device__ __forceinline__ void multiply_bytes(float (&d)[4], uint32_t upper, uint32_t lower,
                                               uint32_t x0, uint32_t x1) {
  multiply_tile(d,
                {halves_of_bytes(upper, 0), halves_of_bytes(lower, 0), halves_of_bytes(upper, 1),
                 halves_of_bytes(lower, 1)},
                {x0, x1});
}

/// As dense_rows(), of bytes with a scale for 32 columns.
template <int kTokens, int kStages>
__device__ __forceinline__ void byte_rows(const Job& job, int index, const Shared& shared,
                                          Weights<kStages>& weights,
                                          const Output<kTokens>& output) {
  constexpr int kSteps = 4;  // of 64 columns, whose scales are read at once
  const int columns = (job.column_end - job.column_begin) * kTileColumns;
  const int group = lane() / 4, quad = lane() % 4, groups = job.pieces / 2 / kSteps;
  const uint16_t* const input =
      shared.halves<kTokens>(job) + (group < 2 * kTokens ? group : 0) * (columns + 32) + quad * 8;
  const auto scales_of = [&](int row, int at) {
    const int inside = row < job.d_out ? row : job.d_out - 1;
    return __ldg(reinterpret_cast<const uint4*>(job.row_scale + inside * int64_t{job.d_in / 32} +
                                                job.column_begin * (kTileColumns / 32)) +
                 at);
  };
  int tile = job.row_begin + Weights<kStages>::first_row(index);
  uint4 upper_scales = scales_of(tile * kTileRows + group, 0);
  uint4 lower_scales = scales_of(tile * kTileRows + group + 8, 0);
#pragma unroll 1
  for (; tile < job.row_end; tile += kWarps) {
    const int row = tile * kTileRows + group;
    float sums[4] = {};
#pragma unroll 1
    for (int part = 0; part < groups; ++part) {
      const uint32_t scales[2][kSteps] = {
          {upper_scales.x, upper_scales.y, upper_scales.z, upper_scales.w},
          {lower_scales.x, lower_scales.y, lower_scales.z, lower_scales.w}};
      // Those of what comes next, of this row tile or the next.
      const bool here = part + 1 < groups;
      const int next = here ? row : row + kWarps * kTileRows, at = here ? part + 1 : 0;
      upper_scales = scales_of(next, at);
      lower_scales = scales_of(next + 8, at);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        weights.template await<1>();
        const uint4 upper = weights.piece(0, 0), lower = weights.piece(0, 1);
        const uint16_t* const x = input + (part * kSteps + step) * 64;
        const uint4 x0 = *reinterpret_cast<const uint4*>(x);
        const uint4 x1 = *reinterpret_cast<const uint4*>(x + 32);
        float first[4] = {}, second[4] = {};
        multiply_bytes(first, upper.x, lower.x, x0.x, x0.y);
        multiply_bytes(second, upper.z, lower.z, x1.x, x1.y);
        multiply_bytes(first, upper.y, lower.y, x0.z, x0.w);
        multiply_bytes(second, upper.w, lower.w, x1.z, x1.w);
        weights.ask();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t both = scales[i / 2][step];
          sums[i] += half_to_float(static_cast<uint16_t>(both)) * first[i] +
                     half_to_float(static_cast<uint16_t>(both >> 16)) * second[i];
        }
      }
    }
    put_pairs<kTokens>(job, shared, output, row, sums);
  }
}

/// A job, once the values of its columns lie in shared memory.
template <int kTokens, int kStages>
__device__ __forceinline__ void multiply(const DecodeArgs& args, int layer, Product product,
                                         int index, const Shared& shared) {
  const Job& job = shared.jobs()[index];
  RowScales scales;
  if (job.format == static_cast<int>(Format::kResidualBinary)) {
    scales.ask(job, job.row_begin + Weights<kStages>::first_row(index));
  }
  Weights<kStages> weights(shared, shared.first()[args.products]);
  weights.go_on();
  make_operand<kTokens>(args, layer, product, job, shared);
  Output<kTokens> output;
  const bool head = product == kHead;
  const int runs = (job.column_end - job.column_begin) * kTileColumns / kRun;
  const Exchange to(args, layer);
  output.head = head;
  output.tag = to.tag;
  output.stride = head ? args.sizes.vocab : args.widths[product];
  output.out = (head ? args.logits
                     : args.outputs[product] + to.place + job.split * kTokens * output.stride) +
               job.out;
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    output.factor[token] = head ? reciprocal_root(block_squares(shared, token, runs), args) : 1.0F;
  }
  if (job.format == static_cast<int>(Format::kF16)) {
    dense_rows<kTokens>(job, index, shared, weights, output);
  } else if (job.format == static_cast<int>(Format::kQ8_0)) {
    byte_rows<kTokens>(job, index, shared, weights, output);
  } else if (job.paths == 2) {
    packed_rows<kTokens, 2>(job, index, shared, weights, scales, output);
  } else if (job.paths == 1) {
    packed_rows<kTokens, 1>(job, index, shared, weights, scales, output);
  } else if (job.paths == 3) {
    packed_rows<kTokens, 3>(job, index, shared, weights, scales, output);
  } else {
    packed_rows<kTokens, 4>(job, index, shared, weights, scales, output);
  }
  weights.keep();
}

/// Brings near what the block will read of a product beside weights and what others write: eight
/// lanes for each job, four of them for the columns' scales of a path each, the norm's weights with
/// the first, four for the rows'. By the last warp.
__device__ __forceinline__ void fetch_scales(const Shared& shared, int product) {
  const int begin = shared.first()[product], end = shared.first()[product + 1];
#pragma unroll 1
  for (int index = begin + lane() / 8; index < end; index += 4) {
    const Job& job = shared.jobs()[index];
    const int path = lane() % kMostPaths;
    const int first = job.column_begin * kTileColumns, row = job.row_begin * kTileRows;
    const int last_column = job.column_end * kTileColumns, last_row = job.row_end * kTileRows;
    const int columns = (last_column < job.d_in ? last_column : job.d_in) - first;
    const int rows = (last_row < job.d_out ? last_row : job.d_out) - row;
    if (job.format == static_cast<int>(Format::kResidualBinary) && path < job.paths) {
      const bool of_columns = lane() % 8 < kMostPaths;
      fetch_ahead(of_columns ? job.col_scale + path * int64_t{job.d_in} + first
                             : job.row_scale + path * int64_t{job.d_out} + row,
                  2 * (of_columns ? columns : rows));
    }
    if (lane() % 8 == 0 && job.norm != nullptr) {
      fetch_ahead(job.norm + first, 4 * columns);
    }
  }
}

/// Keeps blocks less than two layers apart, by thread 0 of each: nothing is written where others
/// may still read what the layer before the last left. Who is through with q, k and v has read all
/// that it needs of the layer before.
struct Pace {
  uint32_t seen = 0;

  /// At the beginning of a phase: the answer takes its time.
  __device__ __forceinline__ void ask(const DecodeArgs& args, int part) {
    if (part == 4 && threadIdx.x == 0) {
      seen = read_counter(args.counter);
    }
  }
  __device__ __forceinline__ void end_phase(const DecodeArgs& args, int layer, int part) {
    if (threadIdx.x != 0 || layer == 0) {
      return;
    }
    if (part == 0 && layer < args.sizes.layers) {
      count_up(args.counter);
    }
    if (part == 4 && layer + 1 < args.sizes.layers) {
      const uint32_t before = args.pass * static_cast<uint32_t>(args.sizes.layers - 1) * gridDim.x;
      const uint32_t goal = before + static_cast<uint32_t>(layer) * gridDim.x;
      while (static_cast<int32_t>(seen - goal) < 0) {
        seen = read_counter(args.counter);
      }
    }
  }
};

template <int kTokens, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeArgs args, int most_jobs) {
  RABIT_DYNAMIC_SHARED(memory);
  const Shared shared(memory, kStages, most_jobs, args.products);
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
  const MostParts most(sizes, kTokens);
  if (threadIdx.x < kMostDecodeTokens * kMostPaths) {
    shared.maxima()[threadIdx.x] = 0;
  }
  if (const int token = threadIdx.x; token < kTokens) {
    shared.tokens()[token] = args.tokens[token];
    shared.positions()[token] = args.positions[token];
    shared.sequences()[token] = args.sequences != nullptr ? args.sequences[token] : token;
    const Parts parts(most.count, args.positions[token]);
    shared.parts()[token] = parts.count;
    shared.lengths()[token] = parts.length;
  }
  __syncthreads();
  {
    Weights<kStages> weights(shared, shared.first()[args.products]);
    weights.start();
    weights.keep();
  }

  // What a phase's successor reads beside weights and what others write, and the cache that
  // attention reads soon.
  const auto fetch_next = [&](int phase) {
    if (phase + 1 < args.phase_end) {
      if (phase % 5 == 0) {
        fetch_cache<kTokens>(args, phase / 5, shared, most);
      }
      if (warp() == kWarps - 1) {
        fetch_scales(shared, product_of(phase + 1));
      }
    }
  };
  fetch_next(args.phase_begin);
  const bool watched = args.clocks != nullptr && blockIdx.x == 0 && threadIdx.x == 0;
  if (watched) {
    args.clocks[args.phase_begin] = clock64();
  }
  Pace pace;
  for (int phase = args.phase_begin; phase < args.phase_end; ++phase) {
    const int layer = phase / 5, part = phase % 5;
    pace.ask(args, part);
    const int from = shared.first()[product_of(phase)], to = shared.first()[product_of(phase) + 1];
    const bool head = layer == sizes.layers;
    if (part == 1 && !head) {
      if (args.keys.scales == nullptr) {
        attend<kTokens, false>(args, layer, shared, most);
      } else {
        attend<kTokens, true>(args, layer, shared, most);
      }
    } else {
      const Product product = head ? kHead : part == 0 ? kQkv : static_cast<Product>(part - 1);
#pragma unroll 1
      for (int index = from; index < to; ++index) {
        const Job& job = shared.jobs()[index];
        if (product == kOutput) {
          read_values<kTokens>(job, shared, AttendedInput<kTokens>(args, shared, layer));
        } else if (product == kDown) {
          read_values<kTokens>(job, shared, GatedInput<kTokens>(args, layer));
        } else {
          read_values<kTokens>(job, shared, StreamInput<kTokens>(args, shared, layer, product));
        }
        multiply<kTokens, kStages>(args, layer, product, index, shared);
      }
    }
    fetch_next(phase + 1);
    pace.end_phase(args, layer, part);
    if (watched) {
      args.clocks[phase + 1] = clock64();
    }
  }
}

template <int kTokens, int kStages>
int launch(const DecodeArgs& args, const DecodePlan& plan, CUstream_st* stream) {
#ifdef RABIT_CUDA_EMULATOR
  // Blocks run one after the other: if there are several, each phase in a launch of its own.
  const int together = plan.blocks == 1 ? args.phase_end - args.phase_begin : 1;
  for (int phase = args.phase_begin; phase < args.phase_end; phase += together) {
    DecodeArgs one = args;
    one.phase_begin = phase, one.phase_end = phase + together;
    const auto kernel = decode_kernel<kTokens, kStages>;
    RABIT_LAUNCH(kernel, dim3(plan.blocks), dim3(kThreads), stream, one, plan.most_jobs);
  }
  return 0;
#else
  const auto kernel = decode_kernel<kTokens, kStages>;
  const auto bytes = static_cast<int>(plan.shared_bytes);
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) {
    return status;
  }
  DecodeArgs copy = args;
  int most_jobs = plan.most_jobs;
  void* parameters[] = {&copy, &most_jobs};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(plan.blocks),
                                     dim3(kThreads), parameters, static_cast<size_t>(bytes),
                                     stream);
#endif
}

template <int kStages>
int launch_tokens(const DecodeArgs& args, const DecodePlan& plan, CUstream_st* stream) {
  return plan.tokens == 1   ? launch<1, kStages>(args, plan, stream)
         : plan.tokens == 2 ? launch<2, kStages>(args, plan, stream)
                            : launch<4, kStages>(args, plan, stream);
}

}  // namespace

int launch_decode(const DecodeArgs& args, const DecodePlan& plan, CUstream_st* stream) {
  return plan.stages == kDecodeStages ? launch_tokens<kDecodeStages>(args, plan, stream)
                                      : launch_tokens<kFewDecodeStages>(args, plan, stream);
}

}  // namespace rabit::gpu
