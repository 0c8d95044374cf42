"""Training set: whether the rows that a checkpoint was trained on are still what they were.

Belongs here: comparing, row by row and as one Merkle root (merkle.py), the three forms in which the store has a
training set:

- the **recorded** leaves, in `training_samples`, one per row;
- the rows at the **snapshot** that the checkpoint was trained from;
- the **present** rows.

The snapshot may be forgotten, and the present rows may be those of a later training; what is left is compared.
Not: the checkpoint's weights and records (verify.py), nor whether these rows should have been accepted (replay.py).
"""

import json
from collections.abc import Mapping
from typing import Any

import duckdb

from rsft_pipeline import merkle
from rsft_pipeline.audit.findings import Check, Finding, Notes, named
from rsft_pipeline.audit.reading import as_of, column
from rsft_pipeline.lineage import set_digest
from rsft_pipeline.recipe.acceptance import Rule
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.training import Training
from rsft_pipeline.revocations import ALLOWED, ANY, NAMED, REASON
from rsft_pipeline.steps.rows import training_rows
from rsft_pipeline.store import NEWEST_SNAPSHOT

SOURCES = ("rounds", "decisions", "candidates", "prompts", "revocations")  # from which a training set is read
TABLES = (*SOURCES, "training_samples")

_LEAF_BY_LEAF = "rows {}, leaf by leaf and by the root"
_PRESENT = "rows of now, against those at the snapshot"
# By what present rows are compared with those at the snapshot. For the latter the leaf, a SHA-256, is compared too.
_ROW = "hash(candidate_id, round, weight, score, token_ids, prompt, chat, text, split)"


def compare(
    connection: duckdb.DuckDBPyConnection,
    made: Mapping[str, Any],
    meta: Mapping[str, Any],
    snapshot: int | None,
    note: Notes,
) -> str | None:
    """Compare a checkpoint's training set in the forms that are left of it.

    Args:
        made: the checkpoint's row of `checkpoints`.
        meta: its record.
        snapshot: the one that it was trained from; None: it is forgotten.

    Returns:
        The root of the rows at the snapshot or, without it, of what is left; None: the round's record is unreadable.
    """
    (newest,) = connection.execute(NEWEST_SNAPSHOT).fetchone()
    _keep_recorded(connection, made, newest)
    _count(connection, made, note)
    with as_of(connection, SOURCES, newest):
        revoked = _revoked(connection, made)
        superseded = _superseded(connection, made, meta, revoked, note)
    if snapshot is None and superseded:
        return _leaves_alone(connection, meta, f"the snapshot was forgotten, and {superseded}", note)

    chosen, which = (newest, "of now") if snapshot is None else (snapshot, "at the snapshot")
    with as_of(connection, SOURCES, chosen):
        recipe = _recorded_recipe(connection, made)
        if recipe is None:
            what = f"the table `rounds` has no record of {made['round']} at the snapshot {chosen} that can be read"
            note(Check(_LEAF_BY_LEAF.format(which), 0, 1), Finding("data", what, 1))
            return None
        rows = training_rows(made["recipe"], made["round"], recipe, meta.get("trained_on", "accepted"))
        _keep_rows(connection, "trained_on", *rows)

    root = _leaves(connection, which, meta, revoked if snapshot is None else set(), note)
    if snapshot is None:
        note(Check(_PRESENT, 0, None, "the snapshot was forgotten: the comparison above is with the rows of now"))
    elif superseded:
        note(Check(_PRESENT, 0, None, superseded))
    else:
        with as_of(connection, SOURCES, newest):
            _keep_rows(connection, "present", *rows)
        _present(connection, revoked, note)
    return root


# --- what is compared -------------------------------------------------------------------------


