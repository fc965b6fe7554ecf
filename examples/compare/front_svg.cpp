// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "kv_formats.hpp"
#include "svg.hpp"
#include "svg_parts.hpp"

namespace compare {
namespace {

constexpr double width = 960, height = 600, left = 70, right = 880, top = 130, bottom = 484;

struct point {
  double bytes, loss;
  std::string format;
};

// A policy in all its formats, in the order of their bytes.
struct series {
  std::string name;
  line_style style;
  std::vector<point> points;
};

std::string bare_name(const policy& p) { return p.name.substr(0, p.name.rfind(' ')); }

std::vector<series> series_of(const comparison& c) {
  std::vector<series> all;
  std::size_t styles[2] = {};
  for (std::size_t i = 0; i < c.runs().size(); ++i) {
    const run& r = c.runs()[i];
    if (&r == c.recompute()) continue;  // at other tokens
    const std::string name = bare_name(r.policy);
    auto at = std::ranges::find(all, name, &series::name);
    if (at == all.end()) {
      line_style style = {"#d55e00", ""};
      if (r.policy.is == policy::kind::full) style = {"#777777", ""};
      if (r.policy.is == policy::kind::sinks) style = sinks_styles[styles[0]++ % std::size(sinks_styles)];
      if (r.policy.is == policy::kind::scored) style = scored_styles[styles[1]++ % std::size(scored_styles)];
      at = all.insert(all.end(), {name, style, {}});
    }
    at->points.push_back({static_cast<double>(r.cache_bytes), c.evicted() ? c.summary(i).after : c.summary(i).before,
                          r.policy.formats->name});
  }
  for (series& s : all) std::ranges::sort(s.points, {}, &point::bytes);
  return all;
}

// Those that no other beats in both.
std::vector<point> front_of(const std::vector<series>& all) {
  std::vector<point> points, front;
  for (const series& s : all) points.insert(points.end(), s.points.begin(), s.points.end());
  std::ranges::sort(
      points, [](const point& a, const point& b) { return std::pair(a.bytes, a.loss) < std::pair(b.bytes, b.loss); });
  for (const point& p : points)
    if (front.empty() || p.loss < front.back().loss) front.push_back(p);
  return front;
}

class front_chart {
 public:
  front_chart(const setting& s, const comparison& c) : setting_(s), comparison_(c), all_(series_of(c)) {
    front_ = front_of(all_);
    for (const series& each : all_)
      for (const point& p : each.points) {
        least_ = std::min(least_, std::log2(p.bytes));
        most_ = std::max(most_, std::log2(p.bytes));
        high_ = std::max(high_, p.loss);
      }
    // The best policy in all its formats, and what is not much worse: the rest would flatten them, and is told at the
    // upper edge.
    low_ = front_.back().loss;
    double own = low_;
    for (const point& p : best().points) own = std::max(own, p.loss);
    high_ = std::min(high_, low_ + std::max(1.5 * (own - low_), 0.02 * low_));
    const double room = std::max(high_ - low_, 1e-3);
    low_ -= 0.25 * room;  // for names
    high_ += 0.06 * room;
    const double beside = std::max(0.05 * (most_ - least_), 0.1);
    least_ -= beside;
    most_ += beside;
  }

  std::string draw() const { return svg_head(width, height) + titles() + axes() + front() + lines() + "</svg>\n"; }

 private:
  const series& best() const {
    return *std::ranges::find_if(all_, [&](const series& s) {
      return std::ranges::any_of(s.points, [&](const point& p) { return p.loss == front_.back().loss; });
    });
  }

  double x(double bytes) const { return left + (right - left) * (std::log2(bytes) - least_) / (most_ - least_); }
  double y(double loss) const { return bottom - (bottom - top) * (loss - low_) / (high_ - low_); }

  std::string titles() const {
    std::string out = svg_findings(comparison_.findings());
    const subject& s = comparison_.subject();
    const std::string cache = setting_.cache_bytes > 0
                                  ? fmt::format("caches of {}", bytes_text(static_cast<double>(setting_.cache_bytes)))
                                  : fmt::format("a cache of {}", tokens_text(setting_.cache));
    out += svg_text(
        20, bottom + 68, "fill=\"#555\" font-size=\"12\"",
        fmt::format("{} ({}) on {} of {}, {}.", s.name, describe(*s.model), amount(setting_), setting_.text, cache));
    return out + svg_text(20, bottom + 85, "fill=\"#555\" font-size=\"12\"",
                          "Means after the first eviction. Grey: no other has fewer bits in as few bytes. At the upper "
                          "edge: far worse than all this.");
  }

