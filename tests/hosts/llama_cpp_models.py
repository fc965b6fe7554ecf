#!/usr/bin/env python3
"""Writes small GGUF files for the test of llama.cpp's hook: llama_cpp_models.py SMOLLM2.gguf FOLDER

smollm2-f32.gguf is SmolLM2 with its weights as float32, so that both sides multiply the same numbers; gemma3.gguf (windows
and full layers in turn, two rope bases) and gpt-oss.gguf (learned sinks, YaRN, windows, experts) have random weights.
All have SmolLM2's tokenizer. Needs numpy and gguf.
"""

import pathlib
import sys

import numpy
from gguf import GGUFReader, GGUFWriter, GGUFValueType
from gguf.quants import dequantize


def copy_fields(reader, writer, arch, chosen):
    for field in reader.fields.values():
        name = field.name
        if name.startswith("GGUF.") or name == "general.architecture" or not name.startswith(chosen):
            continue
        kind = field.types[0]
        if kind == GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        elif name != "general.file_type":
            writer.add_key_value(name, field.contents(), kind)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def smollm2(reader, path):
    writer = GGUFWriter(path, "llama")
    copy_fields(reader, writer, "llama", ("llama.", "tokenizer.", "general."))
    for t in reader.tensors:
        data = dequantize(t.data, t.tensor_type).astype(numpy.float32)
        writer.add_tensor(t.name, data.reshape(tuple(reversed(t.shape.tolist()))))
    finish(writer)


class random_model:
    def __init__(self, reader, path, arch, dim, heads, kv_heads, head_dim, layers, feed_forward):
        self.dice = numpy.random.default_rng(7)
        self.writer = w = GGUFWriter(path, arch)
        copy_fields(reader, w, arch, ("tokenizer.",))
        w.add_block_count(layers)
        w.add_context_length(4096)
        w.add_embedding_length(dim)
        w.add_feed_forward_length(feed_forward)
        w.add_head_count(heads)
        w.add_head_count_kv(kv_heads)
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
        w.add_layer_norm_rms_eps(1e-6)
        w.add_vocab_size(49152)
        self.random("token_embd.weight", 49152, dim, scale=1)
        self.ones("output_norm.weight", dim)
        for i in range(layers):
            for name, rows, cols in (("attn_q", heads * head_dim, dim), ("attn_k", kv_heads * head_dim, dim),
                                     ("attn_v", kv_heads * head_dim, dim), ("attn_output", dim, heads * head_dim)):
                self.random(f"blk.{i}.{name}.weight", rows, cols)
            self.ones(f"blk.{i}.attn_norm.weight", dim)
            self.ones(f"blk.{i}.post_attention_norm.weight", dim)

    def random(self, name, *shape, scale=1.0):
        numbers = self.dice.standard_normal(shape, dtype=numpy.float32)
        self.writer.add_tensor(name, numbers * numpy.float32(scale / numpy.sqrt(shape[-1])))

    def ones(self, name, *shape, scale=1.0):
        self.writer.add_tensor(name, (scale * (1 + 0.2 * self.dice.standard_normal(shape))).astype(numpy.float32))


def gemma3(reader, path):
    dim, layers, head_dim, feed_forward = 64, 7, 32, 96
    m = random_model(reader, path, "gemma3", dim, 4, 2, head_dim, layers, feed_forward)
    m.writer.add_sliding_window(48)
    m.writer.add_rope_freq_base(1000000.0)
    m.writer.add_float32("gemma3.rope.freq_base_swa", 10000.0)
    for i in range(layers):
        for name, size in (("attn_q_norm", head_dim), ("attn_k_norm", head_dim), ("ffn_norm", dim)):
            m.ones(f"blk.{i}.{name}.weight", size)
        # ggml looks GELU up by f16, which can turn a last bit into 2e-3: what comes of it counts for little here.
        m.ones(f"blk.{i}.post_ffw_norm.weight", dim, scale=0.01)
        m.random(f"blk.{i}.ffn_gate.weight", feed_forward, dim)
        m.random(f"blk.{i}.ffn_up.weight", feed_forward, dim)
        m.random(f"blk.{i}.ffn_down.weight", dim, feed_forward)
    finish(m.writer)


def gpt_oss(reader, path):
    dim, layers, heads, head_dim, experts, feed_forward = 64, 4, 4, 32, 4, 64
    m = random_model(reader, path, "gpt-oss", dim, heads, 2, head_dim, layers, feed_forward)
    w = m.writer
    w.add_sliding_window(48)
    w.add_rope_dimension_count(head_dim)
    w.add_rope_freq_base(150000.0)
    w.add_string("gpt-oss.rope.scaling.type", "yarn")
    w.add_float32("gpt-oss.rope.scaling.factor", 32.0)
    w.add_uint32("gpt-oss.rope.scaling.original_context_length", 128)
    w.add_expert_count(experts)
    w.add_expert_used_count(2)
    w.add_expert_feed_forward_length(feed_forward)
    m.random("output.weight", 49152, dim, scale=4)
    for i in range(layers):
        m.random(f"blk.{i}.attn_sinks.weight", heads, scale=2)
        for name, size in (("attn_q", heads * head_dim), ("attn_k", 2 * head_dim), ("attn_v", 2 * head_dim),
                           ("attn_output", dim), ("ffn_gate_inp", experts)):
            m.random(f"blk.{i}.{name}.bias", size)
        m.random(f"blk.{i}.ffn_gate_inp.weight", experts, dim)
        for name, rows, cols in (("ffn_gate_exps", feed_forward, dim), ("ffn_up_exps", feed_forward, dim),
                                 ("ffn_down_exps", dim, feed_forward)):
            m.random(f"blk.{i}.{name}.weight", experts, rows, cols)
            m.random(f"blk.{i}.{name}.bias", experts, rows)
    finish(w)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    source = GGUFReader(sys.argv[1])
    for name, write in (("smollm2-f32", smollm2), ("gemma3", gemma3), ("gpt-oss", gpt_oss)):
        write(source, folder / f"{name}.gguf")
        print(folder / f"{name}.gguf")
