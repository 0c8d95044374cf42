"""Revocations: what may no longer be trained on, and how a round complies.

Belongs here: the questions that the steps of a round ask. Not: writing a revocation, nor finding out what it
reaches (audit/revoke.py, audit/impact.py).

The table names every checkpoint that a revocation reached and, for a source or a text, every prompt and candidate
that it reached: these are looked up by id. Whatever comes later is recognised when it is read (prompts) or decided
on (texts, scorers).
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import duckdb

from rsft_pipeline import lineage
from rsft_pipeline.acceptance import UNIFORM_SQL
from rsft_pipeline.prompts import Ingest, Prompt, Refused
from rsft_pipeline.store import Store

REASON = "revoked"  # of a decision, and of a row in quarantine
EVERY = "*"  # instead of a recipe: all recipes, future ones too
OF = f"recipe IN ($recipe, '{EVERY}')"  # SQL: whether a revocation applies to a recipe

_CANDIDATES = "SELECT what FROM revocations WHERE kind = 'candidate'"
_PROMPTS = f"SELECT what FROM revocations WHERE kind = 'prompt' AND {OF}"
_CHECKPOINTS = "SELECT what FROM revocations WHERE kind = 'checkpoint'"
# SQL: whether a candidate, `c` of the table `candidates`, may be trained on. It needs `WITH` NAMED, so that
# DuckLake opens the table only once: opening it takes longer than reading it.
NAMED = "named AS MATERIALIZED (SELECT recipe, kind, what FROM revocations)"
ALLOWED = f"""
    c.candidate_id NOT IN (SELECT what FROM named WHERE kind = 'candidate')
    AND c.prompt_id NOT IN (SELECT what FROM named WHERE kind = 'prompt' AND {OF})
    AND c.policy NOT IN (SELECT what FROM named WHERE kind = 'checkpoint')"""

# Prompts by an earlier source of theirs, to be followed by `AND source = …`.
READ_BEFORE = "SELECT prompt_id FROM earlier_sources WHERE recipe = $recipe"
ANY = "SELECT 1 FROM revocations LIMIT 1"  # whether anything was revoked: usually nothing, and this is fastest


# --- prompts ---------------------------------------------------------------------------------


def spellings(words: str) -> list[str]:
    """The words as plain text and as JSON may escape them: columns, turns and refused rows are stored as JSON."""
    escaped = json.dumps(words)[1:-1]
    capital = re.sub(r"\\u[0-9a-f]{4}", lambda match: f"\\u{match[0][2:].upper()}", escaped)
    return sorted({words, json.dumps(words, ensure_ascii=False)[1:-1], escaped, capital})


def finder(words: str, encodings: Collection[str]) -> Callable[[bytes], bool]:
    """Tells whether a source's bytes have the words: in these encodings, as JSON or CSV writes them, or parsed."""
    written = {*spellings(words), *(each.replace("/", "\\/") for each in spellings(words)), words.replace('"', '""')}
    patterns = {pattern for each in written for pattern in _encoded(each, encodings)}

    def has(raw: bytes) -> bool:
        if any(pattern in raw for pattern in patterns):
            return True
        try:
            return _within(words, json.loads(raw))
        except (ValueError, RecursionError):
            return False

    return has


def _encoded(words: str, encodings: Collection[str]) -> Iterator[bytes]:
    """The words in those of the encodings that have all their characters: others cannot have written them."""
    for encoding in encodings:
        with suppress(UnicodeEncodeError):
            yield words.encode(encoding)


def _within(words: str, value: Any) -> bool:
    """Whether any string in a JSON value contains the words."""
    match value:
        case str():
            return words in value
        case list():
            return any(_within(words, part) for part in value)
        case dict():
            return any(_within(words, part) for pair in value.items() for part in pair)
    return False


def without(store: Store, recipe: str, read: Ingest) -> Ingest:
    """What was read, with revoked prompts moved to the refused rows and their bytes dropped."""
    rows = store.query(f"SELECT kind, what FROM revocations WHERE {OF}", {"recipe": recipe})
    if not rows:
        return read
    kinds = ("prompt", "source", "text", "refused")
    revoked = {kind: {row["what"] for row in rows if row["kind"] == kind} for kind in kinds}
    same = store.query(  # a text has the same hash in every recipe
        "SELECT DISTINCT same_text FROM prompts WHERE same_text IS NOT NULL AND list_contains($ids, prompt_id)",
        {"ids": list(revoked["prompt"])},
    )
    texts_revoked = revoked["prompt"] | {row["same_text"] for row in same}
    spelt = [each for words in revoked["text"] for each in spellings(words)]

    def is_revoked(prompt: Prompt) -> bool:
        texts = (prompt.text, prompt.reference or "", json.dumps(prompt.fields, ensure_ascii=False))
        return (
            lineage.same_text(prompt.text) in texts_revoked
            or prompt.source in revoked["source"]
            or any(words in text for words in spelt for text in texts)
        )

    out = [prompt for prompt in read.prompts if is_revoked(prompt)]
    copies = {f"the same text as line {prompt.line} of {prompt.source}" for prompt in out}

    def is_blank(row: Refused) -> bool:
        return (
            row.detail in copies
            or row.source in revoked["source"]
            or (bool(revoked["refused"]) and hashlib.sha256(row.raw).hexdigest() in revoked["refused"])
        )

    refused = [replace(row, raw=b"", detail="") if is_blank(row) else row for row in read.refused]
    ids = {prompt.prompt_id for prompt in out}
    return replace(
        read,
        prompts=[prompt for prompt in read.prompts if prompt.prompt_id not in ids],
        refused=refused + [Refused(prompt.source, prompt.line, b"", REASON, "") for prompt in out],
    )


