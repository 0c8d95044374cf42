"""Replay: whether a round's decisions follow from the rows in the store that they were made from.

Belongs here: computing again, from stored rows, whatever can be: ids and seeds, the rule's parameters, every decision,
combined scores, what the scorers give, the texts that the tokens decode to, and log-probabilities under the stored
weights; and naming what comes out differently. Not: the verdict of the gate (held_out.py), nor whether the rows are
those that were trained on (verify.py).

The rows are read as they are now, at one snapshot; the recipe is the one that the round recorded. Nothing is
written.
"""

import json
import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import duckdb

from rsft_pipeline import acceptance, models, prompts, rounds, scoring, tasks
from rsft_pipeline.audit import held_out, ids, recorded, row_checks
from rsft_pipeline.audit.findings import Check, Finding, Notes, named, read
from rsft_pipeline.audit.reading import as_of, column
from rsft_pipeline.devices import Device, release
from rsft_pipeline.home import Home
from rsft_pipeline.models import configuration
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.revocations import REASON
from rsft_pipeline.rounds import Round, RoundError
from rsft_pipeline.steps.rows import ROUND_CANDIDATES, of_round, of_scorers
from rsft_pipeline.store import Store
from rsft_pipeline.training import Sample

FORCED = 64  # candidates whose log-probabilities are computed again, by teacher forcing
JUDGED = 20_000  # candidates whose texts are read and judged again
TOLERANCE = 1e-3  # nats per token; float32 results in batches of other shapes differ by 1e-5; see docs/audit.md


@dataclass(frozen=True)
class Replay:
    """The result of replaying a round."""

    recipe: str
    round: str
    policy: str  # digest of the weights that candidates were drawn from
    decisions: int
    replayed: int  # how many of them came out the same in every column, bit for bit
    parameters: dict[str, Any]  # of the rule, as recorded
    checks: list[Check]
    findings: list[Finding]
    ok: bool  # nothing came out differently; a check that could not be made is not a difference
    seconds: float


def replay(
    store: Store,
    recipe: Recipe,
    round_key: str,
    home: Home,
    lease: AbstractContextManager[Device],
    *,
    forced: int = FORCED,
    judged: int = JUDGED,
    tolerance: float = TOLERANCE,
) -> Replay:
    """Compute a round's decisions again, and what they are based on.

    Args:
        recipe: as its file is now; the round's own settings come from its record.
        lease: gives the device for models, for the length of a `with`; stored rows are read without it.
        forced: how many candidates to teacher-force, chosen by id, which is a hash; 0 for none.
        judged: how many candidates to decode and judge again, chosen in the same way.
        tolerance: nats per token by which a log-probability may differ.

    Raises:
        AuditError: there is no such round.
        RoundError: it ran with settings that are now refused.
    """
    began = time.perf_counter()
    ids.check_round(store, recipe.name, round_key)
    round_ = rounds.record(store, recipe, round_key)
    note = Notes()

    def work(connection: duckdb.DuckDBPyConnection, note: Notes) -> Stored:
        with as_of(connection, recorded.TABLES):
            return _stored(connection, round_, judged, note)

    stored = read(store, recorded.TABLES, note, work) or Stored(
        {"decisions": 0, "replayed": 0, "parameters": {}}, [], [], {}, {}
    )
    with lease as device:
        for rows, source, judged_by, of in (
            (stored.rows, round_.recipe.sampling.source, stored.version_of, ""),
            (stored.held_out, "policy", stored.evaluated_by, held_out.OF),
        ):
            if rows := row_checks.readable(rows, note, of):
                row_checks.draws(rows, source, note, of)
                row_checks.prompts(rows, note, of)
                row_checks.scorers(store, round_, rows, judged_by, device, forced, tolerance, note, of)
        _weights(store, round_, home, device, stored, forced, tolerance, note)
    return Replay(
        recipe.name,
        round_key,
        round_.drawn_from,
        checks=note.checks,
        findings=note.findings,
        ok=not note.findings,
        seconds=time.perf_counter() - began,
        **stored.facts,
    )


# --- in SQL, all rows -------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """What was found in the stored rows."""

    facts: dict[str, Any]
    rows: list[dict]  # to look at more closely: training candidates
    held_out: list[dict]  # the same: held-out candidates
    version_of: dict[str, str]  # of the scorers behind the decisions
    evaluated_by: dict[str, str]  # of the scorers behind the verdict


