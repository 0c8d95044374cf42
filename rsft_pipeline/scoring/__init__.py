"""Scoring: what each candidate is worth, by every scorer of the recipe, and combined.

Belongs here: which scorer a recipe means, running scorers so that no sample can harm another, their versions,
and the combined score. Not: how a text is judged (the modules beside this one, on plain text), and what is
accepted (acceptance).

A scorer takes samples and returns a float for each, or None for «cannot judge», which never counts as 0.
"""

import importlib.metadata
import inspect
import logging
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsft_pipeline import devices, functions, models
from rsft_pipeline.devices import Device
from rsft_pipeline.lineage import digest, file_digest, set_digest
from rsft_pipeline.models.checkpoints import content_digest
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.scoring import AnyScorer, Scoring
from rsft_pipeline.scoring import (
    answer,
    blocklist,
    classifier,
    dialogue,
    embedding,
    knowledge,
    likelihood,
    nli,
    reward,
    simple,
    squad,
    symbolic,
)

log = logging.getLogger(__name__)


class ScoringError(ValueError):
    """A scorer that cannot be loaded, or that breaks the contract: the message names it."""


@dataclass(frozen=True)
class Sample:
    """A candidate as a scorer sees it."""

    prompt: str  # as rendered
    completion: str
    reference: str | None  # the reference answer, if the recipe has one
    fields: dict[str, Any]  # every column of the prompt's row
    log_p: float | None  # the policy's log-probability of the completion, in nats, at temperature 1, untruncated
    messages: list[dict] | None = None  # a chat prompt's turns, {role, content}
    ended: bool = True  # a stop token ended it; else it was cut off at sampling.max_tokens


Judge = Callable[[Sequence[Sample]], list[float | None]]
REFERENCED = ("answer", "squad", "knowledge")  # kinds that need a reference answer


def check(recipe: Recipe) -> None:
    """Check that everything that the recipe's scorers name exists, before anything is loaded for them.

    Raises:
        ScoringError: a file, package, model, function or reference does not exist, or a function does not accept its
            `arguments`.
    """
    for config in recipe.scoring.scorers:
        version(config, recipe)
        if config.kind in REFERENCED and not (recipe.prompts.reference or getattr(config, "answers", None)):
            raise ScoringError(
                f"scorer {config.label!r} compares with a reference answer: give `prompts.reference`, the column of it"
            )
        if config.kind == "function":
            function = functions.load(config.function, recipe.folder)
            try:
                inspect.signature(function, follow_wrapped=False).bind([], **config.arguments)
            except TypeError as error:
                raise ScoringError(
                    f"scorer {config.label!r}: {config.function} is called with a list of samples and "
                    f"{config.arguments or 'no arguments'}: {error}"
                ) from None


def on_hub(recipe: Recipe) -> list[str]:
    """The scorers' models that are not local folders; see models.on_hub."""
    fields = [getattr(config, field, None) for config in recipe.scoring.scorers for field in ("model", "source", "nli")]
    named = [name for name in fields if name not in (None, embedding.HASHING)]
    return [name for name in named if models.local(recipe, "its model", name) is None]


def judges(recipe: Recipe, device: Device, accepted_before: Sequence[str] = ()) -> dict[str, Judge]:
    """The recipe's scorers by label, with their models loaded: make them once and use them for every batch.

    Args:
        accepted_before: the texts that earlier rounds accepted, for `novelty`.

    Raises:
        ScoringError: a scorer cannot be loaded.
    """
    return {config.label: scorer(config, recipe, device, accepted_before) for config in recipe.scoring.scorers}


def score(judges: dict[str, Judge], samples: Sequence[Sample]) -> dict[str, list[float | None]]:
    """The scores by scorer label; each list is as long as `samples` and in their order.

    A scorer that raises is asked again sample by sample; samples on which it still fails get None, and the first
    reason is logged.

    Raises:
        ScoringError: a scorer fails on all of several samples, runs out of memory on a single one, or returns
            something other than one finite number or None for each.
    """
    return {label: _judged(label, judge, samples) for label, judge in judges.items()}


