#!/usr/bin/env python3
"""Trains one small byte-level model with softmax, softmax1 or sink logits, by next-token loss alone: README.md."""

import argparse
import hashlib
import math
import pathlib
import statistics
import sys
import time

from files import (ATTENTIONS, HELDOUT, RUNS, existing, from_to, machine, read_json, whole, write_atomically,
                   write_json)
from model import WARM, Decoder, bits_per_byte, export, heldout_contexts, loss_of, nn, numpy, torch, with_bos


class Corpus:
    """The texts of a folder without what its splits.json holds out of each."""

    def __init__(self, folder, context):
        self.context, self.pieces, self.sha256 = context, [], {}
        for name, split in read_json(folder / "splits.json").items():
            path = existing(folder / (name + ".txt"))
            text = numpy.fromfile(path, numpy.uint8)
            if len(text) != split["bytes"]:
                raise ValueError(f"{path} has {len(text)} bytes, had to have splits.json's {split['bytes']}")
            self.sha256[name] = hashlib.sha256(text.tobytes()).hexdigest()
            self.pieces += [text[:split["heldout_begin"]], text[split["heldout_end"]:]]
        self.ends = numpy.cumsum([max(0, len(piece) - context + 1) for piece in self.pieces])
        if self.ends[-1] == 0:
            raise ValueError(f"{folder} has no {context} bytes in a row that are not held out")

    def batch(self, seed, step, size):
        """Random crops, each as likely as any other: a function of seed and step alone."""
        crops = []
        for at in numpy.random.default_rng((seed, step)).integers(self.ends[-1], size=size):
            piece = numpy.searchsorted(self.ends, at, side="right")
            begin = at - (self.ends[piece - 1] if piece else 0)
            crops.append(self.pieces[piece][begin:begin + self.context])
        return with_bos(numpy.stack(crops))


def stable_steps(settings):
    """The learning rate is constant until here, so a longer training can go on as if it had been one from the start."""
    return settings["steps"] - round(settings["decay"] * settings["steps"])


def learning_rate(settings, step):
    warm = (step + 1) / max(1, settings["warmup"])
    left = (settings["steps"] - step) / max(1, settings["steps"] - stable_steps(settings))
    return settings["lr"] * min(1, warm, left)


