"""Memory: how many bytes the draws in progress take, and how many may be in progress at once."""

from collections.abc import Sequence
from typing import Any

from rsft_pipeline import devices
from rsft_pipeline.decoding.draws import Draw, Shape
from rsft_pipeline.models import configuration

# ROWS keep the processor's matrix units busy. DRAWS is the most at once, even if memory would hold more; draws that
# share rows need fewer rows than there are draws. SHARE of the free memory is used; a CPU's belongs to everyone.
ROWS = {"cpu": 256, "cuda": 1024}
DRAWS = {"cpu": 4096, "cuda": 1024}
SHARE = {"cpu": 0.5, "cuda": 0.9}
PREFILL_TOKENS = 8192  # most prompt tokens in one forward pass, whose own memory is not counted below


def state_bytes(model: Any, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens, over all layers: 2 · layers · heads · dimension · size.

    A draw needs those of its longest possible completion, a prompt those of its tokens, however many draws it has.
    In an encoder-decoder only the decoder's layers keep any; a prompt's are those of cross-attention.
    """
    config = model.config.get_text_config(decoder=True)
    each = config.per_layer_config if config.is_heterogeneous else [config] * configuration.depth_of(config)
    return 2 * sum(map(_width, each)) * model.dtype.itemsize * tokens


def _width(layer: Any) -> int:
    """Numbers in a token's key, over all heads, from a layer's configuration."""
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    return heads * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def draws_at_once(model: Any, draws: Sequence[Draw], shape: Shape) -> int:
    """How many draws free memory holds: each with its own suffix and logits, and a share of two prefixes per prompt."""
    device = model.device.type
    longest = max(len(draw.prompt_ids) for draw in draws)
    of_a_prompt = len(draws) / len({draw.prompt_ids for draw in draws})
    number = model.dtype.itemsize + 4 * 4  # as computed, and in four arrays of choose() in float32
    logits = configuration.vocabulary_of(model.config) * number
    each = state_bytes(model, shape.max_tokens) + 2 * state_bytes(model, longest) / of_a_prompt + logits
    free = devices.memory(device)["free"]
    return max(1, min(DRAWS[device], int(SHARE[device] * free / each)))