def _stored(connection: duckdb.DuckDBPyConnection, round_: Round, judged: int, note: Notes) -> Stored:
    """The checks that need only the stored rows."""
    version_of = recorded.versions(connection, round_)
    twice = recorded.load(connection, round_, version_of)
    (candidates,) = connection.execute("SELECT count(*) FROM recorded").fetchone()
    what = "candidates are in the store more than once"
    note(Check("candidates, each there once", candidates, len(twice)), named("data", what, twice))
    row_checks.ids(connection, "recorded", round_.recipe, round_.key, note)
    facts = _decisions(connection, round_, note)
    _combined(connection, round_, version_of, note)
    some = "SELECT candidate_id, content, now FROM recorded ORDER BY candidate_id LIMIT ?"
    connection.execute(f"CREATE TEMP TABLE looked_at AS {some}", [judged])
    of_this = "SELECT * FROM scores WHERE recipe = $recipe AND round = $round"
    sql = row_checks.rows_sql("looked_at", ROUND_CANDIDATES, of_this)
    asked = {**of_round(round_), "scorers": of_scorers(version_of)}
    rows = connection.execute(sql, asked).to_arrow_table().to_pylist()
    evaluated_by = recorded.versions(connection, round_, held_out=True)
    held_out_rows = held_out.check(connection, round_, evaluated_by, judged, note)
    return Stored(facts, rows, held_out_rows, version_of, evaluated_by)


def _decisions(connection: duckdb.DuckDBPyConnection, round_: Round, note: Notes) -> dict[str, Any]:
    """Check the rule's parameters and, with the recorded ones, every decision."""
    of = {"recipe": round_.recipe.name, "round": round_.key}
    counted = f"SELECT count(*), count(*) FILTER (reason = '{REASON}') FROM ({recorded.DECISIONS})"
    decided, revoked = connection.execute(counted, of).fetchone()
    facts = {"decisions": decided, "replayed": 0, "parameters": {}}
    often = f"SELECT parameters FROM ({recorded.DECISIONS}) GROUP BY ALL ORDER BY count(*) DESC, parameters"
    there = column(connection, often, of)
    if not there:
        note(Check("decisions replayed", 0, None, "nothing was decided in this round"))
        return facts
    if len(there) > 1:
        what = f"the decisions were made by {len(there)} different rules, of which the most frequent is replayed"
        note(Check("one rule for the round", len(there), len(there) - 1), Finding("rule", what, len(there)))
    try:
        rule = json.loads(there[0])
        again = acceptance.decisions_sql("recorded", rule, round_.recipe.seed)
    except (AttributeError, KeyError, TypeError, ValueError):
        what = f"the rule that was recorded with the decisions cannot be read: {there[0]!r:.200}"
        note(Check("decisions replayed", decided, None, "the recorded rule is none"), Finding("rule", what, decided))
        return facts
    facts["parameters"] = rule
    if revoked:  # the rule never saw them
        aside = f"SELECT candidate_id FROM ({recorded.DECISIONS}) WHERE reason = '{REASON}'"
        connection.execute(f"DELETE FROM recorded WHERE candidate_id IN ({aside})", of)
    _parameters(connection, round_, rule, note)

    unsure = _unsure(connection, rule)
    different = connection.execute(
        f"""SELECT coalesce(d.candidate_id, r.candidate_id) AS candidate_id, {_DIFFERENCE} AS difference
            FROM ({again}) r FULL JOIN ({recorded.DECISIONS}) d ON d.candidate_id = r.candidate_id
            WHERE difference IS NOT NULL""",
        of,
    ).fetchall()
    found = []
    for difference in sorted({why for _, why in different}):
        kind = "rule" if difference == _BY_RULE else "data"
        found.append(named(kind, difference, (candidate for candidate, why in different if why == difference)))
    facts["replayed"] = decided - sum(why != _UNDECIDED for _, why in different)
    said = []
    if revoked:
        said.append(f"{revoked} had been revoked: the rule saw nothing of them")
    if unsure:
        said.append(f"of {unsure} only scores and chances: erased texts are among theirs, or were their duplicates")
    note(Check("decisions replayed, to the bit", decided, len(different), "; ".join(said)), *found)
    return facts


