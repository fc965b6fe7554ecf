"""Masks for the operator: four numbers a sequence (torch.ops.sinkcache.mask_spans), the same for all layers."""

import threading

import torch
from transformers import masking_utils

from .attention import refuse


class _Forwards(threading.local):
    cache = None  # the SinkCache that this thread's forward pass fills


forwards = _Forwards()


def mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=masking_utils.causal_mask_function,
         attention_mask=None, local_size=None, use_vmap=False, device="cpu", **_):
    """As transformers' AttentionMaskInterface calls it; attention_mask [batch, tokens] is False where there is padding.

    A mask that says more than causality, a window and padding at either end is refused by name: for a SinkCache by the
    first layer that is handed it."""
    window = local_size or 0
    if forwards.cache is not None:  # which knows the padding; the mask says its window alone
        if not use_vmap and is_causal(mask_function, 0):
            return None
        said = torch.empty(0, 0, 0, 0)
        said.sinkcache_window = window if not use_vmap and is_causal(mask_function, window) else None
        return said
    query = q_offset - kv_offset
    if not torch.compiler.is_compiling() and not use_vmap and is_causal(mask_function, window):
        spans = torch.tensor([0, kv_length, int(query), window]).repeat(batch_size, 1)
        if attention_mask is not None:
            padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
            tokens = padding[:, kv_offset:kv_offset + kv_length]
            if not tokens.all():
                spans[:, 0], spans[:, 1] = ends_of_tokens(tokens)
        return spans[:, None, None]
    whole = masking_utils.sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device)
    return torch.ops.sinkcache.mask_spans(whole, window, 0, torch.as_tensor(query))


def is_causal(mask_function, window):
    """Whether it says causality and the window, and no more."""
    if mask_function is masking_utils.causal_mask_function:
        return window == 0
    return window > 0 and _same(mask_function, masking_utils.sliding_window_causal_mask_function(window))


def _same(a, b):
    """Whether two functions are the same code over the same values."""
    if getattr(a, "__code__", None) is None or a.__code__ is not getattr(b, "__code__", None):
        return False

    def values(f):
        cells = [cell.cell_contents for cell in f.__closure__ or ()]
        return [v for cell in cells for v in (cell if isinstance(cell, tuple) else (cell,))]

    mine, others = values(a), values(b)
    return len(mine) == len(others) and all(
        x is y or (callable(x) and _same(x, y)) or (isinstance(x, int) and x == y) for x, y in zip(mine, others))


def ends_of_tokens(tokens):
    """Of [batch, length], False where there is padding: where tokens begin and end. Between them there may be none."""
    count, length = tokens.sum(-1), tokens.shape[1]
    first = tokens.int().argmax(-1)
    end = torch.where(count > 0, length - tokens.flip(-1).int().argmax(-1), first)
    if not torch.equal(end - first, count):
        refuse("attention_mask", "0 between tokens", "0 before or after the tokens only")
    return first, end
