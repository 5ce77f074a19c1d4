"""Who waits for a gpu: one line for each base model, fair between users, whichever way they came.

A line lives in this process, and is bounded. Knows no gpu and no request.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from relay import errors

MAX_OF_A_USER = 16
MAX_IN_LINE = 1000

Door = Literal["api", "page"]


@dataclass(eq=False)
class Place:
    caller: str
    door: Door
    number: int  # counts up, in the order of asking


class Line:
    """Users take turns: a user's second waits behind everybody's first, also once the first is served."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: list[Place] = []
        self._round = 0  # whose requests are served now: the first of everybody, the second, and so on
        self._next_round: dict[str, int] = {}  # of users who are ahead of it
        self._ranks: dict[Place, int] | None = None  # from 1; None: to be found out, for the line has changed
        self.reason = "queue"  # why the first got no gpu when it tried last
        self.moved = asyncio.Event()

    def join(self, caller: str, door: Door = "api") -> Place:
        """Raises TooMany, NoGpu."""
        if sum(place.caller == caller for place in self._waiting) >= MAX_OF_A_USER:
            raise errors.TooMany(f"{MAX_OF_A_USER} requests wait already: let one of them end first")
        if len(self._waiting) >= MAX_IN_LINE:
            raise errors.NoGpu("too many wait for this model: try again later")
        place = Place(caller, door, next(self._numbers))
        self._waiting.append(place)
        self._step()
        return place

    def leave(self, place: Place) -> None:
        if place in self._waiting:
            self._waiting.remove(place)
            self._step()

    def serve(self, place: Place) -> None:
        """A gpu was chosen for it: its user's next one waits for the round after."""
        if place in self._waiting:
            self._round = max(self._round, self._next_round.get(place.caller, 0))
            self._next_round = {who: n for who, n in self._next_round.items() if n > self._round}
            self._next_round[place.caller] = self._round + 1
            self.leave(place)

    def rejoin(self, place: Place) -> None:
        """At the place that the time of asking gives: a gpu was chosen for it in vain."""
        if place not in self._waiting:
            self._next_round.pop(place.caller, None)
            self._waiting.append(place)
            self._step()

    def order(self) -> list[Place]:
        of_caller: dict[str, int] = {}
        turns: list[tuple[int, int, Place]] = []
        for place in sorted(self._waiting, key=lambda p: p.number):
            turn = of_caller.get(place.caller, max(self._round, self._next_round.get(place.caller, 0)))
            turns.append((turn, place.number, place))
            of_caller[place.caller] = turn + 1
        return [place for _, _, place in sorted(turns, key=lambda turn: turn[:2])]

    def rank(self, place: Place) -> int:
        """1 is the first. Of one that stands in it."""
        if self._ranks is None:  # once for all who ask
            self._ranks = {one: number for number, one in enumerate(self.order(), start=1)}
        return self._ranks[place]

    def is_first(self, place: Place) -> bool:
        return place in self._waiting and self.rank(place) == 1

    def of(self, door: Door) -> int:
        return sum(place.door == door for place in self._waiting)

    def is_empty(self) -> bool:
        return not self._waiting

    def _step(self) -> None:
        self._ranks = None
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()


class Lines:
    """By base model; a model for which nobody waits has none."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}

    def __contains__(self, model: str) -> bool:
        return model in self._lines

    @contextlib.contextmanager
    def joined(self, model: str, caller: str, door: Door) -> Iterator[tuple[Line, Place]]:
        """In line as long as the block lasts. Raises TooMany, NoGpu."""
        line = self._lines.setdefault(model, Line())
        try:
            place = line.join(caller, door)
            try:
                yield line, place
            finally:
                line.leave(place)
        finally:
            if line.is_empty() and self._lines.get(model) is line:
                del self._lines[model]

    def waiting(self, door: Door) -> int:
        return sum(line.of(door) for line in self._lines.values())
