"""Decoding: many draws of token ids from a model that writes, with their log-probabilities.

Each draw's randomness is its own stream, fixed by its seed, so a draw does not depend on which others
share its batch (beyond the rounding of the matrix products). Each prompt is read once, however many
draws it has, and those that have chosen the same tokens so far are computed once (shared_prefix.py;
shared_encoder.py for encoder-decoders); draws that have ended make room for others. Models whose
attention cannot be shared so are drawn from by the plain loop at the end of this file.

Left out on purpose: beam search, penalties and everything else that is not a draw from a stated
distribution; `log_q` could not be given for them.
"""

import itertools
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsft_pipeline import devices

log = logging.getLogger(__name__)

# Tokens by which a loop is tried on a model, and nats per token by which these may be off what one pass over them all
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
        RuntimeError: when not even one draw fits into memory, the model's logits are no numbers, or draws do not come
            out as the model itself rates them.
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
                    check_number(model, drawn.log_q)
                    made[number] = drawn
                continue
            except RuntimeError as error:
                if at_once == 1 or not devices.out_of_memory(error):
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
    asked = [draw for _, draw in draws]
    try:
        if wrong := _tried(model, shared.draw, asked, min(TRIAL, shape.max_tokens), pad_id):
            raise shared_prefix.Unsupported(wrong)
        yield from shared.draw(model, draws, shape, pad_id, at_once)
    except shared_prefix.Unsupported as reason:
        log.warning("%s: each draw keeps its own copy of the prompt, because %s", type(model).__name__, reason)
        try:
            wrong = _tried(model, plain, asked, min(TRIAL, shape.max_tokens), pad_id)
        except RuntimeError as error:
            if devices.out_of_memory(error):
                raise
            wrong = str(error)
        if wrong:
            raise RuntimeError(f"a {type(model).__name__} cannot be drawn from: {wrong}") from None
        yield from plain(model, draws, shape, pad_id, at_once)


# model → loop → nats per token by which its draws are off
_apart: weakref.WeakKeyDictionary[Any, dict[Callable, float]] = weakref.WeakKeyDictionary()


def _tried(model: Any, loop: Callable, draws: Sequence[Draw], tokens: int, pad_id: int) -> str | None:
    """Draw a few tokens, and compare their log-probability with the model's own: no list of families is complete.

    Two draws share the longest prompt; one has another of that length, and one a shorter, padded where loops pad.

    Returns:
        What is wrong, in words; None where the loop serves this model.
    """
    off = _apart.setdefault(model, {})
    if loop not in off:
        prompts = sorted((draw.prompt_ids for draw in draws), key=len)
        longest = prompts[-1]
        shorter = prompts[0] if len(prompts[0]) < len(longest) else longest[1:] or longest
        trial = [Draw(longest, 0), Draw(longest, 1), Draw(longest[::-1], 2), Draw(shorter, 3)]
        shape = Shape(1.0, 1.0, None, tokens, frozenset())
        drawn = dict(loop(model, list(enumerate(trial)), shape, pad_id, len(trial)))
        for one in drawn.values():
            check_number(model, one.log_q)
        apart = [abs(drawn[i].log_p - _rated(model, one.prompt_ids, drawn[i].token_ids)) for i, one in enumerate(trial)]
        off[loop] = float(np.max(apart)) / tokens  # one that is no number is the largest
    if off[loop] <= TOLERANCE.get(str(model.dtype), 0.25):
        return None
    return f"its draws came out {off[loop]:.2g} nats a token from what the model gives them"


