"""The operator in PyTorch, called as Hugging Face calls an attention: against torch's own softmax, in double for our
bound and in float32. python3 torch_test.py LIBRARY [--timing]"""

import pathlib
import random
import sys
import time
import types

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples/hosts/transformers/sinkcache_transformers"))

import torch

import attention as hf_attention

MODULE = types.SimpleNamespace(is_causal=True)
UNIT = 2.0 ** -24


def plain_mask(q_len, kv_len, window=0, num_sink_tokens=0):
    """True where a token is seen: [q_len, kv_len]."""
    query = torch.arange(kv_len - q_len, kv_len)[:, None]
    key = torch.arange(kv_len)[None, :]
    in_window = (key > query - window) | (key < num_sink_tokens) if window else torch.ones(1, dtype=torch.bool)
    return (key <= query) & in_window


def reference(query, key, value, scaling, window=0, num_sink_tokens=0, softcap=0, s_aux=None):
    """As transformers' eager attention of gpt-oss, in the type of `query`: out [batch, q_len, heads, v_dim], and for
    each row A and max|v| of the bound."""
    groups = query.shape[1] // key.shape[1]
    key = key.to(query.dtype).repeat_interleave(groups, 1)
    value = value.to(query.dtype).repeat_interleave(groups, 1)
    visible = plain_mask(query.shape[2], key.shape[2], window, num_sink_tokens)
    logits = query @ key.transpose(2, 3) * scaling
    size = (query.norm(dim=-1)[..., None] * key.norm(dim=-1)[:, :, None, :] * scaling).masked_fill(~visible, 0).amax(-1)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -float("inf"))
    if s_aux is not None:
        sinks = s_aux.to(query.dtype).reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :key.shape[2]]
    v_max = (value.abs().amax(-1)[:, :, None, :] * visible).amax(-1)
    return (weights @ value).transpose(1, 2), size.transpose(1, 2), v_max.transpose(1, 2)


def stored(generator, layout, batch, heads, tokens, dim, dtype):
    """Random [batch, heads, tokens, dim], in memory as some host has it, among NaN."""
    room = tokens + 3
    values = torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype)
    shapes = {"BHTD": (batch, heads, room, dim), "BTHD": (batch, room, heads, dim), "BHDT": (batch, heads, dim, room)}
    orders = {"BHTD": (0, 1, 2, 3), "BTHD": (0, 2, 1, 3), "BHDT": (0, 1, 3, 2)}
    memory = torch.full(shapes[layout], float("nan"), dtype=dtype)
    view = memory.permute(orders[layout])[:, :, :tokens]
    view.copy_(values)
    return view


def check_random(seed):
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kv_heads, batch = dice.randint(1, 4), dice.choice([1, 1, 2, 3, 5])
    heads = kv_heads * dice.choice([1, 2, 3, 4, 7, 8])
    dim = dice.choice([16, 40, 64, 80, 128])
    v_dim = dim if dice.random() < 0.8 else dice.choice([24, 64, 96])
    kv_len = dice.randint(1, dice.choice([40, 300, 700]))
    q_len = 1 if dice.random() < 0.4 else kv_len if dice.random() < 0.3 else dice.randint(1, min(kv_len, 60))
    dtype = dice.choice([torch.float32, torch.float16, torch.bfloat16])
    q_dtype = dtype if dice.random() < 0.5 else torch.float32
    window = dice.randint(1, kv_len) if dice.random() < 0.5 else 0
    num_sink_tokens = dice.randint(1, 4) if window and dice.random() < 0.5 else 0
    softcap = 5.0 if dice.random() < 0.2 else 0
    s_aux = torch.randn(heads, generator=generator).to(dtype) if dice.random() < 0.5 else None
    layouts = dice.choice(["BHTD", "BTHD"]), dice.choice(["BHTD", "BTHD", "BHDT"])
    case = (f"seed {seed}: {dtype}, batch {batch}, heads {heads}/{kv_heads} of {dim}/{v_dim}, q_len {q_len}, "
            f"kv_len {kv_len}, window {window}+{num_sink_tokens}, softcap {softcap}, "
            f"sinks {s_aux is not None}, {layouts}")

    query = stored(generator, dice.choice(["BHTD", "BTHD"]), batch, heads, q_len, dim, q_dtype)
    key = stored(generator, layouts[0], batch, kv_heads, kv_len, dim, dtype)
    value = stored(generator, layouts[1], batch, kv_heads, kv_len, v_dim, dtype)
    scaling = dim ** -0.5
    masks = [None]
    if dice.random() < 0.3:  # a mask that says the same again
        plain = plain_mask(q_len, kv_len, window, num_sink_tokens).expand(batch, 1, q_len, kv_len)
        masks += [plain, torch.zeros(plain.shape, dtype=dtype).masked_fill(~plain, torch.finfo(dtype).min)]
    for mask in masks:
        out, weights = hf_attention.attention(MODULE, query, key, value, mask, scaling=scaling, dropout=0.0,
                                              sliding_window=window or None, s_aux=s_aux, softcap=softcap or None,
                                              num_sink_tokens=num_sink_tokens, use_cache=True, cache_position=None)
        assert weights is None and out.shape == (batch, q_len, heads, v_dim) and out.dtype == q_dtype, case
        assert out.isfinite().all(), case

    exact, size, v_max = reference(query.double(), key, value, scaling, window, num_sink_tokens, softcap, s_aux)
    bound = (16 * UNIT * (1 + size) * v_max)[..., None]
    if q_dtype != torch.float32:  # the answer is rounded to the host's type
        bound = bound + exact.abs() * torch.finfo(q_dtype).eps + 1e-7
    part = ((out.double() - exact).abs() / bound).max().item()
    assert part <= 1, f"{case}: error {part} of the bound"
    plain = reference(query.float(), key, value, scaling, window, num_sink_tokens, softcap, s_aux)[0]
    difference = (out.float() - plain).abs().max().item()
    assert difference <= (1e-5 if q_dtype == torch.float32 else 3e-2), f"{case}: {difference} from torch in float32"
    return part, (difference if q_dtype == torch.float32 else 0), q_dtype == torch.float32


