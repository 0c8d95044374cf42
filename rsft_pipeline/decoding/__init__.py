"""Decoding: many draws of token ids from a model that writes, with their log-probabilities.

Each draw has its own random stream, fixed by its seed, so a draw does not depend on which others
share its batch (beyond the rounding of the matrix products). Each prompt is read once, however many
draws it has, and draws that have chosen the same tokens so far are computed once (shared_prefix.py;
shared_encoder.py for encoder-decoders); draws that have ended make room for others. Models whose
attention cannot be shared in this way are drawn from by the plain loop (plain.py).

Belongs here: choosing the loop for a model by a trial, and continuing with fewer draws when memory runs out.

Left out on purpose: beam search, penalties and everything else that is not a draw from a stated
distribution, because they have no `log_q`.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rsft_pipeline import devices
from rsft_pipeline.decoding import plain
from rsft_pipeline.decoding.draws import Draw, Drawn, Shape, check_number
from rsft_pipeline.decoding.memory import draws_at_once
from rsft_pipeline.models import configuration
from rsft_pipeline.models.checkpoints import ModelError

log = logging.getLogger(__name__)

TRIAL = 4  # tokens drawn to try a loop on a model
# Nats per token by which their log-probability may differ from that of one pass over all of them: rounding gives 1e-5
# in float32 and a tenth in half precision, a different attention whole nats.
TOLERANCE, TOLERANCE_OF_HALF = 0.01, 0.25


def decode(model: Any, draws: Sequence[Draw], shape: Shape, pad_id: int, at_once: int | None = None) -> list[Drawn]:
    """Make the draws, in their order.

    Out of memory, it continues with half as many at once; draws already made are kept.

    Args:
        model: a causal or an encoder-decoder language model of Transformers, in evaluation mode.
        draws: all draws to make; those of the same prompt share its prefix.
        shape: temperature, top-k, top-p (applied in this order, as in Transformers), length, stops.
        pad_id: any valid token id, for padding that is masked.
        at_once: the most draws at once; default: as many as free memory holds, see `draws_at_once`.

    Raises:
        RuntimeError: not even one draw fits into memory, the model's logits are not numbers, or the log-probabilities
            of draws differ from the model's own.
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
            devices.release(model.device.type)
            log.warning("out of memory: going on with %d draws at once", at_once)
    return [made[i] for i in range(len(draws))]


def _loop(
    model: Any, draws: Sequence[tuple[int, Draw]], shape: Shape, pad_id: int, at_once: int
) -> Iterator[tuple[int, Drawn]]:
    from rsft_pipeline.decoding import shared_encoder, shared_prefix

    shared = shared_encoder if model.config.is_encoder_decoder else shared_prefix
    prompts, tokens = [draw.prompt_ids for _, draw in draws], min(TRIAL, shape.max_tokens)
    loop, wrong = shared.draw, _wrong(model, shared.draw, prompts, tokens, pad_id)
    if wrong:
        log.warning("%s: each draw keeps its own copy of the prompt, because %s", type(model).__name__, wrong)
        loop, wrong = plain.draw, _wrong(model, plain.draw, prompts, tokens, pad_id)
    if wrong:
        raise RuntimeError(f"a {type(model).__name__} cannot be drawn from: {wrong}")
    yield from loop(model, draws, shape, pad_id, at_once)


# model → loop → what is wrong with the loop's draws from that model
_known: weakref.WeakKeyDictionary[Any, dict[Callable, str | None]] = weakref.WeakKeyDictionary()


def _wrong(model: Any, loop: Callable, prompts: Sequence[tuple[int, ...]], tokens: int, pad_id: int) -> str | None:
    """What is wrong with a loop's draws from a model, in words; None if it serves this model. It is tried once.

    It draws a few tokens, and their log-probability is compared with the model's own, since no list of families is
    complete. Raises RuntimeError if memory runs out, and ModelError.
    """
    from rsft_pipeline.decoding.attention import Unsupported

    known = _known.setdefault(model, {})
    if loop not in known:
        try:
            apart = _trial(model, loop, prompts, tokens, pad_id)
            same = apart <= (TOLERANCE_OF_HALF if model.dtype.itemsize == 2 else TOLERANCE)
            differ = f"its draws came out {apart:.2g} nats a token from what the model gives them"
            known[loop] = None if same else differ
        except Unsupported as reason:
            known[loop] = str(reason)
        except Exception as error:  # model families fail with different errors
            if devices.out_of_memory(error) or isinstance(error, ModelError):  # which says itself what is wrong
                raise
            known[loop] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return known[loop]


def _trial(model: Any, loop: Callable, prompts: Sequence[tuple[int, ...]], tokens: int, pad_id: int) -> float:
    """Nats per token by which log-probabilities of the loop's draws differ from the model's own pass over them.

    Two draws share the longest prompt, one has another prompt of that length, and one a shorter, possibly padded one.
    """
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    shorter = shortest if len(shortest) < len(longest) else longest[1:] or longest
    trial = [Draw(longest, 0), Draw(longest, 1), Draw(longest[::-1], 2), Draw(shorter, 3)]
    shape = Shape(1.0, 1.0, None, tokens, frozenset())
    drawn = dict(loop(model, list(enumerate(trial)), shape, pad_id, len(trial)))
    for one in drawn.values():
        check_number(model, one.log_q)
    apart = [abs(drawn[i].log_p - _rated(model, one.prompt_ids, drawn[i].token_ids)) for i, one in enumerate(trial)]
    return float(np.max(apart)) / tokens  # np.max keeps a NaN, which exceeds every tolerance


def _rated(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Log-probability of these tokens after the prompt, in one pass without a cache."""
    import torch

    read = [*prompt] if model.config.is_encoder_decoder else [*prompt, *tokens[:-1]]
    given = {"input_ids": torch.tensor([read], device=model.device)}
    if model.config.is_encoder_decoder:
        written = [configuration.start_id(model), *tokens[:-1]]
        given["decoder_input_ids"] = torch.tensor([written], device=model.device)
    else:
        given["logits_to_keep"] = len(tokens)
        first = configuration.first_position(model.config)
        if first:  # else a drawn padding token would not be counted as a position
            given["position_ids"] = torch.arange(first, first + len(read), device=model.device)[None]
    logits = model(**given).logits[0, -len(tokens) :].float()
    chosen = torch.tensor(tokens, device=model.device)[:, None]
    return logits.log_softmax(-1).gather(-1, chosen).sum().item()
