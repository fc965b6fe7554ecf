"""Streams a text through a language model in constant memory, and says what the model loses.

    examples/get-model smollm2
    python examples/hosts/transformers/stream.py --compare < long.txt      any length, endless
    python examples/hosts/transformers/stream.py --text long.txt --generate 200
    python examples/hosts/transformers/stream.py --model FOLDER            a model as transformers saves it
"""

import argparse
import os
import pathlib
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from sinkcache_transformers import SinkCache

SMOLLM2 = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"),
                       "sinkcache/SmolLM2-135M-Instruct.Q4_1.gguf")


def load(path):
    """A model and its tokenizer, from a GGUF file or a folder."""
    path = pathlib.Path(path)
    if not path.exists():
        sys.exit(f"there is no {path}; SmolLM2 comes by examples/get-model smollm2")
    where, given = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, attn_implementation="sinkcache", **given)
    return model.eval(), AutoTokenizer.from_pretrained(where, **given)


def tokens_of(file, tokenizer):
    """All tokens of a file, as they come: it is read by lines."""
    for line in file:
        yield from tokenizer(line, add_special_tokens=False).input_ids


def blocks(tokens, size):
    block = []
    for token in tokens:
        block.append(token)
        if len(block) == size:
            yield torch.tensor([block])
            block = []
    if block:
        yield torch.tensor([block])


class Reader:
    """Reads a stream, and adds up what its tokens cost the model, in bits."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.next, self.bits, self.number = None, 0.0, 0

    def read(self, block):
        logits = self.model(block, past_key_values=self.cache).logits[0]
        before = logits[:-1] if self.next is None else torch.cat([self.next, logits[:-1]])
        targets = block[0, len(block[0]) - len(before):]
        losses = -before.log_softmax(-1).gather(1, targets[:, None]) / torch.log(torch.tensor(2.0))
        self.next = logits[-1:].clone()
        self.bits, self.number = self.bits + losses.sum().item(), self.number + len(targets)
        return losses.mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="a GGUF file or a folder; SmolLM2 unless given")
    parser.add_argument("--text", help="a file; standard input unless given")
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--window", type=int, default=508)
    parser.add_argument("--kv-format", default="bf16", help="f32, f16, bf16, q8, q6, q4 or q2")
    parser.add_argument("--policy", default="sinks", help="or snapkv, h2o, ...: docs/eviction.md")
    parser.add_argument("--block", type=int, default=256, help="tokens that are read at once")
    parser.add_argument("--tokens", type=int, help="so many, then stop")
    parser.add_argument("--compare", action="store_true", help="beside a plain window of as many tokens")
    parser.add_argument("--generate", type=int, default=0, help="so many tokens after the text")
    o = parser.parse_args()

    model, tokenizer = load(o.model)
    readers = [Reader(model, SinkCache(model, o.num_sink_tokens, o.window, o.kv_format, o.policy))]
    if o.compare:
        readers.append(Reader(model, SinkCache(model, 0, o.num_sink_tokens + o.window, o.kv_format, "window")))
    print(f"{'tokens':>9}  {o.policy:>8}" + (f"  {'window':>8}" if o.compare else "") + "   bits per token of this block")
    began, seen, last = time.monotonic(), 0, None
    with torch.no_grad(), open(o.text) if o.text else sys.stdin as file:
        for block in blocks(tokens_of(file, tokenizer), o.block):
            if o.tokens is not None:
                block = block[:, :o.tokens - seen]
            losses = [reader.read(block) for reader in readers]
            seen, last = seen + block.shape[1], block
            print(f"{seen:9,}" + "".join(f"  {loss:8.3f}" for loss in losses), flush=True)
            if seen == o.tokens:
                break
    if readers[0].number == 0:
        sys.exit("the text had to be of two tokens or more")
    means = [reader.bits / reader.number for reader in readers]
    print("perplexity " + ", ".join(f"{2 ** m:.2f}" for m in means)
          + f"; {seen / (time.monotonic() - began):.0f} tokens/s; the cache takes {readers[0].cache.nbytes():,} bytes")
    if o.generate:
        cache = readers[0].cache
        cache.crop(-1)  # generate wants the last token itself
        ids = torch.cat([torch.zeros(1, cache.get_seq_length(), dtype=torch.long), last[:, -1:]], 1)
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=o.generate,
                       do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))


if __name__ == "__main__":
    main()
