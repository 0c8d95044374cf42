"""Classifier: the outputs of a sequence-classification model on pairs of texts, or on conversations.

Weights are read as safetensors only, and no code that comes with a model is run.
"""

from collections.abc import Mapping, Sequence

from rsft_pipeline.devices import Device
from rsft_pipeline.models import whole
from rsft_pipeline.models.configuration import context_of


class Classifier:
    """A sequence-classification model on a device.

    Args:
        model: local folder, or hub id.
        revision: commit or tag on the hub.

    Raises:
        OSError: no such model, or none with safetensors. ModelError: one without a head that was trained.
    """

    def __init__(self, model: str, revision: str | None, device: Device):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        self.model = whole(AutoModelForSequenceClassification, model, revision=revision, dtype=device.torch_dtype)
        self.model.to(device.kind).eval()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Decoder models find a text's last token, where they classify, by the padding behind it.
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.padding_side = "right"
        context = context_of(self.model.config)
        self.longest = min(self.tokenizer.model_max_length, context or self.tokenizer.model_max_length)

    def __call__(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[list[float] | None]:
        """The logits of each pair of texts; None where they are longer than the model's context.

        What reads like a special token in them is text: a completion must not end what the model is told of it.
        """
        first, second = [first for first, _ in pairs], [second for _, second in pairs]
        return self._logits(self.tokenizer(first, second, split_special_tokens=True, verbose=False), batch_size)

    def conversations(self, texts: Sequence[str], batch_size: int) -> list[list[float] | None]:
        """The same of texts from the chat template, which hold their special tokens already."""
        return self._logits(self.tokenizer(list(texts), add_special_tokens=False, verbose=False), batch_size)

    def _logits(self, encoded: Mapping[str, list[list[int]]], batch_size: int) -> list[list[float] | None]:
        import torch

        lengths = [len(ids) for ids in encoded["input_ids"]]
        # By length, so that little is padded; each row goes back to its place.
        order = sorted((i for i, n in enumerate(lengths) if n <= self.longest), key=lengths.__getitem__)
        logits: list[list[float] | None] = [None] * len(lengths)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer.pad(
                {key: [values[i] for i in rows] for key, values in encoded.items()}, return_tensors="pt"
            )
            with torch.inference_mode():
                given = self.model(**batch.to(self.model.device)).logits.float().tolist()
            for i, row in zip(rows, given, strict=True):
                logits[i] = row
        return logits
