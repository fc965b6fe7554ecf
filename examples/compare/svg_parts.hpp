#pragma once

#include <fmt/format.h>  // before namespace compare, which hides a function of its

// What pictures are made of.

#include <cstddef>
#include <string>
#include <vector>

namespace compare {

struct line_style {
  const char *color, *dashes;
};

// Okabe and Ito's colours, which most colour-blind readers tell apart; dashes for those that lie on one another.
inline constexpr line_style sinks_styles[] = {
    {"#0072b2", ""}, {"#009e73", "8 8"}, {"#cc79a7", "4 6"}, {"#e69f00", "2 5"}};
// Tol's muted colours and one of his vibrant ones, for those that go by scores: as many as a picture can hold.
inline constexpr line_style scored_styles[] = {{"#882255", ""},    {"#999933", ""},    {"#332288", ""},
                                               {"#44aa99", ""},    {"#aa4499", "8 6"}, {"#117733", "8 6"},
                                               {"#661100", "8 6"}, {"#6699cc", "8 6"}, {"#ee7733", "3 5"},
                                               {"#000000", "3 5"}, {"#cc6677", "3 5"}, {"#0077bb", "3 5"}};

std::string svg_text(double x, double y, const std::string& attributes, const std::string& content);
std::string svg_line(double x1, double y1, double x2, double y2, const std::string& attributes);
// The opening tag and a white ground.
std::string svg_head(double width, double height);

inline constexpr double label_height = 18;
// Positions of labels that want to be at `wanted`, none over another, in the order of `wanted`, and none below
// `bottom`.
std::vector<double> spread(const std::vector<double>& wanted, double bottom);

// What was found: the first as a title, the others below it.
std::string svg_findings(std::vector<std::string> findings);

}  // namespace compare
