"""SinkCache in models of all kinds with random weights: against eager attention while nothing is evicted, after that
against a sink cache in Python; and all that transformers asks of a cache."""

import copy
import gc

import torch
import transformers
from transformers import DynamicCache

import models
from operator_test import refused
from python_sinks import PythonSinkCache
from sinkcache_transformers import SinkCache

SINKS, WINDOW = 3, 45


def streaming(model, **arguments):
    return SinkCache(model, SINKS, WINDOW, "f32", **arguments)


def logits_of(model, ids, cache, chunks):
    out, at = [], 0
    for n in chunks:
        out.append(model(ids[:, at:at + n], cache=cache).logits)
        at += n
    assert at == ids.shape[1]
    return torch.cat(out, 1)


def check_against_eager(name):
    model = models.model(name)
    ids = models.tokens(2, 70)
    expected = model(ids).logits
    cache = SinkCache(model, 4, 100, "f32")
    difference = (logits_of(model, ids, cache, [40, 10] + [1] * 20) - expected).abs().max().item()
    assert difference < 1e-3, f"{name}: {difference}"
    return difference


def check_against_python(name):
    """Far past the window, in chunks and one by one; with a cache that holds the model's own windows, and with a smaller
    one, which these layers then stream through too."""
    model, ids = models.model(name), models.tokens(2, 150)
    worst = 0
    for sinks, window in ((SINKS, WINDOW), (2, 15)):
        python = PythonSinkCache(model, sinks, window)
        expected = torch.cat([python.step(model, ids[:, i:i + 1]) for i in range(150)], 1)
        for chunks in ([1] * 150, [70, 1, 1, 30, 48], [150]):
            found = logits_of(model, ids, SinkCache(model, sinks, window, "f32"), chunks)
            difference = (found - expected).abs().max().item()
            assert difference < 1e-3, f"{name}, {sinks} + {window}, {chunks[:5]}: {difference}"
            worst = max(worst, difference)
    assert (model(ids).logits - expected).abs().max() > 0.1, f"{name}: nothing was evicted that matters"
    return worst, expected.abs().max().item()


def check_half(name, dtype):
    """A model in 16 bits, keys and values as it has them: no further from its weights in float32 than the Python sink
    cache in 16 bits is."""
    ids = models.tokens(2, 100)
    exact_model = models.model(name, dtype).float()
    exact = logits_of(exact_model, ids, streaming(exact_model), [100])
    model = models.model(name, dtype)
    python = PythonSinkCache(model, SINKS, WINDOW)
    errors = [torch.cat([python.step(model, ids[:, i:i + 1]) for i in range(100)], 1),
              logits_of(model, ids, SinkCache(model, SINKS, WINDOW, "bf16" if dtype == torch.bfloat16 else "f16"),
                        [60] + [1] * 40)]
    python, ours = ((e.float() - exact).square().mean().sqrt().item() for e in errors)
    assert ours < 1.2 * python, f"{name}, {dtype}: {ours}, in Python {python}"


def check_padding(name):
    """A sequence of a batch gets what it gets by itself, padded at either end."""
    model = models.model(name)
    ids = models.tokens(3, 120)
    first, end = [0, 17, 60], [120, 100, 120]
    mask = torch.zeros_like(ids)
    for i in range(3):
        mask[i, first[i]:end[i]] = 1
    alone = [logits_of(model, ids[i:i + 1, first[i]:end[i]], streaming(model), [end[i] - first[i]]) for i in range(3)]
    cache = streaming(model)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = []
    for at, n in [(0, 40), (40, 50), (90, 30)]:
        cut = slice(at, at + n)
        out.append(model(ids[:, cut], attention_mask=mask[:, :at + n], position_ids=positions[:, cut], cache=cache).logits)
    out = torch.cat(out, 1)
    for i in range(3):
        assert (out[i, first[i]:end[i]] - alone[i][0]).abs().max() < 1e-3, (name, i)
    # Taking back counts tokens, not padding; what comes after padding follows the token before it.
    cache.crop(-25)
    token = models.tokens(3, 1, seed=5)
    mask, positions = torch.cat([mask[:, :95], torch.ones(3, 1, dtype=mask.dtype)], 1), positions[:, :96].clone()
    positions[:, 95] = mask.sum(-1) - 1
    found = model(token, attention_mask=mask, position_ids=positions[:, 95:], cache=cache).logits
    for i in range(3):
        seen = ids[i:i + 1, first[i]:min(end[i], 95)]
        again = logits_of(model, torch.cat([seen, token[i:i + 1]], 1), streaming(model), [seen.shape[1], 1])
        assert (found[i, 0] - again[0, -1]).abs().max() < 1e-3, (name, i)


