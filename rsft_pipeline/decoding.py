"""Decoding: many draws of token ids from a model that writes, with their log-probabilities.

Each row's randomness is its own stream, fixed by its seed, so a draw does not depend on which other
rows share its batch (beyond the rounding of the matrix products). Each prompt is read once, however
many rows draw from it (shared_prefix.py; shared_encoder.py for encoder-decoders), and rows that have
ended make room for others. Models whose attention cannot be shared so are drawn from by the plain loop
at the end of this file.

Left out on purpose: beam search, penalties and everything else that is not a draw from a stated
distribution; `log_q` could not be given for them.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsft_pipeline import devices

log = logging.getLogger(__name__)

# Tokens by which a model's shared prompts are tried, and nats per token by which these may be off what the plain loop
# gives: rounding is 1e-5 in float32 and a tenth in half precision, another attention whole nats.
TRIAL, TOLERANCE = 4, {"torch.float32": 0.01}
# Rows at once, where memory would hold more: enough to keep the processor's matrix units busy.
MOST_ROWS = {"cpu": 256, "cuda": 1024}


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


def decode(model: Any, rows: Sequence[Row], shape: Shape, pad_id: int, batch_rows: int | None = None) -> list[Drawn]:
    """Draw one completion for each row, in the order of the rows.

    Out of memory, it goes on with half as many rows at once; draws already made are kept.

    Args:
        model: a causal or an encoder-decoder language model of Transformers, in evaluation mode.
        rows: all draws to make; rows of the same prompt share its prefix.
        shape: temperature, top-k, top-p (applied in this order, as in Transformers), length, stops.
        pad_id: any valid token id, for padding that is masked.
        batch_rows: rows at once; default: as many as free memory holds, see `rows_at_once`.

    Raises:
        RuntimeError: when not even one row fits into memory.
    """
    import torch

    if not rows:
        return []
    made: dict[int, Drawn] = {}
    batch_rows = batch_rows or rows_at_once(model, rows, shape)
    with torch.inference_mode():
        while len(made) < len(rows):
            waiting = [(i, row) for i, row in enumerate(rows) if i not in made]
            try:
                for number, drawn in _loop(model, waiting, shape, pad_id, batch_rows):
                    made[number] = drawn
                continue
            except RuntimeError as error:
                if batch_rows == 1 or not _out_of_memory(error):
                    raise
            # Outside the handler: a traceback would keep the failed batch's tensors alive.
            batch_rows = min(batch_rows, len(waiting)) // 2 or 1
            devices.release(devices.Device(model.device.type, "float32"))
            log.warning("out of memory: going on with %d rows at once", batch_rows)
    return [made[i] for i in range(len(rows))]


def _loop(
    model: Any, draws: Sequence[tuple[int, Row]], shape: Shape, pad_id: int, batch_rows: int
) -> Iterator[tuple[int, Drawn]]:
    from rsft_pipeline import shared_encoder, shared_prefix

    shared = shared_encoder if model.config.is_encoder_decoder else shared_prefix
    longest = max((row for _, row in draws), key=lambda row: len(row.prompt_ids))
    try:
        _try(model, shared.draw, longest, min(TRIAL, shape.max_tokens), pad_id)
        yield from shared.draw(model, draws, shape, pad_id, batch_rows)
    except shared_prefix.Unsupported as reason:
        log.warning("%s: each draw keeps its own copy of the prompt, because %s", type(model).__name__, reason)
        for i in range(0, len(draws), batch_rows):
            yield from plain(model, draws[i : i + batch_rows], shape, pad_id)


_apart: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()  # model → what its trial gave


def _try(model: Any, draw: Callable, row: Row, tokens: int, pad_id: int) -> None:
    """Draw a few tokens, and compare their log-probability with the plain loop's: no list of families is complete.

    Raises:
        Unsupported: they differ, so the model does not attend as its shared prompts are attended to.
    """
    from rsft_pipeline.shared_prefix import Unsupported

    if model not in _apart:
        shape, twice = Shape(1.0, 1.0, None, tokens, frozenset()), [(0, row), (1, Row(row.prompt_ids, row.seed + 1))]
        drawn = [one for _, one in draw(model, twice, shape, pad_id, 2)]
        apart = [abs(one.log_p - _forced(model, row.prompt_ids, one.token_ids, pad_id)) for one in drawn]
        _apart[model] = float(np.max(apart)) / tokens  # one that is no number is the largest
    if not _apart[model] <= TOLERANCE.get(str(model.dtype), 0.25):
        raise Unsupported(f"its draws came out {_apart[model]:.2g} nats a token from what the model gives them")


def _out_of_memory(error: RuntimeError) -> bool:
    import torch

    said = str(error)  # of a CPU's allocator, on Windows and elsewhere
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in said or "can't allocate memory" in said


# --- memory -----------------------------------------------------------------------------------


def state_bytes(model: Any, tokens: int) -> int:
    """Bytes that keys and values of `tokens` tokens take, over all layers: 2 · layers · heads · dimension · size.

    A draw costs those of its longest completion, a prompt those of its tokens, whatever its draws.
    Of an encoder-decoder only the decoder's layers keep any: a prompt's are those it attends to.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dimension = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    return 2 * layers * heads * dimension * model.dtype.itemsize * tokens


