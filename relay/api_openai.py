"""/v1: the OpenAI API, as the official client speaks it, and a few routes and fields of our own.

https://platform.openai.com/docs/api-reference. Each user sees their own files, jobs and tuned models.
"""

import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from sqlalchemy import Row

import wire
from relay import errors, kinds, shapes
from relay.accounts import Scope, User
from relay.blobs import Blobs
from relay.bodies import Form, parse, parse_object, read_body, string_field
from relay.dispatcher import Dispatcher
from relay.files import BATCH_PURPOSE, PURPOSE, Files, file_ref
from relay.gpu_client import GpuClient
from relay.gpus import Gpus
from relay.jobs import Jobs, NewJob
from relay.limits import Limits
from relay.models import Model, Models
from relay.placement import Placement
from relay.proxy import Ask, Proxy
from relay.room import Room
from relay.sessions import Sessions
from relay.settings import Settings
from relay.usage import Usage
from relay.waiting import MAX_WAIT_S, Waiting

FORM_OVERHEAD_BYTES = 2**16  # what a form may be larger than its file
MAX_ACCEPT_CHARS = 200  # a longer one is not passed on: it stands in a frame's head, which has a bound
PREVIEW = "/v1/layers/preview"
REPORT_CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; sandbox"
)

Limit = Annotated[int, Query(ge=1, le=100)]
Component = Annotated[str, Query(min_length=1, max_length=50)]


@dataclass(frozen=True)
class OpenAIApi:
    """The routes' parts, and what several of them begin with."""

    sessions: Sessions
    limits: Limits
    gpus: Gpus
    jobs: Jobs
    files: Files
    models: Models
    blobs: Blobs
    room: Room
    client: GpuClient
    proxy: Proxy
    waiting: Waiting
    usage: Usage
    dispatcher: Dispatcher
    placement: Placement
    settings: Settings

    async def user(self, request: Request, scope: Scope | None = None) -> User:
        """Counts as one request. Raises InvalidKey, Forbidden, MissingScope, RateLimited."""
        user = await self.sessions.caller(request.headers, secure=request.scope["scheme"] == "https")
        request.state.user_id = user.id
        left = self.limits.take(user)
        request.state.headers = [(name.encode(), value.encode()) for name, value in left.items()]
        if scope:
            user.need(scope)
        return user

    async def forward(
        self, request: Request, user: User, base: str, target: str, body: bytes = b"", wait_s: float = 0.0
    ) -> Response:
        headers = {"x-request-id": request.state.request_id}
        if body:
            headers["content-type"] = "application/json"  # it was parsed as that
        if 0 < len(accept := request.headers.get("accept", "")) <= MAX_ACCEPT_CHARS:
            headers["accept"] = accept
        ask = Ask(user.id, base, request.method, target, body, headers, user.key_id)
        return self.waiting.forward(ask, wait_s) if wait_s else self.proxy.forward(ask)

    async def generate(self, request: Request) -> Response:
        """Raises InvalidKey, TooLarge, InvalidRequest, ModelNotFound; the gpu judges the rest of the body."""
        user = await self.user(request, "generate")
        await self.usage.check(user)
        body = await read_body(request, self.settings.max_body_bytes)
        fields = parse_object(body)
        base = await self.models.base_of(user.id, string_field(fields, "model"))
        if not isinstance(fields.get("stream", False), bool | None):
            raise errors.InvalidRequest("stream: use true or false", param="stream")
        return await self.forward(request, user, base, request.scope["path"], body, _wait_s(fields))

    async def shown(self, job: Row[Any]) -> dict[str, Any]:
        return shapes.job(job, await self.placement.waiting_for([job]))

    async def refused_layers(self, model: Model, layers: list[dict[str, Any]]) -> Response | None:
        """A gpu's 400 about these layers; None if it accepts them, or none can be asked now."""
        to = await self.gpus.choose(model.base)
        if to is None:
            return None
        try:
            status, body = await self.client.ask(to, "POST", PREVIEW, {"model": model.base, "layers": layers})
        except errors.GpuUnreachable:
            self.gpus.mark_unreachable(to)
            return None
        return Response(body, 400, media_type="application/json") if status == 400 else None


def _wait_s(fields: dict[str, Any]) -> float:
    """How long a caller waits for a gpu. Raises InvalidRequest."""
    wait_s = fields.get("wait_s")
    if wait_s is None:
        return 0.0
    if isinstance(wait_s, bool) or not isinstance(wait_s, int | float) or not 0 <= wait_s <= MAX_WAIT_S:
        raise errors.InvalidRequest(f"wait_s: use 0 to {MAX_WAIT_S:.0f} seconds", param="wait_s")
    if wait_s and fields.get("stream") is not True:
        raise errors.InvalidRequest("wait_s: needs 'stream': true, for only a stream can be kept open", param="wait_s")
    return float(wait_s)


