// Line charts as SVG: no script, no font and no colour of their own; the page's style sheet gives
// them (`.chart`, `.s0` to `.s7`), so that they follow a light or dark page.
#pragma once

#include <string>
#include <vector>

namespace rabit {

struct Series {
  std::string name;
  std::vector<double> x, y;  // of equal length; a y that is not finite leaves a gap
};

struct Chart {
  std::string title, x_label, y_label;
  std::vector<Series> series;
  bool log_y = false;  // values of 0 and below leave gaps
  bool y_from_zero = false;
  bool dots = false;  // mark every value
};

/// A figure with the chart, its title and, for several series, a legend; nothing that reads it
/// needs to run. Empty where no series has a value.
std::string chart_html(const Chart& chart);

/// Round numbers from low to high, about `count` of them, both ends within; none where numbers are
/// too large or too close for it. low < high.
std::vector<double> axis_ticks(double low, double high, int count);
/// The same for a logarithmic axis: 1, 2, 5 times powers of ten, thinned. 0 < low < high.
std::vector<double> log_ticks(double low, double high, int count);

/// Text with &, <, > and quotes escaped.
std::string escape_html(const std::string& text);

}  // namespace rabit
