"""Encoder-decoders such as T5 and BART: completions of a prompt that an encoder has read.

A sample's prompt is the encoder's input, its completion the decoder's targets. The token that the decoder
starts from is part of neither: it comes from the model's configuration whenever the model is fed.

Belongs here: what is particular to feeding such a model. Not: what all models that write have in common
(writing.py), how draws share an encoding (decoding/shared_encoder.py), how a step's loss is added up (training.py).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rsft_pipeline.models import configuration
from rsft_pipeline.padding import right_padded
from rsft_pipeline.tasks import writing
from rsft_pipeline.tasks.writing import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

    from rsft_pipeline.training import Sample

draw = writing.draw
completion_ids = writing.completion_ids


def log_probabilities(model, samples: Sequence["Sample"], pad_id: int, batch_size: int = 64) -> list[float]:
    """Log-probability of each sample's completion given its prompt, by teacher forcing, in nats."""
    return writing.log_probabilities(collate, token_losses, model, samples, pad_id, batch_size)


def collate(samples: Sequence["Sample"], pad_id: int) -> dict[str, "Tensor"]:
    """Samples as one batch, both sides padded on the right.

    Returns:
        `input_ids` and `attention_mask`, int64 [rows, longest prompt], and `labels`, int64 [rows, longest
        completion], IGNORED after a completion.
    """
    return {
        "input_ids": right_padded([sample.prompt_ids for sample in samples], pad_id),
        "attention_mask": right_padded([[1] * len(sample.prompt_ids) for sample in samples], 0),
        "labels": right_padded([sample.completion_ids for sample in samples], IGNORED),
    }


def token_losses(model, batch: dict[str, "Tensor"]) -> "Tensor":
    """Negative log-likelihood of each row's completion, summed over its tokens: float32 [rows], in nats.

    The decoder reads the start token and then the targets, each predicting the next. No target depends on what it
    reads after a completion's end, so any id will do.
    """
    targets = batch["labels"]
    read = targets.roll(1, dims=1).clamp(min=0)
    read[:, 0] = configuration.start_id(model)
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=read,
        use_cache=False,
    ).logits
    return writing.summed(logits, targets)
