"""Causal language models: completions that follow a prompt, their log-probability, their loss.

Belongs here: what is particular to a decoder that reads its prompt from left to right, as it writes. Not:
what all models that write have in common (writing.py), which samples are trained on and how a step's loss
is added up (training.py), where weights come from (models/).
"""

import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rsft_pipeline.padding import right_padded
from rsft_pipeline.tasks import writing
from rsft_pipeline.tasks.writing import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

    from rsft_pipeline.training import Sample

log = logging.getLogger(__name__)

SHARES_PROMPTS = True  # in training, a common beginning of several samples is computed once (packing.py)

draw = writing.draw
completion_ids = writing.completion_ids


def log_probabilities(model, samples: Sequence["Sample"], pad_id: int, batch_size: int = 64) -> list[float]:
    """Log-probability of each sample's completion after its prompt, by teacher forcing, in nats."""
    return writing.log_probabilities(collate, token_losses, model, samples, pad_id, batch_size)


def collate(samples: Sequence["Sample"], pad_id: int) -> dict[str, "Tensor"]:
    """Samples as one batch.

    Returns:
        `input_ids` and `labels`, int64 [rows, longest], padded on the right. Labels are the completion's
        ids and IGNORED elsewhere, by position and never by value: a sampled EOS is a target even if the
        padding token is EOS too. `nodes` and `first`: see `packing.tree`.
    """
    from rsft_pipeline import packing

    rows = [[*sample.prompt_ids, *sample.completion_ids] for sample in samples]
    labels = [[*[IGNORED] * len(sample.prompt_ids), *sample.completion_ids] for sample in samples]
    nodes, first = packing.tree(rows)
    return {
        "input_ids": right_padded(rows, pad_id),
        "labels": right_padded(labels, IGNORED),
        "nodes": nodes,
        "first": first,
    }


def token_losses(model, batch: dict[str, "Tensor"]) -> "Tensor":
    """Negative log-likelihood of each row's completion, summed over its tokens: float32 [rows], in nats.

    Each node of the prefix tree is computed once, without padding, if the model's attention allows it. The head is
    applied only at targets: with a large vocabulary the logits of the prompt would take most of the memory.
    """
    import torch

    from rsft_pipeline import packing

    targets = batch["labels"][:, 1:]  # position t predicts token t + 1
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    nodes = batch["nodes"]
    try:
        logits = packing.logits(model, batch["input_ids"], nodes, batch["first"], wanted=nodes[rows, columns])
    except packing.Unsupported as reason:
        log.debug("%s: samples are padded, because %s", type(model).__name__, reason)
        return writing.summed(*_padded(model, batch, targets))
    losses = torch.zeros(targets.shape, device=logits.device)
    losses[rows, columns] = writing.surprisals(logits, targets[rows, columns])
    return losses.sum(dim=1)


def _padded(model, batch: dict[str, "Tensor"], targets: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Logits [rows, columns, vocabulary] and targets of the columns in which some row has a target.

    No mask is needed: no position of a row attends to what comes after its end.
    """
    kept = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        return model(**inputs, logits_to_keep=kept).logits, targets[:, kept]
    return model(**inputs).logits[:, kept], targets[:, kept]
