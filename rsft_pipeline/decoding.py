"""Decoding: many draws of token ids from a causal language model, with their log-probabilities.

Each row's randomness is its own stream, fixed by its seed, so a draw does not depend on which other
rows share its batch (beyond the rounding of the matrix products). Each prompt is read once, however
many rows draw from it; finished rows leave the batch.

Left out on purpose: beam search, penalties and everything else that is not a draw from a stated
distribution; `log_q` could not be given for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """One draw to make: its prompt's token ids and the seed of its own random stream."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Drawn:
    """One draw made. `token_ids` end with the stop token where the row stopped by itself."""

    token_ids: list[int]
    stopped: bool
    log_q: float  # sum of log-probabilities under the distribution sampled from
    log_p: float  # the same under the model as it is: temperature 1, nothing cut off


@dataclass(frozen=True)
class Shape:
    """What shapes the distribution sampled from."""

    temperature: float
    top_p: float
    top_k: int | None
    max_tokens: int
    stop_ids: frozenset[int]


def decode(model: Any, rows: Sequence[Row], shape: Shape, pad_id: int) -> list[Drawn]:
    """Draw one completion for each row, in the order of the rows.

    Args:
        model: a causal language model of Transformers, in evaluation mode.
        rows: the batch; rows of the same prompt share its prefill.
        shape: temperature, top-k, top-p (applied in this order, as in Transformers), length, stops.
        pad_id: any valid token id, for padding that is masked.
    """
    import torch

    with torch.inference_mode():
        return _decode(model, rows, shape, pad_id)


def _decode(model: Any, rows: Sequence[Row], shape: Shape, pad_id: int) -> list[Drawn]:
    import torch
    from transformers import DynamicCache

    device = model.device
    prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for i, prompt in enumerate(prompts):  # padded on the left, so that the next token follows the last
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    mask = mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = model(
        input_ids=ids.to(device), attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    ).logits[:, -1]

    owner = torch.tensor([number[row.prompt_ids] for row in rows], device=device)
    cache.batch_select_indices(owner)
    logits, mask, position = logits[owner], mask[owner], positions[owner, -1]
    u = torch.from_numpy(uniforms([row.seed for row in rows], shape.max_tokens)).to(device)
    stops = torch.tensor(sorted(shape.stop_ids), device=device)

    tokens = torch.full((len(rows), shape.max_tokens), pad_id, device=device)
    lengths = torch.full((len(rows),), shape.max_tokens, device=device)
    stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
    log_q = torch.zeros(len(rows), dtype=torch.float64, device=device)
    log_p = torch.zeros(len(rows), dtype=torch.float64, device=device)
    alive = torch.arange(len(rows), device=device)
    for step in range(shape.max_tokens):
        chosen, step_q, step_p = choose(logits, u[alive, step], shape)
        tokens[alive, step] = chosen
        log_q[alive] += step_q
        log_p[alive] += step_p
        ended = torch.isin(chosen, stops)
        stopped[alive[ended]] = True
        lengths[alive[ended]] = step + 1
        if ended.any():
            keep = (~ended).nonzero().squeeze(-1)
            if not len(keep):
                break
            cache.batch_select_indices(keep)
            alive, chosen, mask, position = alive[keep], chosen[keep], mask[keep], position[keep]
        if step + 1 == shape.max_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        position = position + 1
        logits = model(
            input_ids=chosen[:, None], attention_mask=mask, position_ids=position[:, None], past_key_values=cache
        ).logits[:, -1]
    return [
        Drawn(row[:n], bool(end), q, p)
        for row, n, end, q, p in zip(
            tokens.tolist(), lengths.tolist(), stopped.tolist(), log_q.tolist(), log_p.tolist(), strict=True
        )
    ]


def choose(logits: Any, u: Any, shape: Shape) -> tuple[Any, Any, Any]:
    """One token for each row, by inverting the distribution function at the row's own uniform number.

    Args:
        logits: [rows, vocabulary].
        u: [rows], in [0, 1).

    Returns:
        Token ids, log q and log p, each [rows].
    """
    import torch

    raw = torch.log_softmax(logits.float(), dim=-1)
    if shape.temperature == 1.0 and shape.top_p == 1.0 and shape.top_k is None:
        chosen = _invert(raw.exp(), u)
        log_p = raw.gather(-1, chosen[:, None]).squeeze(-1)
        return chosen, log_p.double(), log_p.double()
    tempered = logits.float() / shape.temperature
    if shape.top_p == 1.0 and shape.top_k is None:
        log_q_all = torch.log_softmax(tempered, dim=-1)
        chosen = _invert(log_q_all.exp(), u)
        log_q = log_q_all.gather(-1, chosen[:, None]).squeeze(-1)
    else:
        k = min(shape.top_k or tempered.shape[-1], tempered.shape[-1])
        best, order = tempered.topk(k, dim=-1)  # sorted, most probable first
        log_q_best = torch.log_softmax(best, dim=-1)
        if shape.top_p < 1.0:
            before = log_q_best.exp().cumsum(-1) - log_q_best.exp()
            log_q_best = torch.log_softmax(best.masked_fill(before >= shape.top_p, -torch.inf), dim=-1)
        place = _invert(log_q_best.exp(), u)
        chosen = order.gather(-1, place[:, None]).squeeze(-1)
        log_q = log_q_best.gather(-1, place[:, None]).squeeze(-1)
    return chosen, log_q.double(), raw.gather(-1, chosen[:, None]).squeeze(-1).double()


def _invert(probabilities: Any, u: Any) -> Any:
    """Index of the first entry whose cumulative probability exceeds u; never one of probability 0."""
    import torch

    cumulative = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulative, (u * cumulative[:, -1].double()).to(cumulative.dtype)[:, None], right=True)
    last = (probabilities > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(place, last).squeeze(-1)


def uniforms(seeds: Sequence[int], steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), [rows, steps]: each row from its own counter-based (Philox) stream."""
    return np.stack([np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds])