def router(api: OpenAIApi) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    for add in (_generation, _models, _files, _jobs):
        add(routes, api)
    return routes


class Direct(APIRoute):
    """Its endpoint takes the request as it is: FastAPI's work on parameters would do nothing there, and be felt."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def _generation(routes: APIRouter, api: OpenAIApi) -> None:
    for name in ("chat/completions", "completions", "images/generations"):
        routes.add_api_route(
            f"/{name}", api.generate, methods=["POST"], name=name.replace("/", "_"), route_class_override=Direct
        )


def _models(routes: APIRouter, api: OpenAIApi) -> None:
    @routes.get("/models")
    async def list_models(request: Request) -> JSONResponse:
        user = await api.user(request)
        data = [shapes.model(m) for m in await api.models.visible(user.id)]
        return JSONResponse({"object": "list", "data": data, "has_more": False})

    @routes.get("/models/{model_id:path}/layers")
    async def layers(model_id: str, request: Request, component: Component | None = None) -> Response:
        """What can be trained in this model, or in one of its networks. A tuned model has the layers of its base."""
        user = await api.user(request)
        model = await api.models.resolve(user.id, model_id)
        query = f"?component={quote(component)}" if component else ""
        return await api.forward(request, user, model.base, f"/v1/models/{quote(model.base, safe='/')}/layers{query}")

    @routes.get("/models/{model_id:path}")
    async def get_model(model_id: str, request: Request) -> JSONResponse:
        user = await api.user(request)
        return JSONResponse(shapes.model(await api.models.resolve(user.id, model_id)))

    @routes.delete("/models/{model_id:path}")
    async def delete_model(model_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        await api.models.delete(user.id, model_id)
        return JSONResponse({"id": model_id, "object": "model", "deleted": True})

    @routes.post("/layers/preview")
    async def preview(request: Request) -> Response:
        user = await api.user(request, "train")
        body = await read_body(request, api.settings.max_body_bytes)
        fields = parse_object(body)
        model = await api.models.resolve(user.id, string_field(fields, "model"))
        if model.is_tuned:
            body = json.dumps({**fields, "model": model.base}).encode()
        return await api.forward(request, user, model.base, PREVIEW, body)


def _files(routes: APIRouter, api: OpenAIApi) -> None:
    @routes.post("/files")
    async def upload(request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        limit_bytes = api.settings.max_upload_bytes
        if int(request.headers.get("content-length") or 0) > limit_bytes + FORM_OVERHEAD_BYTES:
            raise errors.TooLarge(f"larger than {limit_bytes:,} bytes, which is the limit here: send less")
        form = Form(request.headers.get("content-type"))
        bound = await api.room.for_file(user.id, limit_bytes)
        if bound.bytes <= 0:
            raise bound.past  # before anything is sent
        async with api.blobs.incoming(bound) as incoming:
            await form.read(request.stream(), incoming.write, limit_bytes + FORM_OVERHEAD_BYTES)
            if form.filename is None:
                raise errors.InvalidRequest("file: is missing", param="file")
            for name in form.fields.keys() - {"purpose"}:
                raise errors.InvalidRequest(f"{name}: is not supported here: leave it out", param=name)
            if (purpose := form.fields.get("purpose", "")) not in (PURPOSE, BATCH_PURPOSE):
                message = f"purpose: use '{PURPOSE}' or '{BATCH_PURPOSE}', which is what files are for here"
                raise errors.InvalidRequest(message, param="purpose")
            return JSONResponse(shapes.file(await api.files.add(user.id, form.filename, incoming, purpose)))

    @routes.get("/files")
    async def list_files(
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
        order: Literal["asc", "desc"] = "desc",
    ) -> JSONResponse:
        user = await api.user(request, "train")
        rows, more = await api.files.page(user.id, purpose, after, limit, order == "desc")
        return JSONResponse(shapes.page(shapes.file, rows, more))

    @routes.get("/files/{file_id}")
    async def get_file(file_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        return JSONResponse(shapes.file(await api.files.get(user.id, file_id)))

    @routes.get("/files/{file_id}/content")
    async def file_content(file_id: str, request: Request) -> StreamingResponse:
        user = await api.user(request, "train")
        row = await api.files.get(user.id, file_id)
        headers = {
            "content-length": str(row.bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(row.filename, safe='')}",
        }
        return StreamingResponse(
            await api.blobs.read(row.sha256), media_type="application/octet-stream", headers=headers
        )

    @routes.delete("/files/{file_id}")
    async def delete_file(file_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        await api.files.delete(user.id, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def _jobs(routes: APIRouter, api: OpenAIApi) -> None:
    @routes.post("/fine_tuning/jobs")
    async def create_job(request: Request) -> Response:
        """Bad layers fail here if a gpu can be asked, and else when it starts. A tuned model is trained further."""
        user = await api.user(request, "train")
        await api.usage.check(user)
        body = parse_object(await read_body(request, api.settings.max_body_bytes))
        asked = parse(shapes.JobRequest, body)
        model = await api.models.resolve(user.id, asked.model)
        training = await api.files.get(user.id, asked.training_file, param="training_file", purpose=PURPOSE)
        validation = (
            await api.files.get(user.id, asked.validation_file, param="validation_file", purpose=PURPOSE)
            if asked.validation_file
            else None
        )
        kinds.check(asked, model, training, validation)
        if refused := await api.refused_layers(model, [spec.model_dump(exclude_unset=True) for spec in asked.layers]):
            return refused
        job = await api.jobs.create(
            user.id,
            NewJob(
                key_id=user.key_id,
                base_model=model.base,
                suffix=asked.suffix,
                layers=asked.layers,
                hyperparameters=asked.chosen_hyperparameters,
                seed=asked.chosen_seed,
                priority=asked.priority,
                training_file=training.id,
                training_blob=file_ref(training),
                validation_file=validation.id if validation else None,
                validation_blob=file_ref(validation) if validation else None,
                sample_prompts=asked.sample_prompts,
                concept=asked.concept,
                estimated_s=kinds.estimate_s(training, asked.chosen_hyperparameters),
                continue_from=model.id if model.is_tuned else None,
            ),
        )
        api.dispatcher.wake(job.id)
        return JSONResponse(await api.shown(job))

    @routes.get("/fine_tuning/jobs")
    async def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> JSONResponse:
        user = await api.user(request, "train")
        rows, more = await api.jobs.page(user.id, after, limit)
        waiting_for = await api.placement.waiting_for(rows)
        return JSONResponse(shapes.page(lambda row: shapes.job(row, waiting_for), rows, more))

    @routes.get("/fine_tuning/jobs/{job_id}")
    async def get_job(job_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        job = await api.jobs.get(user.id, job_id)
        return JSONResponse(await api.shown(job))

    @routes.get("/fine_tuning/jobs/{job_id}/events")
    async def job_events(job_id: str, request: Request, after: str | None = None, limit: Limit = 20) -> JSONResponse:
        """The newest first."""
        user = await api.user(request, "train")
        rows, more = await api.jobs.events(user.id, job_id, shapes.event_number(after), limit)
        return JSONResponse(shapes.page(shapes.event, rows, more))

    @routes.get("/fine_tuning/jobs/{job_id}/checkpoints")
    async def job_checkpoints(job_id: str, request: Request) -> JSONResponse:
        """Those that are kept: the last two and the best. None once the job is over."""
        user = await api.user(request, "train")
        rows = await api.jobs.checkpoints(user.id, job_id)
        return JSONResponse(shapes.page(shapes.checkpoint, rows, False))

    async def report(request: Request, job_id: str, name: str, media_type: str) -> StreamingResponse:
        user = await api.user(request, "train")
        row = await api.jobs.report(user.id, job_id, name)
        headers = {
            "content-length": str(row.bytes),
            "content-disposition": f'attachment; filename="{quote(job_id, safe="")}-{name}"',
            "content-security-policy": REPORT_CSP,
        }
        return StreamingResponse(await api.blobs.read(row.sha256), media_type=media_type, headers=headers)

    @routes.get("/fine_tuning/jobs/{job_id}/report")
    async def job_report(job_id: str, request: Request) -> StreamingResponse:
        return await report(request, job_id, wire.REPORT_JSON, "application/json")

    @routes.get("/fine_tuning/jobs/{job_id}/report.html")
    async def job_report_page(job_id: str, request: Request) -> StreamingResponse:
        """One file without a script, written by a gpu: whoever shows it runs nothing of it."""
        return await report(request, job_id, wire.REPORT_HTML, "text/html; charset=utf-8")

    @routes.post("/fine_tuning/jobs/{job_id}/pause")
    async def pause_job(job_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        job, gpu_id = await api.jobs.pause(user.id, job_id)
        api.dispatcher.ring(gpu_id)
        return JSONResponse(await api.shown(job))

    @routes.post("/fine_tuning/jobs/{job_id}/resume")
    async def resume_job(job_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        body = await read_body(request, api.settings.max_body_bytes)
        asked = parse(shapes.Resume, parse_object(body) if body.strip() else {})
        job = await api.jobs.resume(user.id, job_id, asked.learning_rate_factor)
        api.dispatcher.wake(job_id)
        return JSONResponse(await api.shown(job))

    @routes.post("/fine_tuning/jobs/{job_id}/cancel")
    async def cancel_job(job_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        job, gpu_id = await api.jobs.cancel(user.id, job_id)
        api.dispatcher.ring(gpu_id)
        api.dispatcher.wake(job_id)
        return JSONResponse(await api.shown(job))
