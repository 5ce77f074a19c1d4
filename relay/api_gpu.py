"""/gpu: what gpus say to the relay. All but the enrolment is signed, and verified before its body is parsed."""

import hmac
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TypeVar

from fastapi import APIRouter, Request, WebSocket
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

import wire
from relay import errors
from relay.batches import Batches
from relay.blobs import Blobs
from relay.bodies import parse, parse_object, read_body, without_nul
from relay.checkpoints import Checkpoints
from relay.dialout import DialOut
from relay.dispatcher import Dispatcher
from relay.enrol_tokens import EnrolTokens
from relay.gpus import Gpus
from relay.leases import Leases
from relay.metrics import Metrics
from relay.models import Models
from relay.settings import Settings
from relay.store import Clock
from relay.uploads import Part, Upload, Uploads

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class GpuApi:
    """The routes' parts, and what every signed route begins with."""

    enrol_tokens: EnrolTokens
    gpus: Gpus
    leases: Leases
    checkpoints: Checkpoints
    batches: Batches
    uploads: Uploads
    models: Models
    blobs: Blobs
    dispatcher: Dispatcher
    settings: Settings
    clock: Clock
    dialout: DialOut
    metrics: Metrics

    async def dialled(self, websocket: WebSocket) -> wire.SignedBy:
        """Raises BadSignature, UnknownGpu."""
        by, _ = await self.gpus.verify("GET", websocket.scope["raw_path"].decode("ascii"), websocket.headers)
        return by

    async def signed(self, request: Request) -> tuple[wire.SignedBy, str]:
        """Raises BadSignature, UnknownGpu."""
        target = request.scope["raw_path"].decode("ascii")
        if request.url.query:
            target += "?" + request.scope["query_string"].decode("ascii")
        by, sha256 = await self.gpus.verify(request.method, target, request.headers)
        request.state.gpu_id = by.gpu_id
        return by, sha256

    async def message(self, request: Request, model: type[M]) -> tuple[wire.SignedBy, M]:
        """Raises BadSignature, UnknownGpu, TooLarge, InvalidRequest."""
        by, sha256 = await self.signed(request)
        body = await read_body(request, self.settings.max_body_bytes)
        if not hmac.compare_digest(wire.body_sha256(body), sha256):
            raise errors.BadSignature("the body is not the one that was signed: sign again")
        return by, parse(model, parse_object(without_nul(body)))


