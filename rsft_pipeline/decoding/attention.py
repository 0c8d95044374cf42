"""Attention of rows to the prefix of their prompt and to their own suffix, for models in Transformers' own code.

It is the sum of the two parts, each normalised separately and weighted by its share of the normaliser (the
log-sum-exp merge of FlashAttention, Dao et al. 2022; prefixes are shared in this way in Hydragen, Juravsky et al.
2024). For the prefix, the queries of all rows of a prompt are multiplied with its keys in one matrix product. On a
CPU a compiled version may do all this (cpu_attention.py).

Belongs here: the function that models call through `AttentionInterface`, and which models it serves. Not: what is
attended to (cache.py).

This module imports torch and transformers; import it inside functions.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch  # noqa: TID253
from transformers import (  # noqa: TID253
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # noqa: TID253
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: TID253
from transformers.masking_utils import sdpa_mask  # noqa: TID253

from rsft_pipeline.decoding import cpu_attention
from rsft_pipeline.decoding.cache import CompiledCache, SharedPrefixCache, SharedPrefixLayer

NAME = "rsft_shared_prefix"
# Arguments that models pass to their attention function and that do not change its result for a single query.
UNHEEDED = {"dropout", "is_causal", "position_ids", "sliding_window", "use_cache", "cache_position"}
UNHEEDED |= {"output_attentions", "output_router_logits"}


class Unsupported(Exception):
    """The model's attention is not one that this module computes."""


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

    Without `shared_prefix`, a prompt is being read, with Transformers' SDPA.

    Args:
        query: [rows, query heads, 1, dimension].
        key: [rows, heads, 1, dimension], and value likewise: the newest token's, as `update` returned them.

    Returns:
        [rows, 1, query heads, dimension], and no weights.

    Raises:
        Unsupported: the model asks for something other than softmax(scaling · q kᵀ) v.
    """
    if others := sorted(name for name, given in kwargs.items() if given is not None and name not in UNHEEDED):
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
        query: scaled, [rows, heads, queries per head, dimension].
        bias: added to the scores, broadcast to [rows, heads, queries per head, columns].

    Returns:
        The weighted values, shaped like the query, and the logarithm of their normaliser, [..., 1].
    """
    keys, values = layer.keys[: len(query)], layer.values[: len(query)]
    return _weighted((query @ keys.transpose(-1, -2)).add_(bias), values)


def over_prefix(query: torch.Tensor, layer: SharedPrefixLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for each row and its prompt's prefix: the queries of all rows of a prompt in one product."""
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
    # e⁻⁸⁰ of the largest weight is negligible; numbers that underflow would take a CPU twenty times as long.
    weights = scores.float().sub_(most).clamp_(min=-80).exp_()
    total = weights.sum(-1, keepdim=True)
    return (weights.to(values.dtype) @ values).div_(total), most + total.log()


def mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Transformers' mask for SDPA when prompts are read; a step of single tokens needs none."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, mask)


@contextlib.contextmanager
def attention_of(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Use our attention function in the model, and afterwards its own again."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def windows(model: Any) -> list[int | None]:
    """Sliding window of each of the model's layers; None for a layer without one.

    Raises:
        Unsupported: the model does something that this module does not compute; the message says what.
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
