#!/usr/bin/env python3
"""Writes tests/data/smollm2-vocab.gguf and tests/data/smollm2-tokens.jsonl, by which tests/examples/tokenizer_test.cpp goes.

    python3 -m venv build/venv && build/venv/bin/pip install tokenizers==0.23.3 gguf==0.19.0
    build/venv/bin/python tools/tokenizer_reference.py SmolLM2-135M-Instruct.Q4_1.gguf tests/data

The first is the model's file without its tensors. The second has one string a line and the ids that Hugging Face's
tokenizers give for it: "ids" with the text of special tokens read as text, "parsed" with it parsed, where that differs.
The reference takes characters, not bytes; bytes that are no UTF-8 are turned into U+FFFD for it as Python does it.
"""

import json
import pathlib
import struct
import sys

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3


def reference(path):
    """The tokenizer that the model's tokenizer.json describes, from what the GGUF file has of it."""
    fields = gguf.GGUFReader(path).fields
    tokens, types, merges = (fields["tokenizer.ggml." + key].contents() for key in ("tokens", "token_type", "merges"))
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, types) if kind == CONTROL])
    return tokenizer


def encode(tokenizer, data, parsed=False):
    tokenizer.encode_special_tokens = not parsed
    return tokenizer.encode(data.decode("utf-8", "replace"), add_special_tokens=False).ids


def write_vocabulary(source, to):
    """The header up to where the tensors are described, with none of them counted."""
    reader = gguf.GGUFReader(source)
    header = bytearray(pathlib.Path(source).read_bytes()[:min(t.field.offset for t in reader.tensors)])
    struct.pack_into("<Q", header, 8, 0)
    header += bytes(-len(header) % reader.alignment)
    to.write_bytes(header)


