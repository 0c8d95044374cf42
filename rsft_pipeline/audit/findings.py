"""Findings: what an audit of stored rows compared, and what it found different.

Belongs here: the form of the answer that replay and verify share, and telling which of the store's files cannot
be read. Not: what is compared with what (replay.py, verify.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import duckdb

from rsft_pipeline.store import Store

NAMED = 20  # ids that a finding names; it counts all

Kind = Literal["data", "rule", "scorer", "weights", "file"]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was recorded."""

    kind: Kind  # what differs: stored rows, the rule, what a scorer gives, the weights, or a file that is unreadable
    what: str
    count: int  # how many rows are concerned
    ids: tuple[str, ...] = ()  # the first of them: of candidates, unless `what` says otherwise


@dataclass(frozen=True)
class Check:
    """One comparison, whatever came of it."""

    name: str
    compared: int
    differing: int | None  # None: it was not made, for the reason in `note`
    note: str = ""


def named(kind: Kind, what: str, ids: Iterable[str]) -> Finding:
    """A finding about these ids, of which the first in order are named."""
    ids = sorted(ids)
    return Finding(kind, what, len(ids), tuple(ids[:NAMED]))


def unreadable(store: Store, tables: Iterable[str], error: duckdb.Error) -> list[Finding]:
    """Which of these tables' files made a query fail, by reading each on its own.

    A candidate is named where its id can still be read though its row cannot.
    """
    found = []
    for table in tables:
        for row in store.query("SELECT data_file FROM ducklake_list_files('lake', ?)", [table]):
            try:
                store.value("SELECT bit_xor(hash(f)) FROM read_parquet(?) f", [row["data_file"]])
            except duckdb.Error as reason:
                what = f"{row['data_file']} of the table {table} cannot be read: {_first_line(reason)}"
                found.append(named("file", what, _ids(store, row["data_file"])))
    return found or [Finding("file", f"the store cannot be read: {_first_line(error)}", 0)]


def _ids(store: Store, file: str) -> list[str]:
    try:
        rows = store.query("SELECT DISTINCT candidate_id FROM read_parquet(?)", [file])
    except duckdb.Error:  # it has no such column, or that is the one
        return []
    return [row["candidate_id"] for row in rows]


def _first_line(error: duckdb.Error) -> str:
    return str(error).splitlines()[0]
