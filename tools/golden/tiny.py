#!/usr/bin/env python3
"""Writes MODEL.ref.json beside MODEL.safetensors, or compares with it where it is there: the losses of a small model
with three caches, and its logits after 16 tokens, by plain numpy in double. tests/examples/engine_test.cpp repeats them.
A difference above 2e-4 is an error, as there.

pip install numpy
tools/golden/tiny.py examples/models/*.safetensors
"""

import json
import pathlib
import sys

import numpy as np

CACHES = ((0, 128), (1, 127), (4, 124))  # pinned tokens, window
TOKENS, TOLERANCE = 20480, 2e-4
TEXT = pathlib.Path(__file__).parents[2] / "examples/data/sotu-heldout.txt"
SOURCE = ("sotu-heldout.txt; ids = [256] + bytes; nll_bits[i] = bits of ids[i+1] given the cache after ids[0..i]; "
          "by tools/golden/tiny.py")


def load(path):
    """The metadata, and the bf16 tensors as doubles."""
    file = path.read_bytes()
    begin = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:begin])
    metadata, tensors = header.pop("__metadata__"), {}
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"{path}: {name} is {entry['dtype']}, had to be BF16")
        first, last = (begin + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(file[first:last], "<u2").astype(np.uint32) << 16
        tensors[name] = bits.view(np.float32).astype(np.float64).reshape(entry["shape"])
    return metadata, tensors


def rotated(x, positions, theta):
    """x: [heads, tokens, dim], half-split pairs."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


def attend(q, k, v, null, theta, pinned, window):
    """What each token's query gets from the pinned tokens and the newest `window`, itself included. In the cache the
    pinned ones stand directly before the window, so a query is never further from them than the cache is long."""
    tokens = np.arange(q.shape[1])
    near, far = rotated(q, tokens, theta), rotated(q, np.minimum(tokens, pinned + window - 1), theta)
    k = rotated(k, tokens, theta)
    out = np.empty_like(q)
    for first in range(0, len(tokens), 256):
        rows = tokens[first:first + 256]
        keys = np.arange(max(pinned, first - window + 1), rows[-1] + 1)
        ages = rows[:, None] - keys
        of_window = np.where((ages >= 0) & (ages < window), near[:, rows] @ k[:, keys].transpose(0, 2, 1), -np.inf)
        of_pinned = np.where(rows[:, None] >= tokens[:pinned], far[:, rows] @ k[:, :pinned].transpose(0, 2, 1), -np.inf)
        logits = np.concatenate([of_pinned, of_window], -1) / np.sqrt(q.shape[-1])
        largest = np.maximum(logits.max(-1), null)[..., None]
        weights = np.exp(logits - largest)
        weights /= weights.sum(-1, keepdims=True) + np.exp(null[..., None] - largest)
        out[:, rows] = weights[..., :pinned] @ v[:, :pinned] + weights[..., pinned:] @ v[:, keys]
    return out


def logits_of(metadata, tensors, ids, pinned, window):
    """After each of the tokens, as if they had been decoded one by one. What a token leaves in the caches depends on
    what it saw in them, not on what was evicted since: so layer by layer, all tokens at once."""
    heads, dim = int(metadata["num_attention_heads"]), int(metadata["head_dim"])
    theta, eps = float(metadata["rope_theta"]), float(metadata["rms_norm_eps"])

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    def by_head(x):
        split = x.reshape(len(ids), -1, dim).transpose(1, 0, 2)
        return split.repeat(heads // len(split), 0)

    embedding = tensors["model.embed_tokens.weight"]
    x = embedding[ids]
    for layer in range(int(metadata["num_hidden_layers"])):
        of = lambda name: tensors[f"model.layers.{layer}.{name}"]
        null = {"softmax": lambda: np.full(heads, -np.inf), "softmax1": lambda: np.zeros(heads),
                "sink": lambda: of("self_attn.sinks")}[metadata["attention"]]()
        h = norm(x, of("input_layernorm.weight"))
        q, k, v = (by_head(h @ of(f"self_attn.{name}_proj.weight").T) for name in "qkv")
        out = attend(q, k, v, null[:, None], theta, pinned, window)
        x = x + out.transpose(1, 0, 2).reshape(len(ids), -1) @ of("self_attn.o_proj.weight").T
        h = norm(x, of("post_attention_layernorm.weight"))
        gate, up = h @ of("mlp.gate_proj.weight").T, h @ of("mlp.up_proj.weight").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ of("mlp.down_proj.weight").T
    return norm(x, tensors["model.norm.weight"]) @ embedding.T


def reference(path):
    metadata, tensors = load(path)
    ids = np.array([256, *TEXT.read_bytes()[:TOKENS]])
    runs = []
    for pinned, window in CACHES:
        logits = logits_of(metadata, tensors, ids[:-1], pinned, window)
        largest = logits.max(-1)
        total = largest + np.log(np.exp(logits - largest[:, None]).sum(-1))
        bits = (total - logits[np.arange(TOKENS), ids[1:]]) / np.log(2)
        runs.append({"sinks": pinned, "window": window,
                     "bpb_after_first_eviction_20k": bits[pinned + window:].mean(),
                     "nll_bits_first_512": bits[:512].round(5).tolist()})
    causal = logits_of(metadata, tensors, ids[:16], 0, 16)[15]
    return {"source": SOURCE, "first_ids": ids[:600].tolist(), "runs": runs,
            "logits_at_15_full_causal": causal.round(5).tolist()}


def differences(ours, theirs):
    """The largest of a token's bits, of the means, of the logits."""
    if ours["first_ids"] != theirs["first_ids"]:
        raise ValueError("first_ids had to be those of " + SOURCE)
    values = lambda key, of: np.array([run[key] for run in of["runs"]] if key in of["runs"][0] else of[key])
    return [abs(values(key, ours) - values(key, theirs)).max()
            for key in ("nll_bits_first_512", "bpb_after_first_eviction_20k", "logits_at_15_full_causal")]


if not sys.argv[1:]:
    sys.exit(__doc__)
for path in map(pathlib.Path, sys.argv[1:]):
    to, computed = path.with_suffix(".ref.json"), reference(path)
    if not to.exists():
        to.write_text(json.dumps(computed))
        print(f"{to} written")
        continue
    worst = differences(computed, json.loads(to.read_text()))
    print("{}: largest difference of a loss {:.1e} bits, of a mean {:.1e}, of a logit {:.1e}".format(to.name, *worst))
    if not all(difference <= TOLERANCE for difference in worst):  # nor NaN
        sys.exit(f"{to} is not repeated within {TOLERANCE:g}")
