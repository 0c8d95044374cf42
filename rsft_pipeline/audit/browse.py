"""Browse: lists of what the store holds, filtered, ordered, and read page by page.

Belongs here: the SQL behind lists that people page through. Not: what became of one thing (trace.py, impact.py),
nor how a list is shown (web/).

A page is found by the key of the last row before it, never by counting rows, so the thousandth page costs as much as
the first. Long texts are truncated in the query. Rows are looked up by their prompt as well as by their own id: ids
are hashes in no order, but the rows of a prompt are stored together, so DuckDB can skip the others.
"""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsft_pipeline.audit.ids import AuditError
from rsft_pipeline.audit.impact import MADE, descend
from rsft_pipeline.audit.reading import at_once, named
from rsft_pipeline.audit.trace import EARLIER, REVOKED
from rsft_pipeline.revocations import EVERY, OF, said
from rsft_pipeline.store import Query, Store

ROWS = 25  # on a page
SNIPPET = 240  # characters of a text in a list
BINS = 30  # in a distribution of scores

# --- rounds ----------------------------------------------------------------------------------


def rounds(store: Store, recipe: str | None = None) -> dict[str, list[dict]]:
    """Every round by recipe, in order, with its promotion metric in `metric`."""
    rows = store.query(
        """SELECT * EXCLUDE (settings), settings::JSON ->> '$.promotion.metric' AS metric,
                settings::JSON ->> '$.acceptance.rule' AS rule
           FROM rounds WHERE $recipe IS NULL OR recipe = $recipe ORDER BY recipe, round""",
        {"recipe": recipe},
    )
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["recipe"], []).append(row)
    return found


@dataclass(frozen=True)
class Distribution:
    """How many candidates have a score in each of BINS equal steps from `low` to `high`."""

    low: float
    high: float
    accepted: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Decisions:
    """A round's decisions in numbers."""

    reasons: dict[str, int]  # most frequent first; `accepted` is one of them
    scores: Distribution | None  # None: there is no finite score


def decisions(store: Store, recipe: str, round_key: str) -> Decisions:
    """A round's decisions in numbers, cached until the store is written to."""
    return _decisions(store, store.snapshot(), recipe, round_key)


@functools.lru_cache(maxsize=64)
def _decisions(store: Store, snapshot: int, recipe: str, round_key: str) -> Decisions:
    of = {"recipe": recipe, "round": round_key}
    here = f"FROM decisions AT (VERSION => {int(snapshot)}) WHERE recipe = $recipe AND round = $round"
    rows = store.query(
        f"""SELECT reason, count(*) AS candidates, min(score) FILTER (isfinite(score)) AS low,
                max(score) FILTER (isfinite(score)) AS high {here} GROUP BY reason ORDER BY candidates DESC, reason""",
        of,
    )
    reasons = {row["reason"]: row["candidates"] for row in rows}
    ends = [row[end] for row in rows for end in ("low", "high") if row[end] is not None]
    if not ends:
        return Decisions(reasons, None)
    low, high = min(ends), max(ends)
    width = (high - low) / BINS or 1.0
    binned = store.query(
        f"""SELECT accepted, least(floor((score - $low) / $width), {BINS - 1})::INTEGER AS bin, count(*) AS candidates
            {here} AND isfinite(score) GROUP BY ALL""",
        {**of, "low": low, "width": width},
    )
    counts = {True: [0] * BINS, False: [0] * BINS}
    for row in binned:
        counts[row["accepted"]][row["bin"]] = row["candidates"]
    return Decisions(reasons, Distribution(low, high, counts[True], counts[False]))


# --- a round's candidates --------------------------------------------------------------------

_LOWEST = "CASE WHEN isfinite(score) THEN score ELSE '-infinity'::DOUBLE END"  # unjudged ones come last either way
_HIGHEST = "CASE WHEN isfinite(score) THEN score ELSE 'infinity'::DOUBLE END"
ORDERS = {  # name → key, direction; ties are broken by the candidate's id
    "prompt": ("prompt_id", "ASC"),
    "u": ("coalesce(u, 1)", "ASC"),  # every u is below 1: undecided ones come last
    "best": (_LOWEST, "DESC"),
    "worst": (_HIGHEST, "ASC"),
    "longest": ("tokens", "DESC"),
    "shortest": ("tokens", "ASC"),
}
_OF_DECISIONS = ("u", "best", "worst")
DECIDED = ("", "accepted", "rejected", "undecided")


