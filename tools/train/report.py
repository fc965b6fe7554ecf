#!/usr/bin/env python3
"""Prints tables in Markdown of what evaluate.py measured: README.md."""

import argparse
import pathlib
import statistics
import sys

from files import ATTENTIONS, RUNS, existing, read_json, write_atomically

# Student's t for a 95% interval, by the number of values.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
BEGIN, END = "<!-- report.py -->\n", "<!-- end -->\n"
MEASURES = {
    "held out": lambda r: r["heldout_bits"],
    "window": lambda r: r["stream_bits"]["window"],
    "1 pinned": lambda r: r["stream_bits"]["sinks:1"],
    "4 pinned": lambda r: r["stream_bits"]["sinks:4"],
    "window - 1 pinned": lambda r: r["stream_bits"]["window"] - r["stream_bits"]["sinks:1"],
    "sink rate": lambda r: r["sink_rate"],
}


def number(value, digits=3):
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero


def interval(values):
    mean = number(statistics.fmean(values))
    if len(values) < 2:
        return mean
    if len(values) not in STUDENT:
        raise ValueError(f"there are {len(values)} seeds, had to be at most {max(STUDENT)}")
    return f"{mean} ± {number(STUDENT[len(values)] * statistics.stdev(values) / len(values)**0.5)}"


def extent(values, digits=3):
    least, most = number(min(values), digits), number(max(values), digits)
    return least if least == most else f"{least} to {most}"


def table(head, rows):
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def by_layer(results, key, of_heads):
    """From the least to the most of the results, layer by layer."""
    return [extent([of_heads(heads) for heads in layer]) for layer in zip(*(r[key] for r in results))]


def same(items, keys):
    """The first, where all agree."""
    for item in items:
        for key in keys:
            if item[key] != items[0][key]:
                raise ValueError(f"{item['name']} has {key} {item[key]}, {items[0]['name']} {items[0][key]}: "
                                 "they cannot stand side by side")
    return items[0]


def how_trained(runs):
    settings = [{"name": r["name"], **r["args"]} for r in runs]
    s, dates = same(settings, settings[0].keys() - {"name", "attention", "seed"}), sorted({r["date"] for r in runs})
    first = same(runs, ("tokens", "torch", "machine", "threads", "corpus_sha256"))
    return (f"{len(runs)} models. {s['steps']:,} steps of {s['batch']} contexts of {s['context']}, {first['tokens']:,} "
            f"tokens each; learning rate {s['lr']}, falling in the last {s['decay']:.0%} of the steps; weight decay "
            f"{s['weight_decay']}. PyTorch {first['torch']}, {first['threads']} thread each on a shared "
            f"{first['machine']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; "
            f"{extent([r['minutes'] for r in runs], 0)} minutes each, of which it had the processor for "
            f"{extent([r['cpu_minutes'] for r in runs], 0)}.\n")


def twins(trained, seed_of):
    """Differences to softmax of the same seed."""
    plain = {seed_of(r): r for r in trained.get("softmax", [])}
    for attention, results in trained.items():
        pairs = [(r, plain[seed_of(r)]) for r in results if seed_of(r) in plain]
        if attention != "softmax" and pairs:
            yield [f"{attention} - softmax", str(len(pairs)),
                   *(interval([of(a) - of(b) for a, b in pairs]) for of in MEASURES.values())]


def along_the_training(trained, runs):
    steps = [entry["step"] for entry in next(iter(runs.values()))["log"]]
    shown = sorted({steps[0], steps[-1], *(s for i, s in enumerate(steps, 1) if i in (2, 4) or i % 8 == 0)})
    at = {name: {entry["step"]: entry["first_token_mass"][0] for entry in run["log"]} for name, run in runs.items()}
    return table(["", *(f"{s:,}" for s in shown)],
                 [[attention, *(extent([at[r["name"]][s] for r in results], 2) for s in shown)]
                  for attention, results in trained.items()])


