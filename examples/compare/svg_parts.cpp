// First: fmt 9 would take the namespace compare for its own function of that name.
#include <fmt/format.h>

#include "svg_parts.hpp"

#include <algorithm>
#include <cctype>

#include "comparison.hpp"

namespace compare {
namespace {

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '<')
      out += "&lt;";
    else if (c == '&')
      out += "&amp;";
    else
      out += c;
  }
  return out;
}

// Lines of at most `columns` characters: a picture is 960 wide.
std::vector<std::string> wrapped(const std::string& words, std::size_t columns) {
  std::vector<std::string> lines = {""};
  for (std::size_t first = 0; first < words.size();) {
    const std::size_t last = std::min(words.find(' ', first), words.size());
    if (!lines.back().empty() && lines.back().size() + 1 + last - first > columns) lines.emplace_back();
    if (!lines.back().empty()) lines.back() += ' ';
    lines.back().append(words, first, last - first);
    first = last + 1;
  }
  return lines;
}

}  // namespace

std::string svg_text(double x, double y, const std::string& attributes, const std::string& content) {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" {}>{}</text>\n", x, y, attributes, escaped(content));
}

std::string svg_line(double x1, double y1, double x2, double y2, const std::string& attributes) {
  return fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" {}/>\n", x1, y1, x2, y2,
                     attributes);
}

std::string svg_head(double width, double height) {
  return fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" "
      "font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#222\">\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n",
      width, height);
}

std::vector<double> spread(const std::vector<double>& wanted, double bottom) {
  std::vector<std::size_t> order(wanted.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return wanted[a] < wanted[b]; });
  std::vector<double> at = wanted;
  // Down from the top, then up from the bottom as far as that went too far.
  for (std::size_t i = 1; i < order.size(); ++i) at[order[i]] = std::max(at[order[i]], at[order[i - 1]] + label_height);
  double limit = bottom;
  for (std::size_t i = order.size(); i-- > 0; limit = at[order[i]] - label_height)
    at[order[i]] = std::min(at[order[i]], limit);
  return at;
}

std::string svg_findings(std::vector<std::string> findings) {
  const std::vector<std::string> title = wrapped(findings.front(), 80);
  std::string out;
  double at = 44 - 12 * static_cast<double>(title.size());
  for (const std::string& each : title) {
    out += svg_text(20, at, "font-size=\"19\" font-weight=\"bold\"", each);
    at += 22;
  }
  findings.erase(findings.begin());
  if (findings.empty()) return out;
  findings.front()[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(findings.front()[0])));
  for (const std::string& each : wrapped(sentence(findings), 140)) {
    out += svg_text(20, at, "fill=\"#555\"", each);
    at += 17;
  }
  return out;
}

}  // namespace compare
