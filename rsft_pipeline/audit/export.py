"""Export: a checkpoint's training set, row by row with where each came from, in standard formats.

Belongs here: the rows, Parquet or JSON lines, and what their columns are. A description (croissant.py) and the
runs that led to them (openlineage.py) are written beside them. Not: publishing any of it.

Erased texts are not brought back: prompts are read as of the checkpoint's snapshot, since references may have
changed since, but without the texts that are erased by now.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rsft_pipeline.audit import croissant, openlineage
from rsft_pipeline.audit.ids import AuditError, thing
from rsft_pipeline.audit.reading import on, snapshots
from rsft_pipeline.revocations import of_checkpoint
from rsft_pipeline.steps.rows import of_scorers
from rsft_pipeline.store import Query, Store

PARTIAL = ".partial"  # the sub-folder of an export that is not complete; what a killed one left there is replaced
EXTRA = "pip install 'rsft-pipeline[audit]'"

# Column → its description, in the order of the file.
COLUMNS = {
    "prompt": "The prompt, as the tokenizer got it.",
    "chat": "Whether the recipe has messages: then a chat template's special tokens are in the prompt.",
    "completion": "What the policy answered.",
    "token_ids": "The completion's tokens, as they were sampled and trained on.",
    "weight": "The sample's weight in the training loss.",
    "reference": "The reference answer, where the source has one.",
    "source": "Where the prompt comes from: a file, data set or function.",
    "line": "The line or row of the source, counted from 1.",
    "score": "The combined score.",
    "scores": "JSON: what each scorer said, with its version.",
    "reason": "Of the decision.",
    "u": "The decision's uniform draw; it follows from the candidate's id and the recipe's seed.",
    "log_a": "The logarithm of the acceptance probability, where the rule has one.",
    "parameters": "JSON: the acceptance rule, its settings, and what it estimated.",
    "round": "The round that drew it and decided on it.",
    "draw": "The index of the draw for its prompt.",
    "origin": "What drew it: the policy, a teacher, or nothing (a reference).",
    "policy": "Digest of the weights that it was drawn from.",
    "settings": "Hash of the sampling settings and the seed.",
    "seed": "Of the draw's own random stream.",
    "log_q": "Log-probability under the distribution that was sampled from.",
    "log_p": "Log-probability under those weights as they are.",
    "finish_reason": "`stop` or `length`.",
    "recipe": "The recipe.",
    "checkpoint": "Digest of the weights that were trained on it.",
    "prompt_id": "Hash of the prompt's text, every space of it.",
    "candidate_id": "Hash of recipe, round, policy, prompt, draw and settings.",
    "leaf": "The row's hash, of which the checkpoint's Merkle root is made.",
}
NUMBERS = ("weight", "score", "log_a", "u", "log_q", "log_p")  # columns that may have fractions


@dataclass(frozen=True)
class Exported:
    """What was written."""

    recipe: str
    round: str
    checkpoint: str
    samples: int
    files: list[str]
    notes: list[str]  # what a reader should know: what was revoked, erased, or not written


def export(
    store: Store,
    checkpoint: str,
    to: Path,
    form: Literal["parquet", "jsonl"] = "parquet",
    recipe: str | None = None,
    round_key: str | None = None,
) -> Exported:
    """Write the training set of a checkpoint to a folder: rows, `croissant.json` and `openlineage.jsonl`.

    Args:
        checkpoint: its digest, or the beginning of it.
        to: the folder; it is created if missing, and must be empty. Its files appear once they are complete.
        recipe, round_key: whose training set, if several gave the same weights; None: the first one's.

    Raises:
        AuditError: no round made such weights, or the folder is not empty.
    """
    digest = _checkpoint(store, checkpoint, recipe)
    to = Path(to).expanduser().resolve()
    if to.exists() and (not to.is_dir() or any(path.name != PARTIAL for path in to.iterdir())):
        raise AuditError(f"{to} is not an empty folder: give a new one")
    partial = to / PARTIAL
    rows = partial / f"training_set.{form}"

    def work(connection) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
        query = on(connection)
        made = _made(query, digest, recipe, round_key)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        sql, parameters, notes = _rows(query, made, form)
        how = "FORMAT parquet, COMPRESSION zstd" if form == "parquet" else "FORMAT json"
        connection.execute(f"COPY ({sql}) TO {_quoted(rows)} ({how})", parameters)
        return made, openlineage.history(query, made), notes

    made, history, notes = store.commit(work)
    if why := of_checkpoint(store, made["recipe"], made["checkpoint"]):
        notes.append(why)
    names = [rows.name]
    for name, write in (
        ("croissant.json", lambda path: croissant.write(path, rows, made, COLUMNS, NUMBERS)),
        ("openlineage.jsonl", lambda path: openlineage.write(path, to / rows.name, history, COLUMNS)),
    ):
        try:
            write(partial / name)
            names.append(name)
        except ImportError as error:
            notes.append(f"{name} was not written, for want of {error.name}: {EXTRA}")
    files = [str((partial / name).replace(to / name)) for name in names]
    shutil.rmtree(partial)
    return Exported(made["recipe"], made["round"], made["checkpoint"], made["samples"], files, notes)


def _checkpoint(store: Store, typed: str, recipe: str | None) -> str:
    """The digest of the one checkpoint that is meant, even if ids of other kinds begin the same."""
    sql = "SELECT DISTINCT checkpoint FROM checkpoints WHERE starts_with(checkpoint, ?)"
    if len(found := store.query(sql, [typed])) == 1:
        return found[0]["checkpoint"]
    named = thing(store, typed, recipe)
    if named.kind != "checkpoint":
        raise AuditError(f"{named.what} is a {named.kind}, not a checkpoint")
    return named.what


def _made(query: Query, digest: str, recipe: str | None, round_key: str | None) -> dict[str, Any]:
    rows = query(
        """SELECT * EXCLUDE (meta), json_extract_string(meta, '$.scorers[*]') AS scorers, meta FROM checkpoints
           WHERE checkpoint = $checkpoint AND ($recipe IS NULL OR recipe = $recipe)
             AND ($round IS NULL OR round = $round) ORDER BY snapshot LIMIT 1""",
        {"checkpoint": digest, "recipe": recipe, "round": round_key},
    )
    if not rows:
        raise AuditError(f"no round made the weights {digest}: they have no training set here")
    return rows[0]


# --- rows -------------------------------------------------------------------------------------


def _rows(query: Query, made: dict[str, Any], form: str) -> tuple[str, dict[str, Any], list[str]]:
    """SQL of the rows in the order of their ids, its parameters, and what to note."""
    kept = made["snapshot"] in snapshots(query)
    at = f"AT (VERSION => {int(made['snapshot'])})" if kept else ""
    notes = [] if kept else [f"the snapshot {made['snapshot']} is gone: decisions and prompts are as they are now"]
    (erased,) = query(
        """SELECT count(*) AS n FROM training_samples t JOIN candidates c ON c.candidate_id = t.candidate_id
           WHERE t.recipe = $recipe AND t.round = $round AND t.checkpoint = $checkpoint AND c.recipe = $recipe
             AND c.text IS NULL""",
        made,
    )
    if erased["n"]:
        notes.append(f"the texts of {erased['n']} of the samples were erased")
    finite = {name: f"CASE WHEN isfinite({name}) THEN {name} END AS {name}" for name in NUMBERS if form == "jsonl"}
    sql = _ROWS.format(at=at, columns=", ".join(finite.get(name, name) for name in COLUMNS))
    of = {key: made[key] for key in ("recipe", "round", "checkpoint")}
    return sql, {**of, "scorers": _scorers(query, made, at)}, notes


def _scorers(query: Query, made: dict[str, Any], at: str) -> list[str]:
    """The scorers behind the decisions, as round, name and version: a renamed scorer counts only under the name that
    the round recorded."""
    if not made["scorers"]:  # from before they were recorded
        return []
    rows = query(f"SELECT round, scorers FROM rounds {at} WHERE recipe = $recipe AND round <= $round", made)
    return [f"{row['round']} {one}" for row in rows for one in of_scorers(json.loads(row["scorers"] or "{}"))]


_ROWS = """
    WITH chosen AS (
        SELECT candidate_id, weight, leaf FROM training_samples
        WHERE recipe = $recipe AND round = $round AND checkpoint = $checkpoint
    ), drawn AS (
        SELECT c.* FROM candidates c SEMI JOIN chosen t ON t.candidate_id = c.candidate_id WHERE c.recipe = $recipe
    ), asked AS (
        SELECT n.prompt_id, t.chat, t.source, t.line, t.content, CASE WHEN n.text IS NOT NULL THEN t.text END AS prompt,
            CASE WHEN n.text IS NOT NULL THEN t.reference END AS reference
        FROM prompts n JOIN (SELECT * FROM prompts {at}) t ON t.prompt_id = n.prompt_id
        WHERE n.recipe = $recipe AND t.recipe = $recipe
    ), judged AS (
        SELECT s.candidate_id,
            json_group_object(s.scorer, json_object('version', s.version, 'value', s.value))::VARCHAR AS scores
        FROM scores s JOIN drawn c ON c.candidate_id = s.candidate_id JOIN asked p ON p.prompt_id = c.prompt_id
        WHERE s.recipe = $recipe AND list_contains($scorers, s.round || ' ' || s.scorer || ' ' || s.version)
            AND s.content = p.content
        GROUP BY s.candidate_id
    ), ready AS (
        SELECT p.prompt, p.chat, c.text AS completion, c.token_ids, t.weight, p.reference, p.source, p.line, d.score,
            j.scores, d.reason, d.u, d.log_a, d.parameters, c.round, c.draw, c.origin, c.policy, c.settings, c.seed,
            c.log_q, c.log_p, c.finish_reason, c.recipe, $checkpoint AS checkpoint, c.prompt_id, c.candidate_id, t.leaf
        FROM chosen t JOIN drawn c ON c.candidate_id = t.candidate_id
        LEFT JOIN asked p ON p.prompt_id = c.prompt_id
        LEFT JOIN (SELECT * FROM decisions {at} WHERE recipe = $recipe) d ON d.candidate_id = c.candidate_id
        LEFT JOIN judged j ON j.candidate_id = c.candidate_id
    )
    SELECT {columns} FROM ready ORDER BY candidate_id"""


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"
