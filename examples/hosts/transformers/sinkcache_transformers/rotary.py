"""How a model rotates its queries and keys, measured; and its rotary embedding taken out of the way."""

import inspect
import weakref

import torch

from .attention import refuse
from .masks import forwards

_FIXED = ("default", "linear", "llama3", "yarn", "proportional")  # the same frequencies at all positions


class Layer:
    """Shapes of a layer's keys and values, the window that its mask has, or 0, and its rope: inv_freq [pairs], empty
    where nothing rotates."""

    def __init__(self, query, key, value, own_window, inv_freq, interleaved):
        self.num_qo_heads, self.num_kv_heads = query.shape[1], key.shape[1]
        self.head_dim, self.v_head_dim = key.shape[3], value.shape[3]
        self.own_window, self.inv_freq, self.interleaved = own_window, inv_freq, interleaved


class Rotary:
    """A decoder's hooks, for as long as caches of it live. While a SinkCache is filled its rotary embeddings are asked
    for position 0: keys and queries then come as they were before them, attention factor included."""

    def __init__(self, decoder):
        self.modules = _rotary_modules(decoder)
        self.attention = decoder.config._attn_implementation
        self.users = 0
        self.layers = None
        self.handles = []

    def attach(self, decoder, before, after):
        if self.users == 0:
            self.attention = decoder.config._attn_implementation
            if self.attention != "sinkcache":
                decoder.set_attn_implementation("sinkcache")
            if decoder.config._attn_implementation != "sinkcache":
                refuse(f"{type(decoder).__name__}'s attention", decoder.config._attn_implementation,
                       "one that can be set to sinkcache")
            self.handles = [m.register_forward_pre_hook(_at_zero, with_kwargs=True) for m in self.modules]
            self.handles += [decoder.register_forward_pre_hook(before, with_kwargs=True),
                             decoder.register_forward_hook(after, always_call=True)]
        self.users += 1

    def detach(self, decoder):
        self.users -= 1
        if self.users > 0:
            return
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if decoder is not None and decoder.config._attn_implementation == "sinkcache":
            decoder.set_attn_implementation(self.attention)


_of_decoder = weakref.WeakKeyDictionary()


def of(decoder):
    """The decoder's; made once, and measured by its first cache."""
    if decoder not in _of_decoder:
        _of_decoder[decoder] = Rotary(decoder)
    return _of_decoder[decoder]


def decoder_of(model):
    """The module whose forward has the cache and whose rotary embedding all layers share."""
    if not isinstance(model, torch.nn.Module):
        refuse("model", type(model).__name__, "a model of transformers")
    found = [m for m in model.modules() if isinstance(getattr(m, "layers", None), torch.nn.ModuleList)
             and any(type(c).__name__.endswith("RotaryEmbedding") for c in m.children())]
    if len(found) != 1:
        refuse(f"{type(model).__name__}'s decoders with a rotary embedding", len(found), "1")
    decoder = found[0]
    for parameter in decoder.parameters():
        if parameter.device.type != "cpu":
            refuse("the model's device", parameter.device.type, "cpu")
    return decoder


def cache_name(decoder):
    names = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def measure(decoder, probe):
    """Of each layer a Layer. `probe` is a cache that notes what layers give it, and for which they attend to nothing:
    so hidden states are the same whatever the positions, and keys of two passes tell how they were rotated."""
    for parameters in _rope_parameters(decoder.config):
        kind = parameters.get("rope_type", "default")
        if kind not in _FIXED:
            refuse("rope_type", kind, "one whose frequencies do not change with the length: " + ", ".join(_FIXED))
        if "mrope_section" in parameters:
            refuse("mrope_section", parameters["mrope_section"], "absent: tokens of one position each")
    if getattr(decoder.config, "kv_lora_rank", None):
        refuse("kv_lora_rank", decoder.config.kv_lora_rank, "absent: MLA caches what its keys and values are made from")
    positions = torch.tensor([[0, 1, 37, 1003]])

    def given(at, hooked):
        forwards.cache, probe.hides_positions = probe, hooked
        probe.begin()
        try:
            with torch.no_grad():
                decoder(input_ids=torch.tensor([[0, 1, 2, 3]]), position_ids=at, use_cache=True,
                        **{cache_name(decoder): probe})
        except (RuntimeError, IndexError, AttributeError) as error:
            if str(error).startswith("sinkcache: "):
                raise
            raise ValueError(f"sinkcache: {type(decoder).__name__}'s layers do something else with what a cache gives "
                             f"them, had to hand it to attention: {error}") from error
        finally:
            forwards.cache = None
        return probe.notes

    there, raw, none = given(positions, False), given(positions, True), given(torch.zeros_like(positions), False)
    number = decoder.config.num_hidden_layers
    for notes in (there, raw, none):
        if sorted(notes) != list(range(number)):
            refuse(f"{type(decoder).__name__}'s layers that attend to keys of their own", len(notes), f"all {number}")
    candidates = [(b.detach().float(), interleaved) for m in _rotary_modules(decoder) for name, b in m.named_buffers()
                  if name.endswith("inv_freq") and "original" not in name for interleaved in (False, True)]
    candidates.append((torch.zeros(0), False))
    layers = []
    for i in range(number):
        (q, k, v, own_window), (raw_q, raw_k, *_), (none_q, none_k, *_) = there[i], raw[i], none[i]
        allowed = {torch.float32: 2e-3, torch.float16: 1e-2}.get(k.dtype, 5e-2)
        if _difference(raw_q, none_q) + _difference(raw_k, none_k) > allowed:
            refuse(f"layer {i}'s positions", "used besides its rotary embedding", "in it alone")
        inv_freq, interleaved = min(candidates, key=lambda c: _difference(_rotated(raw_k, positions, *c), k))
        if _difference(_rotated(raw_k, positions, inv_freq, interleaved), k) + \
                _difference(_rotated(raw_q, positions, inv_freq, interleaved), q) > 2 * allowed:
            refuse(f"layer {i}'s rotary embedding", type(decoder).__name__ + "'s own",
                   "one that rotates the first dimensions of a head by inv_freq, in halves or interleaved")
        layers.append(Layer(q, k, v, own_window, inv_freq, interleaved))
    return layers


def _rotary_modules(decoder):
    return [m for m in decoder.modules() if type(m).__name__.endswith("RotaryEmbedding")]


def _rope_parameters(config):
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if any(isinstance(of_type, dict) for of_type in given.values()):  # by layer type
        return [of_type for of_type in given.values() if of_type]
    return [given]


def _difference(a, b):
    if a.shape != b.shape:
        return float("inf")
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


def _rotated(x, positions, inv_freq, interleaved):
    """x [1, heads, tokens, dim] at these positions, in double."""
    x, pairs = x.double().clone(), len(inv_freq)
    if 2 * pairs > x.shape[-1]:
        return x.new_zeros(0)
    angle = positions[0, :, None].double() * inv_freq.double()
    cos, sin = angle.cos(), angle.sin()
    a = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    b = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    x_a, x_b = x[..., a].clone(), x[..., b].clone()
    x[..., a], x[..., b] = x_a * cos - x_b * sin, x_b * cos + x_a * sin
    return x


def _at_zero(module, args, kwargs):
    if forwards.cache is None or not forwards.cache.hides_positions:
        return None
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": torch.zeros_like(kwargs["position_ids"])}
    return (args[0], torch.zeros_like(args[1]), *args[2:]), kwargs
