"""The section `acceptance`: the rules that a recipe can name, and their parameters.

Not: deciding by them (rsft_pipeline/acceptance.py), nor picking the parameters that are left to a round
(rsft_pipeline/calibration.py).
"""

from typing import Annotated, ClassVar, Literal, Union

from pydantic import Field, model_validator

from rsft_pipeline.recipe.section import Section


class Rule(Section):
    """What all acceptance rules share."""

    distinct: bool = Field(True, description="Accept the same normalised text only once per prompt.")
    cap: int | None = Field(
        None, ge=1, description="Accept at most this many candidates per prompt, so that easy prompts do not dominate."
    )

    @property
    def per_candidate(self) -> bool:
        """Whether a candidate's decision, before `distinct` and `cap`, depends only on the candidate and the pilot.

        Later draws then never change such a decision; they can only add to a prompt's accepted candidates.
        """
        return False

    @property
    def pilot_draws(self) -> int:
        """How many first draws of each prompt must be there before anything can be decided."""
        return 0


class CalibratedRule(Rule):
    """What the rules share whose parameter can be picked so that a given share of the candidates is accepted."""

    picked: ClassVar[str]  # the field that may be `calibrate`

    share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="With `calibrate`: the share to accept of the candidates judged and past the gates.",
    )
    pilot: int = Field(
        1, ge=1, description="With `calibrate` (or `M: estimate`): how many first draws of each prompt it is based on."
    )

    @property
    def per_candidate(self) -> bool:
        return True

    @property
    def pilot_draws(self) -> int:
        return self.pilot if getattr(self, self.picked) in ("calibrate", "estimate") else 0

    @property
    def calibrated(self) -> bool:
        """Whether the parameter is to be picked."""
        return getattr(self, self.picked) == "calibrate"

    @model_validator(mode="after")
    def _share_is_for_calibrate(self):
        if self.calibrated != (self.share is not None):
            raise ValueError(f"`{self.picked}: calibrate` and `share:` go together")
        return self


class StochasticRule(CalibratedRule):
    """What the rules that accept with a probability A share."""

    weight: Literal["one", "A"] = Field(
        "one", description="Weight of an accepted sample in the training loss: 1 for all, or its A."
    )


class ThresholdRule(CalibratedRule):
    """Accept when g(x) > t."""

    picked = "threshold"

    rule: Literal["threshold"]
    threshold: float | Literal["calibrate"] = Field(description="t; the combined score must be above it.")
    raise_by: float = Field(0.0, ge=0, description="Added to t for each round before this one.")

    @model_validator(mode="after")
    def _what_is_raised_is_given(self):
        if self.calibrated and self.raise_by:
            raise ValueError("`raise_by` needs a number as `threshold`: `calibrate` picks one anew in each round")
        return self


class TopKRule(Rule):
    """Accept the k best candidates of each prompt."""

    rule: Literal["top_k"]
    k: int = Field(ge=1, description="Candidates to accept per prompt.")


class QuantileRule(Rule):
    """Accept the best share of the whole round."""

    rule: Literal["quantile"]
    share: float = Field(gt=0, le=1, description="Share to accept of the candidates judged and past the gates.")


class RejectionRule(StochasticRule):
    """True rejection sampling: accept when u < A, A = min(1, p(x) / (M·q(x)))."""

    picked = "M"

    rule: Literal["rejection"]
    target: str = Field(
        "policy",
        description="What gives log p: `policy` (the policy itself, at temperature 1, untruncated), "
        "or the name of a scorer that returns a log-probability.",
    )
    M: Annotated[float, Field(gt=0)] | Literal["estimate", "calibrate"] = Field(
        "estimate",
        description="The M of p ≤ M·q; `estimate`: the pilot's largest p/q; the pilot is then never accepted.",
    )
    safety: float = Field(1.0, ge=1, description="With `estimate`: M is the pilot's largest p/q times this.")
    threshold: float | None = Field(
        None, ge=0, lt=1, description="Accept when A is above this, with no randomness; default: when u < A."
    )

    @model_validator(mode="after")
    def _what_is_calibrated_is_a_chance(self):
        if self.calibrated and self.threshold is not None:
            raise ValueError("`M: calibrate` is for u < A: give `M` a number, or leave `threshold` out")
        return self


class BoltzmannRule(StochasticRule):
    """Accept when u < A, A = exp((r − r_max) / β): draws from q·exp(r/β)."""

    picked = "beta"

    rule: Literal["boltzmann"]
    beta: Annotated[float, Field(gt=0)] | Literal["calibrate"] = Field(
        description="β: towards 0 only the best are accepted, towards infinity everything."
    )
    r_max: float | None = Field(
        None, description="Largest possible score; default: the largest seen for each prompt (then approximate)."
    )

    @property
    def per_candidate(self) -> bool:
        return self.r_max is not None


class LossRule(StochasticRule):
    """Accept when u < A, A = min(1, loss / k): keeps what the model finds hard."""

    picked = "k"

    rule: Literal["loss"]
    k: Annotated[float, Field(gt=0)] | Literal["calibrate"] = Field(
        description="The loss, in nats per token, at and above which everything is accepted."
    )


AnyRule = Annotated[
    Union[ThresholdRule, TopKRule, QuantileRule, RejectionRule, BoltzmannRule, LossRule], Field(discriminator="rule")
]
