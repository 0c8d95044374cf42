"""The recipe: what a person writes in YAML to say what to run, checked before anything does.

Belongs here: the fields, their meaning, and errors that name file, field and remedy.
Does not: how any field is carried out; each section names the module that does.
"""

import copy
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from rsft_pipeline.lineage import digest

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot run: the message says where it is wrong and what was expected."""


class Section(BaseModel):
    """A part of the recipe: immutable, and every key must be a known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# --- models.py, bootstrap.py ----------------------------------------------------------------


class WarmUp(Section):
    """Supervised training on text of the task, once, before the first round."""

    corpus: str = Field(
        description="Warm-up text: `module:function` that yields {prompt, completion} rows, or a JSONL file of them. "
        "Rows whose prompt falls in the evaluation split are left out."
    )
    steps: int = Field(500, ge=0, description="Optimiser steps of the warm-up.")
    batch_size: int = Field(128, ge=1, description="Rows per step.")
    learning_rate: float = Field(3e-3, gt=0, description="Peak learning rate, linearly warmed up, then cosine to zero.")


class Bootstrap(WarmUp):
    """A small model made on this machine and warmed up, so that a recipe can run without a hub."""

    config: dict[str, Any] = Field(
        description="Transformers configuration: `model_type` and its sizes, e.g. {model_type: llama}; "
        "vocabulary size and special tokens are filled in from the tokenizer."
    )
    tokenizer: Literal["characters", "bpe"] = Field(
        "characters", description="One token per character, or byte-level BPE trained on the corpus."
    )
    vocabulary: int = Field(
        512, ge=260, description="Vocabulary size of the BPE tokenizer; 256 bytes and 4 special tokens are the least."
    )


class Lora(Section):
    """Low-rank adapters (peft), merged into the weights when the checkpoint is saved."""

    rank: int = Field(8, ge=1, description="Rank of the adapters.")
    alpha: float = Field(16, gt=0, description="Scale: adapters count alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Names of the modules to adapt, or every linear layer."
    )


class Model(Section):
    """Which weights the first round starts from, and which of them train."""

    source: str = Field(description="`bootstrap`, a local folder, or a model id on the Hugging Face hub.")
    revision: str | None = Field(None, description="Commit or tag on the hub; pin it to make rounds repeatable.")
    bootstrap: Bootstrap | None = Field(None, description="How to make the model when source is `bootstrap`.")
    warm_up: WarmUp | None = Field(
        None, description="Train a model from elsewhere on text of the task first; the first round starts from that."
    )
    labels: list[str] = Field(
        [], description="With `task: classification`: the reference answers, in the order of the model's outputs."
    )
    train: Literal["all", "lora", "last_layers", "freeze"] = Field(
        "all",
        description="What trains: everything, LoRA adapters, the last layers and head, or all but frozen patterns.",
    )
    last_layers: int = Field(
        1, ge=1, description="With `train: last_layers`: how many transformer blocks, from the end."
    )
    freeze: list[str] = Field(
        [], description="With `train: freeze`: shell patterns of parameter names that stay fixed."
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


# --- prompts.py -----------------------------------------------------------------------------


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
        "auto", description="How to read the source; `auto` goes by its name. `text`: one row per line, column `text`."
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
        None, ge=1, description="Longest prompt; default: the model's context less sampling.max_tokens."
    )
    too_long: Literal["refuse", "cut"] = Field(
        "refuse", description="A prompt longer than that goes to quarantine, or is cut at its end."
    )
    eval_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of prompts, chosen by hash, that is only ever evaluated on."
    )
    inbox: str | None = Field(None, description="Folder; files dropped there are read too, and start a round.")

    @model_validator(mode="after")
    def _one_template(self):
        if (self.template is None) == (self.messages is None):
            raise ValueError("give either `template:` or `messages:`, and not both")
        if self.messages is not None and self.too_long == "cut":
            raise ValueError("`too_long: cut` would cut into the chat template: it goes with `template:` only")
        return self


# --- sampling.py ----------------------------------------------------------------------------


class Teacher(Section):
    """Another model that candidates are drawn from; it must read and write with the policy's tokenizer."""

    source: str = Field(description="A local folder, or a model id on the Hugging Face hub.")
    revision: str | None = Field(None, description="Commit or tag on the hub; pin it to make rounds repeatable.")


