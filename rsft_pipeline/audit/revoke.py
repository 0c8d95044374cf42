"""Revoke: take something out of use, recording who, when and why, and say what has to be made again without it.

Belongs here: writing revocations, marking the rounds to run again, and removing texts. Not: what a revocation
reaches (impact.py), nor how rounds comply with it (revocations.py).

Nothing is deleted except, with `erase`, texts: ids, hashes, scores and decisions stay, and so do, in older snapshots
of the store, the rows of rounds that are run again.
"""

import hashlib
from dataclasses import dataclass, replace

import duckdb

from rsft_pipeline import revocations, rounds
from rsft_pipeline.audit.ids import AuditError, Thing
from rsft_pipeline.audit.impact import Impact, follow
from rsft_pipeline.audit.reading import on, snapshots
from rsft_pipeline.store import Store, insert

ERASABLE = ("candidate", "prompt", "source", "text")  # what people wrote, or a model wrote in answer


@dataclass(frozen=True)
class Revoked:
    """What a revocation did."""

    impact: Impact  # as found before the revocation
    who: str
    why: str
    marked: list[tuple[str, str]]  # recipe and round: those that `rsft run` will run again
    erased: dict[str, int]  # table → rows whose text was removed
    keeping: list[int]  # snapshots from which the erased texts can still be read; `Store.forget` removes them


def revoke(store: Store, thing: Thing, *, who: str, why: str, erase: bool = False) -> Revoked:
    """Record a revocation of a thing and of what it reached. Doing it again covers what has been added since.

    Raises:
        AuditError: no person or no reason is given, or a scorer or checkpoint is to be erased.
    """
    if not who.strip() or not why.strip():
        raise AuditError("a revocation needs somebody who is responsible and a reason: give both")
    if erase and thing.kind not in ERASABLE:
        raise AuditError(f"a {thing.kind} has no text to erase: that goes for {', '.join(ERASABLE)}")

    def work(connection) -> Revoked:
        found = follow(on(connection), thing)
        erased, refused = _erase(connection, thing) if erase else ({}, [])
        _record(connection, found, refused, who, why, erase)
        for recipe in thing.recipes:
            connection.execute(
                """UPDATE prompts SET active = false WHERE recipe = $recipe AND active
                   AND prompt_id IN (SELECT prompt_id FROM touched_prompts WHERE recipe = $recipe)""",
                {"recipe": recipe},
            )
        marked = [(one.recipe, one.round) for one in found.again]
        for recipe, round_key in marked:
            rounds.mark_revoked(connection, recipe, round_key)
        return Revoked(found, who, why, marked, erased, [])

    before = sorted(snapshots(store.query))
    done = store.commit(work)
    return replace(done, keeping=before) if erase else done


def _record(
    connection: duckdb.DuckDBPyConnection, found: Impact, refused: list[str], who: str, why: str, erased: bool
) -> None:
    """Record who revoked the thing and why, every time, and each thing reached by it that is not yet recorded."""
    thing = found.thing
    what = thing.unspoken if erased else thing.what
    name = f"{thing.kind} {what}"
    every = [revocations.EVERY] if thing.everywhere and thing.kind in ("prompt", "text") else []
    recipes = [*thing.recipes, *every]
    rows = [(recipe, thing.kind, what, None) for recipe in recipes]
    rows += [(recipe, "refused", one, name) for recipe in recipes for one in refused]
    rows += [(one.recipe, "checkpoint", one.checkpoint, name) for one in found.checkpoints if one.checkpoint != what]
    if thing.kind in ("prompt", "source", "text"):
        touched = "SELECT DISTINCT recipe, prompt_id FROM touched_prompts"
        others = [row for row in connection.execute(touched).fetchall() if row[1] != what]
        others += [(recipe, prompt) for recipe in every for prompt in {prompt for _, prompt in others}]
        rows += [(recipe, "prompt", prompt, name) for recipe, prompt in others]
    if thing.kind == "text":
        touched = "SELECT recipe, candidate_id FROM touched"
        rows += [(recipe, "candidate", one, name) for recipe, one in connection.execute(touched).fetchall()]
    known = set(connection.execute("SELECT recipe, kind, what FROM revocations").fetchall())
    rows = [row for row in rows if row[3] is None or row[:3] not in known]
    new = [dict(zip(("recipe", "kind", "what", "cause"), row, strict=True)) for row in rows]
    (now,) = connection.execute("SELECT now()").fetchone()
    insert(
        connection, "revocations", [{**row, "who": who, "why": why, "revoked_at": now, "erased": erased} for row in new]
    )
    if erased:
        erase = f"UPDATE revocations SET erased = true WHERE {_OF} AND kind = ? AND what = ? AND NOT erased"
        connection.execute(erase, [recipes, thing.kind, what])
    if what != thing.what:  # an erased text, which may have been revoked in plain words before
        recipes = [*thing.recipes, revocations.EVERY]
        hashed = f"UPDATE revocations SET what = ?, erased = true WHERE {_OF} AND kind = 'text' AND what = ?"
        connection.execute(hashed, [what, recipes, thing.what])
        plain = f"{thing.kind} {thing.what}"
        connection.execute(
            f"UPDATE revocations SET cause = ?, erased = true WHERE {_OF} AND cause = ?", [name, recipes, plain]
        )


