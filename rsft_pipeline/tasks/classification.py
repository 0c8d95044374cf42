"""Sequence classification: a completion is one label, its token id the index of the model's output.

Belongs here: the same five functions as for models that write (tasks/__init__.py), for a model that
chooses. Not: how its head is made (models/, bootstrap.py).
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rsft_pipeline import devices
from rsft_pipeline.decoding.draws import Shape, check_number, choose, uniforms
from rsft_pipeline.padding import right_padded
from rsft_pipeline.recipe.sampling import Sampling
from rsft_pipeline.sampling import Candidate, Request

if TYPE_CHECKING:
    from torch import Tensor

    from rsft_pipeline.training import Sample

log = logging.getLogger(__name__)

ROWS = 64  # texts read at once


def draw(model, tokenizer, requests: Sequence[Request], sampling: Sampling) -> list[Candidate]:
    """One label for each request, in their order; each prompt is read once."""
    import torch

    shape = Shape(sampling.temperature, sampling.top_p, sampling.top_k, 1, frozenset())
    prompts = [request.prompt_ids for request in requests]
    with torch.inference_mode():
        logits, row = _read(model, prompts, tokenizer.pad_token_id, sampling.batch_size or ROWS)
        u = torch.from_numpy(uniforms([request.seed for request in requests], 1)[:, 0]).to(model.device)
        drawn = [each.tolist() for each in choose(logits, row, u, shape)]
    for log_q in drawn[1]:
        check_number(model, log_q)
    return [
        Candidate(request, model.config.id2label[label], [label], "stop", log_q, log_p)
        for request, label, log_q, log_p in zip(requests, *drawn, strict=True)
    ]


def _read(model, prompts: Sequence[Sequence[int]], pad_id: int, rows: int) -> tuple["Tensor", "Tensor"]:
    """Logits of the distinct prompts, [distinct, labels], and the row of each prompt in them, int64 [prompts].

    Only prompts of the same length share a batch: FNet and others mix in padding despite the mask, and a text's logits
    must not depend on its batch. Out of memory, it continues with half as many rows at once.
    """
    import torch

    asked = sorted({tuple(prompt) for prompt in prompts}, key=len)
    place = {prompt: i for i, prompt in enumerate(asked)}
    read: list[Tensor] = []
    start = 0
    while start < len(asked):
        batch = [prompt for prompt in asked[start : start + rows] if len(prompt) == len(asked[start])]
        try:
            read.append(_logits(model, _padded(batch, pad_id)))
            start += len(batch)
            continue
        except RuntimeError as error:
            if len(batch) == 1 or not devices.out_of_memory(error):
                raise
        # Outside the handler: a traceback would keep the failed batch's tensors alive.
        rows = len(batch) // 2
        devices.release(model.device.type)
        log.warning("out of memory: going on with %d texts at once", rows)
    return torch.cat(read), torch.tensor([place[tuple(prompt)] for prompt in prompts], device=model.device)


def completion_ids(model, tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Each label as the index of its output. Raises ValueError for a text that is not a label of the model."""
    ids = model.config.label2id
    if unknown := sorted(set(texts) - set(ids)):
        raise ValueError(
            f"{unknown[0]!r} is no label of this model: `model.labels` are {', '.join(map(repr, ids))}, "
            "and every reference answer has to be one of them"
        )
    return [[ids[text]] for text in texts]


def log_probabilities(model, samples: Sequence["Sample"], pad_id: int, batch_size: int = ROWS) -> list[float]:
    """Log-probability of each sample's label, in nats."""
    import torch

    if not samples:
        return []
    with torch.inference_mode():
        logits, row = _read(model, [sample.prompt_ids for sample in samples], pad_id, batch_size)
        labels = torch.tensor([sample.completion_ids[0] for sample in samples], device=logits.device)
        return logits.float().log_softmax(-1)[row, labels].tolist()


def collate(samples: Sequence["Sample"], pad_id: int) -> dict[str, "Tensor"]:
    """Samples as one batch: `input_ids` and `attention_mask` [rows, longest], padded right, `labels` [rows]."""
    import torch

    batch = _padded([sample.prompt_ids for sample in samples], pad_id)
    return {**batch, "labels": torch.tensor([sample.completion_ids[0] for sample in samples])}


def token_losses(model, batch: dict[str, "Tensor"]) -> "Tensor":
    """Cross-entropy of each row's label: float32 [rows], in nats. The softmax is in float32."""
    import torch

    logits = _logits(model, batch)
    with torch.autocast(logits.device.type, enabled=False):
        return torch.nn.functional.cross_entropy(logits.float(), batch["labels"].to(logits.device), reduction="none")


def _padded(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, "Tensor"]:
    mask = right_padded([[1] * len(prompt) for prompt in prompts], 0)
    return {"input_ids": right_padded(prompts, pad_id), "attention_mask": mask}


def _logits(model, batch: dict[str, "Tensor"]) -> "Tensor":
    return model(**{name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}).logits
