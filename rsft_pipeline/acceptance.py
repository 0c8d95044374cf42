"""Acceptance: which candidates are kept, and why the others are not.

Belongs here: the rules, as SQL over stored scores and log-probabilities. A decision depends only on the
rows, the parameters and the seed, so it can be replayed bit for bit, and a what-if is one query.
Not: how candidates were drawn or judged, where decisions are stored, how the parameter that accepts a given
share is found (calibration.py), and what the decisions amount to (efficiency.py).

Every candidate goes through the same steps; the first that turns it down is the reason of its decision:

1. `cannot judge`: what the rule looks at is missing or not a number. That is the score, except for
   `rejection` (log p and log q) and `loss` (log p and the length), which can decide without one.
2. `gate`: some scorer's minimum was not reached. The rule never sees these candidates: they count neither
   towards a quantile nor towards a largest score.
3. The rule: `below threshold`, `rank`, `u >= A`, or `pilot`. The draws that M was estimated from are set
   aside, because M would otherwise depend on the very candidates that it decides on. Draws that a parameter was
   calibrated on are not: unlike exact draws from p, which need p ≤ M·q, no guarantee rests on that choice.
4. `duplicate`: the same normalised text was kept once already for this prompt. `top_k` takes this step
   before it ranks, so that it keeps the k best distinct texts.
5. `cap`: the prompt already has `cap` accepted candidates.

Where only some of several can be kept, rules that rank by score prefer the higher score (`rejection` with a
threshold: the higher A) and break ties by u; the stochastic rules prefer the smaller u / A. Given u < A, u / A is
uniform on [0, 1) whatever A is, so this choice does not distort what the rule did; choosing by u itself would
favour candidates with a small A. Remaining ties are broken by the 64 bits that u was rounded from, so row order
never matters. Note that `distinct` flattens the distribution that a stochastic rule draws from: each text of a
prompt counts once, however probable. Switch it off where the exact distribution is wanted.
"""

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import duckdb
import numpy as np

from rsft_pipeline import calibration
from rsft_pipeline.recipe.acceptance import (
    AnyRule,
    BoltzmannRule,
    CalibratedRule,
    QuantileRule,
    RejectionRule,
    ThresholdRule,
)


class AcceptanceError(ValueError):
    """A rule that cannot decide on these candidates: the message says what to change."""


# lineage.uniform in SQL: the upper 53 of the 64 bits in the low half of an MD5. `{seed}` has to be filled in.
_NUMBER = "md5_number_lower('{seed}:' || candidate_id)"


def _uniform(number: str) -> str:
    return f"({number} >> 11) * pow(2, -53)"


UNIFORM_SQL = _uniform(_NUMBER)

# lineage.normalise in SQL: RE2's \s is narrower than Python's, so white space is spelled out, here all but the space.
# Runs of a single space do not match: replacing each by itself would take most of the time.
_WHITE = r"\x{9}-\x{d}\x{1c}-\x{1f}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_RUNS = rf"[{_WHITE}][ {_WHITE}]*| [ {_WHITE}]+"
_WHITE_ASCII = (*range(0x9, 0xE), *range(0x1C, 0x20))


def normalised(column: str) -> str:
    """SQL of a text column as lineage.normalise gives it."""
    unusual = [f"strlen({column}) <> length({column})"]  # not ASCII
    unusual += [f"starts_with({column}, ' ')", f"ends_with({column}, ' ')", f"contains({column}, '  ')"]
    unusual += [f"contains({column}, chr({code}))" for code in (0, *_WHITE_ASCII)]
    # nfc_normalize stops at the first NUL, so a private-use character stands in for it. Line feeds, the commonest
    # white space, are replaced beforehand, in a third of the time that the regular expression takes.
    one_line = f"replace(replace({column}, chr(0), chr(983040)), chr(10), ' ')"
    folded = f"trim(regexp_replace(nfc_normalize({one_line}), '{_RUNS}', ' ', 'g'))"
    return f"CASE WHEN {' OR '.join(unusual)} THEN {folded} ELSE {column} END"


def same_text(column: str) -> str:
    """SQL of a 64-bit hash that is equal for texts that the rules treat as the same.

    Only texts of one prompt are compared: among a thousand different ones, a collision has odds below 1 to 10¹³.
    """
    return f"hash({normalised(column)})"


_COLUMNS = "candidate_id, prompt_id, draw, same_text, tokens, log_q, log_p, score, passed, target"
_HAS_SCORE = "isfinite(score)"
# A target of -inf is a known probability of 0. In DuckDB, NaN is larger than infinity.
_HAS_RATIO = "isfinite(log_q) AND target < 'infinity'::DOUBLE"
_HAS_LOSS = "isfinite(log_p) AND tokens > 0"


