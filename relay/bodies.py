"""What callers send: read within bounds, and parsed with errors that name the field.

Knows no route and no table.
"""

import json
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

import wire
from relay import errors

MAX_FIELD_BYTES = 10_000
MAX_FIELDS = 8
NUL = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")  # an escape, and not what looks like one behind a backslash

M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """Raises TooLarge as soon as it is, and ClientDisconnect."""
    if int(request.headers.get("content-length") or 0) > limit_bytes:
        raise _too_large(limit_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)
    return bytes(body)


def _too_large(limit_bytes: int) -> errors.TooLarge:
    return errors.TooLarge(f"the body is larger than {limit_bytes:,} bytes, which is the limit here: send less")


def without_nul(body: bytes) -> bytes:
    """JSON whose texts have the sign for what can't be shown in place of NUL, which PostgreSQL does not take."""
    return NUL.sub(rb"\1\\ufffd", body) if b"\\u0000" in body else body


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises InvalidRequest that says what is wrong and where."""
    try:
        value = json.loads(body, parse_constant=_no_constant, parse_float=_finite)
        if b"\\ud" in body.lower():  # an escape may name half of a surrogate pair, which no answer could repeat
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise errors.InvalidRequest("the body has an escape that is half of a character", code="not_json") from exc
    except UnicodeDecodeError as exc:
        raise errors.InvalidRequest(f"the body is not UTF-8: {exc.reason} at byte {exc.start}") from exc
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno} column {exc.colno}"
        raise errors.InvalidRequest(f"the body is not JSON: {exc.msg} at {where}", code="not_json") from exc
    except (ValueError, RecursionError) as exc:
        raise errors.InvalidRequest(f"the body is not JSON: {exc}", code="not_json") from exc
    if not isinstance(value, dict):
        raise errors.InvalidRequest(f"the body must be a JSON object, not {_named(value)}", code="not_json")
    return value


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is Python's, not JSON's")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _named(value: object) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def parse(model: type[M], value: object) -> M:
    """Raises InvalidRequest naming each field that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        message, param = wire.validation_message([dict(e) for e in exc.errors(include_url=False)])
        raise errors.InvalidRequest(message, param=param) from exc


def string_field(value: dict[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        missing = "is missing" if name not in value else "must be a string that is not empty"
        raise errors.InvalidRequest(f"{name}: {missing}", param=name)
    return text


class Form:
    """A multipart body with one file, which goes where it is told as it arrives and never lies in memory.

    The fields may come before or after the file. https://www.rfc-editor.org/rfc/rfc7578
    """

    def __init__(self, content_type: str | None) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise errors.InvalidRequest("send multipart/form-data with the fields 'file' and 'purpose'", param="file")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None  # once the file has come
        self._pieces: list[bytes] = []  # of the file, parsed but not yet handed on
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._name = ""
        self._in_file = self._ended = False
        self._value = bytearray()
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._finished,
                },
            )
        except FormParserError as exc:
            raise errors.InvalidRequest(f"the form is malformed: {exc}") from exc

    async def read(
        self, chunks: AsyncIterator[bytes], write: Callable[[bytes], Awaitable[None]], limit_bytes: int
    ) -> None:
        """Raises InvalidRequest for a malformed body, TooLarge, and what `write` raises."""
        read_bytes = 0
        async for chunk in chunks:
            read_bytes += len(chunk)
            if read_bytes > limit_bytes:
                raise _too_large(limit_bytes)
            try:
                self._parser.write(chunk)
            except FormParserError as exc:
                raise errors.InvalidRequest(f"the form is malformed: {exc}") from exc
            pieces, self._pieces = self._pieces, []
            for piece in pieces:
                await write(piece)
        if not self._ended:
            raise errors.InvalidRequest("the form ends too early: its last boundary is missing", param="file")

    def _begin(self) -> None:
        self._disposition, self._name, self._in_file = b"", "", False
        self._value.clear()

    def _header_end(self) -> None:
        if bytes(self._header[0]).lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        for part in self._header:
            part.clear()

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._in_file = b"filename" in options
        if self._in_file:
            if self._name != "file" or self.filename is not None:
                raise errors.InvalidRequest("send one file, in the field 'file'", param="file")
            self.filename = options[b"filename"].decode(errors="replace")
        elif self._name in self.fields:
            raise errors.InvalidRequest(f"{self._name}: sent twice", param=self._name)
        elif len(self.fields) == MAX_FIELDS:
            raise errors.InvalidRequest(f"{self._name}: the form has more than {MAX_FIELDS} fields", param=self._name)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._pieces.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise errors.InvalidRequest(f"{self._name}: longer than {MAX_FIELD_BYTES:,} bytes", param=self._name)

    def _end(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._value.decode(errors="replace")

    def _finished(self) -> None:
        self._ended = True
