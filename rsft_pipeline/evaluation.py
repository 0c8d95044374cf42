"""Evaluation: how good a model is on held-out prompts, whether a checkpoint beats another, when to stop.

Belongs here: metrics with intervals, the paired comparison, and the verdicts of the recipe's `promotion` and
`stop` sections. Not: drawing, scoring and fetching; results come in per prompt.

The prompt is the unit of sampling: draws of one prompt resemble each other, so an interval over draws would be
too narrow. Intervals are Student t over prompts: means are over dozens of prompts or more, and t needs no random
numbers, so a verdict can be replayed. For prompts that all agree, see `interval`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rsft_pipeline.recipe.evaluation import Promotion, Stop

Metric = Literal["pass_at_1", "pass_at_k", "mean_score"]


@dataclass(frozen=True)
class PromptResult:
    """What a model did on one held-out prompt."""

    prompt_id: str
    draws: int  # candidates drawn
    passes: int  # how many of them passed; one that cannot be judged did not pass
    score: float | None  # mean combined score over those that could be judged; None: none could
    distinct: int  # distinct normalised texts
    tokens: float  # mean length of a completion, in tokens
    eligible: int | None = None  # draws that were judged and passed every gate; None: not recorded


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` prompts and its confidence interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Summary:
    """A model on the held-out prompts."""

    prompts: int
    pass_at_1: Estimate
    pass_at_k: Estimate | None  # None: no prompt has k draws
    mean_score: Estimate | None  # None: nothing could be judged
    distinct_ratio: float  # distinct texts / draws, mean over prompts
    mean_tokens: float  # mean over prompts
    eligible: Estimate | None = None  # share of the draws that were judged and passed every gate; None: not recorded


@dataclass(frozen=True)
class Comparison:
    """Checkpoint minus champion (usually the policy) or control, paired on the `n` prompts where both have a value."""

    metric: Metric
    difference: float
    low: float
    high: float
    n: int
    length_drift: float  # the checkpoint's mean length / that of what it is compared with
    eligible: Estimate | None = None  # the same difference for the share of eligible draws; None: not recorded
    unseen: float | None = None  # lower end, allowing for losses too rare to be among n prompts; None: unbounded


@dataclass(frozen=True)
class FinishedRound:
    """What the stop rules look at in a round."""

    promoted: bool
    value: float | None  # the champion's promotion metric after the round
    tokens: int  # drawn in the round


def pass_at_k(n: np.ndarray, c: np.ndarray, k: int) -> np.ndarray:
    """Probability that at least one of k draws passes: 1 - C(n-c, k) / C(n, k), unbiased (Chen et al. 2021, eq. 1).

    Args:
        n: draws per prompt, integers, shape (prompts,); each at least k.
        c: how many of them passed, integers, shape (prompts,).
        k: draws that count.

    Returns:
        Shape (prompts,), each in [0, 1].
    """
    n, c = np.asarray(n), np.asarray(c)
    if np.any(n < k) or np.any(c > n) or np.any(c < 0) or k < 1:
        raise ValueError(f"pass@{k} needs 1 <= k <= n and 0 <= c <= n for every prompt")
    fails = np.ones(np.broadcast(n, c).shape)
    for i in range(k):  # C(n-c, k) / C(n, k) as a product of k fractions: nothing overflows
        fails *= np.maximum(n - c - i, 0) / (n - i)
    return 1 - fails


def summarise(results: Sequence[PromptResult], *, k: int, confidence: float) -> Summary:
    """Metrics over the prompts, with intervals at the given confidence.

    Prompts without a value for a metric (fewer than k draws, nothing judged) are left out of it and of its `n`.

    Raises:
        ValueError: there are no results.
    """
    if not results:
        raise ValueError("there are no results to summarise: no held-out prompt was evaluated")

    def estimate(metric: Metric) -> Estimate | None:
        values = list(_values(results, metric, k).values())
        return _mean(values, confidence, None if metric == "mean_score" else (0.0, 1.0))

    return Summary(
        prompts=len(results),
        pass_at_1=estimate("pass_at_1"),
        pass_at_k=estimate("pass_at_k"),
        mean_score=estimate("mean_score"),
        distinct_ratio=float(np.mean([r.distinct / r.draws for r in results])),
        mean_tokens=float(np.mean([r.tokens for r in results])),
        eligible=_mean(list(_eligible(results).values()), confidence, (0.0, 1.0)),
    )


def compare(
    other: Sequence[PromptResult], checkpoint: Sequence[PromptResult], metric: Metric, *, k: int, confidence: float
) -> Comparison:
    """The checkpoint's metric minus the other's (champion or control), paired on the prompts for which both have it.

    Raises:
        ValueError: there is no such prompt.
    """
    before, after = _values(other, metric, k), _values(checkpoint, metric, k)
    common = sorted(before.keys() & after.keys())
    if not common:
        raise ValueError(
            f"the checkpoint cannot be compared by {metric}: no held-out prompt has a value for both"
            f" (the checkpoint has one on {len(after)} prompts, what it is compared with on {len(before)})"
        )
    bounds = None if metric == "mean_score" else (-1.0, 1.0)
    difference = _mean([after[p] - before[p] for p in common], confidence, bounds)
    counted, counts = _eligible(other), _eligible(checkpoint)
    eligible = [counts[p] - counted[p] for p in sorted(counted.keys() & counts.keys())]
    tokens_before, tokens_after = ({r.prompt_id: r.tokens for r in results} for results in (other, checkpoint))
    drift = sum(tokens_after[p] for p in common) / sum(tokens_before[p] for p in common)
    return Comparison(
        metric,
        difference=difference.value,
        low=difference.low,
        high=difference.high,
        n=len(common),
        length_drift=drift,
        eligible=_mean(eligible, confidence, (-1.0, 1.0)),
        unseen=bounds and _unseen(difference.value, len(common), confidence, bounds)[0],
    )


_VERDICTS = {
    ("better", True): "better",
    ("better", False): "not better",
    ("not_worse", True): "not worse",
    ("not_worse", False): "may be worse",
}


def promoted(comparison: Comparison, promotion: Promotion) -> tuple[bool, str]:
    """Whether the checkpoint becomes the champion, and why, in words.

    The mean score is over all judged draws, whether or not they pass the gates, so a checkpoint with significantly
    fewer eligible draws is not promoted by it. `not_worse` must also rule out a loss on prompts that are too rare to
    have been seen: if nearly all prompts agree, Student t does not account for them.
    """
    needed, low = promotion.margin, comparison.low
    if promotion.require == "not_worse":
        needed, low = -promotion.margin, low if comparison.unseen is None else min(low, comparison.unseen)
    passes = low > needed
    verdict = _VERDICTS[promotion.require, passes]
    relation = ">" if passes else "is not wholly >"
    difference = shown(comparison.difference, low, comparison.high)
    numbers = f"{comparison.metric} {difference} {relation} {needed:g} over {comparison.n} prompts"
    if comparison.metric == "mean_score" and (eligible := comparison.eligible):
        numbers += f"; eligible draws {shown(eligible.value, eligible.low, eligible.high)}"
        if passes and eligible.high < 0:
            passes, verdict = False, "fewer draws are eligible"
    return passes, f"{verdict}: {numbers}"


def shown(difference: float, low: float, high: float) -> str:
    """A difference and its interval, as text."""
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def stop_reason(stop: Stop, history: Sequence[FinishedRound], metric: Metric) -> str | None:
    """Why the loop ends after these rounds (oldest first), in words; None to go on."""
    if not history:
        return None
    value = history[-1].value
    if stop.target is not None and value is not None and value >= stop.target:
        return f"target reached: the champion's {metric} is {value:.3f}, and {stop.target:g} is enough"
    if len(history) >= stop.rounds:
        return f"rounds used up: {len(history)} finished, {stop.rounds} allowed"
    since_promotion = next((i for i, r in enumerate(reversed(history)) if r.promoted), len(history))
    if stop.patience is not None and since_promotion >= stop.patience:
        return f"patience used up: no promotion in the last {since_promotion} rounds"
    drawn = sum(r.tokens for r in history)
    if stop.tokens is not None and drawn >= stop.tokens:
        return f"budget used up: {drawn} of {stop.tokens} tokens drawn"
    return None


def _values(results: Sequence[PromptResult], metric: Metric, k: int) -> dict[str, float]:
    """The metric of each prompt that has one."""
    match metric:
        case "pass_at_1":
            return {r.prompt_id: r.passes / r.draws for r in results}
        case "pass_at_k":
            able = [r for r in results if r.draws >= k]
            values = pass_at_k(np.array([r.draws for r in able]), np.array([r.passes for r in able]), k)
            return {r.prompt_id: float(v) for r, v in zip(able, values, strict=True)}
        case "mean_score":
            return {r.prompt_id: r.score for r in results if r.score is not None}
    raise ValueError(f"{metric!r} is not a metric")


def _eligible(results: Sequence[PromptResult]) -> dict[str, float]:
    """The share of eligible draws of each prompt, where it was recorded."""
    return {r.prompt_id: r.eligible / r.draws for r in results if r.eligible is not None}


def _mean(values: Sequence[float], confidence: float, bounds: tuple[float, float] | None) -> Estimate | None:
    """The mean over prompts and its interval; None if there are no values."""
    if not values:
        return None
    return Estimate(float(np.mean(values)), *interval(np.array(values), confidence, bounds), len(values))


def interval(values: np.ndarray, confidence: float, bounds: tuple[float, float] | None) -> tuple[float, float]:
    """Confidence interval of the mean of independent values: Student t, cut at the bounds.

    If all values are equal, t would claim certainty; the width is then set by what may have gone unseen, see `_unseen`.
    If nearly all are equal, t is too narrow for effects that are rare and large. Suppose that 2 prompts in 100 are lost
    outright and the other differences are 0, except for one draw of one prompt: a 95 % interval over 100 prompts then
    misses the mean 13 times in 100, whenever no lost prompt is among them.
    """
    from scipy.special import stdtrit

    n, mean, alpha = len(values), float(values.mean()), 1 - confidence
    bounds = bounds or (-math.inf, math.inf)
    if np.ptp(values) > 1e-12 * max(1.0, abs(mean)):  # more than rounding does
        half = float(stdtrit(n - 1, 1 - alpha / 2) * values.std(ddof=1) / math.sqrt(n))
        return max(mean - half, bounds[0]), min(mean + half, bounds[1])
    return _unseen(mean, n, confidence, bounds)


def _unseen(mean: float, n: int, confidence: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """The interval if a share of 1 - (alpha/2)^(1/n), rare enough to be missed by n values, lies at a bound.

    If every value is at one bound, this is the exact (Clopper-Pearson) interval. Without bounds it is (-inf, inf).
    """
    missing = 1 - ((1 - confidence) / 2) ** (1 / n)
    return mean - missing * (mean - bounds[0]), mean + missing * (bounds[1] - mean)
