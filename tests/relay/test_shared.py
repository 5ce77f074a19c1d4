"""Who asks for the same thing at the same moment shares one look."""

import asyncio

import pytest

from relay.shared import Shared


class Looks:
    """Counts, and finds something, or nothing, once it may end."""

    def __init__(self) -> None:
        self.begun = 0
        self.finds = True
        self.may_end = asyncio.Event()

    async def __call__(self) -> int:
        self.begun += 1
        await self.may_end.wait()
        if not self.finds:
            raise LookupError("there is nothing")
        return self.begun


async def test_one_look_for_all_and_another_for_who_comes_later() -> None:
    shared, looks = Shared[str, int](), Looks()
    asking = [asyncio.create_task(shared.get("a", looks)) for _ in range(5)]
    await asyncio.sleep(0)
    looks.may_end.set()
    assert await asyncio.gather(*asking) == [1] * 5
    looks.finds = False
    with pytest.raises(LookupError, match="nothing"):
        await shared.get("a", looks)
    assert looks.begun == 2


async def test_who_began_it_may_leave_and_the_others_still_hear() -> None:
    shared, looks = Shared[str, int](), Looks()
    first = asyncio.create_task(shared.get("a", looks))
    second = asyncio.create_task(shared.get("a", looks))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    looks.may_end.set()
    assert await second == 1
    assert first.cancelled()


async def test_all_hear_of_a_failure_and_different_keys_share_nothing() -> None:
    shared, looks = Shared[str, int](), Looks()
    asking = [asyncio.create_task(shared.get(key, looks)) for key in ("a", "a", "b")]
    looks.finds = False
    looks.may_end.set()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert looks.begun == 2
    assert [type(outcome) for outcome in outcomes] == [LookupError] * 3
