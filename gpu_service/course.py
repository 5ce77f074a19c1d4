"""What a run has gone through so far: where it is, its curves, and when it should stop. No torch.

It travels in checkpoints, so whatever decides about the run's end is part of it.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

SMOOTHING = 0.7  # of the mean loss: it looks back over some three steps
EXPLODED = 3.0  # nats above the least mean loss so far: no single odd batch, and no learning either
RISING = 1.0  # nats: what is stored from here on might be what leads there
MOST_POINTS = 1000  # of a curve; from then on every second one is kept


@dataclass(kw_only=True)
class Course:
    """Counters and curves of one run, between two optimizer steps."""

    step: int = 0  # optimizer steps done; with the seed it says which rows come next
    tokens: int = 0  # seen so far, padding not counted
    unit: float = 1.0  # what a loss that is one nat elsewhere would be here
    validations: int = 0  # the first is due before step 1, then one after each epoch
    train_loss: float | None = None
    valid_loss: float | None = None  # the last one
    best_loss: float | None = None  # of the validations after training began
    best_step: int = 0
    in_vain: int = 0  # validations since the best one
    ended_early: bool = False
    mean_loss: float | None = None
    least_mean: float | None = None
    sampled_at: int = -1  # step of the newest answers
    every: int = 1  # one in so many steps is in `losses`
    losses: list[tuple[int, float, float, float]] = field(default_factory=list)  # step, loss, rate, gradient norm
    validated: list[tuple[int, float]] = field(default_factory=list)  # step, loss
    first_answers: list[str] = field(default_factory=list)  # to the prompts, before step 1
    last_answers: list[str] = field(default_factory=list)

    def stepped(self, loss: float, rate: float, norm: float) -> None:
        """After an optimizer step."""
        self.step += 1
        self.train_loss = loss
        self.mean_loss = loss if self.mean_loss is None else SMOOTHING * self.mean_loss + (1 - SMOOTHING) * loss
        self.least_mean = self.mean_loss if self.least_mean is None else min(self.least_mean, self.mean_loss)
        if (self.step - 1) % self.every == 0:
            self.losses.append((self.step, loss, rate, norm))
        if len(self.losses) > MOST_POINTS:
            self.losses, self.every = self.losses[::2], 2 * self.every

    @property
    def rise(self) -> float:
        """Of the mean loss above its least, in nats."""
        if self.mean_loss is None or self.least_mean is None:
            return 0.0
        return (self.mean_loss - self.least_mean) / self.unit

    @property
    def has_exploded(self) -> bool:
        return self.rise > EXPLODED

    @property
    def is_rising(self) -> bool:
        return self.rise > RISING

    def validate(self, loss: float, patience: int) -> bool:
        """After a validation. Whether the weights are the best so far. `patience` 0: never ends early."""
        self.validations += 1
        self.valid_loss = loss
        self.validated.append((self.step, loss))
        if self.step == 0:
            return False  # what the run began with is for comparison: it is no result
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self.in_vain = loss, self.step, 0
            return True
        self.in_vain += 1
        self.ended_early = 0 < patience <= self.in_vain
        return False

    def answered(self, answers: list[str]) -> None:
        self.first_answers = self.first_answers or answers
        self.last_answers, self.sampled_at = answers, self.step

    def copy(self) -> "Course":
        told = asdict(self)
        return Course(**told)

    def told(self) -> dict[str, Any]:
        return asdict(self)

    def is_sound(self) -> bool:
        """Of one that was read back: its numbers are finite, and its counters fit each other."""
        numbers = [self.train_loss, self.valid_loss, self.best_loss, self.mean_loss, self.least_mean]
        numbers += [x for point in [*self.losses, *self.validated] for x in point]
        counts = (self.step, self.tokens, self.validations, self.best_step, self.in_vain)
        finite = all(x is None or math.isfinite(x) for x in numbers)
        bounded = self.every >= 1 and len(self.losses) <= MOST_POINTS and 1 <= self.unit < math.inf
        return finite and min(counts) >= 0 and bounded


def perplexity(loss: float) -> float | None:
    """None for what no float holds."""
    return math.exp(loss) if loss < 700 else None
