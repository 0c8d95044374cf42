"""The attention of attention.py on a CPU, compiled: one pass over memory instead of one operation after another.

Belongs here: how cpu_attention.c is called. Not: what is kept (cache.py), nor the same in PyTorch's operations
(attention.py), which runs on other devices, in other precisions, without AVX-512, and if the C file was not compiled.
Installing the project compiles it if there is a C compiler.

This module imports torch; import it inside functions.
"""

import ctypes
import functools
import importlib.util
import logging
from collections.abc import Sequence

import numpy as np
import torch  # noqa: TID253

log = logging.getLogger(__name__)

BLOCK = 16  # the most rows of a prompt that one thread takes at once
WHOLE = "heads group key_size value_size longest columns window"
ARRAYS = "query key value prefix_keys prefix_values keys values length age out"


class _Shape(ctypes.Structure):  # as in the C file, like the next one
    _fields_ = (*((name, ctypes.c_int64) for name in WHOLE.split()), ("scaling", ctypes.c_float))


class _Arrays(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ARRAYS.split())


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("rsft_pipeline.decoding._cpu_attention")
    if found is None or found.origin is None:
        log.info("drawing on the CPU is slower than it could be: cpu_attention.c was not compiled at installation")
        return None
    try:
        library = ctypes.CDLL(found.origin)
    except OSError as error:  # compiled on another machine
        log.warning("drawing on the CPU is slower than it could be: %s; install the project again", error)
        return None
    pointer, structure = ctypes.c_void_p, ctypes.POINTER
    library.attend.argtypes = (
        *(structure(_Shape), structure(_Arrays), pointer, ctypes.c_int64, pointer, ctypes.c_int, pointer),
    )
    library.attend.restype = None
    library.scratch_of.argtypes, library.scratch_of.restype = (structure(_Shape),), ctypes.c_int64
    return library


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this module serves keys and values of this kind.

    It needs registers that hold a whole vector of the C file: with half as wide ones, PyTorch is twice as fast.
    """
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return device.type == "cpu" and dtype == torch.float32 and wide and _library() is not None


class Rows:
    """Which rows belong to which prompt, in blocks that threads take in turn."""

    def __init__(self, place_of_row: Sequence[int], places: int):
        owner = np.asarray(place_of_row)
        self.order = np.argsort(owner, kind="stable").astype(np.int64)
        ends = np.cumsum(np.bincount(owner, minlength=places))
        self.blocks = np.array(
            [
                (place, first, min(first + BLOCK, end))
                for place, end in enumerate(ends)
                for first in range(ends[place - 1] if place else 0, end, BLOCK)
            ],
            dtype=np.int64,
        )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefixes: tuple[torch.Tensor, torch.Tensor],
    suffixes: tuple[torch.Tensor, torch.Tensor],
    rows: Rows,
    length: torch.Tensor,
    age: torch.Tensor,
    window: int | None,
    scaling: float,
) -> torch.Tensor:
    """Store the newest token of each row at the end of its suffix, and attend to the row's prefix and suffix.

    All tensors are float32 except `length` and `age`.

    Args:
        query: [rows, query heads, 1, dimension].
        key: [rows, heads, 1, dimension], and value likewise.
        prefixes: keys [places, heads, dimension, longest], aligned right, and values [places, heads, longest,
            dimension]; longest is a multiple of 16.
        suffixes: keys and values [rows, heads, columns, dimension], each row's first token in column 0.
        length: tokens of each place's prompt, int64 [places].
        age: tokens of each suffix before this one, int64 [rows].
        window: how many tokens are visible, including the newest; None for all.

    Returns:
        softmax(scaling · q kᵀ) v, [rows, 1, query heads, dimension].

    Raises:
        TypeError: the model computes in another precision than float32.
    """
    if {query.dtype, key.dtype, value.dtype} != {torch.float32}:
        raise TypeError(f"attention of {query.dtype} queries to {key.dtype} keys, where float32 was expected")
    (prefix_keys, prefix_values), (keys, values) = prefixes, suffixes
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = query.new_empty(len(query), 1, query.shape[1], value.shape[3])
    shape = _Shape(
        heads=key.shape[1],
        group=query.shape[1] // key.shape[1],
        key_size=key.shape[3],
        value_size=value.shape[3],
        longest=prefix_keys.shape[3],
        columns=keys.shape[2],
        window=window or 0,
        scaling=scaling,
    )
    tensors = query, key, value, prefix_keys, prefix_values, keys, values, length, age, out
    arrays, blocks = _Arrays(*map(torch.Tensor.data_ptr, tensors)), rows.blocks
    library, threads = _library(), torch.get_num_threads()
    scratch = query.new_empty(threads, library.scratch_of(shape))
    library.attend(shape, arrays, blocks.ctypes.data, len(blocks), rows.order.ctypes.data, threads, scratch.data_ptr())
    return out
