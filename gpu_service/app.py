"""HTTP routes over the worker: the OpenAI API on this gpu. Thin; what takes time happens elsewhere.

The relay's requests and a person's `curl` meet the same routes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import logs
import wire
from gpu_service import bodies, data_report, image, layers, plan, previews
from gpu_service.answering import Answering, Prepared, Tuned
from gpu_service.answers import UNEXPECTED, ended, frame, unless_gone
from gpu_service.data import TrainOn
from gpu_service.device import Device
from gpu_service.drawing import PictureBody, PictureShape
from gpu_service.errors import BadRequest, GpuError
from gpu_service.gate import Gate, Identity
from gpu_service.metrics import CONTENT_TYPE
from gpu_service.models import Models, Source
from gpu_service.sd import PictureSource
from gpu_service.text import Event, Finish, PromptTold
from gpu_service.worker import Worker

log = logging.getLogger(__name__)

T = TypeVar("T")
HEADERS = ((b"x-content-type-options", b"nosniff"),)
CLIENT_CLOSED = 499  # nginx's number for a caller who left; nobody reads it


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the routes are made of."""

    gate: Gate
    identity: Callable[[], Identity | None]
    device: Device
    models: Models
    worker: Worker
    tokenizing: Executor  # tokenizers are fast, but not for a whole book on the event loop
    packing: Executor  # pictures into files and out of them: seconds, for which no prompt waits
    tuned: Callable[[str], Awaitable[Tuned | None]]  # by model id; None where there is no such model


def create_app(parts: Parts) -> FastAPI:
    app = FastAPI(title="I'm Fine gpu", docs_url=None, redoc_url=None)
    routes = _Routes(parts)
    app.add_api_route("/healthz", routes.healthz, methods=["GET"])
    app.add_api_route("/metrics", routes.metrics, methods=["GET"])
    app.add_api_route("/challenge", routes.challenge, methods=["POST"])
    app.add_api_route("/v1/models", routes.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}/layers", routes.model_layers, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", routes.get_model, methods=["GET"])
    app.add_api_route("/v1/layers/preview", routes.preview, methods=["POST"])
    app.add_api_route("/v1/data/report", routes.data_report, methods=["POST"])
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"])
    app.add_api_route("/v1/completions", routes.completion, methods=["POST"])
    app.add_api_route("/v1/images/generations", routes.pictures, methods=["POST"])
    app.state.metrics = parts.worker.metrics
    app.add_middleware(
        logs.RequestLine, log=log, watch=parts.worker.metrics, fault=_fault, left=(ClientDisconnect,), headers=HEADERS
    )
    app.add_exception_handler(GpuError, _render)
    app.add_exception_handler(HTTPException, _render_http)
    app.add_exception_handler(ClientDisconnect, _render_gone)
    return app


