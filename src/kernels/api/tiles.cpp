// Packed signs and Q8_0 from a file's order to tiles.
#include "kernels/api/kernels.h"

namespace rabit {

void tile_signs(const LinearWeights& rows, WeightOrder order, int64_t begin, int64_t end,
                uint32_t* to) {
  const int64_t words = (rows.d_in + 31) / 32;
  for (int64_t tile = begin; tile < end; ++tile) {
    const PlaceInPairs place = place_in_pairs(rows, tile);
    for (int64_t path = 0; path < rows.paths; ++path) {
      uint32_t* pairs = to + place.first + path * place.next_path;
      auto* bytes = reinterpret_cast<uint8_t*>(to + (tile * rows.paths + path) * words * kTileRows);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t row = tile * kTileRows + r;
        const uint32_t* from = rows.signs + (path * rows.d_out + row) * words;
        for (int64_t word = 0; word < words; ++word) {
          const uint32_t bits = row < rows.d_out ? from[word] : 0;
          if (order == WeightOrder::kTilePairs) {
            pairs[word * place.next_word + r] = bits;
            continue;
          }
          for (int64_t byte = 0; byte < 4; ++byte) {
            bytes[(word * 4 + byte) * kTileRows + r] = static_cast<uint8_t>(bits >> (8 * byte));
          }
        }
      }
    }
  }
}

void tile_blocks(const LinearWeights& rows, int64_t begin, int64_t end, uint8_t* to) {
  const int64_t blocks = rows.d_in / 32;
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t block = 0; block < blocks; ++block) {
      uint8_t* out = to + (tile * blocks + block) * kBlockTileBytes;
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t row = tile * kTileRows + r;
        const uint8_t* from =
            static_cast<const uint8_t*>(rows.dense) + (row * blocks + block) * kQ8BlockBytes;
        for (int64_t i = 0; i < kQ8BlockBytes; ++i) {
          const int64_t column = i - 2;
          uint8_t* byte =
              column < 0 ? out + 2 * r + i
                         : out + 2 * kTileRows + column / 4 * 4 * kTileRows + 4 * r + column % 4;
          *byte = row >= rows.d_out ? 0 : column < 0 ? from[i] : from[i] ^ 0x80U;
        }
      }
    }
  }
}

}  // namespace rabit
