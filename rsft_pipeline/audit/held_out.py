"""Held out: whether a round's verdict follows from the held-out answers of the weights that it compared.

Belongs here: the results of each held-out prompt from stored candidates and scores, and the verdict from these
results. Not: candidates to train on (replay.py).
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, replace

import duckdb

from rsft_pipeline import lineage
from rsft_pipeline.audit import row_checks
from rsft_pipeline.audit.findings import Check, Finding, Notes, named
from rsft_pipeline.audit.reading import on
from rsft_pipeline.evaluation import PromptResult, compare, promoted, summarise
from rsft_pipeline.rounds import Round
from rsft_pipeline.sampling import EVALUATION
from rsft_pipeline.steps.evaluate import counts, finite, recorded_results, results
from rsft_pipeline.steps.rows import (
    COMBINED,
    EVALUATION_CANDIDATES,
    ROUND_CANDIDATES,
    of_evaluation,
    of_round,
    of_scorers,
)
from rsft_pipeline.store import Query

OF = " of held-out candidates"  # in the names of checks, to distinguish them from those of training candidates


def check(
    connection: duckdb.DuckDBPyConnection, round_: Round, version_of: dict[str, str], judged: int, note: Notes
) -> list[dict]:
    """Compute results and verdict again. Returns up to `judged` rows to look at more closely."""
    query = on(connection)
    of = {"recipe": round_.recipe.name, "round": round_.key}
    asked = query("SELECT DISTINCT role, checkpoint FROM evaluations WHERE recipe = $recipe AND round = $round", of)
    if not asked:
        note(Check("held-out results, counted again", 0, None, "no result is stored: this round was not evaluated"))
        _verdict(query, round_, {}, of, note)
        return []
    scorers = {"scorers": of_scorers(version_of), "combined": COMBINED}
    for i, weights in enumerate(sorted({row["checkpoint"] for row in asked})):
        given = {**of_evaluation(round_, weights), **scorers, "version": version_of.get(COMBINED)}
        query(f"{'INSERT INTO held_out' if i else 'CREATE TEMP TABLE held_out AS'} {_CANDIDATES}", given)
    row_checks.ids(connection, "held_out", round_.recipe, EVALUATION, note, OF)
    some = "SELECT candidate_id, content, now FROM held_out ORDER BY candidate_id LIMIT $judged"
    query(f"CREATE OR REPLACE TEMP TABLE looked_at AS {some}", {"judged": judged})
    rows = query(row_checks.rows_sql("looked_at", "SELECT * FROM candidates WHERE recipe = $recipe"), {**of, **scorers})
    unsure = {row["prompt_id"] for row in query(_UNSURE)}
    roles = {row["role"]: row["checkpoint"] for row in asked}
    _results(query, round_, roles, version_of, unsure, note)
    _verdict(query, round_, roles, of, note)
    return rows


# A candidate is judged once for each content that its prompt has had; take that of its present content if there is one.
_CANDIDATES = f"""
    SELECT c.candidate_id, c.prompt_id, c.draw, c.policy, c.settings, c.seed, c.text,
        coalesce(max(s.content) FILTER (s.content = p.content), max(s.content)) AS content, p.content AS now,
        count(DISTINCT s.content) AS contents
    FROM ({EVALUATION_CANDIDATES}) c
    JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
    LEFT JOIN scores s ON s.candidate_id = c.candidate_id AND s.recipe = $recipe AND s.scorer = $combined
        AND s.version = $version
    GROUP BY c.candidate_id, c.prompt_id, c.draw, c.policy, c.settings, c.seed, c.text, p.content