# --- decisions -------------------------------------------------------------------------------


def set_aside(connection: duckdb.DuckDBPyConnection, table: str, recipe: str, seed: int) -> str:
    """Remove revoked candidates from a temporary table. Returns a SELECT of the decisions on the removed ones.

    The rule never sees them: other candidates take their places.

    Args:
        table: has the columns that acceptance.decisions_sql reads.
    """
    connection.execute(f"CREATE OR REPLACE TEMP TABLE revoked AS SELECT * FROM {table} LIMIT 0")
    if connection.execute(ANY).fetchone():
        of = {"recipe": recipe}
        connection.execute(f"INSERT INTO revoked SELECT * FROM {table} s WHERE {REVOKED}", of)
        connection.execute(f"DELETE FROM {table} WHERE candidate_id IN (SELECT candidate_id FROM revoked)")
    return f"""SELECT candidate_id, prompt_id, false AS accepted, '{REASON}' AS reason, score, NULL::DOUBLE AS log_a,
        {UNIFORM_SQL.format(seed=int(seed))} AS u, 1::DOUBLE AS weight FROM revoked"""


# SQL: whether a candidate `s`, drawn or decided on, is revoked.
REVOKED = f"""
    s.candidate_id IN ({_CANDIDATES}) OR s.prompt_id IN ({_PROMPTS})
    OR s.candidate_id IN (
        SELECT c.candidate_id FROM candidates c JOIN revocations r ON contains(c.text, r.what)
        WHERE c.recipe = $recipe AND r.{OF} AND r.kind = 'text')"""


def of_round(store: Store, weights: list[str], versions: dict[str, str]) -> str | None:
    """Why a round with these weights and scorer versions cannot continue, in words; None if it can."""
    if not store.query(ANY):
        return None
    rows = store.query(
        """SELECT * FROM revocations WHERE (kind = 'checkpoint' AND list_contains($weights, what))
           OR (kind = 'scorer' AND list_contains($versions, what)) ORDER BY revoked_at LIMIT 1""",
        {"weights": weights, "versions": list(versions.values())},
    )
    if not rows:
        return None
    name = {version: name for name, version in versions.items()}.get(rows[0]["what"])
    return said(rows[0], f"scorer `{name}`, version {rows[0]['what']}," if name else None)


# --- checkpoints -----------------------------------------------------------------------------


def of_weights(store: Store, digest: str) -> str | None:
    """Why these weights may not be used any further, in words; None if they may."""
    return of_round(store, [digest], {})


def of_checkpoint(store: Store, recipe: str, digest: str) -> str | None:
    """The same for a checkpoint and all it was made from: it may have been trained while the revocation was written."""
    if not store.query(ANY):
        return None
    if why := of_weights(store, digest):
        return why
    made = {"recipe": recipe, "checkpoint": digest}
    came_of = store.query(
        """SELECT parent, policy, drawn_from, json_extract_string(meta, '$.scorers[*]') AS scorers FROM checkpoints
           WHERE recipe = $recipe AND checkpoint = $checkpoint""",
        made,
    )
    for row in came_of:
        weights = [row["parent"], row["drawn_from"] or row["policy"]]
        if why := of_round(store, weights, {version: version for version in row["scorers"]}):
            return why
    rows = store.query(
        f"""SELECT c.candidate_id, c.prompt_id, c.policy FROM training_samples d
            JOIN (SELECT candidate_id, prompt_id, policy FROM candidates WHERE recipe = $recipe) c
                ON c.candidate_id = d.candidate_id
            WHERE d.recipe = $recipe AND d.checkpoint = $checkpoint
              AND (c.candidate_id IN ({_CANDIDATES}) OR c.prompt_id IN ({_PROMPTS}) OR c.policy IN ({_CHECKPOINTS}))
            LIMIT 1""",
        made,
    )
    ids = [id_ for row in rows for id_ in row.values()]
    why = store.query("SELECT * FROM revocations WHERE list_contains(?, what) LIMIT 1", [ids]) if ids else []
    return said(why[0]) if why else None


def lift(connection: duckdb.DuckDBPyConnection, digest: str) -> None:
    """Lift a revocation from weights that it reached, after they came out the same without what was revoked."""
    connection.execute("DELETE FROM revocations WHERE kind = 'checkpoint' AND what = ? AND cause IS NOT NULL", [digest])


def unspoken(kind: str, what: str) -> str:
    """The name of something revoked, without quoting text: the hash of a text, `what` for anything else."""
    if kind != "text" or re.fullmatch("sha256 [0-9a-f]{64}", what):  # an erased text is already named by its hash
        return what
    return f"sha256 {hashlib.sha256(what.encode()).hexdigest()}"


def printable(text: str) -> str:
    """A text that somebody gave, safe for a terminal: unprintable characters are escaped."""
    return text if text.isprintable() else repr(text)


def said(row: dict[str, Any], what: str | None = None, *, spoken: bool = False) -> str:
    """A revocation in words.

    Args:
        what: what was revoked, if its kind and id do not say it well.
        spoken: whether a revoked text may be quoted. In words that are stored it must not: it may have to be erased.
    """

    def called(kind: str, name: str) -> str:
        return f"{kind} {printable(name if spoken else unspoken(kind, name))}"

    kind, _, name = (row["cause"] or "").partition(" ")
    because = f" with {called(kind, name)}" if kind else ""
    return (
        f"{what or called(row['kind'], row['what'])} was revoked{because} by {printable(row['who'])}: "
        f"{printable(row['why'])}"
    )
