// One table of operations that a backend fills in. Kernels take raw pointers and sizes, allocate
// nothing and never fail; callers split work over threads by row, head or token ranges, which write
// to disjoint places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace rabit {

/// kQ8_0, kQ4_0: blocks of 32 columns as GGUF has them, d_in a multiple of 32.
enum class WeightFormat { kF32, kF16, kQ8_0, kQ4_0, kResidualBinary };

/// How packed signs lie, words = ceil(d_in/32) of 32 columns. kRows: as in a file, (k, d_out,
/// words). The others cut the rows in tiles, the last filled up with rows of zeros, and let a
/// product go straight through memory. kTilePairs: (ceil(d_out/(2 kTileRows)), k, words, 2
/// kTileRows), so that a register takes the words of neighbouring rows; a last tile without a
/// partner is (k, words, kTileRows). See PlaceInPairs. kByteTiles: (ceil(d_out/kTileRows), k,
/// words, 4, kTileRows) bytes, those of a word lowest first, so that a register takes the same
/// eight columns of neighbouring rows.
///
/// Q8_0 has kRows and kTiles: (ceil(d_out/kTileRows), d_in/32) tiles of kBlockTileBytes, each
/// the scales of its rows (kTileRows), then 4 columns of all rows, the next 4, and so on, (8,
/// kTileRows, 4), with 128 added to each value; rows beyond d_out zero, scales too.
enum class WeightOrder { kRows, kTiles, kTilePairs, kByteTiles };
inline constexpr int64_t kTileRows = 64;
[[gnu::always_inline]] constexpr int64_t sign_tiles(int64_t d_out) {
  return (d_out + kTileRows - 1) / kTileRows;
}

/// Bytes of a block of 32 columns: a scale in F16, then whole or half bytes.
inline constexpr int64_t kQ8BlockBytes = 34, kQ4BlockBytes = 18;
inline constexpr int64_t kBlockTileBytes = kQ8BlockBytes * kTileRows;

/// A linear layer's weights as they lie in memory, (d_out, d_in) row-major. F16 weights and all
/// scales must be finite: kernels may decode an infinity or a NaN as some finite number.
struct LinearWeights {
  WeightFormat format = WeightFormat::kF32;
  int64_t d_out = 0;
  int64_t d_in = 0;
  int64_t paths = 0;  // kResidualBinary only (1 to 4), as all below but `dense` and `order`
  const void* dense = nullptr;             // float, F16 or blocks, (d_out, d_in)
  const uint32_t* signs = nullptr;         // bits: see quant/residual_binary.h
  const uint16_t* row_scale = nullptr;     // F16 (k, d_out)
  const uint16_t* col_scale = nullptr;     // F16 (k, d_in)
  WeightOrder order = WeightOrder::kRows;  // of kResidualBinary and kQ8_0
};

/// Where a tile's signs lie in kTilePairs order: the word of its first row, path 0 and columns 0 to
/// 31, and how far it is from there to the next 32 columns and to the next path, in words.
struct PlaceInPairs {
  int64_t first, next_word, next_path;
};
[[gnu::always_inline]] constexpr PlaceInPairs place_in_pairs(const LinearWeights& w, int64_t tile) {
  const int64_t words = (w.d_in + 31) / 32;
  const bool paired = (tile | 1) < sign_tiles(w.d_out);
  const int64_t rows = paired ? 2 * kTileRows : kTileRows;
  return {.first = (tile & ~int64_t{1}) * kTileRows * w.paths * words + (tile & 1) * kTileRows,
          .next_word = rows,
          .next_path = words * rows};
}

/// Largest head_dim that attention takes.
inline constexpr int64_t kMaxHeadDim = 256;

/// Positions that are best for one part of an attention.
inline constexpr int64_t kPartPositions = 768;

/// Type of the KV cache. F32 keeps the logits at float accuracy (with F32 weights, within 1e-4 of
/// their norm). Q8_0: blocks of 32 as GGUF has them, head_dim a multiple of 32.
enum class CacheFormat { kF16, kF32, kQ8_0 };
[[gnu::always_inline]] constexpr int64_t cache_bytes(CacheFormat format, int64_t values) {
  return format == CacheFormat::kF32   ? 4 * values
         : format == CacheFormat::kF16 ? 2 * values
                                       : values / 32 * kQ8BlockBytes;
}

/// One causal attention: queries at positions first_position + t over cached keys and values.
/// Query head i reads KV head i / (heads / kv_heads).
struct AttentionInput {
  const float* q = nullptr;  // (tokens, heads, head_dim)
  CacheFormat cache = CacheFormat::kF16;
  const void* k = nullptr;  // (kv_heads, capacity, head_dim), filled to the last query's position
  const void* v = nullptr;  // as k
  int64_t tokens = 0;
  int64_t first_position = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;  // even, at most kMaxHeadDim
  int64_t capacity = 0;
};

struct KernelTable {
  std::string_view name;

