"""What the relay's routes read and answer, beyond what their signatures say. Each route stands here once."""

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI

import wire
from relay import api_admin, api_batches, api_data, api_ui, api_webhooks, shapes
from schema import BYTES, JSON, STREAM, Doc, Table, document

USER = (401, 403, 503)  # whoever signs in
COUNTED = (*USER, 429)  # and each request of a key counts
FOUND = (400, 404)  # something by its name
BODY = (400, 413)
GPU = (400, 401, 409, 413, 503)
GENERATES = (*COUNTED, *BODY, 404, 502)
TEXT = {"type": "string"}
GENERATION: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["model"],
    "properties": {"model": TEXT, "stream": {"type": ["boolean", "null"]}, "max_tokens": {"type": ["integer", "null"]}},
}
CHAT = {**GENERATION, "properties": {**GENERATION["properties"], "messages": {"type": "array"}}}
COMPLETION = {**GENERATION, "properties": {**GENERATION["properties"], "prompt": TEXT}}
PICTURES = {**GENERATION, "properties": {"model": TEXT, "prompt": TEXT, "stream": {"type": ["boolean", "null"]}}}
PREVIEW = {
    "type": "object",
    "required": ["model"],
    "properties": {"model": TEXT, "layers": {"type": ["array", "object"]}},
}
UPLOAD = {
    "type": "object",
    "required": ["purpose", "file"],
    "properties": {"purpose": {"enum": ["fine-tune", "batch"]}, "file": {"type": "string", "format": "binary"}},
}
IMPORT = {
    "type": "object",
    "required": ["model", "file"],
    "properties": {"model": TEXT, "suffix": TEXT, "file": {"type": "string", "format": "binary"}},
}
SIGN_IN = {"anyOf": [api_ui.SignIn.model_json_schema(), api_ui.SignInByPassword.model_json_schema()]}
BINARY = {"type": "string", "format": "binary"}
ANSWERS = (JSON, STREAM)
GOT = Doc((*COUNTED, *FOUND))  # one of one's own
LISTED = Doc((*COUNTED, *FOUND))
ADMIN = Doc(USER)
OF_ADMIN = Doc((*USER, *FOUND))

FILES, JOBS, HOOKS, KEYS, GPUS = "/v1/files", "/v1/fine_tuning/jobs", "/v1/webhook_endpoints", "/api/keys", "/api/gpus"
JOB, FILE, HOOK, ON_GPU = JOBS + "/{job_id}", FILES + "/{file_id}", HOOKS + "/{webhook_id}", "/gpu/jobs/{job_id}"
USERS, TOKENS, MADE = "/api/users", "/api/enrol-tokens", "/api/generations"

BATCHES = "/v1/batches"
BATCH = BATCHES + "/{batch_id}"

HAS_BLOB, PUT_BLOB = Doc((400, 401, 404, 409, 503), answers=()), Doc((*GPU, 507), BINARY, BYTES)

