"""The sections `evaluation`, `promotion` and `stop`: what a checkpoint has to show, and when that is enough.

Not: comparing and judging by it (rsft_pipeline/evaluation.py).
"""

from typing import Literal

from pydantic import Field, ValidationInfo, model_validator

from rsft_pipeline.recipe.section import Section, is_recorded


class Evaluation(Section):
    """How policy and checkpoint are compared on held-out prompts."""

    prompts: int | None = Field(None, ge=1, description="Held-out prompts used, chosen by hash; default: all.")
    draws: int = Field(8, ge=1, description="Candidates per held-out prompt.")
    k: int = Field(4, ge=1, description="The k of pass@k.")
    temperature: float = Field(1.0, gt=0, description="Temperature of these draws.")
    greedy: bool = Field(
        False, description="One candidate per prompt instead, of the most probable tokens: `draws: 1, k: 1` with it."
    )
    pass_above: float = Field(
        0.5, description="A candidate passes when its combined score is above this and no gate failed."
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Level of the intervals.")

    @model_validator(mode="after")
    def _enough_draws(self):
        if self.k > self.draws:
            raise ValueError("`k` cannot be larger than `draws`")
        if self.greedy and self.draws > 1:
            raise ValueError("`greedy` draws would all be the same: set `draws: 1` and `k: 1` with it")
        return self


class Promotion(Section):
    """When a checkpoint becomes the champion."""

    metric: Literal["pass_at_1", "pass_at_k", "mean_score"] = Field(
        "pass_at_1", description="What is compared, paired per prompt."
    )
    require: Literal["better", "not_worse"] = Field(
        "better",
        description="`better`: the whole interval of the difference is above `margin`. `not_worse`: above −`margin`.",
    )
    margin: float = Field(
        0.0, ge=0, description="Smallest gain asked for; with `not_worse` the largest loss allowed, above 0."
    )

    @model_validator(mode="after")
    def _some_loss_is_allowed(self, info: ValidationInfo):
        if self.require == "not_worse" and self.margin == 0 and not is_recorded(info):
            raise ValueError("`require: not_worse` needs a `margin:` above 0: with none it asks for what `better` does")
        return self


MOST_ROUNDS = 1000  # their keys, r000 to r999, sort as rounds do


class Stop(Section):
    """When the loop ends."""

    rounds: int = Field(3, ge=1, le=MOST_ROUNDS, description="Most rounds.")
    patience: int | None = Field(None, ge=1, description="Rounds in a row without a promotion.")
    target: float | None = Field(None, description="Value of the promotion metric that is enough.")
    tokens: int | None = Field(None, ge=1, description="Budget of tokens drawn to train on, over all rounds.")