@dataclass(frozen=True)
class Asked:
    """Which of a round's candidates to list, and in what order. Raises AuditError for unknown values."""

    decision: str = ""  # one of DECIDED
    reason: str = ""
    split: str = "train"  # or `eval`: held out, never decided on
    prompt: str = ""  # a prompt's id
    text: str = ""  # a part of the completion, in upper or lower case
    order: str = "prompt"

    def __post_init__(self):
        for given, known in ((self.decision, DECIDED), (self.split, ("train", "eval")), (self.order, ORDERS)):
            if given not in known:
                raise AuditError(f"{given!r} is not one of {', '.join(filter(None, known))}")

    @property
    def key(self) -> tuple[str, str]:
        """Key and direction of the order. Held-out candidates have no decision, and so are not ordered by it."""
        return ORDERS["prompt" if self.split == "eval" and self.order in _OF_DECISIONS else self.order]

    @property
    def source(self) -> str:
        """The fewest tables that can answer: joining all candidates with all decisions takes seconds."""
        of_candidates = self.split == "eval" or self.text or self.order in ("longest", "shortest")
        of_decisions = self.decision or self.reason or (self.order in _OF_DECISIONS and self.split == "train")
        if self.decision == "undecided" or (of_candidates and of_decisions):
            return _BOTH
        return _DRAWN if of_candidates else _DECIDED


@dataclass(frozen=True)
class Page:
    """Some rows, and where the next page begins; None: this is the last page."""

    rows: list[dict]
    following: str | None


def candidates(store: Store, recipe: str, round_key: str, asked: Asked, after: str | None = None) -> Page:
    """A page of a round's candidates.

    Rows: candidate_id, prompt_id, round, accepted, reason, score, log_a, u (NULL: not decided), text, prompt (both
    truncated to SNIPPET; NULL: erased), characters, tokens, draw, finish_reason, split, policy, revoked (itself, its
    prompt, its policy, or a scorer that decided on it).

    Raises:
        AuditError: `after` is not the `following` of an earlier page.
    """
    of = {"recipe": recipe, "round": round_key, "split": asked.split}
    where = {
        "prompt_id = $prompt": asked.prompt,
        "reason = $reason": asked.reason,
        "contains(lower(text), lower($text))": asked.text,
    }
    of |= {"prompt": asked.prompt, "reason": asked.reason, "text": asked.text}
    conditions = [condition for condition, given in where.items() if given]
    if asked.decision:
        conditions.append({"accepted": "accepted", "rejected": "NOT accepted"}.get(asked.decision, "accepted IS NULL"))
    key, direction = asked.key
    if after is not None:
        of["key"], of["id"] = _place(after, str if key == "prompt_id" else float)
        beyond = ">" if direction == "ASC" else "<"
        conditions.append(f"({key} {beyond} $key OR ({key} = $key AND candidate_id > $id))")
    known = "" if asked.source == _DRAWN else f", {_DECISION}"
    sql = f"""SELECT candidate_id, prompt_id, round, {key} AS key{known} FROM ({asked.source})
              WHERE {" AND ".join(conditions) or "true"} ORDER BY key {direction}, candidate_id LIMIT {ROWS + 1}"""
    rows = store.query(sql, named(sql, of))
    return _page(_described(store, recipe, rows[:ROWS]), rows, "key")


_DECISION = "accepted, reason, score, log_a, u"
_DECIDED = "SELECT * FROM decisions WHERE recipe = $recipe AND round = $round"
_DRAWN = "SELECT * FROM candidates WHERE recipe = $recipe AND round = $round AND split = $split"
_BOTH = f"""
    SELECT c.candidate_id, c.prompt_id, c.round, c.text, c.tokens, d.accepted, d.reason, d.score, d.log_a, d.u
    FROM ({_DRAWN}) c LEFT JOIN ({_DECIDED}) d ON d.candidate_id = c.candidate_id"""


