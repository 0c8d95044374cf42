"""Ingest: a recipe's prompts into the store, and the rows that cannot become prompts into quarantine.

Belongs here: what is kept of the prompts already stored. Not: how a row becomes a prompt (prompts/), nor which
prompts a round asks (draw.py).
"""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pyarrow as pa

from rsft_pipeline import lineage, models, prompts, revocations, rounds
from rsft_pipeline.home import Home
from rsft_pipeline.models import configuration
from rsft_pipeline.progress import Show
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.store import Store, insert
from rsft_pipeline.store import replace as store_replace


def ingest(
    store: Store, recipe: Recipe, home: Home, run_id: str, show: Show, round_key: str | None = None
) -> prompts.Ingest:
    """Read the recipe's prompts into `prompts` and `quarantine`.

    A prompt that is no longer in the sources is kept, because candidates were drawn for it, but is not asked again.
    From the first finished round on, a known question keeps its split for ever, however it is worded and whatever
    becomes of `eval_fraction`. Before that nothing depends on it, and a warm-up made again uses the present fraction.

    Args:
        round_key: the round that they are read for; None if for rounds to come.

    Raises:
        RoundError: later rounds build on that round.
        PromptError, ModelError: the prompts or a model cannot be had.
    """
    if round_key is not None:
        rounds.check_nothing_stands_on(store, recipe.name, round_key)  # else its prompts must stay as they were
    prompts.sources.check(recipe)  # before a model is made or fetched to read them
    base = models.base(recipe, home.path, lambda step, steps, loss, _: show(step, f"loss {loss:.3f}", steps))
    tokenizer = models.tokenizer(base.path)
    drawn_from = [base, models.teacher(recipe, base.path)] if recipe.sampling.teacher else [base]
    contexts = [context for one in drawn_from if (context := configuration.context_length(one.path))]
    chat = recipe.prompts.messages is not None and tokenizer.chat_template is not None
    revoked = store.query(_REVOKED, {"recipe": recipe.name})
    read = revocations.without(store, recipe.name, prompts.read(recipe, tokenizer, min(contexts, default=None)))
    _check_read_alike(store, recipe, chat, {prompt.prompt_id for prompt in read.prompts})
    read = _split(store, recipe, read, round_key)
    rows = _rows(recipe, read, chat)
    digest = lineage.set_digest(map(lineage.digest, rows))
    if _unchanged(store, recipe, read, digest):
        return read
    made = {"source_digest": digest, "active": True, "dagster_run_id": run_id}
    rows = [row | made for row in rows]
    refused = [{"recipe": recipe.name, **vars(row), "dagster_run_id": run_id} for row in read.refused]

    def work(connection) -> bool:
        if connection.execute(_REVOKED, {"recipe": recipe.name}).to_arrow_table().to_pylist() != revoked:
            return False
        _write(connection, recipe.name, round_key, rows, refused)
        return True

    if not store.commit(work):  # something was revoked meanwhile, perhaps erased, and may be among what was read
        return ingest(store, recipe, home, run_id, show, round_key)
    return read


def _split(store: Store, recipe: Recipe, read: prompts.Ingest, round_key: str | None) -> prompts.Ingest:
    """What was read, each prompt in its split. Raises PromptError if either split is empty."""
    known = _known_splits(store, recipe, round_key)
    split = {
        p.prompt_id: known.get(p.question) or known.get(lineage.same_text(p.text)) or p.split for p in read.prompts
    }
    read = replace(read, prompts=[replace(p, split=split[p.prompt_id]) for p in read.prompts])
    if empty := {"train", "eval"} - {prompt.split for prompt in read.prompts}:
        left_out = sum(row.reason == revocations.REASON for row in read.refused)
        if left_out and not read.prompts:
            raise prompts.PromptError(f"{recipe.name}: all {left_out} prompts were revoked: give others")
        besides = f" ({left_out} more were revoked)" if left_out else ""
        or_else = "" if left_out or known else ", or change prompts.eval_fraction"
        raise prompts.PromptError(
            f"{recipe.name}: none of {len(read.prompts)} prompts{besides} is in the {max(empty)} split: give more "
            f"prompts{or_else}"
        )
    return read


def _rows(recipe: Recipe, read: prompts.Ingest, chat: bool) -> list[dict[str, Any]]:
    """Rows of `prompts`, except for the columns that depend on the run."""
    return [
        {
            "recipe": recipe.name,
            "prompt_id": prompt.prompt_id,
            "text": prompt.text,
            "chat": chat,
            "messages": json.dumps(prompt.messages) if prompt.messages else None,
            "reference": prompt.reference,
            "fields": json.dumps(prompt.fields, ensure_ascii=False),
            "question": prompt.question,
            "same_text": lineage.same_text(prompt.text),
            "split": prompt.split,
            "content": lineage.digest([prompt.text, prompt.reference, prompt.fields]),
            "source": prompt.source,
            "line": prompt.line,
            "settings": settings(recipe),
        }
        for prompt in read.prompts
    ]


