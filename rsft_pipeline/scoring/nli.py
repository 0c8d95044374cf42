"""Contradiction: whether one text contradicts another, by a model of natural language inference."""

import math
from collections.abc import Sequence

from rsft_pipeline.devices import Device
from rsft_pipeline.scoring.classifier import Classifier


class Contradiction:
    """A sequence-classification model with an output for contradiction.

    Raises:
        OSError: no such model, or none with safetensors. ValueError: not one of its labels is a contradiction.
    """

    def __init__(self, model: str, revision: str | None, device: Device):
        self.classifier = Classifier(model, revision, device)
        labels = self.classifier.model.config.id2label
        found = [index for index, label in labels.items() if "contradict" in label.lower()]
        if len(found) != 1:
            raise ValueError(f"{model} has the labels {', '.join(labels.values())}; expected one for contradiction")
        self.index = found[0]

    def __call__(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[float | None]:
        """P(contradiction) of each (premise, hypothesis); None where they are longer than the model's context."""
        logits = self.classifier(pairs, batch_size)
        return [None if row is None else _softmax(row, self.index) for row in logits]


def _softmax(logits: list[float], index: int) -> float:
    return 1 / math.fsum(math.exp(min(value - logits[index], 700.0)) for value in logits)
