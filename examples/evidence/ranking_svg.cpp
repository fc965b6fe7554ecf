// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <optional>

#include "../compare/caches.hpp"
#include "../compare/svg.hpp"
#include "../compare/svg_parts.hpp"
#include "ranking.hpp"

namespace evidence {
namespace {

using compare::svg_text;

constexpr double panel = 330, gap = 62, left = 56, top = 70, bottom = 400;

// Okabe and Ito's colours and Tol's, then again with dashes.
constexpr const char* colors[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
                                  "#56b4e9", "#882255", "#999933", "#332288"};

struct point {
  double bytes, value;
};

struct series {
  std::string name;
  std::vector<std::vector<point>> panels;  // a text each, and recall
};

// How series number i looks: its line along `path`, and its points, rings where it is dashed, so that one point alone
// tells them apart.
const char* color_of(std::size_t i) { return colors[i % std::size(colors)]; }
bool is_dashed(std::size_t i) { return i >= std::size(colors); }
std::string line_of(std::size_t i, const std::string& path) {
  return fmt::format("<path d=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{}\"{}/>\n", path, color_of(i),
                     i == 0 ? 3 : 1.5, is_dashed(i) ? " stroke-dasharray=\"5 4\"" : "");
}
std::string point_of(std::size_t i, double x, double y) {
  return fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"{}\" fill=\"{}\" stroke=\"{}\"/>\n", x, y,
                     i == 0 ? 4.5 : 3., is_dashed(i) ? "#fff" : color_of(i), color_of(i));
}

struct scale {
  double low = std::numeric_limits<double>::infinity(), high = -low;

  void see(double value) { low = std::min(low, value), high = std::max(high, value); }
  double at(double value) const { return high > low ? (value - low) / (high - low) : 0.5; }
};

std::vector<series> series_of(const std::vector<setting>& texts, const std::vector<results>& kept) {
  const options& o = texts.front().options;
  std::vector<contender> all = {{"window", "", 0, 0}};
  for (const contender& c : contenders(o, o.caches.front()))
    if (c.interval == contenders(o, o.caches.front()).front().interval) all.push_back(c);
  std::vector<series> out;
  for (const contender& c : all) {
    series s{c.name == "window" ? "sinks + window" : c.shown(), std::vector<std::vector<point>>(texts.size() + 1)};
    for (const index_t cache : texts.front().options.caches) {
      contender here = c;
      if (c.name != "window")
        here.recent = contenders(o, cache).front().recent, here.interval = contenders(o, cache).front().interval;
      if (!fits(here, cache, 4)) continue;
      const compare::policy p = here.policy(4);
      const auto bytes = static_cast<double>(compare::cache_bytes(p, *texts.front().subject.model, cache));
      for (std::size_t i = 0; i < texts.size(); ++i)
        for (const standing& found : standings(texts[i], cache, kept[i], {here}))
          if (found.sinks == 4) s.panels[i].push_back({bytes, found.bits.estimate});
      if (const json* const file = kept.front()({job::kind::recall, p, cache}))
        if (const std::optional<double> share = recalled_share(*file, cache))
          s.panels.back().push_back({bytes, *share});
    }
    out.push_back(std::move(s));
  }
  return out;
}

// `y`: what the axis has to show besides the values.
std::string drawn(const std::vector<series>& all, std::size_t which, const std::string& title, const scale& x,
                  scale y = {}) {
  for (const series& s : all)
    for (const point& p : s.panels[which]) y.see(p.value);
  if (!(y.high >= y.low)) return "";
  const double room = std::max(0.005, 0.05 * (y.high - y.low));
  y.low -= y.low > 0 ? room : 0, y.high += room;
  const double from = left + static_cast<double>(which) * (panel + gap);
  const auto at_x = [&](double bytes) { return from + panel * (0.04 + 0.92 * x.at(std::log2(bytes))); };
  const auto at_y = [&](double value) { return bottom - (bottom - top) * y.at(value); };
  std::string out = svg_text(from, top - 14, "font-weight=\"bold\"", title);
  for (int i = 0; i <= 4; ++i) {
    const double value = y.low + (y.high - y.low) * i / 4;
    out += fmt::format("<path d=\"M{:.1f} {:.1f}h{:.1f}\" stroke=\"#e6e6e6\"/>\n", from, at_y(value), panel);
    out += svg_text(from - 6, at_y(value) + 4, "text-anchor=\"end\" font-size=\"11\"", fmt::format("{:.2f}", value));
  }
  for (double ten = 1e3; std::log2(ten) <= x.high; ten *= 10)
    for (const double bytes : {ten, 2 * ten, 3 * ten, 5 * ten, 7 * ten})
      if (std::log2(bytes) >= x.low && std::log2(bytes) <= x.high)
        out +=
            svg_text(at_x(bytes), bottom + 18, "text-anchor=\"middle\" font-size=\"11\"", compare::bytes_text(bytes));
  std::string points;  // over all lines
  for (std::size_t i = 0; i < all.size(); ++i) {
    std::string path;
    for (const point& p : all[i].panels[which]) {
      path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", at_x(p.bytes), at_y(p.value));
      points += point_of(i, at_x(p.bytes), at_y(p.value));
    }
    out += line_of(i, path);
  }
  return out + points;
}

}  // namespace

std::string ranking_svg(const std::vector<setting>& texts, const std::vector<results>& kept) {
  const std::vector<series> all = series_of(texts, kept);
  scale x;
  for (const series& s : all)
    for (const auto& points : s.panels)
      for (const point& p : points) x.see(std::log2(p.bytes));
  const auto panels = static_cast<double>(texts.size() + 1);
  const double legend = left + panels * (panel + gap) - gap + 16, width = legend + 190,
               height = std::max(bottom + 60, top + 20 * static_cast<double>(all.size()) + 20);
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0:.0f} {1:.0f}\" width=\"{0:.0f}\" height=\"{1:.0f}\" "
      "font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#222\">\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n",
      width, height);
  out += svg_text(left, 28, "font-size=\"17\" font-weight=\"bold\"",
                  fmt::format("{}: what policies cost, and recall, against the bytes of all caches (4 pinned)",
                              texts.front().subject.name));
  for (std::size_t i = 0; i < texts.size(); ++i)
    out += drawn(all, i, fmt::format("bits per byte, {}", std::filesystem::path(texts[i].options.text).stem().string()),
                 x);
  out += drawn(all, texts.size(), "digits recalled, one cache later (guessing: 0.10)", x, {0, 0.3});
  for (std::size_t i = 0; i < all.size(); ++i) {
    const double y = top + 20 * static_cast<double>(i);
    out += line_of(i, fmt::format("M{:.1f} {:.1f}h22", legend, y)) + point_of(i, legend + 11, y);
    out += svg_text(legend + 28, y + 4, "font-size=\"12\"", all[i].name);
  }
  return out + "</svg>\n";
}

}  // namespace evidence
