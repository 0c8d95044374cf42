"""The recipe: what a person writes in YAML to say what to run, checked before anything does.

Belongs here: the fields, their meaning, and errors that name file, field and remedy.
Does not: how any field is carried out; each section names the module that does.
"""

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from rsft_pipeline.lineage import digest

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot run: the message says where it is wrong and what was expected."""


class Section(BaseModel):
    """A part of the recipe: immutable, and every key must be a known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# --- models.py ------------------------------------------------------------------------------


class Bootstrap(Section):
    """A small model made on this machine, so that a recipe can run without a hub."""

    config: dict[str, Any] = Field(
        description="Transformers configuration: `model_type` and its sizes, e.g. {model_type: llama}; "
        "vocabulary size and special tokens are filled in from the tokenizer."
    )
    corpus: str = Field(
        description="Warm-up text: `module:function` that yields {prompt, completion} rows, or a JSONL file of them. "
        "Rows whose prompt falls in the evaluation split are left out."
    )
    tokenizer: Literal["characters", "bpe"] = Field(
        "characters", description="One token per character, or byte-level BPE trained on the corpus."
    )
    vocabulary: int = Field(
        512, ge=260, description="Vocabulary size of the BPE tokenizer; 256 bytes and 4 special tokens are the least."
    )
    steps: int = Field(500, ge=0, description="Optimiser steps of the warm-up.")
    batch_size: int = Field(128, ge=1, description="Rows per step.")
    learning_rate: float = Field(3e-3, gt=0, description="Peak learning rate, linearly warmed up, then cosine to zero.")


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
    eval_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of prompts, chosen by hash, that is only ever evaluated on."
    )
    inbox: str | None = Field(None, description="Folder; files dropped there are read too, and start a round.")

    @model_validator(mode="after")
    def _one_template(self):
        if (self.template is None) == (self.messages is None):
            raise ValueError("give either `template:` or `messages:`, and not both")
        return self


# --- sampling.py ----------------------------------------------------------------------------


class Sampling(Section):
    """How candidates are drawn from the policy."""

    draws: int = Field(8, ge=1, description="Candidates per prompt.")
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


AnyScorer = Annotated[
    Union[AnswerScorer, BlocklistScorer, RegexScorer, LengthScorer, SentimentScorer, RewardScorer, FunctionScorer],
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


class ThresholdRule(Rule):
    """Accept when g(x) > t."""

    rule: Literal["threshold"]
    threshold: float = Field(description="t, on the combined score.")


class TopKRule(Rule):
    """Accept the k best of each prompt."""

    rule: Literal["top_k"]
    k: int = Field(ge=1, description="How many per prompt.")


class QuantileRule(Rule):
    """Accept the best share of the whole round."""

    rule: Literal["quantile"]
    share: float = Field(gt=0, le=1, description="Share of the candidates that were judged and passed the gates.")


class RejectionRule(Rule):
    """True rejection sampling: accept when u < A, A = min(1, p(x) / (M·q(x)))."""

    rule: Literal["rejection"]
    target: str = Field(
        "policy",
        description="log p: `policy` (the policy's own probability at temperature 1, untruncated), "
        "or the name of a scorer that returns a log-probability.",
    )
    M: Annotated[float, Field(gt=0)] | Literal["estimate"] = Field(
        "estimate", description="The bound of p ≤ M·q, or estimate it from a pilot."
    )
    pilot: int = Field(
        1, ge=1, description="With `estimate`: the first draws of each prompt are the pilot, and are not accepted."
    )
    safety: float = Field(1.0, ge=1, description="With `estimate`: M is the pilot's largest p/q times this.")


class BoltzmannRule(Rule):
    """Accept when u < A, A = exp((r − r_max) / β): draws from q·exp(r/β)."""

    rule: Literal["boltzmann"]
    beta: float = Field(gt=0, description="β: towards 0 only the best, towards infinity everything.")
    r_max: float | None = Field(
        None, description="Largest possible score; default: each prompt's largest seen (then approximate)."
    )


class LossRule(Rule):
    """Accept when u < A, A = min(1, loss / k): keeps what the model finds hard."""

    rule: Literal["loss"]
    k: float = Field(gt=0, description="The loss, in nats per token, from which everything is accepted.")


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
    pass_above: float = Field(
        0.5, description="A candidate passes when its combined score is above this and no gate failed."
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Level of the intervals.")

    @model_validator(mode="after")
    def _enough_draws(self):
        if self.k > self.draws:
            raise ValueError("`k` cannot be larger than `draws`")
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
    task: Literal["causal"] = Field(
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
        return self

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
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: expected a mapping of fields at the top level")
    for key, text in (overrides or {}).items():
        _assign(tree, key, text, path)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, path)) from None
    recipe._path = path
    return recipe


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


def _explain(error: ValidationError, path: Path) -> str:
    lines = [f"{path}: this recipe cannot run:"]
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"]) or "recipe"
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
