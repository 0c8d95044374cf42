"""Scorers that are one formula or one call: pattern, length, sentiment."""

from collections.abc import Sequence
from typing import Literal

import regex

SECONDS = 1.0  # for one text: some patterns go through all ways to split it, and a policy may write whatever it likes


def pattern(text: str, wanted: str) -> float | None:
    """1.0 when the pattern is found anywhere in the text, else 0.0; None when looking takes too long."""
    try:
        return float(regex.search(wanted, text, timeout=SECONDS) is not None)
    except TimeoutError:
        return None


def length(text: str, at_least: int, at_most: int, unit: Literal["words", "characters"]) -> float:
    """1.0 from at_least to at_most units, falling linearly to 0.0 at none and at twice at_most.

    Words are what white space separates.
    """
    n = len(text.split()) if unit == "words" else len(text)
    if n < at_least:
        return n / at_least
    return min(1.0, max(0.0, 2 - n / at_most))


def sentiment(texts: Sequence[str]) -> list[float]:
    """The compound score of VADER, in [-1, 1] (Hutto and Gilbert 2014, ICWSM)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]
