"""Decide: which of a round's candidates are accepted.

Belongs here: a round's candidates with their scores, the decisions on them, written or only counted, and the numbers
that describe the decisions. Not: the rules (acceptance.py) and formulas (efficiency.py), nor which of the accepted a
checkpoint is trained on (rows.py).
"""

import json

import duckdb

from rsft_pipeline import acceptance, efficiency, revocations, rounds
from rsft_pipeline.efficiency import Efficiency
from rsft_pipeline.recipe.acceptance import RejectionRule
from rsft_pipeline.rounds import Round, RoundError
from rsft_pipeline.steps.rows import COMBINED, ROUND_CANDIDATES, of_round
from rsft_pipeline.steps.score import check_not_revoked, versions
from rsft_pipeline.store import Store


def scored(store: Store, round_: Round) -> str:
    """SQL of a round's candidates with their scores: the columns that acceptance.decisions_sql reads.

    The texts are left out, because millions of them would fill the disk. If only distinct texts count, their hashes
    are included, computed before any join: otherwise the texts would be kept for the join.
    """
    recipe, version_of = round_.recipe, versions(store, round_)
    same_text = acceptance.same_text("text") if recipe.acceptance.distinct else "NULL"
    target, joined = "c.log_p", ""
    if isinstance(recipe.acceptance, RejectionRule) and recipe.acceptance.target != "policy":
        target = "t.value"
        joined = f"""LEFT JOIN scores t
            ON t.candidate_id = c.candidate_id AND t.recipe = $recipe AND t.content = p.content
            AND t.scorer = '{recipe.acceptance.target}' AND t.version = '{version_of[recipe.acceptance.target]}'"""
    return f"""
        SELECT c.candidate_id, c.prompt_id, c.draw, c.same_text, c.tokens, c.log_q, c.log_p,
               s.value AS score, s.passed, {target} AS target
        FROM (SELECT *, {same_text} AS same_text FROM ({ROUND_CANDIDATES})) c
        JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
        LEFT JOIN scores s ON s.candidate_id = c.candidate_id AND s.recipe = $recipe AND s.content = p.content
            AND s.scorer = '{COMBINED}' AND s.version = '{version_of[COMBINED]}'
        {joined}"""


def decide(store: Store, round_: Round, run_id: str) -> dict:
    """Decide on each of the round's candidates, replacing earlier decisions. Returns the rule's parameters.

    Raises:
        RoundError: weights or a scorer were revoked, or candidates have no score by the present scorers.
    """
    check_not_revoked(store, round_)
    recipe, version_of = round_.recipe, versions(store, round_)

    def work(connection):
        parameters, decisions = _decisions(connection, round_)
        connection.execute("DELETE FROM decisions WHERE recipe = ? AND round = ?", [recipe.name, round_.key])
        connection.execute(
            f"""INSERT INTO decisions BY NAME
                SELECT ? AS recipe, ? AS round, *, ? AS parameters, ? AS dagster_run_id FROM ({decisions})""",
            [recipe.name, round_.key, json.dumps(parameters), run_id],
        )
        connection.execute(
            "UPDATE rounds SET scorers = ? WHERE recipe = ? AND round = ?",
            [json.dumps(version_of), recipe.name, round_.key],
        )
        return parameters

    with store.connection() as connection:
        _read(connection, round_, scored(store, round_), recipe.sampling.most_draws)
        return store.commit(work, connection)


def accepted_so_far(store: Store, round_: Round, draws: int) -> dict[str, int]:
    """How many of each prompt's first `draws` would be accepted if only these were decided on. Writes nothing."""
    with store.connection() as connection:
        _read(connection, round_, scored(store, round_), draws)
        _, decisions = _decisions(connection, round_)
        counted = connection.execute(f"SELECT prompt_id, count(*) FROM ({decisions}) WHERE accepted GROUP BY ALL")
        return dict(counted.fetchall())


