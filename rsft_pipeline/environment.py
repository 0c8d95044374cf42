"""Environment: what a process settles before anything heavy is imported."""

import atexit
import gc
import os


def settle_environment() -> None:
    """Prepare a process: set what libraries read from the environment when first imported, unless somebody has.

    No telemetry. Cyclic garbage is looked for less often: a round makes objects by the million that stay. At the end
    of the process it is not looked for at all: Python would go through everything several times, for two seconds. And
    OpenMP's threads that wait soon go to sleep: spinning for milliseconds, as they do by themselves, slows two
    processes on the same cores fivefold, and sleeping at once slows a small model by half.
    """
    for name in ("DAGSTER_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    gc.set_threshold(20_000)  # new objects; on its own Python looks after 700
    atexit.register(gc.freeze)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # GNU's OpenMP goes by this instead: some microseconds
