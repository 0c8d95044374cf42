"""Shared-encoder decoding: a prompt is encoded once, and all its draws attend to that one encoding.

Belongs here: what shared_prefix.py's loop needs for an encoder-decoder. The *prefix* of a prompt is
then what the decoder's cross-attention reads, the keys and values of the encoder's states; a row's
*suffix* is the decoder's own, and begins with the start token. Not: the loop itself (shared_prefix.py),
attention over prefix and suffix (attention.py), what a draw is and how a token is chosen (draws.py).

Rows of different age share a batch. Models take a token's position from the length of their cache;
ours gives each row its own, which T5's relative bias and BART's position embeddings both follow.

Not supported: tokens that `generate` would force, such as the language that mBART begins with; draws
are from the model's own distribution after its start token.

This module imports torch and transformers; import it inside functions.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch  # noqa: TID253
from transformers import AttentionInterface, AttentionMaskInterface, EncoderDecoderCache, PreTrainedModel  # noqa: TID253
from transformers.cache_utils import Cache, DynamicLayer  # noqa: TID253
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: TID253
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput  # noqa: TID253

from rsft_pipeline.decoding import shared_prefix
from rsft_pipeline.decoding.attention import Unsupported, attention_of, mask, over_prefix, over_suffix
from rsft_pipeline.decoding.cache import SharedPrefixCache, SharedPrefixLayer
from rsft_pipeline.decoding.draws import Draw, Drawn, Shape
from rsft_pipeline.models import configuration
from rsft_pipeline.padding import right_padded

NAME = "rsft_shared_encoder"

# Families whose decoders were compared with a plain forward pass, row by row (tests/test_seq2seq.py).
FAMILIES = {"t5", "mt5", "umt5", "bart", "mbart", "plbart", "marian", "pegasus", "blenderbot"}


# --- what is kept -----------------------------------------------------------------------------


class SharedEncoderLayer(SharedPrefixLayer):
    """As in cache.py, but column 0 of a prefix holds the decoder's own key and value of the start token."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any):
        """Store the rows' newest keys and values, each [rows, heads, 1, dimension].

        Returns:
            The same, expanded to the length of the suffixes: T5 makes its bias as wide as the keys it is given.
        """
        super().update(key_states, value_states)
        width = self.cache.width
        return key_states.expand(-1, -1, width, -1), value_states.expand(-1, -1, width, -1)

    def get_seq_length(self) -> torch.Tensor:
        return self.cache.length_of_row[:, None]  # each row's own