def _read(connection: duckdb.DuckDBPyConnection, round_: Round, candidates: str, draws: int) -> None:
    """Make the temporary table `scored` of the first `draws` of each of the round's prompts."""
    connection.execute(f"CREATE TEMP TABLE scored AS {candidates}", {**of_round(round_), "draws": draws})
    if twice := _repeated(connection, "hash(candidate_id)") and _repeated(connection, "candidate_id"):
        raise RoundError(
            f"{round_.recipe.name} {round_.key}: {twice} candidates are in the store twice; nothing was decided"
        )


def _repeated(connection: duckdb.DuckDBPyConnection, expression: str) -> int:
    """How many rows of `scored` repeat an id, or its hash: that takes less memory, and if none repeats no id does."""
    (number,) = connection.execute(f"SELECT count(*) - count(DISTINCT {expression}) FROM scored").fetchone()
    return number


def _decisions(connection: duckdb.DuckDBPyConnection, round_: Round) -> tuple[dict, str]:
    """The rule's parameters, and a SELECT of the decisions on the temporary table `scored`.

    Revocations are looked up here, in the transaction that writes the decisions.
    """
    recipe = round_.recipe
    revoked = revocations.set_aside(connection, "scored", recipe.name, recipe.seed)
    (unscored,) = connection.execute("SELECT count(*) FROM scored WHERE passed IS NULL").fetchone()
    if unscored:
        raise RoundError(
            f"{recipe.name} {round_.key}: {unscored} candidates have no score by the present scorers and "
            "references, which have changed since: materialise `scores` again"
        )
    parameters = acceptance.parameters(connection, "scored", recipe.acceptance, rounds.number(round_.key))
    return parameters, f"({acceptance.decisions_sql('scored', parameters, recipe.seed)}) UNION ALL BY NAME ({revoked})"


# --- the decisions in numbers ------------------------------------------------------------------


def efficiency_of(store: Store, round_: Round, column: str | None = None) -> Efficiency:
    """A round's stored decisions in numbers.

    Args:
        column: one of the prompts' fields; if given, `groups` has one entry for each of its values.
    """
    of = {"recipe": round_.recipe.name, "round": round_.key}
    stored = store.query("SELECT parameters FROM decisions WHERE recipe = $recipe AND round = $round LIMIT 1", of)
    rule = round_.recipe.acceptance
    parameters = json.loads(stored[0]["parameters"]) if stored else rule.model_dump(mode="json")
    sql = _decided(store, round_, column)
    values = of_round(round_) | ({"column": _pointer(column)} if column else {})

    with store.connection() as connection:  # all numbers come from the same rows, read once
        connection.execute(f"CREATE TEMP TABLE decided AS {sql}", values)
        groups = efficiency.coverage(connection, "decided", rule) if column else []
        return efficiency.measure(connection, "decided", parameters, groups)


def _decided(store: Store, round_: Round, column: str | None = None) -> str:
    """SQL of a round's candidates with scores, decisions and, with a column, the group of their prompt.

    Revoked candidates, which the rule never saw, are left out.

    Takes the parameters of ROUND_CANDIDATES and, with a column, `column`: a JSON pointer.
    """
    grouped = "NULL::VARCHAR" if column is None else "json_extract_string(p.fields, $column)"
    return f"""
        SELECT s.* EXCLUDE (same_text), d.accepted, d.reason, d.log_a, d.weight, {grouped} AS grouped
        FROM ({scored(store, round_)}) s
        JOIN decisions d ON d.candidate_id = s.candidate_id AND d.recipe = $recipe AND d.round = $round
        JOIN prompts p ON p.prompt_id = s.prompt_id AND p.recipe = $recipe
        WHERE d.reason <> '{revocations.REASON}'"""


def _pointer(column: str) -> str:
    """A column's JSON pointer (RFC 6901): its name may have any characters, `$` and `/` too."""
    return "/" + column.replace("~", "~0").replace("/", "~1")
