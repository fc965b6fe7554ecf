#!/usr/bin/env python3
"""Writes examples/text/unicode_ranges.hpp, by which the tokenizer tells letters, numbers and spaces apart.

    python3 -m venv build/venv && build/venv/bin/pip install unicodedata2==16.0.0
    build/venv/bin/python tools/unicode_ranges.py > examples/text/unicode_ranges.hpp

The reference is Hugging Face's tokenizers 0.23.3, asked for the class of every code point. Its letters and spaces are
those of Unicode 16.0 (Oniguruma's \\p{L} and \\s); its numbers are those of Unicode 17.0 (Rust's char::is_numeric), which
added thirteen. Python 3.14 has these tables too, and needs no package.
"""

import sys

try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata

NUMBERS_OF_UNICODE_17 = [*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)]


def ranges(belongs):
    """The code points for which `belongs` holds, as [first, last] pairs."""
    found = []
    for code_point in range(sys.maxunicode + 1):
        if not belongs(code_point):
            continue
        if found and found[-1][1] == code_point - 1:
            found[-1][1] = code_point
        else:
            found.append([code_point, code_point])
    return found


def array(name, comment, pairs):
    lines, line = [], " "
    for first, last in pairs:
        entry = f" {{0x{first:x}, 0x{last:x}}},"
        if len(line + entry) > 118:
            lines.append(line)
            line = " "
        line += entry
    print(f"// {comment}\ninline constexpr code_point_range {name}[] = {{")
    print("\n".join([*lines, line]) + "\n};\n")


def category(code_point):
    return unicodedata.category(chr(code_point))


if unicodedata.unidata_version != "16.0.0":
    sys.exit(f"unicodedata is of Unicode {unicodedata.unidata_version}, had to be 16.0.0: pip install unicodedata2==16.0.0")

print("""#pragma once

// Written by tools/unicode_ranges.py; of Unicode 16.0 where nothing else is said.

// clang-format off

namespace text::unicode {

struct code_point_range {
  char32_t first, last;
};
""")
array("letters", r"\p{L}", ranges(lambda c: category(c)[0] == "L"))
array("numbers", r"\p{N} of Unicode 17.0", ranges(lambda c: category(c)[0] == "N" or c in NUMBERS_OF_UNICODE_17))
array("spaces", r"\s", ranges(lambda c: category(c)[0] == "Z" or c == 0x85 or 0x9 <= c <= 0xD))
print("}  // namespace text::unicode")
