// The page of a run: charts at known places, hostile text, and that it needs nothing else.

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <regex>

#include "report/chart.h"
#include "report/run_report.h"

namespace rabit {
namespace {

using nlohmann::json;

TEST(AxisTicks, AreRoundAndWithin) {
  EXPECT_EQ(axis_ticks(0, 10, 5), (std::vector<double>{0, 2, 4, 6, 8, 10}));
  for (const auto& [low, high] :
       {std::pair{0.0, 1.0}, std::pair{-0.37, 0.82}, std::pair{1e-9, 3e-9}, std::pair{-5e6, 8.1e6},
        std::pair{41.0, 41.5}}) {
    const auto ticks = axis_ticks(low, high, 5);
    ASSERT_GE(ticks.size(), 2U) << low << " " << high;
    ASSERT_LE(ticks.size(), 12U);
    const double step = ticks[1] - ticks[0];
    const double leading = step / std::pow(10.0, std::floor(std::log10(step * 1.0001)));
    EXPECT_TRUE(std::fabs(leading - 1) < 1e-6 || std::fabs(leading - 2) < 1e-6 ||
                std::fabs(leading - 5) < 1e-6)
        << step;
    for (const double tick : ticks) {
      EXPECT_GE(tick, low - 1e-9 * std::fabs(low));
      EXPECT_LE(tick, high + 1e-9 * std::fabs(high) + step * 1e-6);
    }
  }
  const auto wide = log_ticks(0.003, 4e5, 5);
  EXPECT_GE(wide.size(), 3U);
  EXPECT_LE(wide.size(), 10U);
  EXPECT_GE(log_ticks(30, 34, 5).size(), 2U);
  EXPECT_GE(log_ticks(0.23, 1.1, 5).size(), 4U);
}

TEST(AxisTicks, EndForEveryNumber) {
  for (const double value : {4e15, -4e15, 1e300, 1.7e308, 5e-324, 1e-310, 0.0}) {
    for (const bool log : {false, true}) {
      const std::string html = chart_html({"t", "x", "y", {{"a", {value}, {value}}}, log});
      EXPECT_LT(html.size(), 20000U) << value;
    }
    const std::string two =
        chart_html({"t", "x", "y", {{"a", {value, value + 1}, {value, value * 2 + 1}}}});
    EXPECT_LT(two.size(), 20000U) << value;
  }
}

TEST(Charts, PlaceValuesAndLeaveGaps) {
  Chart chart{"t", "x", "y", {{"one", {0, 1, 2, 3}, {0, 10, NAN, 5}}}};
  const std::string html = chart_html(chart);
  // The plot spans x 58 to 468 and y 202 to 10.
  EXPECT_NE(html.find(R"(d="M58.0 202.0L194.7 10.0M468.0 106.0")"), std::string::npos) << html;
  EXPECT_EQ(html.find("nan"), std::string::npos);
  EXPECT_EQ(html.find("legend"), std::string::npos) << "one line needs none";
  chart.series.push_back({"two", {0, 1}, {1, 2}});
  EXPECT_NE(chart_html(chart).find("legend"), std::string::npos);
  EXPECT_EQ(chart_html({"none", "x", "y", {{"empty", {}, {}}, {"gaps", {1}, {NAN}}}}), "");
  EXPECT_NE(chart_html({"one value", "x", "y", {{"a", {3}, {7}}}}), "");
  Chart decades{"log", "x", "y", {{"a", {0, 1, 2, 3}, {1, 10, 100, -1}}}, true};
  EXPECT_NE(chart_html(decades).find("M58.0 202.0L263.0 106.0L468.0 10.0\""), std::string::npos)
      << chart_html(decades);
}

json whole_log() {
  json log = {
      {"settings", {{"method", "rabit"}, {"bits", "2"}, {"seed", 1}}},
      {"source", {{"name", "model.gguf"}, {"sha256", std::string(64, 'a')}}},
      {"data", {{"files", {{{"name", "text.txt"}, {"sha256", std::string(64, 'b')}}}}}},
      {"output", "out.gguf"},
      {"bits_per_weight", 2.0917},
      {"file", {{"bytes", 59800000}, {"bits_per_weight", 3.556}}},
      {"seconds", 754.0},
      {"memory", {{"host_bytes", 2.5e9}}},
      {"perplexity",
       {{"student", {{"perplexity", 31.2}, {"perplexity_stderr", 0.2}, {"protocol", "windows"}}},
        {"teacher", {{"perplexity", 21.77}, {"perplexity_stderr", 0.1}}}}},
      {"warm_start",
       {{{"block", 0}, {"loss_first", 0.5}, {"loss_last", 0.2}, {"output_error", 0.3}},
        {{"block", 1}, {"loss_first", nullptr}, {"loss_last", 0.3}, {"output_error", 0.4}}}},
      {"distill", {{{"tokens", 100}, {"loss", 1.0}, {"text_nll", 4.0}, {"text_nll_teacher", 3.0}}}},
      {"diagnostics",
       {{"layers",
         {{{"layer", "blk.0.attn_q"},
           {"path_correlation", -0.3},
           {"residual_alignment", 0.8},
           {"on_own_inputs",
            {{"decomposition", {{"residual", 0.5}, {"last", 0.25}, {"cancelled", 0.625}}}}},
           {"row_scales", {{{"mean", 0.5}}, {{"mean", 0.25}}}},
           {"column_scales", {{{"mean", 1.0}}, {{"mean", 0.75}}}}},
          {{"layer", "blk.1.attn_q"}, {"path_correlation", -0.2}, {"residual_alignment", 0.7}}}},
        {"summary",
         {{"path_correlation", {{"least", -0.3}, {"median", -0.25}, {"largest", -0.2}}}}}}},
      {"samples",
       {{{"prompt", "<b>&\"'"}, {"teacher", "</p><script>x()</script>"}, {"student", "fine"}}}}};
  return log;
}

TEST(RunReport, SaysWhatTheLogSays) {
  const auto page = run_report(whole_log());
  ASSERT_TRUE(page);
  for (const char* part : {"<title>rabit: out.gguf</title>",
                           "2.092",
                           "3.556",
                           "59.8 MB",
                           "31.20 ± 0.20",
                           "21.77 ± 0.10",
                           "12 min 34 s",
                           "2.50 GB",
                           "Error of the blocks",
                           "Corr(y1, y2)",
                           "-0.2500",
                           "text.txt",
                           "original",
                           "quantized",
                           "All settings",
                           "The error in parts",
                           "left by the paths before",
                           "0.625",
                           "Sizes of the paths",
                           "path 2",
                           "0.375"}) {
    EXPECT_NE(page->find(part), std::string::npos) << part;
  }
}

TEST(RunReport, ShowsTheBlockTrainedByTheHeadApart) {
  json log = whole_log();
  log["warm_start"].push_back(
      {{"block", 2}, {"loss", "head"}, {"loss_first", 987.0}, {"loss_last", 654.0}});
  EXPECT_EQ(*run_report(log), *run_report(whole_log())) << "its losses are no relative errors";
}

TEST(RunReport, NeedsNothingElseAndTrustsNoText) {
  const auto page = run_report(whole_log());
  ASSERT_TRUE(page);
  for (const char* part : {"http:", "https:", "<script", "<link", "<img", " src=", "@import",
                           "url(", "javascript:", "<b>&"}) {
    EXPECT_EQ(page->find(part), std::string::npos) << part;
  }
  EXPECT_NE(page->find("&lt;/p&gt;&lt;script&gt;"), std::string::npos);
  EXPECT_NE(page->find("&lt;b&gt;&amp;&quot;&#39;"), std::string::npos);
  // Every element that is opened is closed, in order.
  std::vector<std::string> open;
  const std::regex tag("<(/?)([a-z0-9]+)[^>]*?(/?)>");
  for (std::sregex_iterator it(page->begin(), page->end(), tag), end; it != end; ++it) {
    const std::string name = (*it)[2];
    if (name == "meta" || (*it)[3] == "/") {
      continue;
    }
    if ((*it)[1] == "/") {
      ASSERT_FALSE(open.empty()) << it->str();
      EXPECT_EQ(open.back(), name);
      open.pop_back();
    } else {
      open.push_back(name);
    }
  }
  EXPECT_TRUE(open.empty());
}

TEST(RunReport, DoesWithoutWhatIsMissing) {
  const json whole = whole_log();
  for (const auto& item : whole.items()) {
    const bool needed = item.key() == "settings" || item.key() == "source";
    json part = whole;
    part.erase(item.key());
    EXPECT_EQ(static_cast<bool>(run_report(part)), !needed) << item.key();
    for (const json& wrong : {json(), json(7), json("x"), json::array({1, "x"}),
                              json::object({{"layers", {1}}, {"summary", {{"error", 3}}}})}) {
      part[item.key()] = wrong;
      const auto page = run_report(part);
      EXPECT_TRUE(page || needed) << item.key() << " " << wrong;
      EXPECT_TRUE(!page || page->find("nan") == std::string::npos) << item.key() << " " << wrong;
    }
  }
  json huge = whole;
  huge["seconds"] = 1e300;
  huge["distill"][0]["tokens"] = 4e15;
  EXPECT_TRUE(run_report(huge));
  json bare = whole;
  bare["seconds"] = 719.7;
  bare["perplexity"]["student"].erase("perplexity_stderr");
  bare["diagnostics"]["summary"]["path_correlation"].erase("median");
  bare["searched"]["bits"] = "2,0.attn_q=3";
  const auto page = run_report(bare);
  ASSERT_TRUE(page);
  EXPECT_EQ(page->find("nan"), std::string::npos);
  for (const char* part : {"12 min 00 s", "<b>31.20</b>", "<td>-</td>", "--bits 2,0.attn_q=3"}) {
    EXPECT_NE(page->find(part), std::string::npos) << part;
  }
  for (const json& foreign : {json(), json(3), json::array(), json::object()}) {
    EXPECT_FALSE(run_report(foreign));
  }
}

}  // namespace
}  // namespace rabit
