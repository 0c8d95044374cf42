"""Verify: whether a checkpoint's weights and training set are still what they were when it was trained.

Belongs here: comparing the weights with their hashes, and the training set, row by row and as one Merkle root
(merkle.py), with the rows at the checkpoint's snapshot and with the present rows. Not: whether these rows should have
been accepted (replay.py).
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from rsft_pipeline import merkle, models
from rsft_pipeline.audit import ids
from rsft_pipeline.audit.findings import Check, Finding, Notes, named, read
from rsft_pipeline.audit.ids import AuditError
from rsft_pipeline.audit.reading import as_of, column
from rsft_pipeline.home import Home
from rsft_pipeline.lineage import set_digest
from rsft_pipeline.models import checkpoints
from rsft_pipeline.recipe.acceptance import Rule
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.training import Training
from rsft_pipeline.revocations import ALLOWED, ANY, NAMED, REASON
from rsft_pipeline.steps.rows import training_rows
from rsft_pipeline.store import NEWEST_SNAPSHOT, Store

TABLES = ("rounds", "decisions", "candidates", "prompts", "revocations")  # from which a training set is read


@dataclass(frozen=True)
class Verification:
    """The result of verifying a checkpoint."""

    recipe: str
    round: str
    checkpoint: str
    samples: int  # rows of the training set
    snapshot: int
    recorded_root: str | None  # None: it was trained before roots were recorded
    root: str | None  # of the rows at the snapshot or, if that is gone, of what is left; None: unreadable
    checks: list[Check]
    findings: list[Finding]
    ok: bool  # no difference was found
    seconds: float


def find(store: Store, checkpoint: str, round_key: str | None = None) -> dict[str, Any]:
    """The row of `checkpoints` that is meant.

    Args:
        checkpoint: a digest or the beginning of it; with `round_key`, the name of the recipe.
        round_key: the round whose own checkpoint is meant.

    Raises:
        AuditError: there is none, or more than one.
    """
    if round_key is None:
        rows = store.query("SELECT * FROM checkpoints WHERE starts_with(checkpoint, ?) ORDER BY round", [checkpoint])
        if not rows:
            ids.check_not_recipe(store, checkpoint)
    else:
        ids.check_round(store, checkpoint, round_key)
        rows = store.query(
            """SELECT * FROM checkpoints WHERE recipe = $recipe AND round = $round AND checkpoint =
               (SELECT checkpoint FROM rounds WHERE recipe = $recipe AND round = $round)""",
            {"recipe": checkpoint, "round": round_key},
        )
    if not rows:
        nothing = f"no checkpoint begins with {checkpoint!r}, and no recipe here is called so"
        raise AuditError(f"{checkpoint} {round_key} has made no checkpoint" if round_key else nothing)
    if len(there := sorted({row["checkpoint"] for row in rows})) > 1:
        raise AuditError(f"{len(there)} checkpoints begin with {checkpoint!r}: {', '.join(there[:5])}")
    return rows[-1]


def verify(
    store: Store, made: Mapping[str, Any], home: Home, witnesses: Mapping[str, str | None] | None = None
) -> Verification:
    """Compare a checkpoint with what was recorded of it.

    Args:
        made: its row of `checkpoints`.
        witnesses: where else its Merkle root was recorded → what is there; None: nothing.
    """
    began = time.perf_counter()
    note = Notes()

    meta = _record(made, home, note)
    _weights(made, home, note)
    _roots(made, meta, home, witnesses or {}, note)
    kept = store.query("SELECT snapshot_id FROM lake.snapshots() WHERE snapshot_id = ?", [made["snapshot"]])
    then = made["snapshot"] if kept else None
    tables = (*TABLES, "training_samples")
    root = read(store, tables, note, lambda connection, note: _rows(connection, made, meta, then, note), then)
    return Verification(
        **{name: made[name] for name in ("recipe", "round", "checkpoint", "samples", "snapshot")},
        recorded_root=meta.get("merkle_root"),
        root=root,
        checks=note.checks,
        findings=note.findings,
        ok=not note.findings,
        seconds=time.perf_counter() - began,
    )


def _record(made: Mapping[str, Any], home: Home, note: Notes) -> dict[str, Any]:
    """Check the recorded metadata against its other copies, and return it; empty if it cannot be read."""
    name = "columns of `checkpoints`, against its record"
    try:
        meta = dict(json.loads(made["meta"]))
    except (TypeError, ValueError):
        meta = {}
    if not meta:
        what = f"the record of {made['checkpoint']} in `checkpoints`, `meta`, cannot be read or is empty"
        note(Check(name, 0, 1), Finding("data", what, 1))
        return {}
    twice = {"snapshot": "store_snapshot", **{column: column for column in made if column in meta}}
    there = {column: key for column, key in twice.items() if key in meta and made[column] is not None}
    wrong = {column: meta[key] for column, key in there.items() if made[column] != meta[key]}
    said = "; ".join(f"{column} {made[column]!r}, and its record {then!r}" for column, then in wrong.items())
    what = f"the table `checkpoints` has for {made['checkpoint']} the {said}"
    note(Check(name, len(there), len(wrong)), Finding("data", what, len(wrong)))

    name, beside = f"its record, against {checkpoints.META}", _meta(home.checkpoints / made["checkpoint"])
    if any(beside.get(key) != meta.get(key) for key in ("recipe", "round", "trained_on", "store_snapshot")):
        note(Check(name, 0, None, "that is of another training, which came to the same weights"))
    else:
        other = [key for key, value in meta.items() if key != "merkle_root" and beside.get(key) != value]  # see _roots
        what = f"the record of {made['checkpoint']} in `checkpoints` has another {', '.join(other)} than its folder's"
        note(Check(name, len(meta), len(other)), Finding("data", what, len(other)))
    return meta


# --- the folder -------------------------------------------------------------------------------


def _weights(made: Mapping[str, Any], home: Home, note: Notes) -> None:
    saved = checkpoints.Checkpoint(made["checkpoint"], home.checkpoints / made["checkpoint"])
    name, folder = "weights, hashed again", saved.path
    if not folder.is_dir():
        note(Check(name, 0, 1), Finding("weights", f"there is no folder {folder}", 1))
        return
    try:
        changed = checkpoints.verify(saved)
    except (models.ModelError, ValueError) as error:
        note(Check(name, 0, 1), Finding("weights", f"{folder}: {error}", 1))
        return
    files = len(checkpoints.read_meta(folder)["files"])
    what = f"files of {folder} are not what was saved: {', '.join(changed)}"
    note(Check(name, files, len(changed)), Finding("weights", what, len(changed)))


def _roots(
    made: Mapping[str, Any], meta: Mapping[str, Any], home: Home, witnesses: Mapping[str, str | None], note: Notes
) -> None:
    """Check that the root is the same in every place where it was recorded."""
    folder, name = home.checkpoints / made["checkpoint"], "the root, wherever it was written"
    wanted = meta.get("merkle_root")
    there = dict(witnesses)
    if folder.is_dir():
        there[f"{folder / checkpoints.META}"] = _meta(folder).get("merkle_root")
        card = folder / "README.md"
        text = card.read_text("utf-8", "replace") if card.is_file() else ""
        # The card is for people, who may have edited it: only a different root in it counts.
        if found := re.search(r"Merkle root \| `([^`]*)`", text):
            there[f"{card}"] = found[1]
    if wanted is None and not any(there.values()):
        note(Check(name, 0, None, "no root was recorded when this checkpoint was trained"))
        return
    wrong = {place: root for place, root in there.items() if root != wanted}
    said = "; ".join(f"{place} says {root or 'nothing'}" for place, root in wrong.items())
    what = f"the table `checkpoints` has the root {wanted or '(none)'}, but {said}"
    note(Check(name, len(there) + 1, len(wrong)), Finding("data", what, len(wrong)))


def _meta(folder) -> dict[str, Any]:
    try:
        return dict(checkpoints.read_meta(folder))
    except (TypeError, ValueError):  # no longer JSON; the check of the weights has noted that
        return {}


# --- the rows ---------------------------------------------------------------------------------

# By what present rows are compared with those at the snapshot. For the latter the leaf, a SHA-256, is compared too.
_ROW = "hash(candidate_id, round, weight, score, token_ids, prompt, chat, text, split)"


def _rows(
    connection: duckdb.DuckDBPyConnection,
    made: Mapping[str, Any],
    meta: Mapping[str, Any],
    then: int | None,
    note: Notes,
) -> str | None:
    """Compare the recorded training set with the rows at the snapshot and the present rows. Returns the former's root.

    Args:
        then: the snapshot that it was trained from, if it still exists.
    """
    (now,) = connection.execute(NEWEST_SNAPSHOT).fetchone()
    of = {"recipe": made["recipe"], "round": made["round"]}
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE recorded AS
            SELECT candidate_id, leaf, weight FROM training_samples AT (VERSION => {int(now)})
            WHERE recipe = $recipe AND round = $round AND checkpoint = $checkpoint""",
        {**of, "checkpoint": made["checkpoint"]},
    )
    _counted(connection, made, note)
    there = then is not None
    with as_of(connection, TABLES, now):
        revoked = _revoked(connection, made)
        others = _others(connection, made, meta, revoked, note)
    if not there and others:
        return _leaves(connection, meta, f"the snapshot was forgotten, and {others}", note)
    with as_of(connection, TABLES, then if there else now):
        recorded = "SELECT settings FROM rounds WHERE recipe = $recipe AND round = $round"
        try:
            settings = _recorded(*connection.execute(recorded, of).fetchall())
        except (TypeError, ValueError, AttributeError):
            what = f"the table `rounds` has no record of {made['round']} at the snapshot {then or now} that can be read"
            note(Check(_THEN, 0, 1), Finding("data", what, 1))
            return None
        rows, given = training_rows(made["recipe"], made["round"], settings, meta.get("trained_on", "accepted"))
        chosen = f"SELECT candidate_id, {merkle.LEAF} AS leaf, weight, {_ROW} AS row FROM ({rows})"
        connection.execute(f"CREATE OR REPLACE TEMP TABLE at_snapshot AS {chosen}", given)
    with as_of(connection, TABLES, now):
        root = _then(connection, meta, set() if there else revoked, there, note)
        if not there:
            note(Check(_NOW, 0, None, "the snapshot was forgotten: the comparison above is with the rows of now"))
        elif others:
            note(Check(_NOW, 0, None, others))
        else:
            _now(connection, rows, given, revoked, note)
    return root


