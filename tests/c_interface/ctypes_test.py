"""The C interface from another language: Python's ctypes, with nothing but the standard library.

A stream against sums in Python's own floats, an executor that is a Python function, and calls with arguments that are
wrong in ways drawn by chance: each has to come back as a status.
"""

import ctypes as c
import math
import random
import sys

library = c.CDLL(sys.argv[1])
OK, REFUSED, NO_MEMORY = 0, 1, 2


class Error(c.Structure):
    _fields_ = [("text", c.c_char * 256)]


class Input(c.Structure):
    _fields_ = [("data", c.POINTER(c.c_float)), ("size", c.c_int64), ("stride", c.c_int64)]


class Output(c.Structure):
    _fields_ = Input._fields_


class Sized(c.Structure):
    def __init__(self, **fields):
        super().__init__(size=c.sizeof(self), **fields)


class Rope(Sized):
    _fields_ = [("size", c.c_size_t), ("type", c.c_char_p), ("width", c.c_int64), ("interleaved", c.c_int32)]
    _fields_ += [(name, c.c_double) for name in ("theta", "factor", "low_freq_factor", "high_freq_factor",
                                                 "original_max_position_embeddings")]
    _fields_ += [("no_truncate", c.c_int32)]
    _fields_ += [(name, c.c_double) for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim",
                                                 "attention_factor")]
    _fields_ += [("inv_freq", c.POINTER(c.c_float)), ("num_inv_freq", c.c_int64)]


COUNTS = ("num_kv_heads", "head_dim", "v_head_dim", "num_sink_tokens", "window", "rollback", "recent", "first_position",
          "num_qo_heads")


class CacheConfig(Sized):
    _fields_ = [("size", c.c_size_t), ("policy", c.c_char_p), ("k_format", c.c_char_p), ("v_format", c.c_char_p)]
    _fields_ += [(name, c.c_int64) for name in COUNTS]
    _fields_ += [("positions", c.c_int32), ("inputs", c.c_int32), ("rope", c.POINTER(Rope))]


class AttentionConfig(Sized):
    _fields_ = [("size", c.c_size_t), ("num_qo_heads", c.c_int64), ("sm_scale", c.c_float),
                ("logits_soft_cap", c.c_float), ("softmax", c.c_char_p)]
    for _name in ("sink_logits", "alibi_slopes", "sink_bias"):
        _fields_ += [(_name, c.POINTER(c.c_float)), ("num_" + _name, c.c_int64)]


WORK = c.CFUNCTYPE(None, c.c_void_p, c.c_int64, c.c_int64)
RUN = c.CFUNCTYPE(None, c.c_void_p, c.c_int64, WORK, c.c_void_p)


class Executor(Sized):
    _fields_ = [("size", c.c_size_t), ("concurrency", c.c_int64), ("run", RUN), ("host", c.c_void_p)]


def declare(name, *arguments):
    function = getattr(library, "sinkcache_" + name)
    function.argtypes = arguments
    function.restype = c.c_int
    return function


handle, place, error_to = c.c_void_p, c.POINTER(c.c_void_p), c.POINTER(Error)
cache_create = declare("cache_create", c.POINTER(CacheConfig), place, error_to)
cache_clone = declare("cache_clone", handle, place, error_to)
append = declare("append", handle, c.c_int64, Input, Input, error_to)
truncate = declare("truncate", handle, c.c_int64, error_to)
clear = declare("clear", handle, error_to)
pin = declare("pin", handle, c.c_int64, c.POINTER(c.c_int32), error_to)
attention_create = declare("attention_create", c.POINTER(AttentionConfig), place, error_to)
workspace_create = declare("workspace_create", c.c_int64, place, error_to)
workspace_create_on = declare("workspace_create_on", c.POINTER(Executor), place, error_to)
decode = declare("decode", handle, handle, Input, Output, Output, handle, error_to)
prefill = declare("prefill", handle, handle, c.c_int64, Input, Input, Input, Output, Output, handle, error_to)
for _name in ("cache", "attention", "workspace"):
    declare(_name + "_destroy", handle).restype = None
for _name in ("seen", "size", "min_truncate", "nbytes"):
    declare(_name, handle).restype = c.c_int64
library.sinkcache_version.restype = c.c_char_p


def made(create, config):
    to, error = handle(), Error()
    status = create(config, c.byref(to), c.byref(error))
    assert status == OK, error.text.decode()
    return to


def call(function, *arguments):
    error = Error()
    status = function(*arguments, c.byref(error))
    assert status == OK, error.text.decode()


