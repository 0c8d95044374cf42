"""Classes: how a classifier does on each label of the held-out prompts, and on all of them alike.

Belongs here: precision, recall, F1 and their mean over the labels. Does not: accuracy, which is pass@1 of an
exact match (evaluation.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsft_pipeline.evaluation import Estimate
from rsft_pipeline.rounds import Round
from rsft_pipeline.steps.rows import EVALUATION_CANDIDATES, of_evaluation
from rsft_pipeline.store import Store

RESAMPLES = 2000


@dataclass(frozen=True)
class Class:
    """One label. A precision or recall of nothing over nothing counts as 0."""

    label: str
    prompts: int  # that have it as their reference
    precision: float
    recall: float
    f1: float


def confusion(store: Store, round_: Round, policy: str) -> dict[tuple[str, str], int]:
    """How often a policy answered held-out prompts of one label with another: (reference, answer) → candidates."""
    rows = store.query(
        f"""SELECT p.reference, c.text, count(*) AS n FROM ({EVALUATION_CANDIDATES}) c
            JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe GROUP BY ALL""",
        of_evaluation(round_, policy),
    )
    return {(row["reference"], row["text"]): row["n"] for row in rows}


def classes(counts: Mapping[tuple[str, str], int], labels: Sequence[str]) -> list[Class]:
    """Precision, recall and F1 of each label."""
    matrix = _matrix(counts, labels)
    hits = matrix.diagonal()
    precision, recall = _ratio(hits, matrix.sum(0)), _ratio(hits, matrix.sum(1))
    return [
        Class(*row)
        for row in zip(labels, *(x.tolist() for x in (matrix.sum(1), precision, recall, _f1(matrix))), strict=True)
    ]


def macro_f1(counts: Mapping[tuple[str, str], int], labels: Sequence[str], *, confidence: float, seed: int) -> Estimate:
    """The mean F1 of the labels, each counting the same.

    Its interval is the percentile bootstrap over prompts (Efron 1979): the prompts drawn again as many times as there
    are. With one answer for each prompt, that is a multinomial draw of the table's cells.
    """
    matrix = _matrix(counts, labels)
    n = int(matrix.sum())
    drawn = np.random.default_rng(seed).multinomial(n, matrix.ravel() / n, RESAMPLES)
    means = _f1(drawn.reshape(-1, *matrix.shape)).mean(-1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(_f1(matrix).mean()), float(low), float(high), n)


def _matrix(counts: Mapping[tuple[str, str], int], labels: Sequence[str]) -> np.ndarray:
    """[reference, answer]."""
    return np.array([[counts.get((reference, answer), 0) for answer in labels] for reference in labels])


def _f1(matrix: np.ndarray) -> np.ndarray:
    """[…, labels]: 2·hits / (references + answers)."""
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    return _ratio(2 * hits, matrix.sum(-1) + matrix.sum(-2))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)