def _counted(connection: duckdb.DuckDBPyConnection, made: Mapping[str, Any], note: Notes) -> None:
    """Check what the checkpoint's row says of its training set against the table `training_samples`."""
    members = column(connection, "SELECT candidate_id FROM recorded")
    found = {"samples": len(members), "accepted_digest": set_digest(members)}
    there = {name: value for name, value in found.items() if made[name] is not None}
    wrong = {name: value for name, value in there.items() if made[name] != value}
    said = "; ".join(f"{name} {made[name]!r}, and `training_samples` gives {value!r}" for name, value in wrong.items())
    what = f"the table `checkpoints` has for {made['checkpoint']} the {said}"
    note(Check("the training set, counted and hashed", len(there), len(wrong)), Finding("data", what, len(wrong)))


def _recorded(row: tuple[str]) -> Recipe:
    """The recorded recipe as far as it determines a training set, not validated: it may be refused by now."""
    was = json.loads(row[0])
    sections = {"training": Training, "acceptance": Rule}
    read = {name: section.model_construct(**was.get(name, {})) for name, section in sections.items()}
    return Recipe.model_construct(**{**was, **read})


def _others(
    connection: duckdb.DuckDBPyConnection,
    made: Mapping[str, Any],
    meta: Mapping[str, Any],
    revoked: set[str],
    note: Notes,
) -> str:
    """Why the present rows are not this checkpoint's, in words; empty if they are."""
    of = {"recipe": made["recipe"], "round": made["round"]}
    result = connection.execute(_RESULT, of).fetchone()
    if result is None:
        what = f"the table `rounds` has no record of {made['round']} any more"
        note(Check("the round's record", 1, 1), Finding("data", what, 1))
        return what
    if made["checkpoint"] not in result:
        return f"{made['round']} was begun again since: its rows of now are not this checkpoint's"
    if earlier := connection.execute(_BEGUN_SINCE, of).fetchone():
        return f"{earlier[0]}, which it learned from too, was begun again since"
    if made["trained_on"] not in (None, "accepted") and connection.execute(ANY).fetchone():
        data = (meta.get("training") or {}).get("data")
        first = "r000" if data == "all_rounds" else made["round"]
        (gone,) = connection.execute(_REVOKED, {**of, "first": first}).fetchone()
        if gone:
            return f"of its candidates {_since(gone)}, and a control learns others, or as many as are left"
    (rows,) = connection.execute("SELECT count(*) FROM recorded").fetchone()
    return f"all {rows} were revoked since" if 0 < rows == len(revoked) else ""


