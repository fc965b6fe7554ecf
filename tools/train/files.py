"""What all four scripts need: files that are complete or not there, arguments that are checked, names."""

import argparse
import json
import os
import pathlib
import platform

ROOT = pathlib.Path(__file__).resolve().parents[2]
HELDOUT = ROOT / "examples/data/sotu-heldout.txt"
RUNS = ROOT / "build/train"
ATTENTIONS = ("softmax", "softmax1", "sink")


def write_atomically(path, write):
    """`write` gets the path of a file that replaces `path` once it is complete."""
    to = f"{path}.part"
    try:
        write(to)
        os.replace(to, path)
    finally:
        if os.path.exists(to):
            os.remove(to)


def write_json(path, value):
    write_atomically(path, lambda to: pathlib.Path(to).write_text(json.dumps(value, indent=1) + "\n"))


def read_json(path):
    return json.loads(pathlib.Path(path).read_text())


def existing(text):
    path = pathlib.Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{path} does not exist")
    return path


def whole(least):
    def parse(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"is '{text}', had to be a whole number of {least} or more")
        return int(text)
    return parse


def from_to(least, most):
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"is '{text}', had to be a number from {least:g} to {most:g}")
        return value
    return parse


def machine():
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
