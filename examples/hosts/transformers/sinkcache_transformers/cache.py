"""SinkCache: transformers' Cache of a model's layers, kept by this library in constant memory."""

import inspect
import weakref

import torch
import transformers
from transformers.cache_utils import CacheLayerMixin, get_layer_types_and_kwargs

from . import rotary
from .attention import refuse
from .masks import ends_of_tokens, forwards


class _Layer(CacheLayerMixin):
    """A layer's keys and values, before their rotary embedding. What update returns holds no tokens: the operator
    finds the layer by it, which then attends for itself."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache, index, caches):
        super().__init__()
        self._cache, self.index, self.caches = weakref.ref(cache), index, caches
        self._given = None

    def lazy_initialization(self, key_states, value_states):
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if forwards.cache is not self._cache():
            refuse("a SinkCache", "given to another model's layers", "given to the model that it was made for")
        self._given = key_states.detach(), value_states.detach()
        return _nothing_of(self, key_states, value_states)

    def attend(self, query, scaling, softcap, sinks, own_window):
        (key, value), self._given = self._given, None
        cache = self._cache()
        return self.caches.attend(query, key, value, cache._first, cache._end, scaling, softcap, sinks)

    def get_mask_sizes(self, query_length):
        return query_length, self.get_seq_length()

    def get_seq_length(self):
        return self._cache()._columns

    def get_max_length(self):
        return -1


def _nothing_of(layer, key_states, value_states):
    """No tokens, marked: attention finds the layer by them."""
    nothing = key_states[:, :, :0], value_states[:, :, :0]
    for each in nothing:
        each.sinkcache_layer = layer
    return nothing


class SinkCache(transformers.Cache):
    """The first num_sink_tokens and the newest `window` tokens of each sequence, or what a policy keeps of them, for
    model(..., past_key_values=cache) and generate(). Constant memory; positions are those in the cache, exact however
    long the stream is; keys and values in kv_format, pinned and the newest `recent` in bf16 where that has few bits.

    policy    "sinks", "window", or a name of docs/eviction.md with its parameters: "snapkv:kernel=5,interval=32"
    kv_format f32, f16, bf16, q8, q6, q4 or q2; v_format: of values, where they have another
    rollback  so many tokens can be taken back: crop, assisted and prompt-lookup decoding
    positions "in_cache", or "absolute" for true distances

    A layer of the model's with a sliding window of at most num_sink_tokens + window is kept as the model has it.
    While a SinkCache lives, its model attends by sinkcache with other caches too. Batches; padding before and after the
    tokens; beams; copy.deepcopy. What cannot be served is refused by name; then reset() it. One thread at a time.
    """

    hides_positions = True  # from rotary embeddings

    def __init__(self, model, num_sink_tokens=4, window=1020, kv_format="bf16", policy="sinks", *, v_format=None,
                 rollback=63, recent=64, positions="in_cache"):
        if positions not in ("in_cache", "absolute"):
            refuse("positions", repr(positions), "in_cache or absolute")
        for name, number in dict(num_sink_tokens=num_sink_tokens, window=window, rollback=rollback,
                                 recent=recent).items():
            if isinstance(number, bool) or not isinstance(number, int):
                refuse(name, repr(number), "a whole number")
        self._attach(rotary.decoder_of(model))
        for index, kind in enumerate(get_layer_types_and_kwargs(self._decoder.config)[0]):
            if kind not in ("full_attention", "sliding_attention"):
                refuse(f"layer {index}'s type", kind, "full_attention or sliding_attention")
        layers = []
        for index, shape in enumerate(self._measured()):
            is_own = 0 < shape.own_window <= num_sink_tokens + window
            layers.append(_Layer(self, index, torch.classes.sinkcache.layer(
                "window" if is_own else policy, kv_format, v_format or kv_format, shape.num_kv_heads,
                shape.num_qo_heads, shape.head_dim, shape.v_head_dim, 0 if is_own else num_sink_tokens,
                shape.own_window if is_own else window, rollback, recent, is_own or positions == "absolute", shape.inv_freq,
                shape.interleaved)))
        super().__init__(layers=layers)
        self._rollback = rollback
        self._forget()

    def _attach(self, decoder):
        self._decoder = decoder
        rotary.of(decoder).attach(decoder, _before_forward, _after_forward)
        weakref.finalize(self, _detach, rotary.of(decoder), weakref.ref(decoder))

    def _measured(self):
        of = rotary.of(self._decoder)
        if of.layers is None:
            of.layers = rotary.measure(self._decoder, _Probe())
        return of.layers

    def _forget(self):
        self._columns = 0  # tokens and padding of each sequence
        self._seen = None  # tokens alone: a list
        self._base = None  # position_ids of the first tokens
        self._is_token = None  # of the newest columns, where some are padding: [batch, up to rollback]
        self._first, self._end, self._next_seen, self._next_is_token = [], [], None, None

    # What a forward pass brings.

    def _begin(self, batch, length, attention_mask, position_ids):
        if self.is_beyond(self._seen):  # a pass was interrupted between layers
            self._truncate(self._seen)
        if self._seen is None or not self._columns:
            self._seen, self._base, self._is_token = [0] * batch, [None] * batch, None
            for layer in self.layers:
                layer.caches.resize(batch)
        if batch != len(self._seen):
            refuse("sequences of the batch", batch, f"as many as the cache has, {len(self._seen)}, or reset()")
        self._first, self._end, is_token = [], [], None
        counts = [length] * batch
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape != (batch, self._columns + length):
                refuse("attention_mask", f"of shape {list(attention_mask.shape)}",
                       f"[{batch}, {self._columns + length}]: all columns so far and the new ones")
            seen = attention_mask.bool().sum(-1).tolist()
            if seen != [s + length for s in self._seen]:
                is_token = attention_mask[:, self._columns:].bool()
                first, end = ends_of_tokens(is_token)
                self._first, self._end = first.tolist(), end.tolist()
                counts = [e - f for f, e in zip(self._first, self._end)]
                if seen != [s + n for s, n in zip(self._seen, counts)]:
                    refuse("attention_mask", "other than before in columns that the cache has", "the same")
        self._require_positions(position_ids, counts, batch, length)
        self._next_seen = [s + n for s, n in zip(self._seen, counts)]
        if is_token is None and self._is_token is not None:
            is_token = torch.ones(batch, length, dtype=torch.bool)
        if is_token is not None:
            before = self._is_token
            if before is None:
                before = torch.ones(batch, min(self._columns, self._rollback), dtype=torch.bool)
            is_token = torch.cat([before, is_token], dim=1)[:, -max(1, self._rollback):]
        self._next_is_token = None if is_token is None or is_token.all() else is_token

    def _require_positions(self, position_ids, counts, batch, length):
        """That a sequence's tokens follow each other, wherever they begin."""
        if position_ids is None:
            position_ids = torch.arange(self._columns, self._columns + length)[None]
        if position_ids.dim() != 2 or position_ids.shape[1] != length:
            refuse("position_ids", f"of shape {list(position_ids.shape)}", f"[{batch}, {length}]")
        if length == 1:
            given = position_ids[:, 0].tolist()
            given = given * batch if len(given) == 1 else given
        else:
            rows = position_ids.expand(batch, -1)
            steps = rows[:, 1:] - rows[:, :-1] == 1
            given = []
            for i, n in enumerate(counts):
                first = self._first[i] if self._first else 0
                if not steps[i, first:first + max(0, n - 1)].all():
                    refuse("position_ids", f"{rows[i, first:first + n].tolist()} in sequence {i}",
                           "numbers that follow each other: one text a sequence")
                given.append(int(rows[i, min(first, length - 1)]))
        for i, (position, n) in enumerate(zip(given, counts)):
            if n == 0:
                continue
            if self._base[i] is None:
                self._base[i] = position - self._seen[i]
            if position != self._base[i] + self._seen[i]:
                refuse("position_ids", f"{position} for token {self._seen[i]} of sequence {i}",
                       f"{self._base[i] + self._seen[i]}: tokens follow each other; where there is padding between "
                       "them, give position_ids")

    def _commit(self, length):
        self._columns += length
        self._seen, self._is_token = self._next_seen, self._next_is_token

    def is_beyond(self, seen):
        return seen is not None and any(layer.caches.seen() != seen for layer in self.layers)

    def _truncate(self, seen):
        for layer in self.layers:
            if (why_not := layer.caches.why_not_truncate(seen)):
                raise ValueError(f"layer {layer.index}: {why_not}; reset() forgets all")
        for layer in self.layers:
            layer.caches.truncate(seen)

    # What transformers asks.

    def crop(self, tokens_to_remove):
        """Takes back so many columns, -1 for the newest one: up to `rollback`, or refused and nothing changes."""
        if tokens_to_remove > 0:
            refuse("tokens_to_remove", tokens_to_remove, "0 or below: how many are taken back, with a minus")
        number = -int(tokens_to_remove)
        if number == 0:
            return
        if number > self._columns:
            refuse("tokens_to_remove", tokens_to_remove, f"at least {-self._columns}: all there are")
        if self._is_token is None:
            removed = [min(number, s) for s in self._seen]
        elif number > self._is_token.shape[1] and number < self._columns:
            refuse("tokens_to_remove", tokens_to_remove, f"at least {-self._is_token.shape[1]}: the rollback")
        else:
            removed = self._is_token[:, -number:].sum(-1).tolist()
        seen = [0] * len(self._seen) if number == self._columns else [s - r for s, r in zip(self._seen, removed)]
        self._truncate(seen)
        self._columns -= number
        self._seen = seen
        if self._is_token is not None:
            self._is_token = self._is_token[:, :-number]

    def reset(self):
        for layer in self.layers:
            layer.caches.clear()
        self._forget()

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices):
        if self._seen is None:
            return
        indices = torch.as_tensor(indices)
        indices = (indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist()
        indices = [i + len(self._seen) if i < 0 else i for i in indices]
        for layer in self.layers:
            layer.caches.select(indices)
        self._seen, self._base = [self._seen[i] for i in indices], [self._base[i] for i in indices]
        if self._is_token is not None:
            self._is_token = self._is_token[indices]

    def batch_repeat_interleave(self, repeats):
        if self._seen is not None:
            self.batch_select_indices(torch.arange(len(self._seen)).repeat_interleave(repeats))

    @property
    def batch_size(self):
        return -1 if self._seen is None else len(self._seen)

    def nbytes(self):
        """Memory of all sequences and layers, in bytes."""
        return sum(layer.caches.nbytes() for layer in self.layers)

    def __deepcopy__(self, memo):
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy._attach(self._decoder)
        transformers.Cache.__init__(
            copy, layers=[_Layer(copy, layer.index, layer.caches.clone()) for layer in self.layers])
        copy._rollback = self._rollback
        copy._forget()
        copy._columns, copy._seen, copy._is_token = self._columns, self._seen, self._is_token
        copy._base = None if self._base is None else list(self._base)
        return copy

    def __reduce__(self):
        refuse("a SinkCache", "pickled", "made anew, or copied by copy.deepcopy: it holds on to its model")

    def __repr__(self):
        seen = 0 if self._seen is None else self._seen
        return f"SinkCache({len(self.layers)} layers of {type(self._decoder).__name__}, seen {seen})"


def _detach(of, decoder):
    of.detach(decoder())


def _before_forward(decoder, args, kwargs):
    """Of a decoder that has caches: tells one what comes, and hides the padding, which it keeps account of."""
    given = {**dict(zip(inspect.signature(decoder.forward).parameters, args)), **kwargs} if args else dict(kwargs)
    cache = given.get("cache", given.get("past_key_values"))
    if not isinstance(cache, SinkCache):
        return None
    if cache._decoder is not decoder:
        refuse("a SinkCache's model", type(cache._decoder).__name__, "the one that it was made for")
    if decoder.config._attn_implementation != "sinkcache":
        refuse("the model's attention", decoder.config._attn_implementation, "sinkcache, as long as a SinkCache lives")
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    cache._begin(tokens.shape[0], tokens.shape[1], given.get("attention_mask"), given.get("position_ids"))
    given["attention_mask"] = None
    forwards.cache = cache
    return (), given


def _after_forward(decoder, args, output):
    cache, forwards.cache = forwards.cache, None
    if isinstance(cache, SinkCache) and output is not None:
        cache._commit(output[0].shape[1])


class _Probe(transformers.Cache):
    """Notes each layer's query, key and value, and gives nothing back."""

    def __init__(self):
        super().__init__(layers=[])
        self.hides_positions = False
        self.begin()

    def begin(self):
        self.notes, self.given = {}, set()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx in self.given:
            refuse(f"layer {layer_idx}'s keys of one pass", "given twice", "given to its cache once")
        self.given.add(layer_idx)
        return _nothing_of(_Note(self.notes, layer_idx, key_states, value_states), key_states, value_states)

    def get_seq_length(self, layer_idx=0):
        return 0

    def get_mask_sizes(self, query_length, layer_idx):
        return query_length, 0


class _Note:
    def __init__(self, notes, index, key, value):
        self.notes, self.index, self.key, self.value = notes, index, key, value

    def attend(self, query, scaling, softcap, sinks, own_window):
        if self.index in self.notes:
            refuse(f"layer {self.index}'s calls of attention", "two", "one for what its cache gave")
        self.notes[self.index] = query.clone(), self.key.clone(), self.value.clone(), own_window
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], self.value.shape[3])