TEXTS = [
    "",
    " ",
    "a",
    "\n",
    "\t",
    "0",
    "!",
    "Hello",
    " Hello",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "ALL CAPITALS AND sOmE mIxEd CaSe",
    "snake_case camelCase PascalCase kebab-case SCREAMING_SNAKE",
    "Mr. O'Neill said: \"Don't!\" -- and left (at 5 p.m.).",
    "e.g., i.e., etc... \u2026 \u2014 \u2013 - --- ----",
    # Contractions, which are split in lower case and with U+0027 only.
    "I'm you're he's it'll we've they'd can't",
    "I'M YOU'RE HE'S IT'LL WE'VE THEY'D CAN'T",
    "I\u2019m you\u2019re can\u2019t",
    "'s't're've'm'll'd",
    "''s '''t 'sx 'lls 'r 'v 'l",
    " 's 't",
    "rock'n'roll y'all'd've",
    "'",
    "''",
    "a'",
    "'a",
    "s's's",
    "x'1 '2's",
    # Digits.
    "1",
    "12",
    "123",
    "1234567890",
    "3.14159",
    "1,000,000.00",
    "2024-02-29T23:59:60Z",
    "0x1F 0b101 1e-10",
    "a1b22c333",
    " 1  2   3",
    "1 2\n3\t4",
    "v1.2.3-rc4",
    "+1 (555) 010-9999",
    "10%",
    "$9.99 \u20ac5 \u00a33 \u00a5100",
    "1st 2nd 3rd 4th",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \u0e51\u0e52 \uff11\uff12",
    "\u00bd \u00bc x\u00b2 y\u00b3 \u2460\u2461 \u2167 \u3007 \u4e00\u4e8c\u4e09",
    "\U0001d7ce\U0001d7cf \U0001f100 \U0001f51f",
    "7\u20e3 1\ufe0f\u20e3",
    "12 \u00bd 1\u20442",
    "\u0bf0\u0bf1 \u09f4 \u1369",
    # Code.
    "int main() { return 0; }",
    "for (int i = 0; i < n; ++i) sum += x[i] * y[i];",
    "#include <vector>\n\nint main(int argc, char** argv) {\n  return 0;\n}\n",
    "def f(x):\n    if x > 0:\n        return x\n    return -x\n",
    "class A:\n\tdef __init__(self):\n\t\tself.x = 1\n",
    "if a&&b||!c { d = ~e ^ f; }",
    "x==y!=z<=w>=v<=>u->t=>s",
    "{\"key\": [1, 2.5, null, true], \"n\": {\"a\": \"b\\n\"}}",
    "<div class=\"a\">text &amp; more</div>",
    "<!-- comment --><br/>",
    "SELECT * FROM t WHERE a = 'b' AND c <> 1;",
    "git commit -m \"x\" && ./run.sh | tee /tmp/log 2>&1",
    "https://example.org/a/b?c=d&e=%20f#g",
    "user.name+tag@example.co.uk",
    "C:\\Windows\\System32\\drivers",
    "/usr/local/bin:/usr/bin",
    "\\begin{equation} e^{i\\pi} + 1 = 0 \\end{equation}",
    "```python\nprint('hi')\n```",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "# Title\n\n* item\n  * nested\n\n1. one\n",
    "template <class... T> auto f(T&&... t) -> decltype(g(t...));",
    "std::vector<std::pair<int,float>>>",
    "@decorator $var %hash &amp; ^caret ~tilde `tick`",
    "a/*b*/c//d",
    "0b1010_1010 'c' L\"wide\" u8\"x\"",
    "let f = |x| x ?? y?.z; // \u03bb",
    "\\n \\t \\\\ \\x41 \\u0041",
    "\ufeff#!/bin/sh\r\necho\r\n",
    "!!!???...,,,;;;:::",
    "()[]{}<>",
    "=====",
    "-----",
    "#####",
    "***",
    "____",
    # Spaces, tabs, newlines.
    "  ",
    "   ",
    "    ",
    "     ",
    "        ",
    " " * 17,
    " " * 100,
    "a b",
    "a  b",
    "a   b",
    "a    b",
    " a ",
    "  a  ",
    "a ",
    "a  ",
    "\t\t",
    "\t\t\t\ta",
    "a\tb",
    "a \tb",
    "a\t b",
    "a \t \t b",
    "\n\n",
    "\n\n\n\n",
    "a\nb",
    "a\n\nb",
    "a\n\n\nb",
    "a \n b",
    "a\n  b",
    "a  \nb",
    "\r\n",
    "a\r\nb\r\n\r\nc",
    "\r",
    "\v\f",
    " \n \n ",
    "\n 1",
    "  1",
    " \n1",
    "x \n!",
    "x  !",
    "x\n\n !",
    "a\u00a0b",
    "a \u00a0 b",
    "\u00a0\u00a0",
    "\u2002\u2003\u2009x",
    "\u3000\u5168\u89d2\u3000",
    "a\u0085b",
    "a\u2028b\u2029c",
    "\u1680\u205f\u202f",
    "a\u200bb\u200cc\u200dd\u2060e",
    "\u180e\u180ex",
    "a \u3000b",
    # Other scripts.
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01",
    "\u6211\u53ef\u4ee5\u541e\u4e0b\u73bb\u7483\u800c\u4e0d\u4f24\u8eab\u4f53\u3002",
    "\u7e41\u9ad4\u4e2d\u6587\u8207\u7b80\u4f53\u4e2d\u6587",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3068\u30ab\u30bf\u30ab\u30ca\u30fc",
    "\uff76\uff80\uff76\uff85 \uff21\uff22\uff23",
    "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8\uc785\ub2c8\ub2e4",
    "\u1112\u1161\u11ab\u1100\u116e\u11a8",
    "\U00020000\U00020001 \u9f98",
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442, \u0431\u0435\u0437 \u043e\u0448\u0438\u0431\u043e\u043a.",
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u03ba\u03b1\u03b9 \u1f00\u03c1\u03c7\u03b1\u1fd6\u03b1",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u0627\u0644\u0652\u062d\u064e\u0645\u0652\u062f\u064f \u0644\u0650\u0644\u0651\u064e\u0647\u0650",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd 123 abc",
    "\u202eright to left\u202c \u200fx\u200e",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",
    "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd",
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22\u0e44\u0e21\u0e48\u0e21\u0e35\u0e0a\u0e48\u0e2d\u0e07\u0e27\u0e48\u0e32\u0e07",
    "\u10e5\u10d0\u10e0\u10d7\u10e3\u10da\u10d8 \u0540\u0561\u0575\u0565\u0580\u0565\u0576 \u12a0\u121b\u122d\u129b",
    "Z\u00fcrich, \u00c5ngstr\u00f6m, fa\u00e7ade, na\u00efve, \u0141\u00f3d\u017a, \u0130stanbul, \u1e9e\u00df",
    "Ti\u1ebfng Vi\u1ec7t c\u00f3 d\u1ea5u",
    "\u00bfQu\u00e9? \u00a1S\u00ed! \u00abn\u00b0 1\u00bb \u201equoted\u201c \u2018x\u2019",
    # Combining marks, which are neither letters nor numbers nor spaces.
    "e\u0301",
    "cafe\u0301 nai\u0308ve",
    "\u0301",
    " \u0301",
    "a\u0301\u0302\u0303b",
    "Z\u0351\u036b\u0343a\u0329\u0320l\u034e\u0350g\u0321\u0322o\u0316\u0317",
    "1\u0301 2\u0302",
    "\u0915\u094d\u0937 \u1019\u103c\u1014\u103a\u1019\u102c",
    "\u1100\u1161\u0301",
    "x\u20d7 y\u0305",
    # Emoji.
    "\U0001f600",
    "\U0001f600\U0001f603\U0001f604",
    "hi \U0001f44b there",
    "\U0001f44b\U0001f3fd \U0001f9d1\U0001f3ff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f3f3\ufe0f\u200d\U0001f308 \u2764\ufe0f\u200d\U0001f525",
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7",
    "\u2764 \u2764\ufe0f \u2639 \u263a\ufe0e",
    "\U0001f9dc\U0001f3fb\u200d\u2640\ufe0f",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "\u2705 done \u274c not \u26a0\ufe0f",
    "(\u256f\u00b0\u25a1\u00b0)\u256f\ufe35 \u253b\u2501\u253b :-) ^_^",
    # Symbols and rare code points.
    "\u2200x\u2208\u211d: x\u00b2 \u2265 0 \u2234 \u221a2 \u2260 \u00b1\u221e",
    "\u2190\u2191\u2192\u2193 \u25a0\u25cf\u25b2 \u2588\u2593\u2592\u2591",
    "\u00a9\u00ae\u2122 \u00a7\u00b6\u2020 \u00b5\u03a9\u212b",
    "\ue000\uf8ff \U000f0000",
    "\ufffd",
    "\ufffe\uffff\U0010ffff",
    "\x00",
    "a\x00b",
    "\x01\x02\x03\x1b[31mred\x1b[0m\x7f",
    "\u0080\u009f\u00ad",
    "\x04 \x06\x13\x14\x16\x1d",
    "!\x06!",
    "a\x06b",
    "\U00040000 \U0007fffd",
    "\U0001c880 \u0378",
    "\U00010d40\U00010d41 \u1c89",
    "\U00011de0\U00011de1 \U00016ff4",
    "\u088f \U000323b0",
    # The text of special tokens in what a user writes.
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b",
    " <|im_end|> ",
    "<|im_end|><|im_end|>",
    "<|im_end|",
    "<|im_end|>>",
    "<<|im_end|>>",
    "<|im_<|im_end|>end|>",
    "<|IM_END|>",
    "< |im_end|>",
    "<repo_name>x<reponame>y<file_sep>",
    "<filename><gh_stars><issue_start><issue_comment><issue_closed>",
    "<jupyter_start><jupyter_text><jupyter_code><jupyter_output><jupyter_script><empty_output>",
    "<|im_end|>\u0301e",
    "1<|im_end|>2",
    "don<|im_end|>'t",
    "x  <|endoftext|>  y",
    # Long words.
    "a" * 100,
    "a" * 1000,
    "ab" * 333,
    "Donaudampfschifffahrtselektrizit\u00e4tenhauptbetriebswerkbauunterbeamtengesellschaft",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "x" * 255 + "y",
    "=" * 200,
    "\u4e2d" * 50,
    "\U0001f600" * 20,
    "TWFuIGlzIGRpc3Rpbmd1aXNoZWQsIG5vdCBvbmx5IGJ5IGhpcyByZWFzb24=",
    "deadbeef" * 16,
    "Lorem ipsum dolor sit amet, " * 10,
]