def _since(number: int) -> str:
    return f"{number:,} {'was' if number == 1 else 'were'} revoked since"


# The checkpoints that count for a round: its own and its controls.
_RESULT = """
    SELECT checkpoint, json_extract_string(made, '$.random'), json_extract_string(made, '$.everything')
    FROM (SELECT *, CASE WHEN json_valid(controls) THEN controls END AS made FROM rounds)
    WHERE recipe = $recipe AND round = $round
"""
_REVOKED = f"""WITH {NAMED} SELECT count(*) FROM decisions d
    JOIN candidates c ON c.candidate_id = d.candidate_id AND c.recipe = $recipe
    WHERE d.recipe = $recipe AND d.round BETWEEN $first AND $round AND d.reason <> '{REASON}' AND NOT ({ALLOWED})"""
_BEGUN_SINCE = """
    SELECT e.round FROM rounds e JOIN rounds r ON r.recipe = e.recipe AND r.round = $round
    WHERE e.recipe = $recipe AND e.round < $round AND e.started_at > r.started_at
        AND CASE WHEN json_valid(r.settings) THEN r.settings ->> '$.training.data' END = 'all_rounds'
    ORDER BY e.round LIMIT 1
"""


def _leaves(connection: duckdb.DuckDBPyConnection, meta: Mapping[str, Any], why: str, note: Notes) -> str:
    """Check the recorded leaves against the root, if there are no rows to compare them with. Returns their root."""
    (rows,) = connection.execute("SELECT count(*) FROM recorded").fetchone()
    root = _root(connection, "recorded")
    name, wanted = "recorded leaves, by the root", meta.get("merkle_root")
    what = f"the root of the recorded leaves is {root}, not {wanted}"
    if wanted is None:
        note(Check(name, 0, None, "no root was recorded when this checkpoint was trained"))
    else:
        note(Check(name, rows, int(root != wanted)), Finding("data", what, rows))
    note(Check(_NOW, 0, None, why))
    return root


