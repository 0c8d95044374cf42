"""Causal language models: drawing completions that follow a prompt, their log-probability, their loss.

Belongs here: what is particular to a decoder that writes left to right. Does not: the decoding loop
(decoding.py), which candidates are drawn (sampling.py), which samples are trained on and how a step
adds up (training.py), where weights come from (models.py).
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rsft_pipeline import models
from rsft_pipeline.decoding import Row, Shape, decode
from rsft_pipeline.recipe import Sampling
from rsft_pipeline.sampling import Candidate, Request

if TYPE_CHECKING:
    from torch import Tensor

    from rsft_pipeline.training import Sample

IGNORED = -100  # what torch's cross entropy calls a position without a target


def draw(model, tokenizer, requests: Sequence[Request], sampling: Sampling) -> list[Candidate]:
    """One completion for each request, in their order."""
    stop_ids = set(models.stop_ids(model, tokenizer)) | _stop_tokens(tokenizer, sampling.stop)
    shape = Shape(sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens, frozenset(stop_ids))
    rows = [Row(request.prompt_ids, request.seed) for request in requests]
    drawn = decode(model, rows, shape, tokenizer.pad_token_id, sampling.batch_size)
    texts = tokenizer.batch_decode(
        [one.token_ids[:-1] if one.stopped else one.token_ids for one in drawn], skip_special_tokens=True
    )
    return [
        Candidate(request, text, one.token_ids, "stop" if one.stopped else "length", one.log_q, one.log_p)
        for request, text, one in zip(requests, texts, drawn, strict=True)
    ]


def _stop_tokens(tokenizer, texts: Sequence[str]) -> set[int]:
    """The ids of extra stop tokens. Raises ValueError for a text that is not one token."""
    found = set()
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"sampling.stop: {text!r} is {len(ids)} tokens of this tokenizer; expected exactly one")
        found.add(ids[0])
    return found


def log_probabilities(model, samples: Sequence["Sample"], pad_id: int, batch_size: int = 64) -> list[float]:
    """Log-probability of each sample's completion after its prompt, by teacher forcing, in nats."""
    import torch

    found: list[float] = []
    with torch.inference_mode():
        for i in range(0, len(samples), batch_size):
            batch = collate(samples[i : i + batch_size], pad_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            found += (-token_losses(model, batch)).tolist()
    return found


def collate(samples: Sequence["Sample"], pad_id: int) -> dict[str, "Tensor"]:
    """Samples as one batch, padded on the right.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each int64 [rows, longest]. Labels are the
        completion's ids and IGNORED elsewhere, by position and never by value: an EOS that was
        sampled is a target even where the padding token is EOS too.
    """
    import torch

    shape = (len(samples), max(len(s.prompt_ids) + len(s.completion_ids) for s in samples))
    ids, mask, labels = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for row, sample in enumerate(samples):
        start, end = len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.completion_ids)
        ids[row, :end] = torch.tensor([*sample.prompt_ids, *sample.completion_ids])
        mask[row, :end] = 1
        labels[row, start:end] = ids[row, start:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def token_losses(model, batch: dict[str, "Tensor"]) -> "Tensor":
    """Negative log-likelihood of each row's completion, summed over its tokens: float32 [rows], in nats.

    The head is applied only where some row has a target: with a large vocabulary the logits of the
    prompt would be most of the memory. The softmax is in float32, whatever the weights are in.
    """
    import torch

    targets = batch["labels"][:, 1:]  # position t predicts token t + 1
    kept = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    partial = _takes_positions(model)
    logits = model(**inputs, logits_to_keep=kept).logits if partial else model(**inputs).logits[:, kept]
    targets = targets[:, kept]
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    losses = torch.zeros(targets.shape, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        losses[rows, columns] = torch.nn.functional.cross_entropy(
            logits[rows, columns].float(), targets[rows, columns], reduction="none"
        )
    return losses.sum(dim=1)


def _takes_positions(model) -> bool:
    """Whether the model's own forward takes the positions that its head is applied to; nearly all do."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
