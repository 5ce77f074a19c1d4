"""/peer: what relay processes ask each other, signed by one for another (peers.py). Nobody else has a use for it."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

import frames
import wire
from frames import AnswerHead
from relay import errors, hop
from relay.bodies import read_body
from relay.dialout import DialOut
from relay.generations import Generations
from relay.peers import Peers
from relay.settings import Settings
from relay.streams import Endings, EventStream
from relay.transport import Answer, Endpoint, TransportFailed

log = logging.getLogger("relay.peers")


@dataclass(frozen=True)
class PeerApi:
    peers: Peers
    dialout: DialOut
    generations: Generations
    settings: Settings
    stopping: asyncio.Event
    endings: Endings

    async def signed(self, request: Request) -> bytes:
        """The body. Raises BadSignature, TooLarge."""
        target = request.scope["raw_path"].decode("ascii")
        if request.url.query:
            target += "?" + request.scope["query_string"].decode("ascii")
        sha256 = self.peers.verify(request.method, target, request.headers)
        body = await read_body(request, self.settings.max_body_bytes + frames.MOST_BYTES)
        if not hmac.compare_digest(wire.body_sha256(body), sha256):
            raise errors.BadSignature("the body is not the one that was signed")
        return body


def router(api: PeerApi) -> APIRouter:
    routes = APIRouter(prefix="/peer", include_in_schema=False)

    @routes.post("/gpus/{gpu_id}/{epoch}")
    async def to_gpu(gpu_id: str, epoch: int, request: Request) -> Response:
        """A request for a gpu that dialled in to this process."""
        try:
            head, body = hop.unpacked(await api.signed(request))
        except ValueError as exc:
            raise errors.InvalidRequest("the head of the request can't be read") from exc
        to = Endpoint(gpu_id, epoch, gpu_id, wire.DIALLED, None, "")
        return _Hopped(api, to, head, body)

    @routes.get("/generations/{generation_id}")
    async def again(generation_id: str, request: Request, owner: str, after: int) -> Response:
        await api.signed(request)
        generation = api.generations.get(owner, generation_id)
        return EventStream(api.generations.frames(generation, after), api.stopping)

    @routes.delete("/generations/{generation_id}")
    async def stop(generation_id: str, request: Request, owner: str) -> JSONResponse:
        await api.signed(request)
        api.generations.stop(api.generations.get(owner, generation_id))
        return JSONResponse({"id": generation_id, "deleted": True})

    return routes


class _Hopped(Response):
    """The gpu's answer in parts (hop.py). The gpu hears when the other process leaves."""

    def __init__(self, api: PeerApi, to: Endpoint, head: frames.RequestHead, body: bytes) -> None:
        self._api, self._to, self._head, self._body = api, to, head, body
        self._began = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._api.endings.watched(receive) as early:
            await self._pass_on(send)
        if early.why == "stopping":
            if not self._began:
                raise errors.Stopping("this relay process is being restarted")
            await send({"type": "http.response.body", "body": b""})

    async def _pass_on(self, send: Send) -> None:
        head = self._head
        try:
            answer: Answer = await self._api.dialout.request(
                self._to, head.method, head.target, head.headers, self._body
            )
        except TransportFailed as exc:
            raise errors.GpuUnreachable(f"the gpu is not reached from this relay process: {exc}") from exc
        try:
            kind = [(b"content-type", b"application/octet-stream"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": kind})
            self._began = True
            async for data in _parts(answer):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            answer.close()


async def _parts(answer: Answer) -> AsyncIterator[bytes]:
    yield hop.part(AnswerHead(status=answer.status, headers=dict(answer.headers)).model_dump_json().encode())
    try:
        async for chunk in answer.chunks():
            yield hop.part(chunk)
    except TransportFailed as exc:
        log.warning("a gpu's answer for another relay process broke off: %s", exc)
        return  # without the end, which tells them
    yield hop.END
