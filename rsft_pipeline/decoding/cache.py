"""Cache: the keys and values that shared-prefix decoding keeps, and who sees what of them in a step.

Prompts lie at *places*, completions under way on *rows*: of a prompt its *prefix* is kept once, and of each row its
own *suffix*, preallocated. Where the attention is compiled (cpu_attention.py) it stores the suffixes' newest tokens
itself, each row's at its own column, and needs nobody to say who sees what.

This module imports torch and transformers; import it inside functions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch  # noqa: TID253
from transformers import DynamicCache  # noqa: TID253
from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: TID253

from rsft_pipeline.decoding import cpu_attention

HIDDEN = -3e4  # the score of a key that must not be seen; finite in fp16 too, so that an empty prefix makes no NaN
BLOCK = {"cpu": 16}  # tokens by which suffixes grow, by device; 64 elsewhere


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