"""
# Prompts whose content changed after they were judged, or whose candidates' texts were erased.
_UNSURE = "SELECT DISTINCT prompt_id FROM held_out WHERE text IS NULL OR content <> now OR contents > 1"


def _results(
    query: Query, round_: Round, roles: dict[str, str], version_of: dict[str, str], unsure: set[str], note: Notes
) -> None:
    """Check the result of each prompt, for all weights compared, against its candidates and their scores."""
    name = "held-out results, counted again"
    if COMBINED not in version_of:
        note(Check(name, 0, None, "by which scorers they were judged is not recorded"))
        return
    compared, wrong = 0, set()
    for role, weights in roles.items():
        was = _by_prompt(recorded_results(query, round_.recipe.name, round_.key, role))
        now = _by_prompt(results(query, round_, weights, version_of[COMBINED]))
        for prompt in (was.keys() | now.keys()) - unsure:
            compared += 1
            if not _same(was.get(prompt), now.get(prompt)):
                wrong.add(prompt)
    what = "held-out prompts (by prompt id) whose recorded results are not those of their stored candidates and scores"
    said = f"{len(unsure)} prompts have changed or were erased since" if unsure else ""
    note(Check(name, compared, len(wrong), said), named("data", what, wrong))


def _by_prompt(found: Iterable[PromptResult]) -> dict[str, PromptResult]:
    return {result.prompt_id: result for result in found}


def _same(was: PromptResult | None, now: PromptResult | None) -> bool:
    """Whether two results are the same; means may differ by rounding, from adding in another order."""
    if was is None or now is None:
        return was is now
    if was.eligible is None:  # a result from before `eligible` was recorded
        now = replace(now, eligible=None)
    return all(
        math.isclose(one, other, rel_tol=1e-12) if isinstance(one, float) and isinstance(other, float) else one == other
        for one, other in zip(asdict(was).values(), asdict(now).values(), strict=True)
    )


def _verdict(query: Query, round_: Round, roles: dict[str, str], of: dict[str, str], note: Notes) -> None:
    """Check the gate's verdict, and then the outcome in the round's record, against recorded results and decisions."""
    (row,) = query("SELECT * FROM rounds WHERE recipe = $recipe AND round = $round", of)
    name = "the verdict of the gate"
    recipe, how = round_.recipe, round_.recipe.evaluation
    if row["verdict"] is None:
        note(Check(name, 0, None, "the round is not finished"))
        return
    found = {role: recorded_results(query, recipe.name, round_.key, role) for role in roles}
    try:
        comparison = compare(
            found["champion"], found["checkpoint"], recipe.promotion.metric, k=how.k, confidence=how.confidence
        )
        again = promoted(comparison, recipe.promotion)
        summaries = {
            role: finite(asdict(summarise(found[role], k=how.k, confidence=how.confidence)))
            for role in ("policy", "checkpoint", "champion")
        }
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:  # a role's are missing or not numbers
        what = f"the recorded results give no verdict ({error!r}), and the round has «{row['verdict']}»"
        note(Check(name, 1, 1), Finding("data", what, 1))
        return
    wrong = again != (row["promoted"], row["verdict"])
    what = f"the recorded results give the verdict «{again[1]}», not «{row['verdict']}»"
    note(Check(name, 1, int(wrong)), Finding("rule", what, 1))
    _outcome(query, round_, roles, row, summaries, note)


def _outcome(
    query: Query, round_: Round, roles: dict[str, str], row: dict, summaries: dict[str, dict], note: Notes
) -> None:
    """Check what else the round's record says it came to."""
    left = "checkpoint" if row["promoted"] else "champion"
    drawn = counts(query, round_)
    outcome = {
        "checkpoint": roles["checkpoint"],
        "champion": roles[left],
        "policy_eval": summaries["policy"],
        "checkpoint_eval": summaries["checkpoint"],
        "champion_eval": summaries[left],
        **{name: drawn[name] for name in ("candidates", "tokens", "accepted")},
        "recipe_digest": lineage.digest(json.loads(row["settings"])),
    }
    erased = f"SELECT candidate_id FROM ({ROUND_CANDIDATES}) WHERE text IS NULL LIMIT 1"
    if not query(erased, of_round(round_)):
        outcome["distinct_accepted"] = drawn["distinct_accepted"]
    recorded = {column: value for column, value in outcome.items() if row[column] is not None}
    different = [column for column, value in recorded.items() if not _recorded(row[column], value)]
    what = f"the table `rounds` has another {', '.join(different)} than its settings, decisions and results give"
    note(Check("what the round came to", len(recorded), len(different)), Finding("data", what, len(different)))


def _recorded(was, now) -> bool:
    """Whether a column has this value: the same text or number or, for a summary, every field that it recorded."""
    if not isinstance(now, dict):
        return was == now
    try:
        return _alike(json.loads(was), now)
    except (TypeError, ValueError):
        return False


def _alike(was, now) -> bool:
    match was, now:
        case dict(), dict():
            return bool(was) and all(name in now and _alike(value, now[name]) for name, value in was.items())
        case float(), float():
            return math.isclose(was, now, rel_tol=1e-12)
    return was == now