def combine(scoring: Scoring, scores: dict[str, list[float | None]]) -> tuple[list[float | None], list[bool]]:
    """The combined score of each sample, and whether it passed every gate.

    `weighted`: Σ w·s / Σ w over the scorers with weight, or None if one of these could not judge.
    `all`: 1.0 if every scorer reaches its minimum, else 0.0. Passed: every scorer with a minimum judged the
    sample, and not below that.
    """
    columns = [scores[config.label] for config in scoring.scorers]
    combined: list[float | None] = []
    passed: list[bool] = []
    for row in zip(*columns, strict=True):
        judged = list(zip(scoring.scorers, row, strict=True))
        passed.append(all(s is not None and s >= c.minimum for c, s in judged if c.minimum is not None))
        if scoring.combine == "all":
            combined.append(float(passed[-1]))
            continue
        weighted = [(c.weight, s) for c, s in judged if c.weight > 0]
        if any(s is None for _, s in weighted):
            combined.append(None)
        else:
            combined.append(math.fsum(w * s for w, s in weighted) / math.fsum(w for w, _ in weighted))
    return combined, passed


def scorer(config: AnyScorer, recipe: Recipe, device: Device, accepted_before: Sequence[str] = ()) -> Judge:
    """The function that a `scoring.scorers` entry means. Loads what it needs.

    Args:
        accepted_before: as for `judges`.

    Raises:
        ScoringError: a file, package, model or function that it needs does not exist; the message names it.
    """
    try:
        match config.kind:
            case "answer" if config.match == "math":
                symbolic.require()
                return lambda samples: symbolic.equal([(s.completion, s.reference) for s in samples])
            case "answer":
                equal = {"exact": answer.exact, "numeric": answer.numeric}[config.match]
                return lambda samples: [equal(s.completion, s.reference) for s in samples]
            case "blocklist":
                listed = blocklist.Blocklist(_blocked(config, recipe))
                return lambda samples: [0.0 if listed.hits(s.completion) else 1.0 for s in samples]
            case "regex":
                return lambda samples: [simple.pattern(s.completion, config.pattern) for s in samples]
            case "length":
                bounds = config.at_least, config.at_most, config.unit
                return lambda samples: [simple.length(s.completion, *bounds) for s in samples]
            case "sentiment":
                return lambda samples: simple.sentiment([s.completion for s in samples])
            case "reward":
                chat = recipe.prompts.messages is not None
                model = reward.Reward(_model(config.model, recipe), config.revision, config.label_index, chat, device)
                return lambda samples: model([(s.prompt, s.messages, s.completion) for s in samples], config.batch_size)
            case "squad":
                metric = {"exact": squad.exact, "f1": squad.f1}[config.metric]
                return lambda samples: [metric(s.completion, _answers(config, recipe, s)) for s in samples]
            case "knowledge":
                return lambda samples: [
                    knowledge.log_probability(s.completion, _answers(config, recipe, s), s.log_p, config.smoothing)
                    for s in samples
                ]
            case "likelihood":
                model = likelihood.Likelihood(_language_model(config, recipe), device)
                return lambda samples: model(
                    [(s.prompt, s.messages, s.completion, s.ended) for s in samples], config.batch_size
                )
            case "relevance":
                embed = _embed(config, recipe, device)
                return lambda samples: dialogue.relevance(embed, [(_said(config, s), s.completion) for s in samples])
            case "consistency":
                contradictions = _contradictions(config, recipe, device)
                return lambda samples: dialogue.consistency(
                    [(_said(config, s), s.completion) for s in samples], config.words, contradictions
                )
            case "novelty":
                novel = dialogue.Novelty(_embed(config, recipe, device), accepted_before)
                return lambda samples: novel([s.completion for s in samples])
            case "function":
                function = functions.load(config.function, recipe.folder)
                return lambda samples: function(list(samples), **config.arguments)
    except (OSError, ValueError, ImportError, models.ModelError) as error:
        raise ScoringError(f"scorer {config.label!r}: {error}") from error


