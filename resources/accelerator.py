"""The accelerator as a resource: the device, and a lease on it for one piece of work.

With `in_process` execution a resource lives as long as the run, so the resource itself must not hold the device.
The lease is a lock of the home and not a Dagster pool: waiting processes sleep, and a killed process's lock is free
at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
from pydantic import Field

from rsft_pipeline.devices import Device, memory, release, resolve
from rsft_pipeline.home import Home
from rsft_pipeline.progress import warn


class Accelerator(dg.ConfigurableResource):
    """The device that models run on, one process at a time."""

    kind: str = Field("auto", description="`auto`: cuda if available; or `cpu` or `cuda`.")
    dtype: str = Field(
        "auto", description="`auto`: bfloat16 on a GPU that has it, else float32; or one of these, or float16."
    )

    def device(self) -> Device:
        """The device, without a lease. Raises ValueError if it is not on this machine."""
        return resolve(self.kind, self.dtype)

    @contextmanager
    def lease(self, log) -> Iterator[Device]:
        """The device, locked against this home's other processes for the length of the `with`. Waits for it."""
        with Home.here().lock("accelerator", wait=False) as free:
            if free:
                yield from self._held(log)
                return
        warn("waiting for the accelerator: another process of this home is using it", log)
        with Home.here().lock("accelerator", wait=True):
            yield from self._held(log)

    def _held(self, log) -> Iterator[Device]:
        device = self.device()  # only now: looking at a GPU takes some of its memory, which whoever holds it plans with
        try:
            yield device
        finally:
            release(device.kind)
            report = {name: f"{size / 2**30:.2f} GiB" for name, size in memory(device.kind).items()}
            log.info("device %s (%s): %s", device.kind, device.dtype, report)