class Training:
    """What a checkpoint holds: the model, the optimiser, how far they are, and what that took."""

    def __init__(self, settings):
        s = self.settings = settings
        self.model = Decoder({"attention": s["attention"], "num_hidden_layers": s["layers"], "hidden_size": s["hidden"],
                              "num_attention_heads": s["heads"], "num_key_value_heads": s["kv_heads"],
                              "head_dim": s["head_dim"], "intermediate_size": s["intermediate"]}, s["seed"])
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": s["weight_decay"]},
                                            {"params": vectors, "weight_decay": 0}], betas=(0.9, 0.95))
        self.step, self.log, self.minutes, self.cpu_minutes = 0, [], 0, 0
        self.began, self.cpu_began = time.time(), time.process_time()

    def spent(self):
        return {"minutes": self.minutes + (time.time() - self.began) / 60,
                "cpu_minutes": self.cpu_minutes + (time.process_time() - self.cpu_began) / 60}

    def save(self, path):
        state = {"args": self.settings, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "step": self.step, "log": self.log, **self.spent()}
        write_atomically(path, lambda to: torch.save(state, to))

    def load(self, path):
        """Unless the checkpoint is of a learning rate that falls sooner than it is to now."""
        state = torch.load(path, weights_only=True)
        for key, now in self.settings.items():
            if key != "steps" and state["args"][key] != now:
                raise ValueError(f"{path} is of a training with {key} {state['args'][key]}, had to be {now}; "
                                 "--runs can be another folder")
        stable = min(stable_steps(state["args"]), stable_steps(self.settings))
        if state["args"]["steps"] != self.settings["steps"] and state["step"] > stable:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log = state["step"], state["log"]
        self.minutes, self.cpu_minutes = state["minutes"], state["cpu_minutes"]
        return True

    def do_step(self, ids, targets):
        """The loss before it, in bits per byte."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        loss = loss_of(self.model, ids, targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item() / math.log(2)

    def note(self, train_bits, heldout):
        """Adds to the log how the model does now, on `heldout`, and where it looks."""
        attention = []
        bits = bits_per_byte(self.model, heldout, attention)
        self.log.append({"step": self.step, "train_bits": train_bits, "heldout_bits": bits,
                         "first_token_mass": [first[..., WARM:].mean().item() for first, _ in attention]})
        return self.log[-1]


def train(args):
    name = f"{args.attention}-s{args.seed}"
    latest, stable = args.runs / f"{name}.pt", args.runs / f"{name}.stable.pt"
    settings = {key: value for key, value in vars(args).items() if key not in MACHINERY}
    corpus, heldout = Corpus(args.corpus, args.context), heldout_contexts(args.heldout, 32, args.context)
    torch.set_num_threads(args.threads)
    args.runs.mkdir(parents=True, exist_ok=True)
    training = Training(settings)
    any(path.exists() and training.load(path) for path in (latest, stable))

    first_step, recent = training.step, []
    while training.step < args.steps:
        if training.step == stable_steps(settings):
            training.save(stable)
        recent.append(training.do_step(*corpus.batch(args.seed, training.step, args.batch)))
        step = training.step
        if not math.isfinite(recent[-1]):
            raise ValueError(f"{name}: the loss is {recent[-1]} at step {step}; a smaller --lr may help")
        if step % args.report_every == 0 or step == args.steps:
            now = training.note(statistics.fmean(recent), heldout)
            recent.clear()
            left = (time.time() - training.began) / (step - first_step) * (args.steps - step) / 60
            print(f"{name}: step {step}/{args.steps}, {now['train_bits']:.3f} bits per byte, held out "
                  f"{now['heldout_bits']:.3f}, attention to the first token "
                  f"{' '.join(f'{m:.3f}' for m in now['first_token_mass'])}, {left:.1f} minutes left", flush=True)
        if step % args.checkpoint_every == 0 or step == args.steps:
            training.save(latest)

    export(training.model, settings, args.runs / f"{name}.safetensors")
    write_json(args.runs / f"{name}.json", {
        "name": name, "args": settings, "parameters": sum(p.numel() for p in training.model.parameters()),
        "tokens": args.steps * args.batch * args.context, **training.spent(), "torch": torch.__version__,
        "threads": args.threads, "machine": machine(), "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "corpus_sha256": corpus.sha256, "log": training.log})


# Arguments that do not change what is trained.
MACHINERY = ("corpus", "heldout", "runs", "threads", "checkpoint_every", "report_every")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, count = parser.add_argument, whole(1)
    required = {"required": True, "default": argparse.SUPPRESS}
    add("--corpus", type=existing, **required, help="a folder with the texts and their splits.json")
    add("--attention", choices=ATTENTIONS, **required, help="what the softmax's denominator has beside the keys")
    add("--seed", type=whole(0), default=0, help="of the initial weights and of the batches")
    add("--steps", type=count, default=1000, help="in all")
    add("--batch", type=count, default=8, help="contexts a step")
    add("--context", type=whole(WARM + 1), default=256, help="tokens, BOS included")
    add("--lr", type=from_to(1e-9, 1), default=4e-3, help="AdamW's learning rate where it is constant")
    add("--warmup", type=whole(0), default=100, help="steps, the first, in which it rises")
    add("--decay", type=from_to(0, 1), default=0.25, help="share of the steps, the last, in which it falls to 0")
    add("--weight-decay", type=from_to(0, 10), default=0.1, help="of matrices")
    add("--layers", type=count, default=4, help="of the decoder")
    add("--hidden", type=count, default=128, help="width")
    add("--heads", type=count, default=4, help="query heads")
    add("--kv-heads", type=count, default=2, help="key and value heads")
    add("--head-dim", type=count, default=32, help="width of each")
    add("--intermediate", type=count, default=352, help="width of the MLP")
    add("--heldout", type=existing, default=HELDOUT, help="a text that is not trained on")
    add("--runs", type=pathlib.Path, default=RUNS, help="the folder of checkpoints, models and results")
    add("--threads", type=count, default=1, help="for PyTorch")
    add("--checkpoint-every", type=count, default=50, help="steps")
    add("--report-every", type=count, default=100, help="steps")
    args = parser.parse_args()
    if args.heads % args.kv_heads:
        parser.error(f"--heads is {args.heads}, had to be a multiple of --kv-heads, {args.kv_heads}")
    if args.head_dim % 2:
        parser.error(f"--head-dim is {args.head_dim}, had to be even")
    return args


if __name__ == "__main__":
    try:
        train(parse_arguments())
    except (OSError, ValueError, argparse.ArgumentTypeError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the same command goes on from the last checkpoint")