def rows_at_once(model: Any, rows: Sequence[Row], shape: Shape) -> int:
    """Rows that free memory holds: their suffixes, their share of two prefixes per prompt, and their logits.

    A tenth of what is free is left alone.
    """
    device = model.device.type
    longest = max(len(row.prompt_ids) for row in rows)
    draws = len(rows) / len({row.prompt_ids for row in rows})
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    logits = vocabulary * (model.dtype.itemsize + 4 * 4)  # as computed, and four arrays of choose() in float32
    each = state_bytes(model, shape.max_tokens) + 2 * state_bytes(model, longest) / draws + logits
    free = devices.memory(devices.Device(device, "float32"))["free"]
    return max(1, min(MOST_ROWS[device], int(0.9 * free / each)))


# --- choosing a token -------------------------------------------------------------------------


def choose(logits: Any, u: Any, shape: Shape) -> tuple[Any, Any, Any]:
    """One token for each row, by inverting the distribution function at the row's own uniform number.

    Args:
        logits: [rows, vocabulary].
        u: [rows], in [0, 1).

    Returns:
        Token ids, log q and log p, each [rows].
    """
    import torch

    if shape.top_p < 1.0 or shape.top_k is not None:
        chosen, log_q = _choose_truncated(logits.float() / shape.temperature, u, shape)
    else:
        scores = logits if shape.temperature == 1.0 else logits.float() / shape.temperature
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
        chosen = _invert(weights, u)
        log_q = _at(weights, chosen).log()
        if scores is logits:
            return chosen, log_q.double(), log_q.double()
    log_p = _at(logits, chosen).float() - softmax(logits)[1][:, 0]
    return chosen, log_q.double(), log_p.double()


def softmax(scores: Any) -> tuple[Any, Any]:
    """softmax(scores) in float32, and log Σ exp(scores) as [..., 1], over the last dimension.

    The largest weight is exp(largest score) / Σ exp(scores): two cheap maxima give the logarithm of
    the sum without another pass of exponentials.
    """
    import torch

    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    return weights, scores.amax(-1, keepdim=True).float() - weights.amax(-1, keepdim=True).log()


def _choose_truncated(logits: Any, u: Any, shape: Shape, k: int = 128) -> tuple[Any, Any]:
    """Token ids and log q, with only the most probable tokens kept.

    Args:
        k: tokens looked at first where top-p alone decides. Nearly always they are enough, and
            sorting the whole vocabulary costs more than everything else in a step.
    """
    import torch

    k = min(shape.top_k or k, logits.shape[-1])
    best, order = logits.topk(k, dim=-1)  # sorted, most probable first
    if shape.top_p < 1.0:
        # After top-k the probabilities are those among the k; without it, those of the whole vocabulary.
        probabilities = (best - softmax(best if shape.top_k else logits)[1]).exp()
        before = probabilities.cumsum(-1) - probabilities
        short = before[:, -1] + probabilities[:, -1] < shape.top_p
        best = best.masked_fill(before >= shape.top_p, -torch.inf)
    weights, _ = softmax(best)
    place = _invert(weights, u)
    chosen, log_q = _at(order, place), _at(weights, place).log()
    if shape.top_k is None and k < logits.shape[-1] and short.any():
        chosen[short], log_q[short] = _choose_truncated(logits[short], u[short], shape, logits.shape[-1])
    return chosen, log_q


def _at(values: Any, index: Any) -> Any:
    return values.gather(-1, index[:, None]).squeeze(-1)


BLOCK = 64


def _invert(weights: Any, u: Any) -> Any:
    """Index at which each row's cumulative weight first exceeds u of the total; never one of weight 0.

    First the block of entries is found, then the entry in the block: two short cumulative sums in
    float64 instead of one over the whole vocabulary.

    Args:
        weights: [rows, entries], not negative, not all 0.
        u: float64 [rows], in [0, 1).
    """
    import torch

    rows, entries = weights.shape
    if entries <= BLOCK:
        return _first_above(weights.double(), u)[0]
    if entries % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -entries % BLOCK))
    blocks = weights.view(rows, -1, BLOCK)
    block, rest = _first_above(blocks.sum(-1).double(), u)
    inside = blocks[torch.arange(rows, device=weights.device), block]
    return block * BLOCK + _first_above(inside.double(), rest)[0]