def _revoked(connection: duckdb.DuckDBPyConnection, made: Mapping[str, Any]) -> set[str]:
    """Which samples of the training set may no longer be trained on."""
    if not connection.execute(ANY).fetchone():
        return set()
    sql = f"""WITH {NAMED} SELECT d.candidate_id FROM recorded d
        JOIN (SELECT candidate_id, prompt_id, policy FROM candidates WHERE recipe = $recipe) c
            ON c.candidate_id = d.candidate_id
        WHERE NOT ({ALLOWED.replace("d.prompt_id", "c.prompt_id")})"""
    return set(column(connection, sql, {"recipe": made["recipe"]}))


def _then(
    connection: duckdb.DuckDBPyConnection, meta: Mapping[str, Any], revoked: set[str], there: bool, note: Notes
) -> str:
    """Check the rows at the snapshot against the recorded leaves, and both against the root.

    Args:
        revoked: rows that are no longer among these, so that only the recorded leaves can match the root.
        there: whether the snapshot still exists; else the rows are the present ones.

    Returns:
        The root of the rows or, if some were revoked, of the recorded leaves.
    """
    different = connection.execute(
        """SELECT coalesce(t.candidate_id, r.candidate_id), CASE WHEN t.candidate_id IS NULL THEN 'gone'
               WHEN r.candidate_id IS NULL THEN 'added' ELSE 'changed' END
           FROM at_snapshot t FULL JOIN recorded r ON r.candidate_id = t.candidate_id
           WHERE t.leaf IS DISTINCT FROM r.leaf AND (r.leaf IS NOT NULL OR $rooted)
               OR t.weight IS DISTINCT FROM r.weight OR t.candidate_id IS NULL OR r.candidate_id IS NULL""",
        {"rooted": "merkle_root" in meta},  # rows older than roots have no leaves
    ).fetchall()
    (rows,) = connection.execute("SELECT count(*) FROM recorded").fetchone()
    root = _root(connection, "at_snapshot")
    recorded = root if not different else _root(connection, "recorded")
    different = [(candidate, how) for candidate, how in different if candidate not in revoked]
    wanted, found = meta.get("merkle_root", recorded), []
    if root == wanted:  # so it is the table of leaves that was changed
        what = "rows of `training_samples` {}, while the rows at the snapshot still have the root"
        words = {"changed": "changed", "gone": "added", "added": "gone"}
    else:
        what = "rows at the snapshot {}" + ("" if recorded == wanted else ", or leaves in `training_samples`, or both")
        words = {"changed": "changed since they were trained on", "gone": "gone", "added": "added"}
    for how, word in words.items():
        if ids := [candidate for candidate, why in different if why == how]:
            found.append(named("data", what.format(word), ids))
    if not different and wanted not in (root, recorded):
        twice = column(connection, "SELECT candidate_id FROM at_snapshot GROUP BY ALL HAVING count(*) > 1")
        what = f"the root of the rows is {root}, not {wanted}: the recorded leaves were changed along with the rows"
        found.append(
            named("data", "rows at the snapshot are there more than once", twice)
            if twice
            else Finding("data", what, rows)
        )
    name = _THEN if there else "rows of now, leaf by leaf, and the leaves by the root"
    said = _since(len(revoked)) if revoked else ""
    note(Check(name, rows - len(revoked), len(different) or len(found), said), *found)
    return recorded if revoked else root


