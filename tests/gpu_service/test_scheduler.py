"""The policy alone: who goes next. No torch."""

from collections import defaultdict
from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from gpu_service.scheduler import Admission, Scheduler


def test_nothing_to_do_is_none() -> None:
    assert Scheduler(0.5).choose(text=False, train=False) is None


def test_alone_each_kind_has_the_device_to_itself() -> None:
    scheduler = Scheduler(0.5)
    for _ in range(5):
        assert scheduler.choose(text=False, train=True) == "train"
        scheduler.ran("train", 1.0)
    for _ in range(5):
        assert scheduler.choose(text=True, train=False) == "text"
        scheduler.ran("text", 0.1)


def test_chat_that_begins_during_training_waits_for_one_slice_at_most() -> None:
    scheduler = Scheduler(0.5)
    for _ in range(100):
        scheduler.choose(text=False, train=True)
        scheduler.ran("train", 1.0)
    assert scheduler.choose(text=True, train=True) == "text"


def test_a_long_idle_training_does_not_then_block_chat_to_catch_up() -> None:
    scheduler = Scheduler(0.5)
    for _ in range(1000):
        scheduler.choose(text=True, train=False)
        scheduler.ran("text", 0.1)
    order = []
    for _ in range(30):
        kind = scheduler.choose(text=True, train=True)
        assert kind
        order.append(kind)
        scheduler.ran(kind, 1.0 if kind == "train" else 0.1)
    assert "train" in order
    assert not any(a == b == "train" for a, b in pairwise(order))


def test_time_that_chat_used_before_a_job_began_is_no_debt_when_both_run() -> None:
    """Chat for an hour; then, in a moment without chat, a job begins; then somebody chats again."""
    scheduler = Scheduler(0.5)
    for _ in range(3600):
        scheduler.choose(text=True, train=False)
        scheduler.ran("text", 1.0)
    scheduler.choose(text=False, train=True)
    scheduler.ran("train", 1.0)
    turns = []
    for _ in range(6):
        kind = scheduler.choose(text=True, train=True)
        assert kind
        turns.append(kind)
        scheduler.ran(kind, 1.0)
    assert turns == ["text", "train"] * 3


@given(
    share=st.floats(0.1, 0.9),
    slices=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=5),
    steps=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=5),
)
def test_both_get_their_share_of_device_time(share: float, slices: list[float], steps: list[float]) -> None:
    """Off by one slice or step at most, on either side, where no step costs more than a slice pays for."""
    assume(max(steps) * share <= min(slices) * (1 - share))
    spent = _shared(Scheduler(share), slices, steps)
    assert abs(spent["train"] * (1 - share) - spent["text"] * share) <= max(slices) + max(steps)


@given(
    share=st.floats(0.05, 0.95),
    slices=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=5),
    steps=st.lists(st.floats(0.01, 5.0), min_size=1, max_size=5),
    pictures=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_no_two_slices_in_a_row_while_somebody_waits_and_training_is_never_starved(
    share: float, slices: list[float], steps: list[float], pictures: list[bool]
) -> None:
    scheduler, turns = Scheduler(share), []
    for turn in range(400):
        kind = scheduler.choose(text=True, train=True, image=pictures[turn % len(pictures)])
        assert kind
        turns.append(kind)
        scheduler.ran(kind, slices[turn % len(slices)] if kind == "train" else steps[turn % len(steps)])
    assert not any(a == b == "train" for a, b in pairwise(turns))
    assert turns.count("train") > 0 or max(slices) / share > sum(steps)


def test_after_steps_longer_than_a_slice_training_does_not_catch_up_at_the_cost_of_short_ones() -> None:
    scheduler = Scheduler(0.5)
    _shared(scheduler, slices=[1.0], steps=[5.0], turns=100)
    spent = _shared(scheduler, slices=[1.0], steps=[0.1], turns=110)
    assert abs(spent["train"] - spent["text"]) <= 2.1


