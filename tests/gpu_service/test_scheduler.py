"""The policy alone: who goes next. No torch."""

from collections import defaultdict
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gpu_service.scheduler import Scheduler


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


@given(
    share=st.floats(0.1, 0.9),
    slices=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=5),
    steps=st.lists(st.floats(0.01, 0.5), min_size=1, max_size=5),
)
def test_both_get_their_share_of_device_time(share: float, slices: list[float], steps: list[float]) -> None:
    scheduler = Scheduler(share)
    spent: dict[str, float] = defaultdict(float)
    for turn in range(600):
        kind = scheduler.choose(text=True, train=True)
        assert kind
        seconds = slices[turn % len(slices)] if kind == "train" else steps[turn % len(steps)]
        spent[kind] += seconds
        scheduler.ran(kind, seconds)
    # Off by one slice or step at most, on either side.
    assert abs(spent["train"] * (1 - share) - spent["text"] * share) <= max(slices) + max(steps)
