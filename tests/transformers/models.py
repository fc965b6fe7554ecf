"""Models of odd shapes with random weights, one of each kind that transformers' attention and caches have."""

import torch
import transformers

WINDOW = 24


def _configs():
    t = transformers
    common = dict(vocab_size=211, hidden_size=72, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
                  num_key_value_heads=2, head_dim=24, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1,
                  eos_token_id=None, tie_word_embeddings=False)
    alternating = ["sliding_attention", "full_attention", "sliding_attention"]
    llama3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=64)
    yarn = dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=64, beta_fast=32.0,
                beta_slow=1.0, truncate=False)
    return {
        "llama": t.LlamaConfig(**common, rope_parameters=llama3),
        "mistral": t.MistralConfig(**common, sliding_window=WINDOW),
        "qwen2": t.Qwen2Config(**common),
        "qwen2-sliding": t.Qwen2Config(**common, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        "qwen3": t.Qwen3Config(**common),
        "gemma2": t.Gemma2Config(**common, sliding_window=WINDOW, layer_types=alternating, query_pre_attn_scalar=24,
                                 attn_logit_softcapping=5.0, final_logit_softcapping=30.0),
        "gemma3": t.Gemma3TextConfig(**common, sliding_window=WINDOW, layer_types=alternating,
                                     query_pre_attn_scalar=24),
        "gpt-oss": t.GptOssConfig(**common, sliding_window=WINDOW, layer_types=alternating, num_local_experts=4,
                                  num_experts_per_tok=2, rope_parameters=yarn),
    }


NAMES = list(_configs())


def model(name, dtype=torch.float32, attention="eager", seed=1):
    torch.manual_seed(seed)
    config = _configs()[name]
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in made.named_parameters():
            # Large enough that attention is far from even, and that where a token stands matters.
            scale = 1.0 if parameter.dim() < 2 else 2.5 / parameter.shape[-1] ** 0.5
            base = 1.0 if "norm" in parameter_name and not name.startswith("gemma") else 0.0
            parameter.normal_(base, 0.2 if "norm" in parameter_name else scale)
    made.generation_config.eos_token_id = None
    return made.to(dtype).eval()


def tokens(batch, length, seed=2):
    return torch.randint(2, 211, (batch, length), generator=torch.Generator().manual_seed(seed))
