"""The accelerator as a resource: a lease on the device, held for one piece of work and given back.

With `in_process` execution a resource lives as long as the run, so it must not hold the card: only
the lease does.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import dagster as dg
from pydantic import Field

from rsft_pipeline.devices import Device, memory, release, resolve
from rsft_pipeline.home import Home


class Accelerator(dg.ConfigurableResource):
    """Which device models run on, one user at a time."""

    kind: str = Field("auto", description="auto, cpu or cuda.")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16.")

    def device(self) -> Device:
        """The device, without holding it."""
        return resolve(self.kind, self.dtype)

    @contextmanager
    def lease(self, log) -> Iterator[Device]:
        """The device, for the length of the `with`; a GPU is locked against this home's other processes."""
        device = self.device()
        with nullcontext() if device.kind == "cpu" else Home.here().lock("accelerator", wait=True):
            try:
                yield device
            finally:
                release(device)
                report = {name: f"{size / 2**30:.2f} GiB" for name, size in memory(device).items()}
                log.info("device %s (%s): %s", device.kind, device.dtype, report)
