"""Recorded: a round's candidates with the stored scores that they were decided by.

Belongs here: which versions of its scorers a round used, and its rows in the form that acceptance.decisions_sql reads.
decide.scored gives the same for a round in progress, by the present scorers. Not: what is then asked of the rows
(replay.py, whatif.py, diff.py).
"""

import json
from typing import Any

import duckdb

from rsft_pipeline.acceptance import same_text
from rsft_pipeline.audit.ids import AuditError
from rsft_pipeline.recipe.acceptance import RejectionRule
from rsft_pipeline.rounds import Round
from rsft_pipeline.steps.rows import COMBINED, ROUND_CANDIDATES, of_round

# What replay and what-if read.
TABLES = ("rounds", "candidates", "prompts", "scores", "decisions", "round_prompts", "evaluations", "revocations")
DECISIONS = "SELECT * FROM decisions WHERE recipe = $recipe AND round = $round"


def versions(connection: duckdb.DuckDBPyConnection, round_: Round, *, held_out: bool = False) -> dict[str, str]:
    """The version of each scorer behind the round's decisions, including `combined`; empty if nothing was decided.

    Args:
        held_out: those behind its verdict instead, which comes later: a scorer may have changed in between.
    """
    named = "coalesce(evaluation_scorers, scorers)" if held_out else "scorers"
    rows = connection.execute(
        f"SELECT {named} FROM rounds WHERE recipe = ? AND round = ?", [round_.recipe.name, round_.key]
    ).fetchall()
    try:
        return dict(json.loads(rows[0][0] or "{}")) if rows else {}
    except (TypeError, ValueError):
        who = f"{round_.recipe.name} {round_.key}"
        raise AuditError(
            f"{who}: the versions of its scorers in `rounds` cannot be read: {rows[0][0]!r:.200}"
        ) from None


def load(connection: duckdb.DuckDBPyConnection, round_: Round, version_of: dict[str, str]) -> list[str]:
    """Make the temporary table `recorded`, one row for each of the round's candidates.

    Columns: those that acceptance.decisions_sql reads, and text, policy, settings, seed, content (of the prompt as
    it was judged; NULL where nothing was) and now (its content now; NULL where there is no such prompt).

    Returns:
        The ids that are in the store more than once, which should not happen.
    """
    rule = round_.recipe.acceptance
    # What an erased text was equal to is unknown: it counts as distinct.
    hashed = same_text("coalesce(c.text, c.candidate_id)") if rule.distinct else "NULL"
    target, joined = "c.log_p", ""
    if isinstance(rule, RejectionRule) and rule.target != "policy":
        target = "t.value"
        joined = """LEFT JOIN scores t ON t.candidate_id = c.candidate_id AND t.recipe = $recipe
            AND t.scorer = $target AND t.version = $target_version AND t.content = s.content"""
    sql = f"""
        CREATE TEMP TABLE recorded AS
        SELECT c.candidate_id, c.prompt_id, c.draw, c.text, {hashed} AS same_text, c.tokens,
            c.log_q, c.log_p, s.value AS score, s.passed, {target} AS target, c.policy, c.settings, c.seed, s.content,
            p.content AS now
        FROM ({ROUND_CANDIDATES}) c
        LEFT JOIN scores s ON s.candidate_id = c.candidate_id AND s.recipe = $recipe AND s.round = $round
            AND s.scorer = $combined AND s.version = $version
        LEFT JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
        {joined}"""
    given: dict[str, Any] = {
        **of_round(round_),
        "combined": COMBINED,
        "version": version_of.get(COMBINED),
    }
    if joined:
        given |= {"target": rule.target, "target_version": version_of.get(rule.target)}
    connection.execute(sql, given)
    repeated = "SELECT candidate_id FROM recorded GROUP BY candidate_id HAVING count(*) > 1"
    twice = connection.execute(repeated).fetchall()
    if twice:
        # Judged twice, because the reference changed before the round ended: the later judgement decided.
        connection.execute(
            """DELETE FROM recorded WHERE content <> now AND candidate_id IN (
                SELECT candidate_id FROM recorded GROUP BY ALL HAVING bool_or(content = now))"""
        )
        twice = connection.execute(repeated).fetchall()
    return [candidate for (candidate,) in twice]
