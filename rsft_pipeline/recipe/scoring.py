"""The section `scoring`: the scorers that a recipe can name, and how their scores are combined.

Not: judging candidates (rsft_pipeline/scoring/).
"""

import json
from typing import Annotated, Any, Literal, Union

import regex
from pydantic import Field, model_validator

from rsft_pipeline.recipe.section import Section


class Scorer(Section):
    """What all scorers share."""

    name: str | None = Field(None, pattern=r"^[a-z][a-z0-9_]*$", description="Name in the lineage; default: the kind.")
    weight: float = Field(1.0, ge=0, description="Weight in the combined score; with 0 the scorer is only a gate.")
    minimum: float | None = Field(None, description="Gate: a candidate scored below this (or not judged) is rejected.")

    @property
    def label(self) -> str:
        return self.name or self.kind


class AnswerScorer(Scorer):
    """1.0 when the completion's answer equals the reference, else 0.0."""

    kind: Literal["answer"]
    match: Literal["exact", "numeric", "math"] = Field(
        "numeric",
        description="`exact` text; `numeric`, as in GSM8K (#### n or the last number); or `math` (math-verify).",
    )


class BlocklistScorer(Scorer):
    """1.0 when no listed word or phrase occurs, else 0.0."""

    kind: Literal["blocklist"]
    words: list[str] = Field([], description="Words and phrases, matched whole and case-folded.")
    file: str | None = Field(None, description="File of them, one per line, relative to the recipe's folder.")

    @model_validator(mode="after")
    def _not_empty(self):
        if not self.words and not self.file:
            raise ValueError("give `words:` or `file:`")
        return self


class RegexScorer(Scorer):
    """1.0 when the pattern is found in the completion, else 0.0."""

    kind: Literal["regex"]
    pattern: str = Field(description="Python regular expression, with the extensions of the package `regex`.")

    @model_validator(mode="after")
    def _compiles(self):
        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"`pattern` is not a regular expression: {error}") from None
        return self


class LengthScorer(Scorer):
    """1.0 inside the bounds, falling linearly to 0.0 at length 0 and at twice `at_most`."""

    kind: Literal["length"]
    at_least: int = Field(0, ge=0, description="Fewest units.")
    at_most: int = Field(description="Most units.", ge=1)
    unit: Literal["words", "characters"] = Field("words", description="What is counted.")

    @model_validator(mode="after")
    def _ordered(self):
        if self.at_least > self.at_most:
            raise ValueError("`at_least` cannot be larger than `at_most`")
        return self


class SentimentScorer(Scorer):
    """VADER compound sentiment of the completion, from -1 (negative) to 1 (positive)."""

    kind: Literal["sentiment"]


class RewardScorer(Scorer):
    """Output of a sequence-classification model for prompt and completion."""

    kind: Literal["reward"]
    model: str = Field(description="Local folder or hub id of the reward model.")
    revision: str | None = Field(None, description="Commit or tag on the hub.")
    label_index: int = Field(0, ge=0, description="Which output is the reward.")
    batch_size: int = Field(32, ge=1, description="Texts judged at once.")


class FunctionScorer(Scorer):
    """Your own function over a list of samples: one float, or None for «cannot judge», for each."""

    kind: Literal["function"]
    function: str = Field(description="`module:function`; the recipe's folder is searched first.")
    arguments: dict[str, Any] = Field({}, description="Keyword arguments passed to it.")

    @model_validator(mode="after")
    def _can_be_recorded(self):
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`arguments` are recorded as JSON, which has no such value: {error}") from None
        return self


class SquadScorer(Scorer):
    """Exact match or token F1 with the reference answers, as in SQuAD v1.1; of several answers, the best counts."""

    kind: Literal["squad"]
    metric: Literal["exact", "f1"] = Field(
        "f1", description="`exact`: 1.0 when equal after normalisation, else 0.0. `f1`: F1 of the tokens in common."
    )
    answers: str | None = Field(
        None, description="Column of the reference answers: a text, or a list of them; default: `prompts.reference`."
    )


