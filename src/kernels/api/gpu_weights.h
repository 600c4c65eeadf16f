// A decoder in the memory of a GPU: what its kernels read. Plain structs of pointers that kernels
// take by value or from device memory; no header of CUDA.
#pragma once

#include <cstdint>

namespace rabit::gpu {

/// How a linear layer's weights lie on the device.
enum class Format : int32_t {
  kF16,             // (d_out, d_in) row-major, rows 16-byte aligned, d_in a multiple of 32
  kResidualBinary,  // sign tiles, see below
  kQ8_0,            // bytes, and a scale for 32 columns of a row: see below
};

/// Signs in tiles of 16 rows and 256 columns of one path, 512 bytes, (row tiles, column tiles, k,
/// 32 lanes, 4 words). Word i of lane l holds row l/4 + 8 (i%2) of the tile and its columns
/// 32 (l%4 + 4 (i/2)) to +31, bit j column +tile_column(j), 1 = +1: the fragment that each lane
/// hands to a 16x8x256 product of bits of the tensor cores, so that a warp takes a tile by one load
/// of 16 bytes a lane; and neighbours in a pair of halves after one shift. Rows and columns beyond
/// the matrix are zero bits.
inline constexpr int32_t kTileRows = 16;
inline constexpr int32_t kTileColumns = 256;
inline constexpr int32_t kTileWords = 128;
/// Q8_0: bytes, (d_out, d_in) row-major, d_in a multiple of kQ8Columns, 16-byte aligned, and scales
/// in F16, (d_out, d_in / 32). Of each 64 columns, byte 16 q + j (q < 4, j < 8) is that of column
/// 8 q + j, byte 16 q + 8 + j that of column 32 + 8 q + j: 16 bytes are what a lane hands to
/// products of the tensor cores, each of them of one scale.
inline constexpr int32_t kQ8Columns = 256;

#ifdef __CUDACC__
#define RABIT_HOST_DEVICE __host__ __device__
#else
#define RABIT_HOST_DEVICE
#endif

/// Even columns in the lower half of a word.
RABIT_HOST_DEVICE constexpr int32_t tile_column(int32_t bit) { return 2 * (bit % 16) + bit / 16; }

struct Linear {
  Format format = Format::kF16;
  int32_t d_out = 0;
  int32_t d_in = 0;
  int32_t paths = 0;                    // kResidualBinary only (1 to 4), as the scales
  const void* weights = nullptr;        // 16-byte aligned
  const uint16_t* row_scale = nullptr;  // F16 (k, d_out); of kQ8_0 its scales
  const uint16_t* col_scale = nullptr;  // F16 (k, d_in)
};

struct Block {
  const float* attn_norm = nullptr;  // (d_model)
  const float* ffn_norm = nullptr;   // (d_model)
  Linear q, k, v, output, gate, up, down;
};

/// Keys or values of a KV cache: F16 (..., head_dim); or, where there are scales, bytes, each times
/// the scale in F16 of 32 neighbours, (..., head_dim / 32), head_dim a multiple of 32.
struct CacheRows {
  void* rows = nullptr;
  uint16_t* scales = nullptr;

  RABIT_HOST_DEVICE CacheRows from(int64_t element) const {
    return scales == nullptr
               ? CacheRows{static_cast<uint16_t*>(rows) + element, nullptr}
               : CacheRows{static_cast<int8_t*>(rows) + element, scales + element / 32};
  }
};

/// Sizes as in ModelConfig. The head dimension is even and at most 256.
struct Sizes {
  int32_t layers = 0, d_model = 0, d_ff = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0;
  float norm_epsilon = 0;
};

}  // namespace rabit::gpu
