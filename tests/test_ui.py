"""`rsft ui`: every server answers, and none is left when it ends."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest
from conftest import free_port, wait_for

from rsft_pipeline.home import ROOT


@pytest.fixture
def folder(tmp_path):
    """A current folder whose modules have the names of modules that the servers use."""
    made = tmp_path / "elsewhere"
    for package in ("cli", "mlflow", "web"):
        (made / package).mkdir(parents=True)
        (made / package / "__init__.py").write_text("raise SystemExit('a module of the current folder ran')")
    (made / "dagster.py").write_text("raise SystemExit('a module of the current folder ran')")
    return made


def test_every_server_answers_wherever_it_is_started_and_ends_with_it(home, folder):
    ports = [free_port() for _ in range(3)]
    options = zip(("--port", "--mlflow-port", "--audit-port"), map(str, ports), strict=True)
    with open(folder / "log", "w+") as log:
        # As the command `rsft` starts it, which has no current folder to look in; and of this very code.
        command = [sys.executable, "-P", "-m", "cli.main", "ui", *(word for pair in options for word in pair)]
        how = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stdout": log, "stderr": log}
        process, started = subprocess.Popen(command, **how), []
        try:
            for port in ports:
                wait_for(f"http://127.0.0.1:{port}/", [process])
            started = psutil.Process(process.pid).children(recursive=True)
            assert len(started) >= 4
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            _, left = psutil.wait_procs(started, timeout=10)
            assert left == []
        finally:
            for one in [*started, process]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        log.seek(0)
        assert "a module of the current folder ran" not in log.read()