class Until(Section):
    """Drawing again until enough is accepted, pass by pass, instead of a fixed number for every prompt."""

    per_prompt: int | None = Field(
        None, ge=1, description="A prompt with this many accepted candidates is drawn for no more."
    )
    accepted: int | None = Field(None, ge=1, description="Once the round has this many accepted, it draws no more.")
    draws: int = Field(ge=1, description="Most candidates per prompt, accepted or not.")

    @model_validator(mode="after")
    def _ends(self):
        if self.per_prompt is None and self.accepted is None:
            raise ValueError("give `per_prompt:`, `accepted:`, or both")
        return self


class Sampling(Section):
    """How candidates are drawn."""

    source: Literal["policy", "teacher", "reference"] = Field(
        "policy",
        description="What candidates are: draws of the policy, draws of a teacher, or the reference answers as the "
        "policy rates them. The lineage says which; they are never mixed in a round.",
    )
    teacher: Teacher | None = Field(None, description="With `source: teacher`: the model that is drawn from.")
    draws: int = Field(8, ge=1, description="Candidates per prompt; with `until`, in each pass over the prompts.")
    until: Until | None = Field(None, description="Draw in passes, until enough is accepted.")
    prompts: int | None = Field(None, ge=1, description="Prompts per round, chosen by hash and round; default: all.")
    temperature: float = Field(1.0, gt=0, description="Divides the logits.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens with this much probability.")
    top_k: int | None = Field(None, ge=1, description="Keep the k most probable tokens.")
    max_tokens: int = Field(64, ge=1, description="Longest completion, in tokens.")
    stop: list[str] = Field([], description="Extra stop tokens, each exactly one token of the tokenizer.")
    batch_size: int | None = Field(
        None, ge=1, description="Rows drawn at once, halved when memory runs out; default: what free memory holds."
    )
    wave_size: int = Field(2048, ge=1, description="Candidates persisted together; the most that a kill can cost.")

    @model_validator(mode="after")
    def _parts_agree(self):
        if (self.source == "teacher") != (self.teacher is not None):
            raise ValueError("`source: teacher` and a `teacher:` section go together")
        if self.until and self.until.draws < self.draws:
            raise ValueError("`until.draws`, the most per prompt, cannot be less than `draws`, those of one pass")
        return self

    @property
    def most_draws(self) -> int:
        """Candidates that a prompt can have."""
        return self.until.draws if self.until else self.draws


# --- scoring.py -----------------------------------------------------------------------------


class Scorer(Section):
    """What all scorers share."""

    name: str | None = Field(None, pattern=r"^[a-z][a-z0-9_]*$", description="Name in the lineage; default: the kind.")
    weight: float = Field(1.0, ge=0, description="Weight in the combined score; 0 makes the scorer a gate only.")
    minimum: float | None = Field(None, description="Gate: a candidate scored below this (or not judged) is rejected.")

    @property
    def label(self) -> str:
        return self.name or self.kind


class AnswerScorer(Scorer):
    """1.0 when the completion's answer equals the reference, else 0.0."""

    kind: Literal["answer"]
    match: Literal["exact", "numeric", "math"] = Field(
        "numeric",
        description="`exact` text, `numeric` as in GSM8K (#### n or the last number), or `math` (math-verify).",
    )


class BlocklistScorer(Scorer):
    """1.0 when no listed word or phrase occurs, else 0.0."""

    kind: Literal["blocklist"]
    words: list[str] = Field([], description="Words and phrases, matched whole and case-folded.")
    file: str | None = Field(None, description="File of them, one a line, relative to the recipe's folder.")

    @model_validator(mode="after")
    def _not_empty(self):
        if not self.words and not self.file:
            raise ValueError("give `words:` or `file:`")
        return self


class RegexScorer(Scorer):
    """1.0 when the pattern is found in the completion, else 0.0."""

    kind: Literal["regex"]
    pattern: str = Field(description="Python regular expression.")

    @model_validator(mode="after")
    def _compiles(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"`pattern` is not a regular expression: {error}") from None
        return self


class LengthScorer(Scorer):
    """1.0 inside the bounds, falling linearly to 0.0 at no text and at twice `at_most`."""

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
    """Output of a sequence-classification model on prompt and completion."""

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


