#!/usr/bin/env python3
"""Scores of the authors' own code, for tests/eviction_oracle_test.cpp. Needs torch; of transformers only names.

  pip download --no-deps kvpress==0.5.5, unpacked
  https://github.com/Zefan-Cai/R-KV at d15c976, https://github.com/microsoft/G-KV at 6db3b2e
  https://github.com/FMInference/H2O at ac75c2a, https://github.com/schwartz-lab-NLP/TOVA at 9c7d09b

  make_golden.py KVPRESS R_KV G_KV H2O TOVA     writes stream.txt and scores.txt beside itself
"""

import ast
import os
import random
import sys
import types

import torch

torch.set_default_dtype(torch.float64)
HERE = os.path.dirname(os.path.abspath(__file__))
TOKENS, QO_HEADS, KV_HEADS, DIM = 36, 4, 2, 4
INV_FREQ = [1.0, 0.1]
SINKS = 4


def module(name, **names):
    made = types.ModuleType(name)
    made.__dict__.update(names)
    sys.modules[name] = made
    return made


def rotate_half(x):  # as transformers has it
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def repeat_kv(x, times):
    return x.repeat_interleave(times, dim=1)


def load_kvpress(path):
    """The presses, without the package's own imports of models and pipelines."""
    none = type("none", (), {})

    class any_name(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return none

    for name in ("transformers", "transformers.models", "transformers.models.gemma3",
                 "transformers.models.gemma3.modeling_gemma3", "transformers.models.phi3",
                 "transformers.models.phi3.modeling_phi3", "transformers.models.qwen3",
                 "transformers.models.qwen3.modeling_qwen3", "transformers.models.llama"):
        sys.modules[name] = any_name(name)
        sys.modules[name].__path__ = []
    module("transformers.models.llama.modeling_llama", rotate_half=rotate_half, repeat_kv=repeat_kv)
    for name in ("kvpress", "kvpress.presses"):
        module(name).__path__ = [os.path.join(path, *name.split("."))]
    presses = {}
    for file, press in (("knorm", "KnormPress"), ("keydiff", "KeyDiffPress"), ("tova", "TOVAPress"),
                        ("snapkv", "SnapKVPress"), ("lagkv", "LagKVPress"),
                        ("expected_attention", "ExpectedAttentionPress"),
                        ("observed_attention", "ObservedAttentionPress"), ("adakv", "AdaKVPress")):
        imported = __import__(f"kvpress.presses.{file}_press", fromlist=[press])
        presses[file] = getattr(imported, press)
    return presses


class Attention:
    """What a press asks of a Llama attention layer; hidden states are the queries."""

    head_dim = DIM
    config = types.SimpleNamespace(num_attention_heads=QO_HEADS, num_key_value_heads=KV_HEADS,
                                   _attn_implementation="sdpa")

    def q_proj(self, hidden):
        return hidden

    def rotary_emb(self, x, positions):
        angles = positions[..., None].to(torch.float64) * torch.tensor(INV_FREQ)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def turned(rows, positions):
    cos, sin = Attention().rotary_emb(rows, positions[None])
    return rows * cos[:, None] + rotate_half(rows) * sin[:, None]


class topk_calls:
    """The tensors that topk was asked of: the authors' classes choose by it, and return no scores."""

    def __enter__(self):
        self.scores, self.original = [], torch.Tensor.topk

        def topk(tensor, *args, **kwargs):
            self.scores.append(tensor.detach().clone())
            return self.original(tensor, *args, **kwargs)

        torch.Tensor.topk = topk
        return self

    def __exit__(self, *_):
        torch.Tensor.topk = self.original


def by_kvpress(presses, q, k, v, record):
    layer = Attention()
    positions = torch.arange(TOKENS)
    hidden = q.transpose(1, 2).reshape(1, TOKENS, QO_HEADS * DIM)
    keys = turned(k, positions)
    kwargs = {"position_embeddings": layer.rotary_emb(hidden, positions[None])}
    logits = turned(q, positions) @ repeat_kv(keys, QO_HEADS // KV_HEADS).transpose(2, 3) / DIM**0.5
    weights = (logits + torch.full_like(logits, float("-inf")).triu(1)).softmax(-1)

    def score(press, attentions=None):
        return press.score(layer, hidden, keys, v, attentions, kwargs)[0]

    record("knorm", score(presses["knorm"]()))
    record("keydiff", score(presses["keydiff"]()))
    record("tova", score(presses["tova"]()))
    record("snapkv", score(presses["snapkv"](window_size=8, kernel_size=5)))
    record("h2o", score(presses["observed_attention"](), weights))
    record("lagkv", score(presses["lagkv"](n_sink=SINKS, lag_size=7)))
    record("lagkv_cross", score(presses["lagkv"](n_sink=SINKS, lag_size=7, cross_scoring=True)))
    expected = presses["expected_attention"]
    record("expected_attention", score(expected(n_sink=SINKS)))
    record("expected_attention_mean", score(expected(n_sink=SINKS, n_future_positions=16, use_covariance=False,
                                                     use_vnorm=False)))
    record("expected_attention_epsilon", score(expected(n_sink=SINKS, n_future_positions=16, epsilon=0.02)))
    ada = presses["adakv"](presses["keydiff"](compression_ratio=0.5), alpha_safeguard=0.2)
    ada.compress(layer, hidden, keys, v, None, kwargs)
    leaves = torch.zeros(KV_HEADS, TOKENS)
    leaves[layer.masked_key_indices[1], layer.masked_key_indices[2]] = 1
    record("adakv_leaves", leaves)


def run_events(compress, budget, interval, tokens, q, k, record, name):
    """Events of one of the decoding-time classes, down to the budget at every `interval` tokens."""
    positions = torch.arange(TOKENS)
    keys, queries = turned(k, positions), turned(q, positions)
    held = [torch.arange(0, dtype=torch.int64) for _ in range(KV_HEADS)]
    for seen in range(interval, tokens + 1, interval):
        held = [torch.cat((h, torch.arange(seen - interval, seen))) for h in held]
        if len(held[0]) <= budget:
            continue
        pick = torch.stack(held)[None, :, :, None].expand(1, KV_HEADS, len(held[0]), DIM)
        # Positions travel as values: what comes back says what stayed.
        carried = torch.stack(held)[None, :, :, None].to(torch.float64).expand_as(pick).contiguous()
        with topk_calls() as calls:
            stayed = compress(keys.gather(2, pick), queries[:, :, :seen], carried)
        record(f"{name}_{seen}", calls.scores[-1][0])
        held = [stayed[0, h, :, 0].round().to(torch.int64).sort().values for h in range(KV_HEADS)]
        if name != "snapkv_rkv":
            record(f"{name}_{seen}_kept", torch.stack(held).to(torch.float64))


def by_r_kv(path, q, k, record):
    package = module("rkv_code")
    package.__path__ = [os.path.join(path, "rkv", "compression")]
    package.__dict__.update({name: getattr(load_file("rkv_utils", os.path.join(path, "rkv", "utils.py")), name)
                             for name in ("cal_similarity", "compute_attention_scores")})
    r_kv = __import__("rkv_code.r1_kv", fromlist=["R1KV"]).R1KV(budget=18, window_size=6, kernel_size=5)
    snap = __import__("rkv_code.snapkv", fromlist=["SnapKV"]).SnapKV(budget=18, window_size=6, kernel_size=5)
    # max_pool makes ties, which topk breaks as it likes: after SnapKV's first event each goes its own way.
    for name, compressor, tokens in (("rkv", r_kv, TOKENS), ("snapkv_rkv", snap, 24)):
        run_events(lambda keys, queries, carried: compressor.update_kv(keys, queries[:, :, -6:], carried)[1], 18, 12,
                   tokens, q, k, record, name)


def load_file(name, path):
    import importlib.util
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def by_g_kv(path, q, k, record):
    language = module("triton.language", constexpr=None)
    module("triton", jit=lambda f: f, language=language)
    for name in ("gkv", "gkv.utils", "gkv.model"):
        module(name).__path__ = [os.path.join(path, *name.split("."))]
    module("gkv.model.sparse_mask", expand_sparse_mask=None)
    code = load_file("gkv_score", os.path.join(path, "gkv", "model", "compression", "score_based.py"))
    for method, redundancy in (("max", False), ("mean", False), ("sum", True)):
        compressor = code.ScoreBasedKV(budget=18, window_size=6, kernel_size=5, smooth_method=method,
                                       enable_score_cache=True, enable_pooling=redundancy,
                                       suppressing_redundancy=redundancy, triton_similarity=False)
        cache = {"scores": None}

        def compress(keys, queries, carried):
            _, stayed, _, cache["scores"] = compressor.update_kv(keys, queries[:, :, -6:].contiguous(), carried,
                                                                 score_cache=cache["scores"])
            return stayed

        run_events(compress, 18, 12, TOKENS, q, k, record, f"gkv_{method}")


def class_of(path, name, **names):
    """One class out of a file whose imports are not here."""
    with open(path) as file:
        tree = ast.parse(file.read())
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    space = {"torch": torch, "Any": object, "Dict": dict, "List": list, "Optional": __import__("typing").Optional,
             "Tuple": tuple, **names}
    exec(compile(tree, path, "exec"), space)
    return space[name]


def by_token(reduce, in_cache, q, k):
    """Decode with a cache that `reduce(keys, carried, weights)` cuts after every token; what is held at the end."""
    heads = k.shape[1]
    keys, carried = k[:, :, :0], k[:, :, :0]
    for t in range(TOKENS):
        keys = torch.cat((keys, k[:, :, t:t + 1]), dim=2)
        carried = torch.cat((carried, torch.full((1, heads, 1, DIM), float(t))), dim=2)
        n = keys.shape[2]
        weights = []
        for head in range(q.shape[1]):
            kv_head = head * heads // q.shape[1]
            at = torch.arange(n) if in_cache else carried[0, kv_head, :, 0]
            row = turned(q[:, head:head + 1, t:t + 1], at[-1:]) @ turned(keys[:, kv_head:kv_head + 1], at).transpose(2, 3)
            weights.append((row / DIM**0.5).softmax(-1))
        keys, carried = reduce(keys, carried, torch.cat(weights, dim=1))
    return carried[0, :, :, 0]


def by_h2o_and_tova(h2o, tova, q, k, record):
    make_h2o = class_of(os.path.join(h2o, "h2o_hf", "utils_real_drop", "modify_llama.py"), "H2OKVCache_LayerWise")
    make_tova = class_of(os.path.join(tova, "src", "tova_cache.py"), "TOVACache", DynamicCache=object)
    for mode in ("absolute", "in_cache"):
        cache = make_h2o(hh_size=8, recent_size=6)
        # It knows no groups: the first query head of each.
        held = by_token(lambda keys, carried, weights: cache((keys, carried), weights), mode == "in_cache",
                        q[:, ::QO_HEADS // KV_HEADS], k)
        record(f"h2o_{mode}", cache.hh_score)
        record(f"h2o_{mode}_kept", held)

        cut = make_tova(14)

        def reduce(keys, carried, weights):
            cut.key_cache, cut.value_cache = [keys], [carried]
            cut.reduce(0, weights)
            return cut.key_cache[0], cut.value_cache[0]

        record(f"tova_{mode}_kept", by_token(reduce, mode == "in_cache", q, k))


def main():
    kvpress, r_kv, g_kv, h2o, tova = sys.argv[1:6]
    dice = random.Random(4)

    def rows(heads):
        numbers = [round(dice.gauss(0, 1), 2) for _ in range(TOKENS * heads * DIM)]
        return torch.tensor(numbers).view(1, TOKENS, heads, DIM).transpose(1, 2)

    q, k, v = rows(QO_HEADS), rows(KV_HEADS), rows(KV_HEADS)
    with open(os.path.join(HERE, "stream.txt"), "w") as file:
        for t in range(TOKENS):  # a line a token: q, k, v
            numbers = torch.cat([x[0, :, t].flatten() for x in (q, k, v)]).tolist()
            file.write(" ".join(f"{x:g}" for x in numbers) + "\n")
    with open(os.path.join(HERE, "scores.txt"), "w") as file:

        def record(name, per_head):
            for head, row in enumerate(per_head.tolist()):
                file.write(f"{name} {head} {len(row)} " + " ".join(f"{x:.8g}" for x in row) + "\n")

        by_kvpress(load_kvpress(kvpress), q, k, v, record)
        by_r_kv(r_kv, q, k, record)
        by_g_kv(g_kv, q, k, record)
        by_h2o_and_tova(h2o, tova, q, k, record)


main()
