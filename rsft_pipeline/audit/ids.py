"""Ids: from what a person typed to the thing in the store.

Belongs here: finding the one candidate, prompt, round … that an id, the beginning of one, or a position
means. Not: what is then asked about it.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from rsft_pipeline.audit.reading import at_once
from rsft_pipeline.recipe import reading
from rsft_pipeline.revocations import unspoken
from rsft_pipeline.store import Query, Store

Kind = Literal["candidate", "prompt", "source", "scorer", "checkpoint", "text"]
SHORTEST = 4  # the fewest hex digits that are looked up as the beginning of an id
NAMED = 8  # the most possibilities that a message names
MATCHES = 20  # the most candidates that `containing` returns


class AuditError(ValueError):
    """A question that cannot be answered: the message says what was looked for and what exists."""


class Ambiguous(AuditError):
    """Several things match: the message names them."""


@dataclass(frozen=True)
class Thing:
    """Something that can be asked about, or revoked."""

    kind: Kind
    what: str  # its id, digest, version or name; for a text, the text itself
    recipes: tuple[str, ...]  # those that have it
    everywhere: bool = False  # no recipe was named: for a prompt or a text, future recipes are meant too

    @property
    def words(self) -> str:
        return f"{self.kind} {self.what!r}" if self.kind in ("source", "text") else f"{self.kind} {self.what}"

    @property
    def unspoken(self) -> str:
        """Its name, without quoting text: the hash of a text, `what` for anything else."""
        return unspoken(self.kind, self.what)


def recipes(store: Store) -> list[str]:
    """The recipes of which there is anything in the store."""
    rows = store.query("SELECT DISTINCT recipe FROM rounds UNION SELECT DISTINCT recipe FROM prompts ORDER BY 1")
    return [row["recipe"] for row in rows]


def check_recipe(store: Store, recipe: str) -> None:
    """Raise AuditError, naming the known recipes, if there is no such recipe."""
    there = recipes(store)
    if recipe not in there:
        near = reading.nearest(recipe, there)
        raise AuditError(f"no recipe here is called {recipe!r}; there is {', '.join(there) or 'none'}.{near}")


def check_round(store: Store, recipe: str, round_key: str) -> None:
    """Raise AuditError, naming the known ones, if there is no such recipe, or it has no such round."""
    if round_key not in (there := rounds(store, recipe)):
        check_recipe(store, recipe)
        raise AuditError(f"{recipe} has no round {round_key!r}; there is {_named(there)}")


def check_not_recipe(store: Store, typed: str) -> None:
    """Raise AuditError, naming its rounds, if what was typed for a checkpoint is a recipe's name."""
    if typed in recipes(store):
        raise AuditError(f"{typed} is a recipe: give a round, too; there is {_named(rounds(store, typed))}")


def rounds(store: Store, recipe: str) -> list[str]:
    """The rounds of a recipe that were begun, in order."""
    return [row["round"] for row in store.query("SELECT round FROM rounds WHERE recipe = ? ORDER BY round", [recipe])]


def _named(rounds: list[str]) -> str:
    return ", ".join(rounds) or "none" if len(rounds) <= NAMED else f"{rounds[0]} to {rounds[-1]}"


def thing(store: Store, typed: str, recipe: str | None = None) -> Thing:
    """What was meant: a candidate, prompt, checkpoint or scorer's version by its id or the beginning of it; a
    scorer by its name if it has only one version; or a source of prompts by its name.

    Raises:
        AuditError: nothing matches, or several things do.
    """
    return at_once(store, lambda query: _thing(query, typed, recipe))


def _thing(query: Query, typed: str, recipe: str | None) -> Thing:
    found: dict[tuple[str, str], set[str]] = {}
    for kind, sql in [*(_BY_ID.items() if _hex(typed) else ()), *_NAMED.items()]:
        for row in query(sql, {**_range(typed), "recipe": recipe}):
            found.setdefault((kind, row["what"]), set()).add(row["recipe"])
        if kind in _BY_ID and _hex(typed) and (kind, typed) in found:  # a complete hash is unique
            found = {(kind, typed): found[kind, typed]}
            break
    (kind, what), there = _only(found, typed)
    if kind == "scorer":  # a version means the same in every recipe, and is revoked in all
        there = {
            row["recipe"] for row in query("SELECT DISTINCT recipe FROM scores WHERE version = $what", {"what": what})
        }
    return Thing(kind, what, tuple(sorted(there)), everywhere=recipe is None)


_IN = "($recipe IS NULL OR recipe = $recipe)"
_RANGE = "BETWEEN $first AND $last"
_BY_ID = {  # the smallest table first
    # Weights that no round made, such as a base model's or a teacher's, are known by the rounds that used them.
    "checkpoint": f"""SELECT recipe, checkpoint AS what FROM checkpoints WHERE checkpoint {_RANGE} AND {_IN}
        UNION SELECT recipe, policy FROM rounds WHERE policy {_RANGE} AND {_IN}
        UNION SELECT recipe, drawn_from FROM rounds WHERE drawn_from {_RANGE} AND {_IN}
        UNION SELECT recipe, parent FROM checkpoints WHERE parent {_RANGE} AND {_IN}""",
    "prompt": f"SELECT recipe, prompt_id AS what FROM prompts WHERE prompt_id {_RANGE} AND {_IN} LIMIT 99",
    "scorer": f"SELECT DISTINCT recipe, version AS what FROM scores WHERE version {_RANGE} AND {_IN} LIMIT 99",
    "candidate": f"SELECT recipe, candidate_id AS what FROM candidates WHERE candidate_id {_RANGE} AND {_IN} LIMIT 99",
}
_NAMED = {
    "source": f"""SELECT recipe, source AS what FROM prompts WHERE source = $typed AND {_IN}
        UNION SELECT recipe, source FROM earlier_sources WHERE source = $typed AND {_IN}""",
    "scorer": f"SELECT DISTINCT recipe, version AS what FROM scores WHERE scorer = $typed AND {_IN}",
}