def _keep_recorded(connection: duckdb.DuckDBPyConnection, made: Mapping[str, Any], newest: int) -> None:
    """The recorded leaves, as the temporary table `recorded`."""
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE recorded AS
            SELECT candidate_id, leaf, weight FROM training_samples AT (VERSION => {int(newest)})
            WHERE recipe = $recipe AND round = $round AND checkpoint = $checkpoint""",
        {name: made[name] for name in ("recipe", "round", "checkpoint")},
    )


def _keep_rows(connection: duckdb.DuckDBPyConnection, table: str, sql: str, parameters: Mapping[str, Any]) -> None:
    """Rows of a training set, as a temporary table with what they are compared by."""
    columns = f"candidate_id, {merkle.LEAF} AS leaf, weight, {_ROW} AS row"
    connection.execute(f"CREATE OR REPLACE TEMP TABLE {table} AS SELECT {columns} FROM ({sql})", parameters)


def _recorded_recipe(connection: duckdb.DuckDBPyConnection, made: Mapping[str, Any]) -> Recipe | None:
    """The round's recorded recipe as far as it determines a training set; None: it cannot be read.

    It is not validated: it may have been refused since.
    """
    sql = "SELECT settings FROM rounds WHERE recipe = $recipe AND round = $round"
    recorded = column(connection, sql, _round(made))
    try:
        (settings,) = map(json.loads, recorded)
        sections = {"training": Training, "acceptance": Rule}
        read = {name: section.model_construct(**settings.get(name, {})) for name, section in sections.items()}
        return Recipe.model_construct(**{**settings, **read})
    except (TypeError, ValueError, AttributeError):
        return None


def _round(made: Mapping[str, Any]) -> dict[str, str]:
    return {"recipe": made["recipe"], "round": made["round"]}


# --- which of it still counts -----------------------------------------------------------------


def _revoked(connection: duckdb.DuckDBPyConnection, made: Mapping[str, Any]) -> set[str]:
    """Which samples of the training set may no longer be trained on."""
    if not connection.execute(ANY).fetchone():
        return set()
    sql = f"""WITH {NAMED} SELECT c.candidate_id FROM recorded r
        JOIN (SELECT candidate_id, prompt_id, policy FROM candidates WHERE recipe = $recipe) c
            ON c.candidate_id = r.candidate_id
        WHERE NOT ({ALLOWED})"""
    return set(column(connection, sql, {"recipe": made["recipe"]}))


def _superseded(
    connection: duckdb.DuckDBPyConnection,
    made: Mapping[str, Any],
    meta: Mapping[str, Any],
    revoked: set[str],
    note: Notes,
) -> str:
    """Why the present rows are not this checkpoint's training set, in words; empty if they are."""
    counted = connection.execute(_CHECKPOINTS_OF_ROUND, _round(made)).fetchone()
    if counted is None:
        what = f"the table `rounds` has no record of {made['round']} any more"
        note(Check("the round's record", 1, 1), Finding("data", what, 1))
        return what
    if made["checkpoint"] not in counted:
        return f"{made['round']} was begun again since: its rows of now are not this checkpoint's"
    if earlier := connection.execute(_BEGUN_SINCE, _round(made)).fetchone():
        return f"{earlier[0]}, which it learned from too, was begun again since"
    if made["trained_on"] not in (None, "accepted") and connection.execute(ANY).fetchone():
        data = (meta.get("training") or {}).get("data")
        first = "r000" if data == "all_rounds" else made["round"]
        (gone,) = connection.execute(_REVOKED_OF_ROUNDS, {**_round(made), "first": first}).fetchone()
        if gone:
            return f"of its candidates {_since(gone)}, and a control learns others, or as many as are left"
    rows = _size(connection, "recorded")
    return f"all {rows} were revoked since" if 0 < rows == len(revoked) else ""


# The checkpoints that count for a round: its own and its controls.
_CHECKPOINTS_OF_ROUND = """
    SELECT checkpoint, json_extract_string(made, '$.random'), json_extract_string(made, '$.everything')
    FROM (SELECT *, CASE WHEN json_valid(controls) THEN controls END AS made FROM rounds)
    WHERE recipe = $recipe AND round = $round
"""
_BEGUN_SINCE = """
    SELECT e.round FROM rounds e JOIN rounds r ON r.recipe = e.recipe AND r.round = $round
    WHERE e.recipe = $recipe AND e.round < $round AND e.started_at > r.started_at
        AND CASE WHEN json_valid(r.settings) THEN r.settings ->> '$.training.data' END = 'all_rounds'
    ORDER BY e.round LIMIT 1
"""
_REVOKED_OF_ROUNDS = f"""WITH {NAMED} SELECT count(*) FROM decisions d
    JOIN candidates c ON c.candidate_id = d.candidate_id AND c.recipe = $recipe
    WHERE d.recipe = $recipe AND d.round BETWEEN $first AND $round AND d.reason <> '{REASON}' AND NOT ({ALLOWED})"""


# --- the comparisons --------------------------------------------------------------------------


def _count(connection: duckdb.DuckDBPyConnection, made: Mapping[str, Any], note: Notes) -> None:
    """Check what the checkpoint's row says of its training set against the recorded leaves."""
    members = column(connection, "SELECT candidate_id FROM recorded")
    counted = {"samples": len(members), "accepted_digest": set_digest(members)}
    known = {name: value for name, value in counted.items() if made[name] is not None}
    wrong = {name: value for name, value in known.items() if made[name] != value}
    listed = "; ".join(f"{name} {made[name]!r}, and by `training_samples` {value!r}" for name, value in wrong.items())
    what = f"the table `checkpoints` has for {made['checkpoint']} the {listed}"
    note(Check("the training set, counted and hashed", len(known), len(wrong)), Finding("data", what, len(wrong)))


def _leaves_alone(connection: duckdb.DuckDBPyConnection, meta: Mapping[str, Any], why: str, note: Notes) -> str:
    """Check the recorded leaves against the root, if there are no rows to compare them with. Returns their root."""
    root, wanted = _root(connection, "recorded"), meta.get("merkle_root")
    name, rows = "recorded leaves, by the root", _size(connection, "recorded")
    if wanted is None:
        note(Check(name, 0, None, "no root was recorded when this checkpoint was trained"))
    else:
        what = f"the root of the recorded leaves is {root}, not {wanted}"
        note(Check(name, rows, int(root != wanted)), Finding("data", what, rows))
    note(Check(_PRESENT, 0, None, why))
    return root


