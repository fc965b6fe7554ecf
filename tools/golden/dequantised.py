#!/usr/bin/env python3
"""Writes tests/golden/dequantised.gguf: random blocks of each type, and beside them what the package gguf makes of them.

pip install gguf numpy; tools/golden/dequantised.py tests/golden/dequantised.gguf
"""

import sys

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

ROWS, COLS = 3, 512
# Where a block has its float16 scales; every other byte may be anything.
SCALES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208], "Q5_0": [0], "Q5_1": [0, 2],
          "Q5_K": [0, 2], "Q2_K": [80, 82], "Q3_K": [108], "IQ4_NL": [0]}

rng = np.random.default_rng(5)
writer = GGUFWriter(sys.argv[1], "golden")
writer.add_array("words", ["sink", "", "\u00e9"])
writer.add_array("integers", [-3, 0, 2**31 - 1])
writer.add_float32("pi", np.pi)
writer.add_bool("flag", True)


def add(name, raw, values):
    writer.add_tensor(name, raw, raw_dtype=Type[name])
    writer.add_tensor(name + ".expected", values.astype(np.float32))


values = rng.standard_normal((ROWS, COLS)).astype(np.float32)
add("F32", values, values)
half = (values * np.float32(2.0) ** rng.integers(-26, 14, values.shape)).astype(np.float16)  # subnormal ones too
add("F16", half, half)
brain = (values.view(np.uint32) >> 16).astype(np.uint16)
add("BF16", brain.view(np.uint8).reshape(ROWS, -1), (brain.astype(np.uint32) << 16).view(np.float32))
for name, offsets in SCALES.items():
    block, size = GGML_QUANT_SIZES[Type[name]]
    raw = rng.integers(0, 256, (ROWS * COLS // block, size), dtype=np.uint8)
    for offset in offsets:
        scales = rng.standard_normal(len(raw)) * 2.0 ** rng.integers(-20, 4, len(raw))
        raw[:, offset : offset + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    raw = raw.reshape(ROWS, -1)
    add(name, raw, dequantize(raw, Type[name]))

writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
