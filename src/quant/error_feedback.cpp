// Error feedback through the columns of one layer (the latent is each column as it stood
// when it was rounded). Rows are independent given U, so threads take rows. Columns go in blocks:
// inside a block each error is pushed at once, past its end all of the block's errors together,
// which reads the rest of the row once a block.

#include <algorithm>

#include "base/multiversion.h"
#include "base/threads.h"
#include "quant/peel.h"
#include "quant/residual_binary.h"

namespace rabit::quant {
namespace {

constexpr int64_t kBlock = 64;

// values[c] -= sum_j errors[j] u[j, c], c in [begin, end), j in [0, count); u's rows are `stride`
// apart.
RABIT_MULTIVERSION void push(const float* errors, const float* u, int64_t stride, int64_t count,
                             int64_t begin, int64_t end, float* values) {
  constexpr int64_t kTile = 64;
  int64_t c = begin;
  for (; c + kTile <= end; c += kTile) {
    float tile[kTile];
    for (int64_t l = 0; l < kTile; ++l) {
      tile[l] = values[c + l];
    }
    for (int64_t j = 0; j < count; ++j) {
      const float e = errors[j];
      const float* row = u + j * stride + c;
      for (int64_t l = 0; l < kTile; ++l) {
        tile[l] -= e * row[l];
      }
    }
    for (int64_t l = 0; l < kTile; ++l) {
      values[c + l] = tile[l];
    }
  }
  for (; c < end; ++c) {
    for (int64_t j = 0; j < count; ++j) {
      values[c] -= errors[j] * u[j * stride + c];
    }
  }
}

}  // namespace

void error_feedback(const Shape& shape, float* w, const Scales& scales, const float* u,
                    ThreadPool& pool) {
  const int64_t n = shape.d_in;
  pool.parallel_for(shape.d_out, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t block = 0; block < n; block += kBlock) {
      const int64_t block_end = std::min(n, block + kBlock);
      for (int64_t r = begin; r < end; ++r) {
        float* row = w + r * n;  // open columns carry the errors pushed so far
        float errors[kBlock];
        for (int64_t j = block; j < block_end; ++j) {
          float residual = row[j];
          float level = 0.0F;
          for (int64_t i = 0; i < shape.paths; ++i) {
            level += peel(residual, scales.g[i * shape.d_out + r] * scales.h[i * n + j]);
          }
          const float error = (row[j] - level) / u[j * n + j];
          errors[j - block] = error;
          for (int64_t c = j + 1; c < block_end; ++c) {
            row[c] -= error * u[j * n + c];
          }
        }
        push(errors, u + block * n, n, block_end - block, block_end, n, row);
      }
    }
  });
}

}  // namespace rabit::quant