def _leaves(
    connection: duckdb.DuckDBPyConnection, which: str, meta: Mapping[str, Any], revoked: set[str], note: Notes
) -> str:
    """Check the rows trained on against the recorded leaves, and both against the root.

    Args:
        which: rows they are, in words.
        revoked: rows that are no longer among these, so that only the recorded leaves can match the root.

    Returns:
        The root of the rows or, if some were revoked, of the recorded leaves.
    """
    all_different = connection.execute(
        """SELECT coalesce(t.candidate_id, r.candidate_id), CASE WHEN t.candidate_id IS NULL THEN 'gone'
               WHEN r.candidate_id IS NULL THEN 'added' ELSE 'changed' END
           FROM trained_on t FULL JOIN recorded r ON r.candidate_id = t.candidate_id
           WHERE t.leaf IS DISTINCT FROM r.leaf AND (r.leaf IS NOT NULL OR $rooted)
               OR t.weight IS DISTINCT FROM r.weight OR t.candidate_id IS NULL OR r.candidate_id IS NULL""",
        {"rooted": "merkle_root" in meta},  # rows older than roots have no leaves
    ).fetchall()
    different = [(candidate, how) for candidate, how in all_different if candidate not in revoked]
    root = _root(connection, "trained_on")
    recorded = _root(connection, "recorded") if all_different else root
    wanted = meta.get("merkle_root", recorded)

    if root == wanted:  # so it is the table of leaves that was changed
        what = f"rows of `training_samples` {{}}, while the rows {which} still have the root"
        words = {"changed": "were changed", "gone": "were added", "added": "are gone"}
    else:
        what = f"rows {which} {{}}" + ("" if recorded == wanted else ", or leaves in `training_samples`, or both")
        words = {"changed": "were changed since they were trained on", "gone": "are gone", "added": "were added"}
    found = [named("data", what.format(words[how]), ids) for how, ids in _by_kind(different, words)]
    if not different and wanted not in (root, recorded):
        if twice := column(connection, _TWICE.format(table="trained_on")):
            found.append(named("data", f"rows {which} are there more than once", twice))
        else:
            what = f"the root of the rows is {root}, not {wanted}: the recorded leaves were changed along with the rows"
            found.append(Finding("data", what, _size(connection, "recorded")))
    rows = _size(connection, "recorded") - len(revoked)
    note(Check(_LEAF_BY_LEAF.format(which), rows, len(different) or len(found), _since(len(revoked))), *found)
    return recorded if revoked else root


def _present(connection: duckdb.DuckDBPyConnection, revoked: set[str], note: Notes) -> None:
    """Check the present rows against those at the snapshot. What was revoked since is absent now, as it should be."""
    different = connection.execute(
        """SELECT coalesce(t.candidate_id, p.candidate_id), CASE WHEN p.candidate_id IS NULL THEN 'are gone'
               WHEN t.candidate_id IS NULL THEN 'were added' ELSE 'were changed' END
           FROM trained_on t FULL JOIN present p ON p.candidate_id = t.candidate_id
           WHERE p.row IS DISTINCT FROM t.row"""
    ).fetchall()
    twice = column(connection, _TWICE.format(table="present"))
    different += [(candidate, "are there more than once") for candidate in twice]
    different = [(candidate, how) for candidate, how in different if candidate not in revoked]
    kinds = sorted({how for _, how in different})
    found = [
        named("data", f"rows of the training set {how} since the snapshot", ids)
        for how, ids in _by_kind(different, kinds)
    ]
    rows = _size(connection, "trained_on") - len(revoked)
    note(Check(_PRESENT, rows, len(different), _since(len(revoked))), *found)


_TWICE = "SELECT candidate_id FROM {table} GROUP BY ALL HAVING count(*) > 1"


def _by_kind(different, kinds):
    """The ids of each kind of difference, without the kinds that there are none of."""
    for kind in kinds:
        if ids := [candidate for candidate, how in different if how == kind]:
            yield kind, ids


def _since(number: int) -> str:
    """How many were revoked, in words; empty for none."""
    return f"{number:,} {'was' if number == 1 else 'were'} revoked since" if number else ""


def _size(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    (rows,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    return rows


def _root(connection: duckdb.DuckDBPyConnection, table: str) -> str:
    """The root of a table's leaves. A value that is not a hash is replaced by one that no row has."""
    leaf = "CASE WHEN regexp_full_match(leaf, '[0-9a-f]{64}') THEN leaf ELSE repeat('0', 64) END"
    sql = f"SELECT {leaf} AS leaf FROM {table} ORDER BY candidate_id"
    return merkle.root(connection.execute(sql).to_arrow_table()["leaf"])
