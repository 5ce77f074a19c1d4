"""What a gpu's routes read and answer, beyond what their signatures say. Each route stands here once."""

from typing import Any, Final

from fastapi import FastAPI

import wire
from gpu_service import bodies, data_report, drawing, previews
from schema import JSON, STREAM, Doc, Table, document

FOUND = (400, 401, 404, 413, 502, 503)  # a model, which may have to be fetched first
GENERATES = (*FOUND, 429)

TABLE: Final[Table] = {
    ("GET", "/healthz"): Doc(open=True),
    ("GET", "/metrics"): Doc((401, 413), answers=("text/plain",)),
    ("POST", "/challenge"): Doc((400, 401, 413), wire.Challenge),
    ("GET", "/v1/models"): Doc((401, 413)),
    ("GET", "/v1/models/{model}/layers"): Doc(FOUND),
    ("GET", "/v1/models/{model}"): Doc(FOUND),
    ("POST", "/v1/layers/preview"): Doc(FOUND, previews.PreviewBody),
    ("POST", "/v1/data/report"): Doc(FOUND, data_report.ReportBody),
    ("POST", "/v1/chat/completions"): Doc(GENERATES, bodies.ChatBody, answers=(JSON, STREAM)),
    ("POST", "/v1/completions"): Doc(GENERATES, bodies.CompletionBody, answers=(JSON, STREAM)),
    ("POST", "/v1/images/generations"): Doc(GENERATES, drawing.PictureBody, answers=(JSON, STREAM)),
}


def truthful(app: FastAPI) -> None:
    """What /openapi.json tells, made once when somebody asks."""
    plain = app.openapi

    def told() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = document(plain(), TABLE)
        return app.openapi_schema

    app.openapi = told  # type: ignore[method-assign]
