// The kernels of training on a GPU, run on the CPU (cuda_emulator.h): the coupled form against
// quant/, everything else against the formulas in double. Sizes lie around the edges of vectors,
// warps and blocks; guard values lie behind every output.

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "quant/residual_binary.h"
#include "train/cuda/block_ops.h"
#include "train/cuda/coupled.h"
#include "train/cuda/device.h"
#include "train/cuda/kl.h"

namespace rabit::cuda {
namespace {

constexpr float kGuard = 12345.0F;
constexpr size_t kGuards = 64;

class Random {
 public:
  explicit Random(uint64_t seed) : random_(seed) {}
  std::vector<float> normal(int64_t count, float deviation = 1.0F, float mean = 0.0F) {
    std::normal_distribution<float> draw(mean, deviation);
    std::vector<float> out(static_cast<size_t>(count));
    for (float& v : out) {
      v = draw(random_);
    }
    return out;
  }

 private:
  std::mt19937_64 random_;
};

float value(Bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
Bf16 rounded(float x) { return {static_cast<uint16_t>(pack_bf16(x, 0.0F))}; }

std::vector<Bf16> rounded(const std::vector<float>& x) {
  std::vector<Bf16> out;
  for (const float v : x) {
    out.push_back(rounded(v));
  }
  return out;
}
std::vector<double> wide(const std::vector<Bf16>& x) {
  std::vector<double> out;
  for (const Bf16 v : x) {
    out.push_back(value(v));
  }
  return out;
}
std::vector<double> wide(const std::vector<float>& x) { return {x.begin(), x.end()}; }

// An output with guards behind it; aligned as a device's memory is.
template <typename T>
class Output {
 public:
  explicit Output(int64_t size) : size_(static_cast<size_t>(size)) {
    const size_t bytes = (size_ + kGuards) * sizeof(T);
    data_ = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    for (size_t i = 0; i < size_ + kGuards; ++i) {
      set(i);
    }
  }
  ~Output() {
    for (size_t i = size_; i < size_ + kGuards; ++i) {
      T guard;
      make(guard);
      EXPECT_EQ(std::memcmp(&data_[i], &guard, sizeof(T)), 0) << "written behind the end";
    }
    std::free(data_);
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  T* data() { return data_; }
  std::vector<T> values() const { return {data_, data_ + size_}; }

 private:
  static void make(float& out) { out = kGuard; }
  static void make(Bf16& out) { out = rounded(kGuard); }
  static void make(uint32_t& out) { out = 0xABCDEF01U; }
  static void make(int32_t& out) { out = -12345; }
  void set(size_t i) { make(data_[i]); }

  size_t size_;
  T* data_;
};

// Inputs on the same boundaries.
template <typename T>
class Input {
 public:
  explicit Input(const std::vector<T>& values) : copy_(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), copy_.data());
  }
  const T* data() { return copy_.data(); }

 private:
  Output<T> copy_;
};

// |got - want| / |want|, over all.
double relative(const std::vector<double>& got, const std::vector<double>& want) {
  double off = 0.0, size = 0.0;
  if (got.size() != want.size()) {
    return INFINITY;
  }
  for (size_t i = 0; i < want.size(); ++i) {
    off += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  return off == off ? std::sqrt(off / std::max(size, 1e-300)) : INFINITY;
}

TEST(Comparator, RejectsWhatIsWrong) {
  const std::vector<double> want = {1.0, -2.0, 3.0, 0.5};
  EXPECT_EQ(relative(want, want), 0.0);
  EXPECT_GT(relative({0.0, 0.0, 0.0, 0.0}, want), 0.9);
  EXPECT_GT(relative({1.0, 2.0, 3.0, 0.5}, want), 0.9);
  EXPECT_GT(relative({1.0, -2.0, 3.0, 0.0}, want), 0.1);
  EXPECT_EQ(relative({1.0, NAN, 3.0, 0.5}, want), INFINITY);
  EXPECT_EQ(relative({1.0, -2.0, 3.0}, want), INFINITY);
}

// Rounding to bf16 alone, with seven bits behind the point, is off by 2^-8 at most.
constexpr double kBf16 = 1.0 / 256;

TEST(Bf16Rounding, IsToNearestWithTiesToEven) {
  const auto bits = [](float x) { return static_cast<int>(rounded(x).bits); };
  EXPECT_EQ(bits(1.0F), 0x3F80);
  EXPECT_EQ(bits(1.0F + 1.0F / 256), 0x3F80);  // a tie: to even
  EXPECT_EQ(bits(1.0F + 3.0F / 256), 0x3F82);  // a tie: to even
  EXPECT_EQ(bits(1.0F + 1.01F / 256), 0x3F81);
  EXPECT_EQ(bits(-0.0F), 0x8000);
  EXPECT_EQ(bits(INFINITY), 0x7F80);
  EXPECT_TRUE(std::isnan(value(rounded(NAN))));
}

struct Coupled {
  CoupledShape shape;
  std::vector<float> w, g, h, grad;
};

Coupled coupled_case(int64_t d_out, int64_t d_in, int paths) {
  Random random(static_cast<uint64_t>(d_out * 1000 + d_in * 10 + paths));
  Coupled c{
      {d_out, d_in, paths}, random.normal(d_out * d_in, 0.1F), {}, {}, random.normal(d_out * d_in)};
  for (int i = 0; i < paths; ++i) {
    for (const float v : random.normal(d_out, 0.02F, 0.1F)) {
      c.g.push_back(std::ldexp(v, -i));
    }
    for (const float v : random.normal(d_in, 0.2F, 1.0F)) {
      c.h.push_back(v);
    }
  }
  // Ties, zeros of both signs.
  c.w[0] = 0.0F;
  c.w.back() = -0.0F;
  c.w[c.w.size() / 2] = c.g[(c.w.size() / 2) / static_cast<size_t>(d_in)] *
                        c.h[(c.w.size() / 2) % static_cast<size_t>(d_in)];
  return c;
}

class CoupledKernels : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Paths, CoupledKernels, testing::Values(1, 2, 3, 4));

constexpr std::pair<int64_t, int64_t> kMatrices[] = {
    {1, 1}, {3, 5}, {8, 32}, {9, 33}, {65, 132}, {64, 512}, {20, 516}, {11, 1027}, {73, 128}};

TEST_P(CoupledKernels, ForwardEqualsQuantToTheBit) {
  for (const auto& [d_out, d_in] : kMatrices) {
    const Coupled c = coupled_case(d_out, d_in, GetParam());
    std::vector<float> want(c.w.size());
    quant::coupled_forward({d_out, d_in, GetParam()}, c.w.data(), c.g.data(), c.h.data(), 0, d_out,
                           want.data());
    Input w(c.w), g(c.g), h(c.h);
    Output<float> out(d_out * d_in);
    Output<Bf16> narrow(d_out * d_in);
    ASSERT_TRUE(coupled_forward(c.shape, w.data(), g.data(), h.data(), out.data(), nullptr));
    ASSERT_TRUE(coupled_forward(c.shape, w.data(), g.data(), h.data(), narrow.data(), nullptr));
    EXPECT_EQ(out.values(), want) << d_out << " x " << d_in;
    EXPECT_EQ(wide(narrow.values()), wide(rounded(want))) << d_out << " x " << d_in;
  }
}

TEST_P(CoupledKernels, BackwardEqualsTheDefinitionInDouble) {
  for (const auto& [d_out, d_in] : kMatrices) {
    for (const bool narrow : {false, true}) {
      const int paths = GetParam();
      Coupled c = coupled_case(d_out, d_in, paths);
      const std::vector<Bf16> narrow_grad = rounded(c.grad);
      if (narrow) {
        for (size_t i = 0; i < c.grad.size(); ++i) {
          c.grad[i] = value(narrow_grad[i]);
        }
      }
      const auto signs = quant::coupled_signs({d_out, d_in, paths}, c.w.data(), {c.g, c.h});
      const int64_t words = (d_in + 31) / 32;
      std::vector<double> want_g(static_cast<size_t>(paths * d_out)),
          want_h(static_cast<size_t>(paths * d_in));
      for (int64_t i = 0; i < paths; ++i) {
        for (int64_t r = 0; r < d_out; ++r) {
          for (int64_t k = 0; k < d_in; ++k) {
            const bool plus =
                (signs[static_cast<size_t>((i * d_out + r) * words + k / 32)] >> (k % 32) & 1U) !=
                0;
            const double d = (plus ? 1.0 : -1.0) * c.grad[static_cast<size_t>(r * d_in + k)];
            want_g[static_cast<size_t>(i * d_out + r)] +=
                d * c.h[static_cast<size_t>(i * d_in + k)];
            want_h[static_cast<size_t>(i * d_in + k)] +=
                d * c.g[static_cast<size_t>(i * d_out + r)];
          }
        }
      }
      Input w(c.w), g(c.g), h(c.h), grad(c.grad);
      Input<Bf16> grad16(narrow_grad);
      Output<float> dw(d_out * d_in), dg(paths * d_out), dh(paths * d_in),
          scratch(coupled_backward_scratch(c.shape));
      const auto run = [&](float* into) {
        return narrow ? coupled_backward(c.shape, w.data(), g.data(), h.data(), grad16.data(), into,
                                         dg.data(), dh.data(), scratch.data(), nullptr)
                      : coupled_backward(c.shape, w.data(), g.data(), h.data(), grad.data(), into,
                                         dg.data(), dh.data(), scratch.data(), nullptr);
      };
      ASSERT_TRUE(run(dw.data()));
      EXPECT_EQ(dw.values(), c.grad);
      EXPECT_LT(relative(wide(dg.values()), want_g), 1e-6) << d_out << " x " << d_in;
      EXPECT_LT(relative(wide(dh.values()), want_h), 1e-6) << d_out << " x " << d_in;
      const std::vector<float> first = dg.values();
      ASSERT_TRUE(run(nullptr));
      EXPECT_EQ(dg.values(), first);
    }
  }
}

TEST_P(CoupledKernels, SignsEqualQuantAndThoseThatTurnAreCounted) {
  for (const auto& [d_out, d_in] : kMatrices) {
    const int paths = GetParam();
    const quant::Shape shape = {d_out, d_in, paths};
    Coupled c = coupled_case(d_out, d_in, paths);
    Input g(c.g), h(c.h);
    const auto words = static_cast<size_t>((d_in + 31) / 32);
    Output<uint32_t> packed(paths * d_out * static_cast<int64_t>(words));
    Output<int32_t> turned(paths * d_out);
    std::vector<uint32_t> before(packed.values().size(), 0U);
    std::copy(before.begin(), before.end(), packed.data());
    for (int look = 0; look < 3; ++look) {
      Input w(c.w);
      ASSERT_TRUE(coupled_signs(c.shape, w.data(), g.data(), h.data(), packed.data(), turned.data(),
                                nullptr));
      const auto want = quant::coupled_signs(shape, c.w.data(), {c.g, c.h});
      EXPECT_EQ(packed.values(), want) << d_out << " x " << d_in << " look " << look;
      for (size_t row = 0; row < static_cast<size_t>(paths * d_out); ++row) {
        int count = 0;
        for (size_t i = row * words; i < (row + 1) * words; ++i) {
          count += __builtin_popcount(before[i] ^ want[i]);
        }
        EXPECT_EQ(turned.values()[row], count) << "row " << row << " look " << look;
      }
      before = want;
      if (look == 0) {  // the third time, nothing has changed
        for (size_t i = 0; i < c.w.size(); i += 3) {
          c.w[i] = -c.w[i];
        }
      }
    }
  }
}

TEST(CoupledKernels, RefusesPathsThatAreNone) {
  Output<float> out(1);
  const float one = 1.0F;
  EXPECT_FALSE(coupled_forward({1, 1, 5}, &one, &one, &one, out.data(), nullptr));
  EXPECT_FALSE(coupled_forward({1, 1, 0}, &one, &one, &one, out.data(), nullptr));
}

TEST(NormKernels, EqualTheFormulasInDouble) {
  for (const auto& [rows, width] :
       {std::pair<int64_t, int64_t>{1, 3}, {3, 7}, {9, 64}, {8, 576}, {67, 130}}) {
    SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(width));
    Random random(static_cast<uint64_t>(rows + width));
    const NormShape shape{rows, width, 1e-5F};
    const auto x = random.normal(rows * width), weight = random.normal(width, 0.3F, 1.0F),
               d_sum = random.normal(rows * width, 0.1F);
    const auto delta = rounded(random.normal(rows * width)),
               d_y = rounded(random.normal(rows * width));
    Input x_in(x), weight_in(weight), d_sum_in(d_sum);
    Input<Bf16> delta_in(delta), d_y_in(d_y);
    for (const bool added : {true, false}) {
      Output<float> sum(rows * width), inverse(rows), d(rows * width), d_weight(width),
          scratch(norm_weight_scratch(shape));
      Output<Bf16> y(rows * width), d_delta(rows * width);
      ASSERT_TRUE(add_norm(shape, x_in.data(), added ? delta_in.data() : nullptr, weight_in.data(),
                           added ? sum.data() : nullptr, y.data(), inverse.data(), nullptr));
      const float* stream = added ? sum.data() : x_in.data();
      ASSERT_TRUE(add_norm_backward(shape, stream, inverse.data(), weight_in.data(),
                                    added ? d_sum_in.data() : nullptr, d_y_in.data(), d.data(),
                                    added ? d_delta.data() : nullptr, nullptr));
      ASSERT_TRUE(norm_weight_backward(shape, stream, inverse.data(), d_y_in.data(),
                                       d_weight.data(), scratch.data(), nullptr));
      std::vector<double> want_sum, want_y, want_d, want_weight(static_cast<size_t>(width));
      for (int64_t r = 0; r < rows; ++r) {
        const auto at = [&](int64_t c) { return static_cast<size_t>(r * width + c); };
        std::vector<double> s, u;
        double squares = 0.0, along = 0.0;
        for (int64_t c = 0; c < width; ++c) {
          s.push_back(static_cast<double>(x[at(c)]) + (added ? value(delta[at(c)]) : 0.0));
          u.push_back(weight[static_cast<size_t>(c)] * static_cast<double>(value(d_y[at(c)])));
          squares += s.back() * s.back();
          along += s.back() * u.back();
        }
        const double rms = std::sqrt(squares / static_cast<double>(width) + 1e-5);
        for (int64_t c = 0; c < width; ++c) {
          const auto i = static_cast<size_t>(c);
          want_sum.push_back(s[i]);
          want_y.push_back(weight[i] * s[i] / rms);
          // d/ds of sum_c u_c s_c / rms
          want_d.push_back((added ? d_sum[at(c)] : 0.0) + u[i] / rms -
                           s[i] * along / (static_cast<double>(width) * rms * rms * rms));
          want_weight[i] += value(d_y[at(c)]) * s[i] / rms;
        }
      }
      if (added) {
        EXPECT_LT(relative(wide(sum.values()), want_sum), 1e-6);
        EXPECT_LT(relative(wide(d_delta.values()), want_d), kBf16);
      }
      EXPECT_LT(relative(wide(y.values()), want_y), kBf16);
      EXPECT_LT(relative(wide(d.values()), want_d), 2e-6);
      EXPECT_LT(relative(wide(d_weight.values()), want_weight), 2e-6);
    }
  }
}

TEST(RotaryKernels, TurnPairsAndBack) {
  for (const auto& [heads, head_dim] : {std::pair<int64_t, int64_t>{1, 2}, {3, 6}, {2, 64}}) {
    const int64_t tokens = 10, positions = 5, width = heads * head_dim, wider = width + 8;
    Random random(static_cast<uint64_t>(width));
    const auto x = rounded(random.normal(tokens * wider)),
               angles = rounded(random.normal(positions * head_dim / 2));
    std::vector<float> cos, sin;
    for (const Bf16 angle : angles) {
      cos.push_back(std::cos(value(angle)));
      sin.push_back(std::sin(value(angle)));
    }
    Input<Bf16> in(x);
    Input cos_in(cos), sin_in(sin);
    Output<Bf16> out(tokens * width), again(tokens * width);
    const RotaryShape shape{tokens, positions, heads, head_dim, wider, width};
    ASSERT_TRUE(rotate(shape, cos_in.data(), sin_in.data(), in.data(), out.data(), false, nullptr));
    std::vector<double> want, inputs;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t f = 0; f < width; f += 2) {
        const auto angle = static_cast<size_t>(t % positions * (head_dim / 2) + f % head_dim / 2);
        const double a = value(x[static_cast<size_t>(t * wider + f)]),
                     b = value(x[static_cast<size_t>(t * wider + f + 1)]);
        want.push_back(a * cos[angle] - b * sin[angle]);
        want.push_back(a * sin[angle] + b * cos[angle]);
        inputs.insert(inputs.end(), {a, b});
      }
    }
    EXPECT_LT(relative(wide(out.values()), want), kBf16);
    RotaryShape packed = shape;
    packed.in_stride = width;
    ASSERT_TRUE(
        rotate(packed, cos_in.data(), sin_in.data(), out.data(), again.data(), true, nullptr));
    EXPECT_LT(relative(wide(again.values()), inputs), 2 * kBf16);
  }
}

