"""What a training file holds, and data sets that grow: routes of our own beside the OpenAI files.

A data set is a training file by another name: an answer that somebody edited is added to it with one call.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

import datafile
import dataset
from relay import errors, kinds, shapes
from relay.api_openai import OpenAIApi
from relay.bodies import parse, parse_object, read_body
from relay.files import BATCH_PURPOSE
from relay.models import Model

MODEL_ROWS = 1000  # of a file that a gpu tokenises for a report
MODEL_BYTES = 2**19
SHOWN_PICTURES, SHOWN_BYTES, SHOWN_SIDE = 12, 2**17, 96  # of a report
GPU_REPORT = "/v1/data/report"


class NewRows(BaseModel):
    """POST /api/datasets/{id}/rows, and /api/datasets with a name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: list[dict[str, Any]] = Field(min_length=1, max_length=100)


class NewDataset(NewRows):
    name: str = Field(min_length=1, max_length=190)


@dataclass(frozen=True)
class DataApi:
    """The routes' parts."""

    openai: OpenAIApi

    async def seen_by(self, model: Model, sample: list[tuple[int, dict[str, Any]]], asked: dict[str, Any]) -> Any:
        """What a gpu with the model says of some rows. Raises NoGpu, GpuUnreachable, InvalidRequest."""
        api = self.openai
        to = await api.gpus.choose(model.base)
        if to is None:
            raise errors.NoGpu(f"no gpu that has '{model.base}' is here now, and only one knows its tokens: try later")
        body = {"model": model.base, "rows": [{"line": line, "row": row} for line, row in sample], **asked}
        try:
            status, answer = await api.client.ask(to, "POST", GPU_REPORT, body)
        except errors.GpuUnreachable:
            api.gpus.mark_unreachable(to)
            raise
        told = parse_object(answer)
        if status == 400:
            error = told.get("error") or {}
            raise errors.InvalidRequest(str(error.get("message")), param=error.get("param"))
        if status != 200:
            raise errors.GpuUnreachable(f"gpu {to.name!r} could not read the rows: update it, or try again")
        return {key: told[key] for key in told.keys() - {"object"}}


def router(parts: DataApi) -> APIRouter:
    routes = APIRouter()
    api = parts.openai

    @routes.get("/v1/files/{file_id}/report")
    async def file_report(
        file_id: str,
        request: Request,
        model: str | None = None,
        max_length_tokens: Annotated[int | None, Query(ge=8)] = None,
        train_on: Literal["completions", "all"] | None = None,
    ) -> JSONResponse:
        """What is in a file; with `model` also what that model will see of it. Of pictures a few, small.

        Of a batch's rows, whom they ask, and where.
        """
        user = await api.user(request, "train")
        if (row := await api.files.get(user.id, file_id)).purpose == BATCH_PURPOSE:
            asks = await api.files.requests(row)
            about = {"object": "file.report", "file": row.id, "filename": row.filename}
            return JSONResponse(about | {"rows": asks.rows, "endpoint": asks.url, "model": asks.model})
        found = await api.models.resolve(user.id, model) if model else None
        row, report = await api.files.report(user.id, file_id)
        about = {"object": "file.report", "file": row.id, "filename": row.filename, "kind": row.kind}
        told: dict[str, Any] = about | report
        if found and kinds.kind_of(found) != row.kind:
            raise errors.WrongKindOfFile(
                f"'{found.base}' is a model of {kinds.kind_of(found)}, and the file holds {row.kind}: name another",
                param="model",
            )
        if row.kind == "pictures":
            told["sample"] = await api.files.pictures(row, SHOWN_PICTURES, SHOWN_BYTES, SHOWN_SIDE)
        elif found:
            asked = {"max_length_tokens": max_length_tokens, "train_on": train_on}
            sample = await api.files.sample(row, MODEL_ROWS, MODEL_BYTES)
            wanted = {name: value for name, value in asked.items() if value is not None}
            told["seen"] = await parts.seen_by(found, sample, wanted)
        return JSONResponse(told)

    @routes.post("/api/datasets")
    async def new_dataset(request: Request) -> JSONResponse:
        user = await api.user(request, "train")
        asked = parse(NewDataset, parse_object(await read_body(request, api.settings.max_body_bytes)))
        rows = _parsed(asked.rows)
        async with api.blobs.incoming(await api.room.for_file(user.id, api.settings.max_upload_bytes)) as incoming:
            for row in rows:
                await incoming.write(dataset.as_line(row))
            name = asked.name if asked.name.endswith(".jsonl") else f"{asked.name}.jsonl"
            return JSONResponse(shapes.file(await api.files.add(user.id, name, incoming)))

    @routes.post("/api/datasets/{dataset_id}/rows")
    async def add_rows(dataset_id: str, request: Request) -> JSONResponse:
        """Rows that the data set has already are not added again, so a call may be repeated."""
        user = await api.user(request, "train")
        asked = parse(NewRows, parse_object(await read_body(request, api.settings.max_body_bytes)))
        rows = _parsed(asked.rows)
        row, added = await api.files.grow(user.id, dataset_id, rows, api.settings.max_upload_bytes)
        return JSONResponse({**shapes.file(row), "added": added, "duplicates": len(rows) - added})

    return routes


def _parsed(values: list[dict[str, Any]]) -> list[dataset.Row]:
    """Raises InvalidRequest that names the row."""
    rows = []
    for index, value in enumerate(values):
        try:
            row = dataset.parse(value)
            if len(dataset.as_line(row)) > datafile.MAX_LINE_BYTES:
                raise ValueError("line_too_long", f"longer than {datafile.MAX_LINE_BYTES:,} bytes")
            rows.append(row)
        except ValueError as exc:
            raise errors.InvalidRequest(f"rows.{index}: {exc.args[-1]}", param="rows") from exc
    return rows
