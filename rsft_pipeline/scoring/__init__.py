"""Scoring: what each candidate is worth, by every scorer of the recipe, and combined.

Belongs here: which scorer a recipe means, running them so that no sample can harm another, their versions,
and the combined score. Does not: how a text is judged (the modules beside this one, on plain text), and what
is accepted (acceptance).

A scorer takes samples and returns as many floats, or None for «cannot judge», which is never 0.
"""

import importlib.metadata
import logging
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsft_pipeline import functions
from rsft_pipeline.devices import Device
from rsft_pipeline.lineage import digest, file_digest
from rsft_pipeline.recipe import AnyScorer, Recipe, Scoring
from rsft_pipeline.scoring import answer, blocklist, reward, simple, symbolic

log = logging.getLogger(__name__)


class ScoringError(ValueError):
    """A scorer that cannot be made, or that breaks the contract: the message names it."""


@dataclass(frozen=True)
class Sample:
    """A candidate as a scorer sees it."""

    prompt: str  # as rendered
    completion: str
    reference: str | None  # the reference answer, where the recipe has one
    fields: dict[str, Any]  # every column of the prompt's row
    log_p: float | None  # the policy's log-probability of the completion, in nats, at temperature 1, untruncated


Judge = Callable[[Sequence[Sample]], list[float | None]]


def judges(recipe: Recipe, device: Device) -> dict[str, Judge]:
    """The recipe's scorers by label, with what they need loaded: make them once, use them for every batch.

    Raises:
        ScoringError: a scorer that cannot be made.
    """
    return {config.label: scorer(config, recipe, device) for config in recipe.scoring.scorers}


def score(judges: dict[str, Judge], samples: Sequence[Sample]) -> dict[str, list[float | None]]:
    """The scores by scorer label; each list is as long as `samples` and in their order.

    A scorer that raises is asked again sample by sample, and those on which it still fails get None, with the
    first reason logged.

    Raises:
        ScoringError: a scorer that fails on every one of several samples, or returns anything but one finite
            number or None for each.
    """
    return {label: _judged(label, judge, samples) for label, judge in judges.items()}


def combine(scoring: Scoring, scores: dict[str, list[float | None]]) -> tuple[list[float | None], list[bool]]:
    """The combined score of each sample, and whether it passed every gate.

    `weighted`: Σ w·s / Σ w over the scorers with weight, or None where one of these could not judge.
    `all`: 1.0 where every scorer reaches its minimum, else 0.0. Passed: every scorer that has a minimum judged
    the sample, at no less than that.
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


def scorer(config: AnyScorer, recipe: Recipe, device: Device) -> Judge:
    """The function that a `scoring.scorers` entry means. Loads what it needs.

    Raises:
        ScoringError: a file, package, model or function that it needs is not there, naming which.
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
                return lambda samples: [simple.regex(s.completion, config.pattern) for s in samples]
            case "length":
                bounds = config.at_least, config.at_most, config.unit
                return lambda samples: [simple.length(s.completion, *bounds) for s in samples]
            case "sentiment":
                return lambda samples: simple.sentiment([s.completion for s in samples])
            case "reward":
                model = reward.Reward(_model(config, recipe), config.revision, config.label_index, device)
                return lambda samples: model([(s.prompt, s.completion) for s in samples], config.batch_size)
            case "function":
                function = functions.load(config.function, recipe.folder)
                return lambda samples: function(list(samples), **config.arguments)
    except (OSError, ValueError, ImportError) as error:
        raise ScoringError(f"scorer {config.label!r}: {error}") from error


def version(config: AnyScorer, recipe: Recipe) -> str:
    """Hash of all that decides a scorer's scores: its source, its settings, and what these point at.

    That is the words of a blocklist file, the files or hub revision of a reward model, the source file of a
    function, and the release of the library that does the judging. Name, weight and minimum are left out: they
    change what is made of a score, not the score.
    """
    settings = config.model_dump(mode="json", exclude={"name", "weight", "minimum"})
    try:
        match config.kind:
            case "answer" if config.match == "math":
                parts = [_source(answer), _source(symbolic), symbolic.require()]
            case "answer":
                parts = [_source(answer)]
            case "blocklist":
                parts = [_source(blocklist), _blocked(config, recipe)]
            case "regex" | "length":
                parts = [_source(simple)]
            case "sentiment":
                parts = [_source(simple), importlib.metadata.version("vaderSentiment")]
            case "reward":
                parts = [_source(reward), _folder_digest(_model(config, recipe))]
            case "function":
                parts = [functions.source_digest(functions.load(config.function, recipe.folder))]
    except (OSError, ValueError, ImportError) as error:
        raise ScoringError(f"scorer {config.label!r}: {error}") from error
    return digest(["scorer", settings, parts])


def _judged(label: str, judge: Judge, samples: Sequence[Sample]) -> list[float | None]:
    if not samples:
        return []
    try:
        returned = judge(samples)
    except Exception as error:
        log.warning("scorer %r raised on %d samples; asking one by one: %r", label, len(samples), error)
        return _one_by_one(label, judge, samples)
    return _checked(label, returned, len(samples))


def _one_by_one(label: str, judge: Judge, samples: Sequence[Sample]) -> list[float | None]:
    scores: list[float | None] = []
    failures: dict[int, Exception] = {}
    for i, sample in enumerate(samples):
        try:
            returned = judge([sample])
        except Exception as error:
            failures[i] = error
            scores.append(None)
        else:
            scores += _checked(label, returned, 1, first=i)
    if failures:
        i, error = next(iter(failures.items()))
        # A scorer that fails on everything is broken, or what it asks is down: None would be recorded for good.
        if 1 < len(failures) == len(samples):
            raise ScoringError(f"scorer {label!r} failed on every one of {len(samples)} samples: {error!r}") from error
        log.warning(
            "scorer %r cannot judge %d of %d samples; sample %d: %r", label, len(failures), len(samples), i, error
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
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise ScoringError(f"scorer {label!r} returned {value!r} for sample {i}, not a finite number or None")
    return [None if value is None else float(value) for value in values]


def _blocked(config, recipe: Recipe) -> list[str]:
    listed = [] if config.file is None else blocklist.read(recipe.path(config.file))
    return [*config.words, *listed]


def _model(config, recipe: Recipe) -> str:
    """A folder if there is one, as an absolute path; else the hub id as written."""
    path = recipe.path(config.model)
    return str(path) if path.is_dir() else config.model


def _source(module) -> str:
    return file_digest(Path(module.__file__))


def _folder_digest(name: str) -> str:
    """Digest of a folder's files, or the name itself where it is a hub id (its revision is in the settings)."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return digest([[path.name, file_digest(path)] for path in files])