_OF = "list_contains(?, recipe)"


# --- texts -------------------------------------------------------------------------------------


def _erase(connection: duckdb.DuckDBPyConnection, thing: Thing) -> tuple[dict[str, int], list[str]]:
    """Remove the texts of everything in the temporary tables `touched` and `touched_prompts`, and of refused copies.

    Returns:
        How many rows of each table, and the SHA-256 of the refused rows, to recognise them if the source is read again.
    """
    done, refused = {"prompts": 0, "candidates": 0, "quarantine": 0}, []
    for recipe in thing.recipes:
        of = {"recipe": recipe}
        refused += (hashes := _erase_refused(connection, thing, recipe))
        done["quarantine"] += len(hashes)
        for table, sets, ids in (
            ("prompts", "text = NULL, messages = NULL, reference = NULL, fields = NULL", "touched_prompts"),
            ("candidates", "text = NULL, token_ids = NULL", "touched"),
        ):
            id_ = "prompt_id" if table == "prompts" else "candidate_id"
            where = f"""recipe = $recipe AND text IS NOT NULL
                AND {id_} IN (SELECT {id_} FROM {ids} WHERE recipe = $recipe)"""
            done[table] += connection.execute(f"SELECT count(*) FROM {table} WHERE {where}", of).fetchone()[0]
            connection.execute(f"UPDATE {table} SET {sets} WHERE {where}", of)
    return done, refused


def _erase_refused(connection: duckdb.DuckDBPyConnection, thing: Thing, recipe: str) -> list[str]:
    """The same for refused rows: those of the source, with the text, or that are copies of a prompt."""
    of = {"recipe": recipe}
    copies = connection.execute(
        """SELECT concat('the same text as line ', p.line, ' of ', p.source) FROM prompts p WHERE p.recipe = $recipe
           AND p.prompt_id IN (SELECT prompt_id FROM touched_prompts WHERE recipe = $recipe)""",
        of,
    ).fetchall()
    encodings = connection.execute(
        "SELECT DISTINCT settings::JSON ->> '$.prompts.encoding' FROM rounds WHERE recipe = $recipe", of
    ).fetchall()
    has = revocations.finder(thing.what, {"utf-8", *(encoding for (encoding,) in encodings if encoding)})
    rows = connection.execute(
        "SELECT rowid, source, raw, detail FROM quarantine WHERE recipe = $recipe AND octet_length(raw) > 0", of
    ).fetchall()
    found = {
        rowid: hashlib.sha256(raw).hexdigest()
        for rowid, source, raw, detail in rows
        if (thing.kind == "source" and source == thing.what)
        or (detail,) in copies
        or (thing.kind == "text" and (has(raw) or thing.what in (detail or "")))
    }
    sql = "UPDATE quarantine SET raw = ''::BLOB, detail = '' WHERE recipe = $recipe AND list_contains($rows, rowid)"
    connection.execute(sql, {**of, "rows": list(found)})
    return list(found.values())