  /// The order of packed signs, and of Q8_0, that matmul takes, tiles 64-byte aligned. The
  /// reference takes signs in every order.
  WeightOrder sign_order;
  WeightOrder block_order;
  /// Bytes that prepare() makes of the input of a product with weights of this format, d_in and
  /// paths, those of a token one after the other; 0: matmul reads x alone, of any number of tokens.
  int64_t (*input_bytes)(const LinearWeights& w, int64_t tokens);
  /// Tokens that are best to go together where there is such an input; any number may.
  int64_t group_tokens;
  /// Makes what matmul reads beside x, its part for words
  /// [word_begin, word_end) of the columns; threads may share the words (32 columns each). x:
  /// (tokens, d_in); input: 64-byte aligned. Null where input_bytes() is 0 for all sizes.
  void (*prepare)(const LinearWeights& w, const float* x, int64_t tokens, void* input,
                  int64_t word_begin, int64_t word_end);
  /// y[t, r] = sum_c W[r, c] x[t, c] for rows [row_begin, row_end) of all tokens.
  /// x: (tokens, d_in); y: (tokens, d_out), only columns [row_begin, row_end) written.
  /// `input`: as prepare() made it for all words; null where input_bytes() is 0. Else null is sums
  /// of floats, as accurate as those of other tables and slower, but for Q8_0 in tiles, which needs
  /// it. `scratch`: this thread's own, matmul_scratch() floats, 64-byte aligned; not used with
  /// `input`.
  void (*matmul)(const LinearWeights& w, const float* x, const void* input, int64_t tokens,
                 float* y, int64_t row_begin, int64_t row_end, float* scratch);
  /// Floats of scratch that matmul needs for any call with at most d_in columns, `tokens` tokens
  /// and `paths` paths (0 for dense weights).
  int64_t (*matmul_scratch)(int64_t d_in, int64_t tokens, int64_t paths);
  /// Rows that one thread's range should be a multiple of; other ranges are slower, not wrong.
  int64_t matmul_row_grain;

  /// y[t, :] = x[t, :] / sqrt(mean(x[t, :]^2) + epsilon) * weight. x, y: (tokens, d); may be equal.
  void (*rms_norm)(const float* x, const float* weight, int64_t tokens, int64_t d, float epsilon,
                   float* y);
  /// In place on x (tokens, heads, head_dim): pairs (2i, 2i+1) of each head, GGUF's interleaved
  /// order for "llama", turned by angle position * theta^(-2i/head_dim); cos_sin holds, for each
  /// token, head_dim/2 pairs (cos, sin).
  void (*rope)(float* x, const float* cos_sin, int64_t tokens, int64_t heads, int64_t head_dim);
  /// Values as the cache holds them, `count` of them; for Q8_0 a multiple of 32: scale
  /// F16(max |x| / 127), x / scale to the nearest integer. A block with a value that is not finite
  /// becomes NaN.
  void (*to_cache)(const float* from, int64_t count, CacheFormat format, void* to);
  /// softmax(q k^T / sqrt(head_dim)) v for query heads [head_begin, head_end) of tokens
  /// [token_begin, token_end). out: (tokens, heads, head_dim), only those heads and tokens written.
  /// `scratch`: this thread's own, attention_scratch() floats, 64-byte aligned.
  void (*attention)(const AttentionInput& in, int64_t head_begin, int64_t head_end,
                    int64_t token_begin, int64_t token_end, float* scratch, float* out);
  /// The same for all tokens over positions [position_begin, position_end) alone, and what weighs
  /// it against other positions. state: (tokens, heads, 2), the largest score and the sum of all
  /// exp(score - largest); a token that sees none of them has zeros and the state (-infinity, 0).
  void (*attention_part)(const AttentionInput& in, int64_t head_begin, int64_t head_end,
                         int64_t position_begin, int64_t position_end, float* scratch, float* out,
                         float* state);
  /// attention() of all tokens from parts that are all positions together. outs: (parts, tokens,
  /// heads, head_dim); states: (parts, tokens, heads, 2).
  void (*merge_parts)(const AttentionInput& in, int64_t head_begin, int64_t head_end, int64_t parts,
                      const float* outs, const float* states, float* out);
  /// Floats of scratch for `tokens` tokens whose last query sees `positions` positions.
  int64_t (*attention_scratch)(int64_t tokens, int64_t positions, int64_t heads, int64_t kv_heads,
                               int64_t head_dim);
  /// Tokens that one thread's range of an attention should be a multiple of.
  int64_t attention_token_grain;
  /// gate[i] = silu(gate[i]) * up[i].
  void (*swiglu)(float* gate, const float* up, int64_t count);
  /// -log softmax(logits)[target] in nats, summed in double. logits: (vocab). Not finite if a logit
  /// is NaN or +infinity.
  double (*cross_entropy)(const float* logits, int64_t vocab, int32_t target);
};

/// Tiles [begin, end) of signs in `order`, kTilePairs or kByteTiles, from weights in kRows order.
/// `to`: the first of all tiles.
void tile_signs(const LinearWeights& rows, WeightOrder order, int64_t begin, int64_t end,
                uint32_t* to);
/// The same of Q8_0 in kTiles.
void tile_blocks(const LinearWeights& rows, int64_t begin, int64_t end, uint8_t* to);

/// The scalar reference: plain loops, sums in double. The oracle of every other table.
const KernelTable& reference_kernels();

/// Products by lookup, compiled once per instruction set that has the shuffles, then portable
/// vector code, once per instruction set that the compiler targets here. Best first; every entry
/// runs on this machine.
std::vector<const KernelTable*> cpu_kernels();

}  // namespace rabit