# --- the parameters of a rule ---------------------------------------------------------------


def parameters(connection: duckdb.DuckDBPyConnection, source: str, rule: AnyRule, round_number: int) -> dict[str, Any]:
    """Everything that the decisions depend on besides rows and seed, to be stored with them.

    Args:
        source: table with the columns that `decisions_sql` reads.
        rule: the recipe's acceptance section.
        round_number: 0 for the first round; a threshold may rise from round to round.

    Returns:
        The rule's fields in JSON form, and what had to be resolved from rows and round:
        threshold: `threshold`, the t of this round.
        quantile: `cut`, how many are accepted, ⌈share · n⌉ of the n judged candidates past the gates.
        rejection: `log_M` in nats, given, calibrated, or estimated as max(log p − log q) + log(safety) over the
            `pilot_candidates` pilot draws past the gates; `violations`, how many of the candidates decided on have
            p > M·q (A is then 1 where it should be more, and such texts are under-represented); `log_M_needed`, the
            smallest log M without violations, or None.
        boltzmann with r_max given: `violations`, how many score above it.
        with `calibrate`: the value that was picked, under its name (M: `log_M`); `pilot_candidates`, how many
            judged candidates past the gates it was picked from; `pilot_share`, the share of these that it accepts.

    Raises:
        AcceptanceError: M is to be estimated and the pilot has no usable draw, or every draw is in the pilot; or no
            value accepts the wanted share of the pilot.
    """
    resolved = rule.model_dump(mode="json")
    if isinstance(rule, CalibratedRule) and rule.calibrated:
        resolved |= _calibrated(connection, source, rule)
    match rule:
        case ThresholdRule(threshold=float(t)):  # decimal, so that 0.1 + 2 · 0.1 is 0.3
            resolved["threshold"] = float(Decimal(str(t)) + round_number * Decimal(str(rule.raise_by)))
        case QuantileRule(share=share):
            (judged,) = _row(connection, f"SELECT count(*) FROM {source} WHERE {_HAS_SCORE} AND passed")
            resolved["cut"] = math.ceil(Fraction(str(share)) * judged)  # 0.07 · 100 is 7, not 7.000000000000001
        case RejectionRule(M="estimate"):
            resolved |= _estimated(connection, source, rule)
            resolved |= _violations(connection, source, f"draw >= {rule.pilot}", resolved["log_M"])
        case RejectionRule():
            if not rule.calibrated:
                resolved["log_M"] = math.log(rule.M)
            resolved |= _violations(connection, source, "true", resolved["log_M"])
        case BoltzmannRule(r_max=float(r_max)):
            above = f"{_HAS_SCORE} AND passed AND score > {_double(r_max)}"
            (resolved["violations"],) = _row(connection, f"SELECT count(*) FROM {source} WHERE {above}")
    return resolved


def compared(
    connection: duckdb.DuckDBPyConnection, source: str, parameters: dict[str, Any], where: str = "true"
) -> np.ndarray:
    """What the rule compares, for each candidate that it sees (judged, and past the gates).

    Args:
        source: as in `decisions_sql`.
        parameters: the rule's fields; the one to calibrate need not be known yet.
        where: which of the candidates, as SQL.

    Returns:
        Shape (n,): rejection: log p − log q, in nats; loss: log(−log p / tokens); boltzmann: r − r_max; other
        rules: the score.
    """
    return connection.execute(
        f"""SELECT {_compared_sql(parameters)} AS compared
            FROM (SELECT * FROM {source} WHERE {where}) {_prompt_r_max_sql(source, parameters)}
            WHERE ({_judged_sql(parameters)}) AND passed"""
    ).fetchnumpy()["compared"]


def pick(rule: str, compared: np.ndarray, share: float) -> tuple[float, float]:
    """The parameter with which a rule accepts a share of what it compares, and the share that it then accepts.

    Returns:
        rejection: log M; loss: k; boltzmann: β; other rules: a threshold's t, whose share may be less than wanted.

    Raises:
        CalibrationError: no value accepts the share.
    """
    match rule:
        case "rejection":
            return calibration.log_scale(compared, share), share
        case "loss":
            return math.exp(calibration.log_scale(compared, share)), share
        case "boltzmann":
            return calibration.temperature(compared, share), share
    t = calibration.threshold(compared, share)
    return t, float(np.mean(compared > t))


def _calibrated(connection: duckdb.DuckDBPyConnection, source: str, rule: CalibratedRule) -> dict[str, Any]:
    name = "log_M" if rule.picked == "M" else rule.picked
    if _row(connection, f"SELECT count(*) FROM {source}") == (0,):
        return {name: 1.0}  # any value: there is nothing to decide on
    pilot = compared(connection, source, rule.model_dump(mode="json"), f"draw < {rule.pilot}")
    try:
        number, share = pick(rule.rule, pilot, rule.share)
    except calibration.CalibrationError as error:
        raise AcceptanceError(
            f"acceptance.{rule.picked} cannot be calibrated on the pilot (draw < {rule.pilot}): {error}"
        ) from None
    return {name: number, "pilot_candidates": len(pilot), "pilot_share": share}


