"""Writing: what the tasks whose models write text have in common, whichever kind of model writes it.

Belongs here: turning draws into candidates and given texts into tokens, and adding up likelihoods. Not:
the decoding loop (decoding/), which candidates are drawn (sampling.py), and how a kind of model is fed
(causal.py, seq2seq.py).
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rsft_pipeline.decoding import Draw, Shape, decode
from rsft_pipeline.models import configuration
from rsft_pipeline.recipe.sampling import Sampling
from rsft_pipeline.sampling import Candidate, Request
from rsft_pipeline.training import Sample, part_tokens, parts

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # torch's label for a position without a target
SOFTMAX = 2**24  # the most logits whose softmax is computed at once


def draw(model, tokenizer, requests: Sequence[Request], sampling: Sampling) -> list[Candidate]:
    """One completion for each request, in their order."""
    stop_ids = set(configuration.stop_ids(model, tokenizer)) | _stop_tokens(tokenizer, sampling.stop)
    shape = Shape(sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens, frozenset(stop_ids))
    draws = [Draw(request.prompt_ids, request.seed) for request in requests]
    drawn = decode(model, draws, shape, tokenizer.pad_token_id, sampling.batch_size)
    texts = spelt(tokenizer, [one.token_ids[:-1] if one.stopped else one.token_ids for one in drawn])
    return [
        Candidate(request, text, one.token_ids, "stop" if one.stopped else "length", one.log_q, one.log_p)
        for request, text, one in zip(requests, texts, drawn, strict=True)
    ]


def spelt(tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of rows of token ids, with all spaces kept, whatever the tokenizer's settings."""
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _stop_tokens(tokenizer, texts: Sequence[str]) -> set[int]:
    """The ids of extra stop tokens. Raises ValueError for a text that is not one token."""
    found = set()
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"sampling.stop: {text!r} is {len(ids)} tokens of this tokenizer; expected exactly one")
        found.add(ids[0])
    return found


def completion_ids(model, tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The token ids with which the model would write each text, including what begins and ends its completions."""
    begin, end = configuration.begin_ids(model), configuration.end_id(model, tokenizer)
    return [[*begin, *ids, end] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def log_probabilities(
    collate: Callable, token_losses: Callable, model, samples: Sequence[Sample], pad_id: int, batch_size: int
) -> list[float]:
    """Log-probability of each sample's completion, by teacher forcing, in nats.

    Args:
        collate, token_losses: the task's functions.
        batch_size: the most samples computed at once; long ones are computed fewer at a time, as in training.
    """
    import torch

    found: dict[int, float] = {}
    count = max(1, math.ceil(len(samples) / batch_size))
    with torch.inference_mode():
        for part in parts(samples, count, part_tokens(model.device.type)):
            batch = {name: tensor.to(model.device) for name, tensor in collate(part, pad_id).items()}
            found |= zip(map(id, part), (-token_losses(model, batch)).tolist(), strict=True)
    return [found[id(sample)] for sample in samples]


def summed(logits: "Tensor", targets: "Tensor") -> "Tensor":
    """Negative log-likelihood of each row's targets, summed: float32 [rows], in nats.

    Args:
        logits: [rows, tokens, vocabulary].
        targets: int64 [rows, tokens], IGNORED where there is none.
    """
    import torch

    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    losses = torch.zeros(targets.shape, device=logits.device)
    losses[rows, columns] = surprisals(logits[rows, columns], targets[rows, columns])
    return losses.sum(dim=1)


def surprisals(logits: "Tensor", targets: "Tensor") -> "Tensor":
    """−log p of each target: float32 [targets], in nats. The softmax is in float32, whatever the weights are in.

    Computed for a few targets at a time, and again for the gradients: with a large vocabulary the softmax of all
    would take most of the memory.

    Args:
        logits: [targets, vocabulary].
        targets: int64 [targets].
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    def of(logits: "Tensor", targets: "Tensor") -> "Tensor":
        with torch.autocast(logits.device.type, enabled=False):
            return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    several = max(1, SOFTMAX // logits.shape[1])
    some = zip(logits.split(several), targets.split(several), strict=True)
    return torch.cat([checkpoint(of, *each, use_reentrant=False, preserve_rng_state=False) for each in some])