def check_batch_is_single_calls():
    """Bit for bit, in decode and in prompts."""
    generator = torch.Generator().manual_seed(1)
    for q_len in (1, 9):
        query = stored(generator, "BTHD", 4, 8, q_len, 64, torch.float32)
        key, value = (stored(generator, "BHTD", 4, 2, 600, 64, torch.float16) for _ in range(2))
        run = lambda q, k, v: hf_attention.attention(MODULE, q, k, v, None, scaling=0.125)[0]
        together = run(query, key, value)
        for i in range(4):
            one = slice(i, i + 1)
            assert torch.equal(together[one], run(query[one], key[one], value[one])), q_len


def check_padding():
    """Masks with padding before and after the tokens, and room after the newest as static caches have it: what a
    sequence gets is what it gets by itself."""
    dice = random.Random(3)
    generator = torch.Generator().manual_seed(3)
    for _ in range(60):
        batch, q_len, room = dice.randint(1, 3), dice.choice([1, 1, 5, 17]), dice.choice([0, 0, 6])
        kv_len, window = q_len + dice.choice([0, 7, 40]), dice.choice([0, 0, 4, 12])
        query = stored(generator, "BTHD", batch, 4, q_len, 16, torch.float32)
        key, value = (stored(generator, "BHTD", batch, 2, kv_len + room, 16, torch.float32) for _ in range(2))
        mask = torch.zeros(batch, 1, q_len, kv_len + room, dtype=torch.bool)
        mask[..., :kv_len] = plain_mask(q_len, kv_len, window)
        first, end = [], []
        for i in range(batch):
            first.append(dice.randint(0, kv_len - 1) if dice.random() < 0.5 else 0)
            end.append(dice.randint(first[i] + 1, kv_len) if q_len > 1 and dice.random() < 0.5 else kv_len)
            mask[i, ..., :first[i]] = False
            mask[i, ..., end[i]:] = False
        said = torch.ops.sinkcache.mask_spans(mask, window, 0, torch.tensor(kv_len - q_len))
        for given in [said] if room else [mask, said, torch.where(mask, 0.0, -float("inf"))]:
            out = hf_attention.attention(MODULE, query, key, value, given, sliding_window=window)[0]
            for i in range(batch):
                for row in range(q_len):
                    own = kv_len - q_len + row
                    if not first[i] <= own < end[i]:  # padding
                        assert out[i, row].isfinite().all()
                        continue
                    seen = [t[i:i + 1, :, first[i]:own + 1] for t in (key, value)]
                    alone = hf_attention.attention(MODULE, query[i:i + 1, :, row:row + 1], *seen, None,
                                                   sliding_window=window)[0]
                    difference = (out[i, row] - alone[0, 0]).abs().max().item()
                    assert difference < 1e-5, (difference, q_len, kv_len, room, window, first, end, i, row)
    # A layer's mask is looked at once, and again when it changes.
    mask = plain_mask(3, 9).expand(2, 1, 3, 9).clone()
    query, key = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 9, 16)
    before = hf_attention.attention(MODULE, query, key, key, mask)[0]
    mask[0, ..., :4] = False
    after = hf_attention.attention(MODULE, query, key, key, mask)[0]
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def check_threads():
    generator = torch.Generator().manual_seed(2)
    query = stored(generator, "BTHD", 3, 8, 33, 64, torch.float32)
    key, value = (stored(generator, "BHTD", 3, 2, 500, 64, torch.float32) for _ in range(2))
    usual, outs = torch.get_num_threads(), []
    for threads in (1, 2, 5, 3):
        torch.set_num_threads(threads)
        outs.append(hf_attention.attention(MODULE, query, key, value, None)[0])
    torch.set_num_threads(usual)
    assert all(torch.equal(outs[0], out) for out in outs)