class SharedEncoderCache(SharedPrefixCache):
    """Encodings and suffixes of all layers of the decoder."""

    first = 1  # after the start token
    layer_class = SharedEncoderLayer

    def __init__(self, layers: int, places: int, rows: int, longest: int, tokens: int, device: torch.device):
        super().__init__([None] * layers, places, rows, longest + 1, tokens, device)  # one more for the start token
        self.cross = Cache(layers=[DynamicLayer() for _ in self.layers])

    def keep_prefixes(self, places: slice, read: EncoderDecoderCache, lengths: Sequence[int]) -> None:
        """Keep a batch of prompts of these lengths, padded on the right."""
        self.length[places] = torch.tensor(lengths, device=self.length.device)
        own, cross = read.self_attention_cache.layers, read.cross_attention_cache.layers
        for layer, start, source in zip(self.layers, own, cross, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            for kept, beginning, states in (
                (layer.prefix_keys[places].transpose(-1, -2), start.keys, source.keys),
                (layer.prefix_values[places], start.values, source.values),
            ):
                kept[:, :, :1] = beginning
                for row, length in enumerate(lengths):
                    kept[row, :, self.sizes[2] - length :] = states[row, :, :length]

    def begin(self, rows: slice, places: list[int]) -> None:
        super().begin(rows, places)
        for layer in self.layers:
            layer.keys[rows, :, self.newest] = layer.prefix_keys[places, ..., 0]
            layer.values[rows, :, self.newest] = layer.prefix_values[places, :, 0]

    def seat(self, place_of_row: Sequence[int], places: int, prefix: int, device: torch.device) -> None:
        super().seat(place_of_row, places, prefix, device)
        for layer, cross in zip(self.layers, self.cross.layers, strict=True):
            cross.keys = layer.prefix_keys[:places, ..., -self.prefix :].transpose(-1, -2)
            cross.values = layer.prefix_values[:places, :, -self.prefix :]
            cross.is_initialized = True

    def look(self, rows: int, oldest: int) -> None:
        super().look(rows, oldest)
        self.merged: tuple[torch.Tensor | None, torch.Tensor] = (None, self.suffix_bias[None])

    def own_bias(self, position_bias: torch.Tensor | None) -> torch.Tensor:
        """What is added to the scores over the suffixes: the mask, and the model's bias by distance.

        Args:
            position_bias: [1, heads, rows, positions], or None. T5 passes the same to all layers, so the sum is kept.

        Returns:
            [rows, heads or 1, 1, columns].
        """
        if position_bias is not self.merged[0]:
            by_row = position_bias.permute(2, 1, 0, 3)
            position = (self.length_of_row[:, None] - self.distance).clamp(min=0)  # of each column's token
            by_column = by_row.gather(-1, position[:, None, None].expand(*by_row.shape))
            self.merged = (position_bias, by_column + self.suffix_bias[None])
        return self.merged[1]


# --- attention --------------------------------------------------------------------------------


def shared_encoder_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    shared_prefix: SharedEncoderCache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token of each row to its prompt's encoding, or to its own suffix.

    Without `shared_prefix`, prompts are being read, with Transformers' SDPA.

    Args:
        query: [rows, heads, 1, dimension].
        key: what the layer of `cross` holds, or what `update` returned; value likewise.
        position_bias: for the suffix [1, heads, rows, positions]; that of cross-attention is 0.

    Returns:
        [rows, 1, heads, dimension], and no weights.
    """
    if shared_prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, position_bias=position_bias, **kwargs
        )
    cache, layer = shared_prefix, shared_prefix.layers[module.layer_idx]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = query * scaling
    query = query.view(query.shape[0], query.shape[1], 1, -1)
    if key is cache.cross.layers[module.layer_idx].keys:
        found, _ = over_prefix(query, layer)
    else:
        found, _ = over_suffix(query, layer, cache.own_bias(position_bias))
    return found.view(len(query), 1, query.shape[1], -1), None


AttentionInterface.register(NAME, shared_encoder_attention)
AttentionMaskInterface.register(NAME, mask)


@contextlib.contextmanager
def _own_positions(model: PreTrainedModel) -> Iterator[None]:
    """Make the decoder's position embeddings, if it has any, [rows, 1, dimension] for a single token.

    Models expect one position for all rows of a batch, and add a dimension for the rows.
    """
    embedding = getattr(model.get_decoder(), "embed_positions", None)
    if embedding is None:
        yield
        return
    hook = embedding.register_forward_hook(lambda module, inputs, output: output.reshape(-1, 1, output.shape[-1]))
    try:
        yield
    finally:
        hook.remove()


# --- the loop ---------------------------------------------------------------------------------


def draw(
    model: Any, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int, at_once: int
) -> Iterator[tuple[int, Drawn]]:
    """Make the draws, at most `at_once` at a time: number and result of each, in the order in which they end.

    Raises:
        Unsupported: the model's family is not in FAMILIES.
    """
    if model.config.model_type not in FAMILIES:
        raise Unsupported(f"its attention was compared with no {model.config.model_type}'s")
    loop = Loop(model, draws, shape, pad_id, at_once)
    with attention_of(model, NAME), _own_positions(model), contextlib.closing(loop.cache):
        yield from loop.run()


class Loop(shared_prefix.Loop):
    """The loop of shared_prefix.py for an encoder-decoder."""

    def _cache(self, longest: int) -> SharedEncoderCache:
        layers = configuration.depth_of(self.model.config)
        tokens = max(1, self.shape.max_tokens - 1)
        return SharedEncoderCache(layers, self.places, self.capacity, longest, tokens, self.device)

    def _logits(self, rows: int) -> torch.Tensor:
        # Models pass on a mask of four dimensions unchanged, and our attention needs none.
        no_mask = torch.empty(0, 0, 0, 0, device=self.device)
        return self.model(
            encoder_outputs=BaseModelOutput(torch.empty(rows, 0, 0, device=self.device)),  # is in the cache already
            attention_mask=no_mask,
            decoder_input_ids=self.token[:rows, None],
            decoder_attention_mask=no_mask,
            past_key_values=EncoderDecoderCache(self.cache, self.cache.cross),
            use_cache=True,
            shared_prefix=self.cache,
        ).logits[:, -1]

    def _forward(self, prompts: Sequence[tuple[int, ...]]) -> tuple[EncoderDecoderCache, torch.Tensor]:
        out, _ = read(self.model, prompts, self.pad_id)
        return out.past_key_values, out.logits[:, -1]


def read(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Seq2SeqLMOutput, torch.Tensor]:
    """The model's output at the start token for each prompt, and the prompts' mask, [prompts, longest].

    Prompts are padded on the right, because an encoder may count its positions from the left.
    """
    ids = right_padded(prompts, pad_id).to(model.device)
    mask = right_padded([[1] * len(prompt) for prompt in prompts], 0).to(model.device)
    start = torch.full((len(prompts), 1), configuration.start_id(model), device=model.device)
    return model(input_ids=ids, attention_mask=mask, decoder_input_ids=start, use_cache=True), mask
