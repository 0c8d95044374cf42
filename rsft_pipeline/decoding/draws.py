"""Draws: what is asked of a model, what it returns, and how each token is chosen.

Belongs here: the distribution sampled from, and the random numbers. Not: where the logits come from (the loops beside
this file, and tasks/classification.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Draw:
    """One draw to make: its prompt's token ids and the seed of its own random stream."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Drawn:
    """One draw made. `token_ids` end with the stop token if it stopped by itself."""

    token_ids: list[int]
    stopped: bool
    log_q: float  # sum of log-probabilities under the distribution sampled from
    log_p: float  # the same under the model itself: temperature 1, untruncated


@dataclass(frozen=True)
class Shape:
    """What shapes the distribution sampled from."""

    temperature: float
    top_p: float
    top_k: int | None
    max_tokens: int
    stop_ids: frozenset[int]


def check_number(model: Any, log_q: float) -> None:
    """Raise RuntimeError if log q is not finite: the model's logits are broken, and so is what was drawn from them."""
    if not math.isfinite(log_q):
        raise RuntimeError(
            f"the logits of {type(model).__name__} in {model.dtype} are not numbers: its weights are broken, or "
            "overflow in that format, or `sampling.temperature` is too small for them"
        )


# --- choosing a token -------------------------------------------------------------------------


def choose(logits: Any, row: Any, u: Any, shape: Shape) -> tuple[Any, Any, Any]:
    """One token for each draw, by inverting its row's distribution function at the draw's own uniform number.

    Args:
        logits: [rows, vocabulary].
        row: each draw's row of the logits, int64 [draws].
        u: [draws], in [0, 1).

    Returns:
        Token ids, log q and log p, each [draws].
    """
    import torch

    if shape.top_p < 1.0 or shape.top_k is not None:
        chosen, log_q = _choose_truncated(logits.float() / shape.temperature, row, u, shape)
    else:
        scores = logits if shape.temperature == 1.0 else logits.float() / shape.temperature
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
        chosen = _invert(weights, row, u)
        log_q = weights[row, chosen].log()
        if scores is logits:
            return chosen, log_q.double(), log_q.double()
    log_p = logits[row, chosen].float() - softmax(logits)[1][row, 0]
    return chosen, log_q.double(), log_p.double()


def softmax(scores: Any) -> tuple[Any, Any]:
    """softmax(scores) in float32, and log Σ exp(scores) as [..., 1], over the last dimension.

    The largest weight is exp(largest score) / Σ exp(scores), so two cheap maxima give the logarithm of
    the sum without a second pass of exponentials.
    """
    import torch

    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    return weights, scores.amax(-1, keepdim=True).float() - weights.amax(-1, keepdim=True).log()


def _choose_truncated(logits: Any, row: Any, u: Any, shape: Shape, k: int = 128) -> tuple[Any, Any]:
    """Token ids and log q of each draw, with only the most probable tokens kept.

    Args:
        k: tokens looked at first if only top-p applies. Nearly always they are enough, and sorting
            the whole vocabulary costs more than everything else in a step.
    """
    import torch

    k = min(shape.top_k or k, logits.shape[-1])
    best, order = logits.topk(k, dim=-1)  # sorted, most probable first
    if shape.top_p < 1.0:
        # With top-k, probabilities are renormalised over the k; without it, over the whole vocabulary.
        probabilities = (best - softmax(best if shape.top_k else logits)[1]).exp()
        before = probabilities.cumsum(-1) - probabilities
        short = before[:, -1] + probabilities[:, -1] < shape.top_p
        best = best.masked_fill(before >= shape.top_p, -torch.inf)
    weights, _ = softmax(best)
    place = _invert(weights, row, u)
    chosen, log_q = order[row, place], weights[row, place].log()
    if shape.top_k is None and k < logits.shape[-1] and short.any():
        again, among = short[row], short.cumsum(0) - 1
        chosen[again], log_q[again] = _choose_truncated(
            logits[short], among[row[again]], u[again], shape, logits.shape[-1]
        )
    return chosen, log_q


BLOCK = 64


def _invert(weights: Any, row: Any, u: Any) -> Any:
    """Index at which the cumulative weight of each draw's row first exceeds u · total; never one of weight 0.

    First the block of entries is found, then the entry in the block: two short cumulative sums in
    float64 instead of one over the whole vocabulary.

    Args:
        weights: [rows, entries], not negative, not all 0.
        row: each draw's row of the weights, int64 [draws].
        u: float64 [draws], in [0, 1).
    """
    import torch

    rows, entries = weights.shape
    if entries <= BLOCK:
        return _first_above(weights.double()[row], u)[0]
    if entries % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -entries % BLOCK))
    blocks = weights.view(rows, -1, BLOCK)
    block, rest = _first_above(blocks.sum(-1).double()[row], u)
    return block * BLOCK + _first_above(blocks[row, block].double(), rest)[0]


def _first_above(weights: Any, u: Any) -> tuple[Any, Any]:
    """Index of the first entry whose cumulative weight exceeds u · total, and where within the entry that falls.

    An entry of weight 0 is never found, however the sums are rounded: it is skipped, and u · total is
    kept below the largest sum.
    """
    import torch

    sums = weights.cumsum(-1).masked_fill(weights <= 0, -1.0)
    top = sums.amax(-1)
    target = torch.minimum(u * top, torch.nextafter(top, torch.zeros_like(top)))
    index = (sums > target[:, None]).byte().argmax(-1)
    weight, below = (each.gather(-1, index[:, None])[:, 0] for each in (weights, sums))
    inside = (target - (below - weight)) / weight
    return index, inside.clamp(0.0, 1.0 - 2.0**-53)


def uniforms(seeds: Sequence[int], steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), [seeds, steps]: each seed's from its own counter-based (Philox) stream.

    The same as `Generator(Philox(key=seed)).random(steps)`, but one generator is given each key in turn: a new one
    asks the system for entropy first, which took a third of the time of drawing short answers.
    """
    stream = np.random.Philox(key=0)
    generator, state = np.random.Generator(stream), stream.state
    numbers = np.empty((len(seeds), steps))
    for row, seed in zip(numbers, seeds, strict=True):
        state["state"]["key"][:] = seed, 0
        stream.state = state
        generator.random(out=row)
    return numbers
