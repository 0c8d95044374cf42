"""Classes: how a classifier does on each label of the held-out prompts, and on all labels weighted equally.

Belongs here: precision, recall, F1 and its mean over the labels. Not: accuracy, which is pass@1 of an
exact match (evaluation.py).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsft_pipeline.evaluation import Estimate

RESAMPLES = 2000


@dataclass(frozen=True)
class Class:
    """One label. A precision or recall of 0 / 0 counts as 0."""

    label: str
    prompts: int  # that have it as their reference
    precision: float
    recall: float
    f1: float | None  # None: neither a reference nor an answer


@dataclass(frozen=True)
class Answers:
    """A policy's answers to held-out prompts, grouped by kind: prompts with the same reference and the same answers.

    Shapes, for P kinds of prompts and L labels: `prompts` int [P], how many there are of a kind; `references` int [P],
    the correct label; `answers` int [P, L], how often a prompt of the kind was answered with each label.
    """

    prompts: np.ndarray
    references: np.ndarray
    answers: np.ndarray

    @classmethod
    def of(cls, answered: Iterable[tuple[str, Mapping[str, int]]], labels: Sequence[str]) -> "Answers":
        """From each prompt's reference and answer counts. Prompts whose reference is not a label are left out."""
        places = {label: i for i, label in enumerate(labels)}
        kinds = Counter(
            (places[reference], tuple(answers.get(label, 0) for label in labels))
            for reference, answers in answered
            if reference in places
        )
        ordered = sorted(kinds)  # so that the bootstrap does not depend on the order of the prompts
        return cls(
            np.array([kinds[kind] for kind in ordered], dtype=np.int64),
            np.array([reference for reference, _ in ordered], dtype=np.int64),
            np.array([answers for _, answers in ordered], dtype=np.int64).reshape(-1, len(labels)),
        )

    @property
    def table(self) -> np.ndarray:
        """[reference, answer] → candidates."""
        labels = self.answers.shape[1]
        table = np.zeros((labels, labels), dtype=np.int64)
        np.add.at(table, self.references, self.prompts[:, None] * self.answers)
        return table

    @property
    def prompts_by_reference(self) -> np.ndarray:
        return np.bincount(self.references, self.prompts, self.answers.shape[1]).astype(np.int64)


def classes(found: Answers, labels: Sequence[str]) -> list[Class]:
    """Precision, recall and F1 of each label."""
    table, prompts = found.table, found.prompts_by_reference
    hits = table.diagonal()
    f1 = [None if np.isnan(one) else one for one in _f1(hits, table.sum(0) + table.sum(1)).tolist()]
    numbers = [each.tolist() for each in (prompts, _ratio(hits, table.sum(0)), _ratio(hits, table.sum(1)))]
    return [Class(*row) for row in zip(labels, *numbers, f1, strict=True)]


def macro_f1(found: Answers, *, confidence: float, seed: int) -> Estimate:
    """The unweighted mean F1 of the labels; labels that are neither a reference nor an answer are left out.

    Its interval is the basic bootstrap over prompts (Davison and Hinkley 1997, section 5.2.1): as many prompts are
    resampled as there are, each with all of its answers, and F1 is averaged over the labels that these have.
    Resampling lowers F1 where a label has few prompts, as sampling the prompts did; the resampled values lie below the
    estimate and are therefore reflected about it. The interval always contains the estimate. If no answer was wrong it
    is [1, 1]: resampling cannot draw what was never seen.
    """
    n = int(found.prompts.sum())
    drawn = np.random.default_rng(seed).multinomial(n, found.prompts / n, RESAMPLES).astype(float)
    right = np.zeros(found.answers.shape)
    kinds = np.arange(len(right))
    right[kinds, found.references] = found.answers[kinds, found.references]
    named = found.answers.astype(float)  # as the answer, and below as the reference
    named[kinds, found.references] += found.answers.sum(1)
    means = np.nanmean(_f1(drawn @ right, drawn @ named), 1)
    value = float(np.nanmean(_f1(found.prompts @ right, found.prompts @ named)))
    high, low = 2 * value - np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, max(0.0, min(value, float(low))), min(1.0, max(value, float(high))), n)


def _f1(hits: np.ndarray, named: np.ndarray) -> np.ndarray:
    """2·hits / (references + answers) of each label; NaN where there is neither."""
    return _ratio(2 * hits, named, np.nan)


def _ratio(part: np.ndarray, whole: np.ndarray, of_nothing: float = 0.0) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), of_nothing), where=whole > 0)
