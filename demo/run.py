"""A training run that goes on where it was stopped: what it keeps, and a polite kill. For the demo's own models."""

import contextlib
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch


class Stop:
    """A polite kill ends the run after its step, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._ask)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True


def save(file: Path, state: dict[str, Any]) -> None:
    """With the random state. The file is whole wherever the power fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    with part.open("wb") as out:
        torch.save(state | {"rng": torch.get_rng_state()}, out)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)


def load(file: Path) -> dict[str, Any] | None:
    """What `save` kept, and its random state is this process's again. None where there is nothing."""
    with contextlib.suppress(FileNotFoundError):
        state: dict[str, Any] = torch.load(file, weights_only=True)
        torch.set_rng_state(state.pop("rng"))
        return state
    return None
