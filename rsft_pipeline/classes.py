"""Classes: how a classifier does on each label of the held-out prompts, and on all of them alike.

Belongs here: precision, recall, F1 and their mean over the labels. Does not: accuracy, which is pass@1 of an
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
    """One label. A precision or recall of nothing over nothing counts as 0."""

    label: str
    prompts: int  # that have it as their reference
    precision: float
    recall: float
    f1: float | None  # None: neither a reference nor an answer


@dataclass(frozen=True)
class Answers:
    """What a policy answered to held-out prompts, by prompts that were answered alike.

    Shapes, of P kinds of prompts and L labels: `prompts` int [P], how many there are of a kind; `references` int [P],
    the label that is right; `answers` int [P, L], how often one of the kind was answered with each.
    """

    prompts: np.ndarray
    references: np.ndarray
    answers: np.ndarray

    @classmethod
    def of(cls, answered: Iterable[tuple[str, Mapping[str, int]]], labels: Sequence[str]) -> "Answers":
        """Of each prompt's reference, and how often it got each answer. References that are no label are left out."""
        places = {label: i for i, label in enumerate(labels)}
        kinds = Counter(
            (places[reference], tuple(answers.get(label, 0) for label in labels))
            for reference, answers in answered
            if reference in places
        )
        ordered = sorted(kinds)  # the bootstrap is the same, in whatever order the prompts came
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
    """The mean F1 of the labels, each counting the same; those that are neither a reference nor an answer do not count.

    Its interval is the basic bootstrap over prompts (Davison and Hinkley 1997, section 5.2.1): the prompts drawn again
    as many times as there are, each with all of its answers, and the labels that these have. Drawing again loses F1
    where a label has few prompts, as the draw itself did, so the values drawn are reflected in the estimate; as they
    are they lie below it. The estimate is always inside. Where no answer was wrong it is [1, 1]: what was never seen
    it cannot draw.
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
    """2·hits / (references + answers), of each label; NaN where there is neither."""
    return _ratio(2 * hits, named, np.nan)


def _ratio(part: np.ndarray, whole: np.ndarray, of_nothing: float = 0.0) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), of_nothing), where=whole > 0)
