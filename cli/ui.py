"""`rsft ui`: Dagster's web server and daemon, MLflow and the audit pages, on loopback, until interrupted."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Annotated

import typer

from cli import here
from resources import pages
from resources.pages import HOST
from rsft_pipeline.home import ROOT, Home

SAFE = {"PYTHONSAFEPATH": "1"}  # otherwise `python -m` would look for modules in the current folder first


def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Dagster's web server.")] = 3000,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow's UI.")] = 5000,
    audit_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the audit pages.")] = 5001,
) -> None:
    """Start Dagster (web server and daemon), MLflow and the audit pages on 127.0.0.1. Ctrl-C stops them all."""
    ports, remote = {"Dagster": port, "audit": audit_port}, pages.remote_tracking()
    if not remote:
        ports["MLflow"] = mlflow_port
    _check_free(ports)
    here.instance()
    tracked, own = os.environ.get("RSFT_MLFLOW"), Home.here().mlflow / "mlflow.db"
    if not tracked and not own.exists():
        here.tracking().client()  # made here under a lock, which MLflow's own server would not take
    workspace = ["-w", str(ROOT / "workspace.yaml")]
    commands = [
        ["dagster_webserver", "-h", HOST, "-p", str(port), *workspace],
        ["dagster._daemon", "run", *workspace],
        ["cli.main", "audit", "ui", "--port", str(audit_port)],
    ]
    if not remote:
        modules = f"--app-dir {shlex.quote(str(ROOT))}"  # otherwise uvicorn would look in the current folder first
        commands.append(["mlflow", "ui", "--host", HOST, "--port", str(mlflow_port), "--uvicorn-opts", modules])
    for ended in (signal.SIGTERM, signal.SIGHUP):  # SIGHUP: the terminal was closed
        signal.signal(ended, lambda *_: sys.exit(0))
    database = {"MLFLOW_BACKEND_STORE_URI": tracked or f"sqlite:///{own}"}  # other users could read an argument
    how = {"start_new_session": True, "env": environment(ports) | SAFE | database}
    processes = [subprocess.Popen([sys.executable, "-m", *command], **how) for command in commands]
    print(*(f"{name:<8} http://{HOST}:{ports[name]}" for name in pages.SERVERS if name in ports), sep="\n")
    if remote:
        print(f"{'MLflow':<8} {remote}")
    print("Ctrl-C stops them all.", flush=True)
    try:
        while all(process.poll() is None for process in processes):
            time.sleep(1)
        raise typer.Exit(1)
    except KeyboardInterrupt:
        pass
    finally:
        _end(processes)


def environment(ports: dict[str, int]) -> dict[str, str]:
    """Variables with the addresses by which the servers link to each other; those already set win."""
    return {pages.SERVERS[server][0]: f"http://{HOST}:{port}" for server, port in ports.items()} | os.environ


def _check_free(ports: dict[str, int]) -> None:
    """Raise OSError, naming the option, if two servers have the same port, or one is taken."""
    options = {"Dagster": "--port", "MLflow": "--mlflow-port", "audit": "--audit-port"}
    for server, port in ports.items():
        if others := [other for other, its in ports.items() if its == port and other != server]:
            raise OSError(f"{options[server]} and {options[others[0]]} are both {port}: give each its own")
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed counts as free
            try:
                tried.bind((HOST, port))
            except OSError as error:
                raise OSError(
                    f"port {port}, for {server}, is not available ({error.strerror}): is `rsft ui` running already? "
                    f"Choose another with {options[server]}"
                ) from None


def _end(processes: list[subprocess.Popen]) -> None:
    """Stop the servers with everything that they started; what is left after ten seconds is killed."""
    for again in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # else a second one would end this before them
        signal.signal(again, signal.SIG_IGN)
    left, deadline = _told(processes, signal.SIGTERM), time.monotonic() + 10
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = _told(left, 0)
    _told(left, signal.SIGKILL)


def _told(processes: list[subprocess.Popen], what: int) -> list[subprocess.Popen]:
    """Send a signal (0: none) to the servers' process groups. Returns the servers whose group still has a process."""
    there = []
    for process in processes:
        process.poll()  # otherwise one that has ended would still count
        with suppress(ProcessLookupError):
            os.killpg(process.pid, what)
            there.append(process)
    return there
