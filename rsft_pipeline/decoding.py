"""Decoding: many draws of token ids from a model that writes, with their log-probabilities.

Each draw's randomness is its own stream, fixed by its seed, so a draw does not depend on which others
share its batch (beyond the rounding of the matrix products). Each prompt is read once, however many
draws it has, and those that have chosen the same tokens so far are computed once (shared_prefix.py;
shared_encoder.py for encoder-decoders); draws that have ended make room for others. Models whose
attention cannot be shared so are drawn from by the plain loop at the end of this file.

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
# Rows that keep the processor's matrix units busy; draws at once, where memory would hold more: those that go on
# together need fewer rows than they are; and their share of the memory that is free, which on a CPU is everyone's.
ROWS = {"cpu": 256, "cuda": 1024}
DRAWS = {"cpu": 4096, "cuda": 1024}
SHARE = {"cpu": 0.5, "cuda": 0.9}


@dataclass(frozen=True)
class Draw:
    """One draw to make: its prompt's token ids and the seed of its own random stream."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Drawn:
    """One draw made. `token_ids` end with the stop token where it stopped by itself."""

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


def decode(model: Any, draws: Sequence[Draw], shape: Shape, pad_id: int, at_once: int | None = None) -> list[Drawn]:
    """Make the draws, in their order.

    Out of memory, it goes on with half as many at once; draws already made are kept.

    Args:
        model: a causal or an encoder-decoder language model of Transformers, in evaluation mode.
        draws: all draws to make; those of the same prompt share its prefix.
        shape: temperature, top-k, top-p (applied in this order, as in Transformers), length, stops.
        pad_id: any valid token id, for padding that is masked.
        at_once: draws at once; default: as many as free memory holds, see `draws_at_once`.

    Raises:
        RuntimeError: when not even one draw fits into memory.
    """
    import torch

    if not draws:
        return []
    made: dict[int, Drawn] = {}
    at_once = at_once or draws_at_once(model, draws, shape)
    with torch.inference_mode():
        while len(made) < len(draws):
            waiting = [(i, draw) for i, draw in enumerate(draws) if i not in made]
            try:
                for number, drawn in _loop(model, waiting, shape, pad_id, at_once):
                    made[number] = drawn
                continue
            except RuntimeError as error:
                if at_once == 1 or not _out_of_memory(error):
                    raise
            # Outside the handler: a traceback would keep the failed batch's tensors alive.
            at_once = min(at_once, len(waiting)) // 2 or 1
            devices.release(devices.Device(model.device.type, "float32"))
            log.warning("out of memory: going on with %d draws at once", at_once)
    return [made[i] for i in range(len(draws))]


def _loop(
    model: Any, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int, at_once: int
) -> Iterator[tuple[int, Drawn]]:
    from rsft_pipeline import shared_encoder, shared_prefix

    shared = shared_encoder if model.config.is_encoder_decoder else shared_prefix
    longest = max((draw for _, draw in draws), key=lambda draw: len(draw.prompt_ids))
    try:
        _try(model, shared.draw, longest, min(TRIAL, shape.max_tokens), pad_id)
        yield from shared.draw(model, draws, shape, pad_id, at_once)
    except shared_prefix.Unsupported as reason:
        log.warning("%s: each draw keeps its own copy of the prompt, because %s", type(model).__name__, reason)
        rows = min(at_once, ROWS[model.device.type])
        for i in range(0, len(draws), rows):
            yield from plain(model, draws[i : i + rows], shape, pad_id)


_apart: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()  # model → what its trial gave


def _try(model: Any, make: Callable, draw: Draw, tokens: int, pad_id: int) -> None:
    """Draw a few tokens, and compare their log-probability with the plain loop's: no list of families is complete.

    Raises:
        Unsupported: they differ, so the model does not attend as its shared prompts are attended to.
    """
    from rsft_pipeline.shared_prefix import Unsupported

    if model not in _apart:
        shape, prompt = Shape(1.0, 1.0, None, tokens, frozenset()), draw.prompt_ids
        drawn = [one for _, one in make(model, [(0, draw), (1, Draw(prompt, draw.seed + 1))], shape, pad_id, 2)]
        apart = [abs(one.log_p - _forced(model, prompt, one.token_ids, pad_id)) for one in drawn]
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


