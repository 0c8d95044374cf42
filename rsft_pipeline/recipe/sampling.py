"""The section `sampling`: how candidates are drawn, how many, and from what.

Not: drawing them (rsft_pipeline/sampling.py).
"""

from typing import Literal

from pydantic import Field, model_validator

from rsft_pipeline.recipe.section import Section


class Teacher(Section):
    """Another model that candidates are drawn from; it must use the policy's tokenizer."""

    source: str = Field(description="A local folder, or a model id on the Hugging Face hub.")
    revision: str | None = Field(None, description="Commit or tag on the hub; pin it to make rounds repeatable.")


class Until(Section):
    """Drawing in passes until enough candidates are accepted, instead of a fixed number for every prompt."""

    per_prompt: int | None = Field(
        None, ge=1, description="Stop drawing for a prompt once it has this many accepted candidates."
    )
    accepted: int | None = Field(None, ge=1, description="Stop drawing once the round has this many accepted.")
    draws: int = Field(ge=1, description="At most this many candidates per prompt, accepted or not.")

    @model_validator(mode="after")
    def _ends(self):
        if self.per_prompt is None and self.accepted is None:
            raise ValueError("give `per_prompt:`, `accepted:`, or both")
        return self


class Sampling(Section):
    """How candidates are drawn."""

    source: Literal["policy", "teacher", "reference"] = Field(
        "policy",
        description="What candidates are: draws of the policy, draws of a teacher, or the reference answers with the "
        "policy's probabilities. The lineage records which; a round never mixes them.",
    )
    teacher: Teacher | None = Field(None, description="With `source: teacher`: the model that is drawn from.")
    draws: int = Field(8, ge=1, description="Candidates per prompt; with `until`, per prompt and pass.")
    until: Until | None = Field(None, description="Draw in passes until enough candidates are accepted.")
    prompts: int | None = Field(None, ge=1, description="Prompts per round, chosen by hash and round; default: all.")
    temperature: float = Field(1.0, gt=0, description="Divides the logits.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens with this much probability.")
    top_k: int | None = Field(None, ge=1, description="Keep the k most probable tokens.")
    max_tokens: int = Field(64, ge=1, description="Longest completion, in tokens.")
    stop: list[str] = Field([], description="Extra stop tokens, each exactly one token of the tokenizer.")
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Draws decoded at once, halved when memory runs out; default: what free memory holds. For a "
        "classifier, texts read at once; default: 64.",
    )
    wave_size: int = Field(
        2048,
        ge=1,
        description="Candidates persisted together, in whole prompts (at least one); a kill loses one wave at most.",
    )

    @model_validator(mode="after")
    def _parts_agree(self):
        if (self.source == "teacher") != (self.teacher is not None):
            raise ValueError("`source: teacher` and a `teacher:` section go together")
        if self.source == "reference" and self.draws > 1:
            raise ValueError(
                f"with `source: reference` all `draws` of a prompt are the same answer, and there are {self.draws}: "
                "give `draws: 1`, and `until.draws` if an answer may have several chances"
            )
        if self.until and self.until.draws < self.draws:
            raise ValueError("`until.draws`, the most per prompt, cannot be less than `draws`, those of one pass")
        return self

    @property
    def most_draws(self) -> int:
        """The most candidates that a prompt can have."""
        return self.until.draws if self.until else self.draws