def report(folder):
    results = [read_json(path) for path in sorted(folder.glob("*.eval.json"))]
    if not results:
        raise ValueError(f"{folder} has no *.eval.json: evaluate.py writes them")
    first = same(results, ("context", "heldout_contexts", "stream_tokens", "stream_cache", "first_query"))
    paths = {r["name"]: folder / f"{r['name']}.json" for r in results}
    runs = {name: read_json(path) for name, path in paths.items() if path.exists()}
    trained = {}
    for attention in ATTENTIONS:
        if group := [r for r in results if r["name"] in runs and r["attention"] == attention]:
            trained[attention] = group
    others = [r for r in results if r["name"] not in runs]
    groups = [*trained.items(), *((r["name"], [r]) for r in others)]
    parts = []
    if runs:
        parts = [how_trained(list(runs.values())),
                 f"Bits per byte: held out, over {first['heldout_contexts']} contexts of {first['context']}; the "
                 f"others after the first eviction of {first['stream_tokens']:,} bytes through a cache of "
                 f"{first['stream_cache']}. Mean over the seeds, and 95% interval by Student's t:\n",
                 table(["softmax", "seeds", *MEASURES],
                       [[a, str(len(group)), *(interval([of(r) for r in group]) for of in MEASURES.values())]
                        for a, group in trained.items()])]
        pairs = list(twins(trained, lambda r: runs[r["name"]]["args"]["seed"]))
        if pairs:
            parts += ["Differences between twins, which share seed, initial weights and batches:\n",
                      table(["", "seeds", *MEASURES], pairs)]
    parts += ["Model by model, others measured in the same way at the end:\n" if runs else "Model by model:\n",
              table(["model", *MEASURES], [[r["name"], *(number(of(r)) for of in MEASURES.values())]
                                           for _, group in groups for r in group])]
    queries = f"by queries {first['first_query']} to {first['context'] - 1}, from the least to the most of the seeds"

    def layers(title, key, of_heads, groups):
        return [title + "\n", table(["", *(f"layer {i}" for i in range(len(groups[0][1][0][key])))],
                                    [[name, *by_layer(group, key, of_heads)] for name, group in groups])]

    parts += layers(f"Mean attention to the first token, {queries}:", "first_token_mass", statistics.fmean, groups)
    parts += layers("The same of the one head of the layer that has most:", "first_token_mass", max, groups)
    spared = [(name, group) for name, group in groups if group[0]["attention"] != "softmax"]
    if spared:
        parts += layers(f"Mean attention to no token, {queries}:", "no_token_mass", statistics.fmean, spared)
    parts += ["What the first token gives to layer 0: the norm of its value by the others' mean, and the held-out loss "
              "where that value is zero and attention as it was, from the least to the most of the seeds:\n",
              table(["", "norm", "held out", "held out, value zeroed"],
                    [[name, *(extent([r[key] for r in group])
                              for key in ("first_value_norm", "torch_heldout_bits", "first_value_zeroed_bits"))]
                     for name, group in groups])]
    if runs:
        parts += ["Mean attention to the first token in layer 0 along the training, by step, from the least to the "
                  "most of the seeds:\n", along_the_training(trained, runs)]
    most = max(r["largest_difference_of_a_context"] for r in results)
    most_512 = max(abs(r["engine_512_bits"] - r["torch_512_bits"]) for r in results)
    parts += [f"The engine against PyTorch, on the same bf16 weights in float32: bits per byte of a context of "
              f"{first['context']} differ by at most {most:.1e}, of one of 512 by at most {most_512:.1e}.\n"]
    return "\n".join(parts)


def write_into(page, text):
    old = page.read_text()
    if BEGIN not in old or END not in old[old.index(BEGIN):]:
        raise ValueError(f"{page} had to have the lines {BEGIN.strip()} and {END.strip()}")
    new = old[:old.index(BEGIN)] + BEGIN + text + old[old.index(END):]
    write_atomically(page, lambda to: pathlib.Path(to).write_text(new))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runs", type=existing, default=RUNS, help="the folder of results")
    parser.add_argument("--into", type=existing, default=argparse.SUPPRESS,
                        help=f"a page that gets them between {BEGIN.strip()} and {END.strip()}")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        args = parse_arguments()
        if "into" in args:
            write_into(args.into, report(args.runs))
        else:
            print(report(args.runs))
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