class SquadScorer(Scorer):
    """Exact match or token F1 with the reference answers, as SQuAD v1.1 is evaluated; the best over several."""

    kind: Literal["squad"]
    metric: Literal["exact", "f1"] = Field(
        "f1", description="`exact`: 1.0 when the same after normalisation, else 0.0. `f1`: of the tokens in common."
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
        description="Local folder or hub id of a sentence-transformers model; or `hashing`: runs of characters, "
        "which needs no model and sees no meaning.",
    )
    revision: str | None = Field(None, description="Commit or tag on the hub.")
    batch_size: int = Field(64, ge=1, description="Texts embedded at once.")


class RelevanceScorer(EmbeddingScorer):
    """Cosine of the reply's embedding with that of what was said before, from -1 to 1."""

    kind: Literal["relevance"]
    turns: str | None = Field(
        None,
        description="Column that lists the turns before the reply; default: the turns of `prompts.messages`, "
        "else the prompt.",
    )


class ConsistencyScorer(Scorer):
    """1 − the worst repetition, or contradiction, of the speaker's own earlier turns, from 0 to 1."""

    kind: Literal["consistency"]
    turns: str | None = Field(
        None,
        description="Column that lists the turns of two speakers in turn; the reply follows the last. Default: the "
        "`assistant` turns of `prompts.messages` are the speaker's own.",
    )
    words: int = Field(3, ge=1, description="A repetition is counted in runs of this many words.")
    nli: str | None = Field(
        None, description="Local folder or hub id of a natural-language-inference model; default: repetition only."
    )
    revision: str | None = Field(None, description="Commit or tag on the hub, of `nli`.")
    batch_size: int = Field(32, ge=1, description="Pairs of turn and reply that `nli` judges at once.")


class NoveltyScorer(EmbeddingScorer):
    """1 − the largest cosine with what the recipe's earlier rounds accepted; 1.0 in its first."""

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

    scorers: list[AnyScorer] = Field(min_length=1, description="Each is recorded under its name and version.")
    combine: Literal["weighted", "all"] = Field(
        "weighted",
        description="`weighted`: the weighted mean of the scores. `all`: 1.0 when each reaches its minimum, else 0.0.",
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


# --- acceptance.py --------------------------------------------------------------------------


class Rule(Section):
    """What all acceptance rules share."""

    distinct: bool = Field(True, description="Accept a normalised text once per prompt.")
    cap: int | None = Field(
        None, ge=1, description="Most accepted candidates per prompt, so that easy prompts do not dominate."
    )

    @property
    def per_candidate(self) -> bool:
        """Whether a candidate's decision, before `distinct` and `cap`, follows from it and the pilot alone.

        Draws that come later then change no such decision, and can only add to a prompt's accepted ones.
        """
        return False

    @property
    def pilot_draws(self) -> int:
        """How many first draws of each prompt are looked at before anything can be decided."""
        return 0


class CalibratedRule(Rule):
    """What the rules share whose number can be picked by the share of candidates that it accepts."""

    picked: ClassVar[str]  # the field that may be `calibrate`

    share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="With `calibrate`: how many to accept of the candidates that were judged and passed the gates.",
    )
    pilot: int = Field(
        1, ge=1, description="With `calibrate` (or `M: estimate`): the first draws of each prompt, which are looked at."
    )

    @property
    def per_candidate(self) -> bool:
        return True

    @property
    def pilot_draws(self) -> int:
        return self.pilot if getattr(self, self.picked) in ("calibrate", "estimate") else 0

    @property
    def calibrated(self) -> bool:
        """Whether its number is to be picked."""
        return getattr(self, self.picked) == "calibrate"

    @model_validator(mode="after")
    def _share_is_for_calibrate(self):
        if self.calibrated != (self.share is not None):
            raise ValueError(f"`{self.picked}: calibrate` and `share:` go together")
        return self


class StochasticRule(CalibratedRule):
    """What the rules share that accept with a probability A."""

    weight: Literal["one", "A"] = Field(
        "one", description="What an accepted sample counts in the training loss: all the same, or by its A."
    )


