"""A small Llama over bytes, with softmax, softmax1 or sink logits; modules have the names of Hugging Face's Llama."""

import json
import math
import sys

from files import write_atomically

try:
    import numpy
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from torch import nn
    from torch.nn import functional as F
except ImportError as error:
    sys.exit(f"{error}: pip install torch numpy safetensors")

VOCAB, BOS = 257, 256  # the bytes, and what stands before every context
ROPE_THETA, NORM_EPS = 10000.0, 1e-5
WARM = 64  # earlier queries have so few keys that attention spread evenly gives the first token a lot


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        hidden, width = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
        kv_width = config["num_key_value_heads"] * config["head_dim"]
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        if config["attention"] == "sink":
            self.sinks = nn.Parameter(torch.zeros(config["num_attention_heads"]))

    def null_logits(self):
        """One a head, beside those of the keys in the denominator, with no value: all that the three differ in."""
        if self.config["attention"] == "softmax1":
            return torch.zeros(self.config["num_attention_heads"])
        return self.sinks if self.config["attention"] == "sink" else None

    def forward(self, x, cos, sin, masked, record):
        batch, length, _ = x.shape
        head_dim = self.config["head_dim"]
        group = self.config["num_attention_heads"] // self.config["num_key_value_heads"]

        def heads(y):
            return y.view(batch, length, -1, head_dim).transpose(1, 2)

        q, k = rotate(heads(self.q_proj(x)), cos, sin), rotate(heads(self.k_proj(x)), cos, sin)
        k, v = k.repeat_interleave(group, 1), heads(self.v_proj(x)).repeat_interleave(group, 1)
        scores = (q * head_dim**-0.5) @ k.transpose(-1, -2) + masked
        null = self.null_logits()
        if null is not None:
            scores = torch.cat([scores, null[:, None, None].expand(batch, -1, length, 1)], -1)
        weights = scores.softmax(-1)[..., :length]
        if record is not None:  # what the first token gets, and what no token gets
            record.append((weights[..., 0], 1 - weights.sum(-1)))
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, width = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], NORM_EPS)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], NORM_EPS)
        self.mlp = Mlp(config)

    def forward(self, x, *attention_inputs):
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        layers = [Layer(config) for _ in range(config["num_hidden_layers"])]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(VOCAB, config["hidden_size"]),
            "layers": nn.ModuleList(layers),
            "norm": nn.RMSNorm(config["hidden_size"], NORM_EPS)})
        self.initialise(torch.Generator().manual_seed(seed))

    def initialise(self, generator):
        """In an order that does not depend on the attention; sink logits begin at 0 and draw nothing."""
        for name, weight in self.named_parameters():
            if "embed_tokens" in name:
                scale = 0.02
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                scale = (weight.shape[1] * 2 * self.config["num_hidden_layers"])**-0.5
            elif name.endswith("_proj.weight"):
                scale = 0.5 * weight.shape[1]**-0.5
            else:
                continue
            nn.init.normal_(weight, std=scale, generator=generator)

    def forward(self, ids, record=None):
        """Logits [batch, length, VOCAB]; `record` gets (first, none) a layer, each [batch, heads, length]."""
        length, dim = ids.shape[1], self.config["head_dim"]
        angles = torch.arange(length)[:, None] * ROPE_THETA**(-torch.arange(0, dim, 2) / dim)
        angles = torch.cat([angles, angles], -1)
        masked = torch.full((length, length), -math.inf).triu(1)
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, angles.cos(), angles.sin(), masked, record)
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)


def with_bos(crops):
    """BOS and all but the last byte as inputs, all bytes as targets."""
    targets = torch.as_tensor(crops.astype("int64"))
    return F.pad(targets[:, :-1], (1, 0), value=BOS), targets


def heldout_contexts(path, count, context):
    """`count` crops, evenly spaced over a text that is not trained on."""
    text = numpy.fromfile(path, numpy.uint8)
    if count * context > len(text):
        raise ValueError(f"{path} has {len(text)} bytes, had to have at least {count} x {context}")
    stride = len(text) // count
    return numpy.stack([text[i * stride:i * stride + context] for i in range(count)])


def loss_of(model, ids, targets, record=None):
    return F.cross_entropy(model(ids, record).flatten(0, 1), targets.flatten())


def bits_per_byte(model, contexts, record=None):
    """Of [contexts, length] bytes, each context read from its BOS on."""
    with torch.no_grad():
        return loss_of(model, *with_bos(contexts), record).item() / math.log(2)


def export(model, settings, path):
    """As examples/loaders reads it: bf16, Hugging Face's names, the configuration and the settings in the metadata."""
    config = dict(model.config, vocab_size=VOCAB, bos_token_id=BOS, rope_theta=ROPE_THETA, rope_style="neox",
                  rms_norm_eps=NORM_EPS, hidden_act="silu", tie_word_embeddings="true",
                  max_position_embeddings=settings["context"], tokenizer="byte")
    metadata = {key: str(value) for key, value in config.items()}
    metadata |= {"format": "pt", "train_args": json.dumps(settings)}
    tensors = {name: weight.to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    write_atomically(path, lambda to: save_file(tensors, to, metadata))


def load_exported(path):
    """The model of a safetensors file, rounded as it is there, computing in float32."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    integers = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                "intermediate_size")
    model = Decoder({"attention": metadata["attention"]} | {key: int(metadata[key]) for key in integers})
    model.load_state_dict(tensors)
    return model, metadata
