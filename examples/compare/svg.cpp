// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "svg.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <utility>
#include <vector>

#include "svg_parts.hpp"

namespace compare {
namespace {

constexpr double least_width = 960, height = 600, left = 60, right = 755, top = 136, bottom = 484;
constexpr index_t enough_samples = 8;  // of recompute, to draw a segment

struct curve {
  std::string name, label;
  line_style style;
  std::vector<segment_loss> segments;
  bool sets_scale;
};

// recompute scored too few tokens of a segment to compare with the other lines, which scored all: the text alone makes
// more difference. So it is drawn at its distance from the best policy over the same tokens.
std::vector<segment_loss> recompute_segments(const comparison& c, const run& r) {
  const run& best = c.runs()[c.best()];
  run same_tokens = best;
  for (std::size_t i = 0; i < r.loss_bits.size(); ++i)
    if (std::isnan(r.loss_bits[i])) same_tokens.loss_bits[i] = r.loss_bits[i];
  std::vector<segment_loss> segments = loss_by_segment(r, c.cache());
  const std::vector<segment_loss> all = loss_by_segment(best, c.cache()),
                                  same = loss_by_segment(same_tokens, c.cache());
  for (std::size_t i = 0; i < segments.size(); ++i) segments[i].loss_bits += all[i].loss_bits - same[i].loss_bits;
  std::erase_if(segments, [](const segment_loss& s) { return s.tokens_scored < std::min(enough_samples, s.tokens); });
  return segments;
}

std::vector<curve> curves_of(const comparison& c) {
  std::vector<curve> curves;
  std::size_t sinks = 0, scored = 0;
  for (std::size_t i = 0; i < c.runs().size(); ++i) {
    const run& r = c.runs()[i];
    line_style style{};
    switch (r.policy.is) {
      case policy::kind::full:
        style = {"#777777", ""};
        break;
      case policy::kind::window:
        style = {"#d55e00", ""};
        break;
      case policy::kind::sinks:
        style = sinks_styles[sinks++ % std::size(sinks_styles)];
        break;
      case policy::kind::scored:
        style = scored_styles[scored++ % std::size(scored_styles)];
        break;
      case policy::kind::recompute:
        style = {"#000000", "1 7"};
        break;
    }
    const bool sampled = &r == c.recompute() && c.sampled() && c.best() != comparison::none;
    const double loss = c.evicted() ? c.summary(i).after : c.summary(i).before;
    std::string label = r.policy.name;
    if (!sampled) label += fmt::format(" {:.3f}", loss);
    if (c.evicted() && c.best() != comparison::none)
      label += i == c.best() ? " (best)" : fmt::format(" ({})", signed_percent(c.cost(i)));
    curves.push_back({r.policy.name, label, style, sampled ? recompute_segments(c, r) : loss_by_segment(r, c.cache()),
                      r.policy.is != policy::kind::full});
  }
  return curves;
}

class chart {
 public:
  chart(const setting& s, const comparison& c) : setting_(s), comparison_(c), curves_(curves_of(c)) {
    // The first few tokens cost many bits whatever the policy, and would flatten all that follows.
    const index_t first = c.evicted() ? s.cache / 2 : s.tokens / 8;
    for (curve& each : curves_) {
      if (each.segments.empty()) continue;
      const index_t shown = std::min(first, each.segments.back().first_token);  // something is, however short the text
      std::erase_if(each.segments, [=](const segment_loss& l) { return l.first_token < shown; });
      for (const segment_loss& l : each.segments) first_ = std::min(first_, l.first_token);
    }
    const bool only_full =
        std::none_of(curves_.begin(), curves_.end(), [](const curve& each) { return each.sets_scale; });
    for (const curve& each : curves_) {
      if (!each.sets_scale && !only_full) continue;
      for (const segment_loss& l : each.segments) {
        low_ = std::min(low_, l.loss_bits);
        high_ = std::max(high_, l.loss_bits);
      }
    }
    first_ = std::max<index_t>(first_, 1);
    const double room = std::max(0.1, 0.08 * (high_ - low_));
    low_ -= room;
    high_ += room;
  }

  std::string draw() const {
    return svg_head(width(), height) +
           fmt::format("<clipPath id=\"plot\"><rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"/></clipPath>\n", left,
                       top, right - left, bottom - top) +
           titles() + axes() + marks() + lines() + "</svg>\n";
  }

 private:
  // Room for the longest label.
  double width() const {
    std::size_t longest = 0;
    for (const curve& each : curves_) longest = std::max(longest, each.label.size());
    return std::max(least_width, right + 25 + 8.5 * static_cast<double>(longest));
  }
  double x(index_t token) const {
    const double from = std::log2(static_cast<double>(first_)), to = std::log2(static_cast<double>(setting_.tokens));
    return left + (right - left) * (std::log2(static_cast<double>(std::max<index_t>(token, 1))) - from) / (to - from);
  }
  double y(double loss) const { return bottom - (bottom - top) * (loss - low_) / (high_ - low_); }