class ThresholdRule(CalibratedRule):
    """Accept when g(x) > t."""

    picked = "threshold"

    rule: Literal["threshold"]
    threshold: float | Literal["calibrate"] = Field(description="t, on the combined score.")
    raise_by: float = Field(0.0, ge=0, description="Added to t once for each round before this one.")

    @model_validator(mode="after")
    def _what_is_raised_is_given(self):
        if self.calibrated and self.raise_by:
            raise ValueError("`raise_by` needs a number as `threshold`: `calibrate` picks one anew in each round")
        return self


class TopKRule(Rule):
    """Accept the k best of each prompt."""

    rule: Literal["top_k"]
    k: int = Field(ge=1, description="How many per prompt.")


class QuantileRule(Rule):
    """Accept the best share of the whole round."""

    rule: Literal["quantile"]
    share: float = Field(gt=0, le=1, description="Share of the candidates that were judged and passed the gates.")


class RejectionRule(StochasticRule):
    """True rejection sampling: accept when u < A, A = min(1, p(x) / (M·q(x)))."""

    picked = "M"

    rule: Literal["rejection"]
    target: str = Field(
        "policy",
        description="log p: `policy` (the policy's own probability at temperature 1, untruncated), "
        "or the name of a scorer that returns a log-probability.",
    )
    M: Annotated[float, Field(gt=0)] | Literal["estimate", "calibrate"] = Field(
        "estimate",
        description="The bound of p ≤ M·q; `estimate`: the pilot's largest p/q, and the pilot is not accepted.",
    )
    safety: float = Field(1.0, ge=1, description="With `estimate`: M is the pilot's largest p/q times this.")
    threshold: float | None = Field(
        None, ge=0, lt=1, description="Accept when A is above this, without chance; default: when u < A."
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
        description="β: towards 0 only the best, towards infinity everything."
    )
    r_max: float | None = Field(
        None, description="Largest possible score; default: each prompt's largest seen (then approximate)."
    )

    @property
    def per_candidate(self) -> bool:
        return self.r_max is not None


class LossRule(StochasticRule):
    """Accept when u < A, A = min(1, loss / k): keeps what the model finds hard."""

    picked = "k"

    rule: Literal["loss"]
    k: Annotated[float, Field(gt=0)] | Literal["calibrate"] = Field(
        description="The loss, in nats per token, from which everything is accepted."
    )


AnyRule = Annotated[
    Union[ThresholdRule, TopKRule, QuantileRule, RejectionRule, BoltzmannRule, LossRule], Field(discriminator="rule")
]


# --- training.py ----------------------------------------------------------------------------


