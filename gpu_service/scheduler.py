"""What runs next on the device: one step for the text rows, or one slice of training. Plain Python, no torch.

Stride scheduling (Waldspurger and Weihl, 1995): each kind of work has a share of device time, and whoever is furthest
behind its share goes next. So chat waits for one slice of training at most, and chat can't starve training.
"""

from typing import Literal

Kind = Literal["text", "train"]


class Scheduler:
    def __init__(self, train_share: float) -> None:
        """`train_share` of device time goes to training while somebody chats; 0 < train_share < 1."""
        assert 0 < train_share < 1
        self._share: dict[Kind, float] = {"text": 1 - train_share, "train": train_share}
        self._spent: dict[Kind, float] = {"text": 0.0, "train": 0.0}  # device seconds over share
        self._ready: set[Kind] = set()

    def choose(self, *, text: bool, train: bool) -> Kind | None:
        """None when there is nothing to do. Of two equally far behind, text goes first: somebody is waiting."""
        ready: set[Kind] = {kind for kind, is_ready in (("text", text), ("train", train)) if is_ready}  # type: ignore[misc]
        for kind in ready - self._ready:
            # Who was idle has no claim to the time that passed meanwhile.
            self._spent[kind] = max([self._spent[kind], *(self._spent[k] for k in self._ready & ready)])
        self._ready = ready
        return min(sorted(ready), key=lambda kind: self._spent[kind], default=None)

    def ran(self, kind: Kind, seconds: float) -> None:
        self._spent[kind] += seconds / self._share[kind]
