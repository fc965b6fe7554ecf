#!/usr/bin/env python3
"""Writes tests/golden/smollm2-REFERENCE.gguf: what a reference predicts after each of 512 tokens.

REFERENCE is numpy (the decoder below in float64, on the weights as the package gguf dequantises them) or llama_cpp
(llama.cpp on the file itself, by llama-cpp-python). Both read the same tokens, from the start of the held-out text.

pip install gguf numpy tokenizers [llama-cpp-python]
tools/golden/smollm2.py numpy ~/.cache/sinkcache/SmolLM2-135M-Instruct.Q4_1.gguf tests/golden/smollm2-numpy.gguf

A vocabulary of 49,152 does not fit a small file. For each position this keeps the most likely tokens, whose share of the
divergence is then exact, and a few of the others, drawn with their own probabilities, from which the rest of it is
estimated without bias: see tests/examples/smollm2_test.cpp.
"""

import hashlib
import pathlib
import sys

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

POSITIONS = 512
KEPT = {"numpy": (96, 32), "llama_cpp": (64, 16)}  # the most likely; drawn among the others


def token_ids(reader):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    text = pathlib.Path(__file__).parents[2] / "examples/data/sotu-heldout.txt"
    return tokenizer.encode(text.read_text()[: 8 * POSITIONS]).ids[:POSITIONS]


def numpy_logits(reader, path, ids):
    del path
    field = lambda key: reader.fields["llama." + key].contents()
    tensors = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    weight = lambda name: tensors[name + ".weight"]
    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    eps, n = field("attention.layer_norm_rms_epsilon"), len(ids)
    dim = field("embedding_length") // heads

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale

    # Rows of q and k lie as llama.cpp's converter left them: dimensions 2i and 2i + 1 of a head are one complex number.
    turns = np.exp(1j * np.arange(n)[:, None] * field("rope.freq_base") ** (-np.arange(0, dim, 2) / dim))

    def turned(x):
        z = np.ascontiguousarray(x.reshape(n, -1, dim)).view(np.complex128) * turns[:, None, :]
        return z.view(np.float64)

    embedding = weight("token_embd")
    x = embedding[ids]
    for layer in range(field("block_count")):
        of = lambda name: weight(f"blk.{layer}.{name}")
        h = norm(x, of("attn_norm"))
        q, k = turned(h @ of("attn_q").T), turned(h @ of("attn_k").T)
        v = (h @ of("attn_v").T).reshape(n, -1, dim)
        out = np.empty((n, heads, dim))
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, kv].T / np.sqrt(dim)
            scores[np.triu_indices(n, 1)] = -np.inf
            p = np.exp(scores - scores.max(1, keepdims=True))
            out[:, head] = p / p.sum(1, keepdims=True) @ v[:, kv]
        x = x + out.reshape(n, -1) @ of("attn_output").T
        h = norm(x, of("ffn_norm"))
        gate, up = h @ of("ffn_gate").T, h @ of("ffn_up").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ of("ffn_down").T
    return norm(x, weight("output_norm")) @ tensors.get("output.weight", embedding).T


def llama_cpp_logits(reader, path, ids):
    del reader
    from llama_cpp import Llama

    model = Llama(path, n_ctx=POSITIONS, n_batch=POSITIONS, logits_all=True, verbose=False)
    model.eval(ids)
    return model.scores[: len(ids)].astype(np.float64)


def main(reference, path, out):
    reader = GGUFReader(path)
    ids = token_ids(reader)
    logits = {"numpy": numpy_logits, "llama_cpp": llama_cpp_logits}[reference](reader, path, ids)
    largest = logits.max(-1, keepdims=True)
    log_p = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))

    rng = np.random.default_rng(1)
    most, drawn = KEPT[reference]
    kept = []
    for row in log_p:
        order = np.argsort(-row, kind="stable")
        others = order[most:]
        p = np.exp(row[others])
        kept.append(np.concatenate([order[:most], rng.choice(others, drawn, p=p / p.sum())]))
    kept = np.array(kept)

    writer = GGUFWriter(out, "golden")
    writer.add_string("reference", reference)
    writer.add_string("model_sha256", hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest())
    writer.add_uint32("most_likely", most)
    writer.add_uint32("drawn", drawn)
    array = lambda key, values, kind: writer.add_key_value(key, values.tolist(), GGUFValueType.ARRAY, sub_type=kind)
    array("token_ids", np.array(ids), GGUFValueType.UINT16)
    array("kept_ids", kept.ravel(), GGUFValueType.UINT16)
    array("kept_log_p", np.take_along_axis(log_p, kept, 1).ravel(), GGUFValueType.FLOAT32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    targets = np.arange(len(ids) - 1)
    print(f"{reference}: {-log_p[targets, ids[1:]].mean() / np.log(2):.4f} bits a token over {len(targets)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
