// Packed signs from a file's order to tiles.
#include "kernels/api/kernels.h"

namespace rabit {

void tile_signs(const LinearWeights& rows, SignOrder order, int64_t begin, int64_t end,
                uint32_t* to) {
  const int64_t words = (rows.d_in + 31) / 32;
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t path = 0; path < rows.paths; ++path) {
      uint32_t* out = to + (tile * rows.paths + path) * words * kTileRows;
      auto* bytes = reinterpret_cast<uint8_t*>(out);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t row = tile * kTileRows + r;
        const uint32_t* from = rows.signs + (path * rows.d_out + row) * words;
        for (int64_t word = 0; word < words; ++word) {
          const uint32_t bits = row < rows.d_out ? from[word] : 0;
          if (order == SignOrder::kTiles) {
            out[word * kTileRows + r] = bits;
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

}  // namespace rabit
