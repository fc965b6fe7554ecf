"""A sink cache in Python over PyTorch's own attention, one token at a time: what SinkCache is held against.

Keys are kept as they were before their rotary embedding, and rotated for each query, in double: in layers that
stream, to their places in the cache, in layers with a sliding window of their own, to their true distances. Shares
nothing with the library, nor with how SinkCache takes a model's rotary embedding out of the way: it is given keys that
the model rotated to `position`, and rotates them back.
"""

import torch
import transformers


class PythonSinkCache(transformers.Cache):
    def __init__(self, model, num_sink_tokens, window):
        super().__init__(layers=[])
        config = model.config
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
            kinds = ["sliding_attention"] * config.num_hidden_layers
        rotary = model.model.rotary_emb
        self.of_layer, self.raw = [], []
        for kind in kinds:
            prefix = kind + "_" if hasattr(rotary, kind + "_inv_freq") else ""
            factor = getattr(rotary, prefix + "attention_scaling")
            own = config.sliding_window if kind == "sliding_attention" else 0
            streams = not 0 < own <= num_sink_tokens + window
            self.of_layer.append((getattr(rotary, prefix + "inv_freq").double(), factor, streams,
                                  num_sink_tokens if streams else 0, window if streams else own))
            self.raw.append(([], []))
        self.position = 0  # of the next token in the stream; the model is told `place`
        self.num_sink_tokens, self.window = num_sink_tokens, window

    @property
    def place(self):
        """Of the next token in caches that stream."""
        return min(self.position, self.num_sink_tokens + self.window - 1)

    def step(self, model, token):
        """Logits after one token [batch, 1]."""
        everything = torch.zeros(1, 1, 1, 1, dtype=model.dtype)  # is what a mask adds: the cache gives what is seen
        logits = model(token, attention_mask=everything, position_ids=torch.full_like(token, self.place),
                       cache=self).logits
        self.position += 1
        return logits

    def update(self, key, value, layer, *args, **kwargs):
        inv_freq, factor, streams, sinks, window = self.of_layer[layer]
        keys, values = self.raw[layer]
        keys.append(rotated(key.double(), -self.place, inv_freq))
        values.append(value)
        while len(keys) > sinks + window:
            del keys[sinks], values[sinks]
        n = len(keys)
        if streams:
            assert n - 1 == self.place
        raw = torch.cat(keys, 2)
        places = torch.arange(self.place - n + 1, self.place + 1)
        return rotated(raw, places, inv_freq).to(key.dtype), torch.cat(values, 2)

    def get_seq_length(self, layer=0):
        return 0


def rotated(x, position, inv_freq):
    """x [batch, heads, tokens, dim] in double, each token rotated by its position."""
    angle = torch.as_tensor(position, dtype=torch.float64).reshape(-1, 1) * inv_freq
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
