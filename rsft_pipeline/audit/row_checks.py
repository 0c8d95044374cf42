"""Row checks: checks of the rows of candidates, one by one.

Belongs here: whether ids, seeds and prompts match their hashes, texts their tokens, and scores what the present
scorers give. Not: which candidates are checked (replay.py: those to train on, held_out.py: those to evaluate).
"""

import json

import duckdb

from rsft_pipeline import lineage, scoring
from rsft_pipeline.audit.findings import Check, Notes, named
from rsft_pipeline.devices import Device
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.rounds import Round
from rsft_pipeline.scoring import ScoringError
from rsft_pipeline.steps.rows import OF_SCORERS
from rsft_pipeline.steps.score import accepted_before, judged_sample
from rsft_pipeline.store import Store
from rsft_pipeline.tasks import writing

# Scorers that ask a model, whose outputs repeat only approximately: only `forced` candidates are judged again.
ASK_A_MODEL = {"reward", "likelihood", "relevance", "consistency", "novelty"}

# lineage.candidate_id and lineage.seed_of in SQL; ids and names need no escaping in JSON.
_ID = """substr(sha256(concat($scope, policy, '","', prompt_id, '",', draw, ',"', settings, '"]')), 1, 32)"""
_SEED = """concat('0x', substr(sha256(concat('["seed","', candidate_id, '",', $seed, ']')), 1, 15))::BIGINT"""


