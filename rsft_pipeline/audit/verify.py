"""Verify: whether a checkpoint's weights and training set are still what they were when it was trained.

Belongs here: comparing the weights with their hashes, the record with its copies, and the Merkle root in every place
where it was recorded. Not: comparing the rows of the training set (training_set.py), nor whether these should have
been accepted (replay.py).
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb

from rsft_pipeline import models
from rsft_pipeline.audit import ids, training_set
from rsft_pipeline.audit.findings import Check, Finding, Notes, read
from rsft_pipeline.audit.ids import AuditError
from rsft_pipeline.audit.reading import snapshots
from rsft_pipeline.home import Home
from rsft_pipeline.models import checkpoints
from rsft_pipeline.store import Store


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
    digests = sorted({row["checkpoint"] for row in rows})
    if len(digests) > 1:
        raise AuditError(f"{len(digests)} checkpoints begin with {checkpoint!r}: {', '.join(digests[:5])}")
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
    snapshot = made["snapshot"] if made["snapshot"] in snapshots(store.query) else None

    def rows(connection: duckdb.DuckDBPyConnection, note: Notes) -> str | None:
        return training_set.compare(connection, made, meta, snapshot, note)

    root = read(store, training_set.TABLES, note, rows, snapshot)
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
    key_of = {"snapshot": "store_snapshot", **{column: column for column in made if column in meta}}
    copied = {column: meta[key] for column, key in key_of.items() if key in meta and made[column] is not None}
    wrong = {column: value for column, value in copied.items() if made[column] != value}
    listed = "; ".join(f"{column} {made[column]!r}, and its record {value!r}" for column, value in wrong.items())
    what = f"the table `checkpoints` has for {made['checkpoint']} the {listed}"
    note(Check(name, len(copied), len(wrong)), Finding("data", what, len(wrong)))

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
        changed = checkpoints.verify(saved, anew=True)
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
    root_at = dict(witnesses)
    if folder.is_dir():
        root_at[f"{folder / checkpoints.META}"] = _meta(folder).get("merkle_root")
        card = folder / "README.md"
        text = card.read_text("utf-8", "replace") if card.is_file() else ""
        # The card is for people, who may have edited it: only a different root in it counts.
        if found := re.search(r"Merkle root \| `([^`]*)`", text):
            root_at[f"{card}"] = found[1]
    if wanted is None and not any(root_at.values()):
        note(Check(name, 0, None, "no root was recorded when this checkpoint was trained"))
        return
    wrong = {place: root for place, root in root_at.items() if root != wanted}
    listed = "; ".join(f"{place} says {root or 'nothing'}" for place, root in wrong.items())
    what = f"the table `checkpoints` has the root {wanted or '(none)'}, but {listed}"
    note(Check(name, len(root_at) + 1, len(wrong)), Finding("data", what, len(wrong)))


def _meta(folder) -> dict[str, Any]:
    try:
        return dict(checkpoints.read_meta(folder))
    except (TypeError, ValueError):  # no longer JSON; the check of the weights has noted that
        return {}
