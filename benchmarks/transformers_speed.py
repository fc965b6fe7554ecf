"""Decode of one token in Hugging Face transformers, by turns: eager and sdpa attention, this library's operator, a
SinkCache, and a sink cache in Python over sdpa. SmolLM2-135M's shape with random weights.

    pip install ./examples/hosts/transformers
    python benchmarks/transformers_speed.py [--contexts 1024,8192] [--threads 1,2] [--rounds 7] [--steps 4]

Prints medians of rounds: tokens a second, and tokens a second of processor time, which other work on the machine
disturbs less.
"""

import argparse
import statistics
import time

import torch
import transformers
from transformers import DynamicCache

from sinkcache_transformers import SinkCache

SINKS = 4


class PythonSinkCache(transformers.Cache):
    """Keys as they were before their rotary embedding, rotated to their places for every query."""

    def __init__(self, model, length):
        super().__init__(layers=[])
        self.length, self.raw = length, []
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        self.cos, self.sin = cos[0], sin[0]

    @staticmethod
    def rotated(x, cos, sin):
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def update(self, key, value, layer, *args, **kwargs):
        keys, values = self.raw[layer]
        raw = self.rotated(key, self.cos[-1], -self.sin[-1])  # the model is told the last place
        drop = keys.shape[2] + 1 - self.length
        keys = torch.cat([keys[:, :, :SINKS], keys[:, :, SINKS + drop:], raw], 2)
        values = torch.cat([values[:, :, :SINKS], values[:, :, SINKS + drop:], value], 2)
        self.raw[layer] = keys, values
        return self.rotated(keys, self.cos, self.sin), values

    def get_seq_length(self, layer_idx=0):
        return self.length - 1

    def get_mask_sizes(self, query_length, layer_idx):
        return self.length, 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="1024,8192")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    o = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=100000.0))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    token = torch.tensor([[7]])

    for context in map(int, o.contexts.split(",")):
        key, value = (torch.randn(1, 3, context - 1, 64) for _ in "kv")  # of all layers, each in memory of its own
        dynamic, python = DynamicCache(config=config), PythonSinkCache(model, context)
        for layer in range(config.num_hidden_layers):
            dynamic.update(key, value, layer)
            python.raw.append((key, value))

        def grown(attention):
            def step():
                model(token, cache=dynamic)
                dynamic.crop(-1)
            return attention, step

        def sinks(kv_format):
            cache = SinkCache(model, SINKS, context - SINKS, kv_format)
            cache._begin(1, context - 1, None, None)
            first = cache.layers[0].caches
            first.attend(key.repeat(1, 3, 1, 1), key, value, [], [], 0.125, 0.0, None)
            for layer in cache.layers[1:]:
                layer.caches = first.clone()
            cache._commit(context - 1)
            return "sinkcache", lambda: model(token, cache=cache)

        def in_python():
            model(token, position_ids=torch.tensor([[context - 1]]), cache=python)

        ways = {"eager": grown("eager"), "sdpa": grown("sdpa"), "the operator": grown("sinkcache"),
                "SinkCache, f32": sinks("f32"), "SinkCache, bf16": sinks("bf16"), "sinks in Python": ("sdpa", in_python)}
        for threads in map(int, o.threads.split(",")):
            torch.set_num_threads(threads)
            wall, processor = {w: [] for w in ways}, {w: [] for w in ways}
            for round_number in range(o.rounds + 1):
                for name, (attention, step) in ways.items():
                    model.set_attn_implementation(attention)
                    step()
                    began, began_processor = time.perf_counter(), time.process_time()
                    for _ in range(o.steps):
                        step()
                    if round_number > 0:
                        wall[name].append(o.steps / (time.perf_counter() - began))
                        processor[name].append(o.steps / (time.process_time() - began_processor))
            print(f"{context} tokens, {threads} thread{'s' if threads > 1 else ''}: tokens/s, and per second of processor "
                  "time")
            for name in ways:
                print(f"  {name:16} {statistics.median(wall[name]):7.1f} {statistics.median(processor[name]):7.1f}",
                      flush=True)
        model.set_attn_implementation("sinkcache")


if __name__ == "__main__":
    main()
