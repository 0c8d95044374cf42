"""The accelerator as a resource: a lease on the device, held for one piece of work and given back.

With `in_process` execution a resource lives as long as the run, so the resource must not hold the device: only
the lease does. The lease is a lock of the home and not a Dagster pool: waiting processes sleep, and a killed
process's lock is free at once.
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

    kind: str = Field("auto", description="auto, cpu or cuda.")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16.")

    def device(self) -> Device:
        """The device, without holding it."""
        return resolve(self.kind, self.dtype)

    @contextmanager
    def lease(self, log) -> Iterator[Device]:
        """The device, for the length of the `with`, locked against this home's other processes."""
        device = self.device()
        with Home.here().lock("accelerator", wait=False) as free:
            if free:
                yield from self._held(device, log)
                return
        warn("waiting for the accelerator: another round of this home is using it", log)
        with Home.here().lock("accelerator", wait=True):
            yield from self._held(device, log)

    def _held(self, device: Device, log) -> Iterator[Device]:
        try:
            yield device
        finally:
            release(device)
            report = {name: f"{size / 2**30:.2f} GiB" for name, size in memory(device).items()}
            log.info("device %s (%s): %s", device.kind, device.dtype, report)
