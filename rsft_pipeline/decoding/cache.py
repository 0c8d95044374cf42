"""Cache: the keys and values that shared-prefix decoding keeps, and which of them each row sees in a step.

Prompts have *places*, completions in progress have *rows*: a prompt's *prefix* is kept once, and each row has its own
*suffix*; both are preallocated. The compiled attention (cpu_attention.py) stores the suffixes' newest tokens itself,
each row's in its own column, and does not need to be told what each row sees.

This module imports torch and transformers; import it inside functions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch  # noqa: TID253
from transformers import DynamicCache  # noqa: TID253
from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: TID253

from rsft_pipeline.decoding import cpu_attention

HIDDEN = -3e4  # the score of a key that must not be seen; finite even in fp16, so that an empty prefix gives no NaN
BLOCK = {"cpu": 16}  # tokens by which suffixes grow, by device; 64 elsewhere


class SharedPrefixLayer(CacheLayerMixin):
    """Keys and values of one layer: a prefix for each place, aligned right, and a suffix for each row.

    Shapes: prefix keys [places, heads, dimension, longest prompt], prefix values [places, heads, longest
    prompt, dimension], suffix keys and values [rows, heads, columns, dimension]. The columns are a ring
    buffer into which all rows write at the same column, whenever they began. There are only as many columns
    as the longest suffix needs, so that what is read is dense in memory; memory for the longest possible
    suffixes is allocated from the start and rearranged as suffixes grow.
    """

    is_compileable = False
    # Zeros, because masked values are still multiplied by 0, and uninitialised memory may hold a NaN.
    new = staticmethod(torch.Tensor.new_zeros)

    def __init__(self, cache: "SharedPrefixCache", window: int | None):
        super().__init__()
        self.cache, self.window = cache, window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the heads and dimensions of these keys and values, each [any, heads, any, dimension]."""
        places, rows, longest, tokens = self.cache.sizes
        (_, heads, _, key_size), value_size = key_states.shape, value_states.shape[3]
        self.prefix_keys = self.new(key_states, (places, heads, key_size, longest))
        self.prefix_values = self.new(value_states, (places, heads, longest, value_size))
        self.keys = self.new(key_states, (rows, heads, tokens, key_size))
        self.values = self.new(value_states, (rows, heads, tokens, value_size))
        self.resize(0, self.cache.columns[:0], self.cache.width)
        self.is_initialized = True

    def resize(self, rows: int, kept: torch.Tensor, width: int) -> None:
        """Give the suffixes `width` columns; in the first `rows` rows, the kept columns become the first ones."""
        self.keys, self.values = (_resized(states, rows, kept, width) for states in (self.keys, self.values))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any):
        """Store the rows' newest keys and values, each [rows, heads, 1, dimension].

        Returns:
            The same; the attention function reads earlier ones from this layer.
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
    """Prefixes and suffixes of all layers, and what each row sees in the next step.

    Args:
        windows: sliding window of each layer, in tokens; None if it sees everything.
        places: the most prompts kept at once.
        rows: the most rows kept at once.
        longest: tokens of the longest prompt.
        tokens: tokens of the longest suffix.
    """

    first = 0  # tokens that a suffix begins with, before the first drawn one
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
        """Free the keys and values: cache and layers refer to each other, so they would stay until collected."""
        self.layers.clear()

    def growth(self, tokens: int, device: torch.device) -> int:
        """By how many columns suffixes grow at a time, if they may reach `tokens` tokens."""
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
        """Arrange the rows in a grid [places, most rows of a place], so that a prompt's rows are adjacent.

        Args:
            prefix: tokens of the longest prompt among the places.
        """
        owner = np.asarray(place_of_row)
        counts = np.bincount(owner, minlength=places)
        order = np.argsort(owner, kind="stable")
        number = np.empty(len(owner), dtype=np.int64)  # of each row among its prompt's rows
        number[order] = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.grid_shape = (places, int(counts.max()))
        seats = owner * self.grid_shape[1] + number
        grid = np.zeros(places * self.grid_shape[1], dtype=np.int64)  # empty seats compute row 0 in vain
        grid[seats] = np.arange(len(owner))
        self.grid, self.seats = torch.from_numpy(grid).to(device), torch.from_numpy(seats).to(device)
        # Position of each prefix column in its prompt, negative for padding: [places, 1, prefix].
        prefix = self.prefix = min(self.sizes[2], _rounded(prefix))
        self.prefix_positions = (self.columns[:prefix] - prefix + self.length[:places, None])[:, None]

    def look(self, rows: int, oldest: int) -> None:
        """Determine where the next step's keys and values go, and what each row sees.

        Args:
            rows: the number of rows in use.
            oldest: tokens of the longest suffix so far.
        """
        position, self.length_of_row = self.position[:rows], self.age[:rows] + self.first
        needed = _rounded(oldest + self.first + 1, self.block)
        if needed > self.width or 2 * needed <= self.width:
            self._resize(rows, needed)
        self.newest = (self.newest + 1) % self.width
        self.prefix_bias: dict[int | None, torch.Tensor] = {}
        self.suffix_bias: dict[int | None, torch.Tensor] = {}
        # How many tokens each column is older than the newest.
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
        """Give the suffixes `width` columns, with the newest of the present ones first, in order of age."""
        kept = min(width, self.width)
        columns = (self.newest + 1 - kept + self.columns[:kept]) % self.width
        for layer in self.layers:
            layer.resize(rows, columns, width)
        self.width, self.newest = width, kept - 1


class CompiledLayer(SharedPrefixLayer):
    """The same for cpu_attention.py: a row's first token is in column 0, and nothing after its newest is read."""

    new = staticmethod(torch.Tensor.new_empty)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any):
        return key_states, value_states  # the attention stores them


class CompiledCache(SharedPrefixCache):
    """Prefixes and suffixes for cpu_attention.py. The first `width` of the suffixes' columns are in use."""

    layer_class = CompiledLayer

    def growth(self, tokens: int, device: torch.device) -> int:
        return tokens  # all at once: cpu_attention does not need dense memory

    def seat(self, place_of_row: Sequence[int], places: int, prefix: int, device: torch.device) -> None:
        self.rows = cpu_attention.Rows(place_of_row, places)

    def look(self, rows: int, oldest: int) -> None:
        self.width = oldest + 1


def _rounded(tokens: int, to: int = 16) -> int:
    """Rounded up to whole vectors: PyTorch's CPU kernels take up to 8 times as long for 15 numbers as for 16."""
    return -(-tokens // to) * to


def _resized(states: torch.Tensor, rows: int, kept: torch.Tensor, width: int) -> torch.Tensor:
    """[rows, heads, width, dimension] in the memory of `states`, with the `kept` columns of its first rows first.

    The rest is arbitrary but finite: memory that was never written holds zeros.
    """
    (most, heads, _, size), first = states.shape, states[:rows, :, kept]
    resized = states.as_strided((most, heads, width, size), (heads * width * size, width * size, size, 1))
    resized[:rows, :, : len(kept)] = first
    return resized


def _bias(hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, HIDDEN)