def trained_on(store: Store, recipe: str, checkpoint: str, after: str | None = None) -> Page:
    """A page of a checkpoint's training set: rows as from `candidates`, with `weight`."""
    of = {"recipe": recipe, "checkpoint": checkpoint, "id": "" if after is None else _place(after, str)[0]}
    rows = store.query(
        f"""SELECT candidate_id, weight FROM training_samples
            WHERE recipe = $recipe AND checkpoint = $checkpoint AND candidate_id > $id
            ORDER BY candidate_id LIMIT {ROWS + 1}""",
        of,
    )
    found = store.query(_ASKED_BY, {"recipe": recipe, "ids": [row["candidate_id"] for row in rows[:ROWS]]})
    asked_by = {row["candidate_id"]: row for row in found}
    gone = {"prompt_id": None, "round": None}
    shown = [{**gone, **row, **asked_by.get(row["candidate_id"], {})} for row in rows[:ROWS]]
    return _page(_described(store, recipe, shown), rows, "candidate_id")


_ASKED_BY = """SELECT candidate_id, prompt_id, round FROM candidates
    WHERE recipe = $recipe AND list_contains($ids, candidate_id)"""


def drawn_for(store: Store, recipe: str, prompt_id: str, after: str | None = None) -> Page:
    """A page of everything ever drawn for a prompt, by round and draw: rows as from `candidates`."""
    of = {"recipe": recipe, "prompt": prompt_id, "key": "", "id": ""}
    if after is not None:
        of["key"], of["id"] = _place(after, str)
    rows = store.query(
        f"""SELECT candidate_id, prompt_id, round, concat(round, ' ', lpad(draw::VARCHAR, 9, '0')) AS key
            FROM candidates WHERE recipe = $recipe AND prompt_id = $prompt
                AND (key > $key OR (key = $key AND candidate_id > $id))
            ORDER BY key, candidate_id LIMIT {ROWS + 1}""",
        of,
    )
    return _page(_described(store, recipe, rows[:ROWS]), rows, "key")


def _described(store: Store, recipe: str, rows: Sequence[dict]) -> list[dict]:
    """The rows with the other columns from the tables. A held-out candidate's score is the last combined one."""
    if not rows:
        return []
    near, parameters = _near(recipe, rows)

    def among(table: str, columns: str) -> dict[str, dict]:
        sql = f"""WITH near AS MATERIALIZED (SELECT {columns} FROM {table}
                    WHERE recipe = $recipe AND round BETWEEN $first AND $last AND {near})
                  SELECT * FROM near WHERE list_contains($ids, candidate_id)"""
        return {row["candidate_id"]: row for row in store.query(sql, parameters)}

    drawn = among("candidates", _DRAWN_COLUMNS)
    known = all(row.get("reason") for row in rows)
    decided = {} if known else among("decisions", f"candidate_id, {_DECISION}")
    sql = f"SELECT {_PROMPT_COLUMNS} FROM prompts WHERE recipe = $recipe AND {near}"
    prompts = {row["prompt_id"]: row for row in store.query(sql, named(sql, parameters))}
    described = [
        {
            **_UNKNOWN,
            **row,
            **drawn.get(row["candidate_id"], {}),
            **prompts.get(row["prompt_id"], {}),
            **decided.get(row["candidate_id"], {}),
        }
        for row in rows
    ]
    if undecided := {row["candidate_id"]: row for row in described if row["reason"] is None}:
        contents = [row["content"] for row in prompts.values()]
        of = named(_JUDGED, {**parameters, "ids": list(undecided), "contents": contents})
        for judged in store.query(_JUDGED, of):
            undecided[judged["candidate_id"]]["score"] = judged["score"]
    revoked = _revoked(store, recipe, described, parameters)
    return [{**row, "revoked": row["candidate_id"] in revoked} for row in described]


def _near(recipe: str, rows: Sequence[dict]) -> tuple[str, dict[str, Any]]:
    """A condition by which DuckDB reads little else than these rows, and its parameters with the rows' ids and rounds.

    For few prompts it skips row groups by Bloom filter; for many it is faster to scan everything.
    """
    prompts = list({row["prompt_id"] for row in rows})
    near = "prompt_id IN (SELECT unnest($prompts))" if len(prompts) <= 4 else "list_contains($prompts, prompt_id)"
    rounds = [row["round"] for row in rows if row["round"]] or [""]
    ids = [row["candidate_id"] for row in rows]
    return near, {"recipe": recipe, "prompts": prompts, "first": min(rounds), "last": max(rounds), "ids": ids}


