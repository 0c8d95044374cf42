"""Likelihood: the log-probability of a completion after its prompt, under a model other than the policy.

Belongs here: writing prompt and completion in that model's tokens. Does not: adding up over tokens (tasks).
"""

from collections.abc import Sequence
from pathlib import Path

from rsft_pipeline import models, prompts
from rsft_pipeline.devices import Device
from rsft_pipeline.models import configuration
from rsft_pipeline.prompts import templates
from rsft_pipeline.tasks import causal, seq2seq
from rsft_pipeline.training import Sample, room


class Likelihood:
    """A language model on a device.

    Args:
        folder: the model's; an encoder-decoder where its configuration says so, else a causal model.

    Raises:
        ModelError: no safetensors weights, or a tokenizer without the tokens that are needed.
    """

    def __init__(self, folder: Path, device: Device):
        from transformers import AutoConfig

        two_sided = AutoConfig.from_pretrained(folder, trust_remote_code=False).is_encoder_decoder
        self.name, self.task = ("seq2seq", seq2seq) if two_sided else ("causal", causal)
        self.tokenizer = models.tokenizer(folder)
        self.model = models.load(folder, device, task=self.name)
        self.longest = configuration.context_length(folder)

    def __call__(self, rows: Sequence[tuple[str, list[dict] | None, str, bool]], batch_size: int) -> list[float | None]:
        """The log-probability of each completion, in nats.

        Of the several ways to write a text in the model's tokens, one counts: the prompt's, the completion's and,
        if the completion had ended, the end of sequence. None if these are longer than the model's context, or if
        an unfinished completion has no text, which is no event.

        Args:
            rows: (prompt as the policy read it, its messages if it is a chat prompt, completion, whether the
                completion had ended). Messages go through the model's own chat template.
        """
        texts = [completion for _, _, completion, _ in rows]
        ended = self.task.completion_ids(self.model, self.tokenizer, texts)
        begun = len(configuration.begin_ids(self.model))
        encoded: dict[int, Sample] = {}
        for i, (prompt, messages, _, has_ended) in enumerate(rows):
            sample = Sample("", self._prompt(prompt, messages), ended[i] if has_ended else ended[i][:-1])
            if len(sample.completion_ids) > begun and self._fits(sample):
                encoded[i] = sample
        samples = list(encoded.values())
        values = self.task.log_probabilities(self.model, samples, self.tokenizer.pad_token_id, batch_size)
        found = dict(zip(encoded, values, strict=True))
        return [found.get(i) for i in range(len(rows))]

    def _prompt(self, prompt: str, messages: list[dict] | None) -> list[int]:
        if messages is not None:
            prompt = templates.render(self.tokenizer, messages)
        return prompts.encode(self.tokenizer, prompt, messages is not None, self.name)

    def _fits(self, sample: Sample) -> bool:
        return self.longest is None or room(sample, self.model) <= self.longest
