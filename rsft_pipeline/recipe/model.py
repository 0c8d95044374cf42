"""The section `model`: which weights the first round starts from, how they are made, and which of them are trained.

Not: making, loading and choosing them (rsft_pipeline/models and bootstrap.py).
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from rsft_pipeline.recipe.section import Section


class WarmUp(Section):
    """Supervised training on text of the task, once, before the first round."""

    corpus: str = Field(
        description="Warm-up text: `module:function` that yields {prompt, completion} rows, or a JSONL file of them; "
        "rows whose prompt is held out are skipped."
    )
    steps: int = Field(500, ge=0, description="Optimiser steps of the warm-up.")
    batch_size: int = Field(128, ge=1, description="Rows per step.")
    learning_rate: float = Field(3e-3, gt=0, description="Peak learning rate: linear warm-up, then cosine decay to 0.")


class Bootstrap(WarmUp):
    """A small model made on this machine and warmed up, so that a recipe can run without a hub."""

    config: dict[str, Any] = Field(
        description="Transformers configuration: `model_type`, e.g. {model_type: llama}, and the sizes; "
        "vocabulary size and special tokens are filled in from the tokenizer."
    )
    tokenizer: Literal["characters", "bpe"] = Field(
        "characters", description="One token per character, or byte-level BPE trained on the corpus."
    )
    vocabulary: int = Field(
        512, ge=260, description="Vocabulary size of the BPE tokenizer; at least 256 bytes and 4 special tokens."
    )


class Lora(Section):
    """Low-rank adapters (peft), merged into the weights when the checkpoint is saved."""

    rank: int = Field(8, ge=1, description="Rank of the adapters.")
    alpha: float = Field(16, gt=0, description="The adapters' output is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' inputs.")
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Names of the modules to adapt, or every linear layer."
    )


class Model(Section):
    """Which weights the first round starts from, and which of them are trained."""

    source: str = Field(description="`bootstrap`, a local folder, or a model id on the Hugging Face hub.")
    revision: str | None = Field(None, description="Commit or tag on the hub; pin it to make rounds repeatable.")
    bootstrap: Bootstrap | None = Field(None, description="How to make the model when source is `bootstrap`.")
    warm_up: WarmUp | None = Field(
        None, description="First train a model from elsewhere on text of the task; the first round starts from that."
    )
    labels: list[str] = Field(
        [], description="With `task: classification`: the reference answers, in the order of the model's outputs."
    )
    train: Literal["all", "lora", "last_layers", "freeze"] = Field(
        "all",
        description="What is trained: everything, LoRA adapters, the last layers and head, or all but `freeze`.",
    )
    last_layers: int = Field(
        1, ge=1, description="With `train: last_layers`: how many transformer blocks, from the end."
    )
    freeze: list[str] = Field(
        [], description="With `train: freeze`: shell patterns of the names of parameters that stay fixed."
    )
    lora: Lora = Field(Lora(), description="With `train: lora`: the adapters.")

    @model_validator(mode="after")
    def _parts_agree(self):
        if (self.source == "bootstrap") != (self.bootstrap is not None):
            raise ValueError("`source: bootstrap` and a `bootstrap:` section go together")
        if self.bootstrap is not None and self.warm_up is not None:
            raise ValueError("a bootstrapped model is warmed up by its own section: leave `warm_up:` out")
        if len(self.labels) != len(set(self.labels)) or len(self.labels) == 1:
            raise ValueError("`labels` needs two labels or more, each once")
        if self.train == "freeze" and not self.freeze:
            raise ValueError("`train: freeze` needs `freeze:`, a list of parameter-name patterns")
        return self
