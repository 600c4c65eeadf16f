// Scales for a given weight: greedy and Gauss-Seidel SVID, then alternating least squares under the
// signs that the coupled forward derives. Works on W' = diag(s_out) W diag(s_in) and maps the
// scales back; positive factors change no sign, so the coupled forward of W' and of W agree.

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/multiversion.h"
#include "base/threads.h"
#include "quant/residual_binary.h"

namespace rabit::quant {
namespace {

// |R| is positive: its leading factor converges in a few steps, and in fewer from the last sweep's.
constexpr int kPowerSteps = 8;
constexpr int kWarmPowerSteps = 2;
constexpr double kRidge = 1e-6;  // of the k x k normal equations' mean diagonal
constexpr int64_t kLanes = 16;

RABIT_MULTIVERSION float dot_abs(const float* a, const float* b, int64_t n) {
  float lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      lanes[l] += __builtin_fabsf(a[c + l]) * b[c + l];
    }
  }
  float sum = 0.0F;
  for (; c < n; ++c) {
    sum += __builtin_fabsf(a[c]) * b[c];
  }
  for (const float lane : lanes) {
    sum += lane;
  }
  return sum;
}

RABIT_MULTIVERSION void add_scaled_abs(const float* a, float factor, int64_t n,
                                       float* __restrict sum) {
  for (int64_t c = 0; c < n; ++c) {
    sum[c] += __builtin_fabsf(a[c]) * factor;
  }
}

double squared_norm(const float* v, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    sum += static_cast<double>(v[i]) * v[i];
  }
  return sum;
}

// Best rank-1 factors (g, h) of |R| (d_out, d_in) in the least-squares sense, by power iteration
// from the row means or, `warm`, from the g given.
void rank_one(int64_t d_out, int64_t d_in, const float* r, bool warm, float* g, float* h) {
  if (!warm) {
    const std::vector<float> ones(static_cast<size_t>(d_in), 1.0F);
    for (int64_t row = 0; row < d_out; ++row) {
      g[row] = dot_abs(r + row * d_in, ones.data(), d_in) / static_cast<float>(d_in);
    }
  }
  for (int step = 0; step < (warm ? kWarmPowerSteps : kPowerSteps); ++step) {
    const double g_norm = squared_norm(g, d_out);
    std::fill(h, h + d_in, 0.0F);
    if (g_norm == 0.0) {
      std::fill(g, g + d_out, 0.0F);
      return;  // nothing left to explain
    }
    for (int64_t row = 0; row < d_out; ++row) {
      add_scaled_abs(r + row * d_in, static_cast<float>(g[row] / g_norm), d_in, h);
    }
    const double h_norm = squared_norm(h, d_in);
    if (h_norm == 0.0) {
      std::fill(g, g + d_out, 0.0F);
      return;
    }
    for (int64_t row = 0; row < d_out; ++row) {
      g[row] = static_cast<float>(dot_abs(r + row * d_in, h, d_in) / h_norm);
    }
  }
}

// r += factor diag(g) b diag(h), b the signs. (d_out, d_in)
RABIT_MULTIVERSION void add_path(int64_t d_out, int64_t d_in, const float* b, const float* g,
                                 const float* h, float factor, float* __restrict r) {
  for (int64_t row = 0; row < d_out; ++row) {
    const float scale = factor * g[row];
    for (int64_t c = 0; c < d_in; ++c) {
      r[row * d_in + c] += scale * h[c] * b[row * d_in + c];
    }
  }
}

Scales zero_scales(const Shape& s) {
  return {std::vector<float>(static_cast<size_t>(s.paths * s.d_out), 0.0F),
          std::vector<float>(static_cast<size_t>(s.paths * s.d_in), 0.0F)};
}