def check_generate(name):
    """Greedy, beams, drafts that are taken back: what the same steps give by themselves."""
    model = models.model(name)
    ids = models.tokens(1, 60)
    arguments = dict(max_new_tokens=30, do_sample=False)
    greedy = model.generate(ids, past_key_values=streaming(model), **arguments)
    python = PythonSinkCache(model, SINKS, WINDOW)
    for i in range(60 + 29):
        logits = python.step(model, greedy[:, i:i + 1])
        if i >= 59:
            best, chosen = logits[0, -1].max(), logits[0, -1, greedy[0, i + 1]]
            assert best - chosen < 1e-3, (name, i)
    drafted = model.generate(ids, past_key_values=streaming(model), prompt_lookup_num_tokens=6, **arguments)
    assert torch.equal(greedy, drafted), name
    assistant = models.model(name)  # agrees, so that drafts are long
    drafted = model.generate(ids, past_key_values=streaming(model), assistant_model=assistant, **arguments)
    assert torch.equal(greedy, drafted), name
    # Beams: each beam's score is the sum of its log probabilities when it is streamed alone.
    beams = model.generate(ids, past_key_values=streaming(model), num_beams=4, num_return_sequences=4, output_scores=True,
                           return_dict_in_generate=True, length_penalty=0.0, **arguments)
    for sequence, score in zip(beams.sequences, beams.sequences_scores):
        logits = logits_of(model, sequence[None, :-1], streaming(model), [60] + [1] * 29)
        steps = logits[0, 59:].log_softmax(-1).gather(1, sequence[60:, None]).sum()
        assert abs(steps - score) < 2e-3, f"{name}: {steps}, {score}"
    # A batch with padding on the left.
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :13] = 0
    two = ids.repeat(2, 1)
    both = model.generate(two, attention_mask=mask, past_key_values=streaming(model), **arguments)
    alone = model.generate(ids[:, 13:], past_key_values=streaming(model), **arguments)
    assert torch.equal(both[0], greedy[0]) and torch.equal(both[1, 60:], alone[0, 47:]), name


def check_life_of_a_cache():
    model = models.model("gemma3")
    ids = models.tokens(2, 90)
    plain = model(ids).logits
    one = streaming(model)
    first = logits_of(model, ids, one, [50, 40])
    assert model.config._attn_implementation == "sinkcache"
    assert (model(ids, cache=DynamicCache(config=model.config)).logits - plain).abs().max() < 1e-3
    other = SinkCache(model, 1, 20, "f32")
    turns = [torch.cat(parts, 1) for parts in zip(*[
        (model(ids[:, i:i + 30], cache=copy_of).logits, model(ids[:, i:i + 30], cache=other).logits)
        for copy_of in [streaming(model)] for i in (0, 30, 60)])]
    assert (turns[0] - first).abs().max() < 1e-4
    assert (turns[1] - first).abs().max() > 0.1
    # A copy goes on by itself.
    twin = copy.deepcopy(one)
    token = models.tokens(2, 1, seed=7)
    before = model(token, cache=twin).logits
    model(models.tokens(2, 9, seed=8), cache=twin)
    assert torch.equal(before, model(token, cache=one).logits)
    assert twin.get_seq_length() == 100 and one.get_seq_length() == 91
    # Back to the start, and once more, with another batch.
    one.reset()
    assert one.get_seq_length() == 0
    assert (logits_of(model, ids[:1], one, [90]) - first[:1]).abs().max() < 1e-4
    one.crop(-60)
    assert (logits_of(model, ids[:1, 30:], one, [1] * 60) - first[:1, 30:]).abs().max() < 1e-4
    one.batch_repeat_interleave(3)
    one.batch_select_indices(torch.tensor([2, 0]))
    assert one.batch_size == 2
    assert (model(token[:1].repeat(2, 1), cache=one).logits - before[0]).abs().max() < 1e-4
    # Taken back as a whole.
    model_ref_hooks = len(model.model._forward_pre_hooks)
    assert model_ref_hooks == 1
    del one, other, twin, turns
    gc.collect()
    assert model.config._attn_implementation == "eager" and not model.model._forward_pre_hooks
    assert not model.model.rotary_emb._forward_pre_hooks
    assert torch.equal(model(ids).logits, plain)