def _revoked(store: Store, recipe: str, rows: Sequence[dict], parameters: dict[str, Any]) -> set[str]:
    """Which of the candidates are revoked: themselves, their prompt, their policy, or a scorer that decided on them."""
    judges = store.query(_SCORERS, named(_SCORERS, parameters))
    versions = {row["round"]: json.loads(row["scorers"] or "{}").values() for row in judges}

    def came_of(row: dict) -> set[str | None]:
        scorers = versions.get(row["round"], ()) if row["reason"] is not None else ()
        return {row["candidate_id"], row["prompt_id"], row["policy"], *scorers}

    ids = list(set().union(*map(came_of, rows)))
    revoked = {row["what"] for row in store.query(REVOKED, {"recipe": recipe, "ids": ids})}
    return {row["candidate_id"] for row in rows if not revoked.isdisjoint(came_of(row))}


_DRAWN_COLUMNS = f"""candidate_id, text[:{SNIPPET}] AS text, length(text) AS characters, tokens, draw,
    finish_reason, split, policy"""
_PROMPT_COLUMNS = f"prompt_id, text[:{SNIPPET}] AS prompt, content"
_UNKNOWN = {
    **dict.fromkeys(("text", "characters", "tokens", "draw", "finish_reason", "split", "policy", "prompt")),
    **dict.fromkeys(("accepted", "reason", "score", "log_a", "u")),
}
_SCORERS = "SELECT round, scorers FROM rounds WHERE recipe = $recipe AND round BETWEEN $first AND $last"
_JUDGED = """
    SELECT candidate_id, arg_max_null(value, rowid) AS score FROM scores  -- a last NULL counts: it cannot judge
    WHERE recipe = $recipe AND round BETWEEN $first AND $last AND scorer = 'combined'
        AND list_contains($contents, content) AND list_contains($ids, candidate_id)
    GROUP BY candidate_id"""


# --- one thing ---------------------------------------------------------------------------------


def prompt(store: Store, recipe: str, prompt_id: str) -> dict | None:
    """A prompt's row, with the earlier sources that it was read from in `earlier`; None if there is no such prompt."""
    of = {"recipe": recipe, "prompt": prompt_id}
    rows = store.query("SELECT * FROM prompts WHERE recipe = $recipe AND prompt_id = $prompt", of)
    return {**rows[0], "earlier": store.query(EARLIER, of)} if rows else None


def revoked(store: Store, recipe: str, prompt_id: str) -> list[str]:
    """The revocations of a prompt, in words."""
    sql = f"SELECT DISTINCT kind, what, cause, who, why FROM revocations WHERE kind = 'prompt' AND {OF} AND what = $id"
    return [said(row, spoken=True) for row in store.query(sql, {"recipe": recipe, "id": prompt_id})]


@dataclass(frozen=True)
class Weights:
    """Weights that a recipe uses, whether made by one of its rounds, by another recipe's or by none, and relations."""

    digest: str
    row: dict | None  # of `checkpoints`; None: no round made them
    line: list[dict | str]  # the base model's digest, then rows of `checkpoints` down to these weights
    later: dict[str, tuple[dict, str]]  # digest → its row, and how it came from these weights
    sampled_by: list[str]  # rounds
    reigned: list[str]  # rounds that left them as the champion
    champion: bool  # now
    revoked: list[str]  # in words


def weights(store: Store, recipe: str, digest: str) -> Weights:
    """What is recorded of weights. Raises AuditError if no round of the recipe knows them."""
    return at_once(store, lambda query: _weights(query, recipe, digest))


def _weights(query: Query, recipe: str, digest: str) -> Weights:
    of = {"recipe": recipe, "digest": digest}
    rounds = query("SELECT * FROM rounds WHERE recipe = $recipe ORDER BY round", of)
    made = query(MADE)
    own = [row for row in made if row["recipe"] == recipe]
    known = {row["checkpoint"]: row for row in [*made, *own]}
    line: list[dict | str] = []
    one = digest
    while one in known and known[one] not in line:
        line.insert(0, known[one])
        one = known[one]["parent"]
    used = [row[name] for row in own for name in ("checkpoint", "parent", "policy", "drawn_from")]
    if digest not in used and not any(digest in (row["policy"], row["drawn_from"]) for row in rounds):
        raise AuditError(f"{recipe} has no checkpoint {digest}.")
    through = descend(made, {digest: ""})
    rows = query("SELECT * FROM checkpoints WHERE checkpoint = $digest ORDER BY recipe = $recipe, round", of)
    revoked = query(REVOKED, {"recipe": recipe, "ids": [digest]})
    return Weights(
        digest=digest,
        row=rows[-1] if rows else None,
        line=[one, *line],
        later={row["checkpoint"]: (row, through[row["checkpoint"]]) for row in made if through.get(row["checkpoint"])},
        sampled_by=[row["round"] for row in rounds if digest in (row["policy"], row["drawn_from"])],
        reigned=[row["round"] for row in rounds if row["champion"] == digest],
        champion=[row["champion"] for row in rounds if row["state"] == "finished"][-1:] == [digest],
        revoked=[said(row, spoken=True) for row in revoked],
    )


