"""The process that a run lives in: a tag of the run, so that one that was killed can be told from one that goes on.

Belongs here: naming a process on its machine, and whether it is still there. Not: what is done with a run whose
process is gone (automation/runs.py).
"""

import os
import socket

import psutil

TAG = "rsft/process"


def this_process(run_id: str) -> str:
    """Names this process also once its number has been given to another.

    And the run, because Dagster copies tags into a run that is executed again.
    """
    return f"{_machine()} {os.getpid()} {_begun(psutil.Process())} {run_id}"


def gone(tag: str | None, run_id: str) -> bool:
    """Whether the process that a run's tag names has ended; False where the tag names none of this machine."""
    match (tag or "").split(" "):
        case [host, pid, begun, run] if host == _machine() and run == run_id:
            try:
                return abs(_begun(psutil.Process(int(pid))) - float(begun)) > 1
            except psutil.NoSuchProcess:
                return True
    return False


def _machine() -> str:
    """Where the number of a process means that process: containers may share a host's name, but number their own."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # only Linux has namespaces
        return socket.gethostname()


def _begun(process: psutil.Process) -> float:
    """Seconds from the start of the machine to that of the process, which no setting of the clock changes."""
    return process.create_time() - psutil.boot_time()
