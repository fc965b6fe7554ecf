#!/usr/bin/env python3
"""This library beside ggml, PyTorch and ONNX Runtime, as a table in Markdown: README.md."""

import argparse
import ctypes
import datetime
import os
import platform
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HEADS = {"A": (32, 8, 128), "B": (64, 8, 64), "C": (9, 3, 64)}  # measure.hpp's shapes


def say(text):
    print(text, file=sys.stderr, flush=True)


def build(args):
    """The library of all peers but ONNX Runtime, for this machine or for any x86-64."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # PyTorch's
    folder = os.path.join(ROOT, "build", "peers-" + args.isa)
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DSINKCACHE_BUILD_PEERS=ON", "-DSINKCACHE_BUILD_TESTS=OFF",
                 "-DSINKCACHE_BUILD_EXAMPLES=OFF", "-DGGML_LLAMAFILE=ON",
                 "-DSINKCACHE_NATIVE=" + ("ON" if args.isa == "native" else "OFF")]
    if args.ggml:
        configure.append("-DGGML_DIR=" + os.path.abspath(args.ggml))
    if args.isa != "native":
        configure += ["-DGGML_%s=OFF" % name for name in ("NATIVE", "SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")]
    log = os.path.join(folder, "build.log")
    os.makedirs(folder, exist_ok=True)
    say("building in %s, log in build.log" % folder)
    with open(log, "w") as out:
        for command in configure, ["cmake", "--build", folder, "--target", "sinkcache_peers", "-j", str(args.jobs)]:
            if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode:
                sys.exit("failed: %s\n%s" % (" ".join(command), open(log).read()[-4000:]))
    for line in open(log):
        if ": skipped, " in line:
            say(line.strip().removeprefix("-- "))
    library = ctypes.CDLL(os.path.join(folder, "benchmarks", "peers", "libsinkcache_peers.so"))
    library.peers.restype = ctypes.c_char_p
    if b"PyTorch" in library.peers() and not any("openblas" in line for line in open("/proc/self/maps")):
        say("PyTorch: Debian's own BLAS makes it ten times slower: apt-get install libopenblas0-pthread")
    floats, layer = ctypes.POINTER(ctypes.c_float), ctypes.c_void_p
    for name, result, arguments in (
            ("layer_new", layer, [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_long]),
            ("layer_free", None, [layer]),
            ("layer_size", ctypes.c_long, [layer]),
            ("layer_name", ctypes.c_char_p, [layer, ctypes.c_long]),
            ("layer_run", ctypes.c_double, [layer, ctypes.c_long]),
            ("layer_error", ctypes.c_double, [layer, ctypes.c_long]),
            ("layer_data", floats, [layer, ctypes.c_char]),
            ("layer_error_of", ctypes.c_double, [layer, floats]),
            ("layer_fma", ctypes.c_double, [layer]),
            ("layer_read", ctypes.c_double, [layer])):
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    return library


class OnnxRuntime:
    """GroupQueryAttention in float32, on one thread. Past and present are the same memory, so no cache is copied."""

    name = "ONNX Runtime GQA"

    def __init__(self):
        import numpy
        import onnx
        import onnxruntime
        self.numpy, self.onnx, self.runtime = numpy, onnx, onnxruntime
        self.version = onnxruntime.__version__

    def session(self, heads, kv_heads):
        helper, types = self.onnx.helper, self.onnx.TensorProto
        shapes = {"query": (types.FLOAT, [1, "s", "q"]), "key": (types.FLOAT, [1, "s", "k"]),
                  "value": (types.FLOAT, [1, "s", "k"]), "past_key": (types.FLOAT, [1, kv_heads, "t", "d"]),
                  "past_value": (types.FLOAT, [1, kv_heads, "t", "d"]), "seqlens_k": (types.INT32, [1]),
                  "total": (types.INT32, [])}
        results = {"out": [1, "s", "q"], "present_key": [1, kv_heads, "t", "d"], "present_value": [1, kv_heads, "t", "d"]}
        node = helper.make_node("GroupQueryAttention", list(shapes), list(results), domain="com.microsoft",
                                num_heads=heads, kv_num_heads=kv_heads)
        graph = helper.make_graph(
            [node], "gqa", [helper.make_tensor_value_info(name, *what) for name, what in shapes.items()],
            [helper.make_tensor_value_info(name, types.FLOAT, shape) for name, shape in results.items()])
        model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17),
                                                                      helper.make_opsetid("com.microsoft", 1)])
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return self.runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def bind(self, q, k, v, tokens, heads, kv_heads):
        """q [tokens, heads * dim], k and v [visible, kv_heads * dim]; the newest `tokens` of them are given anew."""
        numpy = self.numpy
        visible, dim = k.shape[0], k.shape[1] // kv_heads
        value = lambda array: self.runtime.OrtValue.ortvalue_from_numpy(numpy.ascontiguousarray(array))
        by_head = lambda rows: rows.reshape(1, visible, kv_heads, dim).transpose(0, 2, 1, 3)
        self.out = value(numpy.zeros((1, tokens, heads * dim), numpy.float32))
        values = {"query": value(q[None]), "key": value(k[None, -tokens:]), "value": value(v[None, -tokens:]),
                  "past_key": value(by_head(k)), "past_value": value(by_head(v)),
                  "seqlens_k": value(numpy.array([visible - 1], numpy.int32)),
                  "total": value(numpy.array(visible, numpy.int32))}
        session = self.session(heads, kv_heads)
        binding = session.io_binding()
        for name, of in values.items():
            binding.bind_ortvalue_input(name, of)
        for name, of in ("out", self.out), ("present_key", values["past_key"]), ("present_value", values["past_value"]):
            binding.bind_ortvalue_output(name, of)

        def run():
            began = time.thread_time()
            session.run_with_iobinding(binding)
            return time.thread_time() - began
        return run

    def call_of_nothing(self):
        """One head of 8 and one token: what Python and a session cost."""
        zeros = self.numpy.zeros((1, 8), self.numpy.float32)
        run = self.bind(zeros, zeros, zeros, 1, 1, 1)
        times = sorted(run() for _ in range(1001))
        return times[500]

    def contender(self, library, layer, shape, visible, tokens):
        heads, kv_heads, dim = HEADS[shape]
        data = lambda which, rows, cols: self.numpy.ctypeslib.as_array(library.layer_data(layer, which), (rows, cols))
        run = self.bind(data(b"q", tokens, heads * dim), data(b"k", visible, kv_heads * dim),
                        data(b"v", visible, kv_heads * dim), tokens, heads, kv_heads)
        nothing = self.call_of_nothing_seconds
        out = self.out

        def error():
            newest = self.numpy.ascontiguousarray(out.numpy()[0, -1])
            return library.layer_error_of(layer, newest.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))
        return self.name, lambda: run() - nothing, error


def quantile(values, q):
    return sorted(values)[round(q * (len(values) - 1))]


def number(value):
    return "%.3g" % value


def compare(library, ort, shape, format, visible, tokens, rounds):
    """Rows of the table: ours, then each peer, as ratios to ours of the same round."""
    layer = library.layer_new(format.encode(), shape.encode(), visible, tokens)
    contenders = [(library.layer_name(layer, i).decode(), lambda i=i: library.layer_run(layer, i),
                   lambda i=i: library.layer_error(layer, i)) for i in range(library.layer_size(layer))]
    if ort and format == "f32":
        contenders.append(ort.contender(library, layer, shape, visible, tokens))
    peers = len(contenders)
    contenders += [("fma", lambda: library.layer_fma(layer), None), ("read", lambda: library.layer_read(layer), None)]
    # Hot: calls before the one that counts bring the layer into the cache. Several, for strides of another contender's
    # layout (llama.cpp's) leave the L3 in a state that takes some calls to forget.
    uncounted = 4 if tokens == 1 and visible <= 4096 else 0
    seconds = []
    for round_number in range(rounds + 1):
        of_round = [0.0] * len(contenders)
        for i in range(len(contenders)):
            turn = (round_number + i) % len(contenders)
            for _ in range(uncounted):
                contenders[turn][1]()
            of_round[turn] = contenders[turn][1]()
        if round_number > 0:
            seconds.append(of_round)
    what = "%s of %d, %s, %s" % ("decode" if tokens == 1 else "prefill of %d" % tokens, visible, shape, format)
    rows = []
    for i, (name, _, error) in enumerate(contenders[:peers]):
        ratios = [s[i] / s[0] for s in seconds]
        limit = quantile([100 * max(s[peers:]) / s[i] for s in seconds], 0.5)
        ratio = "" if i == 0 else "**%s** (%s-%s)" % tuple(number(quantile(ratios, q)) for q in (0.5, 0.1, 0.9))
        rows.append((what if i == 0 else "", name, number(1e6 * quantile([s[i] for s in seconds], 0.5)), ratio,
                     "%.0f %%" % limit, "%.0e" % error()))
    library.layer_free(layer)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ggml", help="ggml's source tree (llama.cpp/ggml), or where its shared libraries are installed")
    parser.add_argument("--isa", choices=["native", "x86-64"], default="native",
                        help="x86-64: SSE2 for us and for ggml; the others choose when they run, and are left out")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="rows that contain this, as in 'decode of 1024, A'")
    args = parser.parse_args()
    library = build(args)
    ort = None
    if args.isa != "native":
        say("ONNX Runtime: skipped, it chooses its instructions when it runs")
    else:
        try:
            ort = OnnxRuntime()
            ort.call_of_nothing_seconds = ort.call_of_nothing()
            say("ONNX Runtime: a call of nothing takes %.0f us, which its times are without"
                % (1e6 * ort.call_of_nothing_seconds))
        except ImportError as missing:
            say("ONNX Runtime: skipped, %s: pip install onnxruntime onnx" % missing)

    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        processor = next((line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
                         processor)
    versions = library.peers().decode() + (", ONNX Runtime " + ort.version if ort else "")
    print("%s; one thread of %s; %s; medians of %d rounds (10-90 %%)\n"
          % (versions, processor, datetime.date.today().isoformat(), args.rounds))
    print("| | | us | times ours | of the machine's limit | error |\n|--|--|--|--|--|--|")
    cases = [(shape, format, visible, 1) for visible in (1024, 32768) for shape in HEADS
             for format in ("f32", "f16", "bf16", "q8", "q4")]
    cases += [(shape, format, visible, 512) for visible in (1024, 4096) for shape in HEADS for format in ("f32", "f16")]
    for shape, format, visible, tokens in cases:
        if args.only in "%s of %d, %s, %s" % ("decode" if tokens == 1 else "prefill of 512", visible, shape, format):
            for row in compare(library, ort, shape, format, visible, tokens, args.rounds):
                print("| %s |" % " | ".join(row), flush=True)


main()
