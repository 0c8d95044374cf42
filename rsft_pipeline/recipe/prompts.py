"""The section `prompts`: where prompts come from and how a row becomes one.

Not: reading them (rsft_pipeline/prompts).
"""

from typing import Literal

from pydantic import Field, model_validator

from rsft_pipeline.recipe.section import Section


class Message(Section):
    """One turn of a chat prompt."""

    role: Literal["system", "user", "assistant"] = Field(description="Who speaks.")
    content: str = Field(description="Text with {column} placeholders.")


class Prompts(Section):
    """Where prompts come from and how a row becomes one."""

    source: str = Field(
        description="A file (JSONL, CSV, Parquet, text), a folder made by `datasets`, a hub data set id, "
        "or `module:function` that yields rows. Paths are relative to the recipe's folder."
    )
    format: Literal["auto", "jsonl", "csv", "parquet", "text", "dataset", "hub", "function"] = Field(
        "auto", description="How to read the source; `auto`: by its name. `text`: one row per line, column `text`."
    )
    hub_config: str | None = Field(None, description="Configuration name of a hub data set.")
    hub_split: str = Field("train", description="Split of a `datasets` folder or hub data set.")
    encoding: str = Field("utf-8", description="Text encoding of JSONL, CSV and text files.")
    columns: dict[str, str] = Field({}, description="Renames: our name → the source's column.")
    template: str | None = Field(None, description="Prompt text with {column} placeholders.")
    messages: list[Message] | None = Field(
        None, description="Chat prompt, rendered by the tokenizer's chat template where it has one."
    )
    reference: str | None = Field(None, description="Column that holds the reference answer, if there is one.")
    limit: int | None = Field(None, ge=1, description="Use at most this many usable rows.")
    max_tokens: int | None = Field(
        None, ge=1, description="Longest prompt, in tokens; default: the model's context less `sampling.max_tokens`."
    )
    too_long: Literal["refuse", "cut"] = Field(
        "refuse", description="A prompt that is too long is quarantined (`refuse`) or truncated at its end (`cut`)."
    )
    eval_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of prompts, chosen by hash, held out for evaluation and never trained on."
    )
    inbox: str | None = Field(None, description="Folder whose files are read too; a new file starts a round.")

    @model_validator(mode="after")
    def _one_template(self):
        if (self.template is None) == (self.messages is None):
            raise ValueError("give either `template:` or `messages:`, and not both")
        if self.messages is not None and self.too_long == "cut":
            raise ValueError("`too_long: cut` would cut into the chat template: it goes with `template:` only")
        return self
