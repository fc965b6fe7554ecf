"""The operator with the signature of Hugging Face's AttentionInterface. Needs no transformers, and no PyTorch 2."""

import weakref

import torch

_is_compiling = torch.compiler.is_compiling if hasattr(torch, "compiler") else lambda: False

# What a mask says, and the mask itself: layers of one forward pass share it.
_last_mask = (lambda: None, None, None)


def load(library):
    """Loads the operators, torch.ops.sinkcache, and says what they return where nothing is computed."""
    torch.ops.load_library(str(library))
    if not hasattr(torch.library, "register_fake"):  # PyTorch 1
        return

    @torch.library.register_fake("sinkcache::attend")
    def _(query, key, value, scaling, sliding_window=0, num_sink_tokens=0, softcap=0.0, sinks=None, spans=None):
        return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))

    @torch.library.register_fake("sinkcache::mask_spans")
    def _(mask, window=0, num_sink_tokens=0, query=None):
        return mask.new_empty((mask.shape[0], 1, 1, 4), dtype=torch.int64)


def refuse(argument, value, had_to_be):
    raise ValueError(f"sinkcache: {argument} was {value}, had to be {had_to_be}")


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, s_aux=None,
              softcap=None, is_causal=None, output_attentions=False, num_sink_tokens=0, **others):
    """query [batch, heads, q_len, dim], key and value [batch, kv_heads, kv_len, dim], s_aux: learned sinks [heads].

    Returns ([batch, q_len, heads, dim], None). A token sees itself and the tokens before it, of which with a
    sliding_window the newest, itself included, and the first num_sink_tokens (ours; models do not pass it). Keys and
    values are read in the cache's own tensors; the newest token is the last, unless the mask says otherwise. What it
    cannot serve it refuses by name.
    """
    if dropout:
        refuse("dropout", dropout, "0: this is inference")
    if output_attentions:
        refuse("output_attentions", True, "False: no weights are kept")
    for name in ("position_bias", "indices", "block_indices", "sinks"):  # other logits, or fewer keys
        if others.get(name) is not None:
            refuse(name, "a tensor", "None")
    layer = getattr(key, "sinkcache_layer", None)  # of a SinkCache, which attends for itself
    if query.device.type != "cpu":
        refuse("query's device", query.device.type, "cpu")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        refuse("requires_grad", True, "False, or the call under torch.no_grad(): there is no gradient")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal and query.shape[2] > 1:
        refuse("is_causal", False, "True where q_len is above 1")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    sinks = None if s_aux is None else s_aux.detach()
    if layer is not None:
        if getattr(value, "sinkcache_layer", None) is not layer:
            refuse(f"layer {layer.index}'s values", "changed after its cache gave them", "handed to attention as they are")
        # Of masks.py: the window that it says. Others say more.
        own_window = 0 if attention_mask is None else getattr(attention_mask, "sinkcache_window", None)
        if own_window is None:
            refuse(f"layer {layer.index}'s mask", "another", "causal, with or without a sliding window, for a SinkCache")
        return layer.attend(query.detach(), float(scaling), float(softcap or 0), sinks, own_window), None
    if key.shape[2] < query.shape[2]:
        refuse("key.shape[2]", key.shape[2], f"at least q_len, {query.shape[2]}, or what a SinkCache gave, as it is")
    window = sliding_window or 0
    spans = None if attention_mask is None else _spans(attention_mask, query, key, window, num_sink_tokens)
    return torch.ops.sinkcache.attend(query.detach(), key.detach(), value.detach(), float(scaling), window,
                                      num_sink_tokens, float(softcap or 0), sinks, spans), None


def _spans(mask, query, key, window, num_sink_tokens):
    """What the operator reads: what masks.py made, or what a mask of someone else's says, looked at once."""
    global _last_mask
    if mask.dtype == torch.int64:
        return mask
    if mask.dim() != 4 or mask.shape[-2:] != (query.shape[2], key.shape[2]):
        refuse("attention_mask", f"an arbitrary mask {list(mask.shape)}",
               f"[batch, 1, {query.shape[2]}, {key.shape[2]}]: queries and keys")
    if mask.shape[0] != query.shape[0]:
        mask = mask.expand(query.shape[0], -1, -1, -1)
    if _is_compiling():
        return torch.ops.sinkcache.mask_spans(mask, window, num_sink_tokens)
    said = (mask._version, window, num_sink_tokens)
    last, last_said, spans = _last_mask
    if last() is not mask or last_said != said:
        spans = torch.ops.sinkcache.mask_spans(mask, window, num_sink_tokens)
        _last_mask = (weakref.ref(mask), said, spans)
    return spans