class _Routes:
    def __init__(self, parts: Parts) -> None:
        self._p = parts
        self._answering = Answering(parts.models, parts.tokenizing, parts.tuned)

    async def healthz(self) -> dict[str, str]:
        """Open to all, and says nothing but that the process answers."""
        return {"status": "ok"}

    async def metrics(self, request: Request) -> Response:
        """For Prometheus; its text format."""
        await self._p.gate.admit(request)
        text = await asyncio.to_thread(self._p.worker.metrics.text)
        return Response(text, media_type=CONTENT_TYPE, headers={"cache-control": "no-store"})

    async def challenge(self, request: Request) -> Response:
        """The relay's nonce, signed. Only a signed request gets here with an identity to answer for."""
        body = bodies.parse(wire.Challenge, await self._p.gate.admit(request))
        identity = self._p.identity()
        if identity is None:
            raise BadRequest("This gpu is not enrolled with a relay.")
        proof = wire.challenge_proof(identity.signing_key, body.nonce, identity.by)
        return JSONResponse(wire.ChallengeReply(proof=proof).model_dump())

    async def list_models(self, request: Request) -> Response:
        await self._p.gate.admit(request)
        return JSONResponse({"object": "list", "data": [self._model(m) for m in self._p.models.offered()]})

    async def get_model(self, model: str, request: Request) -> Response:
        await self._p.gate.admit(request)
        source, tuned = await self._answering.resolve(model)
        found = next(m for m in self._p.models.offered() if m.id == source.id)
        extra = {"id": model, "base_model": source.id} if tuned else {}
        return JSONResponse({**self._model(found), **extra})

    def _model(self, m: wire.OfferedModel) -> dict[str, Any]:
        return {"object": "model", "created": 0, "owned_by": "base", **m.model_dump()}

    async def model_layers(self, model: str, request: Request, component: str | None = None) -> Response:
        await self._p.gate.admit(request)
        source, _ = await self._answering.resolve_either(model)
        told = {"model": source.id, "family": source.family, "tied": source.tied, "revision": source.revision}
        return JSONResponse({**told, **layers.describe(source.tensors, component)})

    async def preview(self, request: Request) -> Response:
        """What a layer spec would train, and what that costs; nothing runs."""
        body = bodies.parse(previews.PreviewBody, await self._p.gate.admit(request))
        source, _ = await self._answering.resolve_either(body.model)
        # Off the event loop: a caller's regular expression may take its time.
        return JSONResponse(await self._answering.off_loop(lambda: self._previewed(source, body)))

    def _previewed(self, source: Source | PictureSource, body: previews.PreviewBody) -> Any:
        worker, device = self._p.worker, self._p.device
        if isinstance(source, PictureSource):
            return previews.of_pictures(source, body, device, worker.picture_s(source.id))
        fits = self._p.models.fits(source.id, layers.quantize(body.specs))
        return previews.of_text(source, body, device, worker.flops_per_s(source.id), fits=fits)

    async def data_report(self, request: Request) -> Response:
        """What a model will see of some rows; nothing is kept."""
        body = bodies.parse(data_report.ReportBody, await self._p.gate.admit(request))
        source, _ = await self._answering.resolve(body.model)
        length = plan.max_length(body.max_length_tokens, source)
        train_on: TrainOn = "completions" if body.train_on == "auto" else body.train_on
        return JSONResponse(
            await self._answering.off_loop(
                lambda: data_report.build(source.tokenizer, source.id, body.rows, length, train_on)
            )
        )

    async def chat(self, request: Request) -> Response:
        raw = await self._p.gate.admit(request)
        return await self._answer(request, await self._answering.chat(raw, _caller(request)))

    async def completion(self, request: Request) -> Response:
        raw = await self._p.gate.admit(request)
        return await self._answer(request, await self._answering.completion(raw, _caller(request)))

    async def pictures(self, request: Request) -> Response:
        body = bodies.parse(PictureBody, await self._p.gate.admit(request))
        either, tuned = await self._answering.resolve_either(body.model)
        source = self._p.models.picture_source(either.id)
        caller = _caller(request)
        wanted = await self._packing(lambda: body.wanted(source, caller))
        shape, shown = PictureShape.new(body, wanted), self._p.worker.draw(wanted, tuned.adapter if tuned else None)
        first = await unless_gone(request, anext(shown))
        tells = wire.HEADER_CALLER in request.headers
        if body.stream:
            frames = self._picture_frames(shape, _with(first, shown), tells)
            return StreamingResponse(
                ended(frames), media_type="text/event-stream", headers={"cache-control": "no-store"}
            )

        async def whole() -> dict[str, Any]:
            async with aclosing(_with(first, shown)) as pictures:  # type: ignore[type-var]
                made = [picture async for picture in pictures]
            return await self._packing(lambda: shape.whole(made))

        answer = await unless_gone(request, whole())
        used = answer["usage"]
        headers = {wire.HEADER_USAGE: f"{used['input_tokens']},{used['output_tokens']}"} if tells else None
        return JSONResponse(answer, headers=headers)

    async def _picture_frames(
        self, shape: PictureShape, shown: AsyncIterator[image.Shown], tells: bool
    ) -> AsyncIterator[bytes]:
        """What is drawn is told as it is shown: a caller may leave with a picture that is nearly done."""
        drawn: dict[int, int] = {}
        async with aclosing(shown):  # type: ignore[type-var]
            if tells:
                yield _used(shape.read, 0)
            async for picture in shown:
                yield frame(await self._packing(partial(shape.event, picture)))
                drawn[picture.index] = shape.drawn(picture)
                if tells:
                    yield _used(shape.read, sum(drawn.values()))

    async def _packing(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._p.packing, work)

    async def _answer(self, request: Request, prepared: Prepared) -> Response:
        body, wanted, shape = prepared.body, prepared.wanted, prepared.shape
        events = self._p.worker.generate(wanted)
        # The first event comes before the status is sent, so that what fails at the start has a status of its own.
        first = await unless_gone(request, anext(events))
        tells = wire.HEADER_CALLER in request.headers  # a relay asks, which counts for its users
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            told = len(wanted.prompt) if tells else None
            frames = _frames(shape, _with(first, events), wanted.n, prepared.echo, wanted.tell_prompt, usage, told)
            return StreamingResponse(
                ended(frames), media_type="text/event-stream", headers={"cache-control": "no-store"}
            )
        answer = await unless_gone(request, prepared.whole(_with(first, events)))
        used = answer["usage"]
        headers = {wire.HEADER_USAGE: f"{used['prompt_tokens']},{used['completion_tokens']}"} if tells else None
        return JSONResponse(answer, headers=headers)


