#include "report/chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace rabit {
namespace {

constexpr double kWidth = 480, kHeight = 240;
constexpr double kLeft = 58, kRight = 12, kTop = 10, kBottom = 38;
constexpr int kColours = 8;

struct Range {
  double low = INFINITY, high = -INFINITY;
  void add(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  bool empty() const { return !(low <= high); }
};

std::string number(double value) {
  const double size = std::fabs(value);
  if (size >= 1e6) {
    return fmt::format("{:g}M", value / 1e6);
  }
  if (size >= 1e4) {
    return fmt::format("{:g}k", value / 1e3);
  }
  return fmt::format("{:.4g}", value + 0.0);
}

class Plot {
 public:
  explicit Plot(const Chart& chart) : chart_(chart) {
    for (const Series& series : chart.series) {
      for (size_t i = 0; i < series.y.size(); ++i) {
        if (shown(series, i)) {
          x_.add(series.x[i]);
          y_.add(series.y[i]);
        }
      }
    }
    if (y_.empty()) {
      return;
    }
    if (chart.y_from_zero) {
      y_.add(0.0);
    }
    widen(x_, false);
    widen(y_, chart.log_y);
    y_ticks_ = chart.log_y ? log_ticks(y_.low, y_.high, 5) : axis_ticks(y_.low, y_.high, 5);
    x_ticks_ = axis_ticks(x_.low, x_.high, 6);
  }

  bool empty() const { return y_.empty(); }

  std::string svg() const {
    std::string out =
        fmt::format(R"(<svg class="chart" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">)",
                    kWidth, kHeight, escape_html(chart_.title));
    for (const double tick : y_ticks_) {
      const double at = y_at(tick);
      out += fmt::format(R"(<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>)",
                         kLeft, kWidth - kRight, at, at);
      out += fmt::format(R"(<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>)",
                         kLeft - 6, at + 4, number(tick));
    }
    for (const double tick : x_ticks_) {
      out +=
          fmt::format(R"(<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>)",
                      x_at(tick), kHeight - kBottom + 16, number(tick));
    }
    out +=
        fmt::format(R"(<text class="label" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>)",
                    (kLeft + kWidth - kRight) / 2, kHeight - 4, escape_html(chart_.x_label));
    out += fmt::format(
        R"x(<text class="label" transform="translate(12 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>)x",
        (kTop + kHeight - kBottom) / 2, escape_html(chart_.y_label));
    for (size_t i = 0; i < chart_.series.size(); ++i) {
      out += line(chart_.series[i], i);
    }
    return out + "</svg>";
  }

 private:
  bool shown(const Series& series, size_t i) const {
    return std::isfinite(series.y[i]) && std::isfinite(series.x[i]) &&
           (!chart_.log_y || series.y[i] > 0.0);
  }

  static void widen(Range& range, bool log) {
    if (range.low == range.high) {
      range.low = log ? range.low / 2 : range.low - 0.5;
      range.high = log ? range.high * 2 : range.high + 0.5;
    }
  }

  double x_at(double x) const {
    return kLeft + (x - x_.low) / (x_.high - x_.low) * (kWidth - kLeft - kRight);
  }
  double y_at(double y) const {
    const double share = chart_.log_y ? std::log(y / y_.low) / std::log(y_.high / y_.low)
                                      : (y - y_.low) / (y_.high - y_.low);
    return kHeight - kBottom - share * (kHeight - kTop - kBottom);
  }

  std::string line(const Series& series, size_t index) const {
    const std::string colour = fmt::format("s{}", index % kColours);
    std::string path, dots;
    bool pen_down = false;
    for (size_t i = 0; i < series.y.size(); ++i) {
      if (!shown(series, i)) {
        pen_down = false;
        continue;
      }
      const double x = x_at(series.x[i]), y = y_at(series.y[i]);
      path += fmt::format("{}{:.1f} {:.1f}", pen_down ? "L" : "M", x, y);
      pen_down = true;
      if (chart_.dots) {
        dots += fmt::format(
            R"(<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{} {}: {}</title></circle>)",
            colour, x, y, escape_html(series.name), number(series.x[i]), number(series.y[i]));
      }
    }
    return fmt::format(R"(<path class="line {}" d="{}"/>)", colour, path) + dots;
  }

  const Chart& chart_;
  Range x_, y_;
  std::vector<double> x_ticks_, y_ticks_;
};

}  // namespace

std::vector<double> axis_ticks(double low, double high, int count) {
  const double rough = (high - low) / std::max(1, count);
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  double step = 10.0 * power;
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= rough) {
      step = factor * power;
      break;
    }
  }
  const double first = std::ceil(low / step - 1e-9);
  const double steps = std::floor(high / step + 1e-9) - first;
  // Values so large or so close that no numbers lie between them have no ticks.
  if (!(step > 0.0) || !std::isfinite(first) || std::fabs(first) > 1e15 || !(steps < 100.0)) {
    return {};
  }
  std::vector<double> ticks;
  for (int i = 0; i <= static_cast<int>(steps); ++i) {
    ticks.push_back((first + i) * step);
  }
  return ticks;
}

std::vector<double> log_ticks(double low, double high, int count) {
  const double first = std::floor(std::log10(low)), last = std::log10(high);
  if (!std::isfinite(first) || !std::isfinite(last)) {
    return {};
  }
  std::vector<double> ticks;
  for (int power = static_cast<int>(first); power <= static_cast<int>(last); ++power) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double tick = factor * std::pow(10.0, power);
      if (tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)) {
        ticks.push_back(tick);
      }
    }
  }
  if (ticks.size() < 4) {  // less than a decade or so
    ticks = axis_ticks(low, high, count);
  }
  while (static_cast<int>(ticks.size()) > count + 3) {
    std::vector<double> fewer;
    for (size_t i = 0; i < ticks.size(); i += 3) {
      fewer.push_back(ticks[i]);
    }
    ticks = fewer;
  }
  return ticks;
}

std::string escape_html(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        // Control characters have no place in a page, but for line ends and tabs.
        out += static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t' ? ' ' : c;
    }
  }
  return out;
}

std::string chart_html(const Chart& chart) {
  const Plot plot(chart);
  if (plot.empty()) {
    return {};
  }
  std::string out =
      "<figure><figcaption>" + escape_html(chart.title) + "</figcaption>" + plot.svg();
  if (chart.series.size() > 1) {
    out += "<div class=\"legend\">";
    for (size_t i = 0; i < chart.series.size(); ++i) {
      out += fmt::format("<span><i class=\"s{}\"></i>{}</span>", i % kColours,
                         escape_html(chart.series[i].name));
    }
    out += "</div>";
  }
  return out + "</figure>\n";
}

}  // namespace rabit
