"""The first minute of a run: one pass over the longest rows, thrown away, so that memory runs out now or not at all.

Only it may make the micro-batch smaller. It changes nothing that the run is made of. On a GPU it tries and sees; a CPU
kills a process that asks for too much, so there the estimate decides before, and the measured peak after.
"""

import contextlib
import gc
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from gpu_service.device import Device, give_back, translate
from gpu_service.errors import OutOfMemory
from gpu_service.plan import Plan

USABLE = 0.9  # of what was free: the rest is for what comes and goes beside the run


@dataclass(frozen=True)
class Ready:
    """The plan as it holds from here on."""

    plan: Plan
    asked_rows: int  # of a micro-batch, before
    peak_bytes: int  # that the longest micro-batch took beyond what was held already; 0: it was not tried


def fit(
    plan: Plan, attempt: Callable[[int], None], needs_bytes: Callable[[int], int], device: Device, *, advice: str = ""
) -> Generator[None, None, Ready]:
    """Halve the micro-batch until the longest one fits. `attempt` takes rows; `needs_bytes` is an upper bound.

    Yields between tries. Raises OutOfMemory where a single row is too much.
    """
    rows = plan.micro_rows
    free = int(USABLE * device.free_bytes())
    while True:
        needs = needs_bytes(rows)
        fits = device.torch.type != "cpu" or needs <= free
        peak = 0
        if fits:
            fits, peak = _tried(attempt, rows, device)
            needs = max(needs, peak)
        if fits and peak <= free:
            return Ready(replace(plan, micro_rows=rows), plan.micro_rows, peak)
        if rows == 1:
            raise OutOfMemory(
                f"The longest row does not fit: training it takes about {needs / 1e6:,.0f} MB beside the model, and "
                f"{free / 1e6:,.0f} MB are free on this gpu. {advice}"
            )
        rows = -(-rows // 2)
        yield


def _tried(attempt: Callable[[int], None], rows: int, device: Device) -> tuple[bool, int]:
    """Whether it fitted, and the most that it took."""
    random = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if device.torch.type == "cuda" else None
    fits = True
    with _peak(device) as peak:
        try:
            attempt(rows)
        except (RuntimeError, MemoryError) as exc:
            if not isinstance(translate(exc), OutOfMemory):
                raise
            fits = False
    torch.set_rng_state(random)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    if not fits:
        gc.collect()
        give_back(device.torch)
    return fits, peak[0]


@contextlib.contextmanager
def _peak(device: Device) -> Iterator[list[int]]:
    """Bytes at most in use beyond those at the beginning; known at the end."""
    found = [0]
    if device.torch.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device.torch)
        began = torch.cuda.memory_allocated(device.torch)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device.torch) - began
        return
    _forget_peak()
    began = psutil.Process().memory_info().rss
    yield found
    found[0] = max(0, _resident_peak() - began)


def _forget_peak() -> None:
    """Linux counts the peak anew from here. https://docs.kernel.org/filesystems/proc.html"""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident_peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)
