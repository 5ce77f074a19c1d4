"""What every kind of answer shares: the frames of a stream and its end, and a caller who hangs up."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

import wire
from gpu_service.errors import GpuError

log = logging.getLogger(__name__)

T = TypeVar("T")

UNEXPECTED = wire.error_body(
    "Something failed on this gpu that should not have; its log says what.", type="server_error", code="internal_error"
)


def frame(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


async def ended(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The frames, then [DONE]. An error among them is an event of its own, and no [DONE] follows it."""
    async with aclosing(frames):  # type: ignore[type-var]
        try:
            async for written in frames:
                yield written
            yield b"data: [DONE]\n\n"
        except GpuError as exc:
            yield frame(exc.body())
        except Exception:  # the answer ends here, whatever it was
            log.exception("a streamed answer failed")
            yield frame(UNEXPECTED)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """The result; or ClientDisconnect, with the work cancelled, as soon as the caller hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for waiting in (task, gone):
            waiting.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await waiting


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