  std::string titles() const {
    std::string out = svg_findings(comparison_.findings());
    const subject& s = comparison_.subject();
    std::vector<std::string> notes = {fmt::format("{} ({}) on {} of {}, a cache of {} tokens.", s.name,
                                                  describe(*s.model), amount(setting_), setting_.text,
                                                  grouped(setting_.cache))};
    if (comparison_.evicted())
      notes.push_back(
          "Lines are means over segments; labels are means after the first eviction, and against the best.");
    if (const std::string seeded = seeded_note(std::span(&s, 1)); !seeded.empty()) notes.push_back(seeded);
    double at = bottom + 68;
    for (const std::string& note : notes) {
      out += svg_text(20, at, "fill=\"#555\" font-size=\"12\"", note);
      at += 17;
    }
    return out;
  }

  std::string axes() const {
    std::string out = svg_text(20, top - 42, "", "bits per byte");
    double step = 0.1;
    for (const double larger : {0.2, 0.5, 1.0, 2.0, 5.0})
      if ((high_ - low_) / step > 8) step = larger;
    for (double tick = std::ceil(low_ / step) * step; tick <= high_; tick += step) {
      out += svg_line(left, y(tick), right, y(tick), "stroke=\"#e6e6e6\"");
      out += svg_text(left - 8, y(tick) + 4, "text-anchor=\"end\"", fmt::format("{:.1f}", tick));
    }
    out += svg_line(left, bottom, right, bottom, "stroke=\"#222\"");
    index_t tick = 1;
    while (tick < first_) tick *= 2;
    for (; tick <= setting_.tokens; tick *= 2) {
      out += svg_line(x(tick), bottom, x(tick), bottom + 5, "stroke=\"#222\"");
      out += svg_text(x(tick), bottom + 20, "text-anchor=\"middle\"", grouped(tick));
    }
    return out +
           svg_text((left + right) / 2, bottom + 38, "text-anchor=\"middle\"", "tokens into the stream (log scale)");
  }

  std::string marks() const {
    std::string out;
    const auto mark = [&](index_t token, double at, const char* color, const std::string& what) {
      out +=
          svg_line(x(token), at - 10, x(token), bottom, fmt::format("stroke=\"{}\" stroke-dasharray=\"3 4\"", color));
      out += svg_text(x(token) + 5, at, fmt::format("fill=\"{}\" font-size=\"12\"", color), what);
    };
    if (comparison_.evicted()) mark(setting_.cache, top - 8, "#222", "first eviction");
    const auto trained = comparison_.subject().model->config().max_position_embeddings;
    if (trained && *trained > first_ && *trained < setting_.tokens && *trained != setting_.cache)
      mark(*trained, top - 26, "#777", fmt::format("trained on contexts of {}", grouped(*trained)));
    return out;
  }

  std::string lines() const {
    std::string out;
    std::vector<const curve*> labelled;
    std::vector<double> ends;
    for (const curve& each : curves_) {
      if (each.segments.empty()) continue;
      std::string path;
      index_t end = -1;
      for (const segment_loss& l : each.segments) {
        path += fmt::format("{}{:.1f} {:.1f}H{:.1f}", l.first_token == end ? "L" : "M", x(l.first_token),
                            y(l.loss_bits), x(l.first_token + l.tokens));
        end = l.first_token + l.tokens;
      }
      out += fmt::format(
          "<path d=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2.5\" stroke-linejoin=\"round\" "
          "stroke-linecap=\"round\" stroke-dasharray=\"{}\" clip-path=\"url(#plot)\"/>\n",
          path, each.style.color, *each.style.dashes ? each.style.dashes : "none");
      if (each.segments.back().loss_bits > high_) {
        out += leaving_label(each);
        continue;
      }
      labelled.push_back(&each);
      ends.push_back(y(each.segments.back().loss_bits));
    }
    const std::vector<double> at = spread(ends, bottom);
    for (std::size_t i = 0; i < labelled.size(); ++i) {
      out += svg_line(right + 2, ends[i], right + 12, at[i], fmt::format("stroke=\"{}\"", labelled[i]->style.color));
      out += svg_text(right + 15, at[i] + 4, fmt::format("fill=\"{}\" font-weight=\"bold\"", labelled[i]->style.color),
                      labelled[i]->label);
    }
    return out;
  }

  // Beside the place where the line leaves the chart for good.
  std::string leaving_label(const curve& c) const {
    std::size_t last = c.segments.size() - 1;
    while (last > 0 && c.segments[last - 1].loss_bits > high_) --last;
    return svg_text(std::min(x(c.segments[last].first_token) + 7, right - 150), top + 11,
                    fmt::format("fill=\"{}\" font-weight=\"bold\"", c.style.color), c.label);
  }

  const setting& setting_;
  const comparison& comparison_;
  std::vector<curve> curves_;
  index_t first_ = std::numeric_limits<index_t>::max();
  double low_ = std::numeric_limits<double>::infinity(), high_ = -std::numeric_limits<double>::infinity();
};

}  // namespace

std::string to_svg(const setting& s, const comparison& c) { return chart(s, c).draw(); }

}  // namespace compare
