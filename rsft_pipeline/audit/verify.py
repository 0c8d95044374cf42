"""Verify: whether a checkpoint's weights and training set are still what they were when it was trained.

Belongs here: comparing the weights with their hashes, and the training set, row by row and as one Merkle root
(merkle.py), with the rows at the checkpoint's snapshot and with those of now. Not: whether these rows ought to have
been accepted (replay.py).
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from rsft_pipeline import lineage, merkle, models, steps
from rsft_pipeline.audit.findings import Check, Finding, named, unreadable
from rsft_pipeline.home import Home
from rsft_pipeline.store import Store

TABLES = ("training_samples", "decisions", "candidates", "prompts")  # what the rows are read from


@dataclass(frozen=True)
class Verification:
    """What came of verifying a checkpoint."""

    recipe: str
    round: str
    checkpoint: str
    samples: int  # rows of the training set
    snapshot: int
    recorded_root: str | None  # None: it was trained before roots were recorded
    root: str | None  # of the rows at the snapshot; None: they could not be read
    checks: list[Check]
    findings: list[Finding]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.findings


Note = Callable[..., None]


def verify(
    store: Store, made: Mapping[str, Any], home: Home, witnesses: Mapping[str, str | None] | None = None
) -> Verification:
    """Compare a checkpoint with what was recorded of it.

    Args:
        made: its row of `checkpoints`.
        witnesses: where else its Merkle root was written down, and what stands there; None: nothing does.
    """
    began = time.perf_counter()
    checks: list[Check] = []
    findings: list[Finding] = []

    def note(check: Check, *found: Finding) -> None:
        checks.append(check)
        findings.extend(found)

    meta = json.loads(made["meta"])
    recorded = meta.get("merkle_root")
    _weights(made, home, note)
    _roots(made, meta, home, witnesses or {}, note)
    root = None
    try:
        root = store.commit(lambda connection: _rows(connection, made, meta, note))
    except duckdb.Error as error:
        note(Check("rows of the training set", 0, None, "the store cannot be read"), *unreadable(store, TABLES, error))
    return Verification(
        made["recipe"],
        made["round"],
        made["checkpoint"],
        made["samples"],
        made["snapshot"],
        recorded,
        root,
        checks,
        findings,
        time.perf_counter() - began,
    )


# --- the folder -------------------------------------------------------------------------------


def _weights(made: Mapping[str, Any], home: Home, note: Note) -> None:
    folder = home.checkpoints / made["checkpoint"]
    name = "weights, hashed again"
    if not folder.is_dir():
        note(Check(name, 0, 1), Finding("weights", f"there is no folder {folder}", 1))
        return
    try:
        changed = models.verify(folder)
    except (models.ModelError, ValueError) as error:
        note(Check(name, 0, 1), Finding("weights", f"{folder}: {error}", 1))
        return
    record = models.read_meta(folder)
    files = len(record["files"])
    if record["digest"] != made["checkpoint"]:
        changed.append(models.META)
    what = f"files of {folder} are not what was saved: {', '.join(changed)}"
    note(Check(name, files, len(changed)), *([Finding("weights", what, len(changed))] if changed else []))


def _roots(
    made: Mapping[str, Any], meta: Mapping[str, Any], home: Home, witnesses: Mapping[str, str | None], note: Note
) -> None:
    """Whether the root stands the same in every place that it was written to."""
    folder, name = home.checkpoints / made["checkpoint"], "the root, wherever it was written"
    if "merkle_root" not in meta:
        note(Check(name, 0, None, "no root was recorded when this checkpoint was trained"))
        return
    there = dict(witnesses)
    if folder.is_dir():
        there[f"{folder / models.META}"] = _meta(folder).get("merkle_root")
        card = folder / "README.md"
        text = card.read_text("utf-8", "replace") if card.is_file() else ""
        # The card is for people, who may have rewritten it: only another root in its place is a difference.
        if found := re.search(r"Merkle root \| `([^`]*)`", text):
            there[f"{card}"] = found[1]
    wrong = {place: root for place, root in there.items() if root != meta["merkle_root"]}
    said = "; ".join(f"{place} says {root or 'nothing'}" for place, root in wrong.items())
    what = f"the table `checkpoints` has the root {meta['merkle_root']}, but {said}"
    note(Check(name, len(there) + 1, len(wrong)), *([Finding("data", what, len(wrong))] if wrong else []))


def _meta(folder) -> dict[str, Any]:
    try:
        return models.read_meta(folder)
    except ValueError:  # no JSON any more; the weights' check has said so
        return {}


# --- the rows ---------------------------------------------------------------------------------

# What the row of now is compared with the row of then by. Of then the leaf is compared too, which is SHA-256.
_ROW = "hash(candidate_id, round, weight, score, token_ids, prompt, chat, text)"


def _rows(connection: duckdb.DuckDBPyConnection, made: Mapping[str, Any], meta: Mapping[str, Any], note: Note) -> str:
    """Compare the training set that was recorded with the rows at the snapshot and of now. Returns the root of then."""
    of = {"recipe": made["recipe"], "round": made["round"], "checkpoint": made["checkpoint"]}
    first = made["round"] if meta["training"]["data"] == "round" else "r000"
    accepted = {"recipe": made["recipe"], "first": first, "last": made["round"]}
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE recorded AS SELECT candidate_id, leaf FROM training_samples "
        "WHERE recipe = $recipe AND round = $round AND checkpoint = $checkpoint",
        of,
    )
    for table in ("decisions", "candidates", "prompts"):
        at = f"SELECT * FROM lake.{table} AT (VERSION => {int(made['snapshot'])})"
        connection.execute(f"CREATE TEMP VIEW {table} AS {at}")
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE at_snapshot AS "
        f"SELECT candidate_id, {merkle.LEAF} AS leaf, {_ROW} AS row FROM ({steps.ACCEPTED})",
        accepted,
    )
    for table in ("decisions", "candidates", "prompts"):
        connection.execute(f"DROP VIEW temp.{table}")
    rooted = _then(connection, meta, note)
    _now(connection, made, accepted, note)
    for table in ("recorded", "at_snapshot"):
        connection.execute(f"DROP TABLE {table}")
    return rooted


def _then(connection: duckdb.DuckDBPyConnection, meta: Mapping[str, Any], note: Note) -> str:
    """The rows at the snapshot against the recorded leaves, and both against the root."""
    different = connection.execute(
        """SELECT coalesce(t.candidate_id, r.candidate_id), CASE WHEN t.candidate_id IS NULL THEN 'gone'
               WHEN r.candidate_id IS NULL THEN 'added' ELSE 'changed' END
           FROM at_snapshot t FULL JOIN recorded r ON r.candidate_id = t.candidate_id
           WHERE t.leaf IS DISTINCT FROM r.leaf OR t.candidate_id IS NULL OR r.candidate_id IS NULL"""
    ).fetchall()
    (rows,) = connection.execute("SELECT count(*) FROM recorded").fetchone()
    root = _root(connection, "at_snapshot")
    recorded = root if not different else _root(connection, "recorded")
    wanted, found = meta.get("merkle_root"), []
    if wanted is None:
        ids = connection.execute("SELECT candidate_id FROM at_snapshot").fetchall()
        different = [] if lineage.set_digest(i for (i,) in ids) == meta["accepted_digest"] else different
        what = "the candidates accepted at the snapshot are not those of the accepted digest"
        found = [Finding("data", what, len(different))] if different else []
        note(Check("candidates at the snapshot, by the accepted digest", rows, len(different)), *found)
        return root
    whose = {
        # the rows have the root, so it is the table of leaves that was touched
        (True, False): "in `training_samples`, which the root does not bear out",
        (False, True): "at the snapshot, of which the recorded leaves and the root say otherwise",
        (False, False): "at the snapshot or in `training_samples`, neither of which the root bears out",
    }.get((root == wanted, recorded == wanted), "")
    for how in ("changed", "gone", "added"):
        if ids := [candidate for candidate, why in different if why == how]:
            found.append(named("data", f"rows of the training set {how} {whose}", ids))
    if not different and root != wanted:
        what = (
            f"the root of the rows is {root}, not {wanted}: no row can be named, because the recorded leaves "
            "were changed along with them, or a row is there twice"
        )
        found.append(Finding("data", what, 1))
    note(Check("rows at the snapshot, leaf by leaf and by the root", rows, len(different) or len(found)), *found)
    return root


def _now(
    connection: duckdb.DuckDBPyConnection, made: Mapping[str, Any], accepted: Mapping[str, Any], note: Note
) -> None:
    """The rows of now against those at the snapshot."""
    name = "rows of now, against those at the snapshot"
    (counts,) = connection.execute(
        "SELECT max(checkpoint) FROM rounds WHERE recipe = ? AND round = ?", [made["recipe"], made["round"]]
    ).fetchone()
    if counts != made["checkpoint"]:
        note(Check(name, 0, None, f"{made['round']} was begun again since, and {counts or 'nothing yet'} came of it"))
        return
    different = connection.execute(
        f"""SELECT coalesce(t.candidate_id, n.candidate_id), CASE WHEN n.candidate_id IS NULL THEN 'gone'
                WHEN t.candidate_id IS NULL THEN 'added' ELSE 'changed' END
            FROM at_snapshot t FULL JOIN (SELECT candidate_id, {_ROW} AS row FROM ({steps.ACCEPTED})) n
                ON n.candidate_id = t.candidate_id WHERE n.row IS DISTINCT FROM t.row""",
        accepted,
    ).fetchall()
    (rows,) = connection.execute("SELECT count(*) FROM at_snapshot").fetchone()
    found = [
        named("data", f"rows of the training set {how} since the snapshot", ids)
        for how in ("changed", "gone", "added")
        if (ids := [candidate for candidate, why in different if why == how])
    ]
    note(Check(name, rows, len(different)), *found)


def _root(connection: duckdb.DuckDBPyConnection, table: str) -> str:
    sql = f"SELECT coalesce(leaf, '') AS leaf FROM {table} ORDER BY candidate_id"
    return merkle.root(connection.execute(sql).to_arrow_table()["leaf"])
