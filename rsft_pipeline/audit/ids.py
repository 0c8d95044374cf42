"""Ids: what a person typed, as what the store calls it.

Belongs here: finding the one candidate, prompt, round … that an id, the beginning of one, or a position
means. Not: what is then asked about it.
"""

from rsft_pipeline.store import Store


class AuditError(ValueError):
    """A question that cannot be answered: the message says what was looked for and what is there."""


def recipes(store: Store) -> list[str]:
    """The recipes that have left anything in the store."""
    rows = store.query("SELECT DISTINCT recipe FROM rounds UNION SELECT DISTINCT recipe FROM prompts ORDER BY 1")
    return [row["recipe"] for row in rows]
