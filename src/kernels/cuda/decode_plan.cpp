#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "kernels/api/gpu_decode.h"

namespace rabit::gpu {
namespace {

int32_t ceil_divide(int32_t a, int32_t b) { return (a + b - 1) / b; }

/// 512-byte pieces of a row tile over one column tile.
int32_t pieces(const Linear& linear) {
  return linear.format == Format::kResidualBinary ? linear.paths
         : linear.format == Format::kQ8_0         ? kTileColumns / 32
                                                  : kTileColumns / 16;
}

struct Shared {  // matrices that read the same input, one output after the other
  Product product;
  const float* norm;
  std::vector<const Linear*> linears;
};

std::vector<Shared> all_products(const std::vector<Block>& blocks, const Linear& head,
                                 const float* output_norm) {
  std::vector<Shared> all;
  for (const Block& block : blocks) {
    all.push_back({kQkv, block.attn_norm, {&block.q, &block.k, &block.v}});
    all.push_back({kOutput, nullptr, {&block.output}});
    all.push_back({kGateUp, block.ffn_norm, {&block.gate, &block.up}});
    all.push_back({kDown, nullptr, {&block.down}});
  }
  all.push_back({kHead, output_norm, {&head}});
  return all;
}

/// Where the job's weights lie.
void place_weights(const Linear& linear, Job& job) {
  const auto* const base = static_cast<const char*>(linear.weights);
  const int32_t tiles = job.column_end - job.column_begin;
  if (linear.format == Format::kResidualBinary) {
    job.weights = base + int64_t{job.column_begin} * linear.paths * 512;
    job.row_bytes = ceil_divide(linear.d_in, kTileColumns) * linear.paths * 512;
    job.pieces = tiles * linear.paths;
  } else {
    const int32_t bytes = linear.format == Format::kQ8_0 ? 1 : 2;  // of a value
    job.weights = base + int64_t{job.column_begin} * kTileColumns * bytes;
    job.row_bytes = linear.d_in * bytes;
    const int32_t begin = job.column_begin * kTileColumns;
    job.pieces = (std::min(job.column_end * kTileColumns, linear.d_in) - begin) / 32 * bytes;
  }
}

/// The jobs of a product by block: the columns in `splits` ranges, each to grid / splits blocks,
/// which share out the row tiles by their bytes.
std::vector<std::vector<Job>> share(const Shared& shared, int32_t grid, int32_t splits) {
  std::vector<std::vector<Job>> jobs(static_cast<size_t>(grid));
  const int32_t columns = ceil_divide(shared.linears.front()->d_in, kTileColumns);
  const int32_t members = grid / splits;
  int64_t all = 0;
  for (const Linear* linear : shared.linears) {
    all += int64_t{ceil_divide(linear->d_out, kTileRows)} * pieces(*linear);
  }
  for (int32_t split = 0; split < splits; ++split) {
    int64_t before = 0;
    int32_t out = 0;
    for (const Linear* linear : shared.linears) {
      const int32_t tiles = ceil_divide(linear->d_out, kTileRows);
      for (int32_t tile = 0; tile < tiles;) {
        const auto member = static_cast<int32_t>(before * members / all);
        Job job;
        job.row_scale = linear->row_scale;
        job.col_scale = linear->col_scale;
        job.norm = shared.norm;
        job.d_out = linear->d_out;
        job.d_in = linear->d_in;
        job.format = static_cast<int16_t>(linear->format);
        job.paths =
            static_cast<int16_t>(linear->format == Format::kResidualBinary ? linear->paths : 1);
        job.row_begin = tile;
        while (tile < tiles && before * members / all == member) {
          before += pieces(*linear);
          ++tile;
        }
        job.row_end = tile;
        job.column_begin = static_cast<int16_t>(columns * split / splits);
        job.column_end = static_cast<int16_t>(columns * (split + 1) / splits);
        job.split = static_cast<int16_t>(split);
        place_weights(*linear, job);
        job.out = out;
        auto& block = jobs[static_cast<size_t>(split * members + member)];
        job.leads = member == 0 && block.empty() ? 1 : 0;
        block.push_back(job);
      }
      out += linear->d_out;
    }
  }
  return jobs;
}

/// About how long the slowest block takes, in microseconds, as measured on an H200: reading values
/// and making their bits in rounds of all warps, row tiles in such rounds, the weights no faster
/// than memory gives them; and what others take longer to add up more splits.
double estimate(const std::vector<std::vector<Job>>& jobs, int32_t splits, int32_t tokens) {
  constexpr double kPerSplit = 0.05, kJob = 0.5, kRead = 0.4, kBits = 0.6, kRow = 0.9;
  constexpr double kKilobyte = 0.14, kFlow = 0.009;  // of a row tile; 512 bytes of all warps
  double slowest = 0;
  for (const auto& block : jobs) {
    double time = 0;
    for (const Job& job : block) {
      const int32_t inputs = (job.column_end - job.column_begin) * tokens;
      const bool packed = job.format == static_cast<int16_t>(Format::kResidualBinary);
      const int32_t rows = job.row_end - job.row_begin;
      const int32_t rounds =
          ceil_divide(packed ? 4 * inputs * ceil_divide(job.paths, 2) : 0, kDecodeWarps);
      time += kJob + kRead * ceil_divide(2 * inputs, kDecodeWarps) + kBits * rounds;
      time += std::max(kFlow * rows * job.pieces,
                       ceil_divide(rows, kDecodeWarps) * (kRow + kKilobyte * job.pieces / 2));
    }
    slowest = std::max(slowest, time);
  }
  return slowest + kPerSplit * splits;
}

/// Values of the input in F32, of packed weights for each path, and what the tensor cores take of
/// them: 16 bits a path, or two halves, rows 64 bytes apart from a multiple of 128.
int64_t input_bytes(const Job& job, int32_t tokens) {
  const int64_t columns = int64_t{job.column_end - job.column_begin} * kTileColumns;
  const bool packed = job.format == static_cast<int16_t>(Format::kResidualBinary);
  return tokens * columns * job.paths * 4 +
         (packed ? tokens * columns * job.paths * 2 : 2 * tokens * (columns + 32) * 2);
}

Status check(const Sizes& sizes, const std::vector<Shared>& all) {
  if (sizes.head_dim % 8 != 0 || sizes.head_dim > 256 || sizes.d_model % 8 != 0 ||
      sizes.d_ff % 8 != 0) {
    return Error{
        "the kernel for whole tokens takes widths of a multiple of 8 and heads of at most 256"};
  }
  for (const Shared& shared : all) {
    for (const Linear* linear : shared.linears) {
      if (linear->format == Format::kF16 && linear->d_in % 32 != 0) {
        return Error{
            "the kernel for whole tokens takes F16 matrices of a multiple of 32 columns, not " +
            std::to_string(linear->d_in)};
      }
      if (linear->format == Format::kQ8_0 && linear->d_in % kQ8Columns != 0) {
        return Error{"matrices of Q8_0 have a multiple of " + std::to_string(kQ8Columns) +
                     " columns, not " + std::to_string(linear->d_in)};
      }
    }
  }
  return {};
}

}  // namespace

Result<DecodePlan> plan_decode(const Sizes& sizes, const std::vector<Block>& blocks,
                               const Linear& head, const float* output_norm, int32_t grid,
                               int32_t tokens, int64_t shared_limit,
                               const int32_t (&splits)[kProducts]) {
  const std::vector<Shared> all = all_products(blocks, head, output_norm);
  RABIT_CHECK(check(sizes, all));
  DecodePlan plan;
  plan.blocks = grid;
  plan.tokens = tokens;
  for (const Shared& shared : all) {
    int32_t& chosen = plan.splits[shared.product];
    if (chosen == 0) {  // as in the first layer, so in all
      int32_t width = 0;
      for (const Linear* linear : shared.linears) {
        width += linear->d_out;
      }
      plan.widths[shared.product] = width;
      const int32_t columns = ceil_divide(shared.linears.front()->d_in, kTileColumns);
      // Whoever reads the logits takes one value for each.
      const int32_t most =
          shared.product == kHead ? 1 : std::min({columns, grid, int32_t{kMostSplits}});
      chosen = std::min(most, splits[shared.product]);
      double best = std::numeric_limits<double>::infinity();
      const int32_t fewest = ceil_divide(columns * kTileColumns, kMostJobColumns);
      if (fewest > most) {
        return Error{"the kernel for whole tokens takes products of at most " +
                     std::to_string(most * kMostJobColumns) + " columns here"};
      }
      for (int32_t s = fewest; s <= most && splits[shared.product] == 0; ++s) {
        if (const double time = estimate(share(shared, grid, s), s, tokens); time < best) {
          best = time;
          chosen = s;
        }
      }
      chosen = std::max(chosen, 1);
    }
  }
  std::vector<std::vector<std::vector<Job>>> jobs;  // by product, then by block
  for (const Shared& shared : all) {
    jobs.push_back(share(shared, grid, plan.splits[shared.product]));
  }
  for (int32_t block = 0; block < grid; ++block) {
    const size_t begin = plan.jobs.size();
    for (const auto& product : jobs) {
      plan.first.push_back(static_cast<int32_t>(plan.jobs.size()));
      for (const Job& job : product[static_cast<size_t>(block)]) {
        plan.most_input = std::max(plan.most_input, input_bytes(job, tokens));
        plan.jobs.push_back(job);
      }
    }
    plan.first.push_back(static_cast<int32_t>(plan.jobs.size()));
    plan.most_jobs = std::max(plan.most_jobs, static_cast<int32_t>(plan.jobs.size() - begin));
  }
  // What attention holds of one KV head: queries, the new key and value, sums of each warp.
  const int64_t group = sizes.heads / sizes.kv_heads;
  plan.most_input =
      std::max(plan.most_input,
               ((1 + kDecodeWarps) * group + 2) * sizes.head_dim * 4 + group * kDecodeWarps * 8);
  const int64_t lists = plan.most_jobs * int64_t{sizeof(Job)} + (plan.products() / 4 + 1) * 16;
  for (const int32_t stages : {kDecodeStages, kFewDecodeStages}) {
    plan.stages = stages;
    plan.shared_bytes =
        int64_t{kDecodeWarps} * stages * 1024 + lists + kDecodeSmall + plan.most_input;
    if (plan.shared_bytes <= shared_limit) {
      return plan;
    }
  }
  return Error{"the kernel for whole tokens needs " + std::to_string(plan.shared_bytes) +
               " bytes of shared memory; this GPU has " + std::to_string(shared_limit)};
}

int64_t bind_decode(const Sizes& sizes, const DecodePlan& plan, float* work, DecodeArgs& args) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* const at = work == nullptr ? nullptr : work + used;
    used += (floats + 31) / 32 * 32;
    return at;
  };
  const int64_t tokens = plan.tokens;
  args.sizes = sizes;
  args.products = plan.products();
  args.group = sizes.heads / sizes.kv_heads;
  args.head_dim_inverse = static_cast<uint32_t>((uint64_t{1} << 32) / sizes.head_dim + 1);
  args.mean_factor = 1.0F / static_cast<float>(sizes.d_model);
  args.query_factor = 1.44269504F / std::sqrt(static_cast<float>(sizes.head_dim));
  args.phase_begin = 0;
  args.phase_end = decode_phases(sizes);
  for (float*& stream : args.stream) {
    stream = take(tokens * sizes.d_model);
  }
  args.squares = take(2 * kMostSplits * kMostDecodeTokens);
  for (int32_t product = 0; product < kProducts; ++product) {
    args.splits[product] = plan.splits[product];
    args.widths[product] = plan.widths[product];
    if (product != kHead) {
      args.outputs[product] = take(plan.splits[product] * tokens * plan.widths[product]);
    }
  }
  args.attended = take(tokens * sizes.heads * kMostParts * sizes.head_dim);
  args.softmax = take(tokens * sizes.heads * kMostParts * 2);
  args.half = used;
  args.counter = work == nullptr ? nullptr : reinterpret_cast<uint32_t*>(work + 2 * used);
  return 2 * used + 1;
}

}  // namespace rabit::gpu