def test_text_and_pictures_divide_what_training_leaves() -> None:
    scheduler = Scheduler(0.5)
    spent: dict[str, float] = defaultdict(float)
    for _ in range(1000):
        kind = scheduler.choose(text=True, train=True, image=True)
        assert kind
        spent[kind] += 0.1
        scheduler.ran(kind, 0.1)
    assert [round(spent[kind]) for kind in ("train", "text", "image")] == [50, 25, 25]


def _shared(scheduler: Scheduler, slices: list[float], steps: list[float], turns: int = 600) -> dict[str, float]:
    """Seconds by kind, of turns in which both text and training are always ready."""
    spent: dict[str, float] = defaultdict(float)
    for turn in range(turns):
        kind = scheduler.choose(text=True, train=True)
        assert kind
        seconds = slices[turn % len(slices)] if kind == "train" else steps[turn % len(steps)]
        spent[kind] += seconds
        scheduler.ran(kind, seconds)
    return spent


# --- admission ---


def test_callers_take_turns_whatever_each_has_asked_for() -> None:
    admission: Admission[str] = Admission(100)
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        admission.ask(name, caller=name[0], n_bytes=100)
    order = []
    while len(admission):
        begun = admission.next()
        assert begun
        assert admission.next() is None, "the budget is spent"
        order.append(begun)
        admission.done(begun)
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_large_request_is_not_passed_over_for_ever_by_small_ones() -> None:
    admission: Admission[str] = Admission(100)
    admission.ask("small 0", "s", 60)
    assert admission.next() == "small 0"
    admission.ask("large", "l", 100)
    for i in range(1, 5):
        admission.ask(f"small {i}", "s", 10)
    assert admission.next() is None
    admission.done("small 0")
    assert admission.next() == "large"


@given(
    lines=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=9),
)
def test_nobody_starves_however_fast_others_ask(lines: list[int], sizes: list[int]) -> None:
    """Everybody's requests wait in line; whoever gets their turn asks again at once, for ever."""
    admission: Admission[tuple[int, int]] = Admission(100)
    asked = 0

    def ask(caller: int) -> None:
        nonlocal asked
        admission.ask((caller, asked), str(caller), sizes[asked % len(sizes)])
        asked += 1

    for caller, count in enumerate(lines):
        for _ in range(count):
            ask(caller)
    first_ones = set(range(asked))
    under_way: list[tuple[int, int]] = []
    for _ in range(2 * max(lines) * len(lines)):  # of a line of so many, the last begins after that many turns
        while begun := admission.next():
            under_way.append(begun)
            first_ones.discard(begun[1])
            ask(begun[0])
        admission.done(under_way.pop(0))
    assert not first_ones


@given(data=st.data())
def test_the_budget_is_never_exceeded_and_every_request_ends(data: st.DataObject) -> None:
    """Random asking, ending and leaving, in any order."""
    admission: Admission[object] = Admission(100)
    waiting: list[object] = []
    begun: list[object] = []
    ended = 0
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["ask", "begin", "end", "leave"]))
        if action == "ask":
            waiting.append(object())
            admission.ask(waiting[-1], data.draw(st.sampled_from("abc")), data.draw(st.integers(1, 100)))
        elif action == "begin" and (request := admission.next()):
            waiting.remove(request)
            begun.append(request)
        elif action == "end" and begun:
            admission.done(begun.pop(data.draw(st.integers(0, len(begun) - 1))))
            ended += 1
        elif action == "leave" and waiting:
            admission.done(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))))
            ended += 1
        assert 0 <= admission.held_bytes <= 100
        assert len(admission) == len(waiting)
    while waiting or begun:
        while request := admission.next():
            waiting.remove(request)
            begun.append(request)
        assert begun, "somebody waits though nobody is served"
        admission.done(begun.pop(0))
    assert admission.held_bytes == 0