def _hex(typed: str) -> bool:
    return re.fullmatch(f"[0-9a-f]{{{SHORTEST},32}}", typed) is not None


def _range(typed: str) -> dict[str, str]:
    """Ids that begin with `typed` as a range, because the files' statistics let DuckDB skip by ranges."""
    return {"typed": typed, "first": typed, "last": typed + "g"}


def _only(found: dict[tuple[str, str], Any], typed: str) -> tuple[tuple[str, str], Any]:
    if len(found) == 1:
        return next(iter(found.items()))
    if not found:
        raise AuditError(
            f"nothing here is called {typed!r}: give the id of a candidate, prompt, checkpoint or scorer version (its "
            f"first {SHORTEST} digits or more), a scorer's name, a source as `prompts.source` has it, or --text"
        )
    named = ", ".join(" ".join(key) for key in sorted(found)[:NAMED])
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    raise Ambiguous(f"{typed!r} could be {named}{more}: give the whole id of the one that is meant")


def text(store: Store, words: str, recipe: str | None = None) -> Thing:
    """A text that prompts or completions may contain. Raises AuditError for an empty one."""
    if not words.strip():
        raise AuditError("an empty text is in everything: give some words")
    if recipe:
        check_recipe(store, recipe)
    return Thing("text", words, tuple([recipe] if recipe else recipes(store)), everywhere=recipe is None)


# --- candidates ------------------------------------------------------------------------------


def candidate(query: Query, typed: str, recipe: str | None = None) -> dict[str, Any]:
    """The row of the one candidate that an id, or the beginning of one, means. Raises AuditError if not exactly one."""
    if not _hex(typed):
        raise AuditError(f"{typed!r} is no candidate's id: {SHORTEST} to 32 of the digits 0-9 and a-f")
    meant = _RANGE if len(typed) < 32 else "= $typed"  # faster
    sql = f"SELECT * FROM candidates WHERE candidate_id {meant} AND {_IN} LIMIT {NAMED + 1}"
    rows = query(sql, {**_range(typed), "recipe": recipe})
    if not rows:
        raise AuditError(f"no candidate's id begins with {typed}")
    named = sorted({row["candidate_id"] for row in rows})
    if len(named) > 1:
        raise AuditError(f"{typed} is the beginning of {len(named)} candidates or more: {', '.join(named[:NAMED])}")
    return rows[0]


def accepted(store: Store, recipe: str, round_key: str, place: int) -> str:
    """The id at a position in a round's accepted set, from 1 in the order of ids. Raises AuditError if it has none."""
    check_round(store, recipe, round_key)
    of = [recipe, round_key]
    those = "FROM decisions WHERE recipe = ? AND round = ? AND accepted"
    there = store.value(f"SELECT count(*) {those}", of)
    if not 1 <= place <= there:
        raise AuditError(f"{recipe} {round_key} has {there} accepted candidates: there is no number {place}")
    return store.value(f"SELECT candidate_id {those} ORDER BY candidate_id LIMIT 1 OFFSET ?", [*of, place - 1])


@dataclass(frozen=True)
class Match:
    """A candidate that contains a text."""

    recipe: str
    round: str
    candidate_id: str
    split: str | None  # of its prompt; `eval`: held out, never decided on. None: the prompt is gone
    accepted: bool | None  # None: it was not decided on
    text: str


def containing(store: Store, words: str, recipe: str | None = None) -> tuple[list[Match], int]:
    """The first candidates whose completion contains exactly this text, accepted ones first, and how many there are in
    all."""
    words = text(store, words, recipe).what
    rows = store.query(
        f"""WITH found AS (SELECT recipe, round, candidate_id, prompt_id, text FROM candidates
                WHERE contains(text, $words) AND {_IN})
            SELECT f.recipe, f.round, f.candidate_id, p.split, d.accepted, f.text, count(*) OVER () AS n FROM found f
            LEFT JOIN prompts p ON p.recipe = f.recipe AND p.prompt_id = f.prompt_id
            LEFT JOIN (SELECT recipe, candidate_id, bool_or(accepted) AS accepted FROM decisions
                       WHERE candidate_id IN (SELECT candidate_id FROM found) GROUP BY recipe, candidate_id) d
                ON d.recipe = f.recipe AND d.candidate_id = f.candidate_id
            ORDER BY d.accepted DESC NULLS LAST, f.recipe, f.round, f.candidate_id LIMIT $limit""",
        {"words": words, "recipe": recipe, "limit": MATCHES},
    )
    there = [row.pop("n") for row in rows]
    return [Match(**row) for row in rows], there[0] if there else 0
