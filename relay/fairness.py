"""Whose turn it is: users share the gpus' seconds. Plain numbers; knows no database and no gpu.

Deficit round robin with a quantum that goes to nothing: all who wait gain credit at the same rate, and whoever first
has enough for the estimate of their next job is served, and pays it. So a user with a hundred jobs, or with long ones,
gets no more seconds than one with a few short ones. Waiting counts as well, so that a long job among many short ones
of ever new users comes to its turn.
"""

from collections.abc import Iterable
from dataclasses import dataclass

AGEING = 0.1  # seconds of credit, on loan, for each second that a user's next job has waited
START_S = 30.0  # of any job: its base model, its data
BYTES_PER_S = 8_000  # of training rows, where no gpu has made an estimate yet: a small model on a small gpu
PICTURE_S = 1.0  # of one picture in one epoch, likewise
TOKENS_PER_S = 300  # of answers, many at once, likewise
EPOCHS = 3  # where the gpu will choose


@dataclass(frozen=True)
class Head:
    """The job that its owner wants next, of those that a gpu could take now."""

    job_id: str
    owner: str
    cost_s: float
    waits_since: float  # its creation, or when its owner was last served
    credit_s: float  # its owner's


@dataclass(frozen=True)
class Turn:
    head: Head
    gain_s: float  # credit for every owner that waits, before the head is paid


def estimate_s(estimated_s: float | None, training_bytes: int, n_epochs: int | str) -> float:
    """Of gpu time: what a gpu has said, else from the size of the data."""
    if estimated_s is not None:
        return max(estimated_s, START_S)
    return START_S + training_bytes * _epochs(n_epochs) / BYTES_PER_S


def estimate_pictures_s(pictures: int, n_epochs: int | str) -> float:
    """Before a gpu has said: pictures take their time by the piece, whatever they weigh."""
    return START_S + pictures * _epochs(n_epochs) * PICTURE_S


def _epochs(n_epochs: int | str) -> int:
    return n_epochs if isinstance(n_epochs, int) else EPOCHS


def answers_s(file_bytes: int, tokens: int) -> float:
    """Of gpu time, for a batch: its prompts are read, and so many tokens are written."""
    return START_S + file_bytes / BYTES_PER_S + tokens / TOKENS_PER_S


def turn(heads: Iterable[Head], now: float) -> Turn | None:
    """Who is served next; an owner may have several heads."""

    def lacks_s(head: Head) -> float:
        return head.cost_s - head.credit_s - AGEING * max(now - head.waits_since, 0.0)

    first = min(heads, key=lambda head: (lacks_s(head), head.waits_since, head.job_id), default=None)
    return Turn(first, max(lacks_s(first), 0.0)) if first else None


def paid_s(credit_s: float, cost_s: float) -> float:
    """The credit that is left: nobody saves any up, and nobody owes more than one job for having waited."""
    return min(max(credit_s - cost_s, -cost_s), 0.0)