// Solves the symmetric k x k system in place by elimination with a small ridge; b becomes x.
void solve_small(int64_t k, double a[kMaxPaths][kMaxPaths], double b[kMaxPaths]) {
  double mean = 0.0;
  for (int64_t i = 0; i < k; ++i) {
    mean += a[i][i] / static_cast<double>(k);
  }
  for (int64_t i = 0; i < k; ++i) {
    a[i][i] += kRidge * mean + 1e-30;
  }
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = i + 1; j < k; ++j) {
      const double factor = a[j][i] / a[i][i];
      for (int64_t c = i; c < k; ++c) {
        a[j][c] -= factor * a[i][c];
      }
      b[j] -= factor * b[i];
    }
  }
  for (int64_t i = k - 1; i >= 0; --i) {
    for (int64_t c = i + 1; c < k; ++c) {
      b[i] -= a[i][c] * b[c];
    }
    b[i] /= a[i][i];
  }
}

// Sums for the normal equations of one row (of g) and, added, of all columns (of h), with the signs
// of the coupled forward under the scales `old`. Pair (i, j) of paths, i <= j, has the sign product
// B_i B_j; index i * k + j.
template <int kPaths>
RABIT_MULTIVERSION void row_sums(const Shape& s, const float* row, const Scales& old, int64_t r,
                                 float* sign_rows, float row_gram[kPaths * kPaths],
                                 float row_rhs[kPaths]) {
  float gram[kPaths * kPaths][kLanes] = {};
  float rhs[kPaths][kLanes] = {};
  for (int64_t base = 0; base < s.d_in; base += kLanes) {
    const int64_t width = base + kLanes <= s.d_in ? kLanes : s.d_in - base;
    // Padding lanes hold zeros, which add nothing.
    float value[kLanes] = {}, residual[kLanes], signed_h[kPaths][kLanes] = {};
    for (int64_t l = 0; l < width; ++l) {
      value[l] = row[base + l];
    }
    for (int64_t l = 0; l < kLanes; ++l) {
      residual[l] = value[l];
    }
    for (int i = 0; i < kPaths; ++i) {
      const float gi = old.g[i * s.d_out + r];
      const float* hi = old.h.data() + i * s.d_in + base;
      float sign[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        sign[l] = residual[l] < 0.0F ? -1.0F : 1.0F;
      }
      if (width == kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) {
          signed_h[i][l] = sign[l] * hi[l];
        }
      } else {
        for (int64_t l = 0; l < width; ++l) {
          signed_h[i][l] = sign[l] * hi[l];
        }
      }
      float* signs_out = sign_rows + i * s.d_in + base;
      for (int64_t l = 0; l < width; ++l) {
        signs_out[l] = sign[l];
      }
      for (int64_t l = 0; l < kLanes; ++l) {
        residual[l] -= gi * signed_h[i][l];
        rhs[i][l] += value[l] * signed_h[i][l];
      }
    }
    for (int i = 0; i < kPaths; ++i) {
      for (int j = i; j < kPaths; ++j) {
        for (int64_t l = 0; l < kLanes; ++l) {
          gram[i * kPaths + j][l] += signed_h[i][l] * signed_h[j][l];
        }
      }
    }
  }
  for (int i = 0; i < kPaths; ++i) {
    row_rhs[i] = 0.0F;
    for (const float lane : rhs[i]) {
      row_rhs[i] += lane;
    }
    for (int j = i; j < kPaths; ++j) {
      float sum = 0.0F;
      for (const float lane : gram[i * kPaths + j]) {
        sum += lane;
      }
      row_gram[i * kPaths + j] = sum;
    }
  }
}

template <int kPaths>
RABIT_MULTIVERSION void column_sums(const Shape& s, const float* row, const float* sign_rows,
                                    const float g[kPaths], float* __restrict gram,
                                    float* __restrict rhs) {
  for (int i = 0; i < kPaths; ++i) {
    const float* sign_i = sign_rows + i * s.d_in;
    float* rhs_i = rhs + i * s.d_in;
    const float gi = g[i];
    for (int64_t c = 0; c < s.d_in; ++c) {
      rhs_i[c] += row[c] * gi * sign_i[c];
    }
    for (int j = i; j < kPaths; ++j) {
      const float* sign_j = sign_rows + j * s.d_in;
      float* gram_ij = gram + (i * kPaths + j) * s.d_in;
      const float gij = gi * g[j];
      for (int64_t c = 0; c < s.d_in; ++c) {
        gram_ij[c] += gij * sign_i[c] * sign_j[c];
      }
    }
  }
}

