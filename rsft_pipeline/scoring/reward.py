"""Reward: what a sequence-classification model says of prompt and completion."""

from collections.abc import Sequence

from rsft_pipeline.devices import Device
from rsft_pipeline.scoring.classifier import Classifier


class Reward:
    """A reward model on a device.

    Args:
        model: local folder, or hub id.
        revision: commit or tag on the hub.
        label_index: which of the model's outputs is the reward.

    Raises:
        OSError: no such model, or none with safetensors. ValueError: it has no such output.
    """

    def __init__(self, model: str, revision: str | None, label_index: int, device: Device):
        self.classifier, self.label_index = Classifier(model, revision, device), label_index
        outputs = self.classifier.model.config.num_labels
        if label_index >= outputs:
            raise ValueError(f"label_index is {label_index}, but {model} has {outputs} outputs")

    def __call__(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[float | None]:
        """One reward for each (prompt, completion); None where they are longer than the model's context."""
        return [None if row is None else row[self.label_index] for row in self.classifier(pairs, batch_size)]
