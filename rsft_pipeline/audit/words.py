"""Words: a decision as a sentence, with the numbers behind it.

Belongs here: putting a row of `decisions` into words. Not: deciding (acceptance.py), nor whether the decision holds
(replay.py).
"""

import json
import math
from collections.abc import Mapping
from typing import Any


def rule(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A rule's parameters for people: the rule first, and without those that do not matter for these decisions."""
    picked = "pilot_candidates" in parameters or parameters.get("M") == "estimate"
    said = {name: value for name, value in parameters.items() if value is not None and (name != "pilot" or picked)}
    return {"rule": said.pop("rule"), **said}


def decision(row: Mapping[str, Any]) -> str:
    """Why a candidate was accepted or rejected: `p/(M·q) = 0.71 > u = 0.33`.

    Args:
        row: a row of `decisions`: accepted, reason, score, log_a, u, parameters (JSON).
    """
    rule = json.loads(row["parameters"])
    match row["reason"]:
        case "cannot judge":
            return f"what the rule `{rule['rule']}` looks at is missing or not a number"
        case "gate":
            return "a scorer's minimum was not reached, so the rule never saw it"
        case "pilot":
            return f"one of the first {rule['pilot']} draws of its prompt, set aside to estimate M from"
        case "duplicate":
            return f"{_passed(row, rule)}, but the same text was kept already for this prompt"
        case "cap":
            return f"{_passed(row, rule)}, but its prompt has its share of {rule['cap']} already"
        case "rank":
            return f"score {_n(row['score'])} is {_best(rule, 'not ')}"
        case "below threshold":
            return f"{_weighed(row, rule)} is not above the threshold {_n(rule['threshold'])}"
        case "revoked":
            return "it was revoked, or what it came of was"
        case "u >= A":
            return f"{_chance(row, rule)} ≤ u = {_n(row['u'])}"
        case "accepted":
            return _passed(row, rule)
        case other:
            return other


def _passed(row: Mapping[str, Any], rule: Mapping[str, Any]) -> str:
    """How the rule itself was passed. Rules that only rank pass by position, which a duplicate no longer has."""
    if rule.get("threshold") is not None:
        return f"{_weighed(row, rule)} is above the threshold {_n(rule['threshold'])}"
    if row["log_a"] is not None:
        return f"{_chance(row, rule)} > u = {_n(row['u'])}"
    if row["accepted"] or rule["rule"] == "quantile":
        return f"score {_n(row['score'])} is {_best(rule)}"
    return f"score {_n(row['score'])}"


def _best(rule: Mapping[str, Any], negated: str = "") -> str:
    if rule["rule"] == "top_k":
        return f"{negated}among the {rule['k']} best of its prompt"
    return f"{negated}among the best {100 * rule['share']:.4g} % of the round, which are {rule['cut']:,} candidates"


def _weighed(row: Mapping[str, Any], rule: Mapping[str, Any]) -> str:
    """The number that a threshold is compared with."""
    return f"score {_n(row['score'])}" if row["log_a"] is None else _chance(row, rule)


def _chance(row: Mapping[str, Any], rule: Mapping[str, Any]) -> str:
    """A, by the rule's formula, capped at 1."""
    formula = {
        "rejection": "p/(M·q)",
        "boltzmann": f"exp((score − r_max)/β) (β = {_n(rule.get('beta'))})",
        "loss": f"loss/k (k = {_n(rule.get('k'))})",
    }.get(rule["rule"], "A")
    return f"{formula} = {_n(math.exp(row['log_a']))}" if row["log_a"] < 0 else f"{formula} ≥ 1"


def _n(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