// One step of alternating least squares: signs from `scales`, then g for all rows, then h for all
// columns, signs held.
template <int kPaths>
void als_step(const Shape& s, const float* w, Scales& scales, ThreadPool& pool) {
  const Scales old = scales;
  const auto threads = static_cast<size_t>(pool.size());
  const auto n = static_cast<size_t>(s.d_in);
  std::vector<std::vector<float>> grams(threads), rhss(threads);
  pool.parallel_for(s.d_out, 1, [&](int64_t begin, int64_t end, int thread) {
    auto& gram = grams[static_cast<size_t>(thread)];
    auto& rhs = rhss[static_cast<size_t>(thread)];
    gram.assign(kPaths * kPaths * n, 0.0F);
    rhs.assign(kPaths * n, 0.0F);
    std::vector<float> sign_rows(kPaths * n);
    for (int64_t r = begin; r < end; ++r) {
      float row_gram[kPaths * kPaths], row_rhs[kPaths], g[kPaths];
      row_sums<kPaths>(s, w + r * s.d_in, old, r, sign_rows.data(), row_gram, row_rhs);
      double a[kMaxPaths][kMaxPaths], b[kMaxPaths];
      for (int i = 0; i < kPaths; ++i) {
        b[i] = row_rhs[i];
        for (int j = i; j < kPaths; ++j) {
          a[i][j] = a[j][i] = row_gram[i * kPaths + j];
        }
      }
      solve_small(kPaths, a, b);
      for (int i = 0; i < kPaths; ++i) {
        g[i] = static_cast<float>(b[i]);
        scales.g[static_cast<size_t>(i * s.d_out + r)] = g[i];
      }
      column_sums<kPaths>(s, w + r * s.d_in, sign_rows.data(), g, gram.data(), rhs.data());
    }
  });
  for (int64_t c = 0; c < s.d_in; ++c) {
    double a[kMaxPaths][kMaxPaths] = {}, b[kMaxPaths] = {};
    for (size_t t = 0; t < threads; ++t) {
      if (grams[t].empty()) {
        continue;
      }
      for (int i = 0; i < kPaths; ++i) {
        b[i] += rhss[t][i * n + c];
        for (int j = i; j < kPaths; ++j) {
          a[i][j] += grams[t][(i * kPaths + j) * n + c];
        }
      }
    }
    for (int i = 0; i < kPaths; ++i) {
      for (int j = i + 1; j < kPaths; ++j) {
        a[j][i] = a[i][j];
      }
    }
    solve_small(kPaths, a, b);
    for (int i = 0; i < kPaths; ++i) {
      scales.h[i * n + c] = static_cast<float>(b[i]);
    }
  }
}

void als_step(const Shape& s, const float* w, Scales& scales, ThreadPool& pool) {
  using Step = void (*)(const Shape&, const float*, Scales&, ThreadPool&);
  static constexpr Step kByPaths[kMaxPaths] = {als_step<1>, als_step<2>, als_step<3>, als_step<4>};
  kByPaths[s.paths - 1](s, w, scales, pool);
}

// Gauss-Seidel SVID: each path in turn refits its signs and its rank-1 magnitude to what the others
// leave. The first sweep, with the others at zero, is greedy SVID.
Scales gauss_seidel(const Shape& s, const float* w, int64_t sweeps) {
  const auto size = static_cast<size_t>(s.d_out * s.d_in);
  Scales scales = zero_scales(s);
  std::vector<float> residual(w, w + size);
  std::vector<std::vector<float>> signs(static_cast<size_t>(s.paths));
  for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
    for (int64_t i = 0; i < s.paths; ++i) {
      auto& b = signs[static_cast<size_t>(i)];
      float* g = scales.g.data() + i * s.d_out;
      float* h = scales.h.data() + i * s.d_in;
      if (sweep > 0) {
        add_path(s.d_out, s.d_in, b.data(), g, h, 1.0F, residual.data());
      }
      b.resize(size);
      for (size_t e = 0; e < size; ++e) {
        b[e] = residual[e] < 0.0F ? -1.0F : 1.0F;
      }
      rank_one(s.d_out, s.d_in, residual.data(), sweep > 0, g, h);
      add_path(s.d_out, s.d_in, b.data(), g, h, -1.0F, residual.data());
    }
  }
  return scales;
}

}  // namespace