def version(config: AnyScorer, recipe: Recipe, accepted_before: Sequence[str] = ()) -> str:
    """Hash of everything that determines a scorer's scores: its source, its settings, and what these point at.

    The latter are the words of a blocklist file, the files or hub revision of a model, the source file of a function,
    the texts accepted before, and the release of the library that judges. Name, weight and minimum are left out: they
    change how a score is used, not the score.
    """
    settings = config.model_dump(mode="json", exclude={"name", "weight", "minimum"})
    try:
        match config.kind:
            case "answer" if config.match == "math":
                parts = [_source(answer), _source(symbolic), symbolic.require()]
            case "answer":
                parts = [_source(answer)]
            case "blocklist":
                parts = [_source(blocklist), _blocked(config, recipe), importlib.metadata.version("regex")]
            case "regex":
                parts = [_source(simple), importlib.metadata.version("regex")]
            case "length":
                parts = [_source(simple)]
            case "sentiment":
                parts = [_source(simple), importlib.metadata.version("vaderSentiment")]
            case "reward":
                parts = [_source(reward), *_classifier_parts(config.model, recipe)]
            case "squad":
                parts = [_source(squad)]
            case "knowledge":
                parts = [_source(knowledge), _source(squad)]
            case "likelihood":
                parts = [_source(likelihood), *_model_parts(config.source, recipe)]
            case "relevance":
                parts = [_source(dialogue), *_embedding_parts(config, recipe)]
            case "consistency":
                _check_turns(config, recipe)
                parts = [_source(dialogue), importlib.metadata.version("regex")]
                if config.nli is not None:
                    parts += [_source(nli), *_classifier_parts(config.nli, recipe)]
            case "novelty":
                parts = [_source(dialogue), *_embedding_parts(config, recipe), set_digest(set(accepted_before))]
            case "function":
                parts = [functions.version(config.function, recipe.folder)]
    except (OSError, ValueError, ImportError, models.ModelError) as error:
        raise ScoringError(f"scorer {config.label!r}: {error}") from error
    return digest(["scorer", settings, parts])


def _judged(label: str, judge: Judge, samples: Sequence[Sample]) -> list[float | None]:
    if not samples:
        return []
    try:
        returned = judge(samples)
    except (Exception, SystemExit) as error:
        log.warning("scorer %r raised on %d samples; asking one by one: %s", label, len(samples), repr(error))
    else:
        return _checked(label, returned, len(samples))
    return _one_by_one(label, judge, samples)  # outside the handler: a traceback keeps the batch's tensors alive


def _one_by_one(label: str, judge: Judge, samples: Sequence[Sample]) -> list[float | None]:
    scores: list[float | None] = []
    failures: dict[int, str] = {}
    for i, sample in enumerate(samples):
        try:
            returned = judge([sample])
        except (Exception, SystemExit) as error:
            if devices.out_of_memory(error):  # None would be recorded for good, but it may fit another time
                raise ScoringError(
                    f"scorer {label!r} ran out of memory on a single sample: {error}. Nothing is lost: run the round "
                    "again where there is more memory free, or lower `sampling.max_tokens`"
                ) from error
            failures[i] = functions.told(error)
            scores.append(None)
        else:
            scores += _checked(label, returned, 1, first=i)
    if failures:
        i, error = next(iter(failures.items()))
        # A scorer that fails on everything is broken, or a service it needs is down: None would be recorded for good.
        if 1 < len(failures) == len(samples):
            raise ScoringError(f"scorer {label!r} failed on every one of {len(samples)} samples: {error}")
        log.warning(
            "scorer %r cannot judge %d of %d samples; sample %d: %s", label, len(failures), len(samples), i, error
        )
    return scores


