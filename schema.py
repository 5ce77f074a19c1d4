"""An OpenAPI description as truthful as the service: bodies that routes read by themselves, errors, streams.

FastAPI sees only what a route's signature says. Each service has a table of what it does not (openapi.py), and a test
holds that table against its routes. Knows neither service; the standard library and pydantic only.
https://spec.openapis.org/oas/v3.1.0
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

JSON = "application/json"
STREAM = "text/event-stream"
BYTES = "application/octet-stream"
REFS = "#/components/schemas/{model}"
SAID = {
    400: "The request can't be carried out as it is; `param` names the field.",
    401: "No valid key, session or signature.",
    403: "Signed in, and still not allowed.",
    404: "No such thing, or it is somebody else's.",
    409: "Too late: it has ended, or belongs to another.",
    413: "Larger than the limit, which the message says.",
    429: "Too many, or a limit is spent; Retry-After says when it is over.",
    502: "What was fetched is damaged.",
    503: "Not now; Retry-After says when.",
    507: "The disk is full.",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "additionalProperties": False,
        }
    },
}


@dataclass(frozen=True)
class Doc:
    """What a route answers and reads, beyond its signature."""

    errors: Sequence[int] = ()
    body: type[BaseModel] | Mapping[str, Any] | None = None
    body_type: str = JSON
    needs_body: bool = True
    answers: Sequence[str] = (JSON,)
    open: bool = False  # to all, without a key


Table = Mapping[tuple[str, str], Doc]  # by method and path


def document(found: dict[str, Any], table: Table) -> dict[str, Any]:
    """`found`, FastAPI's own, with what the table says, which must have each route."""
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    schemas["Error"] = ERROR
    for unused in ("HTTPValidationError", "ValidationError"):  # its answers to bad parameters have our shape
        schemas.pop(unused, None)
    found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            assert (method.upper(), path) in table, f"{method.upper()} {path} has no row in openapi.py: add one"
            doc = table[method.upper(), path]
            operation["responses"].pop("422", None)
            operation["responses"] |= {str(status): _error(status) for status in doc.errors}
            _answer(operation["responses"]["200"], doc.answers)
            if not doc.open:
                operation["security"] = [{"key": []}]
            if doc.body is not None:
                content = {doc.body_type: {"schema": _schema(doc.body, schemas)}}
                operation["requestBody"] = {"required": doc.needs_body, "content": content}
    return found


def _error(status: int) -> dict[str, Any]:
    content = {JSON: {"schema": {"$ref": REFS.format(model="Error")}}}
    return {"description": SAID[status], "content": content}


def _answer(response: dict[str, Any], types: Sequence[str]) -> None:
    known = response.get("content", {}).get(JSON, {}).get("schema")
    shapes = {JSON: {"schema": known or {"type": "object"}}}  # what a stream's events hold, docs/api.md says
    if not types:
        response.pop("content", None)
        return
    response["content"] = {type: shapes.get(type, {}) for type in types}


def _schema(body: type[BaseModel] | Mapping[str, Any], schemas: dict[str, Any]) -> Mapping[str, Any]:
    if not isinstance(body, type):
        return body
    made = body.model_json_schema(ref_template=REFS)
    schemas |= made.pop("$defs", {})
    schemas[body.__name__] = made
    return {"$ref": REFS.format(model=body.__name__)}