Scales svid(const Shape& shape, const float* w) { return gauss_seidel(shape, w, 1); }

Scales two_bit_scales(int64_t d_out, int64_t d_in, const float* w) {
  constexpr int kGrid = 80;
  Scales scales{std::vector<float>(static_cast<size_t>(2 * d_out)),
                std::vector<float>(static_cast<size_t>(2 * d_in), 1.0F)};
  for (int64_t r = 0; r < d_out; ++r) {
    const float* row = w + r * d_in;
    float largest = 0.0F;
    for (int64_t c = 0; c < d_in; ++c) {
      largest = std::max(largest, std::fabs(row[c]));
    }
    double best = std::numeric_limits<double>::infinity();
    for (int step = 1; step <= kGrid; ++step) {
      const float s = largest / 1.5F * static_cast<float>(step) / kGrid;
      double error = 0.0;
      for (int64_t c = 0; c < d_in; ++c) {
        const float magnitude = std::fabs(row[c]);
        const float difference = magnitude - (magnitude < s ? 0.5F * s : 1.5F * s);
        error += static_cast<double>(difference) * difference;
      }
      if (error < best) {
        best = error;
        scales.g[r] = s;
        scales.g[d_out + r] = 0.5F * s;
      }
    }
  }
  return scales;
}

Scales fit_scales(const Shape& shape, const float* w, std::span<const float> s_out,
                  std::span<const float> s_in, const InitOptions& options, ThreadPool& pool) {
  const auto out_weight = [&](int64_t r) { return s_out.empty() ? 1.0F : s_out[r]; };
  const auto in_weight = [&](int64_t c) { return s_in.empty() ? 1.0F : s_in[c]; };
  std::vector<float> weighted(static_cast<size_t>(shape.d_out * shape.d_in));
  for (int64_t r = 0; r < shape.d_out; ++r) {
    for (int64_t c = 0; c < shape.d_in; ++c) {
      weighted[r * shape.d_in + c] = out_weight(r) * w[r * shape.d_in + c] * in_weight(c);
    }
  }
  // Maps scales of W' back to W, and of W to W' with inverse = true.
  const auto map = [&](Scales scales, bool inverse) {
    for (int64_t i = 0; i < shape.paths; ++i) {
      for (int64_t r = 0; r < shape.d_out; ++r) {
        float& g = scales.g[i * shape.d_out + r];
        g = inverse ? g * out_weight(r) : g / out_weight(r);
      }
      for (int64_t c = 0; c < shape.d_in; ++c) {
        float& h = scales.h[i * shape.d_in + c];
        h = inverse ? h * in_weight(c) : h / in_weight(c);
      }
    }
    return scales;
  };

  Scales best = map(svid(shape, w), true);
  double best_error = weighted_error(shape, weighted.data(), best, {}, {});
  const auto consider = [&](const Scales& candidate) {
    const double error = weighted_error(shape, weighted.data(), candidate, {}, {});
    if (error < best_error) {  // false for NaN
      best_error = error;
      best = candidate;
    }
  };
  Scales scales = svid(shape, weighted.data());
  consider(scales);
  if (options.sweeps > 1) {
    scales = gauss_seidel(shape, weighted.data(), options.sweeps);
    consider(scales);
  }
  for (int64_t step = 0; step < options.als_steps; ++step) {
    als_step(shape, weighted.data(), scales, pool);
    consider(scales);
  }
  return map(std::move(best), false);
}

}  // namespace rabit::quant