def _checked(label: str, returned: Any, count: int, first: int = 0) -> list[float | None]:
    """What a scorer returned, as floats. `first` is the index of its first sample, for the message."""
    try:
        values = list(returned)
    except TypeError:
        raise ScoringError(f"scorer {label!r} returned a {type(returned).__name__}, not a list") from None
    if len(values) != count:
        raise ScoringError(f"scorer {label!r} returned {len(values)} scores for {count} samples")
    for i, value in enumerate(values, first):
        try:
            good = value is None or (isinstance(value, numbers.Real) and math.isfinite(value))
        except OverflowError:
            raise ScoringError(f"scorer {label!r} returned an integer beyond every float for sample {i}") from None
        if not good:
            raise ScoringError(f"scorer {label!r} returned {value!r} for sample {i}, not a finite number or None")
    return [None if value is None else float(value) for value in values]


def _blocked(config, recipe: Recipe) -> list[str]:
    listed = [] if config.file is None else blocklist.read(recipe.path(config.file))
    return [*config.words, *listed]


def _column(sample: Sample, name: str) -> Any:
    if name not in sample.fields:
        raise KeyError(f"no column {name!r}; there is {', '.join(map(repr, sample.fields)) or 'none'}")
    return sample.fields[name]


def _answers(config, recipe: Recipe, sample: Sample) -> list[str]:
    if config.answers is not None:
        return squad.answers(_column(sample, config.answers))
    # Prefer the column itself: a list of references is still a list there, but JSON text in `reference`.
    return squad.answers(sample.fields.get(recipe.prompts.reference, sample.reference))


def _said(config, sample: Sample) -> dialogue.Said:
    turns = None if config.turns is None else _column(sample, config.turns)
    return dialogue.said(sample.prompt, sample.messages, turns)


def _check_turns(config, recipe: Recipe) -> None:
    if config.turns is None and recipe.prompts.messages is None:
        raise ValueError("whose turn was whose is not known: set `turns:`, or use `prompts.messages`")


def _contradictions(config, recipe: Recipe, device: Device) -> dialogue.Contradictions | None:
    _check_turns(config, recipe)
    if config.nli is None:
        return None
    model = nli.Contradiction(_model(config.nli, recipe), config.revision, device)
    return lambda pairs: model(pairs, config.batch_size)


def _embed(config, recipe: Recipe, device: Device) -> embedding.Embed:
    if config.model == embedding.HASHING:
        return embedding.hashing
    return embedding.Sentences(_model(config.model, recipe), config.revision, config.batch_size, device)


def _embedding_parts(config, recipe: Recipe) -> list[str]:
    if config.model == embedding.HASHING:
        return [_source(embedding), importlib.metadata.version("scikit-learn")]
    return [_source(embedding), embedding.require(), _model_digest(_model(config.model, recipe))]


def _classifier_parts(name: str, recipe: Recipe) -> list[str]:
    return [_source(classifier), *_model_parts(name, recipe)]


def _model_parts(name: str, recipe: Recipe) -> list[str]:
    return [importlib.metadata.version("transformers"), _model_digest(_model(name, recipe))]


def _language_model(config, recipe: Recipe) -> Path:
    field = f"scoring.scorers.{recipe.scoring.scorers.index(config)}"
    return models.fetch(recipe, field, config.source, config.revision).path


def _model(name: str, recipe: Recipe) -> str:
    """The absolute path of a folder, or the hub id as written."""
    return str(models.local(recipe, "its model", name) or name)


def _source(module) -> str:
    return file_digest(Path(module.__file__))


def _model_digest(name: str) -> str:
    """Digest of the model in a folder; a hub id is returned as it is, since its revision is in the settings."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    # A sentence-transformers model has parts in sub-folders.
    folders = [folder, *sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith("."))]
    return digest([[part.name, content_digest(part)] for part in folders[1:]] + [content_digest(folder)])