TABLE: Final[Table] = {
    ("POST", "/v1/chat/completions"): Doc(GENERATES, CHAT, answers=ANSWERS),
    ("POST", "/v1/completions"): Doc(GENERATES, COMPLETION, answers=ANSWERS),
    ("POST", "/v1/images/generations"): Doc(GENERATES, PICTURES, answers=ANSWERS),
    ("GET", "/v1/models"): Doc(COUNTED),
    ("GET", "/v1/models/{model_id}/layers"): GOT,
    ("GET", "/v1/models/{model_id}"): GOT,
    ("DELETE", "/v1/models/{model_id}"): GOT,
    ("POST", "/v1/models/import"): Doc((*COUNTED, *BODY, 404, 507), IMPORT, "multipart/form-data"),
    ("GET", "/v1/models/{model_id}/export"): Doc((*COUNTED, *FOUND), answers=("application/zip",)),
    ("POST", "/v1/layers/preview"): Doc((*COUNTED, *BODY, 404), PREVIEW),
    ("POST", FILES): Doc((*COUNTED, *BODY, 507), UPLOAD, "multipart/form-data"),
    ("GET", FILES): LISTED,
    ("GET", FILE): GOT,
    ("DELETE", FILE): GOT,
    ("GET", f"{FILE}/content"): Doc((*COUNTED, *FOUND), answers=(BYTES,)),
    ("GET", f"{FILE}/report"): GOT,
    ("POST", "/api/datasets"): Doc((*COUNTED, *BODY, 507), api_data.NewDataset),
    ("POST", "/api/datasets/{dataset_id}/rows"): Doc((*COUNTED, *BODY, 404, 409, 507), api_data.NewRows),
    ("POST", JOBS): Doc((*COUNTED, *BODY, 404, 507), shapes.JobRequest),
    ("GET", JOBS): LISTED,
    ("GET", JOB): GOT,
    ("GET", f"{JOB}/events"): LISTED,
    ("GET", f"{JOB}/checkpoints"): GOT,
    ("GET", f"{JOB}/report"): GOT,
    ("GET", f"{JOB}/report.html"): Doc((*COUNTED, *FOUND), answers=("text/html",)),
    ("POST", f"{JOB}/pause"): Doc((*COUNTED, *FOUND, 409)),
    ("POST", f"{JOB}/resume"): Doc((*COUNTED, *BODY, 404, 409), shapes.Resume, needs_body=False),
    ("POST", f"{JOB}/cancel"): Doc((*COUNTED, *FOUND, 409)),
    ("POST", BATCHES): Doc((*COUNTED, *BODY, 404), api_batches.NewBatchBody),
    ("GET", BATCHES): LISTED,
    ("GET", BATCH): GOT,
    ("GET", f"{BATCH}/events"): LISTED,
    ("POST", f"{BATCH}/cancel"): Doc((*COUNTED, *FOUND, 409)),
    ("POST", f"{BATCH}/pause"): Doc((*COUNTED, *FOUND, 409)),
    ("POST", f"{BATCH}/resume"): Doc((*COUNTED, *FOUND, 409)),
    ("POST", HOOKS): Doc((*COUNTED, *BODY), api_webhooks.NewWebhook),
    ("GET", HOOKS): LISTED,
    ("GET", HOOK): GOT,
    ("DELETE", HOOK): GOT,
    ("GET", f"{HOOK}/deliveries"): LISTED,
    ("POST", "/gpu/enrol"): Doc((400, 401, 413, 503), wire.EnrolRequest),
    ("POST", "/gpu/heartbeat"): Doc(GPU, wire.Heartbeat),
    ("POST", "/gpu/goodbye"): Doc(GPU, wire.Goodbye),
    ("POST", f"{ON_GPU}/events"): Doc(GPU, wire.JobEvents),
    ("POST", f"{ON_GPU}/finish"): Doc(GPU, wire.JobResult),
    ("HEAD", f"{ON_GPU}/blobs/{{sha256}}"): HAS_BLOB,
    ("PUT", f"{ON_GPU}/blobs/{{sha256}}"): PUT_BLOB,
    ("HEAD", f"{ON_GPU}/chunks/{{sha256}}"): HAS_BLOB,
    ("PUT", f"{ON_GPU}/chunks/{{sha256}}"): PUT_BLOB,
    ("POST", f"{ON_GPU}/reserve"): Doc((*GPU, 403, 507), wire.Reservation),
    ("POST", f"{ON_GPU}/checkpoints"): Doc((*GPU, 403, 507), wire.CheckpointStored),
    ("POST", f"{ON_GPU}/parts"): Doc(GPU, wire.PartStored),
    ("POST", f"{ON_GPU}/release"): Doc(GPU, wire.Release),
    ("GET", "/gpu/blobs/{sha256}"): Doc((400, 401, 404, 503), answers=(BYTES,)),
    ("GET", "/gpu/models/{model_id}"): Doc((400, 401, 404, 503)),
    ("POST", "/api/session"): Doc((*USER, *BODY, 429), SIGN_IN, open=True),
    ("DELETE", "/api/session"): Doc((403, 503), open=True),
    ("GET", "/api/me"): ADMIN,
    ("DELETE", "/api/me"): Doc((*USER, *BODY, 429), api_ui.Confirm, needs_body=False),
    ("PUT", "/api/me/password"): Doc((*USER, *BODY, 429), api_ui.NewPassword),
    ("GET", KEYS): ADMIN,
    ("POST", KEYS): Doc((*USER, *BODY), api_ui.NewKey),
    ("DELETE", f"{KEYS}/{{key_id}}"): OF_ADMIN,
    ("GET", "/api/usage"): ADMIN,
    ("GET", GPUS): ADMIN,
    ("POST", f"{GPUS}/{{gpu_id}}/drain"): OF_ADMIN,
    ("DELETE", f"{GPUS}/{{gpu_id}}/drain"): OF_ADMIN,
    ("GET", "/api/enrol-token"): ADMIN,
    ("GET", "/api/jobs/{job_id}/stream"): Doc((*USER, *FOUND), answers=(STREAM,)),
    ("POST", MADE): Doc((*COUNTED, *BODY, 404), api_ui.NewGeneration, answers=(STREAM,)),
    ("GET", f"{MADE}/{{generation_id}}"): Doc((*USER, *FOUND), answers=(STREAM,)),
    ("DELETE", f"{MADE}/{{generation_id}}"): OF_ADMIN,
    ("GET", TOKENS): ADMIN,
    ("POST", TOKENS): Doc((*USER, *BODY), api_admin.NewEnrolToken),
    ("DELETE", f"{TOKENS}/{{token_id}}"): OF_ADMIN,
    ("GET", USERS): ADMIN,
    ("POST", USERS): Doc((*USER, *BODY, 409, 429), api_admin.NewUser),
    ("PUT", f"{USERS}/{{user_id}}/password"): Doc((*USER, *BODY, 404, 429), api_admin.OthersPassword),
    ("POST", f"{USERS}/{{user_id}}/disable"): OF_ADMIN,
    ("DELETE", f"{USERS}/{{user_id}}/disable"): OF_ADMIN,
    ("DELETE", f"{USERS}/{{user_id}}"): OF_ADMIN,
    ("GET", "/api/audit"): Doc((*USER, 400)),
    ("GET", "/healthz"): Doc(open=True),
    ("GET", "/readyz"): Doc((503,), open=True),
    ("GET", "/metrics"): Doc((401, 403, 503), answers=("text/plain",)),
}


def truthful(app: FastAPI) -> None:
    """What /openapi.json tells, made once when somebody asks."""
    plain = app.openapi

    def told() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = document(plain(), TABLE)
        return app.openapi_schema

    app.openapi = told  # type: ignore[method-assign]