def _first_above(weights: Any, u: Any) -> tuple[Any, Any]:
    """Index of the first entry whose cumulative weight exceeds u of the total, and where in the entry u falls.

    An entry of weight 0 cannot be found, however the sums are rounded: it is passed over, and u of
    the total is kept below the largest sum.
    """
    import torch

    sums = weights.cumsum(-1).masked_fill(weights <= 0, -1.0)
    top = sums.amax(-1)
    target = torch.minimum(u * top, torch.nextafter(top, torch.zeros_like(top)))
    index = (sums > target[:, None]).byte().argmax(-1)
    weight = _at(weights, index)
    inside = (target - (_at(sums, index) - weight)) / weight
    return index, inside.clamp(0.0, 1.0 - 2.0**-53)


def uniforms(seeds: Sequence[int], steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), [rows, steps]: each row from its own counter-based (Philox) stream."""
    return np.stack([np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds])


# --- the plain loop ---------------------------------------------------------------------------


def plain(model: Any, draws: Sequence[tuple[int, Row]], shape: Shape, pad_id: int) -> Iterator[tuple[int, Drawn]]:
    """Draw one batch for any model that writes: each row has its own copy of its prompt's keys and values.

    Yields:
        Number and result of each draw.
    """
    import torch

    device = model.device
    rows = [row for _, row in draws]
    prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    kept = _kept(model)
    logits = kept.read(prompts, pad_id)
    owner = torch.tensor([number[row.prompt_ids] for row in rows], device=device)
    kept.select(owner)
    logits = logits[owner]
    u = torch.from_numpy(uniforms([row.seed for row in rows], shape.max_tokens)).to(device)
    stops = torch.tensor(sorted(shape.stop_ids), dtype=torch.long, device=device)

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
            kept.select(keep)
            alive, chosen = alive[keep], chosen[keep]
        if step + 1 == shape.max_tokens:
            break
        logits = kept.follow(chosen)
    for (draw, _), row, n, end, q, p in zip(
        draws, tokens.tolist(), lengths.tolist(), stopped.tolist(), log_q.tolist(), log_p.tolist(), strict=True
    ):
        yield draw, Drawn(row[:n], end, q, p)


def _forced(model: Any, prompt: Sequence[int], tokens: Sequence[int], pad_id: int) -> float:
    """Log-probability of these tokens behind the prompt, as the plain loop gives it."""
    import torch

    kept, log_p = _kept(model), 0.0
    logits = kept.read([prompt], pad_id)
    for i, token in enumerate(tokens):
        logits = kept.follow(torch.tensor(tokens[i - 1 : i], device=model.device)) if i else logits
        log_p += logits[0].float().log_softmax(-1)[token].item()
    return log_p


def right_padded(rows: Sequence[Sequence[int]], filler: int) -> Any:
    """Rows of numbers as one tensor, int64 [rows, longest]."""
    import torch

    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)


def _kept(model: Any) -> "_Causal":
    return (_EncoderDecoder if model.config.is_encoder_decoder else _Causal)(model)


class _Causal:
    """What the plain loop keeps of a causal model's rows."""

    def __init__(self, model: Any):
        self.model = model

    def read(self, prompts: Sequence[Sequence[int]], pad_id: int) -> Any:
        """Logits of what follows each prompt, [prompts, vocabulary]. The rows are now the prompts."""
        from transformers import DynamicCache

        from rsft_pipeline.shared_prefix import left_padded

        ids, self.mask, positions = left_padded(prompts, pad_id, self.model.device)
        self.position, self.cache = positions[:, -1], DynamicCache(config=self.model.config)
        return self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            logits_to_keep=1,
        ).logits[:, -1]

    def select(self, rows: Any) -> None:
        """Keep the rows of these indices, or repeat them."""
        self.cache.reorder_cache(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]

    def follow(self, tokens: Any) -> Any:
        """Logits of what follows each row and its next token, [rows, vocabulary]."""
        import torch

        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=-1)
        self.position = self.position + 1
        return self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.position[:, None],
            past_key_values=self.cache,
        ).logits[:, -1]


class _EncoderDecoder(_Causal):
    """The same of an encoder-decoder's: all rows are of one age, so their positions follow from the cache."""

    def read(self, prompts: Sequence[Sequence[int]], pad_id: int) -> Any:
        from rsft_pipeline.shared_encoder import read

        out, self.mask = read(self.model, prompts, pad_id)
        self.states, self.cache = out.encoder_last_hidden_state, out.past_key_values
        return out.logits[:, -1]

    def select(self, rows: Any) -> None:
        self.cache.reorder_cache(rows)
        self.mask, self.states = self.mask[rows], self.states[rows]

    def follow(self, tokens: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return self.model(
            encoder_outputs=BaseModelOutput(self.states),
            attention_mask=self.mask,
            decoder_input_ids=tokens[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
