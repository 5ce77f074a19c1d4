"""/v1/models: import of an adapter that other tools saved, and export as one. Routes of our own, beside OpenAI's.

They stand before those in the application: a model's id may have slashes, so `{id}` takes what follows it too.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import IO, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from relay import errors, shapes
from relay.adapters import Adapters, Target, base_tensors
from relay.api_openai import FORM_OVERHEAD_BYTES, OpenAIApi
from relay.bodies import Form, parse_object
from relay.models import Model
from relay.peft_import import BaseTensors

CHUNK_BYTES = 2**18
FIELDS = ("model", "suffix")


@dataclass(frozen=True)
class AdapterApi:
    """The routes' parts."""

    openai: OpenAIApi
    adapters: Adapters

    async def tensors(self, base: Model) -> BaseTensors:
        """What a gpu that has the base model says of it. Raises NoGpu, GpuUnreachable."""
        api = self.openai
        to = await api.gpus.choose(base.id)
        if to is None:
            raise errors.NoGpu(
                f"an adapter is compared with the tensors of '{base.id}', which only a gpu that has it knows, and none "
                "is here now: try again when one is"
            )
        answers: list[dict[str, Any]] = []
        for query in ("", "?component=text_encoder") if base.family == "sd" else ("",):
            target = f"/v1/models/{quote(base.id, safe='/')}/layers{query}"
            try:
                status, body = await api.client.ask(to, "GET", target, None)
            except errors.GpuUnreachable:
                api.gpus.mark_unreachable(to)
                raise
            if status != 200:
                raise errors.GpuUnreachable(f"gpu {to.name!r} did not say what '{base.id}' consists of: try again")
            answers.append(parse_object(body))
        return base_tensors(answers)


def router(parts: AdapterApi) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    api = parts.openai

    @routes.post("/models/import")
    async def import_model(request: Request) -> JSONResponse:
        """multipart: `file`, a zip of what `save_pretrained` wrote or a LoRA file; `model`, its base; `suffix`."""
        user = await api.user(request, "train")
        limit_bytes = api.settings.max_upload_bytes
        if int(request.headers.get("content-length") or 0) > limit_bytes + FORM_OVERHEAD_BYTES:
            raise errors.TooLarge(f"larger than {limit_bytes:,} bytes, which is the limit here: send less")
        form = Form(request.headers.get("content-type"))
        bound = await api.room.for_file(user.id, limit_bytes)
        async with api.blobs.incoming(bound) as incoming:
            await form.read(request.stream(), incoming.write, limit_bytes + FORM_OVERHEAD_BYTES)
            if form.filename is None:
                raise errors.InvalidRequest("file: is missing", param="file")
            for name in form.fields.keys() - set(FIELDS):
                raise errors.InvalidRequest(f"{name}: is not supported here: leave it out", param=name)
            if not form.fields.get("model"):
                raise errors.InvalidRequest("model: say which base model the adapter was made for", param="model")
            suffix = shapes.suffix(form.fields.get("suffix") or None)
            base = await api.models.resolve(user.id, form.fields["model"])
            if base.is_tuned:
                raise errors.InvalidRequest(
                    f"model: '{base.id}' is a tuned model: name its base, '{base.base}'", param="model"
                )
            target = Target(base, await parts.tensors(base), suffix)
            model_id = await parts.adapters.add(user.id, incoming, target)
        return JSONResponse(shapes.model(await api.models.resolve(user.id, model_id)))

    @routes.get("/models/{model_id:path}/export")
    async def export_model(
        model_id: str, request: Request, format: Literal["diffusers", "kohya"] | None = None
    ) -> StreamingResponse:
        """A zip that peft loads once it is unpacked; of a model that makes pictures the file that diffusers loads."""
        user = await api.user(request, "train")
        model = await api.models.resolve(user.id, model_id)
        if not model.is_tuned:
            raise errors.InvalidRequest(
                f"'{model_id[:200]}' is a base model: only tuned models are exported", param="model"
            )
        export = await parts.adapters.export(await api.models.tuned(model.id), format)
        size_bytes = export.file.seek(0, 2)
        export.file.seek(0)
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in model.id)
        headers = {
            "content-length": str(size_bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}{export.ending}",
        }
        return StreamingResponse(_read(export.file), media_type=export.media_type, headers=headers)

    return routes


async def _read(file: IO[bytes]) -> AsyncIterator[bytes]:
    with file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
