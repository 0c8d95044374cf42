"""Kill -9 while drawing and while training, then run again: the outcome is as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rsft_pipeline.store import Store

# Long enough to be killed in: 18 waves of candidates, and 150 steps of training, kept as they go.
WAVES = {"draws": 6, "max_tokens": 2, "wave_size": 24}
STEPS = {"epochs": 10, "batch_size": 4, "learning_rate": 0.005, "save_every": 2}
LONG = {"sampling": WAVES, "training": STEPS}


def start(path):
    command = [sys.executable, "-m", "cli.main", "run", str(path), "--rounds", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)


RECORDED = {
    "candidates": "candidate_id, token_ids, log_q, log_p, seed",
    "decisions": "candidate_id, accepted, reason, u",
    "checkpoints": "checkpoint, accepted_digest, samples",
    "rounds": "policy, champion, promoted, candidates, accepted",
}


def outcome(home):
    with Store.at(home) as store:
        return {
            table: store.query(f"SELECT {columns} FROM {table} WHERE recipe = 'letters_loop' ORDER BY ALL")
            for table, columns in RECORDED.items()
        }


def kill_when(process, reached, patience=120):
    deadline = time.monotonic() + patience
    while not reached():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the moment to kill at never came"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def drawn(home, store):
    if not any((home / "store" / "data" / "main" / "candidates").glob("**/*.parquet")):
        return 0  # without a query: hundreds of them would take the time of the process that is to draw
    return store.value("SELECT count(*) FROM candidates WHERE split = 'train' AND recipe = 'letters_loop'")


@pytest.fixture
def undisturbed(home, write_recipe, tmp_path, monkeypatch):
    """What a run that nothing happened to ends with."""
    other = tmp_path / "undisturbed"
    (other / "mlflow").mkdir(parents=True)
    (other / "mlflow" / "mlflow.db").write_bytes((home / "mlflow" / "mlflow.db").read_bytes())
    monkeypatch.setenv("RSFT_HOME", str(other))
    process = start(write_recipe(**LONG))
    assert process.wait() == 0, process.stdout.read()
    monkeypatch.setenv("RSFT_HOME", str(home))
    return outcome(other)


def test_killed_while_drawing_and_again_while_training_a_round_ends_the_same(home, write_recipe, undisturbed):
    path = write_recipe(**LONG)
    with Store.at(home) as store:
        process = start(path)
        kill_when(process, lambda: drawn(home, store) > 0)
        kept = store.query("SELECT candidate_id, dagster_run_id FROM candidates")
        total = sum(1 for row in undisturbed["candidates"])
        assert 0 < len(kept) < total

        # The killed run holds up nobody else, though it had the accelerator.
        other = start(write_recipe("mlflow"))  # a name that MLflow's database is locked by, too
        assert other.wait() == 0, other.stdout.read()

        process = start(path)
        saved = home / "scratch" / "letters_loop" / "r000" / "accepted"
        kill_when(process, lambda: any(saved.glob("*")))
        assert store.value("SELECT count(*) FROM checkpoints WHERE recipe = 'letters_loop'") == 0

        process = start(path)
        assert process.wait() == 0, process.stdout.read()
        # What the first run had persisted was not drawn again.
        now = {row["candidate_id"]: row["dagster_run_id"] for row in store.query("SELECT * FROM candidates")}
        assert all(now[row["candidate_id"]] == row["dagster_run_id"] for row in kept)
    assert outcome(home) == undisturbed
    assert not saved.exists()
