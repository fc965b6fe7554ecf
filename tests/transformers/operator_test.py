"""The operator over transformers' own caches, against eager attention: models of all kinds with random weights."""

import torch
import transformers
from transformers import DynamicCache, StaticCache

import models
import sinkcache_transformers  # noqa: F401: registers "sinkcache"

ROOM = 128


def stream(model, ids, mask, cache, chunks):
    """Logits of all tokens, as they come in chunks."""
    logits, at = [], 0
    for n in chunks:
        given = {} if mask is None else {"attention_mask": mask[:, :at + n]}
        logits.append(model(ids[:, at:at + n], cache=cache, **given).logits)
        at += n
    return torch.cat(logits, 1)


def masks(ids):
    left, right, both = torch.ones_like(ids), torch.ones_like(ids), torch.ones_like(ids)
    left[1, :9] = 0
    right[1, 71:] = 0
    both[0, :30], both[2, 90:] = 0, 0
    return {"plain": None, "left": left, "right": right, "both": both}


def caches(model):
    return {"none": None, "dynamic": DynamicCache(config=model.config),
            "static": StaticCache(config=model.config, max_cache_len=ROOM)}


def check_logits(name):
    eager, ours = models.model(name), models.model(name, attention="sinkcache")
    ids = models.tokens(3, 100)
    largest = worst = 0
    for padding, mask in masks(ids).items():
        for kind in caches(eager):
            # Tokens after padding would have padding between them: those come in one pass.
            chunks = [100] if kind == "none" or padding in ("right", "both") else [50, 20, 5] + [1] * 25
            a = stream(eager, ids, mask, caches(eager)[kind], chunks)
            b = stream(ours, ids, mask, caches(ours)[kind], chunks)
            tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            difference = (a - b)[tokens].abs().max().item()
            assert difference < 1e-3, f"{name}, {kind}, {padding}: {difference}"
            assert b.isfinite().all(), (name, kind, padding)
            worst, largest = max(worst, difference), max(largest, a[tokens].abs().max().item())
    return worst, largest


def check_half(name, dtype):
    """Of a model in 16 bits: no further from its weights in float32 than eager attention is."""
    exact = models.model(name, dtype).float()(models.tokens(2, 80)).logits
    chunks = [60] + [1] * 20
    errors = {}
    for attention in "eager", "sinkcache":
        model = models.model(name, dtype, attention)
        logits = stream(model, models.tokens(2, 80), None, DynamicCache(config=model.config), chunks)
        assert logits.dtype == dtype
        errors[attention] = (logits.float() - exact).square().mean().sqrt().item()
    assert errors["sinkcache"] < 1.2 * errors["eager"], f"{name}, {dtype}: {errors}"


def check_generate(name):
    eager, ours = models.model(name), models.model(name, attention="sinkcache")
    ids = models.tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for arguments in (dict(), dict(num_beams=3), dict(cache_implementation="static")):
        a, b = (m.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, **arguments)
                for m in (eager, ours))
        assert torch.equal(a, b), f"{name}, {arguments}"


def check_compiled(name, backend):
    """fullgraph: nothing of the operator falls back to Python."""
    eager, ours = models.model(name), models.model(name, attention="sinkcache")
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    ids = models.tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    a = eager(ids, attention_mask=mask).logits
    b = compiled(ids, attention_mask=mask).logits
    assert (a - b)[mask.bool()].abs().max() < 1e-3, name
    cache_a, cache_b = (StaticCache(config=eager.config, max_cache_len=ROOM) for _ in range(2))
    eager(ids, attention_mask=mask, cache=cache_a), ours(ids, attention_mask=mask, cache=cache_b)
    for step in range(3):
        token = models.tokens(2, 1, seed=step)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        a = eager(token, attention_mask=mask, cache=cache_a).logits
        b = compiled(token, attention_mask=mask, cache=cache_b).logits
        assert (a - b).abs().max() < 1e-3, (name, step)
    torch.compiler.reset()


def check_exported(name):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    eager, ours = models.model(name), models.model(name, attention="sinkcache")
    ids = models.tokens(2, 40)
    mask = torch.ones_like(ids)
    program = torch.export.export(Logits(ours), (ids, mask), strict=False)
    assert any("sinkcache.attend" in str(node.target) for node in program.graph.nodes), name
    mask[1, :6] = 0  # is read when the program runs
    a, b = eager(ids, attention_mask=mask).logits, program.module()(ids, mask)
    assert (a - b)[mask.bool()].abs().max() < 1e-3, name


def check_opcheck():
    query, key, value = torch.randn(2, 6, 5, 24), torch.randn(2, 3, 9, 24), torch.randn(2, 3, 9, 40)
    mask = torch.ones(2, 1, 5, 9, dtype=torch.bool).tril(4)
    spans = torch.ops.sinkcache.mask_spans(mask, 3 * 0, 0, torch.tensor(4))
    for arguments in ((query, key, value, 0.2), (query, key, value, 0.2, 4, 1, 5.0, torch.randn(6)),
                      (query.bfloat16(), key.bfloat16(), value.bfloat16(), 0.2, 0, 0, 0.0, None, spans)):
        torch.library.opcheck(torch.ops.sinkcache.attend, arguments)
    torch.library.opcheck(torch.ops.sinkcache.mask_spans, (mask,))
    torch.library.opcheck(torch.ops.sinkcache.mask_spans, (mask, 0, 0, torch.tensor(4)))


def refused(words, call, *arguments, **named):
    try:
        call(*arguments, **named)
    except (ValueError, RuntimeError) as error:
        assert words in str(error), f"'{words}' is not in: {error}"
    else:
        raise AssertionError(f"not refused: {words}")


def check_refusals():
    ours = models.model("llama", attention="sinkcache")
    ids = models.tokens(1, 12)
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    refused("attention_mask was an arbitrary mask", ours, ids, position_ids=packed, use_cache=False)
    hole = torch.ones_like(ids)
    hole[0, 5] = 0
    refused("attention_mask was 0 between tokens", ours, ids, attention_mask=hole)
    refused("attention_mask was an arbitrary mask", ours, ids, attention_mask=torch.zeros(1, 1, 12, 12))
    refused("output_attentions was True", ours, ids, output_attentions=True)
    with torch.enable_grad():
        refused("requires_grad was True", ours, ids)
    # Masks of a model's own: those of a chunk are causal as long as there is one chunk.
    function = transformers.masking_utils.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long))
    mask = sinkcache_transformers.mask
    assert mask(1, 6, 6, mask_function=function, local_size=8).tolist() == [[[[0, 6, 0, 8]]]]
    refused("arbitrary mask", mask, 1, 12, 12, mask_function=function, local_size=8)
    refused("arbitrary mask", mask, 1, 12, 12, mask_function=transformers.masking_utils.bidirectional_mask_function)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    check_opcheck()
    check_refusals()
    for name in models.NAMES:
        worst, largest = check_logits(name)
        print(f"{name}: logits up to {largest:.1f}, from eager attention at most {worst:.1e}", flush=True)
        for dtype in (torch.bfloat16, torch.float16):
            check_half(name, dtype)
        check_generate(name)
    for name in ("llama", "gemma3", "gpt-oss"):
        check_compiled(name, "aot_eager")
        check_exported(name)
    check_compiled("mistral", "inductor")
    print("operator: passed")
