"""Efficiency: a round's acceptance in numbers: rate, distance from the draws, cost, and what to set instead.

Belongs here: numbers over decided rows, as SQL and plain formulas. Not: deciding (acceptance.py), finding a
parameter for a share (calibration.py), and showing (report.py).

Three sets of candidates are distinguished:
    all      every candidate that was decided on; for the rate and the tokens
    open     all except the draws of a pilot that is set aside, which are never accepted; for the KL
    seen     the open ones that were judged and passed the gates: what the rule saw; shares are shares of these

A candidate's A is the probability that the rule accepts it, before `distinct` and `cap`. For deterministic rules it
is 1 or 0, and every duplicate counts as accepted by the rule, except with `top_k`, which ranks only distinct texts.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import duckdb
import numpy as np

from rsft_pipeline import acceptance
from rsft_pipeline.calibration import CalibrationError
from rsft_pipeline.recipe.acceptance import AnyRule

CONFIDENCE = 0.95  # of intervals, and of `draws_needed`
WANTED = (0.1, 0.3, 0.5)  # shares of the seen candidates for which a parameter is suggested
BEFORE_THE_RULE = "('cannot judge', 'gate', 'pilot')"


@dataclass(frozen=True)
class Suggestion:
    """A parameter with which the rule would have accepted a share of the seen candidates."""

    wanted: float
    name: str  # threshold, k, beta or log_M; for rules that rank, which have none of these, threshold
    value: float | None  # None: no value accepts that share
    share: float | None  # what the value accepts, in expectation


@dataclass(frozen=True)
class Group:
    """The prompts that have one value in a column."""

    group: str | None  # None: the column is missing
    prompts: int
    candidates: int
    accepted: int
    rate: float  # accepted / candidates; with `sampling.until`, hard prompts have more draws and weigh more
    low: float  # Wilson
    high: float
    prompts_with_accepted: int
    draws_needed: int | None  # see `draws_needed`; None: no number of draws, or the rule compares candidates


@dataclass(frozen=True)
class Efficiency:
    """A round's decisions in numbers; None where a number is undefined."""

    candidates: int
    seen: int
    accepted: int
    rate: float | None  # accepted / candidates
    low: float | None  # Wilson, as if candidates were independent; draws of one prompt are not: it is too narrow
    high: float | None
    mean_a: float | None  # mean A of the seen: the share expected to pass the rule
    one_over_m: float | None  # `rejection`: the value of mean A if p ≤ M·q, p and q sum to 1, and there are no gates
    effective_samples: float | None  # (Σw)² / Σw² over the weights of the accepted
    effective_size: float | None  # (ΣA)² / ΣA² over the seen: if they were weighted by A instead of accepted
    kl: float | None  # nats, of what is accepted from what was drawn; see `measure`
    tokens_per_accepted: float | None  # tokens drawn, of all candidates, per accepted one
    suggestions: list[Suggestion]
    groups: list[Group]

    def metrics(self) -> dict[str, float | None]:
        """The single numbers, by their reported names."""
        return {
            "acceptance_rate_low": self.low,
            "acceptance_rate_high": self.high,
            "mean_A": self.mean_a,
            "one_over_M": self.one_over_m,
            "effective_samples": self.effective_samples,
            "effective_size_of_A": self.effective_size,
            "kl_of_accepted": self.kl,
            "tokens_per_accepted": self.tokens_per_accepted,
        }


# --- the round ------------------------------------------------------------------------------


def measure(
    connection: duckdb.DuckDBPyConnection, decided: str, parameters: dict[str, Any], groups: list[Group] = ()
) -> Efficiency:
    """The numbers of some decided rows.

    The KL divergence is that of π from q, the distribution that was drawn from, over prompts and completions together:
    π = q·g / Z with g = A (times the sample's weight), and 0 if a gate or a missing score kept it from the rule.
    KL = E_π[log g] − log Z, estimated by Σ g·log g / Σ g − log(mean g) over the open candidates; for deterministic
    rules, −log(share that the rule accepts). `distinct` and `cap` come afterwards and are not included.

    Args:
        decided: table or view with the columns that `acceptance.decisions_sql` reads (`same_text` excepted) and writes.
        parameters: what the decisions were made with.
    """
    sums = _sums(connection, decided, parameters)
    n, accepted, total_g = sums["candidates"], sums["accepted"], sums["g"]
    low, high = wilson(accepted, n) if n else (None, None)
    log_M = parameters.get("log_M", -1.0)
    return Efficiency(
        candidates=n,
        seen=sums["seen"],
        accepted=accepted,
        rate=accepted / n if n else None,
        low=low,
        high=high,
        mean_a=sums["a"] / sums["seen"] if sums["seen"] else None,
        one_over_m=math.exp(-log_M) if log_M >= 0 else None,
        effective_samples=_effective(sums["w"], sums["w2"]),
        effective_size=_effective(sums["a"], sums["a2"]),
        kl=max(0.0, sums["g_log_g"] / total_g - math.log(total_g / sums["open"])) if total_g else None,
        tokens_per_accepted=sums["tokens"] / accepted if accepted else None,
        suggestions=suggestions(connection, decided, parameters),
        groups=list(groups),
    )