# --- prompts and refused rows ------------------------------------------------------------------


def quarantine(store: Store, recipe: str | None, reason: str | None, after: str | None = None) -> Page:
    """A page of refused rows: recipe, source, line, reason, detail, raw (bytes, the first 2,000), bytes (how many)."""
    of = {"recipe": recipe, "reason": reason, "key": after}
    place = "concat_ws(chr(31), recipe, source, lpad(line::VARCHAR, 12, '0'))"
    sql = f"""SELECT recipe, source, line, reason, detail, raw[:2000] AS raw, octet_length(raw) AS bytes, {place} AS key
              FROM quarantine WHERE ($recipe IS NULL OR recipe = $recipe) AND ($reason IS NULL OR reason = $reason)
                AND ($key IS NULL OR {place} > $key)
              ORDER BY key LIMIT {ROWS + 1}"""
    rows = store.query(sql, of)
    return Page(rows[:ROWS], rows[ROWS - 1]["key"] if len(rows) > ROWS else None)


def refusals(store: Store) -> list[dict]:
    """How many rows of each recipe were refused, by reason."""
    return store.query("SELECT recipe, reason, count(*) AS rows FROM quarantine GROUP BY ALL ORDER BY ALL")


def prompts_with(store: Store, text: str) -> list[dict]:
    """The first prompts of any recipe that contain a text, ignoring case: recipe, prompt_id, prompt, split."""
    return store.query(
        f"""SELECT recipe, prompt_id, text[:{SNIPPET}] AS prompt, split FROM prompts
            WHERE contains(lower(text), lower($text)) ORDER BY recipe, prompt_id LIMIT {2 * ROWS}""",
        {"text": text},
    )


# --- revocations -------------------------------------------------------------------------------


def revocations(store: Store, after: str | None = None) -> Page:
    """A page of what was revoked, the newest first: rows of `revocations` without those that another one caused, whose
    number is in `caused`."""
    key, name = _place(after, float) if after is not None else (math.inf, "")
    rows = store.query(
        f"""SELECT r.*, epoch_us(r.revoked_at)::DOUBLE AS key, concat(r.recipe, ' ', r.kind, ' ', r.what) AS name,
                (SELECT count(*) FROM revocations c WHERE c.cause = concat(r.kind, ' ', r.what) AND c.recipe = r.recipe
                    AND c.kind <> 'refused')
                    AS caused
            FROM revocations r
            WHERE cause IS NULL AND r.recipe <> '{EVERY}' AND (key < $key OR (key = $key AND name > $name))
            ORDER BY key DESC, name LIMIT {ROWS + 1}""",
        {"key": key, "name": name},
    )
    following = json.dumps([rows[ROWS - 1]["key"], rows[ROWS - 1]["name"]]) if len(rows) > ROWS else None
    return Page(rows[:ROWS], following)


# --- places ------------------------------------------------------------------------------------


def _page(shown: list[dict], read: list[dict], key: str) -> Page:
    """A page of the shown rows. `read` has one row more if another page follows."""
    if len(read) <= ROWS:
        return Page(shown, None)
    last = read[ROWS - 1]
    return Page(shown, json.dumps([last[key], last["candidate_id"]]))


def _place(after: str, kind: type) -> tuple[Any, str]:
    """The key and the id after which a page begins."""
    try:
        key, candidate_id = json.loads(after)
        if not isinstance(candidate_id, str) or isinstance(key, str) != (kind is str):
            raise ValueError
        return kind(key), candidate_id
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise AuditError("this page's address is not one that a list gave: begin at the first page") from None