_THEN = "rows at the snapshot, leaf by leaf and by the root"
_NOW = "rows of now, against those at the snapshot"


def _now(
    connection: duckdb.DuckDBPyConnection,
    rows: str,
    given: Mapping[str, Any],
    revoked: set[str],
    note: Notes,
) -> None:
    """Check the present rows against those at the snapshot. What was revoked since is absent now, as it should be."""
    connection.execute(f"CREATE OR REPLACE TEMP TABLE now AS SELECT candidate_id, {_ROW} AS row FROM ({rows})", given)
    different = connection.execute(
        """SELECT coalesce(t.candidate_id, n.candidate_id), CASE WHEN n.candidate_id IS NULL THEN 'are gone'
               WHEN t.candidate_id IS NULL THEN 'were added' ELSE 'were changed' END
           FROM at_snapshot t FULL JOIN now n ON n.candidate_id = t.candidate_id WHERE n.row IS DISTINCT FROM t.row"""
    ).fetchall()
    twice = column(connection, "SELECT candidate_id FROM now GROUP BY ALL HAVING count(*) > 1")
    different += [(candidate, "are there more than once") for candidate in twice]
    different = [(candidate, how) for candidate, how in different if candidate not in revoked]
    (count,) = connection.execute("SELECT count(*) FROM at_snapshot").fetchone()
    found = [
        named("data", f"rows of the training set {how} since the snapshot", ids)
        for how in sorted({how for _, how in different})
        for ids in [[candidate for candidate, why in different if why == how]]
    ]
    said = _since(len(revoked)) if revoked else ""
    note(Check(_NOW, count - len(revoked), len(different), said), *found)


def _root(connection: duckdb.DuckDBPyConnection, table: str) -> str:
    """The root of a table's leaves. A value that is not a hash is replaced by one that no row has."""
    leaf = "CASE WHEN regexp_full_match(leaf, '[0-9a-f]{64}') THEN leaf ELSE repeat('0', 64) END"
    sql = f"SELECT {leaf} AS leaf FROM {table} ORDER BY candidate_id"
    return merkle.root(connection.execute(sql).to_arrow_table()["leaf"])