def _unsure(connection: duckdb.DuckDBPyConnection, rule: dict[str, Any]) -> int:
    """Make the temporary table `unsure` of the candidates whose decision may depend on erased texts, possibly their
    duplicates: all candidates of such a prompt. Returns how many."""
    erased = "SELECT prompt_id FROM recorded WHERE text IS NULL" if rule.get("distinct") else "SELECT NULL WHERE false"
    touched = f"SELECT candidate_id FROM recorded WHERE prompt_id IN ({erased})"
    connection.execute(f"CREATE OR REPLACE TEMP TABLE unsure AS {touched}")
    return connection.execute("SELECT count(*) FROM unsure").fetchone()[0]


def _differ(names: tuple[str, ...]) -> str:
    return " OR ".join(f"d.{name} IS DISTINCT FROM r.{name}" for name in names)


_UNDECIDED = "candidates without a decision"
_BY_RULE = "decisions that do not follow from scores, rule and u (or only from a score that was changed)"
_COLUMNS = ("prompt_id", "log_a", "weight")
_PLACE = ("accepted", "reason")
_DIFFERENCE = f"""CASE
    WHEN r.candidate_id IS NULL AND d.reason = '{REASON}' AND NOT d.accepted THEN NULL
    WHEN d.candidate_id IS NULL THEN '{_UNDECIDED}'
    WHEN r.candidate_id IS NULL THEN 'decisions without a candidate of the round'
    WHEN d.score IS DISTINCT FROM r.score THEN 'scores that are not those decided by: `scores` and `decisions` differ'
    WHEN d.u IS DISTINCT FROM r.u THEN 'a stored u that does not follow from the candidate''s id'
    WHEN {_differ(_COLUMNS)} THEN '{_BY_RULE}'
    WHEN ({_differ(_PLACE)}) AND r.candidate_id NOT IN (FROM unsure) THEN '{_BY_RULE}'
    END"""


def _parameters(connection: duckdb.DuckDBPyConnection, round_: Round, there: dict[str, Any], note: Notes) -> None:
    """Check parameters: estimated ones are estimated again, the rule's are compared with the recorded recipe."""
    try:
        again = acceptance.parameters(connection, "recorded", round_.recipe.acceptance, rounds.number(round_.key))
    except ValueError as error:
        what = f"the rule's numbers cannot be computed again: {error}"
        note(Check("the rule's numbers", len(there), 1), Finding("rule", what, 1))
        return
    again = json.loads(json.dumps(again))
    said, compared = "", there
    if again.get("M") == "estimate" and "pilot_candidates" not in there:
        said = "M was estimated when the whole pilot was looked at, whatever its gates: not compared"
        compared = {name: there[name] for name in there.keys() - {"log_M", "log_M_needed", "violations"}}
    wrong = {name: (value, again.get(name)) for name, value in compared.items() if again.get(name) != value}
    differences = "; ".join(f"{name} was {was!r}, is {now!r}" for name, (was, now) in wrong.items())
    what = f"the rule's numbers come out different: {differences}"
    note(Check("the rule's numbers", len(compared), len(wrong), said), Finding("rule", what, len(wrong)))