def check_interrupted():
    """A forward pass that ends between two layers leaves no trace."""
    model = models.model("llama")
    ids = models.tokens(1, 80)
    expected = logits_of(model, ids, streaming(model), [60, 20])
    cache = streaming(model)
    model(ids[:, :60], cache=cache)

    def fails(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_pre_hook(fails)
    try:
        model(ids[:, 60:75], cache=cache)
    except KeyboardInterrupt:
        pass
    handle.remove()
    assert (model(ids[:, 60:], cache=cache).logits - expected[:, 60:]).abs().max() < 1e-4
    assert (model(ids[:, :60]).logits - expected[:, :60])[:, :SINKS + WINDOW].abs().max() < 1e-3


def check_endless():
    """After a million tokens the same pinned tokens and the same newest ones give what they give after a hundred: what
    left reaches the last tokens through no layer, and positions in the cache are the same."""
    config = transformers.LlamaConfig(vocab_size=211, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 2.5 / parameter.shape[-1] ** 0.5)
    start, end = models.tokens(1, 4), models.tokens(1, 300, seed=6)
    last, memory = [], []
    for between in (100, 1_000_000):
        cache = SinkCache(model, 4, 28, "f32")
        model.model(start, cache=cache)
        for at in range(0, between, 10_000):
            model.model(models.tokens(1, min(10_000, between), seed=at), cache=cache)
        last.append(model(end, cache=cache).logits[:, 200:])
        assert cache.get_seq_length() == between + 304
        memory.append(cache.nbytes())
    assert (last[0] - last[1]).abs().max() < 1e-4 and memory[0] == memory[1]


def check_all_formats_and_policies():
    model = models.model("llama")
    ids = models.tokens(2, 300)
    expected = model(ids[:, :48]).logits
    for k in ("f32", "f16", "bf16", "q8", "q6", "q4", "q2"):
        for v in ("f32", "q8", "q4"):
            cache = SinkCache(model, 4, 76, k, v_format=v, recent=8)
            out = logits_of(model, ids, cache, [48, 200] + [1] * 52)
            assert out.isfinite().all(), (k, v)
            error = (out[:, :48] - expected).abs().max().item()
            if k in ("f32", "f16", "bf16") and v == "f32":
                assert error < {"f32": 1e-3, "f16": 0.1, "bf16": 0.8}[k], (k, v, error)
            memory = cache.nbytes()
            model(ids, cache=cache)
            assert cache.nbytes() == memory
    for policy in ("h2o", "snapkv", "knorm"):
        cache = SinkCache(model, 4, 96, "q8", policy + ":recent=8,interval=16", v_format="q4", recent=8)
        assert logits_of(model, ids, cache, [48, 200] + [1] * 52).isfinite().all(), policy
    for policy in ("sinks", "window", "random", "h2o", "tova", "snapkv", "knorm", "keydiff", "mean_key", "lagkv:lag=8",
                   "expected_attention", "rkv", "gkv"):
        sinks = 0 if policy == "window" else 4
        if policy not in ("sinks", "window"):
            policy += ("," if ":" in policy else ":") + "recent=8,interval=16"
        runs = []
        for chunks in ([300], [90, 7] + [1] * 10 + [193]):
            cache = SinkCache(model, sinks, 100 - sinks, "f32", policy)
            runs.append(logits_of(model, ids, cache, chunks))
            assert (runs[-1][:, :48] - expected).abs().max() < 1e-3, policy
            memory = cache.nbytes()
            model(ids, cache=cache)
            assert cache.nbytes() == memory, policy
        assert (runs[0] - runs[1]).abs().max() < 1e-3, policy  # however a stream is cut
        # Drafts are taken back, with what was learned from them.
        for cache in [SinkCache(model, sinks, 100 - sinks, "f32", policy)]:
            model(ids[:, :150], cache=cache)
            model(models.tokens(2, 20, seed=9), cache=cache)
            cache.crop(-20)
            difference = (model(ids[:, 150:], cache=cache).logits - runs[0][:, 150:]).abs().max().item()
            assert difference < 1e-3, (policy, difference)


def check_refusals():
    model = models.model("llama")
    ids = models.tokens(2, 30)
    refused("the policy was 'best'", SinkCache, model, policy="best")
    refused("the format of keys was 'f8'", SinkCache, model, kv_format="f8")
    refused("window was 0", SinkCache, model, window=0)
    refused("num_sink_tokens was -1", SinkCache, model, num_sink_tokens=-1)
    refused("window was 2.5", SinkCache, model, window=2.5)
    refused("positions was 'true'", SinkCache, model, positions="true")
    refused("model was str", SinkCache, "llama")
    assert not model.model._forward_pre_hooks or gc.collect() >= 0 and not model.model._forward_pre_hooks
    cache = streaming(model)
    other = models.model("llama")
    refused("given to another model's layers", other, ids, cache=cache)
    keep = streaming(other)
    refused("a SinkCache's model was LlamaModel", other, ids, cache=cache)
    model(ids, cache=cache)
    refused("sequences of the batch was 1", model, ids[:1], cache=cache)
    refused("attention_mask was of shape [2, 30]", model, ids, attention_mask=torch.ones(2, 30), cache=cache)
    changed = torch.ones(2, 60, dtype=torch.long)
    changed[0, 3] = 0
    refused("other than before", model, ids, attention_mask=changed, cache=cache)
    packed = torch.cat([torch.arange(30, 45), torch.arange(15)])[None]
    refused("numbers that follow each other", model, ids, position_ids=packed, cache=cache)
    refused("position_ids was 31 for token 30", model, ids, position_ids=torch.arange(31, 61)[None], cache=cache)
    hole = torch.ones(2, 60, dtype=torch.long)
    hole[0, 50] = 0
    refused("attention_mask was 0 between tokens", model, ids, attention_mask=hole, cache=cache)
    refused("attention_mask was of shape [2, 1, 30, 60]", model, ids, attention_mask=torch.ones(2, 1, 30, 60), cache=cache)
    late = torch.ones(2, 60, dtype=torch.long)
    late[1, 30:35] = 0
    refused("give position_ids", model, ids, attention_mask=late, cache=cache)
    refused("output_attentions was True", model, ids, output_attentions=True, cache=cache)
    assert cache.get_seq_length() == 30
    model(models.tokens(2, 200), cache=cache)
    refused("older tokens are overwritten", cache.crop, -100)
    refused("tokens_to_remove was 5", cache.crop, 5)
    assert cache.get_seq_length() == 230
    refused("pickled", copy.copy, cache)
    model.set_attn_implementation("eager")
    refused("the model's attention was eager", model, ids, cache=cache)
    model.set_attn_implementation("sinkcache")
    model(ids, cache=cache)
    del keep

    t = transformers
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=256)

    def made(config):
        return t.AutoModelForCausalLM.from_config(config).eval()

    refused("rope_type was dynamic", SinkCache, made(t.LlamaConfig(**small, rope_parameters=dict(
        rope_type="dynamic", rope_theta=1e4, factor=2.0))))
    refused("layer 0's type was linear_attention", SinkCache, made(t.Qwen3NextConfig(
        **small, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        shared_expert_intermediate_size=32)))
    refused("layer 1's type was dummy", SinkCache, made(t.Gemma3nTextConfig(
        **{**small, "intermediate_size": [32] * 2}, head_dim=16, num_kv_shared_layers=1, vocab_size_per_layer_input=64,
        activation_sparsity_pattern=[0.0] * 2)))
    refused("layer 0's type was chunked_attention", SinkCache, made(t.Llama4TextConfig(
        **small, num_local_experts=2, attention_chunk_size=32, head_dim=16, intermediate_size_mlp=32)))
    mla = t.DeepseekV3Config(
        **{**small, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=2)
    model = made(mla)
    refused("kv_lora_rank was 16", SinkCache, model)
    model.model.config.kv_lora_rank = 0  # the same layers, not known by name
    refused("layers do something else with what a cache gives them", SinkCache, model)
    # Layers that do more with what the cache gave them: attend twice, to halves of the values; repeat keys.
    refused("layer 0's values was changed", SinkCache, made(t.DiffLlamaConfig(**small)))
    refused("or what a SinkCache gave", SinkCache, made(t.JetMoeConfig(
        **{**small, "num_key_value_heads": 4}, num_local_experts=2, kv_channels=8)))
    model = made(t.LlamaConfig(**small))
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, named: (args, {**named, "attention_mask": torch.ones(1, 1, 4, 4)}), with_kwargs=True)
    refused("layer 1's mask was another", SinkCache, model)
    refused("decoders with a rotary embedding was 0", SinkCache, made(t.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)))


