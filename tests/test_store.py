"""The store: a commit is whole or absent, with many processes at once, and nothing that was reported is lost."""

import concurrent.futures
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import duckdb
import pytest

from rsft_pipeline.audit.impact import MADE
from rsft_pipeline.store import Store, StoreError, insert, replace, without_password

ROOT = Path(__file__).resolve().parent.parent
LABEL = {"recipe": "a", "round": "r000", "scorer": "x"}


def rows(first, count):
    return [{**LABEL, "candidate_id": f"{first}-{i}", "value": float(i)} for i in range(count)]


def test_a_failed_transaction_leaves_nothing_behind(tmp_path):
    with Store.at(tmp_path) as store:

        def work(connection):
            insert(connection, "scores", rows("half", 50))
            connection.execute("INSERT INTO no_such_table VALUES (1)")

        with pytest.raises(duckdb.Error, match="no_such_table"):
            store.commit(work)
        assert store.value("SELECT count(*) FROM scores") == 0


def test_a_folder_that_is_a_pattern_of_others_too_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"reads that as a pattern, because of '\*'"):
        Store(f"sqlite:{tmp_path / 'catalog.sqlite'}", str(tmp_path / "star*"))


def test_replacing_spares_the_rows_of_others(tmp_path):
    with Store.at(tmp_path) as store:
        store.append("scores", [*rows("a", 3), {**LABEL, "round": "r001", "candidate_id": "kept"}])
        store.replace("scores", rows("b", 2), recipe="a", round="r000")
        found = store.query("SELECT candidate_id FROM scores ORDER BY 1")
        assert [row["candidate_id"] for row in found] == ["b-0", "b-1", "kept"]


def test_an_older_snapshot_stays_readable_after_rows_are_replaced_and_files_compacted(tmp_path):
    with Store.at(tmp_path) as store:
        for i in range(4):
            store.append("scores", rows(str(i), 50))
        then = store.snapshot()
        store.commit(lambda connection: replace(connection, "scores", [], recipe="a"))
        store.compact()
        assert store.value("SELECT count(*) FROM scores") == 0
        assert store.value(f"SELECT count(*) FROM scores AT (VERSION => {then})") == 200


def test_compaction_bounds_the_number_of_files(tmp_path):
    with Store.at(tmp_path) as store:
        for i in range(12):
            store.append("scores", rows(str(i), 50))
        store.compact()
        files = store.query("SELECT data_file FROM ducklake_list_files('lake', 'scores')")
        assert len(files) <= 2
        assert store.value("SELECT count(*) FROM scores") == 600


WRITER = """
import sys
from pathlib import Path
from rsft_pipeline.store import Store
home, name, commits = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with Store.at(home) as store:
    for i in range(commits):
        def work(connection):
            for table in ("scores", "decisions"):
                batch = [{"recipe": name, "round": "r000", "candidate_id": f"{name}-{i}-{j}"} for j in range(20)]
                __import__("rsft_pipeline.store").store.insert(connection, table, batch)
        store.commit(work)
        print(i, flush=True)
"""