def _caller(request: Request) -> str:
    return request.headers.get(wire.HEADER_CALLER, "")


async def _with(first: T, events: AsyncIterator[T]) -> AsyncIterator[T]:
    """The events, the first of which has been taken already."""
    async with aclosing(events):  # type: ignore[type-var]
        yield first
        async for event in events:
            yield event


async def _frames(
    shape: bodies.AnswerShape,
    events: AsyncIterator[Event],
    n: int,
    echo: str,
    told: bool,
    include_usage: bool,
    prompt_tokens: int | None,
) -> AsyncIterator[bytes]:
    """Server-sent events. With `prompt_tokens` they begin and end with comments for the relay, which counts what its
    users use.
    """
    finishes, written = list[Finish](), [len(echo)] * n
    async with aclosing(events):  # type: ignore[type-var]
        if prompt_tokens is not None:
            yield _used(prompt_tokens, 0)
        for index in range(n):
            if opening := shape.first(index):
                yield frame(opening)
            if echo and not told:
                yield frame(shape.piece(index, echo))
        async for event in events:
            if isinstance(event, PromptTold):
                for index in range(n):
                    yield frame(shape.piece(index, echo, event.drawn))
            elif isinstance(event, Finish):
                finishes.append(event)
                yield frame(shape.last(event))
            else:
                yield frame(shape.piece(event.index, event.text, event.drawn, written[event.index]))
                written[event.index] += len(event.text)
        if include_usage:
            yield frame(shape.usage_only(finishes))
        if prompt_tokens is not None:
            yield _used(prompt_tokens, sum(finish.completion_tokens for finish in finishes))


def _used(prompt_tokens: int, completion_tokens: int) -> bytes:
    return wire.USAGE_COMMENT + f"{prompt_tokens},{completion_tokens}\n\n".encode()


async def _render(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, GpuError)
    request.app.state.metrics.refused(exc.code)
    headers = {"retry-after": "2"} if exc.status in (429, 503) else None
    return JSONResponse(exc.body(), exc.status, headers)


async def _render_http(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    message = f"There is no {request.method} {request.url.path} here."
    return JSONResponse(wire.error_body(message, type="invalid_request_error", code="not_found"), exc.status_code)


async def _render_gone(request: Request, exc: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


def _fault(request_id: str) -> Response:
    return JSONResponse(UNEXPECTED, 500)
