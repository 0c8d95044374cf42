"""Environment: process-wide settings that are made before anything heavy is imported."""

import atexit
import gc
import os


def settle_environment() -> None:
    """Prepare a process: set what libraries read from the environment when first imported, unless it is set already.

    Telemetry is off. Cyclic garbage is collected less often, because a round makes millions of objects that stay, and
    not at all at exit, where Python would go through everything several times, which takes two seconds. Waiting OpenMP
    threads soon go to sleep: spinning for milliseconds, their default, slows two processes on the same cores fivefold,
    and sleeping at once slows a small model by half.
    """
    for name in ("DAGSTER_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    gc.set_threshold(20_000)  # new objects; the default of Python 3.11 is 700
    atexit.register(gc.freeze)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # what GNU's OpenMP reads instead: some microseconds