def ids(
    connection: duckdb.DuckDBPyConnection, table: str, recipe: Recipe, scope: str, note: Notes, of: str = ""
) -> None:
    """Check the ids and seeds of all rows of a table by hashing them again.

    Args:
        scope: of the ids, see lineage.candidate_id.
        of: whose rows they are, for the name of the check.
    """
    given = {"scope": f'["{recipe.name}","{scope}","', "seed": str(recipe.seed)}
    (candidates,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    # Into a table, which uses all threads; a query whose result is fetched is computed by the fetching thread alone.
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE wrong AS SELECT * FROM (
            SELECT candidate_id, candidate_id IS DISTINCT FROM {_ID} AS id, seed IS DISTINCT FROM {_SEED} AS seed
            FROM {table}) WHERE id OR seed""",
        given,
    )
    wrong = connection.execute("FROM wrong").fetchall()
    named_so = (
        ("ids", "ids that are not the hash of the round, policy, prompt, draw and settings beside them"),
        ("seeds", "seeds that do not follow from the candidate's id"),
    )
    for i, (name, what) in enumerate(named_so, start=1):
        found = [row[0] for row in wrong if row[i]]
        note(Check(f"{name}{of}, computed again", candidates, len(found)), named("data", what, found))


def rows_sql(looked_at: str, candidates: str, scores: str = "SELECT * FROM scores WHERE recipe = $recipe") -> str:
    """SQL of the rows with everything that a scorer sees and what each scorer gave, in the order of their ids.

    Args:
        looked_at: a table of candidate_id, content (of the prompt as it was judged) and now (its content now).
        candidates, scores: SQL of candidates and scores that include theirs.
    """
    return f"""
        WITH single AS (
            SELECT s.candidate_id, list(s.scorer) AS scorers, list(s.value) AS scores FROM ({scores}) s
            JOIN {looked_at} r ON r.candidate_id = s.candidate_id AND r.content = s.content
            WHERE {OF_SCORERS}
            GROUP BY s.candidate_id
        )
        SELECT r.content = r.now AS unchanged, c.candidate_id, c.prompt_id, c.text, c.token_ids, c.tokens, c.origin,
            c.finish_reason, c.log_q, c.log_p, p.text AS prompt, p.chat, p.messages, p.reference, p.fields, p.content,
            p.same_text, s.scorers, s.scores
        FROM {looked_at} r
        JOIN ({candidates}) c ON c.candidate_id = r.candidate_id
        JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
        LEFT JOIN single s ON s.candidate_id = r.candidate_id
        WHERE c.text IS NOT NULL AND p.text IS NOT NULL  -- those of a revocation may have been erased
        ORDER BY r.candidate_id"""


def draws(rows: list[dict], source: str, note: Notes, of: str = "") -> None:
    """Check that draws have as many tokens as recorded, and come from the source that the round drew from."""
    lengths = [row["candidate_id"] for row in rows if row["tokens"] != len(row["token_ids"] or ())]
    origins = [row["candidate_id"] for row in rows if row["origin"] not in (None, source)]
    for name, found, what in (
        ("lengths", lengths, "lengths that are not those of the tokens"),
        ("origins", origins, f"origins other than «{source}»"),
    ):
        note(Check(f"{name}{of}", len(rows), len(found)), named("data", what, found))


def known(vocabulary: float, rows: list[dict], note: Notes, of: str = "") -> list[dict]:
    """The rows whose token ids all exist in the model. The others are noted."""

    def has(token: int | None) -> bool:
        return token is not None and 0 <= token < vocabulary

    if unknown := [row["candidate_id"] for row in rows if not all(map(has, row["token_ids"] or ()))]:
        what = f"token ids{of} that the model does not have"
        note(Check(f"token ids{of}", len(rows), len(unknown)), named("data", what, unknown))
    without = set(unknown)
    return [row for row in rows if row["candidate_id"] not in without]


def texts(tokenizer, rows: list[dict], note: Notes, of: str = "") -> None:
    """Check that texts are what their tokens decode to."""
    ids = [row["token_ids"] or [] for row in rows]  # normally never missing, but nothing is taken for granted here
    written = [own[:-1] if row["finish_reason"] == "stop" else own for row, own in zip(rows, ids, strict=True)]
    spelt = writing.spelt(tokenizer, written)
    wrong = [row["candidate_id"] for row, text in zip(rows, spelt, strict=True) if row["text"] != text]
    what = "texts that are not what the stored tokens spell"
    note(Check(f"texts{of}, decoded again", len(rows), len(wrong)), named("data", what, wrong))


def readable(rows: list[dict], note: Notes, of: str = "") -> list[dict]:
    """The rows that a scorer can be shown. The others, whose prompt's JSON is invalid, are noted."""

    def can_be_read(row: dict) -> bool:
        try:
            judged_sample(row)
        except (TypeError, ValueError):
            return False
        return True

    able = {row["prompt_id"]: can_be_read(row) for row in rows}
    if wrong := [prompt_id for prompt_id, good in able.items() if not good]:
        what = "prompts (by prompt id) whose fields or messages are not JSON"
        note(Check(f"prompts{of}, as JSON", len(able), len(wrong)), named("data", what, wrong))
    return [row for row in rows if able[row["prompt_id"]]]


def prompts(rows: list[dict], note: Notes, of: str = "") -> None:
    """Check that prompts match their ids and digests, and are still as they were when judged."""
    asked = {row["prompt_id"]: row for row in rows}
    wrong = [
        prompt_id
        for prompt_id, row in asked.items()
        # Ids from before exact spaces counted are hashes of the normalised text.
        if prompt_id not in (lineage.prompt_id(row["prompt"]), lineage.same_text(row["prompt"]))
        or row["content"] != lineage.digest([row["prompt"], row["reference"], json.loads(row["fields"])])
        or row["same_text"] not in (None, lineage.same_text(row["prompt"]))
    ]
    changed = sum(row["unchanged"] is False for row in asked.values())
    what = "prompts (by prompt id) that are not what they hash to"
    said = f"{changed} have another reference or other fields now than when they were judged" if changed else ""
    note(Check(f"prompts{of}, hashed again", len(asked), len(wrong), said), named("data", what, wrong))


def scorers(
    store: Store,
    round_: Round,
    rows: list[dict],
    version_of: dict[str, str],
    device: Device,
    forced: int,
    tolerance: float,
    note: Notes,
    of: str = "",
) -> None:
    """Judge again with those scorers whose version is still the recorded one.

    Args:
        forced: how many candidates to ask a model about; 0: no model is loaded.
        tolerance: by how much a model's score may differ: of its size, if that is above 1.
    """
    before = accepted_before(store, round_)
    rows = [row for row in rows if row["unchanged"]]
    for config in round_.recipe.scoring.scorers:
        name, then = f"scorer {config.label}{of}", version_of.get(config.label)
        if then is None:
            continue  # noted elsewhere
        if config.kind in ASK_A_MODEL and not forced:
            note(Check(name, 0, None, "it asks a model, and none is to be loaded"))
            continue
        try:
            now = scoring.version(config, round_.recipe, before)
            judge = scoring.scorer(config, round_.recipe, device, before) if now == then else None
        except ScoringError as error:
            note(Check(name, 0, None, f"it cannot be asked: {error}"))
            continue
        if judge is None:
            note(Check(name, 0, None, f"the scorer has changed: its version was {then}, is {now}"))
            continue
        again = rows[:forced] if config.kind in ASK_A_MODEL else rows
        try:
            values = scoring.score({config.label: judge}, [judged_sample(row) for row in again])[config.label]
        except ScoringError as error:
            note(Check(name, 0, None, f"it failed: {error}"))
            continue
        near = tolerance if config.kind in ASK_A_MODEL else 0.0
        wrong = [
            row["candidate_id"]
            for row, value in zip(again, values, strict=True)
            if config.label in (said := dict(zip(row["scorers"] or (), row["scores"] or (), strict=True)))
            and not _same(said[config.label], value, near)
        ]
        what = f"scorer {config.label} gives another score to the stored text than the stored one"
        note(Check(name, len(again), len(wrong), f"version {then}"), named("scorer", what, wrong))


def _same(one: float | None, other: float | None, near: float) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= near * max(1.0, abs(one))
