"""Devices: which processor the weights sit on, in which number format, and giving its memory back."""

import gc
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
    """The device asked for, or the best one there is; bf16 on a GPU that has it, else fp32.

    Raises:
        ValueError: when the device asked for is not there, naming what is.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "cpu": True}  # not Apple's: it has no float64, which drawing needs
    if kind == "auto":
        kind = next(name for name in there if there[name])
    if not there.get(kind):
        raise ValueError(
            f"device {kind!r} is not on this machine; there is {', '.join(k for k, v in there.items() if v)}"
        )
    if dtype == "auto":
        dtype = "bfloat16" if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return Device(kind, dtype)


def memory(device: Device) -> dict[str, int]:
    """Bytes of the device: free and total, and the most that this process has held."""
    import torch

    if device.kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # kept by PyTorch for its next tensors
        return {"free": free, "total": total, "peak": torch.cuda.max_memory_allocated()}
    import resource

    import psutil

    host, own = psutil.virtual_memory(), of_a_container()
    return {
        "free": min(host.available, own[0]) if own else host.available,
        "total": min(host.total, own[1]) if own else host.total,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


# What bounds a group of Linux's processes, what they have taken, and in which statistic what of that are files which
# Linux can drop: in its second version of such groups, and in the first.
_SECOND = ("memory.max", "memory.current", "inactive_file")
_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def of_a_container(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[int, int] | None:
    """Bytes that are free of those that this process's container, or job of a cluster, may take, and these.

    None where nothing bounds it. Of several bounds, one within another, the one that leaves least.
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
    """Bytes that are free of a group's bound, and the bound; None where it has none."""
    try:
        most, used = (int((group / name).read_text()) for name in (bound, taken))
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # there is no such group, or its bound is `max`
        return None
    return max(0, most - used + int(files.get(dropped, 0))), most


def release(device: Device) -> None:
    """Give unused device memory back, once the models on it are no longer referred to."""
    if device.kind == "cpu":
        return  # what is no longer referred to is free already; collecting takes half a second
    import torch

    gc.collect()
    torch.cuda.empty_cache()


_FULL = ("not enough memory", "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left, which it may have at another moment or for less at once."""
    import torch

    said = str(error)  # by the allocator of a CPU, and by what stands beside PyTorch's on a GPU
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _FULL)
    )
