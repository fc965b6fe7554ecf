#!/usr/bin/env python3
"""Runs the programs of a hooked llama.cpp: llama_cpp_programs.py PROGRAMS STREAM MODELS TEXT

PROGRAMS is the folder of llama-completion, llama-cli, llama-perplexity and llama-server, STREAM what stream.cpp was
compiled to, MODELS what llama_cpp_models.py wrote.
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request

if len(sys.argv) != 5:
    sys.exit(__doc__)
PROGRAMS, STREAM, MODELS, TEXT = (pathlib.Path(each).resolve() for each in sys.argv[1:])
SMOLLM2 = MODELS / "smollm2-f32.gguf"
SHORT = MODELS / "text.txt"  # llama-perplexity reads all of a file
SHORT.write_text(TEXT.read_text(encoding="utf-8")[:24000], encoding="utf-8")
PROMPT = "The history of Rome begins with"
failures = 0


def check(right, what, *seen):
    global failures
    print(f"{what}: {'right' if right else 'WRONG'}", *([] if right else seen), flush=True)
    failures += not right


def environment(variables):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SINKCACHE_")}
    return {**plain, **{f"SINKCACHE_{name}": str(value) for name, value in variables.items()}}


def run(program, *arguments, **variables):
    """Of a program with options and SINKCACHE_ variables: its status, what it printed, and its log."""
    done = subprocess.run([str(PROGRAMS / program), *map(str, arguments)], env=environment(variables),
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def complete(*options, n=40, **variables):
    return run("llama-completion", "-m", SMOLLM2, "-p", PROMPT, "-n", n, "-c", 4096, "-t", 1, "-no-cnv", "--temp", 0,
               "--ignore-eos", "--no-warmup", *(() if "-fa" in options else ("-fa", "off")), *options, **variables)


def chat(*options, **variables):
    status, out, log = run("llama-cli", "-m", SMOLLM2, "-p", PROMPT, "-n", 120, "-c", 4096, "-t", 1, "--single-turn",
                           "--temp", 0, "--ignore-eos", "-fa", "off", "-ctk", "f32", "-ctv", "f32", *options, **variables)
    return status, re.sub(r"\[ Prompt: .*\]", "", out[out.find(PROMPT):]), log


def peak(length, n):
    """MiB that llama-completion needs at most."""
    started = subprocess.Popen([str(PROGRAMS / "llama-completion"), "-m", str(SMOLLM2), "-p", PROMPT, "-n", str(n), "-c",
                                str(length), "-t", "1", "-no-cnv", "--ignore-eos", "--no-warmup", "--sink-window", "60"],
                               env=environment({}), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    _, started.returncode, used = os.wait4(started.pid, 0)
    return used.ru_maxrss // 1024


def refusals():
    for options, variables, words in (
        (("--sink-window", "abc"), {}, """argument "--sink-window": was 'abc', had to be a number"""),
        (("--sink-window", "-1"), {}, """argument "--sink-window": was '-1', had to be a number"""),
        (("--sink-window", "1e3"), {}, """argument "--sink-window": was '1e3', had to be a number"""),
        (("--sink-window", "99999999999999999999"), {}, """argument "--sink-window": was '99999999999999999999'"""),
        (("--sink-window", "60", "--sink-tokens", "x"), {}, """argument "--sink-tokens": was 'x', had to be a number"""),
        (("--sink-window", "0"), {}, "window was 0, had to be at least 1"),
        (("--sink-window", "60", "--sink-policy", "oldest"), {}, "the policy was 'oldest', had to be one of: sinks"),
        (("--sink-window", "60", "--sink-policy", "snapkv:kernel=4,interval=16"), {}, "kernel was 4, had to be"),
        (("--sink-tokens", "4"), {}, "SINKCACHE_SINK_TOKENS was set without SINKCACHE_WINDOW (--sink-window)"),
        (("--sink-policy", "sinks"), {}, "SINKCACHE_POLICY was set without SINKCACHE_WINDOW (--sink-window)"),
        ((), {"WINDOW": "abc"}, """variable "SINKCACHE_WINDOW": was 'abc', had to be a number"""),
        ((), {"WINDOW": 60, "SINK_TOKENS": -4}, """variable "SINKCACHE_SINK_TOKENS": was '-4', had to be a number"""),
        ((), {"WINDOW": 60, "ROLLBACK": "x"}, "SINKCACHE_ROLLBACK was 'x', had to be a number, at least 0"),
        ((), {"WINDOW": 60, "POSITIONS": "x"}, "SINKCACHE_POSITIONS was 'x', had to be in_cache or absolute"),
        ((), {"WINDOW": 60, "FORMAT": "q5_1"}, "format of keys was 'q5_1', had to be f32, f16"),
        ((), {"WINDOW": 60, "CELLS": 1}, "SINKCACHE_WINDOW and SINKCACHE_CELLS were both set"),
        (("--sink-window", "60", "-ctk", "q5_1", "-fa", "on"), {}, "format of keys was 'q5_1', had to be f32, f16"),
    ):
        status, _, log = complete(*options, **variables)
        check(status > 0 and words in log, f"refused: {' '.join(options)} {variables or ''}", status, log[-600:])


def completions():
    status, plain, log = complete(n=60)
    check(status == 0 and "sinkcache" not in log, "completion: no option, no change", status, log[-600:])
    _, whole, _ = complete("--sink-window", 400, "--sink-tokens", 0, "-ctk", "f32", "-ctv", "f32", n=60)
    check(whole == plain, "completion: a window that holds all gives llama.cpp's own text", plain, whole)
    status, by_option, log = complete("--sink-window", 60, "--sink-tokens", 3, "-lv", 4, n=200)
    check(status == 0 and "sinkcache: 3 + 60 tokens, policy sinks, f16 and f16" in log, "completion: options arrive",
          status, log[-600:])
    _, by_variable, _ = complete("-lv", 4, n=200, WINDOW=60, SINK_TOKENS=3)
    check(by_option == by_variable and len(by_option) > 400, "completion: variables give the same text", by_option,
          by_variable)
    _, both, log = complete("--sink-window", 60, "-lv", 4, n=200, WINDOW=16, SINK_TOKENS=3)
    check(both == by_option and "3 + 60 tokens" in log, "completion: an option overrides a variable", both, log[-600:])
    status, text, log = complete("--sink-window", 60, "--sink-policy", "snapkv:kernel=5,interval=16", "-lv", 4, n=100)
    check(status == 0 and "policy snapkv:kernel=5,interval=16" in log and len(text) > 200, "completion: a policy",
          status, log[-600:])
    status, text, log = complete("--sink-window", 60, "-ctk", "q8_0", "-ctv", "q4_0", "-fa", "on", "-lv", 4, n=100)
    check(status == 0 and "q8 and q4, positions" in log and len(text) > 200, "completion: formats of few bits", status,
          log[-600:])
    status, shifted, log = complete("--sink-window", 60, "--sink-tokens", 3, "--context-shift", n=200)
    check(status == 0 and shifted == by_option and "shifting is not supported" in log,
          "completion: context shift is turned off", status, log[-600:])
    _, _, log = complete("--sink-window", 60, "--grp-attn-n", 2, "--grp-attn-w", 32, n=60)
    check("sequence 0: its positions were divided, which this memory does not do" in log,
          "completion: self-extend is refused", log[-600:])
    status, plain, log = chat()
    check(status == 0 and len(plain) > 300, "cli: no option", status, plain, log[-600:])
    check(chat("--sink-window", 400, "--sink-tokens", 0)[1] == plain, "cli: a window that holds all gives the same text")
    by_option = chat("--sink-window", 60, "--sink-tokens", 3)
    check(by_option[1] == chat(WINDOW=60, SINK_TOKENS=3)[1] != plain, "cli: variables give the same text as options",
          *by_option)
    status, _, log = chat("--sink-window", "abc")
    check(status > 0 and """argument "--sink-window": was 'abc'""" in log, "cli: what is no number is refused", status, log)
    short, long, longer = peak(4096, 100), peak(1000000, 100), peak(1000000, 600)
    check(max(long, longer) < short + 24, "completion: the memory of a million tokens is that of 4,096", short, long,
          longer)
    saved = MODELS / "saved"
    saved.unlink(missing_ok=True)
    _, _, log = complete("--sink-window", 60, "--prompt-cache", saved, n=4)
    check("sinkcache: caches cannot be saved" in log, "completion: a prompt cache is refused", log[-600:])


def perplexities():
    def program(model, *options, chunk=16, texts=1, **variables):
        status, out, log = run("llama-perplexity", "-m", MODELS / f"{model}.gguf", "-f", SHORT, "-c", 512, "-b", chunk,
                               "-ub", chunk, "-t", 1, "--chunks", texts, "--no-warmup", "-fa", "off", "-ctk", "f32",
                               "-ctv", "f32", *options, **variables)
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", out + log)
        if status != 0 or found is None:
            check(False, f"perplexity: {model} {options} {variables} chunks of {chunk}", status, log[-600:])
        return float(found[1]) if found else float("nan")

    def near(a, b, most, what):
        check(abs(a / b - 1) <= most, f"perplexity: {what}, {a:.4f} and {b:.4f}")

    window = ("--sink-window", 60, "--sink-tokens", 4)
    by_option = program("smollm2-f32", *window)
    check(by_option == program("smollm2-f32", WINDOW=60, SINK_TOKENS=4), "perplexity: variables give the same")
    out = subprocess.run([str(STREAM), "perplexity", str(SMOLLM2), str(SHORT), "--tokens", "512", "--from", "256",
                          "--cached", "64", "--type", "f32"], capture_output=True, text=True, timeout=600).stdout
    near(by_option, float(re.search(r"perplexity ([0-9.]+)", out)[1]), 1e-5, "stream.cpp gives the same")
    for chunk in 1, 512:
        near(program("smollm2-f32", *window, chunk=chunk), by_option, 1e-4, f"chunks of {chunk} and of 16")
    near(program("smollm2-f32", *window, chunk=1024, texts=2), program("smollm2-f32", *window, texts=2), 1e-4,
         "two sequences side by side and one after the other")
    for model in "smollm2-f32", "gemma3", "gpt-oss":
        for chunk in 1, 16, 512:
            near(program(model, "--sink-window", 512, chunk=chunk), program(model, chunk=chunk), 1e-4,
                 f"chunks of {chunk}, {model} in a window that holds all, and in llama.cpp's own cache")
    tasks = MODELS / "tasks.txt"
    tasks.write_text("Cooking: A man takes an egg. He\n0\nbreaks it.\neats the moon.\nsells it to itself.\nis an egg.\n")
    _, _, log = run("llama-perplexity", "-m", SMOLLM2, "-f", tasks, "--hellaswag", "-c", 1024, "-t", 1, *window)
    check("sinkcache: a token was of 4 sequences, had to be of one" in log, "perplexity: shared beginnings are refused",
          log[-600:])
    other = program("smollm2-f32", "--sink-window", 60, "--sink-policy", "snapkv:kernel=5,interval=16")
    check(other != by_option, "perplexity: another policy gives another")


class server:
    """llama-server with a model and options, for as long as the block takes."""

    def __init__(self, *options, model=SMOLLM2, **variables):
        with socket.socket() as any_port:
            any_port.bind(("127.0.0.1", 0))
            self.port = any_port.getsockname()[1]
        self.environment = environment(variables)
        self.arguments = [str(PROGRAMS / "llama-server"), "-m", str(model), "--port", str(self.port), "-t", "1", "-c",
                          "4096", "--no-warmup", "-fa", "off", *map(str, options)]

    def __enter__(self):
        self.log = open(MODELS / "server.log", "w", encoding="utf-8")
        self.process = subprocess.Popen(self.arguments, env=self.environment, stdin=subprocess.DEVNULL, stdout=self.log,
                                        stderr=self.log)
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).read()
                return self
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError("llama-server did not start: " + (MODELS / "server.log").read_text(errors="replace")[-900:])

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)
        self.log.close()

    def post(self, prompt, n=60, **more):
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, **more}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/completion", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request, timeout=300).read())

    def ask(self, prompt, **more):
        answer = self.post(prompt, **more)
        return [each["content"] for each in answer] if isinstance(answer, list) else answer["content"]


def servers():
    words = TEXT.read_text(encoding="utf-8").split()
    # Longer than the window; the second shares no beginning with the first, the third half of it.
    prompts = [" ".join(words[:120]), " ".join(words[400:500]), " ".join(words[:60] + words[700:760])]
    long = " ".join(words[:300])
    window = ("--sink-window", 60, "--sink-tokens", 4)

    def together(at, asked, **more):
        texts = [None] * len(asked)

        def one(i):
            texts[i] = at.ask(asked[i], id_slot=i, **more)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(asked))]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return texts

    with server(*window, "-np", 2) as two:
        alone = [two.ask(each, id_slot=0, cache_prompt=False) for each in prompts]
        check(len(set(alone)) == 3 and all(len(each) > 100 for each in alone), "server: three texts", alone)
        check(together(two, prompts[:2], cache_prompt=False) == alone[:2], "server: two at once get the text of each alone")
        check(together(two, prompts[1:]) == alone[1:], "server: and in slots that held others, of which some is shared")
        check([two.ask(each, id_slot=1) for each in prompts] == alone, "server: one slot, one after the other")
        further = prompts[0] + two.ask(prompts[0], id_slot=0)
        check(two.ask(further, id_slot=0) == two.ask(further, id_slot=1, cache_prompt=False),
              "server: a text goes on where its slot has it")
        plain = two.ask(long, n=100, id_slot=0)
        check(two.ask(prompts[1], n_cmpl=2) == [alone[1]] * 2, "server: two texts from one prompt, by seq_cp")
    with server(*window) as default:
        check([default.ask(each) for each in (*prompts, prompts[0])] == [*alone, alone[0]], "server: slots as they come")
    with server(*window, "-np", 1, "--cache-ram", 100) as saving:
        check([saving.ask(prompts[i]) for i in (0, 1, 0)] == [alone[i] for i in (0, 1, 0)],
              "server: what it would save it computes again")
    # Drafts of 64 tokens, the most that llama.cpp drafts by default. With this text it takes back all of one.
    with server(*window, "-np", 2, "--spec-type", "ngram-mod", "--spec-ngram-mod-n-match", 1, "--spec-ngram-mod-n-min",
                1) as drafting:
        answer = drafting.post(long, n=100, id_slot=0)
        drafted, kept = answer["timings"].get("draft_n", 0), answer["timings"].get("draft_n_accepted", 0)
        check(answer["content"] == plain and drafted - kept > 500, "server: drafts change nothing", plain, answer)
    with server("--sink-window", 600, "-np", 2, model=MODELS / "gemma3.gguf") as windows:
        alone = [windows.ask(each, id_slot=0, cache_prompt=False) for each in prompts]
        check(together(windows, prompts[:2]) == alone[:2], "server: a model with windows, two at once")
        check([windows.ask(each, id_slot=0) for each in (prompts[2], prompts[0])] == [alone[2], alone[0]],
              "server: and one after the other")
    # What can be taken back is less than the model's window.
    for options, model in ((), "gemma3"), (("--swa-full",), "gemma3"), ((), "smollm2-f32"):
        with server("--sink-window", 60, *options, "-np", 1, model=MODELS / f"{model}.gguf", ROLLBACK=20) as one:
            tokens = list(range(1000, 1200))
            tokens += one.post(tokens, return_tokens=True)["tokens"] + [77, 78]
            times = one.post(tokens, n=1)["timings"]
            check(times["prompt_n"] < 9 and times["cache_n"] > 250,
                  f"server: {model} {options} goes on, and computes what is new", times)
            times = one.post(tokens[:150], n=1)["timings"]
            check(times["cache_n"] == 0, f"server: {model} {options} begins again where that was evicted", times)


refusals()
completions()
perplexities()
servers()
sys.exit(f"{failures} of llama.cpp's programs did what they should not" if failures else 0)
