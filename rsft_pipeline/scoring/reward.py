"""Reward: what a sequence-classification model says of prompt and completion."""

from collections.abc import Sequence

from rsft_pipeline.devices import Device
from rsft_pipeline.prompts import templates
from rsft_pipeline.scoring.classifier import Classifier


class Reward:
    """A reward model on a device.

    Args:
        model: local folder, or hub id.
        revision: commit or tag on the hub.
        label_index: which of the model's outputs is the reward.
        chat: whether prompts have messages. They are read with the completion as one conversation, by the model's own
            chat template; where it has none, as other prompts: prompt and completion as a pair of texts.

    Raises:
        OSError: no such model, or none with safetensors. ValueError: it has no such output.
    """

    def __init__(self, model: str, revision: str | None, label_index: int, chat: bool, device: Device):
        self.classifier, self.label_index = Classifier(model, revision, device), label_index
        self.chat = chat and bool(self.classifier.tokenizer.chat_template)
        added = self.classifier.tokenizer.added_tokens_decoder.values()
        self.special = [token.content for token in added if token.special]
        outputs = self.classifier.model.config.num_labels
        if label_index >= outputs:
            raise ValueError(f"label_index is {label_index}, but {model} has {outputs} outputs")

    def __call__(self, rows: Sequence[tuple[str, list[dict] | None, str]], batch_size: int) -> list[float | None]:
        """One reward for each (prompt, its messages, completion).

        None if they exceed the model's context, or if the completion of a conversation spells a special token of the
        model: it could end its turn by one, and write the next.
        """
        if self.chat:
            texts = [self._conversation(messages, completion) for _, messages, completion in rows]
            outputs = self.classifier.conversations(texts, batch_size)
        else:
            outputs = self.classifier([(prompt, completion) for prompt, _, completion in rows], batch_size)
        return [
            None if row is None or (self.chat and self._spells_special(completion)) else row[self.label_index]
            for row, (_, _, completion) in zip(outputs, rows, strict=True)
        ]

    def _spells_special(self, completion: str) -> bool:
        return any(token in completion for token in self.special)

    def _conversation(self, messages: list[dict], completion: str) -> str:
        reply = {"role": "assistant", "content": completion}
        return templates.render(self.classifier.tokenizer, [*messages, reply], finished=True)