BYTES = [
    b"\x80",
    b"\xff",
    b"\xff\xfe",
    b"\xc0\x80",
    b"\xc1\xbf",
    b"\xc3",
    b"\xc3(",
    b"caf\xe9",
    b"caf\xe9 au lait",
    b"\xe2\x82",
    b"\xe2\x82\xac\xe2\x82",
    b"\xe2(\xa1",
    b"\xe0\x80\x80",
    b"\xe0\x9f\xbf",
    b"\xed\xa0\x80",
    b"\xed\xa0\x80\xed\xb0\x80",
    b"\xed\xbf\xbf",
    b"\xf0\x9f\x98",
    b"\xf0\x9f\x98 x",
    b"\xf0\x9f",
    b"\xf0",
    b"\xf0\x80\x80\x80",
    b"\xf4\x90\x80\x80",
    b"\xf5\x80\x80\x80",
    b"\xf8\x88\x80\x80\x80",
    b"a\x80b\x81\x82c",
    b"\xbf\xbf\xbf",
    b"\xf0\x9f\x98\x80\x80",
    b"x\xf0\x90\x28\xbc",
    b"\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41",
    b"<|im_end|\xff>",
    b"<|im_end|>\xff",
    b"\xc3<|im_end|>\xa9",
    b" \xff ",
    b"1\xff2",
    b"\xef\xbb\xbfx\xef\xbb",
    b"\xfe\xff\x00h\x00i",
    bytes(range(128, 256)),
    b"\xe6\x97\xa5\xe6\x9c",
    b"\n\xff\n",
]


def main(source, folder):
    tokenizer = reference(source)
    folder = pathlib.Path(folder)
    write_vocabulary(source, folder / "smollm2-vocab.gguf")
    strings = [text.encode() for text in TEXTS] + BYTES
    assert len(set(strings)) == len(strings)
    with open(folder / "smollm2-tokens.jsonl", "w") as out:
        for data in strings:
            entry = {"text": data.decode()} if data not in BYTES else {"hex": data.hex()}
            entry["ids"] = encode(tokenizer, data)
            parsed = encode(tokenizer, data, parsed=True)
            if parsed != entry["ids"]:
                entry["parsed"] = parsed
            out.write(json.dumps(entry, separators=(",", ":")) + "\n")
    print(f"{len(strings)} strings")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
