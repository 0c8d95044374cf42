"""The store: the lineage tables of schema.sql in DuckLake (a catalog and Parquet files).

Belongs here: opening the lake, all-or-nothing writes, reads, compaction. Not: the meaning of any
table, which schema.sql explains, nor queries, which are beside the steps that need them.

Other processes may read and write at any time: every commit is a snapshot, and a writer that
conflicts with another retries. Only merging files and forgetting need a moment when nobody reads or writes.
"""

import fcntl
import importlib.util
import os
import random
import re
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import duckdb
import pyarrow as pa

INTERRUPTED = "Query interrupted"  # in the error that DuckDB raises when a signal arrives while it works
NEWEST_SNAPSHOT = "SELECT id FROM lake.current_snapshot()"
SCHEMA = Path(__file__).with_name("schema.sql")
T = TypeVar("T")
Query = Callable[..., list[dict[str, Any]]]  # (sql, parameters) → rows, as Store.query


class StoreError(RuntimeError):
    """The store cannot be opened or written; the message says why and what to do."""


class Store:
    """The lineage tables.

    Args:
        catalog: what DuckLake attaches: `sqlite:/path/catalog.sqlite` or `postgres:dbname=…`.
        data: folder or object-store prefix of the Parquet files.
        memory: the most memory that DuckDB may use, e.g. `4GB`; beyond that it spills to a folder beside the catalog
            (with a Postgres catalog, to the system's temporary folder).
    """

    def __init__(self, catalog: str, data: str, *, memory: str | None = None):
        if found := set("?*[\\") & set(data):
            raise StoreError(f"the store's data is {data}: DuckDB reads that as a pattern, because of {min(found)!r}")
        self.catalog, self.data = catalog, data
        backend, _, file = catalog.partition(":")
        if backend not in ("sqlite", "postgres") or (backend == "sqlite" and not file):
            told = without_password(catalog)
            raise StoreError(f"the store's catalog is {told}: expected sqlite:/path/to/file or postgres:…")
        self._readers = Path(f"{file}.readers") if backend == "sqlite" else None
        beside = Path(file).parent if backend == "sqlite" else _own_folder()
        self._spill = _spill(beside / "spill")
        options = {"temp_directory": self._spill.name.removesuffix(LOCK)} | ({"memory_limit": memory} if memory else {})
        self._connection = duckdb.connect(config=options)
        for extension in ("sqlite_scanner" if backend == "sqlite" else "postgres_scanner", "ducklake"):
            _load(self._connection, extension)
        options = [f"DATA_PATH {_quoted(data)}", "OVERRIDE_DATA_PATH true"]  # a home may have been moved
        if backend == "sqlite":
            self._readers.parent.mkdir(parents=True, exist_ok=True)
            self._readers.touch()
            options.append("META_JOURNAL_MODE 'WAL'")
        attach = f"ATTACH {_quoted('ducklake:' + catalog)} AS lake ({', '.join(options)})"
        try:
            self._patiently(lambda: self._connection.execute(attach))
        except duckdb.Error as error:
            told = (
                f"the store at {catalog} cannot be opened: is its folder there, writable and not full, and the catalog "
                f"whole? ({error})"
            )
            raise StoreError(without_password(told)) from None
        self._connection.execute("USE lake")
        self._prepare(SCHEMA.read_text(encoding="utf-8"))

    def _prepare(self, schema: str) -> None:
        """Create the tables and columns that do not exist yet."""
        listed = "SELECT table_name, column_name FROM duckdb_columns() WHERE database_name = 'lake'"
        rows = self.query(listed)
        if not rows and (others := self._any_file()):
            rows = self.query(listed)  # again: another process may have created and filled them meanwhile
        if not rows and others:
            self.close()
            raise StoreError(
                f"the store's catalog {without_password(self.catalog)} is new, and its data folder {self.data} has "
                f"files of another ({others}), which cleaning up would delete: give it a folder of its own, or the "
                "catalog that the files belong to"
            )
        there = {(row["table_name"], row["column_name"]) for row in rows}
        tables = set(re.findall(r"TABLE IF NOT EXISTS (\w+)", schema)) - {table for table, _ in there}
        added = set(re.findall(r"ALTER TABLE (\w+) ADD COLUMN IF NOT EXISTS (\w+)", schema))
        if tables or added - there:
            self.commit(lambda connection: (connection.execute(schema), _touch(connection, tables)))

    def _any_file(self) -> str | None:
        """Any Parquet file in the data folder, of whatever catalog; None if there is none."""
        listed, data = "SELECT file FROM glob(?) LIMIT 1", self.data.rstrip("/")
        try:
            found = self._connection.execute(listed, [f"{data}/**/*.parquet"]).fetchone()
        except duckdb.Error as error:
            raise StoreError(f"the store's data folder {self.data} cannot be looked into: {error}") from None
        return found and found[0]

    @classmethod
    def at(cls, home: Path, **options: Any) -> "Store":
        """The store of a home folder: SQLite catalog and local files."""
        return cls(f"sqlite:{home / 'store' / 'catalog.sqlite'}", str(home / "store" / "data"), **options)

    def close(self) -> None:
        self._connection.close()
        Path(self._spill.name).unlink(missing_ok=True)
        self._spill.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading ----------------------------------------------------------------------------

    def arrow(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> pa.Table:
        """The rows of a query, as an Arrow table."""
        with self._not_merging(), self._connection.cursor() as cursor:
            cursor.execute("BEGIN READ ONLY; USE lake")  # outside it, USE would be another transaction
            return cursor.execute(sql, parameters or None).to_arrow_table()

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
        """The rows of a query, as dictionaries."""
        return self.arrow(sql, parameters).to_pylist()

    def value(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> Any:
        """The single value of a query that gives one row and one column."""
        (row,) = self.query(sql, parameters)
        (value,) = row.values()
        return value

    def snapshot(self) -> int:
        """The number of the newest snapshot, for `SELECT … FROM t AT (VERSION => n)`."""
        return self.value(NEWEST_SNAPSHOT)

    @contextmanager
    def connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A separate connection for large temporary tables, outside any transaction.

        Such a table is read by all threads; one made in the current transaction is read by a single thread.
        """
        with self._not_merging(), self._connection.cursor() as cursor:
            cursor.execute("USE lake")
            yield cursor

    @contextmanager
    def _not_merging(self, how: int = fcntl.LOCK_SH) -> Iterator[None]:
        """Keep files from being merged or, with LOCK_EX, keep readers and writers out. Raises BlockingIOError.

        DuckLake reads a SQLite catalog through several connections. One of them may see the files from before a merge,
        and another the statistics from after it, where these files have none any more: a table then seems empty,
        without an error. A Postgres catalog is read as of one moment.
        """
        if self._readers is None:
            yield
            return
        with open(self._readers, "rb") as file:
            fcntl.flock(file, how)
            yield

    @contextmanager
    def _alone(self, patience: float) -> Iterator[None]:
        """Wait up to `patience` seconds until nobody reads or writes, and keep all out. Raises BlockingIOError."""
        with ExitStack() as stack:
            deadline = time.monotonic() + patience
            while True:
                try:
                    stack.enter_context(self._not_merging(fcntl.LOCK_EX | fcntl.LOCK_NB))
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise
                time.sleep(0.02)
            yield

    # --- writing ----------------------------------------------------------------------------

    def commit(
        self, work: Callable[[duckdb.DuckDBPyConnection], T], connection: duckdb.DuckDBPyConnection | None = None
    ) -> T:
        """Run `work` in one transaction: all of it, or nothing. It may run again after a conflict.

        Args:
            connection: a separate connection, whose temporary tables the work reads.
        """

        def attempt() -> T:
            own = nullcontext(connection) if connection else self._connection.cursor()
            with self._not_merging(), own as cursor:
                cursor.execute("BEGIN; USE lake")
                try:
                    result = work(cursor)
                    cursor.execute("COMMIT")
                    return result
                except BaseException:
                    _roll_back(cursor)
                    raise

        return self._patiently(attempt)

    def replace(self, table: str, rows: Iterable[Mapping[str, Any]] | pa.Table, **where: Any) -> None:
        """Delete the rows that match `where`, and insert `rows`, in one transaction."""
        self.commit(lambda connection: replace(connection, table, rows, **where))

    def append(self, table: str, rows: Iterable[Mapping[str, Any]] | pa.Table) -> None:
        """Insert rows in one transaction."""
        self.commit(lambda connection: insert(connection, table, rows))

    def compact(self, patience: float = 10.0) -> None:
        """Merge small files, and delete those that nothing has referred to for a day.

        Snapshots are never expired here: each checkpoint names the one that it was trained from.

        Args:
            patience: seconds to wait for readers and writers; if they take longer, it is left for the next time.
        """
        with suppress(BlockingIOError, StoreError), self._alone(patience):
            self._patiently(lambda: self._connection.cursor().execute("CALL ducklake_merge_adjacent_files('lake')"))
        for tidy in ("ducklake_cleanup_old_files", "ducklake_delete_orphaned_files"):
            sql = f"CALL {tidy}('lake', older_than => now() - INTERVAL 1 DAY)"
            with suppress(duckdb.IOException, StoreError):  # another process deleted the file first, or keeps writing
                self._patiently(lambda sql=sql: self._connection.cursor().execute(sql))

    def forget(self, patience: float = 60.0) -> list[str]:
        """Leave only the present state readable: what was replaced or deleted is removed from the files too.

        Every older snapshot goes, including those that checkpoints name. No other process may be writing: its
        uncommitted files would be taken for a killed writer's. Returns local files that are left over nevertheless.

        Raises:
            StoreError: somebody read the store for longer than `patience` seconds; the message says what is left.
        """
        try:
            with self._alone(patience):
                for sql in (
                    "ducklake_flush_inlined_data('lake')",
                    "ducklake_rewrite_data_files('lake', delete_threshold => 0)",
                    "ducklake_expire_snapshots('lake', older_than => now())",
                    "ducklake_cleanup_old_files('lake', cleanup_all => true)",
                    "ducklake_delete_orphaned_files('lake', cleanup_all => true)",
                ):
                    self._patiently(lambda sql=sql: self._connection.cursor().execute(f"CALL {sql}"))
                self._rewrite_catalog(patience)
        except BlockingIOError:
            raise StoreError(
                f"older snapshots were not forgotten: somebody was reading the store for {patience:.0f} s, a page or a "
                "command. What was revoked and erased stays so; do it again when they are done"
            ) from None
        tables = self.query("SELECT table_name FROM ducklake_table_info('lake')")
        listed = "SELECT data_file, delete_file FROM ducklake_list_files('lake', ?)"
        there = (file for row in tables for one in self.query(listed, [row["table_name"]]) for file in one.values())
        present = {Path(file).resolve() for file in there if isinstance(file, str)}
        return sorted(str(file) for file in Path(self.data).rglob("*.parquet") if file.resolve() not in present)

    def _rewrite_catalog(self, patience: float) -> None:
        """Rewrite a SQLite catalog: what SQLite deletes stays in its files until then. Raises StoreError."""
        backend, _, catalog = self.catalog.partition(":")
        if backend != "sqlite":
            return
        with closing(sqlite3.connect(catalog, timeout=patience, isolation_level=None)) as connection:
            try:
                connection.execute("VACUUM")
                (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.OperationalError as error:
                busy = error
        if busy:
            raise StoreError(
                f"older snapshots were forgotten, but the files of {catalog} may still have texts of them: another "
                "program was reading it. Do it again when it is done"
            )

    def _patiently(self, attempt: Callable[[], T], patience: float = 60.0) -> T:
        """Try again while another process is writing, for up to a minute."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return attempt()
            except duckdb.Error as error:
                if not _is_conflict(error):
                    raise
                if time.monotonic() > deadline:
                    told = f"the store at {self.catalog} stayed locked for {patience:.0f} s: {error}"
                    raise StoreError(without_password(told)) from None
                time.sleep(random.uniform(0.02, 0.2))


def _touch(connection: duckdb.DuckDBPyConnection, tables: Iterable[str]) -> None:
    """Insert an empty row into each table and delete it again, inside the caller's transaction.

    DuckLake keeps statistics of a table's columns from its first row on. Until then it looks for each column's in
    every query, which takes several times as long as reading a round's rows.
    """
    for table in sorted(tables):
        connection.execute(f"INSERT INTO {table} DEFAULT VALUES")
        connection.execute(f"DELETE FROM {table} WHERE recipe IS NULL")


def _own_folder() -> Path:
    """A folder for temporary files that no other user can look into. Raises StoreError."""
    folder = Path(tempfile.gettempdir()) / f"rsft-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise StoreError(f"{folder}, to which texts would be spilled, belongs to another user: remove it")
    return folder


LOCK = ".lock"


def _spill(folder: Path) -> IO[bytes]:
    """Choose a folder to spill to, and remove those that killed processes left, since texts are in them.

    By default every process would spill into the same files of the current folder.

    Returns:
        A locked file named like the folder, with `.lock` appended; DuckDB makes the folder when it needs it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for lock in folder.glob(f"*{LOCK}"):
        with suppress(OSError), open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process is alive
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
    while True:
        own = open(folder / f"{uuid.uuid4().hex}{LOCK}", "wb")  # noqa: SIM115 (locked while the store is open)
        fcntl.flock(own, fcntl.LOCK_EX)
        if Path(own.name).exists():  # else another process removed it before it was locked
            return own
        own.close()


def without_password(words: str) -> str:
    """A text that names a catalog, with passwords replaced by `…`."""
    words = re.sub(r"(?i)(password\s*=\s*)('(?:\\.|[^'\\])*'|(?:\\.|\S)+)", r"\1…", words)
    return re.sub(r"(://[^/\s:@]*:)\S*@", r"\1…@", words)


def columns(number: int, **values: Any) -> pa.Table:
    """`number` rows by column: each a list or array of values, or one value that all rows share."""
    several = list, pa.Array, pa.ChunkedArray
    return pa.table(
        {name: value if isinstance(value, several) else pa.repeat(value, number) for name, value in values.items()}
    )


def insert(connection: duckdb.DuckDBPyConnection, table: str, rows: Iterable[Mapping[str, Any]] | pa.Table) -> None:
    """Insert rows by column name, inside the caller's transaction."""
    batch = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist([dict(row) for row in rows])
    if batch.num_rows:
        connection.register("batch", batch)
        connection.execute(f"INSERT INTO lake.{table} BY NAME SELECT * FROM batch")
        connection.unregister("batch")


def replace(
    connection: duckdb.DuckDBPyConnection, table: str, rows: Iterable[Mapping[str, Any]] | pa.Table, **where: Any
) -> None:
    """Delete what matches `where` and insert rows, inside the caller's transaction."""
    condition = " AND ".join(f"{column} = ?" for column in where)
    connection.execute(f"DELETE FROM lake.{table} WHERE {condition}", list(where.values()))
    insert(connection, table, rows)


def _is_conflict(error: Exception) -> bool:
    text = str(error).lower()
    return "database is locked" in text or "conflict" in text or "another transaction" in text


def _roll_back(cursor: duckdb.DuckDBPyConnection) -> None:
    with suppress(duckdb.Error):  # a failed COMMIT has rolled back already
        cursor.execute("ROLLBACK")


def _load(connection: duckdb.DuckDBPyConnection, extension: str) -> None:
    """Load a signed extension from its PyPI wheel or, if there is no wheel, from DuckDB's own repository."""
    spec = importlib.util.find_spec(f"duckdb_extension_{extension}")
    folder = Path(spec.submodule_search_locations[0]) / "extensions" / f"v{duckdb.__version__}" if spec else None
    file = folder / f"{extension}.duckdb_extension" if folder else None
    if file and file.is_file():
        connection.execute(f"LOAD {_quoted(str(file))}")
        return
    try:
        connection.execute(f"INSTALL {extension}; LOAD {extension}")
    except duckdb.Error as error:
        wheel = f"duckdb-extension-{extension.replace('_', '-')}=={duckdb.__version__}"
        raise StoreError(f"DuckDB's extension {extension} cannot be loaded: install {wheel}. ({error})") from error


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
