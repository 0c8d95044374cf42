"""Reading: an answer from one snapshot of the store, however many queries it takes.

Belongs here: only that, in two ways. `at_once` queries in one transaction, in which DuckLake reads its catalog once:
for answers of a few rows. `as_of` names the snapshot and needs no transaction: for answers with temporary tables of
millions of rows, which all threads can then read (see Store.connection).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import duckdb

from rsft_pipeline.store import NEWEST_SNAPSHOT, Query, Store

T = TypeVar("T")


def at_once(store: Store, work: Callable[[Query], T]) -> T:
    """The result of `work`, whose queries are all answered as of the same moment. It may run more than once."""

    def attempt(connection):
        return work(on(connection))

    return store.commit(attempt)


def on(connection) -> Query:
    """Queries inside an open transaction; parameters that a query does not name are left out."""

    def query(sql: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        return connection.execute(sql, named(sql, parameters or {}) or None).to_arrow_table().to_pylist()

    return query


def named(sql: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Only the parameters that a query names: DuckDB refuses others."""
    return {name: value for name, value in parameters.items() if re.search(rf"\${name}\b", sql)}


def snapshots(query: Query) -> set[int]:
    """The snapshots that still exist."""
    return {row["snapshot_id"] for row in query("SELECT snapshot_id FROM lake.snapshots()")}


@contextmanager
def as_of(connection: duckdb.DuckDBPyConnection, tables: Sequence[str], snapshot: int | None = None) -> Iterator[None]:
    """These tables as they were at a snapshot, the newest by default, under their own names.

    They become temporary views, which take precedence over tables.
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
