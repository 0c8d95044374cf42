"""Devices: which processor the weights are on, in which number format, and how much memory it has."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Device:
    """A processor and the number format that models use on it."""

    kind: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]

    @property
    def torch_dtype(self):
        import torch

        return getattr(torch, self.dtype)


def resolve(kind: str = "auto", dtype: str = "auto") -> Device:
    """The device asked for, or the best one there is; bf16 on a GPU that supports it, else fp32.

    Raises:
        ValueError: the device asked for is not there; names those that are.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "cpu": True}  # not Apple's: no float64, which drawing needs
    if kind == "auto":
        kind = next(name for name in there if there[name])
    if not there.get(kind):
        raise ValueError(
            f"device {kind!r} is not on this machine; there is {', '.join(k for k, v in there.items() if v)}"
        )
    if dtype == "auto":
        dtype = "bfloat16" if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return Device(kind, dtype)


def memory(kind: str) -> dict[str, int]:
    """The device's memory in bytes: free and total, and the most that this process has held."""
    import torch

    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # cached by PyTorch
        return {"free": free, "total": total, "peak": torch.cuda.max_memory_allocated()}
    import resource

    import psutil

    host, own = psutil.virtual_memory(), of_a_container()
    return {
        "free": min(host.available, own[0]) if own else host.available,
        "total": min(host.total, own[1]) if own else host.total,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


# Linux control groups, versions 2 and 1: the files with a group's memory limit and usage, and the line of memory.stat
# with the cached files that Linux can drop.
_SECOND = ("memory.max", "memory.current", "inactive_file")
_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def of_a_container(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[int, int] | None:
    """Free bytes and limit, in bytes, of this process's container or cluster job; None if it has no limit.

    Of nested limits, the one that leaves least.
    """
    found = []
    for line in own.read_text().splitlines() if own.is_file() else ():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        names, top = (_SECOND, root) if number == "0" else (_FIRST, root / "memory")
        inner = top / path.lstrip("/")
        found += [
            left for group in (inner, *inner.parents) if group.is_relative_to(top) and (left := _left(group, *names))
        ]
    return min(found, default=None)


def _left(group: Path, bound: str, taken: str, dropped: str) -> tuple[int, int] | None:
    """Free bytes and limit, in bytes, of a control group; None if it has no limit."""
    try:
        most, used = (int((group / name).read_text()) for name in (bound, taken))
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # there is no such group, or its limit is `max`
        return None
    return max(0, most - used + int(files.get(dropped, 0))), most


@contextmanager
def own_rng(kind: str) -> Iterator[None]:
    """Random numbers drawn and seeded inside leave those outside as they were: the CPU's and this device's."""
    import torch

    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if kind == "cuda" else []):
        yield


def release(kind: str) -> None:
    """Give unused device memory back, once the models on it are no longer referenced."""
    if kind == "cpu":
        return  # unreferenced memory is free already, and collecting takes half a second
    import torch

    gc.collect()
    torch.cuda.empty_cache()


_FULL = ("not enough memory", "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory, so that trying later or with less at once may succeed."""
    import torch

    said = str(error)  # of the CPU's allocator, or of the GPU libraries that do not use PyTorch's
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _FULL)
    )
