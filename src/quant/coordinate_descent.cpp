// What follows error feedback: weights that go to another level because all others have settled,
// and latents that go with scales refitted under fixed signs.

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/multiversion.h"
#include "base/threads.h"
#include "quant/peel.h"
#include "quant/residual_binary.h"

namespace rabit::quant {
namespace {

// The level that the coupled rule gives a latent, and whether each path is positive there.
struct Level {
  float value = 0.0F;
  unsigned signs = 0;  // bit i: path i is positive
};

Level level_of(float latent, const float* p, int64_t paths) {
  Level level;
  float residual = latent;
  for (int64_t i = 0; i < paths; ++i) {
    level.signs |= residual < 0.0F ? 0U : 1U << i;
    const float signed_p = peel(residual, p[i]);
    level.value = i == 0 ? signed_p : level.value + signed_p;
  }
  return level;
}

float value_of(unsigned signs, const float* p, int64_t paths) {
  float value = (signs & 1U) != 0U ? p[0] : -p[0];
  for (int64_t i = 1; i < paths; ++i) {
    value += (signs >> i & 1U) != 0U ? p[i] : -p[i];
  }
  return value;
}

// The latents from which the coupled rule derives some signs: low <= latent < high. Empty where no
// latent gives them.
struct Cell {
  float low = -std::numeric_limits<float>::infinity();
  float high = std::numeric_limits<float>::infinity();
};

// Path i is positive from the sum of the levels before it upwards.
Cell cell_of(unsigned signs, const float* p, int64_t paths) {
  Cell cell;
  float before = 0.0F;
  for (int64_t i = 0; i < paths; ++i) {
    if ((signs >> i & 1U) != 0U) {
      cell.low = std::max(cell.low, before);
      before += p[i];
    } else {
      cell.high = std::min(cell.high, before);
      before -= p[i];
    }
  }
  return cell;
}

// A latent from which the coupled rule derives `signs`, the level itself if that is one. False
// where there is none.
bool latent_for(unsigned signs, const float* p, int64_t paths, float& latent) {
  const Cell cell = cell_of(signs, p, paths);
  latent = value_of(signs, p, paths);
  if (!(latent >= cell.low && latent < cell.high)) {
    // Finite: a level outside has bounds on both sides.
    latent = cell.low + 0.5F * (cell.high - cell.low);
  }
  return level_of(latent, p, paths).signs == signs;
}

// Magnitudes of all paths at one weight.
std::array<float, kMaxPaths> magnitudes(const Shape& s, const Scales& scales, int64_t r,
                                        int64_t c) {
  std::array<float, kMaxPaths> p{};
  for (int64_t i = 0; i < s.paths; ++i) {
    p[static_cast<size_t>(i)] = scales.g[i * s.d_out + r] * scales.h[i * s.d_in + c];
  }
  return p;
}

RABIT_MULTIVERSION void add_scaled(const float* x, float factor, int64_t n, float* __restrict y) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] += factor * x[i];
  }
}

}  // namespace

int64_t coordinate_descent(const Shape& shape, const float* moment, const Scales& scales,
                           int64_t sweeps, float* product, float* w, ThreadPool& pool) {
  const int64_t n = shape.d_in;
  std::vector<int64_t> changed(static_cast<size_t>(pool.size()), 0);
  pool.parallel_for(shape.d_out, 1, [&](int64_t begin, int64_t end, int thread) {
    int64_t count = 0;
    for (int64_t r = begin; r < end; ++r) {
      float* error_product = product + r * n;  // of this row: (t - what) H
      for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
        const int64_t before = count;
        for (int64_t c = 0; c < n; ++c) {
          const float diagonal = moment[c * n + c];
          if (diagonal <= 0.0F) {
            continue;
          }
          const auto p = magnitudes(shape, scales, r, c);
          const float now = level_of(w[r * n + c], p.data(), shape.paths).value;
          // Going to level q' changes the error by d = q - q' and the objective by
          // 2 d product_c + d^2 H_cc: least at q' = q + product_c / H_cc, whose own level is taken.
          const float wanted = now + error_product[c] / diagonal;
          const float level = level_of(wanted, p.data(), shape.paths).value;
          const float d = now - level;
          // A change below the noise of the sums is none.
          if (2.0F * d * error_product[c] + d * d * diagonal < -1e-6F * d * d * diagonal) {
            add_scaled(moment + c * n, d, n, error_product);
            w[r * n + c] = wanted;
            ++count;
          }
        }
        if (count == before) {
          break;
        }
      }
    }
    changed[static_cast<size_t>(thread)] += count;
  });
  return std::accumulate(changed.begin(), changed.end(), int64_t{0});
}

int64_t settle(const Shape& shape, std::span<const uint32_t> signs, const Scales& scales,
               float* w) {
  const int64_t words = (shape.d_in + 31) / 32;
  int64_t lost = 0;
  for (int64_t r = 0; r < shape.d_out; ++r) {
    for (int64_t c = 0; c < shape.d_in; ++c) {
      unsigned wanted = 0;
      for (int64_t i = 0; i < shape.paths; ++i) {
        wanted |= (signs[(i * shape.d_out + r) * words + c / 32] >> (c % 32) & 1U) << i;
      }
      const auto p = magnitudes(shape, scales, r, c);
      float& latent = w[r * shape.d_in + c];
      if (level_of(latent, p.data(), shape.paths).signs == wanted) {
        continue;
      }
      float other = 0.0F;
      if (latent_for(wanted, p.data(), shape.paths, other)) {
        latent = other;
      } else {
        ++lost;
      }
    }
  }
  return lost;
}

void draw_towards(const Shape& shape, const float* original, const Scales& scales, float margin,
                  float* w) {
  for (int64_t r = 0; r < shape.d_out; ++r) {
    for (int64_t c = 0; c < shape.d_in; ++c) {
      const auto p = magnitudes(shape, scales, r, c);
      float& latent = w[r * shape.d_in + c];
      const unsigned signs = level_of(latent, p.data(), shape.paths).signs;
      const Cell cell = cell_of(signs, p.data(), shape.paths);
      const float away = std::min(margin * std::abs(p[static_cast<size_t>(shape.paths - 1)]),
                                  0.5F * (cell.high - cell.low));
      const float nearest =
          std::max(cell.low + away, std::min(original[r * shape.d_in + c], cell.high - away));
      if (level_of(nearest, p.data(), shape.paths).signs == signs) {
        latent = nearest;
      }
    }
  }
}

}  // namespace rabit::quant
