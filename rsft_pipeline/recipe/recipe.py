"""Recipe: all sections together, what they must agree on, and the fields that belong to no section.

Not: finding and reading a file, and explaining its errors (reading.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from rsft_pipeline.lineage import digest
from rsft_pipeline.recipe.acceptance import AnyRule, LossRule, RejectionRule
from rsft_pipeline.recipe.evaluation import Evaluation, Promotion, Stop
from rsft_pipeline.recipe.model import Model
from rsft_pipeline.recipe.prompts import Prompts
from rsft_pipeline.recipe.sampling import Sampling, Until
from rsft_pipeline.recipe.scoring import Scoring
from rsft_pipeline.recipe.section import RECORDED, RecipeError, Section, is_recorded
from rsft_pipeline.recipe.training import Training

LOG_PROBABILITIES = ("knowledge", "likelihood", "reward", "function")  # scorers that may give log p, normalised or not


class Recipe(Section):
    """One pipeline: prompts, a model, how to draw, judge, accept, train and compare, and when to stop."""

    description: str = Field(description="What the recipe is for, in one line.")
    task: Literal["causal", "seq2seq", "classification"] = Field(
        "causal", description="The kind of model; each is one module in rsft_pipeline/tasks."
    )
    model: Model = Field(description="Which weights to start from, and which of them to train.")
    prompts: Prompts = Field(description="Where prompts come from.")
    sampling: Sampling = Field(Sampling(), description="How candidates are drawn.")
    scoring: Scoring = Field(description="How candidates are judged.")
    acceptance: AnyRule = Field(description="Which candidates are accepted.")
    training: Training = Field(Training(), description="How the checkpoint is trained.")
    evaluation: Evaluation = Field(Evaluation(), description="How the checkpoint is compared.")
    promotion: Promotion = Field(Promotion(), description="When the checkpoint becomes the champion.")
    stop: Stop = Field(Stop(), description="When the loop ends.")
    policy: Literal["champion", "previous", "base"] = Field("champion", description="What a round samples from.")
    controls: list[Literal["random", "everything"]] = Field(
        [],
        description="Checkpoints to compare the round's own with. They are trained in the same way, but on `random`: "
        "as many candidates, chosen without looking at their scores; or `everything`: all candidates.",
    )
    group_by: str | None = Field(
        None, description="Column of the prompts to report acceptance by, such as an intent or a label."
    )
    acceptance_rate: tuple[float, float] = Field((0.01, 0.99), description="A check warns outside these bounds.")
    largest_share: float = Field(
        0.1, gt=0, le=1, description="A check warns when one prompt has more than this share of the accepted set."
    )
    schedule: str | None = Field(None, description="Cron line (UTC) that starts a round.")
    owners: list[str] = Field([], description="E-mail addresses or `team:name`, shown in Dagster.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Every random choice follows from it.")

    _path: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _sections_agree(self, info: ValidationInfo):
        if isinstance(self.acceptance, RejectionRule):
            known = ["policy", *(scorer.label for scorer in self.scoring.scorers)]
            if self.acceptance.target not in known:
                raise ValueError(f"acceptance.target is {self.acceptance.target!r}; expected one of {', '.join(known)}")
            if not is_recorded(info):
                self.check_target(self.acceptance.target)
        if (self.task == "classification") != bool(self.model.labels):
            raise ValueError("`task: classification` and a list of `model.labels` go together")
        if self.sampling.source == "reference" and self.prompts.reference is None:
            raise ValueError("`sampling.source: reference` needs `prompts.reference`, the column of the answers")
        if self.sampling.source == "reference" and isinstance(self.acceptance, RejectionRule):
            raise ValueError("`rule: rejection` needs the q of a draw, and references are not drawn")
        if self.sampling.source == "teacher":
            self._check_teacher()
        if self.sampling.until:
            self._check_until(self.sampling.until)
        if not is_recorded(info):
            self._check_pilot()
        if self.promotion.metric != "mean_score" and (self.stop.target or 0) > 1 and not is_recorded(info):
            raise ValueError(f"stop.target is {self.stop.target:g}, and {self.promotion.metric} is a share, 1 at most")
        return self

    def check_target(self, target: str) -> None:
        """Raise ValueError if `target` names a scorer whose scores `rule: rejection` cannot use as log p."""
        kinds = {scorer.label: scorer.kind for scorer in self.scoring.scorers}
        if target in kinds and kinds[target] not in LOG_PROBABILITIES:
            raise ValueError(
                f"acceptance.target is {target!r}, whose scores are no log-probabilities: give `policy`, or a scorer "
                f"that is one of {', '.join(LOG_PROBABILITIES)}"
            )
        if kinds.get(target) == "likelihood" and self.sampling.stop:
            raise ValueError(
                f"acceptance.target: {target!r} takes every finished completion as ended by the end-of-sequence token, "
                "but `sampling.stop` ends some by another: p and q would be of different texts"
            )

    def _check_teacher(self) -> None:
        """Refuse what needs the policy's own probability of a draw: it is not known for a teacher's draws."""
        asks = []
        if isinstance(self.acceptance, LossRule):
            asks.append("`rule: loss`")
        if isinstance(self.acceptance, RejectionRule) and self.acceptance.target == "policy":
            asks.append("`acceptance.target: policy`")
        if any(scorer.kind == "knowledge" for scorer in self.scoring.scorers):
            asks.append("a scorer `knowledge`")
        if asks:
            raise ValueError(
                f"{asks[0]} needs the policy's own probability of a draw, and with `sampling.source: teacher` only "
                "the teacher's is known; a scorer `likelihood` gives that of any model"
            )

    def _check_until(self, until: Until) -> None:
        rule = self.acceptance
        if not rule.per_candidate:
            raise ValueError(
                f"`sampling.until` needs a rule that decides on each candidate by itself; with `rule: {rule.rule}` "
                "a later draw can change what was accepted (with boltzmann, give `r_max`)"
            )
        if rule.cap is not None and until.per_prompt is not None and rule.cap < until.per_prompt:
            raise ValueError("`acceptance.cap` is below `sampling.until.per_prompt`, which could never be reached")

    def _check_pilot(self) -> None:
        rule, draws = self.acceptance, self.sampling.draws
        set_aside = isinstance(rule, RejectionRule) and rule.M == "estimate"
        if rule.pilot_draws + set_aside > draws:
            besides = ", and another draw, since the pilot's are never accepted" if set_aside else ""
            of = " of the first pass" if self.sampling.until else ""
            raise ValueError(
                f"`acceptance.pilot` is {rule.pilot}: it has to fit into the {draws} `sampling.draws`{of}{besides}"
            )

    @field_validator("acceptance_rate")
    @classmethod
    def _a_range(cls, bounds: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        low, high = bounds
        if not 0 <= low <= high <= 1 and not is_recorded(info):
            raise ValueError("expected two shares from 0 to 1, the lower one first")
        return bounds

    @property
    def name(self) -> str:
        """The file's name: what the recipe is called everywhere."""
        if self._path is None:
            raise RecipeError("this recipe was not loaded from a file and has no name")
        return self._path.stem

    @property
    def file(self) -> Path:
        """The YAML file that the recipe was loaded from."""
        return self._path

    @property
    def folder(self) -> Path:
        """The folder in which relative paths and `module:function` are looked up."""
        return self._path.parent

    @property
    def digest(self) -> str:
        """Content hash of all fields: runs with the same digest had the same instructions."""
        return digest(self.model_dump(mode="json"))

    @classmethod
    def of_file(cls, path: Path, fields: dict[str, Any], context: dict[str, Any] | None = None) -> "Recipe":
        """The recipe that a file's fields describe. Raises pydantic's ValidationError."""
        made = cls.model_validate(fields, context=context)
        made._path = path
        return made

    def as_recorded(self, fields: dict[str, Any]) -> "Recipe":
        """The same recipe with the fields that a round recorded."""
        return Recipe.of_file(self._path, fields, RECORDED)

    def differing(self, other: "Recipe") -> dict[str, tuple[str, str]]:
        """The fields that differ in another recipe: path → value here and there, all in the form that `--set` takes."""
        found = _differing(self.model_dump(mode="json"), other.model_dump(mode="json"))
        return {path: (_as_yaml(here), _as_yaml(there)) for path, here, there in found}

    def path(self, name: str) -> Path:
        """A path named in the recipe, made absolute."""
        return (self.folder / Path(name).expanduser()).resolve()


def _as_yaml(value: Any) -> str:
    """A value as one line of YAML: JSON, except for unprintable characters, which YAML escapes differently."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _differing(here: Any, there: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(here, dict) and isinstance(there, dict) and here.keys() == there.keys():
        parts = [(name, value, there[name]) for name, value in here.items()]
    elif isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        parts = [(str(i), *both) for i, both in enumerate(zip(here, there, strict=True))]
    else:  # also a section of another kind, such as another rule: it is yielded whole
        if here != there:
            yield path, here, there
        return
    for name, *both in parts:
        yield from _differing(*both, f"{path}.{name}" if path else name)