# --- the decisions --------------------------------------------------------------------------


def decisions_sql(source: str, parameters: dict[str, Any], seed: int) -> str:
    """A SELECT of one decision for each row of the source, so that rows never pass through Python.

    Reads:
        candidate_id VARCHAR, prompt_id VARCHAR, draw INTEGER, same_text UBIGINT (of the text, see `same_text`; read
        only by rules with `distinct`), tokens INTEGER (the completion's length),
        log_q DOUBLE (of the sequence, in nats, under the distribution sampled from), log_p DOUBLE (the same, under
        the policy at temperature 1, untruncated), score DOUBLE (combined; NULL: cannot judge), passed BOOLEAN (every
        gate reached), target DOUBLE (log p of the rejection rule's target; else NULL).

    Writes:
        candidate_id, prompt_id, accepted BOOLEAN, reason VARCHAR (`accepted`, or one of those above), score,
        log_a DOUBLE (log A, from -inf to 0; NULL where no A decided: other rules, and candidates turned down before
        the rule), u DOUBLE (always), weight DOUBLE (of the sample in the training loss: 1, or A
            where the rule's `weight` says so).

    Args:
        source: name of a table; not of a view, whose rows have no `rowid`.
        parameters: what `parameters` returned, possibly after a round trip through JSON.
        seed: the recipe's seed.
    """
    log_a = _log_a_sql(parameters)
    weight = "exp(log_a)" if parameters.get("weight") == "A" else "1::DOUBLE"
    accepts, refusal, rank = _rule_sql(parameters)
    aside = set_aside(parameters)
    pilot = f"WHEN draw < {aside} THEN 'pilot'" if aside else ""

    # A reason of NULL: the candidate is still in play. Only these are sorted, with only a few columns, and refusals
    # are then joined to the candidates: sorting millions of whole rows is mostly writing them to disk and back.
    sql = f"""
        WITH eligible AS NOT MATERIALIZED (
            SELECT *, {_uniform("number")} AS u, CASE
                WHEN ({_judged_sql(parameters)}) IS NOT TRUE THEN 'cannot judge'
                WHEN passed IS NOT TRUE THEN 'gate'
                {pilot}
            END AS reason
            FROM (SELECT rowid AS row, {_COLUMNS}, {_NUMBER.format(seed=int(seed))} AS number FROM {source})
                {_prompt_r_max_sql(source, parameters)}
        ), weighed AS NOT MATERIALIZED (
            SELECT *, CASE WHEN reason IS NULL THEN {log_a or "NULL::DOUBLE"} END AS log_a FROM eligible
        ), ruled AS NOT MATERIALIZED (
            SELECT * REPLACE (CASE WHEN reason IS NULL AND NOT ({accepts}) THEN '{refusal}' ELSE reason END AS reason)
            FROM weighed
        ), selected_0 AS (
            SELECT row, prompt_id, same_text, {rank} AS rank, number, NULL::VARCHAR AS refusal
            FROM ruled WHERE reason IS NULL
        )"""
    selections = _selections(parameters)
    for i, (word, most, group) in enumerate(selections):
        place = f"row_number() OVER (PARTITION BY refusal IS NULL, {group} ORDER BY rank, number)"
        refused = f"refusal IS NULL AND {place} > {int(most)}"
        sql += f""", selected_{i + 1} AS (
            SELECT * REPLACE (CASE WHEN {refused} THEN '{word}' ELSE refusal END AS refusal) FROM selected_{i}
        )"""
    return f"""{sql}
        SELECT candidate_id, prompt_id, coalesce(reason, refusal) IS NULL AS accepted,
            coalesce(reason, refusal, 'accepted') AS reason, score, log_a, u, {weight} AS weight
        FROM ruled LEFT JOIN (
            SELECT row, refusal FROM selected_{len(selections)} WHERE refusal IS NOT NULL
        ) USING (row)"""


def _rule_sql(parameters: dict[str, Any]) -> tuple[str, str, str]:
    """SQL of whether the rule accepts a candidate, the reason if not, and SQL of a candidate's rank, lowest first."""
    if parameters["rule"] == "rejection" and parameters.get("threshold") is not None:
        return f"exp(log_a) > {_double(parameters['threshold'])}", "below threshold", "-log_a"
    if _log_a_sql(parameters) is not None:
        return "u < exp(log_a)", "u >= A", "u / exp(log_a)"
    if parameters["rule"] == "threshold":
        return f"score > {_double(parameters['threshold'])}", "below threshold", "-score"
    return "true", "", "-score"  # the selections are the rule