def _combined(connection: duckdb.DuckDBPyConnection, round_: Round, version_of: dict[str, str], note: Notes) -> None:
    """Check the combined scores against the single ones.

    SQL cannot add like math.fsum, so it selects the distinct combinations of scores, and Python combines these.
    """
    labels = [config.label for config in round_.recipe.scoring.scorers]
    name = "combined scores, from single ones"
    if missing := [label for label in labels if label not in version_of]:
        note(Check(name, 0, None, f"no score of {missing[0]} is stored"))
        return
    columns = ", ".join(f"s{i}.value AS v{i}, s{i}.candidate_id IS NULL AS m{i}" for i in range(len(labels)))
    joins = "\n".join(
        f"""LEFT JOIN scores s{i} ON s{i}.candidate_id = r.candidate_id AND s{i}.content = r.content
            AND s{i}.recipe = $recipe AND s{i}.round = $round AND s{i}.scorer = $scorer{i}
            AND s{i}.version = $version{i}"""
        for i in range(len(labels))
    )
    given = {f"scorer{i}": label for i, label in enumerate(labels)}
    given |= {f"version{i}": version_of[label] for i, label in enumerate(labels)}
    of = {"recipe": round_.recipe.name, "round": round_.key}
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE single AS SELECT r.candidate_id, r.score, r.passed, {columns} "
        f"FROM recorded r {joins} WHERE r.content IS NOT NULL",
        {**given, **of},
    )
    (compared,) = connection.execute("SELECT count(*) FROM single").fetchone()
    lacking = " OR ".join(f"m{i}" for i in range(len(labels)))
    gone = column(connection, f"SELECT candidate_id FROM single WHERE {lacking}")
    values = ", ".join(f"v{i}" for i in range(len(labels)))
    kinds = connection.execute(
        f"SELECT any_value(candidate_id), score, passed, {values} FROM single WHERE NOT ({lacking}) "
        f"GROUP BY score, passed, {values}"
    ).fetchall()
    columns = {label: [row[3 + i] for row in kinds] for i, label in enumerate(labels)}
    combined = zip(*scoring.combine(round_.recipe.scoring, columns), strict=True)
    wrong = [row for row, again in zip(kinds, combined, strict=True) if row[1:3] != again]
    concerned: list[str] = []
    for row in wrong:
        same = " AND ".join(f"{column} IS NOT DISTINCT FROM ?" for column in ("score", "passed", *values.split(", ")))
        concerned += column(connection, f"SELECT candidate_id FROM single WHERE {same}", list(row[1:]))
    connection.execute("DROP TABLE single")
    found = [named("data", "single scores are missing of these, though they have a combined one", gone)] if gone else []
    if concerned:
        what = "combined scores that are not what the stored scores of the single scorers combine to"
        found.append(named("data", what, concerned))
    note(Check(name, compared, len(gone) + len(concerned)), *found)


# --- the weights ------------------------------------------------------------------------------


def _weights(
    store: Store,
    round_: Round,
    home: Home,
    device: Device,
    stored: Stored,
    forced: int,
    tolerance: float,
    note: Notes,
) -> None:
    """Check the weights' own hash, the texts that the stored tokens decode to, and some log-probabilities."""
    try:
        weights = rounds.drawing_weights(store, round_, home)
    except (RoundError, models.ModelError) as error:
        note(Check("weights", 1, 1), Finding("weights", str(error), 1))
        return
    note(Check("weights, hashed again", 1, 0, str(weights.path)))
    recipe, tokenizer = round_.recipe, models.tokenizer(weights.path)
    # A classifier's single token is a label.
    there = len(recipe.model.labels) if recipe.task == "classification" else configuration.vocabulary(weights.path)
    rows = row_checks.known(there, stored.rows, note)
    of_held_out = row_checks.known(there, stored.held_out, note, held_out.OF)
    if recipe.task != "classification":
        if rows and recipe.sampling.source != "reference":
            row_checks.texts(tokenizer, rows, note)
        if of_held_out and recipe.sampling.source != "teacher":  # else this tokenizer is the teacher's
            row_checks.texts(tokenizer, of_held_out, note, held_out.OF)
    if some := [row for row in rows if row["token_ids"]][:forced]:
        _forced(weights.path, tokenizer, round_, device, some, tolerance, note)


def _forced(path, tokenizer, round_: Round, device: Device, rows: list[dict], tolerance: float, note: Notes) -> None:
    """Check log p of drawn tokens by teacher forcing; log q must equal it at temperature 1 without truncation."""
    task, how = tasks.of(round_.recipe), round_.recipe.sampling
    samples = [
        Sample(
            row["candidate_id"],
            prompts.encode(tokenizer, row["prompt"], row["chat"], round_.recipe.task),
            row["token_ids"],
        )
        for row in rows
    ]
    model = models.load(path, device, task=round_.recipe.task)
    found = task.log_probabilities(model, samples, tokenizer.pad_token_id)
    del model
    release(device.kind)
    stored = ["log_p"]
    if how.source != "reference" and (how.temperature, how.top_p, how.top_k) == (1.0, 1.0, None):
        stored.append("log_q")
    for name in stored:
        apart = [
            math.inf if row[name] is None else abs(row[name] - again) / max(1, len(row["token_ids"]))
            for row, again in zip(rows, found, strict=True)
        ]
        wrong = [row["candidate_id"] for row, far in zip(rows, apart, strict=True) if not far <= tolerance]
        what = f"{name} differs by more than {tolerance:g} nats per token from what the stored weights give"
        said = f"largest difference {max(apart, default=0):.2g} nats per token, {tolerance:g} allowed"
        note(Check(f"{name}, by teacher forcing", len(rows), len(wrong), said), named("weights", what, wrong))
