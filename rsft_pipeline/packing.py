"""Packing: rows of tokens computed together without padding, and their common prefixes computed once.

Belongs here: which positions of some rows are the same, and the forward pass that computes each only
once. Not: what the rows are and what is made of the logits (tasks/causal.py).

A causal model's states at a position depend only on the tokens up to there. Rows with a common prefix
therefore have the same states in it, and the positions of a batch are the *nodes* of a prefix tree: samples of
one prompt share the prompt's nodes, all samples those of a chat template. Everything in the model except
attention works token by token, and gets the nodes as one row, without padding. Attention gets the rows: it
gathers their queries, keys and values from the nodes, and takes each node's result from the first row that has
it. There is no mask through which one row could see another.

A node that several rows share has one dropout mask for all of them.

This module imports torch and transformers; import it inside functions.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch  # noqa: TID253
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: TID253
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: TID253

from rsft_pipeline.decoding.attention import UNHEEDED, Unsupported, attention_of, windows
from rsft_pipeline.models import configuration

NAME = "rsft_packing"
PADDING = 1.25  # largest ratio of the longest to the shortest row that attention computes as one batch


def tree(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The prefix tree of rows of token ids.

    Returns:
        `nodes`, int64 [rows, longest]: the node at each position, and -1 after a row's end; and `first`,
        int64 [nodes]: the first position of each node, in the flattened rows.
    """
    longest = max(map(len, rows))
    nodes = torch.full((len(rows), longest), -1)
    first: list[int] = []
    order = sorted(range(len(rows)), key=rows.__getitem__)  # rows with common prefixes become neighbours
    for i, row in enumerate(order):
        above, length = order[i - 1], len(rows[row])
        shared = _alike(rows[above], rows[row]) if i else 0
        nodes[row, :shared] = nodes[above, :shared]
        nodes[row, shared:length] = torch.arange(len(first), len(first) + length - shared)
        first += range(row * longest + shared, row * longest + length)
    return nodes, torch.tensor(first)


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def logits(
    model: Any, input_ids: torch.Tensor, nodes: torch.Tensor, first: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Logits of the next token at some nodes: [wanted, vocabulary].

    Args:
        input_ids: int64 [rows, longest], padded on the right.
        nodes, first: their tree.
        wanted: int64 [wanted], nodes.

    Raises:
        Unsupported: the model does something that cannot be computed this way; the message says what.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    longest = nodes.shape[1]
    if any(window is not None and window < longest for window in windows(inner)):
        raise Unsupported("its window is narrower than the longest row")
    inputs = {
        "input_ids": input_ids.flatten()[first][None],
        "position_ids": (first % longest)[None] + configuration.first_position(inner.config),
        "use_cache": False,
        "packing": _bands(nodes, first),
    }
    with attention_of(inner, NAME):
        if "logits_to_keep" in inspect.signature(inner.forward).parameters:
            return model(**inputs, logits_to_keep=wanted).logits[0]
        return model(**inputs).logits[0, wanted]


class Bands(NamedTuple):
    """Rows for attention, in bands of similar length, each padded on the right to its longest."""

    nodes: list[torch.Tensor]  # int64 [rows, longest] of each band; an arbitrary node after a row's end
    first: torch.Tensor  # int64 [nodes]: the first position of each node, in the bands' flattened rows


def _bands(nodes: torch.Tensor, first: torch.Tensor) -> Bands:
    lengths = (nodes >= 0).sum(dim=1).tolist()
    bands: list[list[int]] = []
    begins, end = [0] * len(lengths), 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not bands or lengths[bands[-1][0]] > PADDING * lengths[row]:
            bands.append([])
        bands[-1].append(row)
        begins[row] = end
        end += lengths[bands[-1][0]]
    row, column = first // nodes.shape[1], first % nodes.shape[1]
    return Bands(
        [nodes[band, : lengths[band[0]]].clamp(min=0) for band in bands],
        torch.tensor(begins, device=nodes.device)[row] + column,
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Bands | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each node over its row up to it, by Transformers' SDPA.

    Args:
        query: [1, query heads, nodes, dimension]; key and value likewise.

    Returns:
        [1, nodes, query heads, dimension], and no weights.

    Raises:
        Unsupported: the model asks for something other than softmax(scaling · q kᵀ) v.
    """
    if others := sorted(k for k, given in kwargs.items() if given is not None and k not in UNHEEDED):
        raise Unsupported(f"its attention takes {', '.join(others)}")
    if attention_mask is not None:
        raise Unsupported("its attention takes a mask of its own")
    if packing is None:
        raise Unsupported("its layers do not hand on what its attention needs to know")
    flat = [states[0].transpose(0, 1) for states in (query, key, value)]  # [nodes, heads, dimension]
    results = []
    for nodes in packing.nodes:
        rows = [states.index_select(0, nodes.flatten()).unflatten(0, nodes.shape).transpose(1, 2) for states in flat]
        result, _ = sdpa_attention_forward(module, *rows, None, dropout=dropout, scaling=scaling, is_causal=True)
        results.append(result.flatten(0, 1))
    return torch.cat(results).index_select(0, packing.first)[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, lambda **_: None)