TEST(SwigluKernels, EqualTheFormulasInDouble) {
  for (const auto& [rows, width] : {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {5, 64}, {9, 260}}) {
    const int64_t stride = 2 * width;
    Random random(static_cast<uint64_t>(rows + width));
    const auto both = rounded(random.normal(rows * stride, 3.0F)),
               d = rounded(random.normal(rows * width));
    Input<Bf16> in(both), d_in(d);
    Output<Bf16> hidden(rows * width), d_both(rows * stride);
    ASSERT_TRUE(swiglu(rows, width, stride, in.data(), in.data() + width, hidden.data(), nullptr));
    ASSERT_TRUE(swiglu_backward(rows, width, stride, in.data(), in.data() + width, d_in.data(),
                                d_both.data(), d_both.data() + width, nullptr));
    std::vector<double> want, want_d(static_cast<size_t>(rows * stride));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c) {
        const auto at = static_cast<size_t>(r * stride + c);
        const double g = value(both[at]), u = value(both[at + static_cast<size_t>(width)]);
        const double s = 1.0 / (1.0 + std::exp(-g)),
                     upstream = value(d[static_cast<size_t>(r * width + c)]);
        want.push_back(g * s * u);
        want_d[at] = upstream * u * (s + g * s * (1.0 - s));
        want_d[at + static_cast<size_t>(width)] = upstream * g * s;
      }
    }
    EXPECT_LT(relative(wide(hidden.values()), want), kBf16);
    EXPECT_LT(relative(wide(d_both.values()), want_d), kBf16);
  }
}

