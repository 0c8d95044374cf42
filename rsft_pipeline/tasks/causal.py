"""Causal language models: completions that follow a prompt, their log-probability, their loss.

Belongs here: what is particular to a decoder that reads its prompt left to right, as it writes. Does not:
what all models that write have in common (writing.py), which samples are trained on and how a step adds
up (training.py), where weights come from (models.py).
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rsft_pipeline.tasks import writing
from rsft_pipeline.tasks.writing import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

    from rsft_pipeline.training import Sample

draw = writing.draw
completion_ids = writing.completion_ids


def log_probabilities(model, samples: Sequence["Sample"], pad_id: int, batch_size: int = 64) -> list[float]:
    """Log-probability of each sample's completion after its prompt, by teacher forcing, in nats."""
    return writing.log_probabilities(collate, token_losses, model, samples, pad_id, batch_size)


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
    prompt would be most of the memory.
    """
    targets = batch["labels"][:, 1:]  # position t predicts token t + 1
    kept = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    partial = _takes_positions(model)
    logits = model(**inputs, logits_to_keep=kept).logits if partial else model(**inputs).logits[:, kept]
    return writing.summed(logits, targets[:, kept])


def _takes_positions(model) -> bool:
    """Whether the model's own forward takes the positions that its head is applied to; nearly all do."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
