"""Reading: an answer from one snapshot of the store, however many queries it takes.

Belongs here: that alone. In a transaction DuckLake also looks up its catalog once, not for every query.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rsft_pipeline.store import Store

T = TypeVar("T")
Query = Callable[..., list[dict[str, Any]]]  # (sql, parameters) → rows


def at_once(store: Store, work: Callable[[Query], T]) -> T:
    """What `work` makes of its queries, all of them answered as of the same moment. It may run again."""

    def attempt(connection):
        return work(on(connection))

    return store.commit(attempt)


def on(connection) -> Query:
    """Queries inside a transaction that is open already; a parameter that a query does not name is left out."""

    def query(sql: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        used = {name: value for name, value in (parameters or {}).items() if f"${name}" in sql}
        return connection.execute(sql, used or None).to_arrow_table().to_pylist()

    return query