class Training(Section):
    """How a checkpoint is fine-tuned on the accepted set."""

    start: Literal["base", "champion", "previous"] = Field("champion", description="Weights that training starts from.")
    data: Literal["round", "all_rounds"] = Field("round", description="This round's accepted set, or every round's.")
    epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    batch_size: int = Field(32, ge=1, description="Samples per optimiser step.")
    accumulation: int = Field(
        1, ge=1, description="Parts a step is computed in, to save memory; the result is the same."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Decay after the warm-up.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps that raise the rate from 0.")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    save_every: int = Field(200, ge=1, description="Steps between saved states; the most that a kill can cost.")


# --- evaluation.py --------------------------------------------------------------------------


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
    margin: float = Field(0.0, ge=0, description="Smallest gain asked for, or largest loss allowed.")


class Stop(Section):
    """When the loop ends."""

    rounds: int = Field(3, ge=1, description="Most rounds.")
    patience: int | None = Field(None, ge=1, description="Rounds in a row without a promotion.")
    target: float | None = Field(None, description="Value of the promotion metric that is enough.")
    tokens: int | None = Field(None, ge=1, description="Budget of tokens drawn to train on, over all rounds.")


# --- the whole ------------------------------------------------------------------------------


class Recipe(Section):
    """One pipeline: prompts, a model, how to draw, judge, accept, train, compare, and when to stop."""

    description: str = Field(description="One line for people.")
    task: Literal["causal", "seq2seq", "classification"] = Field(
        "causal", description="The kind of model; each is one module in rsft_pipeline/tasks."
    )
    model: Model = Field(description="Which weights, and which of them train.")
    prompts: Prompts = Field(description="Where prompts come from.")
    sampling: Sampling = Field(Sampling(), description="How candidates are drawn.")
    scoring: Scoring = Field(description="How they are judged.")
    acceptance: AnyRule = Field(description="Which are accepted.")
    training: Training = Field(Training(), description="How the checkpoint is trained.")
    evaluation: Evaluation = Field(Evaluation(), description="How it is compared.")
    promotion: Promotion = Field(Promotion(), description="When it becomes the champion.")
    stop: Stop = Field(Stop(), description="When the loop ends.")
    policy: Literal["champion", "previous", "base"] = Field("champion", description="What a round samples from.")
    controls: list[Literal["random", "everything"]] = Field(
        [],
        description="Checkpoints to measure the round's own against, trained as it is but on `random`: as many "
        "candidates chosen without looking at their scores, or `everything`: all candidates.",
    )
    group_by: str | None = Field(
        None, description="Column of the prompts by which accepted shares are tabled, such as an intent or a label."
    )
    acceptance_rate: tuple[float, float] = Field((0.01, 0.99), description="Bounds outside which a check warns.")
    largest_share: float = Field(
        0.1, gt=0, le=1, description="Share of the accepted set above which a prompt is over-represented."
    )
    schedule: str | None = Field(None, description="Cron line (UTC) that starts a round.")
    owners: list[str] = Field([], description="E-mail addresses or `team:name`, shown in Dagster.")
    seed: int = Field(0, ge=0, description="Every random choice follows from it.")

    _path: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _sections_agree(self):
        if isinstance(self.acceptance, RejectionRule):
            known = ["policy", *(scorer.label for scorer in self.scoring.scorers)]
            if self.acceptance.target not in known:
                raise ValueError(f"acceptance.target is {self.acceptance.target!r}; expected one of {', '.join(known)}")
        if (self.task == "classification") != bool(self.model.labels):
            raise ValueError("`task: classification` and a list of `model.labels` go together")
        if self.sampling.source == "reference" and self.prompts.reference is None:
            raise ValueError("`sampling.source: reference` needs `prompts.reference`, the column of the answers")
        if self.sampling.source == "reference" and isinstance(self.acceptance, RejectionRule):
            raise ValueError("`rule: rejection` needs the q of a draw, and references are not drawn")
        if self.sampling.until:
            self._check_until(self.sampling.until)
        return self

    def _check_until(self, until: Until) -> None:
        rule = self.acceptance
        if not rule.per_candidate:
            raise ValueError(
                f"`sampling.until` needs a rule that decides on each candidate by itself; with `rule: {rule.rule}` "
                "a later draw can change what was accepted (of boltzmann, give `r_max`)"
            )
        set_aside = isinstance(rule, RejectionRule) and rule.M == "estimate"
        if rule.pilot_draws + set_aside > self.sampling.draws:
            raise ValueError("`acceptance.pilot` has to fit into the `sampling.draws` of the first pass")
        if rule.cap is not None and until.per_prompt is not None and rule.cap < until.per_prompt:
            raise ValueError("`acceptance.cap` is below `sampling.until.per_prompt`, which could never be reached")

    @property
    def name(self) -> str:
        """The file's name: what the recipe is called everywhere."""
        if self._path is None:
            raise RecipeError("this recipe was not loaded from a file and has no name")
        return self._path.stem

    @property
    def file(self) -> Path:
        """The YAML file that it was loaded from."""
        return self._path

    @property
    def folder(self) -> Path:
        """What relative paths and `module:function` are looked up in."""
        return self._path.parent

    @property
    def digest(self) -> str:
        """Content hash of every field: two runs with the same digest were told the same."""
        return digest(self.model_dump(mode="json"))

    def as_recorded(self, fields: dict[str, Any]) -> "Recipe":
        """The same recipe with the fields that a round recorded."""
        recorded = Recipe.model_validate(fields)
        recorded._path = self._path
        return recorded

    def path(self, name: str) -> Path:
        """A path of the recipe, absolute."""
        return (self.folder / Path(name).expanduser()).resolve()


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe's file. What a recipe needs, one that `extends` another may have from that."""
    made = copy.deepcopy(Recipe.model_json_schema())  # pydantic keeps what it returns
    made["properties"]["extends"] = {"type": "string", "description": "Name of the recipe beside it to start from."}
    made["if"], made["then"] = {"not": {"required": ["extends"]}}, {"required": made.pop("required")}
    return made


def find(name: str | Path, folders: Iterable[Path] = (RECIPES,)) -> Path:
    """The YAML file of a recipe given by name or path. Raises RecipeError with the nearest names."""
    path = Path(name).expanduser()
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise RecipeError(f"{path}: there is no such file")
        return path.resolve()
    known = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if str(name) not in known:
        raise RecipeError(
            f"no recipe is called {str(name)!r}.{_nearest(str(name), known)} Known: {', '.join(sorted(known))}"
        )
    return known[str(name)].resolve()


def load(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file; its stem is the recipe's name.
        overrides: `a.b` → value as YAML text, applied on top of the file.

    Raises:
        RecipeError: with file, field path, what was expected and the nearest valid name.
    """
    path = Path(path).resolve()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", path.stem):
        raise RecipeError(
            f"{path}: a recipe's file name is its name: lower-case letters, digits and _, starting with a letter"
        )
    tree = _read(path)
    if "extends" in tree:
        tree = _extended(tree, path)
    for key, text in (overrides or {}).items():
        _assign(tree, key, text, path)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, path)) from None
    recipe._path = path
    return recipe


def _read(path: Path) -> dict:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: expected a mapping of fields at the top level")
    return tree


def _extended(tree: dict, path: Path) -> dict:
    """The fields of the recipe that this one `extends`, each replaced whole by this one's where it has it."""
    other = path.parent / f"{tree['extends']}.yaml"
    if not other.is_file():
        near = _nearest(str(tree["extends"]), [file.stem for file in path.parent.glob("*.yaml")])
        raise RecipeError(f"{path}: extends: there is no recipe {other}.{near}")
    beneath = _read(other)
    if "extends" in beneath:
        raise RecipeError(f"{path}: extends: {other} extends another recipe itself; extend that one")
    return {**beneath, **{name: value for name, value in tree.items() if name != "extends"}}


def _assign(tree: dict, key: str, text: str, path: Path) -> None:
    *parents, last = key.split(".")
    node: Any = tree
    for i, part in enumerate(parents):
        node = node[_index(node, part, key, path)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise RecipeError(f"{path}: cannot set {key}: {'.'.join(parents[: i + 1])} is a value, not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: cannot set {key}: {text!r} is not YAML: {error}") from None
    node[_index(node, last, key, path) if isinstance(node, list) else last] = value


def _index(node: list, part: str, key: str, path: Path) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(f"{path}: cannot set {key}: expected a list position from 0 to {len(node) - 1}, got {part!r}")
    return int(part)


_MEMBER = re.compile(r"(constrained-)?(float|int|str)|(literal|list)\[.*\]")  # of a union, in pydantic's paths


def _explain(error: ValidationError, path: Path) -> str:
    lines = [f"{path}: this recipe cannot run:"]
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"] if not _MEMBER.fullmatch(str(part))) or "recipe"
        message = problem["msg"].removeprefix("Value error, ")
        match problem["type"]:
            case "extra_forbidden":
                fields = _fields_at(problem["loc"][:-1])
                message = (
                    f"unknown field.{_nearest(str(problem['loc'][-1]), fields)} Expected one of: {', '.join(fields)}"
                )
            case "missing":
                message = "this field is required"
            case "literal_error" | "union_tag_invalid":
                expected = problem.get("ctx", {}).get("expected") or problem.get("ctx", {}).get("expected_tags", "")
                options = re.findall(r"'([^']+)'", expected)
                given = problem["ctx"].get("tag", problem["input"])
                message = f"got {given!r}.{_nearest(str(given), options)} Expected one of: {', '.join(options)}"
            case _ if not isinstance(problem["input"], dict):
                message = f"{message} (got {problem['input']!r})"
        lines.append(f"  {where}: {message}")
    return "\n".join(lines)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section that an error's location points into."""
    sections: list[Any] = [Recipe]
    for part in location:
        found: list[Any] = []
        for section in sections:
            if isinstance(section, type) and issubclass(section, Section):
                if part in section.model_fields:
                    found += _sections_in(section.model_fields[part].annotation)
                elif part in {v for f in section.model_fields.values() for v in typing.get_args(f.annotation)}:
                    found.append(section)  # pydantic names the chosen member of a tagged union in the path
        sections = found or sections
    return sorted({name for section in sections for name in section.model_fields})


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in _sections_in(argument)]