class KnowledgeScorer(Scorer):
    """Log-probability of the completion, in nats, under the reference answers, smoothed by the policy."""

    kind: Literal["knowledge"]
    smoothing: float = Field(0.1, gt=0, le=1, description="ε: the share of the policy in the mixture.")
    answers: str | None = Field(
        None, description="Column of the reference answers: a text, or a list of them; default: `prompts.reference`."
    )


class LikelihoodScorer(Scorer):
    """Log-probability of the completion after the prompt, in nats, under another language model."""

    kind: Literal["likelihood"]
    source: str = Field(description="Local folder or hub id of the model, causal or encoder-decoder.")
    revision: str | None = Field(None, description="Commit or tag on the hub.")
    batch_size: int = Field(32, ge=1, description="Texts judged at once.")


class EmbeddingScorer(Scorer):
    """What scorers that compare sentence embeddings share."""

    model: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2",
        description="Local folder or hub id of a sentence-transformers model; or `hashing`: character n-grams, "
        "which needs no model but ignores meaning.",
    )
    revision: str | None = Field(None, description="Commit or tag on the hub.")
    batch_size: int = Field(64, ge=1, description="Texts embedded at once.")


class RelevanceScorer(EmbeddingScorer):
    """Cosine similarity of the reply's embedding to that of what was said before, from -1 to 1."""

    kind: Literal["relevance"]
    turns: str | None = Field(
        None,
        description="Column that lists the turns before the reply; default: the turns of `prompts.messages`, "
        "else the prompt.",
    )


class ConsistencyScorer(Scorer):
    """1 − the worst repetition or contradiction of the speaker's own earlier turns, from 0 to 1."""

    kind: Literal["consistency"]
    turns: str | None = Field(
        None,
        description="Column that lists the turns of two speakers, alternating; the reply follows the last. Default: "
        "the `assistant` turns of `prompts.messages` are the speaker's own.",
    )
    words: int = Field(3, ge=1, description="Repetition is measured in runs of this many words.")
    nli: str | None = Field(
        None, description="Local folder or hub id of a natural-language-inference model; default: repetition only."
    )
    revision: str | None = Field(None, description="Commit or tag of `nli` on the hub.")
    batch_size: int = Field(32, ge=1, description="Pairs of turn and reply that `nli` judges at once.")


class NoveltyScorer(EmbeddingScorer):
    """1 − the largest cosine similarity to a text that earlier rounds accepted; 1.0 in the first round."""

    kind: Literal["novelty"]


AnyScorer = Annotated[
    Union[
        AnswerScorer,
        BlocklistScorer,
        RegexScorer,
        LengthScorer,
        SentimentScorer,
        RewardScorer,
        SquadScorer,
        KnowledgeScorer,
        LikelihoodScorer,
        RelevanceScorer,
        ConsistencyScorer,
        NoveltyScorer,
        FunctionScorer,
    ],
    Field(discriminator="kind"),
]


class Scoring(Section):
    """How a candidate is judged."""

    scorers: list[AnyScorer] = Field(min_length=1, description="The scorers, each recorded under its name and version.")
    combine: Literal["weighted", "all"] = Field(
        "weighted",
        description="`weighted`: the weighted mean of the scores. `all`: 1.0 when all reach their minimum, else 0.0.",
    )

    @model_validator(mode="after")
    def _consistent(self):
        labels = [scorer.label for scorer in self.scorers]
        if repeated := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"two scorers are called {sorted(repeated)[0]!r}: give one a `name:`")
        if taken := {"combined", "policy"} & set(labels):
            raise ValueError(f"no scorer can be called {taken.pop()!r}: the lineage uses that name itself")
        if self.combine == "all" and (open_ended := [s.label for s in self.scorers if s.minimum is None]):
            raise ValueError(f"`combine: all` needs a `minimum:` on scorer {open_ended[0]!r}")
        if self.combine == "weighted" and sum(s.weight for s in self.scorers) <= 0:
            raise ValueError("the weights must add up to more than 0")
        return self
