"""Reward: what a sequence-classification model says of prompt and completion.

Weights are read as safetensors only, and no code that comes with a model is run.
"""

from collections.abc import Sequence

from rsft_pipeline.devices import Device


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
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        source = {"revision": revision, "trust_remote_code": False}
        self.tokenizer = AutoTokenizer.from_pretrained(model, **source)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            model, use_safetensors=True, dtype=device.torch_dtype, **source
        )
        self.model.to(device.kind).eval()
        self.label_index = label_index
        if label_index >= self.model.config.num_labels:
            raise ValueError(f"label_index is {label_index}, but {model} has {self.model.config.num_labels} outputs")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Decoder models find a text's last token, where they classify, by the padding.
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        context = getattr(self.model.config, "max_position_embeddings", None)
        self.longest = min(self.tokenizer.model_max_length, context or self.tokenizer.model_max_length)

    def __call__(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[float | None]:
        """One reward for each (prompt, completion); None where they are longer than the model's context."""
        import torch

        encoded = self.tokenizer(
            [prompt for prompt, _ in pairs], [completion for _, completion in pairs], verbose=False
        )
        lengths = [len(ids) for ids in encoded["input_ids"]]
        # By length, so that little is padded; each reward goes back to its place.
        order = sorted((i for i, n in enumerate(lengths) if n <= self.longest), key=lengths.__getitem__)
        rewards: list[float | None] = [None] * len(pairs)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer.pad(
                {key: [values[i] for i in rows] for key, values in encoded.items()}, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(**batch.to(self.model.device)).logits
            for i, value in zip(rows, logits[:, self.label_index].float().tolist(), strict=True):
                rewards[i] = value
        return rewards