def rows(values, kind=Input):
    array = (c.c_float * len(values))(*values)
    view = kind(c.cast(array, c.POINTER(c.c_float)), len(values), 0)
    view.array = array  # stays as long as the view
    return view


def as_float(x):
    return c.c_float(x).value


KV_HEADS, QO_HEADS, DIM, SINKS, WINDOW = 2, 4, 8, 2, 7
NOWHERE = Output()


def make_cache(**fields):
    rope = Rope(type=b"plain", theta=100.0)
    given = dict(k_format=b"f32", num_kv_heads=KV_HEADS, head_dim=DIM, num_sink_tokens=SINKS, window=WINDOW, rollback=3,
                 rope=c.pointer(rope))
    given.update(fields)
    return made(cache_create, c.byref(CacheConfig(**given)))


def rotated(row, position):
    half = DIM // 2
    out = list(row)
    for i in range(half):
        angle = position * as_float(100.0 ** (-2 * i / DIM))
        a, b = row[i], row[i + half]
        out[i], out[i + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def expected(q, keys, values, t):
    """By definition, positions in the cache."""
    visible = [p for p in range(t + 1) if p < SINKS or p > t - WINDOW]
    out = []
    for h in range(QO_HEADS):
        kv = h // (QO_HEADS // KV_HEADS)
        query = rotated(q[h * DIM:(h + 1) * DIM], len(visible) - 1)
        logits = [sum(a * b for a, b in zip(query, rotated(keys[p][kv * DIM:(kv + 1) * DIM], place)))
                  / math.sqrt(DIM) for place, p in enumerate(visible)]
        weights = [math.exp(x - max(logits)) for x in logits]
        out += [sum(w * values[p][kv * DIM + d] for w, p in zip(weights, visible)) / sum(weights) for d in range(DIM)]
    return out


def run_forwards(host, n, work, of):
    for item in range(n):
        work(of, item, item % 2)


def stream_by_definition():
    draw = random.Random(1)
    attention = made(attention_create, c.byref(AttentionConfig(num_qo_heads=QO_HEADS)))
    run = RUN(run_forwards)
    executor = Executor(concurrency=2, run=run)
    workspace = made(workspace_create_on, c.byref(executor))
    cache = make_cache()
    keys, values = [], []
    for t in range(25):
        q, k, v = ([as_float(draw.uniform(-2, 2)) for _ in range(n * DIM)] for n in (QO_HEADS, KV_HEADS, KV_HEADS))
        keys.append(k)
        values.append(v)
        out = rows([math.nan] * (QO_HEADS * DIM), Output)
        if t % 2 == 0:
            call(append, cache, 1, rows(k), rows(v))
            call(decode, attention, cache, rows(q), out, NOWHERE, workspace)
        else:
            call(prefill, attention, cache, 1, rows(q), rows(k), rows(v), out, NOWHERE, workspace)
        off = max(abs(a - b) for a, b in zip(out.array, expected(q, keys, values, t)))
        assert off < 1e-5, f"token {t} is off by {off}"
    assert library.sinkcache_seen(cache) == 25 and library.sinkcache_size(cache) == SINKS + WINDOW
    copy = handle()
    call(cache_clone, cache, c.byref(copy))
    call(truncate, copy, 23)
    assert library.sinkcache_seen(copy) == 23 and library.sinkcache_seen(cache) == 25
    call(clear, copy)
    assert library.sinkcache_seen(copy) == 0
    for kind, one in (("cache", cache), ("cache", copy), ("attention", attention), ("workspace", workspace)):
        getattr(library, f"sinkcache_{kind}_destroy")(one)


def every_name():
    """Each policy with each format that was compiled."""
    policies = ("sinks random h2o tova snapkv knorm keydiff mean_key lagkv:lag=2 expected_attention rkv gkv").split()
    for policy in policies:
        for k_format in (b"f32", b"q8"):
            text = policy if policy == "sinks" else policy + (":" if ":" not in policy else ",") + "recent=2,interval=8"
            rope = Rope(type=b"none")
            config = CacheConfig(policy=text.encode(), k_format=k_format, num_kv_heads=1, head_dim=32, num_sink_tokens=2,
                                 window=40, num_qo_heads=2, rope=c.pointer(rope))
            to, error = handle(), Error()
            status = cache_create(c.byref(config), c.byref(to), c.byref(error))
            assert status == OK, (text, k_format, error.text)
            assert library.sinkcache_nbytes(to) > 0
            library.sinkcache_cache_destroy(to)


def drawn_misuse():
    """Arguments of which at least one is wrong: refused, and nothing changes."""
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    attention = made(attention_create, c.byref(AttentionConfig(num_qo_heads=QO_HEADS)))
    workspace = handle()
    assert workspace_create(2, c.byref(workspace), None) == OK
    cache = make_cache()
    zeros = [0.0] * (KV_HEADS * DIM)
    call(append, cache, 1, rows(zeros), rows(zeros))

    def wrong_handle():
        return draw.choice((None, 0, workspace, attention))

    def wrong_rows(cols, kind=Input):
        view = rows([0.0] * cols, kind)
        change = draw.randrange(4)
        if change == 0:
            view.data = None
        elif change == 1:
            view.size = draw.choice((0, -1, cols - 1, -(1 << 63)))
        elif change == 2:
            view.stride = draw.choice((-1, 1, cols - 1, -(1 << 63)))
        else:
            view.size, view.stride = cols - 1, (1 << 63) - 1
        return view

    q, kv, out = QO_HEADS * DIM, KV_HEADS * DIM, QO_HEADS * DIM
    for _ in range(2000):
        good_q, good_kv, good_out = rows([0.0] * q), rows([0.0] * kv), rows([0.0] * out, Output)
        calls = [
            lambda: append(wrong_handle(), 1, good_kv, good_kv, error),
            lambda: append(cache, draw.choice((-1, 2, 1 << 62, (1 << 63) - 1, -(1 << 63))), good_kv, good_kv, error),
            lambda: append(cache, 1, wrong_rows(kv), good_kv, error),
            lambda: append(cache, 1, good_kv, wrong_rows(kv), error),
            lambda: decode(draw.choice((None, cache, workspace)), cache, good_q, good_out, NOWHERE, workspace, error),
            lambda: decode(attention, wrong_handle(), good_q, good_out, NOWHERE, workspace, error),
            lambda: decode(attention, cache, good_q, good_out, NOWHERE, draw.choice((None, cache, attention)), error),
            lambda: decode(attention, cache, wrong_rows(q), good_out, NOWHERE, workspace, error),
            lambda: decode(attention, cache, good_q, wrong_rows(out, Output), NOWHERE, workspace, error),
            lambda: prefill(attention, cache, draw.choice((-1, 2, 1 << 61)), good_q, good_kv, good_kv, good_out, NOWHERE,
                            workspace, error),
            lambda: prefill(attention, cache, 1, wrong_rows(q), good_kv, good_kv, good_out, NOWHERE, workspace, error),
            lambda: truncate(cache, draw.choice((-1, 2, (1 << 63) - 1)), error),
            lambda: truncate(wrong_handle(), 0, error),
            lambda: clear(wrong_handle(), error),
            lambda: pin(cache, 0, None, error),
            lambda: cache_clone(cache, None, error),
            lambda: cache_clone(wrong_handle(), c.byref(handle()), error),
            lambda: workspace_create(draw.choice((0, -1, 1025, 1 << 62)), c.byref(handle()), error),
        ]
        text = Error()
        error = draw.choice((None, c.byref(text)))
        library.sinkcache_cache_destroy(wrong_handle())  # is left alone: later calls use it
        number = draw.randrange(len(calls))
        status = calls[number]()
        assert status == REFUSED, f"call {number}: {status}, {text.text}"
        assert error is None or text.text.startswith(b"sinkcache: "), f"call {number}: {text.text}"
        assert library.sinkcache_seen(cache) == 1

    # Configurations with one field changed at random: made or refused, never anything else.
    for _ in range(1000):
        rope = Rope(type=b"plain", theta=100.0)
        config = CacheConfig(k_format=b"f32", num_kv_heads=1, head_dim=8, num_sink_tokens=1, window=4,
                             rope=c.pointer(rope))
        of = draw.choice((config, rope))
        numbers = [name for name, kind in of._fields_ if kind in (c.c_int64, c.c_int32, c.c_double, c.c_size_t)]
        name = draw.choice(numbers)
        values = (-1, 0, 1, 3, 17, 600, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
        setattr(of, name, draw.choice(values if dict(of._fields_)[name] is not c.c_double
                                      else values + (math.nan, math.inf, -math.inf, 1e300, 5e-324)))
        to, text = handle(), Error()
        status = cache_create(c.byref(config), c.byref(to), c.byref(text))
        assert status in (OK, REFUSED, NO_MEMORY)
        assert (status == OK) == bool(to) == (text.text == b""), (name, getattr(of, name), status, text.text)
        library.sinkcache_cache_destroy(to)
    for kind, one in (("cache", cache), ("attention", attention), ("workspace", workspace)):
        getattr(library, f"sinkcache_{kind}_destroy")(one)


assert library.sinkcache_c_version() == 1
assert library.sinkcache_version().count(b".") == 2
stream_by_definition()
every_name()
drawn_misuse()