def router(api: GpuApi) -> APIRouter:
    routes = APIRouter(prefix="/gpu", tags=["gpu"])

    async def promised(request: Request, sha256: str) -> wire.SignedBy:
        """Who uploads this. Raises BadSignature, UnknownGpu."""
        by, signed = await api.signed(request)
        if signed != sha256:
            raise errors.BadSignature("the signature is about another blob than the path: sign again")
        return by

    @routes.post("/enrol")
    async def enrol(request: Request) -> wire.EnrolReply:
        token_id = await api.enrol_tokens.check(request.headers.get("authorization"))
        body = without_nul(await read_body(request, api.settings.max_body_bytes))
        message = parse(wire.EnrolRequest, parse_object(body))
        reply = await api.gpus.enrol(message, token_id)
        await api.leases.adopt(wire.SignedBy(gpu_id=reply.gpu_id, epoch=reply.epoch), message.leases)
        api.dispatcher.wake()
        return reply

    @routes.post("/heartbeat")
    async def heartbeat(request: Request) -> wire.HeartbeatReply:
        """Held back until a command waits, or the time that the enrolment named is over."""
        by, beat = await api.message(request, wire.Heartbeat)
        await api.gpus.heard(by, beat)
        await api.leases.renew(by, beat.leases)
        api.dispatcher.wake()
        commands = await api.dispatcher.commands(by, beat, api.settings.heartbeat_s)
        return wire.HeartbeatReply(
            relay_time=api.clock(), reachable=api.gpus.reachable(by.gpu_id, by.epoch), commands=commands
        )

    @routes.post("/goodbye")
    async def goodbye(request: Request) -> JSONResponse:
        by, message = await api.message(request, wire.Goodbye)
        await api.gpus.goodbye(by)
        handed_back = await api.leases.hand_back(by, message.reason)
        api.dispatcher.wake()
        return JSONResponse({"handed_back": handed_back})

    @routes.websocket("/dial")
    async def dial(websocket: WebSocket) -> None:
        """The gpu's own way to be reached. Live requests go back through it once it has answered a challenge there."""
        try:
            by = await api.dialled(websocket)
        except errors.RelayError as exc:
            await websocket.send_denial_response(JSONResponse(exc.body(), exc.status))
            return
        await websocket.accept()
        try:
            async with api.dialout.joined(by, websocket) as socket:
                api.gpus.unproven(by)
                await api.gpus.dialled_in(by)
                await api.gpus.prove(by.gpu_id)
                await socket.receive()
        finally:
            if not api.dialout.has(by):
                api.gpus.unproven(by)
                await api.gpus.hung_up(by)

    @routes.post("/jobs/{job_id}/events")
    async def events(job_id: str, request: Request) -> JSONResponse:
        by, batch = await api.message(request, wire.JobEvents)
        await api.leases.record(by, job_id, batch)
        return JSONResponse({"stored": len(batch.events)})

    @routes.post("/jobs/{job_id}/finish")
    async def finish(job_id: str, request: Request) -> JSONResponse:
        by, result = await api.message(request, wire.JobResult)
        job = await api.leases.finish(by, job_id, result)
        api.dispatcher.wake()
        api.batches.wake()
        return JSONResponse({"status": job.status, "fine_tuned_model": job.fine_tuned_model})

    async def promise(request: Request, job_id: str, part: Part, sha256: str, fence: int) -> Response:
        by, _ = await api.signed(request)
        size_bytes = await api.uploads.promise(by, job_id, fence, part, sha256)
        if size_bytes is None:
            return Response(status_code=404)
        return Response(headers={"content-length": str(size_bytes)})

    @routes.head("/jobs/{job_id}/blobs/{sha256}")
    async def has_blob(job_id: str, sha256: wire.Sha256, request: Request, fence: wire.Fence) -> Response:
        """Asked before an upload, so that what is here already is not sent again."""
        return await promise(request, job_id, "result", sha256, fence)

    @routes.put("/jobs/{job_id}/blobs/{sha256}")
    async def put_blob(job_id: str, sha256: wire.Sha256, request: Request, fence: wire.Fence) -> JSONResponse:
        """Of the result."""
        by = await promised(request, sha256)
        await api.leases.finalize(by, job_id, fence)
        upload = Upload("result", sha256, request.stream(), api.settings.max_adapter_bytes)
        return JSONResponse({"bytes": await api.uploads.take(by, job_id, fence, upload)})

    @routes.head("/jobs/{job_id}/chunks/{sha256}")
    async def has_chunk(job_id: str, sha256: wire.Sha256, request: Request, fence: wire.Fence) -> Response:
        return await promise(request, job_id, "chunk", sha256, fence)

    @routes.put("/jobs/{job_id}/chunks/{sha256}")
    async def put_chunk(job_id: str, sha256: wire.Sha256, request: Request, fence: wire.Fence) -> JSONResponse:
        """Of a checkpoint that is on its way, or a part of a batch's answers."""
        by = await promised(request, sha256)
        upload = Upload("chunk", sha256, request.stream(), wire.MAX_CHUNK_BYTES)
        return JSONResponse({"bytes": await api.uploads.take(by, job_id, fence, upload)})

    @routes.post("/jobs/{job_id}/reserve")
    async def reserve(job_id: str, request: Request) -> JSONResponse:
        by, wanted = await api.message(request, wire.Reservation)
        return JSONResponse({"reserved_bytes": await api.checkpoints.reserve(by, job_id, wanted)})

    @routes.post("/jobs/{job_id}/checkpoints")
    async def checkpoint(job_id: str, request: Request) -> JSONResponse:
        by, said = await api.message(request, wire.CheckpointStored)
        kept = await api.checkpoints.store(by, job_id, said)
        api.metrics.checkpoints.inc()
        return JSONResponse({"kept": kept})

    @routes.post("/jobs/{job_id}/parts")
    async def part(job_id: str, request: Request) -> wire.PartReply:
        by, said = await api.message(request, wire.PartStored)
        return await api.batches.store(by, job_id, said)

    @routes.post("/jobs/{job_id}/release")
    async def release(job_id: str, request: Request) -> JSONResponse:
        by, said = await api.message(request, wire.Release)
        job = await api.leases.release(by, job_id, said)
        api.dispatcher.wake()
        return JSONResponse({"status": job.status})

    @routes.get("/blobs/{sha256}")
    async def get_blob(sha256: wire.Sha256, request: Request) -> StreamingResponse:
        await api.signed(request)
        size_bytes = await api.blobs.size_bytes(sha256)
        if size_bytes is None:
            raise errors.NotFound(f"no blob {sha256}")
        chunks: AsyncIterator[bytes] = await api.blobs.read(sha256)
        return StreamingResponse(
            chunks, media_type="application/octet-stream", headers={"content-length": str(size_bytes)}
        )

    @routes.get("/models/{model_id:path}")
    async def tuned_model(model_id: str, request: Request) -> wire.TunedModel:
        await api.signed(request)
        return await api.models.tuned(model_id)

    return routes
