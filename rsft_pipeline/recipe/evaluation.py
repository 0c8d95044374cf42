"""The sections `evaluation`, `promotion` and `stop`: how a checkpoint is compared, when it wins, and when to stop.

Not: the comparison and the decisions themselves (rsft_pipeline/evaluation.py).
"""

from typing import Literal

from pydantic import Field, ValidationInfo, model_validator

from rsft_pipeline.recipe.section import Section, is_recorded


class Evaluation(Section):
    """How policy and checkpoint are compared on held-out prompts."""

    prompts: int | None = Field(None, ge=1, description="Held-out prompts to use, chosen by hash; default: all.")
    draws: int = Field(8, ge=1, description="Candidates per held-out prompt.")
    k: int = Field(4, ge=1, description="The k of pass@k.")
    temperature: float = Field(1.0, gt=0, description="Temperature of these draws.")
    greedy: bool = Field(
        False, description="Decode greedily, the most probable token each time; needs `draws: 1` and `k: 1`."
    )
    pass_above: float = Field(
        0.5, description="A candidate passes when its combined score is above this and it passed every gate."
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Confidence level of the intervals.")

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
        description="`better`: the whole interval of the difference is above `margin`; `not_worse`: above −`margin`.",
    )
    margin: float = Field(
        0.0, ge=0, description="Gain required; with `not_worse` the largest loss allowed, which must be above 0."
    )

    @model_validator(mode="after")
    def _some_loss_is_allowed(self, info: ValidationInfo):
        if self.require == "not_worse" and self.margin == 0 and not is_recorded(info):
            raise ValueError("`require: not_worse` needs a `margin:` above 0: with none it asks for what `better` does")
        return self


MOST_ROUNDS = 1000  # so that the keys, r000 to r999, sort in the order of the rounds


class Stop(Section):
    """When the loop ends."""

    rounds: int = Field(3, ge=1, le=MOST_ROUNDS, description="Stop after this many rounds.")
    patience: int | None = Field(None, ge=1, description="Stop after this many rounds in a row without a promotion.")
    target: float | None = Field(None, description="Stop once the champion's promotion metric is at least this.")
    tokens: int | None = Field(None, ge=1, description="Stop once the rounds have drawn this many tokens for training.")
