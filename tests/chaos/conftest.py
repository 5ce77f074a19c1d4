"""What every chaos test begins with. docs/chaos.md lists what breaks and what holds."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.world import Way, World, Zygote, a_world


@pytest.fixture(scope="session")
async def zygote() -> AsyncIterator[Zygote]:
    zygote = Zygote()
    await zygote.open()
    yield zygote
    await zygote.close()


@pytest.fixture
async def start_world(tmp_path: Path, zygote: Zygote, tiny_dir: Path) -> AsyncIterator[Callable[..., Any]]:
    """For tests that need other settings."""
    async with AsyncExitStack() as stack:

        async def start(*before: str, **settings: str) -> World:
            return await stack.enter_async_context(a_world(tmp_path, zygote, tiny_dir, *before, **settings))

        yield start


@pytest.fixture
async def world(start_world: Callable[..., Any]) -> World:
    return await start_world()  # type: ignore[no-any-return]


@pytest.fixture(params=["http", "dialled"])
def way(request: pytest.FixtureRequest) -> Way:
    return request.param  # type: ignore[no-any-return]
