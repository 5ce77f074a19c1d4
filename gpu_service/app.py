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
from gpu_service import bodies, data_report, image, layers, plan
from gpu_service.answers import UNEXPECTED, ended, frame, unless_gone
from gpu_service.data import TrainOn, encode, render_chat
from gpu_service.device import Device
from gpu_service.drawing import PictureBody, PictureShape
from gpu_service.errors import BadRequest, GpuError, NoSuchModel, PromptTooLong
from gpu_service.gate import Gate, Identity
from gpu_service.metrics import CONTENT_TYPE
from gpu_service.models import Models, Source
from gpu_service.sd import PictureSource
from gpu_service.text import Event, Finish, Piece, PromptTold
from gpu_service.worker import AdapterFiles, Generation, Worker

log = logging.getLogger(__name__)

T = TypeVar("T")
HEADERS = ((b"x-content-type-options", b"nosniff"),)
CLIENT_CLOSED = 499  # nginx's number for a caller who left; nobody reads it


@dataclass(frozen=True)
class Tuned:
    """A tuned model whose files are on this disk."""

    base_model: str
    adapter: AdapterFiles


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the routes are made of."""

    gate: Gate
    identity: Callable[[], Identity | None]
    device: Device
    models: Models
    worker: Worker
    tokenizing: Executor  # tokenizers are fast, but not for a whole book on the event loop
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
        source, tuned = await self._resolve(model)
        found = next(m for m in self._p.models.offered() if m.id == source.id)
        extra = {"id": model, "base_model": source.id} if tuned else {}
        return JSONResponse({**self._model(found), **extra})

    def _model(self, m: wire.OfferedModel) -> dict[str, Any]:
        return {"object": "model", "created": 0, "owned_by": "base", **m.model_dump()}

    async def model_layers(self, model: str, request: Request, component: str | None = None) -> Response:
        await self._p.gate.admit(request)
        source, _ = await self._resolve_either(model)
        told = {"model": source.id, "family": source.family, "tied": source.tied, "revision": source.revision}
        return JSONResponse({**told, **layers.describe(source.tensors, component)})

    async def preview(self, request: Request) -> Response:
        """What a layer spec would train, and what that costs; nothing runs."""
        body = bodies.parse(bodies.PreviewBody, await self._p.gate.admit(request))
        source, _ = await self._resolve_either(body.model)
        # Off the event loop: a caller's regular expression may take its time.
        speed = self._p.worker.flops_per_s(source.id)
        return JSONResponse(await self._off_loop(lambda: self._previewed(source, body, speed)))

    def _previewed(self, source: Source | PictureSource, body: bodies.PreviewBody, speed: float | None) -> Any:
        fits = isinstance(source, PictureSource) or self._p.models.fits(source.id, layers.quantize(body.specs))
        return bodies.preview(source, body, self._p.device, speed, fits=fits)

    async def data_report(self, request: Request) -> Response:
        """What a model will see of some rows; nothing is kept."""
        body = bodies.parse(data_report.ReportBody, await self._p.gate.admit(request))
        source, _ = await self._resolve(body.model)
        length = plan.max_length(body.max_length_tokens, source)
        train_on: TrainOn = "completions" if body.train_on == "auto" else body.train_on
        return JSONResponse(
            await self._off_loop(lambda: data_report.build(source.tokenizer, source.id, body.rows, length, train_on))
        )

    async def chat(self, request: Request) -> Response:
        body = bodies.parse(bodies.ChatBody, await self._p.gate.admit(request))
        source, tuned = await self._resolve(body.model)

        def tokens() -> list[int]:
            messages = [m.plain() for m in body.messages]
            return encode(source.tokenizer, render_chat(source.tokenizer, messages, add_generation_prompt=True),
                          special=False, param="messages")  # fmt: skip

        prompt = await self._off_loop(tokens)
        return await self._answer(request, body, source, tuned, prompt, "messages")

    async def completion(self, request: Request) -> Response:
        body = bodies.parse(bodies.CompletionBody, await self._p.gate.admit(request))
        source, tuned = await self._resolve(body.model)
        text = body.text()
        prompt = await self._off_loop(lambda: encode(source.tokenizer, text, special=True))
        if not prompt and source.tokenizer.bos_token_id is not None:
            prompt = [source.tokenizer.bos_token_id]
        if not prompt:
            raise BadRequest(
                "prompt is empty, and this model has no token to begin with: give some text.", param="prompt"
            )
        return await self._answer(request, body, source, tuned, prompt, "prompt")

    async def pictures(self, request: Request) -> Response:
        body = bodies.parse(PictureBody, await self._p.gate.admit(request))
        known = body.model in self._p.models.ids()
        source = self._p.models.picture_source(body.model if known else (await self._resolve(body.model))[0].id)
        caller = request.headers.get(wire.HEADER_CALLER, "")
        wanted = await self._off_loop(lambda: body.wanted(source, caller))
        shape, shown = PictureShape.new(body, wanted), self._p.worker.draw(wanted)
        first = await unless_gone(request, anext(shown))
        if body.stream:
            frames = self._picture_frames(shape, _with(first, shown))
            return StreamingResponse(
                ended(frames), media_type="text/event-stream", headers={"cache-control": "no-store"}
            )

        async def whole() -> dict[str, Any]:
            async with aclosing(_with(first, shown)) as pictures:  # type: ignore[type-var]
                made = [picture async for picture in pictures]
            return await self._off_loop(lambda: shape.whole(made))

        return JSONResponse(await unless_gone(request, whole()))

    async def _picture_frames(self, shape: PictureShape, shown: AsyncIterator[image.Shown]) -> AsyncIterator[bytes]:
        async with aclosing(shown):  # type: ignore[type-var]
            async for picture in shown:
                yield frame(await self._off_loop(partial(shape.event, picture)))

    async def _answer(
        self,
        request: Request,
        body: bodies.ChatBody | bodies.CompletionBody,
        source: Source,
        tuned: Tuned | None,
        prompt: list[int],
        param: str,
    ) -> Response:
        room = source.context_tokens - len(prompt)
        if room < min(1, body.wanted_tokens):
            raise PromptTooLong(len(prompt), source.context_tokens, param=param)
        wanted = Generation(
            base_model=source.id,
            adapter=tuned.adapter if tuned else None,
            prompt=prompt,
            sampling=body.sampling(min(room, body.wanted_tokens), source, body.wanted_logprobs),
            dials=body.dials_for(source.tensors, source.n_layers),
            n=body.n or 1,
            tell_prompt=isinstance(body, bodies.CompletionBody) and body.tells_prompt,
            caller=request.headers.get(wire.HEADER_CALLER, ""),
            alone=body.deterministic,
            shorten=isinstance(body, bodies.ChatBody) and not body.names_limit,
        )
        shape = bodies.AnswerShape.new(isinstance(body, bodies.ChatBody), body.model, source.token_text)
        echo = body.text() if isinstance(body, bodies.CompletionBody) and body.echo else ""
        events = self._p.worker.generate(wanted)
        # The first event comes before the status is sent, so that what fails at the start has a status of its own.
        first = await unless_gone(request, anext(events))
        tells = wire.HEADER_CALLER in request.headers  # a relay asks, which counts for its users
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            told = len(prompt) if tells else None
            frames = _frames(shape, _with(first, events), wanted.n, echo, wanted.tell_prompt, usage, told)
            return StreamingResponse(
                ended(frames), media_type="text/event-stream", headers={"cache-control": "no-store"}
            )
        answer = await unless_gone(request, _whole(shape, _with(first, events), wanted.n, echo))
        used = answer["usage"]
        headers = {wire.HEADER_USAGE: f"{used['prompt_tokens']},{used['completion_tokens']}"} if tells else None
        return JSONResponse(answer, headers=headers)

    async def _resolve(self, model: str) -> tuple[Source, Tuned | None]:
        """A model of text. Raises NoSuchModel, naming those that exist, and OtherKind."""
        source, tuned = await self._resolve_either(model)
        return self._p.models.source(source.id), tuned

    async def _resolve_either(self, model: str) -> tuple[Source | PictureSource, Tuned | None]:
        """Raises NoSuchModel, naming those that exist."""
        if model in self._p.models.ids():
            return self._p.models.either_source(model), None
        tuned = await self._p.tuned(model)
        if tuned is None:
            raise NoSuchModel(model, self._p.models.ids())
        return self._p.models.either_source(tuned.base_model), tuned

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._p.tokenizing, work)


async def _with(first: T, events: AsyncIterator[T]) -> AsyncIterator[T]:
    """The events, the first of which has been taken already."""
    async with aclosing(events):  # type: ignore[type-var]
        yield first
        async for event in events:
            yield event


async def _whole(shape: bodies.AnswerShape, events: AsyncIterator[Event], n: int, echo: str) -> dict[str, Any]:
    answers, finishes = [bodies.Answer(echo) for _ in range(n)], []
    async with aclosing(events):  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, PromptTold):
                for answer in answers:
                    answer.drawn, answer.offsets = event.drawn, shape.offsets(event.drawn, echo, 0)
                continue
            answer = answers[event.index]
            if isinstance(event, Piece):
                answer.offsets += shape.offsets(event.drawn, event.text, len(answer.text))
                answer.text += event.text
                answer.drawn += event.drawn
            else:
                answer.reason = event.reason
                finishes.append(event)
    return shape.whole(answers, finishes)


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
