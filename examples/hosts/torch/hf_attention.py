"""sinkcache as an attention of Hugging Face transformers, on CPU:

    import hf_attention
    hf_attention.load("build/.../libsinkcache_torch.so")
    transformers.AttentionInterface.register("sinkcache", hf_attention.attention)
    transformers.AttentionMaskInterface.register("sinkcache", transformers.masking_utils.sdpa_mask)
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="sinkcache")

Keys and values are read in the cache's own tensors, of a cache that grows: the newest token is the last. What it cannot
serve it refuses by name. Without AttentionMaskInterface transformers drops a padded batch's mask, and nothing can
refuse it.
"""

import torch


def load(library):
    torch.ops.load_library(str(library))


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, s_aux=None,
              softcap=None, is_causal=None, position_bias=None, output_attentions=False, num_sink_tokens=0, **_):
    """query [batch, heads, q_len, dim], key and value [batch, kv_heads, kv_len, dim], s_aux: learned sinks [heads].

    Returns ([batch, q_len, heads, dim], None). A token sees itself and the tokens before it, of which with a
    sliding_window the newest, itself included, and the first num_sink_tokens (ours; models do not pass it).
    """
    def refuse(argument, value, had_to_be):
        raise ValueError(f"sinkcache: {argument} was {value}, had to be {had_to_be}")

    if dropout:
        refuse("dropout", dropout, "0: this is inference")
    if output_attentions:
        refuse("output_attentions", True, "False: no weights are kept")
    if position_bias is not None:
        refuse("position_bias", "a tensor", "None")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    q_len, kv_len = query.shape[2], key.shape[2]
    if not is_causal and q_len > 1:
        refuse("is_causal", False, "True where q_len is above 1")
    if kv_len < q_len:
        refuse("key.shape[2]", kv_len, f"at least q_len, {q_len}")
    if query.device.type != "cpu":
        refuse("query's device", query.device.type, "cpu")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        refuse("requires_grad", True, "False, or the call under torch.no_grad(): there is no gradient")
    window = sliding_window or 0
    if attention_mask is not None and not _is_plain(attention_mask, q_len, kv_len, window, num_sink_tokens):
        refuse("attention_mask", f"an arbitrary mask {list(attention_mask.shape)}",
               "None, or causal with the sliding_window that is given: padded batches and others' masks are not served")
    out = torch.ops.sinkcache.attend(query.detach(), key.detach(), value.detach(),
                                     query.shape[-1] ** -0.5 if scaling is None else float(scaling), window,
                                     num_sink_tokens, float(softcap or 0), None if s_aux is None else s_aux.detach())
    return out, None


def _is_plain(mask, q_len, kv_len, window, num_sink_tokens):
    """Whether a mask, boolean or additive, says what causality and the window say anyway."""
    if mask.dim() != 4 or mask.shape[-2:] != (q_len, kv_len):
        return False
    visible = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not torch.all(visible | (mask <= torch.finfo(mask.dtype).min)):
        return False
    return torch.equal(visible, plain_mask(q_len, kv_len, window, num_sink_tokens).expand_as(visible))


def plain_mask(q_len, kv_len, window=0, num_sink_tokens=0):
    """True where a token is seen: [q_len, kv_len]."""
    query = torch.arange(kv_len - q_len, kv_len)[:, None]
    key = torch.arange(kv_len)[None, :]
    in_window = (key > query - window) | (key < num_sink_tokens) if window else torch.ones(1, dtype=torch.bool)
    return (key <= query) & in_window
