"""The process that a run lives in, as a tag of the run, so that killed runs can be told from live ones.

Belongs here: naming a process on its machine, and whether it still exists. Not: what is done with a run whose
process is gone (automation/runs.py).
"""

import os
import socket

import psutil

TAG = "rsft/process"


def this_process(run_id: str) -> str:
    """A name for this process that stays unambiguous after its pid is reused.

    It includes the run, because Dagster copies tags into a run that is executed again.
    """
    return f"{_machine()} {os.getpid()} {_begun(psutil.Process())} {run_id}"


def gone(tag: str | None, run_id: str) -> bool:
    """Whether the process that a run's tag names has ended; False if the tag is of another machine or run."""
    match (tag or "").split(" "):
        case [host, pid, begun, run] if host == _machine() and run == run_id:
            try:
                return abs(_begun(psutil.Process(int(pid))) - float(begun)) > 1
            except psutil.NoSuchProcess:
                return True
    return False


def _machine() -> str:
    """The scope in which pids are unique: containers may share a host name, but each numbers its own processes."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # only Linux has namespaces
        return socket.gethostname()


def _begun(process: psutil.Process) -> float:
    """Seconds from the machine's boot to the process's start, which setting the clock does not change."""
    return process.create_time() - psutil.boot_time()