def check_other_models():
    """Whose rotary embeddings differ: interleaved, of a part of a head, missing in some layers."""
    t = transformers
    small = dict(vocab_size=211, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0)
    configs = {
        "cohere": t.CohereConfig(**small),
        "phi": t.PhiConfig(**small, partial_rotary_factor=0.5),
        "phi3": t.Phi3Config(**small),
        "smollm3": t.SmolLM3Config(**small, no_rope_layer_interval=2),
        "olmo2": t.Olmo2Config(**small),
        "glm": t.GlmConfig(**small, head_dim=16, partial_rotary_factor=0.5),
        "stablelm": t.StableLmConfig(**small),
        "granite": t.GraniteConfig(**small),
        "gpt-neox": t.GPTNeoXConfig(**small),
        "cohere2": t.Cohere2Config(**small, sliding_window=16),
        "qwen3-moe": t.Qwen3MoeConfig(**small, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        # Makes a mask of a window of 0 as well, which no layer reads.
        "qwen2-moe": t.Qwen2MoeConfig(**small, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                      shared_expert_intermediate_size=32),
    }
    served = []
    for name, config in configs.items():
        torch.manual_seed(3)
        model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2.5 / parameter.shape[-1] ** 0.5)
        ids = models.tokens(2, 60)
        expected = model(ids).logits
        cache = SinkCache(model, 4, 100, "f32")
        difference = (logits_of(model, ids, cache, [40] + [1] * 20) - expected).abs().max().item()
        assert difference < 1e-3, f"{name}: {difference}"
        served.append(name)
    return served


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    check_refusals()
    check_life_of_a_cache()
    check_interrupted()
    check_endless()
    for name in models.NAMES:
        difference = check_against_eager(name)
        worst, largest = check_against_python(name)
        print(f"{name}: from eager attention at most {difference:.1e}, past the window from a sink cache in Python "
              f"{worst:.1e} of {largest:.1f}", flush=True)
        check_padding(name)
        check_generate(name)
        for dtype in (torch.bfloat16, torch.float16):
            check_half(name, dtype)
    check_all_formats_and_policies()
    print("also:", ", ".join(check_other_models()))
    print("SinkCache: passed")
