"""SmolLM2's real weights: the operator and SinkCache against eager attention, and SinkCache against this library's own
engine. smollm2_test.py MODEL.gguf TEXT [compare_policies]"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

from python_sinks import PythonSinkCache
from sinkcache_transformers import SinkCache

TOKENS = 1100


def load(file, attention, dtype=torch.float32):
    file = pathlib.Path(file)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype,
                                                attn_implementation=attention).eval()


def logits_of(model, ids, cache, chunks):
    out, at = [], 0
    for n in chunks:
        out.append(model(ids[:, at:at + n], cache=cache).logits)
        at += n
    return torch.cat(out, 1)


def perplexity(logits, ids):
    losses = -logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
    return losses.mean().exp().item()


def main(file, text, compare=None):
    eager, ours = load(file, "eager"), load(file, "sinkcache")
    file = pathlib.Path(file)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = tokenizer(pathlib.Path(text).read_text()[:20000], return_tensors="pt", add_special_tokens=False).input_ids
    ids = ids[:, :TOKENS + 1]

    expected = eager(ids[:, :500]).logits
    largest = expected.abs().max().item()
    for what, model, cache, chunks in (
            ("a prompt", ours, None, [500]),
            ("a dynamic cache", ours, DynamicCache(config=ours.config), [300, 150] + [1] * 50),
            ("a static cache", ours, StaticCache(config=ours.config, max_cache_len=600), [300, 150] + [1] * 50),
            ("SinkCache", eager, SinkCache(eager, 4, 600, "f32"), [300, 150] + [1] * 50)):
        difference = (logits_of(model, ids[:, :500], cache, chunks) - expected).abs().max().item()
        print(f"{what}: from eager attention at most {difference:.1e} of {largest:.1f}", flush=True)
        assert difference < 1e-3

    two, mask = ids[:, :80].repeat(2, 1), torch.ones(2, 80, dtype=torch.long)
    mask[1, :11] = 0
    for arguments in (dict(), dict(num_beams=3)):
        wanted = eager.generate(two, attention_mask=mask, max_new_tokens=30, do_sample=False, **arguments)
        for cache in (None, SinkCache(ours, 4, 300, "f32")):
            given = ours.generate(two, attention_mask=mask, max_new_tokens=30, do_sample=False, past_key_values=cache,
                                  **arguments)
            assert torch.equal(wanted, given), (arguments, cache)

    # Far past the window, chunk by chunk and one by one.
    python = PythonSinkCache(eager, 4, 60)
    wanted = torch.cat([python.step(eager, ids[:, i:i + 1]) for i in range(300)], 1)
    given = logits_of(eager, ids[:, :300], SinkCache(eager, 4, 60, "f32"), [150] + [1] * 150)
    difference = (wanted - given).abs().max().item()
    print(f"past the window: from a sink cache in Python at most {difference:.1e}", flush=True)
    assert difference < 1e-3
    for dtype, kv_format in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        model = load(file, "eager", dtype)
        given = logits_of(model, ids[:, :300], SinkCache(model, 4, 60, kv_format), [150] + [1] * 150)
        a, b = perplexity(wanted, ids[:, :300]), perplexity(given.float(), ids[:, :300])
        print(f"{dtype}: perplexity {b:.3f}, in float32 {a:.3f}", flush=True)
        assert abs(a / b - 1) < 0.01

    if compare is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder, "result.json")
        subprocess.run([compare, "--model", file, "--text", text, "--cache", "256", "--policies", "sinks:4", "--tokens",
                        str(TOKENS), "--threads", "1", "--json", result], check=True, stdout=subprocess.DEVNULL)
        engine = json.loads(result.read_text())
    run, = engine["runs"]
    scored = run["tokens_scored"]
    theirs = 2 ** (run["loss_bits"]["all"] * run["bytes"] / scored)
    stream = ids[:, :scored + 1]
    ours = perplexity(logits_of(eager, stream, SinkCache(eager, 4, 252, "f32"), [scored + 1]), stream)
    print(f"the engine's perplexity with a cache of 256, {scored} tokens: {theirs:.5f}, SinkCache's {ours:.5f}")
    assert abs(ours - theirs) < 1e-3


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(*sys.argv[1:])
    print("SmolLM2: passed")