TEST(KlKernels, EqualTheFormulasInDouble) {
  const std::vector<KlShares> all = {{0.0F, 1.0F, 0.25F, 0.0F},
                                     {0.0F, 2.5F, 0.25F, 0.5F},
                                     {1.0F, 1.0F, 0.25F, 0.0F},
                                     {0.4F, 0.5F, 0.25F, 0.5F},
                                     {0.0F, 1.0F, 0.0F, 1.0F}};
  for (const int64_t vocab : {2, 33, 516, 5001}) {
    const int64_t rows = vocab > 1000 ? 2 : 4;
    Random random(static_cast<uint64_t>(vocab));
    const auto s = rounded(random.normal(rows * vocab, 3.0F, -20.0F)),
               t = rounded(random.normal(rows * vocab, 3.0F, 30.0F));
    const std::vector<int64_t> next = {vocab - 1, -1, 0, 1};
    for (const KlShares& shares : all) {
      SCOPED_TRACE(std::to_string(vocab) + ", T " + std::to_string(shares.temperature));
      Output<Bf16> student(rows * vocab);
      std::copy(s.begin(), s.end(), student.data());
      Input<Bf16> teacher(t);
      Output<float> sums(rows * 3);
      ASSERT_TRUE(kl_backward(rows, vocab, shares, student.data(), teacher.data(), next.data(),
                              sums.data(), nullptr));
      std::vector<double> want_grad, want_sums;
      for (int64_t r = 0; r < rows; ++r) {
        const auto log_p = [&](const std::vector<Bf16>& logits, double temperature) {
          std::vector<double> out;
          double largest = -INFINITY, sum = 0.0;
          for (int64_t c = 0; c < vocab; ++c) {
            out.push_back(value(logits[static_cast<size_t>(r * vocab + c)]) / temperature);
            largest = std::max(largest, out.back());
          }
          for (const double z : out) {
            sum += std::exp(z - largest);
          }
          for (double& z : out) {
            z -= largest + std::log(sum);
          }
          return out;
        };
        const auto ls = log_p(s, shares.temperature), lt = log_p(t, shares.temperature),
                   plain = log_p(s, 1.0), plain_t = log_p(t, 1.0);
        double forward = 0.0, reverse = 0.0;
        for (size_t c = 0; c < ls.size(); ++c) {
          forward += std::exp(lt[c]) * (lt[c] - ls[c]);
          reverse += std::exp(ls[c]) * (ls[c] - lt[c]);
        }
        const int64_t target = next[static_cast<size_t>(r)];
        for (size_t c = 0; c < ls.size(); ++c) {
          const double ps = std::exp(ls[c]), pt = std::exp(lt[c]);
          double d = shares.divergence_weight * shares.temperature *
                     ((1.0 - shares.reverse) * (ps - pt) +
                      shares.reverse * ps * (ls[c] - lt[c] - reverse));
          if (target >= 0) {
            d += shares.entropy_weight *
                 (std::exp(plain[c]) - (static_cast<int64_t>(c) == target ? 1.0 : 0.0));
          }
          want_grad.push_back(d);
        }
        want_sums.push_back((1.0 - shares.reverse) * forward + shares.reverse * reverse);
        want_sums.push_back(target < 0 ? 0.0 : -plain[static_cast<size_t>(target)]);
        want_sums.push_back(target < 0 ? 0.0 : -plain_t[static_cast<size_t>(target)]);
      }
      EXPECT_LT(relative(wide(student.values()), want_grad), kBf16);
      EXPECT_LT(relative(wide(sums.values()), want_sums), 2e-6);
    }
  }
}

}  // namespace
}  // namespace rabit::cuda
