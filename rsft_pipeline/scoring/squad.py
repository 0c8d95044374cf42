"""SQuAD: exact match and token F1, as the official evaluation of SQuAD v1.1 has them.

Belongs here: its normalisation, its two metrics, and the reference answers of a row. Does not: answers as
numbers or expressions (answer, symbolic).

Rajpurkar et al. 2016, arXiv:1606.05250, evaluate-v1.1.py.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, then without the words a, an and the; single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact(completion: str, references: Sequence[str]) -> float | None:
    """1.0 when the completion is one of the references, both normalised, else 0.0; None without references."""
    if not references:
        return None
    return float(normalise(completion) in {normalise(reference) for reference in references})


def f1(completion: str, references: Sequence[str]) -> float | None:
    """The largest F1 of the completion's tokens with those of a reference; None without references.

    As in the official script, two texts of which nothing is left have no token in common: 0.0.
    """
    return max((_f1(normalise(completion).split(), normalise(r).split()) for r in references), default=None)


def _f1(given: list[str], expected: list[str]) -> float:
    same = (Counter(given) & Counter(expected)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(given), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def answers(value: Any) -> list[str]:
    """The reference answers that a column holds: none, a text, a list of them, or SQuAD's own `{text: …}`."""
    match value:
        case None:
            return []
        case str():
            return [value]
        case list():
            return [answer for part in value for answer in answers(part)]
        case {"text": text}:
            return answers(text)
    return [json.dumps(value, ensure_ascii=False)]