def check_no_copy():
    """A cache of a gibibyte that was never touched: attention to its first tokens costs no memory of that size."""
    import resource

    memory = torch.empty(1, 2 ** 17, 16, 128, dtype=torch.float32)  # [batch, token, head, dim]
    cache = memory.transpose(1, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory[:, :64] = 1
    out = hf_attention.attention(MODULE, torch.ones(1, 16, 1, 128), cache, cache, None, sliding_window=1)[0]
    assert out.shape == (1, 1, 16, 128)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes grew: something was copied"


def check_refusals():
    query, key = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 9, 16)
    holes = plain_mask(3, 9).expand(2, 1, 3, 9).clone()
    holes[1, :, :, 2] = False
    additive = torch.zeros(2, 1, 3, 9)
    not_causal = types.SimpleNamespace(is_causal=False)

    def refused(words, *args, module=MODULE, **kwargs):
        try:
            hf_attention.attention(module, *args, **kwargs)
        except (ValueError, RuntimeError) as error:
            assert words in str(error), f"'{words}' is not in: {error}"
        else:
            raise AssertionError(f"not refused: {words}")

    refused("attention_mask was an arbitrary mask", query, key, key, holes)
    refused("attention_mask was an arbitrary mask", query, key, key, additive)
    refused("attention_mask was an arbitrary mask", query, key, key, torch.randn(2, 1, 3, 9))
    refused("attention_mask was an arbitrary mask [2, 1, 3, 8]", query, key, key, holes[..., :8])
    refused("the end of the keys of spans was 10, had to be at most key.size(2), 9", query, key, key,
            torch.tensor([0, 10, 6, 0]).expand(2, 1, 1, 4))
    refused("the first query's column of spans was 7", query, key, key, torch.tensor([0, 9, 7, 0]).expand(2, 1, 1, 4))
    refused("spans.numel() was 4", query, key, key, torch.tensor([0, 9, 6, 0]).reshape(1, 1, 1, 4))
    refused("attention_mask", query, key, key, plain_mask(3, 9).expand(2, 1, 3, 9), sliding_window=4)
    refused("dropout was 0.1, had to be 0", query, key, key, None, dropout=0.1)
    refused("output_attentions was True", query, key, key, None, output_attentions=True)
    refused("position_bias", query, key, key, None, position_bias=torch.zeros(1))
    refused("indices", query, key, key, None, indices=torch.zeros(1))  # sparse attention (DeepSeek V3.2)
    refused("is_causal was False", query, key, key, None, module=not_causal)
    refused("requires_grad", query.clone().requires_grad_(), key, key, None)
    refused("key.shape[2] was 2, had to be at least q_len, 3", query, key[:, :, :2], key[:, :, :2], None)
    refused("num_qo_heads was 3", query[:, :3], key, key, None)
    refused("key.size(3) was 8", query, key[..., :8], key, None)
    refused("value.size(0), (1) or (2) was 8", query, key, key[:, :, :8], None)
    refused("sinks.numel() was 3", query, key, key, None, s_aux=torch.zeros(3))
    refused("the format of keys was 'Double', had to be f32, f16 or bf16", query, key.double(), key, None)
    refused("query's type was Double", query.double(), key, key, None)
    refused("window was -1", query, key, key, None, sliding_window=-1)
    refused("query's device was meta", query.to("meta"), key, key, None)
    assert hf_attention.attention(not_causal, query[:, :, :1], key, key, None)[0].shape == (2, 1, 4, 16)


def timing():
    def best(run):
        times = []
        for _ in range(15):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    def softmax(query, key, value):  # as eager attention in transformers; one with a mask has it as one more sum
        groups = query.shape[1] // key.shape[1]
        key, value = (t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (key, value))
        logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if query.shape[2] > 1:
            logits = logits + mask
        return (torch.softmax(logits, -1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2)

    generator = torch.Generator().manual_seed(1)
    for dtype, q_len, kv_len in ((torch.float32, 1, 4096), (torch.bfloat16, 1, 4096), (torch.float32, 256, 1024)):
        query = torch.randn(1, q_len, 32, 128, generator=generator).transpose(1, 2).to(dtype)
        mask = torch.zeros(q_len, kv_len, dtype=dtype)
        mask.masked_fill_(~plain_mask(q_len, kv_len), torch.finfo(dtype).min)
        key, value = (torch.randn(1, 8, kv_len, 128, generator=generator).to(dtype) for _ in range(2))
        ours = best(lambda: hf_attention.attention(MODULE, query, key, value, None))
        eager = best(lambda: softmax(query, key, value))
        print(f"q_len {q_len}, kv_len {kv_len}, {dtype}: ours {1e3 * ours:.2f} ms, torch's softmax "
              f"{1e3 * eager:.2f} ms, ours {ours / eager:.2f} of it")


if __name__ == "__main__":
    hf_attention.load(sys.argv[1])
    if "--timing" in sys.argv:
        timing()
        sys.exit()
    results = [check_random(seed) for seed in range(1, 81)]
    check_batch_is_single_calls()
    check_padding()
    check_threads()
    check_no_copy()
    check_refusals()
    print(f"{len(results)} calls: of the bound to torch in double at most {max(r[0] for r in results if r[2]):.3f} "
          f"in f32; from torch in float32 at most {max(r[1] for r in results):.1e}")
