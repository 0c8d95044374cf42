"""Memory: the bytes that draws under way take, and how many may be under way at once."""

from collections.abc import Sequence
from typing import Any

from rsft_pipeline import devices
from rsft_pipeline.decoding.draws import Draw, Shape
from rsft_pipeline.models import configuration

# Rows that keep the processor's matrix units busy; draws at once, where memory would hold more: those that go on
# together need fewer rows than they are; and their share of the memory that is free, which on a CPU is everyone's.
ROWS = {"cpu": 256, "cuda": 1024}
DRAWS = {"cpu": 4096, "cuda": 1024}
SHARE = {"cpu": 0.5, "cuda": 0.9}
PREFILL_TOKENS = 8192  # most tokens of prompts read in one forward pass, whose own memory is not counted below


def state_bytes(model: Any, tokens: int) -> int:
    """Bytes that keys and values of `tokens` tokens take, over all layers: 2 · layers · heads · dimension · size.

    A draw costs those of its longest completion, a prompt those of its tokens, whatever its draws.
    Of an encoder-decoder only the decoder's layers keep any: a prompt's are those it attends to.
    """
    config = model.config.get_text_config(decoder=True)
    each = config.per_layer_config if config.is_heterogeneous else [config] * configuration.depth_of(config)
    return 2 * sum(map(_width, each)) * model.dtype.itemsize * tokens


def _width(layer: Any) -> int:
    """Numbers in a token's key, over all heads, by the configuration of a layer."""
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    return heads * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def draws_at_once(model: Any, draws: Sequence[Draw], shape: Shape) -> int:
    """Draws that free memory holds, each on a row of its own: suffixes, a share of two prefixes per prompt, logits."""
    device = model.device.type
    longest = max(len(draw.prompt_ids) for draw in draws)
    of_a_prompt = len(draws) / len({draw.prompt_ids for draw in draws})
    number = model.dtype.itemsize + 4 * 4  # as computed, and in four arrays of choose() in float32
    logits = configuration.vocabulary_of(model.config) * number
    each = state_bytes(model, shape.max_tokens) + 2 * state_bytes(model, longest) / of_a_prompt + logits
    free = devices.memory(devices.Device(device, "float32"))["free"]
    return max(1, min(DRAWS[device], int(SHARE[device] * free / each)))
