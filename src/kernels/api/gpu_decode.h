// A token of a decoder as one kernel on a GPU: every block of the grid stays for the whole pass and
// takes its share of each product, the weights flowing through its shared memory without a stop
// while the blocks wait for each other between phases.
//
// Phases of a layer: q, k, v; attention; output; gate and up; down; after the last, the head. A
// product's columns may be cut in splits, each summed by other blocks: what reads the product adds
// them up, in order, so that results do not depend on which block is first.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/api/gpu_weights.h"
#include "rabit/result.h"

struct CUstream_st;

namespace rabit::gpu {

inline constexpr int32_t kDecodeWarps = 16;
inline constexpr int32_t kMostDecodeTokens = 4;
/// Kilobytes of weights that a warp asks for ahead, and on GPUs of little shared memory.
inline constexpr int32_t kDecodeStages = 8;
inline constexpr int32_t kFewDecodeStages = 4;
inline constexpr int32_t kMostSplits = 16;
/// Columns that a block takes of a product at most.
inline constexpr int32_t kMostJobColumns = 8192;
/// Parts that the positions of a head are cut into.
inline constexpr int32_t kMostParts = 16;

/// Bytes of shared memory for maxima, sums and scales.
inline constexpr int32_t kDecodeSmall = 4096;

/// The products of a layer that share their input, in order, and the head.
enum Product : int32_t { kQkv, kOutput, kGateUp, kDown, kHead, kProducts };

/// Some row tiles and column tiles of a matrix: what one block does of a product.
struct alignas(16) Job {
  const void* weights = nullptr;  // of the first of its columns in the first row (tile)
  const uint16_t* row_scale = nullptr;
  const uint16_t* col_scale = nullptr;
  const float* norm = nullptr;  // (d_in) of the norm before the product; null: none
  int32_t d_out = 0, d_in = 0;
  int32_t row_begin = 0, row_end = 0;  // tiles of kTileRows
  int32_t out = 0;                     // column of the product's output where row 0 goes
  int16_t format = 0, paths = 0;
  int16_t column_begin = 0, column_end = 0;  // tiles of kTileColumns
  int16_t split = 0;                         // which of the column ranges this is
  int16_t leads = 0;                         // 1: the job that also keeps the stream of its columns
  int32_t row_bytes = 0;  // from a row to the next; of packed weights, from a row tile
  int32_t pieces = 0;     // of 512 bytes, of a row tile
};

static_assert(sizeof(Job) == 80);

/// How a decoder is shared out over a grid: made once for each number of tokens.
struct DecodePlan {
  int32_t blocks = 0;
  int32_t tokens = 0;
  int32_t splits[kProducts] = {};
  int32_t widths[kProducts] = {};  // floats of a token's output
  int32_t most_jobs = 0;           // of a block
  int64_t most_input = 0;          // bytes that a block makes of a job's inputs
  int32_t stages = 0;              // kilobytes of weights that a warp asks for ahead
  int64_t shared_bytes = 0;        // of a block
  std::vector<Job> jobs;           // by block, then in the order of products
  std::vector<int32_t> first;      // (blocks, products + 1) into `jobs`
  int32_t products() const { return static_cast<int32_t>(first.size()) / blocks - 1; }
};

/// `grid`: blocks, one a multiprocessor; `shared_limit`: bytes of shared memory that one may have;
/// `splits`: of the columns of each product, 0: as the estimate of times says. Errors: sizes that
/// the kernel does not take (widths that are no multiple of 8, heads beyond 256 wide or no multiple
/// of 8, matrices of F16 with columns that are no multiple of 32, more than the shared memory
/// holds).
Result<DecodePlan> plan_decode(const Sizes& sizes, const std::vector<Block>& blocks,
                               const Linear& head, const float* output_norm, int32_t grid,
                               int32_t tokens, int64_t shared_limit,
                               const int32_t (&splits)[kProducts]);

/// What the kernel reads and writes, all in device memory but the struct itself.
struct DecodeArgs {
  Sizes sizes;
  int32_t splits[kProducts], widths[kProducts];
  int32_t products = 0;
  int32_t group = 0;                        // query heads of a KV head
  uint32_t head_dim_inverse = 0;            // ceil(2^32 / head_dim)
  float mean_factor = 0, query_factor = 0;  // 1 / d_model; log2(e) / sqrt(head_dim)
  int32_t phase_begin = 0, phase_end = 0;   // of phases(); one launch: all
  uint32_t pass = 0;                        // launches of all phases since `work` was cleared
  const Job* jobs = nullptr;
  const int32_t* first = nullptr;
  const float* output_norm = nullptr;   // (d_model)
  const uint16_t* embedding = nullptr;  // F16 (vocab, d_model)
  const float* cos_sin = nullptr;       // (capacity, head_dim / 2, 2)
  CacheRows keys;                       // (sequences, layers, kv_heads, capacity, head_dim)
  CacheRows values;                     // as keys
  int64_t sequence_stride = 0;          // elements from one sequence's cache to the next
  int32_t capacity = 0;
  const int32_t* tokens = nullptr;     // (tokens) ids
  const int32_t* positions = nullptr;  // (tokens)
  const int32_t* sequences = nullptr;  // (tokens); null: token i is of sequence i
  // What blocks hand each other, in floats whose lowest bit says when they came (cuda/decode.h);
  // each again, for every other layer, `half` floats behind.
  int64_t half = 0;
  float* stream[2] = {};       // (tokens, d_model) each
  float* squares = nullptr;    // (2, kMostSplits, kMostDecodeTokens)
  float* outputs[kHead] = {};  // (splits, tokens, width) of each product
  float* attended = nullptr;   // (tokens, heads, kMostParts, head_dim)
  float* softmax = nullptr;    // (tokens, heads, kMostParts, 2): maximum and sum
  float* logits = nullptr;     // (tokens, vocab)
  int64_t* clocks = nullptr;  // null, or (phases + 1): a multiprocessor's clock at the phases' ends
  uint32_t* counter = nullptr;  // behind them: blocks that are through with layers, of all passes
};

/// Sets the parts of `args` that the plan decides, and points the buffers at `work`, which may be
/// null; returns how many floats of it they take. They must be zero before the first launch.
int64_t bind_decode(const Sizes& sizes, const DecodePlan& plan, float* work, DecodeArgs& args);

/// Phases of a pass.
inline int32_t decode_phases(const Sizes& sizes) { return 5 * sizes.layers + 1; }

/// Starts the pass of plan.tokens tokens, each of another sequence, on the stream, and returns what
/// CUDA says of it, 0: it started; the next needs args.pass to be one more.
int launch_decode(const DecodeArgs& args, const DecodePlan& plan, CUstream_st* stream);

}  // namespace rabit::gpu