def _sums(connection: duckdb.DuckDBPyConnection, decided: str, parameters: dict[str, Any]) -> dict[str, Any]:
    by_a = "log_a" if parameters.get("weight") == "A" else "0"
    return _rows(
        connection,
        f"""WITH chances AS (
                SELECT *, CASE WHEN {_by_chance(parameters)} THEN log_a WHEN {ruled(parameters)} THEN 0 END AS log_c
                FROM {decided}
            ), tilted AS (
                SELECT *, CASE WHEN log_c > '-infinity'::DOUBLE THEN log_c + {by_a} END AS log_g FROM chances
            )
            SELECT count(*) AS candidates, count(*) FILTER (accepted) AS accepted, sum(tokens)::BIGINT AS tokens,
                count(*) FILTER ({_open(parameters)}) AS open,
                count(*) FILTER (reason NOT IN {BEFORE_THE_RULE}) AS seen,
                sum(weight) FILTER (accepted) AS w, sum(weight * weight) FILTER (accepted) AS w2,
                coalesce(sum(exp(log_c)), 0) AS a, sum(exp(2 * log_c)) AS a2,
                sum(exp(log_g)) AS g, sum(exp(log_g) * log_g) AS g_log_g
            FROM tilted""",
    )[0]


def _open(parameters: dict[str, Any]) -> str:
    """SQL: whether a candidate is not in a pilot set aside. `reason` cannot tell: a gate takes precedence over it."""
    return f"draw >= {acceptance.set_aside(parameters)}"


def _by_chance(parameters: dict[str, Any]) -> str:
    """SQL: whether the rule is stochastic, so that A is exp(log_a)."""
    stochastic = parameters["rule"] in {"rejection", "boltzmann", "loss"} and parameters.get("threshold") is None
    return "true" if stochastic else "false"


def ruled(parameters: dict[str, Any]) -> str:
    """SQL: whether the rule accepted a candidate, whether or not `distinct` or `cap` then refused it."""
    accepting = ["accepted", "cap"] if parameters["rule"] == "top_k" else ["accepted", "cap", "duplicate"]
    return f"reason IN ({', '.join(map(repr, accepting))})"


def _effective(total: float | None, squares: float | None) -> float | None:
    """Kish's effective sample size, (Σw)² / Σw²: how many equally weighted samples are worth as much."""
    return total * total / squares if squares else None


def suggestions(connection: duckdb.DuckDBPyConnection, decided: str, parameters: dict[str, Any]) -> list[Suggestion]:
    """For each of the shares WANTED, the parameter that would have accepted it of the seen candidates."""
    rule = parameters["rule"]
    values = np.sort(acceptance.compared(connection, decided, parameters, _open(parameters)))
    if rule == "rejection" and parameters.get("threshold") is not None:
        rule, values = "threshold", np.exp(np.minimum(0.0, values - parameters.get("log_M", 0.0)))
    name = {"rejection": "log_M", "boltzmann": "beta", "loss": "k"}.get(rule, "threshold")
    found = []
    for wanted in WANTED:
        try:
            found.append(Suggestion(wanted, name, *acceptance.pick(rule, values, wanted)))
        except CalibrationError:
            found.append(Suggestion(wanted, name, None, None))
    return found


# --- its groups -----------------------------------------------------------------------------


def coverage(connection: duckdb.DuckDBPyConnection, decided: str, rule: AnyRule) -> list[Group]:
    """Acceptance in each group of prompts, the lowest rate first, and how many draws it needs.

    Args:
        decided: table or view with prompt_id, draw, accepted, reason and `grouped`.
        rule: the recipe's acceptance section.
    """
    parameters = rule.model_dump(mode="json")
    counted = _rows(
        connection,
        f"""SELECT grouped, count(DISTINCT prompt_id) AS prompts, count(*) AS candidates,
                count(*) FILTER (accepted) AS accepted, count(*) FILTER ({ruled(parameters)}) AS ruled,
                count(*) FILTER ({_open(parameters)}) AS open,
                count(DISTINCT prompt_id) FILTER (accepted) AS prompts_with_accepted
            FROM {decided} GROUP BY grouped ORDER BY avg(accepted::INTEGER), grouped""",
    )
    groups = []
    for row in counted:
        needed = draws_needed(row["ruled"] / row["open"]) if rule.per_candidate and row["open"] else None
        groups.append(
            Group(
                row["grouped"],
                row["prompts"],
                row["candidates"],
                row["accepted"],
                row["accepted"] / row["candidates"],
                *wilson(row["accepted"], row["candidates"]),
                row["prompts_with_accepted"],
                None if needed is None else needed + acceptance.set_aside(parameters),
            )
        )
    return groups


def draws_needed(rate: float) -> int | None:
    """The fewest draws of which one at least is accepted with a probability of CONFIDENCE: 1 − (1 − rate)ⁿ.

    Each draw is accepted with probability `rate`; prompts that are harder than their group, or whose texts repeat,
    need more. None if the rate is 0.
    """
    if rate <= 0:
        return None
    return 1 if rate >= CONFIDENCE else math.ceil(math.log1p(-CONFIDENCE) / math.log1p(-rate))


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): valid also near 0 and 1 and for few candidates."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, z2 = successes / n, z * z
    centre = share + z2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)  # exact despite rounding


def _rows(connection: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    return connection.execute(sql).to_arrow_table().to_pylist()
