"""What runs next on the device, and who may begin. Plain Python, no torch.

Device time is shared by stride scheduling (Waldspurger and Weihl, 1995): each kind of work has a share, and whoever is
furthest behind its share goes next. But two slices of training never follow each other while somebody waits for text or
a picture: chat waits for one slice, and can't starve training.
"""

from collections import OrderedDict, deque
from typing import Generic, Literal, TypeVar

Kind = Literal["text", "image", "train"]
T = TypeVar("T")


class Scheduler:
    def __init__(self, train_share: float) -> None:
        """`train_share` of device time goes to training while somebody chats; 0 < train_share < 1.

        It gets less only where a single step of text or pictures takes longer than a slice earns: then they alternate.
        """
        assert 0 < train_share < 1
        self._train_share = train_share
        self._spent: dict[Kind, float] = {"text": 0.0, "image": 0.0, "train": 0.0}  # device seconds over share
        self._ready: list[Kind] = []
        self._last: Kind | None = None
        self._slice = 0.0  # what the last one counted

    def choose(self, *, text: bool, train: bool, image: bool = False) -> Kind | None:
        """None when there is nothing to do. Of those equally far behind, text goes first: somebody is waiting."""
        kinds: dict[Kind, bool] = {"text": text, "image": image, "train": train}
        ready = [kind for kind, is_ready in kinds.items() if is_ready]
        going = [self._spent[kind] for kind in ready if kind in self._ready]
        for kind in ready:
            if kind not in self._ready:
                # Who was idle has neither a claim to the time that passed meanwhile, nor a debt for time before.
                self._spent[kind] = min(going, default=max(self._spent.values()))
        self._ready = ready
        live = [kind for kind in ready if kind != "train"]
        if live and self._last == "train":
            first = min(live, key=lambda kind: self._spent[kind])
            # Beyond one slice, what training is owed is forgiven, or short steps would pay for long ones later.
            self._spent["train"] = max(self._spent["train"], self._spent[first] - self._slice)
            return first
        return min(ready, key=lambda kind: self._spent[kind], default=None)

    def ran(self, kind: Kind, seconds: float) -> None:
        live = [ready for ready in self._ready if ready != "train"]
        share = self._train_share if kind == "train" else (1 - self._train_share) / len(live)
        self._spent[kind] += seconds / share
        self._last = kind
        if kind == "train":
            self._slice = seconds / share


class Admission(Generic[T]):
    """Who waits and who may begin: in order, fair between callers, within a budget of bytes.

    Callers take turns. A request that does not fit yet holds the line until it does, so that a long one is not passed
    over for ever by short ones. What can never fit must not be asked for.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self._waiting: OrderedDict[str, deque[tuple[T, int]]] = OrderedDict()  # by caller, whose turn it is first
        self._held: dict[int, int] = {}  # id of an admitted request -> bytes

    def __len__(self) -> int:
        return sum(len(line) for line in self._waiting.values())

    def ask(self, request: T, caller: str, n_bytes: int) -> None:
        assert n_bytes <= self.budget_bytes
        self._waiting.setdefault(caller, deque()).append((request, n_bytes))

    def next(self) -> T | None:
        """The next that may begin now; it holds its bytes until it is `done`."""
        if not self._waiting:
            return None
        caller, line = next(iter(self._waiting.items()))
        request, n_bytes = line[0]
        if self.held_bytes + n_bytes > self.budget_bytes:
            return None
        line.popleft()
        if line:
            self._waiting.move_to_end(caller)
        else:
            del self._waiting[caller]
        self._held[id(request)] = n_bytes
        self.held_bytes += n_bytes
        return request

    def done(self, request: T) -> None:
        """Ended, whether it began or not."""
        self.held_bytes -= self._held.pop(id(request), 0)
        for caller, line in list(self._waiting.items()):
            kept = deque(entry for entry in line if entry[0] is not request)
            if len(kept) < len(line):
                self._waiting[caller] = kept
                if not kept:
                    del self._waiting[caller]

    def waiting(self) -> list[T]:
        return [request for line in self._waiting.values() for request, _ in line]