def _unchanged(store: Store, recipe: Recipe, read: prompts.Ingest, digest: str) -> bool:
    """Whether the store already holds exactly what was read."""
    known = store.query("SELECT DISTINCT source_digest FROM prompts WHERE recipe = ? AND active", [recipe.name])
    kept = store.query("SELECT source, line, raw, reason, detail FROM quarantine WHERE recipe = ?", [recipe.name])
    refused = map(vars, read.refused)
    return known == [{"source_digest": digest}] and Counter(map(_values, kept)) == Counter(map(_values, refused))


def _write(connection, recipe: str, round_key: str | None, rows: list[dict], refused: list[dict]) -> None:
    """Replace the rows of `prompts` and `quarantine` with these."""
    connection.register("read_now", pa.Table.from_pylist([{name: row[name] for name in _PLACE} for row in rows]))
    connection.execute(_EARLIER, [recipe])
    connection.execute(_BEGUN_AGAIN, {"recipe": recipe, "round": round_key})
    connection.unregister("read_now")
    connection.execute("UPDATE prompts SET active = false WHERE recipe = ? AND active", [recipe])
    ids = [row["prompt_id"] for row in rows]
    connection.execute("DELETE FROM prompts WHERE recipe = ? AND prompt_id IN (SELECT unnest(?))", [recipe, ids])
    insert(connection, "prompts", rows)
    store_replace(connection, "quarantine", refused, recipe=recipe)


_REVOKED = f"SELECT kind, what FROM revocations WHERE {revocations.OF} ORDER BY ALL"


_PLACE = ("prompt_id", "source", "split")
_EARLIER = """INSERT INTO earlier_sources BY NAME
    SELECT p.recipe, p.prompt_id, p.source, p.line, p.dagster_run_id FROM prompts p
    JOIN read_now n ON n.prompt_id = p.prompt_id AND n.source <> p.source WHERE p.recipe = ?
    EXCEPT SELECT recipe, prompt_id, source, line, dagster_run_id FROM earlier_sources"""


# If prompts change splits, the round was trained and evaluated on other prompts than it has now: it must run again.
_BEGUN_AGAIN = """UPDATE rounds SET state = 'started' WHERE recipe = $recipe AND round = $round AND state = 'finished'
    AND EXISTS (FROM prompts p JOIN read_now n ON n.prompt_id = p.prompt_id AND n.split <> p.split
                WHERE p.recipe = $recipe)"""


def settings(recipe: Recipe) -> str:
    """Digest of the settings that the sources are read with: a round asks only prompts read with its own."""
    return lineage.digest(recipe.prompts.model_dump(mode="json"))


def _check_read_alike(store: Store, recipe: Recipe, chat: bool, prompt_ids: Collection[str]) -> None:
    """Raise PromptError if a prompt was drawn for before in the other form, plain text instead of a chat or vice versa.

    The tokenizer adds special tokens to plain text but not to a rendered chat, so the same text gives other tokens.
    Prompts are identified by their text, so draws for one form would pass for draws for the other.
    """
    drawn_for = store.query(
        """SELECT prompt_id FROM prompts WHERE recipe = $recipe AND chat <> $chat
           AND prompt_id IN (SELECT prompt_id FROM candidates WHERE recipe = $recipe)""",
        {"recipe": recipe.name, "chat": chat},
    )
    if any(row["prompt_id"] in prompt_ids for row in drawn_for):
        raise prompts.PromptError(
            f"{recipe.name}: prompts are now {'a chat' if chat else 'plain text'}, but some have the same text as "
            f"earlier ones that were {'plain text' if chat else 'a chat'}, in other tokens: go on under another name"
        )


def _known_splits(store: Store, recipe: Recipe, round_key: str | None) -> dict[str, str]:
    """The split of each known question and of each known text; where both splits have it, `train`."""
    rows = store.query(
        """SELECT coalesce(same_text, prompt_id) AS text, question, split FROM prompts
           WHERE recipe = $recipe AND EXISTS (
             FROM rounds WHERE recipe = $recipe AND state = 'finished' AND ($round IS NULL OR round <> $round))
           ORDER BY split""",  # eval, train
        {"recipe": recipe.name, "round": round_key},
    )
    return {row[by]: row["split"] for row in rows for by in ("question", "text") if row[by]}


def _values(row: dict) -> tuple:
    return tuple(row[name] for name in ("source", "line", "raw", "reason", "detail"))