def _rated(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Log-probability of these tokens behind the prompt, in one pass that is told nothing and keeps nothing."""
    import torch

    from rsft_pipeline import models

    read = [*prompt] if model.config.is_encoder_decoder else [*prompt, *tokens[:-1]]
    given = {"input_ids": torch.tensor([read], device=model.device)}
    if model.config.is_encoder_decoder:
        written = [models.start_id(model), *tokens[:-1]]
        given["decoder_input_ids"] = torch.tensor([written], device=model.device)
    else:
        given["logits_to_keep"] = len(tokens)
    logits = model(**given).logits[0, -len(tokens) :].float()
    chosen = torch.tensor(tokens, device=model.device)[:, None]
    return logits.log_softmax(-1).gather(-1, chosen).sum().item()


def check_number(model: Any, log_q: float) -> None:
    """Raise RuntimeError where what a token was chosen by is no number: nothing that was drawn so means anything."""
    if not math.isfinite(log_q):
        raise RuntimeError(
            f"the logits of {type(model).__name__} in {model.dtype} are not numbers: its weights are broken, or "
            "overflow in that format, or `sampling.temperature` is too small for them"
        )


# --- memory -----------------------------------------------------------------------------------


def state_bytes(model: Any, tokens: int) -> int:
    """Bytes that keys and values of `tokens` tokens take, over all layers: 2 · layers · heads · dimension · size.

    A draw costs those of its longest completion, a prompt those of its tokens, whatever its draws.
    Of an encoder-decoder only the decoder's layers keep any: a prompt's are those it attends to.
    """
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    each = config.per_layer_config if config.is_heterogeneous else [config] * layers
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


def plain(
    model: Any, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int, at_once: int
) -> Iterator[tuple[int, Drawn]]:
    """The plain loop in batches of prompts of one length: not every model takes padding for what it is."""

    def length(draw: tuple[int, Draw]) -> int:
        return len(draw[1].prompt_ids)

    rows = min(at_once, ROWS[model.device.type])
    for _, alike in itertools.groupby(sorted(draws, key=length), key=length):
        while batch := list(itertools.islice(alike, rows)):
            yield from _alike(model, batch, shape, pad_id)


def _alike(model: Any, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int) -> Iterator[tuple[int, Drawn]]:
    """Draw one batch for any model that writes: each row has its own copy of its prompt's keys and values.

    Args:
        draws: their prompts are of one length.

    Yields:
        Number and result of each draw.
    """
    import torch

    device = model.device
    prompts = list(dict.fromkeys(draw.prompt_ids for _, draw in draws))
    place = {prompt: i for i, prompt in enumerate(prompts)}
    kept = _kept(model)
    logits = kept.read(prompts)
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
        logits, row = kept.follow(chosen[:, None]), torch.arange(len(chosen), device=device)
    for (number, _), ids, n, end, q, p in zip(
        draws, tokens.tolist(), lengths.tolist(), stopped.tolist(), log_q.tolist(), log_p.tolist(), strict=True
    ):
        yield number, Drawn(ids[:n], end, q, p)


def right_padded(rows: Sequence[Sequence[int]], filler: int) -> Any:
    """Rows of numbers as one tensor, int64 [rows, longest]."""
    import torch

    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)


def _kept(model: Any) -> "_Causal":
    return (_EncoderDecoder if model.config.is_encoder_decoder else _Causal)(model)


class _Causal:
    """What the plain loop keeps of a causal model's rows, which are all of one length."""

    def __init__(self, model: Any):
        self.model = model

    def read(self, prompts: Sequence[Sequence[int]]) -> Any:
        """Logits of what follows each prompt, [prompts, vocabulary]. The rows are now the prompts."""
        import torch
        from transformers import DynamicCache

        from rsft_pipeline import models

        self.cache, self.position = DynamicCache(config=self.model.config), models.first_position(self.model.config)
        return self.follow(torch.tensor(prompts, device=self.model.device))

    def select(self, rows: Any) -> None:
        """Keep the rows of these indices, or repeat them."""
        self.cache.reorder_cache(rows)

    def follow(self, tokens: Any) -> Any:
        """Logits of what follows each row and its next tokens, int64 [rows, tokens]: [rows, vocabulary]."""
        import torch

        rows, length = tokens.shape
        positions = torch.arange(self.position, self.position + length, device=tokens.device).expand(rows, length)
        self.position += length
        return self.model(
            input_ids=tokens, position_ids=positions, past_key_values=self.cache, logits_to_keep=1
        ).logits[:, -1]


class _EncoderDecoder(_Causal):
    """The same of an encoder-decoder's."""

    def read(self, prompts: Sequence[Sequence[int]]) -> Any:
        from rsft_pipeline.shared_encoder import read

        out, self.mask = read(self.model, prompts, 0)  # of one length: nothing is padded
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
            decoder_input_ids=tokens,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
