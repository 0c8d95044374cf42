"""Reading: an answer from one snapshot of the store, however many queries it takes.

Belongs here: that alone, in two ways. `at_once` asks in one transaction, in which DuckLake looks up its catalog once:
for answers of a few rows. `as_of` names the snapshot and needs none: for answers that make temporary tables of
millions, which all threads read then (see Store.connection).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import duckdb

from rsft_pipeline.store import NEWEST_SNAPSHOT, Query, Store

T = TypeVar("T")


def at_once(store: Store, work: Callable[[Query], T]) -> T:
    """What `work` makes of its queries, all of them answered as of the same moment. It may run again."""

    def attempt(connection):
        return work(on(connection))

    return store.commit(attempt)


def on(connection) -> Query:
    """Queries inside a transaction that is open already; a parameter that a query does not name is left out."""

    def query(sql: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        used = {name: value for name, value in (parameters or {}).items() if re.search(rf"\${name}\b", sql)}
        return connection.execute(sql, used or None).to_arrow_table().to_pylist()

    return query


@contextmanager
def as_of(connection: duckdb.DuckDBPyConnection, tables: Sequence[str], snapshot: int | None = None) -> Iterator[None]:
    """These tables as they were at a snapshot, the newest by default, under their own names.

    A temporary view is found before a table.
    """
    if snapshot is None:
        (snapshot,) = connection.execute(NEWEST_SNAPSHOT).fetchone()
    for table in tables:
        connection.execute(f"CREATE TEMP VIEW {table} AS SELECT * FROM lake.{table} AT (VERSION => {int(snapshot)})")
    try:
        yield
    finally:
        for table in tables:
            connection.execute(f"DROP VIEW temp.{table}")


def column(connection: duckdb.DuckDBPyConnection, sql: str, parameters: Any = None) -> list[Any]:
    """The values of a query that gives one column."""
    return [row[0] for row in connection.execute(sql, parameters).fetchall()]
