"""Answers: whether a completion arrives at the reference, as text or as a number.

Belongs here: finding the answer in a text, and comparing two. Does not: algebra (symbolic).
Nothing in a text is evaluated: a number is read digit by digit into an exact fraction.
"""

import re
from fractions import Fraction

from rsft_pipeline.lineage import normalise

# A sign counts as one only where nothing precedes it that could be subtracted from: in 10-5 the last number is 5.
_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]}.]) [-\u2212] )?
    (?P<digits> (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ ) (?:\.[0-9]+)? | (?<![0-9]) \.[0-9]+ )
    (?P<exponent> [eE][-+]?[0-9]{1,3} (?![0-9]) )?  # bounded, or a few characters would be a number of gigabytes
    (?: / (?P<denominator> [0-9]+ ) (?![.,]?[0-9]) )?
    """,
    re.VERBOSE,
)
_MARKER = re.compile(r"####([^\n]*)")
_CURRENCY = re.compile(r"\\?[$€£]")
# What stands for a thousands comma: LaTeX's {,} and ,\! and thin space, and spaces that no line is broken at.
_COMMA = re.compile(r"(?<=[0-9]) (?: \{,\} | ,\\! | \\, | [\u00a0\u2009\u202f] ) (?=[0-9]{3}(?![0-9]))", re.VERBOSE)


def exact(completion: str, reference: str | None) -> float | None:
    """1.0 when the texts are the same but for case and white space, else 0.0; None without a reference."""
    if reference is None:
        return None
    return float(normalise(completion).casefold() == normalise(reference).casefold())


def numeric(completion: str, reference: str | None) -> float | None:
    """1.0 when both texts arrive at the same number, else 0.0; None without a number in the reference."""
    expected = None if reference is None else number(reference)
    if expected is None:
        return None
    return float(number(completion) == expected)


def number(text: str) -> Fraction | None:
    """The number that a text arrives at: the one after its last `#### `, else its last one; None without any.

    As in GSM8K (Cobbe et al. 2021, arXiv:2110.14168). Thousands commas, currency and per-cent signs are not
    part of a number: $1,000 is 1000, as is 1{,}000, and 50% is 50. A comma is never a decimal point. Exact: 18.0 is
    18, .5 is 1/2, and 1e-05 is 1/100000.
    """
    text = _COMMA.sub(",", _CURRENCY.sub("", text))
    marked = [found for line in _MARKER.findall(text) if (found := _NUMBER.search(line))]
    found = marked or list(_NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def _value(found: re.Match) -> Fraction | None:
    try:
        value = Fraction(found["digits"].replace(",", "") + (found["exponent"] or "")) / int(found["denominator"] or 1)
    except (ValueError, ZeroDivisionError):  # thousands of digits, which Python refuses to read; or n/0
        return None
    return -value if found["sign"] else value
