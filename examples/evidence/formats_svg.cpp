// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../compare/comparison.hpp"
#include "../compare/svg_parts.hpp"
#include "formats.hpp"

namespace evidence {
namespace {

using compare::svg_line, compare::svg_text;

constexpr double panel = 400, gap = 80, left = 70, top = 96, bottom = 440;
constexpr double most_bits = 9, least_bits = 2;

struct point {
  double bits, nats;
  std::string name;
};

struct series {
  std::string name;
  compare::line_style style;
  std::vector<cell> cells;
};

std::vector<series> all_series() {
  const auto rotated = [](index_t recent) {
    std::vector<cell> cells;
    for (const char* name : few_bits) cells.push_back({&formats_named(name), 1, recent});
    return cells;
  };
  std::vector<cell> unrotated;
  for (const char* name : few_bits) unrotated.push_back({&formats_named(std::string("unrotated ") + name), 1, 64});
  return {
      {"the newest 64 spared", {"#0072b2", ""}, rotated(64)},
      {"the newest 32", {"#009e73", ""}, rotated(32)},
      {"none of them", {"#d55e00", ""}, rotated(0)},
      {"64, without rotation", {"#777777", "5 4"}, unrotated},
      {"64, as ggml rounds", {"#cc79a7", "2 4"}, {{&formats_named("q8_0"), 1, 64}, {&formats_named("q4_0"), 1, 64}}}};
}

class panel_of {
 public:
  panel_of(double from, double low, double high) : from_(from), low_(low), high_(high) {}

  std::string axes(const std::string& title) const {
    std::string out = svg_text(from_, top - 14, "font-weight=\"bold\"", title);
    for (double power = low_; power <= high_; ++power) {
      out += svg_line(from_, y(power), from_ + panel, y(power), "stroke=\"#e6e6e6\"");
      out += svg_text(from_ - 8, y(power) + 4, "text-anchor=\"end\"", fmt::format("{:g}", std::pow(10, power)));
    }
    out += svg_line(from_, bottom, from_ + panel, bottom, "stroke=\"#222\"");
    for (double bits = least_bits; bits < most_bits; ++bits)
      out += svg_text(x(bits), bottom + 20, "text-anchor=\"middle\"", fmt::format("{:.0f}", bits));
    return out + svg_text(from_ + panel / 2, bottom + 40, "text-anchor=\"middle\"", "bits per element");
  }

  std::string draw(const std::vector<point>& points, const compare::line_style& style, bool named) const {
    std::string path, out;
    for (const point& p : points) {
      const double at = y(std::log10(p.nats));
      path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", x(p.bits), at);
      out += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4\" fill=\"{}\"/>\n", x(p.bits), at, style.color);
      if (named)
        out += svg_text(x(p.bits) - 7, at + 16, fmt::format("text-anchor=\"end\" fill=\"{}\"", style.color), p.name);
    }
    return out +
           fmt::format("<path d=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\" stroke-dasharray=\"{}\"/>\n",
                       path, style.color, *style.dashes ? style.dashes : "none");
  }

 private:
  double x(double bits) const { return from_ + panel * (bits - least_bits + 0.5) / (most_bits - least_bits + 0.5); }
  double y(double power) const { return bottom - (bottom - top) * (power - low_) / (high_ - low_); }

  double from_, low_, high_;
};

}  // namespace

std::string formats_svg(const std::vector<setting>& texts, const std::vector<formats_results>& kept) {
  const std::vector<series> all = all_series();
  std::vector<index_t> caches;
  std::vector<std::vector<std::vector<point>>> points;  // [caches][series]
  double low = std::numeric_limits<double>::infinity(), high = -low;
  const index_t head_dim = texts.front().subject.model->config().head_dim;
  for (const index_t cache : texts.front().options.caches) {
    std::vector<std::vector<point>> of_cache;
    for (const series& s : all) {
      std::vector<point>& of_series = of_cache.emplace_back();
      for (const cell& c : s.cells)
        if (const std::optional<double> nats = mean_nats(texts, kept, cache, c)) {
          of_series.push_back({c.formats->bits(head_dim), *nats, c.formats->name});
          low = std::min(low, std::log10(*nats));
          high = std::max(high, std::log10(*nats));
        }
    }
    if (std::ranges::all_of(of_cache, [](const auto& each) { return each.empty(); })) continue;
    caches.push_back(cache);
    points.push_back(std::move(of_cache));
  }
  const double width = 90 + left + static_cast<double>(std::max<std::size_t>(1, caches.size())) * (panel + gap) + 160;
  std::string out = compare::svg_head(width, bottom + 60);
  out += svg_text(20, 32, "font-size=\"19\" font-weight=\"bold\"",
                  fmt::format("{}: what few bits change in its predictions", texts.front().subject.name));
  out += svg_text(20, 54, "fill=\"#555\"",
                  "Mean divergence from a cache of f32 that keeps the same tokens, nats a token (log scale); 1 pinned "
                  "token spared.");
  for (std::size_t i = 0; i < caches.size(); ++i) {
    const panel_of here(left + static_cast<double>(i) * (panel + gap), std::floor(low), std::ceil(high));
    out += here.axes(fmt::format("A cache of {}", compare::tokens_text(caches[i])));
    for (std::size_t j = 0; j < all.size(); ++j) out += here.draw(points[i][j], all[j].style, j == 0);
  }
  const double legend = left + static_cast<double>(caches.size()) * (panel + gap) - gap + 24;
  for (std::size_t j = 0; j < all.size(); ++j) {
    const double y = top + 10 + 22 * static_cast<double>(j);
    out += svg_line(legend, y, legend + 26, y,
                    fmt::format("stroke=\"{}\" stroke-width=\"2\" stroke-dasharray=\"{}\"", all[j].style.color,
                                *all[j].style.dashes ? all[j].style.dashes : "none"));
    out += svg_text(legend + 32, y + 4, "", all[j].name);
  }
  return out + "</svg>\n";
}

}  // namespace evidence