def draws_at_once(model: Any, draws: Sequence[Draw], shape: Shape) -> int:
    """Draws that free memory holds, each on a row of its own: suffixes, a share of two prefixes per prompt, logits."""
    device = model.device.type
    longest = max(len(draw.prompt_ids) for draw in draws)
    of_a_prompt = len(draws) / len({draw.prompt_ids for draw in draws})
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    logits = vocabulary * (model.dtype.itemsize + 4 * 4)  # as computed, and four arrays of choose() in float32
    each = state_bytes(model, shape.max_tokens) + 2 * state_bytes(model, longest) / of_a_prompt + logits
    free = devices.memory(devices.Device(device, "float32"))["free"]
    return max(1, min(DRAWS[device], int(SHARE[device] * free / each)))


# --- choosing a token -------------------------------------------------------------------------


def choose(logits: Any, row: Any, u: Any, shape: Shape) -> tuple[Any, Any, Any]:
    """One token for each draw, by inverting its row's distribution function at the draw's own uniform number.

    Args:
        logits: [rows, vocabulary].
        row: of each draw, int64 [draws].
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

    The largest weight is exp(largest score) / Σ exp(scores): two cheap maxima give the logarithm of
    the sum without another pass of exponentials.
    """
    import torch

    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    return weights, scores.amax(-1, keepdim=True).float() - weights.amax(-1, keepdim=True).log()


def _choose_truncated(logits: Any, row: Any, u: Any, shape: Shape, k: int = 128) -> tuple[Any, Any]:
    """Token ids and log q of each draw, with only the most probable tokens kept.

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
    """Index at which the cumulative weight of each draw's row first exceeds u of the total; never one of weight 0.

    First the block of entries is found, then the entry in the block: two short cumulative sums in
    float64 instead of one over the whole vocabulary.

    Args:
        weights: [rows, entries], not negative, not all 0.
        row: of each draw, int64 [draws].
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
    """Index of the first entry whose cumulative weight exceeds u of the total, and where in the entry u falls.

    An entry of weight 0 cannot be found, however the sums are rounded: it is passed over, and u of
    the total is kept below the largest sum.
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

    The same as `Generator(Philox(key=seed)).random(steps)`. But one generator is given each key in turn: a new one
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


# --- the plain loop ---------------------------------------------------------------------------


def plain(model: Any, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int) -> Iterator[tuple[int, Drawn]]:
    """Draw one batch for any model that writes: each row has its own copy of its prompt's keys and values.

    Yields:
        Number and result of each draw.
    """
    import torch

    device = model.device
    prompts = list(dict.fromkeys(draw.prompt_ids for _, draw in draws))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    kept = _kept(model)
    logits = kept.read(prompts, pad_id)
    row = torch.tensor([place[draw.prompt_ids] for _, draw in draws], device=device)  # of the logits, for each draw
    kept.select(row)
    u = torch.from_numpy(uniforms([draw.seed for _, draw in draws], shape.max_tokens)).to(device)
    stops = torch.tensor(sorted(shape.stop_ids), dtype=torch.long, device=device)

    tokens = torch.full((len(draws), shape.max_tokens), pad_id, device=device)
    lengths = torch.full((len(draws),), shape.max_tokens, device=device)
    stopped = torch.zeros(len(draws), dtype=torch.bool, device=device)
    log_q = torch.zeros(len(draws), dtype=torch.float64, device=device)
    log_p = torch.zeros(len(draws), dtype=torch.float64, device=device)
    alive = torch.arange(len(draws), device=device)
    for step in range(shape.max_tokens):
        chosen, step_q, step_p = choose(logits, row, u[alive, step], shape)
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
        logits, row = kept.follow(chosen), torch.arange(len(chosen), device=device)
    for (number, _), ids, n, end, q, p in zip(
        draws, tokens.tolist(), lengths.tolist(), stopped.tolist(), log_q.tolist(), log_p.tolist(), strict=True
    ):
        yield number, Drawn(ids[:n], end, q, p)


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
