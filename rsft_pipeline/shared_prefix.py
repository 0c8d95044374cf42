"""Shared-prefix decoding: a prompt is read once, and all its draws attend to that one reading.

Belongs here: the loop that keeps many draws going at once, the keys and values it keeps, and the
attention over them. Does not: what a draw is and how a token is chosen (decoding.py).

A *row* is a completion under way, with all the draws of its prompt that have chosen the same tokens so far: they
are computed once, and part when they choose differently. Its keys and values are its own *suffix*,
preallocated; those of its prompt, the *prefix*, are kept once for all rows of the prompt. Attention is
the sum over the two parts, each normalised by itself and weighted by its share of the normaliser (the
log-sum-exp merge of FlashAttention, Dao et al. 2022; sharing the prefix so is Hydragen, Juravsky et
al. 2024). For the prefix the queries of all rows of a prompt meet its keys in one matrix product.

The model runs as Transformers wrote it, layer by layer: only its cache and its attention function are
ours, through `Cache` and `AttentionInterface`. On a CPU the attention is compiled (cpu_attention.py): it then
stores the suffixes' newest tokens itself, each row's at its own column, and needs nobody to say who sees what.

This module imports torch and transformers; import it inside functions.
"""

import contextlib
import inspect
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch  # noqa: TID253
from transformers import (  # noqa: TID253
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import (  # noqa: TID253
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: TID253
from transformers.masking_utils import sdpa_mask  # noqa: TID253

from rsft_pipeline import cpu_attention
from rsft_pipeline.decoding import ROWS, Draw, Drawn, Shape, choose, uniforms

log = logging.getLogger(__name__)

NAME = "rsft_shared_prefix"
HIDDEN = -3e4  # the score of a key that must not be seen; finite in fp16 too, so that an empty prefix makes no NaN
PREFILL_TOKENS = 8192  # most tokens of prompts read in one forward pass
PREFILL_PADDING = 1.25  # longest over shortest prompt of such a pass
BLOCK = {"cpu": 16}  # tokens by which suffixes grow, by device; 64 elsewhere
STRIDE = {"cuda": 8}  # steps between two looks at which rows have ended: a look makes the host wait; 1 elsewhere


class Unsupported(Exception):
    """The model's attention is not one that this module computes."""


# --- what is kept -----------------------------------------------------------------------------


class SharedPrefixLayer(CacheLayerMixin):
    """Keys and values of one layer: a prefix for each place, aligned right, and a suffix for each row.

    Shapes: prefix keys [places, heads, dimension, longest prompt], prefix values [places, heads, longest
    prompt, dimension], suffix keys and values [rows, heads, columns, dimension]. The columns are a ring
    that all rows write at one place, whenever they began. There are as many as the longest suffix needs,
    because what is read then lies densely in memory: memory for all that they can become is there from the
    start, and is arranged anew as suffixes grow.
    """

    is_compileable = False
    # Zeros, because what is masked is still multiplied by 0, and memory as it comes may hold a NaN.
    new = staticmethod(torch.Tensor.new_zeros)

    def __init__(self, cache: "SharedPrefixCache", window: int | None):
        super().__init__()
        self.cache, self.window = cache, window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for heads and dimension like those given, each [any, heads, any, dimension]."""
        places, rows, longest, tokens = self.cache.sizes
        (_, heads, _, key_size), value_size = key_states.shape, value_states.shape[3]
        self.prefix_keys = self.new(key_states, (places, heads, key_size, longest))
        self.prefix_values = self.new(value_states, (places, heads, longest, value_size))
        self.keys = self.new(key_states, (rows, heads, tokens, key_size))
        self.values = self.new(value_states, (rows, heads, tokens, value_size))
        self.resize(0, self.cache.columns[:0], self.cache.width)
        self.is_initialized = True

    def resize(self, rows: int, kept: torch.Tensor, width: int) -> None:
        """Give the suffixes that many columns, of which the first are, in the first rows, those that are kept."""
        self.keys, self.values = (_resized(states, rows, kept, width) for states in (self.keys, self.values))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any):
        """Store the rows' newest keys and values, each [rows, heads, 1, dimension].

        Returns:
            The same: what was stored before, the attention function takes from here.
        """
        rows, column = len(key_states), self.cache.newest
        self.keys[:rows, :, column] = key_states[:, :, 0]
        self.values[:rows, :, column] = value_states[:, :, 0]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return 1, 0

    def get_seq_length(self) -> int:
        return 0  # it differs from row to row; the loop gives the position ids

    def get_max_length(self) -> int:
        return -1


class SharedPrefixCache(Cache):
    """Prefixes and suffixes of all layers, and who sees what in the coming step.

    Args:
        windows: sliding window of each layer, in tokens; None where it sees everything.
        places: prompts kept at once.
        rows: rows kept at once.
        longest: tokens of the longest prompt.
        tokens: longest suffix.
    """

    first = 0  # tokens that a suffix begins with, before the first that is drawn
    layer_class: type[SharedPrefixLayer] = SharedPrefixLayer

    def __init__(
        self, windows: Sequence[int | None], places: int, rows: int, longest: int, tokens: int, device: torch.device
    ):
        self.width = self.block = self.growth(tokens, device)  # columns of the suffixes
        self.newest = self.width - 1  # the column written last
        self.sizes = (places, rows, _rounded(longest), _rounded(tokens + self.first, self.block))
        self.columns = torch.arange(max(self.sizes[2:]), device=device)
        self.age = torch.zeros(rows, dtype=torch.long, device=device)  # tokens drawn in each suffix
        self.position = torch.zeros(rows, dtype=torch.long, device=device)  # of each row's newest token
        self.length = torch.zeros(places, dtype=torch.long, device=device)  # tokens of each prompt
        super().__init__(layers=[self.layer_class(self, window) for window in windows])

    def close(self) -> None:
        """Let the keys and values go: cache and layers refer to each other, so they would stay for a while."""
        self.layers.clear()

    def growth(self, tokens: int, device: torch.device) -> int:
        """By how many columns suffixes grow that become so long."""
        return BLOCK.get(device.type, 64)

    def keep_prefixes(self, places: slice, read: DynamicCache, lengths: Sequence[int]) -> None:
        """Keep the keys and values of a batch of prompts of these lengths, padded on the left, as prefixes."""
        self.length[places] = torch.tensor(lengths, device=self.length.device)
        for layer, source in zip(self.layers, read.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            width = source.keys.shape[2]
            layer.prefix_keys[places, ..., self.sizes[2] - width :] = source.keys.transpose(-1, -2)
            layer.prefix_values[places, :, self.sizes[2] - width :] = source.values

    def begin(self, rows: slice, places: list[int]) -> None:
        """Make the rows ready to follow the prompts at these places."""
        self.age[rows] = 0
        self.position[rows] = self.length[places]

    def move_places(self, source: list[int], target: list[int]) -> None:
        self.length[target] = self.length[source]
        for layer in self.layers:
            layer.prefix_keys[target] = layer.prefix_keys[source]
            layer.prefix_values[target] = layer.prefix_values[source]

    def copy_rows(self, source: list[int], target: list[int]) -> None:
        self.age[target], self.position[target] = self.age[source], self.position[source]
        for layer in self.layers:
            layer.keys[target, :, : self.width] = layer.keys[source, :, : self.width]
            layer.values[target, :, : self.width] = layer.values[source, :, : self.width]

    def seat(self, place_of_row: Sequence[int], places: int, prefix: int, device: torch.device) -> None:
        """Arrange the rows in a grid [places, most rows of a place], so that a prompt's rows lie together.

        Args:
            prefix: tokens of the longest prompt among the places.
        """
        owner = np.asarray(place_of_row)
        counts = np.bincount(owner, minlength=places)
        order = np.argsort(owner, kind="stable")
        number = np.empty(len(owner), dtype=np.int64)  # of the row among its prompt's rows
        number[order] = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.grid_shape = (places, int(counts.max()))
        seats = owner * self.grid_shape[1] + number
        grid = np.zeros(places * self.grid_shape[1], dtype=np.int64)  # an empty seat computes row 0 for nobody
        grid[seats] = np.arange(len(owner))
        self.grid, self.seats = torch.from_numpy(grid).to(device), torch.from_numpy(seats).to(device)
        # Position of each prefix column in its prompt, negative where there is padding: [places, 1, prefix].
        prefix = self.prefix = min(self.sizes[2], _rounded(prefix))
        self.prefix_positions = (self.columns[:prefix] - prefix + self.length[:places, None])[:, None]

    def look(self, rows: int, oldest: int) -> None:
        """Work out where the coming step's keys and values go, and who sees what.

        Args:
            rows: how many there are.
            oldest: tokens of the longest suffix so far.
        """
        position, self.length_of_row = self.position[:rows], self.age[:rows] + self.first
        needed = _rounded(oldest + self.first + 1, self.block)
        if needed > self.width or 2 * needed <= self.width:
            self._resize(rows, needed)
        self.newest = (self.newest + 1) % self.width
        self.prefix_bias: dict[int | None, torch.Tensor] = {}
        self.suffix_bias: dict[int | None, torch.Tensor] = {}
        # Of the columns from the newest token, in tokens.
        self.distance = (self.newest - self.columns[: self.width]) % self.width
        for window in {layer.window for layer in self.layers}:
            early, late = self.prefix_positions < 0, self.distance > self.length_of_row[:, None]
            if window is not None:
                seated = position[self.grid].view(*self.grid_shape, 1)
                early = early | (self.prefix_positions <= seated - window)
                late = late | (self.distance >= window)
            self.prefix_bias[window] = _bias(early)[:, None, :, None]  # [places, 1, 1 or seats, 1, prefix]
            self.suffix_bias[window] = _bias(late)[:, None, None]  # [rows, 1, 1, columns]

    def _resize(self, rows: int, width: int) -> None:
        """Give the suffixes that many columns, and lay the newest of those that there are in order."""
        kept = min(width, self.width)
        columns = (self.newest + 1 - kept + self.columns[:kept]) % self.width
        for layer in self.layers:
            layer.resize(rows, columns, width)
        self.width, self.newest = width, kept - 1


class CompiledLayer(SharedPrefixLayer):
    """The same where cpu_attention.py attends: a row's first token is in column 0, and nothing else is read."""

    new = staticmethod(torch.Tensor.new_empty)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any):
        return key_states, value_states  # the attention stores them


class CompiledCache(SharedPrefixCache):
    """Prefixes and suffixes that cpu_attention.py attends to. Of the suffixes' columns the width are in use."""

    layer_class = CompiledLayer

    def growth(self, tokens: int, device: torch.device) -> int:
        return tokens  # all at once: what is read need not be dense

    def seat(self, place_of_row: Sequence[int], places: int, prefix: int, device: torch.device) -> None:
        self.rows = cpu_attention.Rows(place_of_row, places)

    def look(self, rows: int, oldest: int) -> None:
        self.width = oldest + 1


def _rounded(tokens: int, to: int = 16) -> int:
    """To whole vectors: over rows of 15 numbers PyTorch's CPU kernels take up to 8 times as long as over 16."""
    return -(-tokens // to) * to


def _resized(states: torch.Tensor, rows: int, kept: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, heads, width, dimension] in the memory of `states`, those columns first in its first rows.

    All else holds anything, but numbers: memory that was not written holds zeros.
    """
    (most, heads, _, size), first = states.shape, states[:rows, :, kept]
    resized = states.as_strided((most, heads, width, size), (heads * width * size, width * size, size, 1))
    resized[:rows, :, : len(kept)] = first
    return resized


def _bias(hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, HIDDEN)


# --- attention --------------------------------------------------------------------------------


# What models hand to their attention function that does not change its result for a single query.
IGNORED = {
    *("dropout", "is_causal", "position_ids", "sliding_window", "use_cache", "cache_position"),
    *("output_attentions", "output_router_logits"),
}


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    shared_prefix: SharedPrefixCache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token of each row to its prompt's prefix and its own suffix.

    Without `shared_prefix` a prompt is being read: then it is Transformers' SDPA.

    Args:
        query: [rows, query heads, 1, dimension].
        key: [rows, heads, 1, dimension], and value likewise: the newest, stored already.

    Returns:
        [rows, 1, query heads, dimension], and no weights.

    Raises:
        Unsupported: the model asks for something else than softmax(scaling · q kᵀ) v.
    """
    if others := sorted(name for name, given in kwargs.items() if given is not None and name not in IGNORED):
        raise Unsupported(f"its attention takes {', '.join(others)}")
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_mask is not None:
        raise Unsupported("its attention takes a mask of its own")
    cache, layer = shared_prefix, shared_prefix.layers[module.layer_idx]
    if key.shape[1::2] != layer.keys.shape[1::2] or value.shape[1::2] != layer.values.shape[1::2]:
        raise Unsupported("it attends to other keys and values than it keeps")
    (rows, heads, _, _), kv_heads = query.shape, key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(cache, CompiledCache):
        prefixes, suffixes = (layer.prefix_keys, layer.prefix_values), (layer.keys, layer.values)
        return cpu_attention.attend(
            query, key, value, prefixes, suffixes, cache.rows, cache.length, cache.age, layer.window, scaling
        ), None
    query = (query * scaling).view(rows, kv_heads, heads // kv_heads, -1)
    own, own_norm = over_suffix(query, layer, cache.suffix_bias[layer.window])
    shared, shared_norm = over_prefix(query, layer)
    merged = torch.lerp(own, shared, torch.sigmoid(shared_norm - own_norm).to(own.dtype))
    return merged.view(rows, 1, heads, -1), None


def over_suffix(query: torch.Tensor, layer: SharedPrefixLayer, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each row to its own suffix.

    Args:
        query: scaled, [rows, heads, queries of a head, dimension].
        bias: added to the scores, broadcast to [rows, heads, queries of a head, columns].

    Returns:
        The weighted values, shaped as the query, and the logarithm of their normaliser, [..., 1].
    """
    keys, values = layer.keys[: len(query)], layer.values[: len(query)]
    return _weighted((query @ keys.transpose(-1, -2)).add_(bias), values)


def over_prefix(query: torch.Tensor, layer: SharedPrefixLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of each row to its prompt's prefix: the queries of all its rows in one product."""
    cache, (_, kv_heads, group, _) = layer.cache, query.shape
    places, seats = cache.grid_shape
    keys, values = layer.prefix_keys[:places, ..., -cache.prefix :], layer.prefix_values[:places, :, -cache.prefix :]
    seated = query[cache.grid].view(places, seats, kv_heads, -1).transpose(1, 2)
    scores = seated.reshape(places, kv_heads, seats * group, -1) @ keys
    scores.view(places, kv_heads, seats, group, -1).add_(cache.prefix_bias[layer.window])
    shared, norm = _weighted(scores, values)
    shared = shared.view(places, kv_heads, seats, group, -1).transpose(1, 2).flatten(0, 1)[cache.seats]
    norm = norm.view(places, kv_heads, seats, group, 1).transpose(1, 2).flatten(0, 1)[cache.seats]
    return shared, norm


def _weighted(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scores) @ values, and log Σ exp(scores) as [..., 1].

    Args:
        scores: [..., tokens].
        values: [..., tokens, dimension].
    """
    most = scores.amax(-1, keepdim=True).float()
    # e⁻⁸⁰ of the largest weight is nothing; what underflows instead takes a CPU twenty times as long.
    weights = scores.float().sub_(most).clamp_(min=-80).exp_()
    total = weights.sum(-1, keepdim=True)
    return (weights.to(values.dtype) @ values).div_(total), most + total.log()


def _mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Where prompts are read, Transformers' mask for SDPA; a step of single tokens needs none."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def attention_of(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """The model with our attention function; afterwards with its own again."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def windows(model: Any) -> list[int | None]:
    """Sliding window of each of the model's layers.

    Raises:
        Unsupported: naming what the model does that this module does not compute.
    """
    if not isinstance(model, PreTrainedModel) or not model.is_backend_compatible():
        raise Unsupported("it does not take its attention from Transformers' AttentionInterface")
    if model.config.is_encoder_decoder or "position_ids" not in inspect.signature(model.forward).parameters:
        raise Unsupported("it is not a decoder that takes position ids")
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attention_chunk_size", None) is not None:
        raise Unsupported("it attends in chunks")
    found = []
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise Unsupported(f"it keeps a {type(layer).__name__}")
        found.append(getattr(layer, "sliding_window", None))
    return found


# --- the loop ---------------------------------------------------------------------------------


def draw(
    model: Any, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int, at_once: int
) -> Iterator[tuple[int, Drawn]]:
    """Make the draws, so many at once: number and result of each, in the order in which they end.

    Raises:
        Unsupported: naming what the model does that this module does not compute.
    """
    loop = Loop(model, draws, shape, pad_id, at_once)
    with attention_of(model), contextlib.closing(loop.cache):
        yield from loop.run()


class Loop:
    """Draws under way, and the rows that they are on. Those that end leave, waiting ones begin, until none waits.

    What a row is made of lies at the row's index in each tensor, a draw's random numbers at the draw's; rows, draws
    and places are kept without holes, the last one moving into a hole. The host knows every suffix's length
    without asking the device, so that between two looks at which rows have ended nothing waits.
    """

    def __init__(
        self, model: PreTrainedModel, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int, capacity: int
    ):
        """Args:
        draws: number and draw of each to make.
        capacity: draws at once, each of which may come to need a row.
        """
        self.model, self.shape, self.pad_id, self.device = model, shape, pad_id, model.device
        by_prompt: dict[tuple[int, ...], deque[tuple[int, Draw]]] = {}
        for number, draw in draws:
            by_prompt.setdefault(draw.prompt_ids, deque()).append((number, draw))
        self.unread = deque(by_prompt.items())  # prompts not read yet, with their draws
        self.capacity = capacity = min(capacity, len(draws))
        self.busy = min(capacity, ROWS[self.device.type])
        most = max(map(len, by_prompt.values()))
        # Twice the prompts that are needed for all draws: a few prompts' stragglers must not keep others out.
        self.places = min(len(by_prompt), 2 * -(-capacity // most))
        longest = max(map(len, by_prompt))
        self.cache = self._cache(longest)

        def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        self.u = zeros(capacity, shape.max_tokens, dtype=torch.float64)
        self.token = zeros(capacity, dtype=torch.long)
        self.alive = zeros(capacity, dtype=torch.bool)
        self.stopped = zeros(capacity, dtype=torch.bool)
        self.drawn = zeros(capacity, dtype=torch.long)
        self.log_q = zeros(capacity, dtype=torch.float64)
        self.log_p = zeros(capacity, dtype=torch.float64)
        self.tokens = zeros(capacity, shape.max_tokens, dtype=torch.long)
        self.states = [self.token, self.alive, self.stopped, self.drawn, self.log_q, self.log_p, self.tokens]
        self.stops = torch.tensor(sorted(shape.stop_ids), dtype=torch.long, device=self.device)
        # The host's side: for each draw its number and its row; for each row its place and its age; for each place
        # its prompt.
        self.number: list[int] = []
        self.row: list[int] = []
        self.place: list[int] = []
        self.age: list[int] = []
        self.prompts: list[tuple[int, deque[tuple[int, Draw]], torch.Tensor]] = []

    def _cache(self, longest: int) -> SharedPrefixCache:
        """What is kept of prompts of up to `longest` tokens and their draws."""
        tokens = self.shape.max_tokens
        compiled = cpu_attention.usable(self.device, self.model.dtype)
        return (CompiledCache if compiled else SharedPrefixCache)(
            [None if w is None or longest + tokens <= w else w for w in windows(self.model)],
            self.places,
            self.capacity,
            longest,
            max(1, tokens - 1),
            self.device,
        )

    def run(self) -> Iterator[tuple[int, Drawn]]:
        """Number and result of each draw, as it ends."""
        while self.unread or self.prompts:
            self._admit()
            yield from self._release()
            if self.number:
                self._arrange()
                left = self.shape.max_tokens - 1 - max(self.age)
                shared = len(self.row) > len(self.place)  # then each step is looked at, because rows may part
                for _ in range(1 if shared else min(left, STRIDE.get(self.device.type, 1))):
                    self._step()
                yield from self._release()

    # --- a step -----------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Tell the device whose row is whose."""
        longest = max(length for length, _, _ in self.prompts)
        self.cache.seat(self.place, len(self.prompts), longest, self.device)
        self.row_of_draw = torch.tensor(self.row, device=self.device)

    def _step(self) -> None:
        """One more token for every draw."""
        rows, cache, row = len(self.place), self.cache, self.row_of_draw
        cache.look(rows, max(self.age))
        logits = self._logits(rows)
        cache.age[:rows] += 1
        cache.position[:rows] += 1
        self.age = [age + 1 for age in self.age]
        age = cache.age[row]
        chosen = choose(logits, row, self.u[: len(row)].gather(1, age[:, None])[:, 0], self.shape)
        if len(self.row) > rows:
            row = self._part(chosen[0])
        self._note(row, age, *chosen)

    def _logits(self, rows: int) -> torch.Tensor:
        """What follows each row's newest token, [rows, vocabulary]."""
        return self.model(
            input_ids=self.token[:rows, None],
            position_ids=self.cache.position[:rows, None],
            past_key_values=self.cache,
            use_cache=True,
            shared_prefix=self.cache,
        ).logits[:, -1]

    def _part(self, chosen: torch.Tensor) -> torch.Tensor:
        """Leave on each row the draws that chose one token, and begin a row for each other that was chosen there.

        Returns:
            The row of each draw.
        """
        before, new = _groups(self.row, chosen)
        parting = np.r_[False, before[1:] == before[:-1]]
        rows = np.where(parting, len(self.place) - 1 + np.cumsum(parting), before)
        source, target = before[parting].tolist(), rows[parting].tolist()
        if source:
            self._copy(source, target)
        self.place += [self.place[row] for row in source]
        self.age += [self.age[row] for row in source]
        self.row = rows[new].tolist()
        return torch.tensor(self.row, device=self.device)

    def _note(
        self, row: torch.Tensor, age: torch.Tensor, chosen: torch.Tensor, log_q: torch.Tensor, log_p: torch.Tensor
    ) -> None:
        """Note each draw's newest token in its row, unless it has ended: draws of one row write the same."""
        alive = self.alive[row]
        self.token[row] = chosen
        self.tokens[row, age] = chosen
        self.log_q[row] += log_q.where(alive, 0.0)
        self.log_p[row] += log_p.where(alive, 0.0)
        self.drawn[row] += alive
        stopped = torch.isin(chosen, self.stops)
        self.stopped[row] |= stopped & alive
        self.alive[row] &= ~stopped & (age + 1 < self.shape.max_tokens)

    def _copy(self, source: list[int], target: list[int]) -> None:
        """Make each target row what its source is."""
        self.cache.copy_rows(source, target)
        for state in self.states:
            state[target] = state[source]

    # --- who leaves, who begins -------------------------------------------------------------

    def _release(self) -> Iterator[tuple[int, Drawn]]:
        """Take out the rows that have ended with their draws, and the prompts that have no more rows."""
        alive = self.alive[: len(self.place)].tolist()  # the host waits here
        ended = [row for row, living in enumerate(alive) if not living]
        if not ended:
            return
        states = (self.tokens, self.drawn, self.stopped, self.log_q, self.log_p)
        results = {
            row: Drawn(tokens[:drawn], stopped, log_q, log_p)
            for row, tokens, drawn, stopped, log_q, log_p in zip(
                ended, *(state[ended].tolist() for state in states), strict=True
            )
        }
        yield from ((number, results[row]) for number, row in zip(self.number, self.row, strict=True) if not alive[row])
        going_on = [alive[row] for row in self.row]
        source, target = _moves(going_on)
        self.number, self.row = (_moved(values, source, target, sum(going_on)) for values in (self.number, self.row))
        if source:
            self.u[target] = self.u[source]

        source, target = _moves(alive)
        self.place, self.age = (_moved(values, source, target, sum(alive)) for values in (self.place, self.age))
        if source:
            self._copy(source, target)
            self.row = _renamed(self.row, source, target)

        present = set(self.place)
        needed = [i in present or bool(waiting) for i, (_, waiting, _) in enumerate(self.prompts)]
        source, target = _moves(needed)
        self.prompts = _moved(self.prompts, source, target, sum(needed))
        if source:
            self.cache.move_places(source, target)
            self.place = _renamed(self.place, source, target)

    def _admit(self) -> None:
        """Begin waiting draws while there is room, reading further prompts once there is room for enough."""
        room = self._room()
        room -= self._start(room)
        if self.unread and room >= max(1, self.busy // 8):
            wanted: list[tuple[tuple[int, ...], deque[tuple[int, Draw]]]] = []
            # All draws of a prompt together, if it can be: what begins later shares no rows with what began before.
            while self.unread and len(self.prompts) + len(wanted) < self.places and room >= self._together():
                wanted.append(self.unread.popleft())
                room -= len(wanted[-1][1])
            for batch in _batches(wanted):
                self._read(batch)
            self._start(self._room())

    def _room(self) -> int:
        """How many draws may begin: as many as keep the device busy, if they share rows as those under way do."""
        draws, rows = len(self.row), len(self.place)
        return min(self.capacity - draws, (self.busy - rows) * draws // rows if rows else self.busy)

    def _together(self) -> int:
        """Room that the next prompt's draws need to begin together; half of all there is has to do."""
        return min(len(self.unread[0][1]), max(1, self.busy // 2))

    def _read(self, prompts: list[tuple[tuple[int, ...], deque[tuple[int, Draw]]]]) -> None:
        """Read prompts in one forward pass, and keep their prefixes."""
        ids, waiting = zip(*prompts, strict=True)
        lengths, (read, logits) = list(map(len, ids)), self._forward(ids)
        self.cache.keep_prefixes(slice(len(self.prompts), len(self.prompts) + len(ids)), read, lengths)
        self.prompts += zip(lengths, waiting, logits, strict=True)

    def _forward(self, prompts: Sequence[tuple[int, ...]]) -> tuple[Cache, torch.Tensor]:
        """Keys and values of the prompts, padded, and what follows each, [prompts, vocabulary]."""
        ids, mask, positions = left_padded(prompts, self.pad_id, self.device)
        read = DynamicCache(config=self.model.config)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=read,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return read, logits

    def _start(self, room: int) -> int:
        """Begin up to `room` waiting draws of the prompts that have been read: how many it were."""
        first, seeds, places, place_of_draw = len(self.number), [], [], []
        for place, (_, waiting, _) in enumerate(self.prompts):
            if waiting and len(seeds) < room:
                places.append(place)
            while waiting and len(seeds) < room:
                number, draw = waiting.popleft()
                self.number.append(number)
                seeds.append(draw.seed)
                place_of_draw.append(len(places) - 1)  # among those that begin
        if not seeds:
            return 0
        u = torch.from_numpy(uniforms(seeds, self.shape.max_tokens)).to(self.device)
        self.u[first : len(self.number)] = u
        logits = torch.stack([self.prompts[place][2] for place in places])
        chosen = choose(logits, torch.tensor(place_of_draw, device=self.device), u[:, 0], self.shape)
        place_of_row, new = _groups(place_of_draw, chosen[0])
        row = new + len(self.place)
        rows = slice(len(self.place), len(self.place) + len(place_of_row))
        self.row += row.tolist()
        self.place += [places[i] for i in place_of_row]
        self.age += [0] * len(place_of_row)
        self.cache.begin(rows, self.place[rows])
        self.drawn[rows] = 0
        self.alive[rows], self.stopped[rows] = True, False
        self.log_q[rows], self.log_p[rows] = 0.0, 0.0
        row = torch.from_numpy(row).to(self.device)
        self._note(row, torch.zeros_like(row), *chosen)
        return len(seeds)


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, mask and position ids of prompts, each int64 [prompts, longest].

    Padded on the left, so that the next token follows the last.
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    mask = mask.to(device)
    return ids.to(device), mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _batches(prompts: list[tuple[tuple[int, ...], Any]]) -> Iterator[list[tuple[tuple[int, ...], Any]]]:
    """Prompts to be read together: of like length, and not more tokens than fit."""
    batch: list[tuple[tuple[int, ...], Any]] = []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt[0])):
        length = len(prompt[0])
        if batch and (length > PREFILL_PADDING * len(batch[0][0]) or length * (len(batch) + 1) > PREFILL_TOKENS):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _moves(kept: Sequence[bool]) -> tuple[list[int], list[int]]:
    """From where to where the last kept entries move, so that the first ones are kept and no hole is left."""
    number = sum(kept)
    holes = [i for i in range(number) if not kept[i]]
    return [i for i in range(number, len(kept)) if kept[i]], holes


def _groups(of: Sequence[int], chosen: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Draws that are of the same and chose the same token, as groups: of what each group is, in order, and the group
    of each draw.
    """
    token = chosen.cpu().numpy()
    stride = int(token.max()) + 1
    groups, group = np.unique(np.asarray(of) * stride + token, return_inverse=True)
    return groups // stride, group


def _renamed(values: Sequence[int], source: list[int], target: list[int]) -> list[int]:
    names = dict(zip(source, target, strict=True))
    return [names.get(value, value) for value in values]


def _moved(values: list, source: list[int], target: list[int], number: int) -> list:
    values = list(values)
    for i, j in zip(source, target, strict=True):
        values[j] = values[i]
    return values[:number]