def writer(home, name, commits):
    command = [sys.executable, "-c", WRITER, str(home), name, str(commits)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_three_processes_write_at_once_with_a_reader_open_and_none_is_lost(tmp_path):
    with Store.at(tmp_path) as reader:
        processes = [writer(tmp_path, name, 8) for name in "abc"]
        while any(process.poll() is None for process in processes):
            counts = reader.query("SELECT (SELECT count(*) FROM scores) AS s, (SELECT count(*) FROM decisions) AS d")[0]
            assert counts["s"] == counts["d"]
            time.sleep(0.02)
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert reader.value("SELECT count(DISTINCT candidate_id) FROM scores") == 3 * 8 * 20


def test_kill_minus_9_leaves_every_commit_whole_and_none_reported_and_lost(tmp_path):
    Store.at(tmp_path).close()
    for attempt in range(4):
        process = writer(tmp_path, f"w{attempt}", 1000)
        reported = [process.stdout.readline() for _ in range(3 + attempt)][-1]
        time.sleep(0.01 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with Store.at(tmp_path) as store:
            found = store.query(
                """SELECT count(*) AS s, count(DISTINCT candidate_id) AS distinct_ids,
                    (SELECT count(*) FROM decisions WHERE recipe = $r) AS d FROM scores WHERE recipe = $r""",
                {"r": f"w{attempt}"},
            )[0]
        assert found["s"] == found["d"] == found["distinct_ids"]
        assert found["s"] % 20 == 0
        assert found["s"] >= 20 * (int(reported) + 1)


def test_a_store_from_before_revocations_gets_the_columns_that_it_lacks(tmp_path):
    with Store.at(tmp_path) as store:
        store.commit(lambda connection: connection.execute("DROP TABLE revocations"))
        store.commit(lambda connection: connection.execute("ALTER TABLE candidates DROP COLUMN origin"))
        store.append("candidates", [{"recipe": "one", "candidate_id": "a"}])
        store.commit(lambda connection: connection.execute("ALTER TABLE evaluations DROP COLUMN eligible"))
        store.append("evaluations", [{"recipe": "one", "round": "r000"}])
        for table, column in (("rounds", "evaluation_scorers"), ("checkpoints", "drawn_from")):
            store.commit(lambda c, of=(table, column): c.execute("ALTER TABLE {} DROP COLUMN {}".format(*of)))
        store.append("rounds", [{"recipe": "one", "round": "r000", "policy": "p", "drawn_from": "teacher"}])
        store.append("checkpoints", [{"recipe": "one", "round": "r000", "policy": "p", "meta": "{}"}])
    with Store.at(tmp_path) as store:
        store.append("candidates", [{"recipe": "one", "candidate_id": "b", "origin": "policy"}])
        rows = store.query("SELECT candidate_id, origin FROM candidates ORDER BY candidate_id")
        assert rows == [{"candidate_id": "a", "origin": None}, {"candidate_id": "b", "origin": "policy"}]
        assert store.query("SELECT * FROM revocations") == []
        assert store.query("SELECT recipe, eligible FROM evaluations") == [{"recipe": "one", "eligible": None}]
        assert store.value("SELECT evaluation_scorers FROM rounds") is None
        assert [row["drawn_from"] for row in store.query(MADE)] == ["teacher"]


def test_no_files_are_merged_while_somebody_reads(tmp_path):
    """DuckLake's reader may find the files of before a merge without their statistics, and then an empty table."""
    listed = "SELECT count(*) AS n FROM ducklake_list_files('lake', 'candidates')"
    with Store.at(tmp_path) as store, Store.at(tmp_path) as other:
        for n in range(3):
            store.append("candidates", [{"recipe": "a", "candidate_id": f"{n} {i}"} for i in range(50)])
        files = store.value(listed)
        for reading in (store.connection, store._not_merging):
            with reading():
                other.compact(patience=0.1)
                assert store.value(listed) == files  # others read, and are not held up
        other.compact()
        assert store.value(listed) == 1 < files
        with store._not_merging(fcntl.LOCK_EX), pytest.raises(TimeoutError):
            concurrent.futures.ThreadPoolExecutor().submit(other.value, listed).result(timeout=0.3)


LARGE = "CREATE TEMP TABLE large AS SELECT sha256(n::VARCHAR) AS text FROM range(3000000) t(n)"


def test_what_does_not_fit_into_memory_is_spilt_into_a_folder_of_its_own_that_goes(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    spill = tmp_path / "store" / "spill"
    with Store.at(tmp_path, memory="100MB") as store, store.connection() as connection:
        connection.execute(LARGE)
        assert [folder for folder in spill.iterdir() if folder.is_dir() and any(folder.iterdir())]
        assert spill.stat().st_mode & 0o077 == 0  # texts are in it
    assert not list(spill.iterdir()) and not list((tmp_path / "here").iterdir())


def test_what_a_killed_process_spilt_is_removed_by_the_next_and_nobody_elses(tmp_path):
    script = f"""
        import os, signal
        from pathlib import Path
        from rsft_pipeline.store import Store
        with Store.at(Path({str(tmp_path)!r}), memory="100MB").connection() as connection:
            connection.execute({LARGE!r})
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT)
    spill = tmp_path / "store" / "spill"
    assert killed.returncode == -signal.SIGKILL and any(folder.is_dir() for folder in spill.iterdir())
    with Store.at(tmp_path, memory="100MB") as store, store.connection() as connection:
        connection.execute(LARGE)
        Store.at(tmp_path).close()
        (folder,) = (one for one in spill.iterdir() if one.is_dir())  # this store's
        assert connection.execute("SELECT count(*) FROM large").fetchone() == (3_000_000,) and any(folder.iterdir())


@pytest.mark.parametrize("catalog", ["/a/catalog.sqlite", "sqlite:", "duckdb:/a/b", "sqlite3:/a/b", ""])
def test_a_catalog_that_is_neither_kind_is_told(catalog, tmp_path):
    with pytest.raises(StoreError, match="expected sqlite:/path/to/file or postgres:"):
        Store(catalog, str(tmp_path))


def test_a_new_catalog_wants_a_data_folder_without_the_files_of_another(tmp_path):
    rows = [{"recipe": "a", "source": "s", "line": n, "reason": "empty"} for n in range(5000)]
    with Store.at(tmp_path) as store:
        store.append("quarantine", rows)
        data = store.data
    assert list(Path(data).rglob("*.parquet"))
    with pytest.raises(StoreError, match="has files of another"):
        Store(f"sqlite:{tmp_path / 'other.sqlite'}", data)
    with Store.at(tmp_path) as store:  # its own catalog goes on
        assert store.value("SELECT count(*) FROM quarantine") == len(rows)


OPENING = """
import sys
from pathlib import Path
from rsft_pipeline.store import Store
with Store.at(Path(sys.argv[1])) as store:
    store.append("quarantine", [{"recipe": "a", "source": "s", "line": n, "reason": "empty"} for n in range(50)])
"""


def test_processes_that_open_a_new_store_at_once_take_nobodys_files_for_anothers(tmp_path):
    for trial in range(3):
        command = [sys.executable, "-c", OPENING, str(tmp_path / str(trial))]
        processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
        told = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * 4, told
        with Store.at(tmp_path / str(trial)) as store:
            assert store.value("SELECT count(*) FROM quarantine") == 200


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("postgres:dbname=a password=hunter2 host=b", "postgres:dbname=a password=… host=b"),
        ("connect to 'password='hun ter2' host=b'", "connect to 'password=… host=b'"),
        ("postgres:postgresql://me:hunter2@b:1/a", "postgres:postgresql://me:…@b:1/a"),
        ("postgres:postgresql://me:p@ss@b/a", "postgres:postgresql://me:…@b/a"),
        ("PASSWORD = hunter2 host=b", "PASSWORD = … host=b"),
        (r"password='it\'s secret' host=b", "password=… host=b"),
        ("sqlite:/a/b@c:d", "sqlite:/a/b@c:d"),
    ],
)
def test_what_is_told_of_a_catalog_has_no_password(words, expected):
    assert without_password(words) == expected


def test_what_cannot_be_forgotten_while_somebody_reads_is_told(tmp_path):
    with Store.at(tmp_path) as one, Store.at(tmp_path) as other:
        one.append("quarantine", [{"recipe": "a"}])
        with other.connection():
            with pytest.raises(StoreError, match="somebody was reading the store for 0 s"):
                one.forget(patience=0.2)
            one.compact(patience=0.2)  # is left for the next time
        assert one.forget() == []


def test_a_catalog_that_another_program_reads_is_told_to_have_what_was_forgotten(tmp_path):
    with Store.at(tmp_path) as store:
        store.append("quarantine", [{"recipe": "a"}])
        with closing(sqlite3.connect(tmp_path / "store" / "catalog.sqlite", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM ducklake_table").fetchall()
            with pytest.raises(StoreError, match="may still have texts of them: another program was reading it"):
                store.forget(patience=0.2)
        assert store.forget() == []


def test_files_that_cannot_be_merged_now_are_left_for_the_next_time(tmp_path, monkeypatch):
    def locked(self, attempt):
        raise StoreError("the store stayed locked for 60 s")

    with Store.at(tmp_path) as store:
        monkeypatch.setattr(Store, "_patiently", locked)
        store.compact()


def test_nothing_is_spilled_to_a_folder_of_somebody_else(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(StoreError, match=rf"{tmp_path}/rsft-\d+, .* belongs to another user"):
        Store("postgres:dbname=none", str(tmp_path))
    assert tmp_path.joinpath(f"rsft-{os.getuid()}").stat().st_mode & 0o777 == 0o700
