#!/usr/bin/env python3
"""Measures models that are not measured yet, their losses by this repository's engine: README.md."""

import argparse
import hashlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from files import HELDOUT, RUNS, existing, machine, read_json, whole, write_json
from model import WARM, F, bits_per_byte, heldout_contexts, load_exported, torch, with_bos


def run_engine(args, model, text, policies, cache, tokens):
    """Bits per byte by policy, each as in compare_policies --json."""
    with tempfile.TemporaryDirectory() as folder:
        to = os.path.join(folder, "result.json")
        command = [args.compare_policies.resolve(), "--model", model, "--text", text, "--policies", policies,
                   "--cache", cache, "--tokens", tokens, "--threads", 1, "--json", to]
        ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if ran.returncode:
            raise ValueError(f"{' '.join(map(str, command))} failed: {ran.stderr}")
        return {run["policy"]: run["loss_bits"] for run in read_json(to)["runs"]}


def engine_bits(args, model, contexts):
    """Bits per byte of each context, read from its BOS on."""
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        piece = os.path.join(folder, "piece.txt")
        for context in contexts:
            context.tofile(piece)
            losses.append(run_engine(args, model, piece, "full", len(context), len(context))["full"]["all"])
    return losses


def torch_bits(model, contexts):
    return [bits_per_byte(model, context[None]) for context in contexts]


def attention_of(model, contexts):
    """(first, none), each [contexts, layers, heads, length]: attention to the first token, and to no token."""
    record = []
    with torch.no_grad():
        model(with_bos(contexts)[0], record)
    return [torch.stack(mass, 1) for mass in zip(*record)]


def sink_rate(first):
    """Gu et al. 2024: the share of heads whose mean attention to the first token is above 0.3, sequence by sequence."""
    return (first.mean(-1) > 0.3).float().mean().item()


def value_of_first(model, contexts):
    """In layer 0: its norm by the others' mean, and the loss where it is zero and attention as it was."""
    values = model.model["layers"][0].self_attn.v_proj
    norms = []
    hook = values.register_forward_hook(lambda _, ids, out: norms.append(out.norm(dim=-1)))
    bits_per_byte(model, contexts)
    hook.remove()
    hook = values.register_forward_hook(lambda _, ids, out: F.pad(out[:, 1:], (0, 0, 1, 0)))
    zeroed = bits_per_byte(model, contexts)
    hook.remove()
    return (norms[0][:, 0].mean() / norms[0][:, 1:].mean()).item(), zeroed


def evaluate(args, path):
    model, metadata = load_exported(path)
    length = int(metadata["max_position_embeddings"])
    contexts, long = heldout_contexts(args.heldout, args.contexts, length), heldout_contexts(args.heldout, 1, 512)
    engine, reference = engine_bits(args, path, contexts), torch_bits(model, contexts)
    stream = run_engine(args, path, args.heldout, "window,sinks:1,sinks:4", args.cache, args.tokens)
    norm, zeroed = value_of_first(model, contexts)
    first64, _ = attention_of(model, heldout_contexts(args.heldout, 100, 64))
    first, none = (mass[..., WARM:] for mass in attention_of(model, heldout_contexts(args.heldout, 100, length)))
    return {
        "name": path.stem,
        "attention": metadata["attention"],
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "context": length,
        "heldout_contexts": len(contexts),
        "heldout_bits": statistics.fmean(engine),
        "torch_heldout_bits": statistics.fmean(reference),
        "largest_difference_of_a_context": max(abs(a - b) for a, b in zip(engine, reference)),
        "engine_512_bits": engine_bits(args, path, long)[0],
        "torch_512_bits": torch_bits(model, long)[0],
        "stream_cache": args.cache,
        "stream_tokens": args.tokens,
        "stream_bits": {policy: loss["after_first_eviction"] for policy, loss in stream.items()},
        "sink_rate": sink_rate(first64),
        "first_value_norm": norm,
        "first_value_zeroed_bits": zeroed,
        "first_query": WARM,
        "first_token_mass": first.mean((0, 3)).tolist(),  # [layers][heads]
        "no_token_mass": none.mean((0, 3)).tolist() if metadata["attention"] != "softmax" else [],
        "sink_logits": [layer.self_attn.sinks.tolist() for layer in model.model["layers"]]
                       if metadata["attention"] == "sink" else [],
        "torch": torch.__version__,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def measured(path, to):
    return to.exists() and read_json(to)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def evaluate_all(args):
    torch.set_num_threads(1)
    models = args.models or sorted(args.runs.glob("*.safetensors"))
    if not models:
        raise ValueError(f"{args.runs} has no *.safetensors, and none was named")
    began, todo = time.time(), [path for path in models if not measured(path, args.runs / f"{path.stem}.eval.json")]
    for done, path in enumerate(todo, 1):
        result = evaluate(args, path)
        write_json(args.runs / f"{path.stem}.eval.json", result)
        left = (time.time() - began) / done * (len(todo) - done) / 60
        print(f"{path.stem}: held out {result['heldout_bits']:.3f}, "
              + ", ".join(f"{policy} {bits:.3f}" for policy, bits in result["stream_bits"].items())
              + f" bits per byte, {left:.1f} minutes left", flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("models", type=existing, nargs="*", default=argparse.SUPPRESS, help="files; without any, all of --runs")
    add("--compare-policies", type=existing, required=True, default=argparse.SUPPRESS, help="the program, built")
    add("--runs", type=existing, default=RUNS, help="the folder of models and results")
    add("--heldout", type=existing, default=HELDOUT, help="a text that was not trained on")
    add("--contexts", type=whole(1), default=256, help="of that text, for the held-out loss")
    add("--cache", type=whole(5), default=128, help="tokens that the cache of the stream holds")
    add("--tokens", type=whole(2), default=65536, help="of the stream")
    args = parser.parse_args()
    args.models = getattr(args, "models", [])
    return args


if __name__ == "__main__":
    try:
        evaluate_all(parse_arguments())
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: {error}")
