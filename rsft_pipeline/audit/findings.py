"""Findings: what an audit of stored rows compared, and which differences it found.

Belongs here: the form of the answer that replay and verify share, and reading a store whose files were changed
behind its back. Not: what is compared with what (replay.py, verify.py).
"""

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import duckdb

from rsft_pipeline.store import Store

NAMED = 20  # the most ids that a finding names; it counts all

Kind = Literal["data", "rule", "scorer", "weights", "file"]
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was recorded."""

    kind: Kind  # what differs: stored rows, the rule, what a scorer gives, the weights, or one of the store's files
    what: str
    count: int  # how many rows are affected
    ids: tuple[str, ...] = ()  # the first of them: candidate ids, unless `what` says otherwise


@dataclass(frozen=True)
class Check:
    """One comparison, whatever its result."""

    name: str
    compared: int
    differing: int | None  # None: it was not made; `note` says why
    note: str = ""


@dataclass
class Notes:
    """The comparisons made so far, and what they found."""

    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def __call__(self, check: Check, *findings: Finding) -> None:
        """Note a comparison and, if anything differs or it was not made, its findings."""
        self.checks.append(check)
        if check.differing != 0:
            self.findings.extend(findings)


def named(kind: Kind, what: str, ids: Iterable[str]) -> Finding:
    """A finding about these ids; it names the first NAMED in order."""
    ids = sorted(ids)
    return Finding(kind, what, len(ids), tuple(ids[:NAMED]))


# --- files --------------------------------------------------------------------------------------


def read(
    store: Store,
    tables: Sequence[str],
    notes: Notes,
    work: Callable[[duckdb.DuckDBPyConnection, Notes], T],
    snapshot: int | None = None,
) -> T | None:
    """Run `work` on a connection of its own, and add what it notes.

    If one of the tables' files cannot be read, that is noted and the answer is None. If one was rewritten but can be
    read, that is noted too, and the work runs on its present content: it can then say which rows changed.

    Args:
        snapshot: one that the work reads besides the newest.

    Raises:
        duckdb.Error: the work failed although each file is the one that the catalog knows.
    """

    def attempt(store: Store) -> tuple[T, Notes]:
        found = Notes()  # of this attempt alone: notes of a failed attempt do not count
        with store.connection() as connection:
            return work(connection, found), found

    try:
        result, found = attempt(store)
    except duckdb.Error:
        files = [file for table in tables for file in _files(store, table, snapshot)]
        wrong = [file for file in files if file.wrong]
        if not wrong:
            raise
        notes(Check("files of the store", len(files), len(wrong)), *(_finding(store, file) for file in wrong))
        if not all(file.readable for file in wrong) or not store.catalog.startswith("sqlite:"):
            return None
        with _knowing(store, wrong) as other:
            try:
                result, found = attempt(other)
            except duckdb.Error as error:
                what = f"what these files hold now cannot be read as these tables: {str(error).splitlines()[0]}"
                notes(Check("rows of these files", len(wrong), None), Finding("file", what, len(wrong)))
                return None
    notes.checks += found.checks
    notes.findings += found.findings
    return result


@dataclass(frozen=True)
class _File:
    """A Parquet file of a table as it is, and how it differs from what the catalog knows."""

    table: str
    path: str
    size: int
    footer: int
    wrong: str  # what is wrong with it, in words; empty: nothing
    readable: bool


def _files(store: Store, table: str, snapshot: int | None) -> Iterator[_File]:
    listed = store.query("SELECT * FROM ducklake_list_files('lake', ?)", [table])
    if snapshot is not None:
        then = "SELECT * FROM ducklake_list_files('lake', ?, snapshot_version => ?)"
        listed += store.query(then, [table, snapshot])
    catalog = {
        row[f"{of}_file"]: tuple(row[f"{of}_file_{what}"] for what in ("size_bytes", "footer_size"))
        for row in listed
        for of in ("data", "delete")
        if row[f"{of}_file"]
    }
    for path, known in catalog.items():
        size, footer, wrong, readable = 0, 0, "", True
        try:
            store.value("SELECT bit_xor(hash(f)) FROM read_parquet(?) f", [path])
            size, footer = store.query(_SIZES, [path])[0].values()
            if (size, footer) != known:
                wrong = f"was written anew behind the store's back: {size} bytes (footer {footer}), where the catalog "
                wrong += f"knows {known[0]} ({known[1]})"
            readable = store.value(_BY_FIELD_ID, [path])
            if not readable:
                wrong += (", and " if wrong else "") + "has not the field ids by which a column is found"
        except duckdb.Error as error:
            wrong, readable = f"cannot be read: {str(error).splitlines()[0]}", False
        yield _File(table, path, size, footer, wrong, readable)


_BY_FIELD_ID = "SELECT bool_and(field_id IS NOT NULL) FROM parquet_schema(?) WHERE type IS NOT NULL"
_SIZES = "SELECT file_size_bytes, footer_size FROM parquet_file_metadata(?)"


def _finding(store: Store, file: _File) -> Finding:
    try:
        rows = store.query("SELECT DISTINCT candidate_id FROM read_parquet(?)", [file.path])
    except duckdb.Error:  # there is no such column, or it cannot be read
        rows = []
    what = f"{file.path} of the table {file.table} {file.wrong}. Candidates in it"
    return named("file", what, (row["candidate_id"] for row in rows))


@contextmanager
def _knowing(store: Store, files: Sequence[_File]) -> Iterator[Store]:
    """The same store through a copy of its catalog (SQLite) in which these files are as they are now."""
    catalog = store.catalog.removeprefix("sqlite:")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "catalog.sqlite"
        with closing(sqlite3.connect(catalog)) as original, closing(sqlite3.connect(copy)) as into:
            original.backup(into)
            for file in files:
                for kind in ("data", "delete"):
                    into.execute(
                        f"UPDATE ducklake_{kind}_file SET file_size_bytes = ?, footer_size = ? WHERE path LIKE ?",
                        [file.size, file.footer, f"%{os.path.basename(file.path)}"],
                    )
            into.commit()
        with Store(f"sqlite:{copy}", store.data) as other:
            yield other