  std::string axes() const {
    std::string out = svg_text(20, top - 22, "", "bits per byte");
    const double unit = std::pow(10, std::floor(std::log10((high_ - low_) / 4)));
    double step = unit;
    for (const double larger : {2., 5., 10.})
      if ((high_ - low_) / step > 7) step = larger * unit;
    const int decimals = std::max(1, static_cast<int>(std::ceil(-std::log10(step))));
    for (double tick = std::ceil(low_ / step) * step; tick <= high_; tick += step) {
      out += svg_line(left, y(tick), right, y(tick), "stroke=\"#e6e6e6\"");
      out += svg_text(left - 8, y(tick) + 4, "text-anchor=\"end\"", fmt::format("{:.{}f}", tick, decimals));
    }
    out += svg_line(left, bottom, right, bottom, "stroke=\"#222\"");
    for (double power = 1; power < std::exp2(most_); power *= 10)
      for (const double bytes : {power, 2 * power, 5 * power}) {
        if (std::log2(bytes) < least_ || std::log2(bytes) > most_) continue;
        out += svg_line(x(bytes), bottom, x(bytes), bottom + 5, "stroke=\"#222\"");
        out += svg_text(x(bytes), bottom + 20, "text-anchor=\"middle\"", bytes_text(bytes));
      }
    return out + svg_text((left + right) / 2, bottom + 40, "text-anchor=\"middle\"",
                          "bytes of all layers' caches (log scale)");
  }

  std::string front() const {
    std::string path;
    for (const point& p : front_)
      if (p.loss <= high_)
        path += path.empty() ? fmt::format("M{:.1f} {:.1f}", x(p.bytes), y(p.loss))
                             : fmt::format("H{:.1f}V{:.1f}", x(p.bytes), y(p.loss));
    return fmt::format("<path d=\"{}\" fill=\"none\" stroke=\"#ccc\" stroke-width=\"7\" stroke-linejoin=\"round\"/>\n",
                       path);
  }

  std::string lines() const {
    std::string out;
    for (std::size_t i = 0; i < all_.size(); ++i) {
      const series& s = all_[i];
      const std::string stroke = fmt::format("stroke=\"{}\" stroke-width=\"2\" stroke-dasharray=\"{}\"", s.style.color,
                                             *s.style.dashes ? s.style.dashes : "none");
      std::string path;
      for (const point& p : s.points) {
        const double at = p.loss > high_ ? top : y(p.loss);
        path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", x(p.bytes), at);
        out += p.loss > high_ ? fmt::format("<path d=\"M{:.1f} {:.1f}l5 9h-10z\" fill=\"{}\"/>\n", x(p.bytes), top - 7,
                                            s.style.color)
                              : fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4.5\" fill=\"{}\"/>\n", x(p.bytes),
                                            at, s.style.color);
      }
      out += fmt::format("<path d=\"{}\" fill=\"none\" {}/>\n", path, stroke);
      std::string name = s.name;
      if (std::ranges::all_of(s.points, [&](const point& p) { return p.loss > high_; })) {
        const auto [least, most] = std::ranges::minmax_element(s.points, {}, &point::loss);
        name += fmt::format(": {:.3f} to {:.3f}", least->loss, most->loss);
      }
      const double at = top + 24 + label_height * static_cast<double>(i);
      out += svg_line(right - 210, at, right - 184, at, stroke);
      out += svg_text(right - 178, at + 4, fmt::format("fill=\"{}\" font-weight=\"bold\"", s.style.color), name);
    }
    return out + names();
  }

  // Of the best policy's formats, and of what no other beats: below their points, none over another.
  std::string names() const {
    struct name {
      double x, y;
      const char* color;
      std::string text;
      double half() const { return 3.9 * static_cast<double>(text.size()); }
    };
    std::vector<name> all, placed;
    for (const series& s : all_)
      for (const point& p : s.points) {
        const bool in_front = std::ranges::any_of(
            front_, [&](const point& f) { return f.bytes == p.bytes && f.loss == p.loss && f.format == p.format; });
        if (p.loss <= high_ && (in_front || &s == &best()))
          all.push_back({x(p.bytes), y(p.loss), s.style.color, fmt::format("{} {:.3f}", p.format, p.loss)});
      }
    std::ranges::sort(all, {}, &name::x);
    std::string out;
    for (name n : all) {
      const auto is_taken = [&] {
        return std::ranges::any_of(placed, [&](const name& other) {
          return std::abs(other.x - n.x) < other.half() + n.half() && std::abs(other.y - n.y) < 15;
        });
      };
      const double at = n.y;
      for (n.y += 20; is_taken() && n.y + 16 < bottom;) n.y += 16;
      if (is_taken() || n.y > bottom - 5)  // no room: above it
        for (n.y = at - 12; is_taken();) n.y -= 16;
      placed.push_back(n);
      out += svg_text(n.x, n.y, fmt::format("text-anchor=\"middle\" fill=\"{}\"", n.color), n.text);
    }
    return out;
  }

  const setting& setting_;
  const comparison& comparison_;
  std::vector<series> all_;
  std::vector<point> front_;
  double low_ = 0, high_ = -std::numeric_limits<double>::infinity();
  double least_ = std::numeric_limits<double>::infinity(), most_ = -least_;
};

}  // namespace

std::string bytes_text(double bytes) {
  return bytes < 1e6 ? fmt::format("{:.3g} kB", bytes / 1e3) : fmt::format("{:.3g} MB", bytes / 1e6);
}

std::string to_front_svg(const setting& s, const comparison& c) { return front_chart(s, c).draw(); }

}  // namespace compare
