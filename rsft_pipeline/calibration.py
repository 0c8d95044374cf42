"""Calibration: with which parameter a rule accepts a given share of some candidates.

Belongs here: the inverse of each rule's acceptance, as plain functions of arrays with one number per candidate.
Not: which candidates those are (acceptance.py, efficiency.py).

The result accepts the share in expectation over u, for exactly the numbers that were given. For other candidates
of the same policy the share is only approximate, and no guarantee rests on it.
"""

import math
from fractions import Fraction

import numpy as np


class CalibrationError(ValueError):
    """No parameter accepts the share; the message says why and what to do."""


def threshold(scores: np.ndarray, share: float) -> float:
    """The lowest t for which `score > t` holds for at most that share of the scores.

    Args:
        scores: shape (n,), finite.
        share: in (0, 1], taken as a decimal: 0.07 of 100 scores are 7.

    Returns:
        One of the scores, or the number just below the lowest. Equal scores are accepted together or not at all, so
        the share that it accepts may be smaller.

    Raises:
        CalibrationError: there are no scores, the share of them is less than one, or more than the share have
            the largest score.
    """
    n = _count(scores)
    most = math.floor(Fraction(str(share)) * n)
    if most == n:
        return float(np.nextafter(scores.min(), -np.inf))
    if most == 0:
        raise CalibrationError(f"share {share:g} of {n} candidates is less than one: raise `pilot` or the share")
    found = float(np.partition(scores, n - 1 - most)[n - 1 - most])
    if found == scores.max():
        tied = float(np.mean(scores == found))
        raise CalibrationError(
            f"{tied:.1%} of {n} candidates score {found:g}, the largest: no threshold accepts some and at most "
            f"{share:g}. Use a scorer that tells them apart, `rule: quantile`, or a share of {_up(tied)} or more"
        )
    return found


def log_scale(values: np.ndarray, share: float) -> float:
    """The c for which the mean of min(1, exp(value − c)) is the share.

    It is log M for log(p/q), and log k for log(loss). In closed form: with i of the values below c,
    c = log Σ exp(value) over these i − log(share · n − (n − i)). The sums are kept as logarithms, because p/q spans
    hundreds of nats.

    Args:
        values: shape (n,), in nats; −inf where nothing can be accepted.
        share: in (0, 1].

    Raises:
        CalibrationError: there are no values, or fewer than the share are above −inf.
    """
    n = _count(values)
    rising = np.sort(values[values > -np.inf])
    above = n - len(rising)  # values of −inf, which are above no c
    wanted = float(Fraction(str(share)) * n)  # 0.07 · 100 is 7, not 7.000000000000001
    if wanted > len(rising):
        raise CalibrationError(
            f"{above} of {n} candidates can never be accepted (their A is 0): a share of {share:g} is out of reach. "
            f"Ask for {_down(len(rising) / n)} or less"
        )
    if wanted == len(rising):
        return float(rising[0])
    sums = np.logaddexp.accumulate(rising)
    accepted_at = np.exp(sums - rising) + np.arange(len(rising) - 1, -1, -1)  # Σ min(1, exp(value − c)) at c = value
    below = int(np.count_nonzero(accepted_at >= wanted))
    largest = rising[below - 1]
    total = math.fsum(np.exp(rising[:below] - largest))
    return float(largest + math.log(total) - math.log(wanted - (len(rising) - below)))


def temperature(shortfalls: np.ndarray, share: float) -> float:
    """The β > 0 for which the mean of exp(shortfall / β) is the share, by bisection of log β to the last bit.

    Args:
        shortfalls: shape (n,), finite, r − r_max; values above 0 count as 0.
        share: in (0, 1).

    Raises:
        CalibrationError: there are no shortfalls, so many are 0 that even β → 0 accepts more, or only β → ∞ would
            accept them all.
    """
    n = _count(shortfalls)
    different, counts = np.unique(np.minimum(shortfalls, 0.0), return_counts=True)
    best = int(counts[-1]) if different[-1] == 0 else 0
    wanted = float(Fraction(str(share)) * n)
    if wanted <= best:
        raise CalibrationError(
            f"{best / n:.1%} of {n} candidates score the largest possible: every β accepts these and more. "
            f"Ask for a share above {best / n:g}, or give a larger `r_max`"
        )
    if share >= 1:
        raise CalibrationError("no β accepts everything: ask for a share below 1, or use `rule: threshold`")
    short, counts = (different[:-1], counts[:-1]) if best else (different, counts)
    # The mean lies between those for the least and the largest shortfall alone, so β lies between the two β's.
    least = math.log(-math.log((wanted - best) / (n - best)))
    low, high = math.log(-short[-1]) - least, math.log(-short[0]) - least
    with np.errstate(over="ignore"):
        while low < (middle := (low + high) / 2) < high:
            if np.dot(counts, np.exp(short / math.exp(middle))) < wanted - best:
                low = middle
            else:
                high = middle
    return math.exp(high)


def _count(values: np.ndarray) -> int:
    if not len(values):
        raise CalibrationError("no candidate was judged and passed the gates: look at the scores and the gates")
    return len(values)


def _up(share: float) -> float:
    return math.ceil(share * 1000) / 1000


def _down(share: float) -> float:
    return math.floor(share * 1000) / 1000