def set_aside(parameters: dict[str, Any]) -> int:
    """How many of each prompt's first draws serve only to estimate M and are never accepted."""
    return int(parameters["pilot"]) if parameters.get("M") == "estimate" else 0


def _judged_sql(parameters: dict[str, Any]) -> str:
    """SQL: whether a candidate has what the rule looks at."""
    return {"rejection": _HAS_RATIO, "loss": _HAS_LOSS}.get(parameters["rule"], _HAS_SCORE)


def _compared_sql(parameters: dict[str, Any]) -> str:
    """SQL: what the rule compares of a candidate; see `compared`."""
    match parameters:
        case {"rule": "rejection"}:
            return "target - log_q"
        case {"rule": "boltzmann", "r_max": r_max}:
            return f"score - {'prompt_r_max' if r_max is None else _double(r_max)}"
        case {"rule": "loss"}:
            return "CASE WHEN -log_p / tokens > 0 THEN ln(-log_p / tokens) ELSE '-infinity'::DOUBLE END"
    return "score"


def _log_a_sql(parameters: dict[str, Any]) -> str | None:
    """SQL: log A of the stochastic rules, at most 0; None for the others."""
    match parameters:
        case {"rule": "rejection", "log_M": log_M}:
            return f"least(0, {_compared_sql(parameters)} - {_double(log_M)})"
        case {"rule": "boltzmann", "beta": beta}:
            return f"least(0, ({_compared_sql(parameters)}) / {_double(beta)})"
        case {"rule": "loss", "k": k}:
            return f"least(0, {_compared_sql(parameters)} - ln({_double(k)}))"
    return None


def _prompt_r_max_sql(source: str, parameters: dict[str, Any]) -> str:
    """SQL of a join for boltzmann without r_max: the largest score of each prompt's candidates past the gates."""
    if parameters["rule"] != "boltzmann" or parameters["r_max"] is not None:
        return ""
    largest = f"SELECT prompt_id, max(score) AS prompt_r_max FROM {source} WHERE {_HAS_SCORE} AND passed GROUP BY ALL"
    return f"LEFT JOIN ({largest}) USING (prompt_id)"


def _selections(parameters: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(reason for those refused, how many are kept, within which group), in order."""
    duplicates = [("duplicate", 1, "prompt_id, same_text")] if parameters["distinct"] else []
    cap = [("cap", parameters["cap"], "prompt_id")] if parameters["cap"] is not None else []
    match parameters:
        case {"rule": "top_k", "k": k}:
            return [*duplicates, ("rank", k, "prompt_id"), *cap]
        case {"rule": "quantile", "cut": cut}:
            return [("rank", cut, "true"), *duplicates, *cap]
    return [*duplicates, *cap]


def _estimated(connection: duckdb.DuckDBPyConnection, source: str, rule: RejectionRule) -> dict[str, Any]:
    seen = f"draw < {rule.pilot} AND passed AND {_HAS_RATIO}"
    rows, others, pilot, largest = _row(
        connection,
        f"SELECT count(*), count(*) FILTER (draw >= {rule.pilot}), count(*) FILTER ({seen}),"
        f" max(target - log_q) FILTER ({seen}) FROM {source}",
    )
    if rows and not others:
        raise AcceptanceError(
            f"acceptance.pilot is {rule.pilot}, which is every draw: the pilot is set aside, so nothing is left to "
            "accept. Raise sampling.draws, lower acceptance.pilot, or give acceptance.M"
        )
    if rows and (largest is None or math.isinf(largest)):
        raise AcceptanceError(
            f"M cannot be estimated: no pilot draw (draw < {rule.pilot}) passed the gates and has both log q and a "
            f"log p above -inf under acceptance.target {rule.target!r}. Look at that scorer, or give acceptance.M"
        )
    return {"log_M": (largest or 0.0) + math.log(rule.safety), "pilot_candidates": pilot}


def _violations(connection: duckdb.DuckDBPyConnection, source: str, decided: str, log_M: float) -> dict[str, Any]:
    violations, needed = _row(
        connection,
        f"SELECT count(*) FILTER (target - log_q > {_double(log_M)}), max(target - log_q)"
        f" FROM {source} WHERE {_HAS_RATIO} AND passed AND {decided}",
    )
    return {"violations": violations, "log_M_needed": None if needed is None or math.isinf(needed) else needed}


def _row(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple:
    return connection.execute(sql).fetchone()


def _double(number: float) -> str:
    """The number as SQL, bit for bit: a bare literal would be read as a decimal."""
    return f"'{float(number)!r}'::DOUBLE"
