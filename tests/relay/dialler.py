"""A gpu that dials out: the gpu service's own dial-out code, behind it a small ASGI application in place of a model."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import wire
from gpu_service.dialout import DialOut
from tests.relay.double_gpu import DONE, FRAMES, DoubleGpu

Reply = Callable[[Request, bytes], Awaitable[Response]]


async def fine(request: Request, body: bytes) -> Response:
    if not json.loads(body).get("stream"):
        return JSONResponse({"content": "I'm fine."})
    return streamed([*FRAMES, DONE])


def streamed(parts: Sequence[str] | AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(parts if isinstance(parts, AsyncIterator) else iter_of(parts), 200, EVENTS)


async def iter_of(parts: Sequence[str]) -> AsyncIterator[str]:
    for part in parts:
        yield part


EVENTS = {"content-type": "text/event-stream"}


class DiallingGpu(DoubleGpu):
    def __init__(self, *arguments: object, **more: object) -> None:
        super().__init__(*arguments, **more)  # type: ignore[arg-type]
        self.reply_with: Reply = fine
        self.asked = 0
        self.refuses_unread = False  # answers at once, whatever the body
        self._enrolled = asyncio.Condition()

    def enrol_request(self, leases: Sequence[wire.HeldLease] = (), url: str | None = None) -> wire.EnrolRequest:
        return super().enrol_request(leases).model_copy(update={"url": None, "tunnel": wire.DIALLED})

    async def enrol_and_tell(self) -> None:
        assert (await self.enrol()).status_code == 200
        async with self._enrolled:
            self._enrolled.notify_all()

    @asynccontextmanager
    async def dialling(self, relay_url: str) -> AsyncIterator[DialOut]:
        dialout = DialOut(relay_url, self, self._app)
        await dialout.open()
        try:
            yield dialout
        finally:
            await dialout.close()
            await self.http.aclose()

    # --- what the dial-out needs of a link ---

    async def wait_enrolled(self) -> wire.SignedBy:
        async with self._enrolled:
            await self._enrolled.wait_for(lambda: self.reply)
        return self.by

    async def superseded(self, by: wire.SignedBy) -> None:
        async with self._enrolled:
            await self._enrolled.wait_for(lambda: self.by != by)

    def signed(self, method: str, target: str) -> dict[str, str]:
        return self.sign(method, target)

    # --- what comes in ---

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.asked += 1
        if self.refuses_unread:
            await JSONResponse({"error": {"message": "too large"}}, 413)(scope, receive, send)
            return
        body = await request.body()
        assert self.reply
        promised = wire.verify(
            self.reply.signing_key,
            self.by,
            request.method,
            scope["raw_path"].decode(),
            request.headers,
            self._now(),
            self._seen,
        )
        assert promised == wire.body_sha256(body)
        if request.url.path == "/challenge":
            key = self.reply.signing_key if self.proves else "0" * 64
            proof = wire.challenge_proof(key, wire.Challenge.model_validate_json(body).nonce, self.by)
            await JSONResponse({"proof": proof})(scope, receive, send)
            return
        self.prompts.append(body)
        try:
            await (await self.reply_with(request, body))(scope, receive, send)
        except asyncio.CancelledError:
            self.left.set()
            raise
