"""How both services log: a line for each request, each line with the request's id, as JSON or as plain text.

What a user sent never gets into it: a request is told by its route's template and not by its path; of an exception the
frames and the type are told and not the message, for a library may quote there what it could not read. What we write
ourselves by `log.warning(...)` is our own business. Knows neither service; the standard library only.
"""

import asyncio
import json
import logging
import re
import secrets
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Protocol, TextIO

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Raw = tuple[bytes, bytes]  # a header
Format = Literal["auto", "json", "text"]
Level = Literal["debug", "info", "warning", "error"]

FORMATS: tuple[Format, ...] = ("auto", "json", "text")
LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"))
ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{6,62})[A-Za-z0-9]")
SECRET = re.compile(r"(?i)sk-|whsec|enrol")  # an id that looks like a key is not repeated in a log
FIELDS = ("method", "route", "status", "duration_ms", "user", "gpu", "sent_bytes")  # of a request's line

request_id: ContextVar[str] = ContextVar("request_id", default="")


def id_of(given: bytes | None) -> str:
    """The caller's own, if it can stand in a log; else a new one."""
    text = given.decode("latin-1") if given else ""
    return text if ID.fullmatch(text) and not SECRET.search(text) else f"req-{secrets.token_hex(8)}"


# --- one line for each request ---


@dataclass(frozen=True)
class Seen:
    """A request that is over."""

    method: str
    route: str  # the template, such as /v1/files/{file_id}
    status: int  # 0: the caller left before there was one
    duration_s: float
    received_bytes: int
    sent_bytes: int
    streamed: bool


class Watch(Protocol):
    """Who counts requests."""

    def streaming(self, by: int) -> None:
        """So many more streams are open."""

    def ended(self, seen: Seen) -> None: ...


class RequestLine:
    """Plain ASGI around a whole app: a wrapper that reads requests or responses would hide a caller's leaving.

    Who asked is what a route puts into `request.state` as `user_id` or `gpu_id`; headers of its own go there too.
    A fault of ours is logged, and answered by `fault`.
    """

    def __init__(
        self,
        app: App,
        *,
        log: logging.Logger,
        watch: Watch,
        fault: Callable[[str], App],
        left: tuple[type[Exception], ...],
        headers: Iterable[Raw] = (),
        by_https: Iterable[Raw] = (),
    ) -> None:
        """`fault`: by the request's id. `left`: what the app raises when its caller is gone."""
        self._app, self._log, self._watch, self._fault, self._left = app, log, watch, fault, left
        self._headers = {"http": (*headers,), "https": (*headers, *by_https)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, received, sent, streamed = time.monotonic(), 0, 0, 0, False
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        own_id = id_of(given)
        request_id.set(own_id)
        state = scope.setdefault("state", {})
        state["request_id"] = own_id

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def send_named(message: Message) -> None:
            nonlocal status, sent, streamed
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower(): value for name, value in message.get("headers", ())}
                if given.get(b"content-type", b"").startswith(b"text/event-stream"):
                    streamed = True
                    self._watch.streaming(1)
                ours = [(b"x-request-id", own_id.encode())]
                ours += [h for h in self._headers.get(scope["scheme"], ()) if h[0] not in given]
                ours += state.get("headers", ())
                message = {**message, "headers": [*message.get("headers", ()), *ours]}
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive_counted, send_named)
        except self._left:
            pass  # in the middle of its own body: nobody is left to answer
        except Exception:
            self._log.exception("%s failed", own_id)
            if not status:
                await self._fault(own_id)(scope, receive, send_named)
        finally:
            if streamed:
                self._watch.streaming(-1)
            took_s = time.monotonic() - began
            method = scope["method"] if scope["method"] in METHODS else "OTHER"
            route = getattr(scope.get("route"), "path", "unknown")  # never the path: a caller chooses that
            self._watch.ended(Seen(method, route, status, took_s, received, sent, streamed))
            if self._log.isEnabledFor(logging.INFO):
                fields = {"method": method, "route": route, "status": status, "duration_ms": round(1000 * took_s, 1)}
                fields |= {"user": state.get("user_id"), "gpu": state.get("gpu_id"), "sent_bytes": sent}
                shown = status or "-"  # without a status nothing was sent: the caller left first
                self._log.info("%s %s %s %.0f ms", method, route, shown, 1000 * took_s, extra=fields)


# --- how a line looks ---


class _Safe(logging.Formatter):
    """Tells of exceptions where they happened and of which type they are."""

    def __init__(self, told: tuple[type[BaseException], ...]) -> None:
        """`told`: exactly these types may show their message."""
        super().__init__()
        self._told = told

    def frames(self, exc: BaseException) -> str:
        lines: list[str] = []
        chain: list[BaseException] = []
        one: BaseException | None = exc
        while one is not None and one not in chain:
            chain.append(one)
            one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        for one in reversed(chain):
            if lines:
                lines.append("which led to:")
            lines += "".join(traceback.format_tb(one.__traceback__)).splitlines()
            lines.append(self._named(one))
            if isinstance(one, BaseExceptionGroup):
                lines += [f"  holds {self._named(held)}" for held in one.exceptions]
        return "\n".join(lines)

    def _named(self, exc: BaseException) -> str:
        name = f"{type(exc).__module__}.{type(exc).__qualname__}".removeprefix("builtins.")
        if isinstance(exc, OSError):  # its str() has the file's name
            return f"{name}: {exc.strerror or exc.errno}"
        return f"{name}: {exc}" if type(exc) in self._told else name

    def parts(self, record: logging.LogRecord) -> tuple[str, str, str]:
        """When, what and the traceback."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        exc = record.exc_info[1] if record.exc_info else None
        return at, record.getMessage(), self.frames(exc) if exc else ""


class JsonLines(_Safe):
    def format(self, record: logging.LogRecord) -> str:
        at, message, trace = self.parts(record)
        line: dict[str, Any] = {"at": at, "level": record.levelname.lower(), "logger": record.name, "message": message}
        if of := request_id.get():
            line["request_id"] = of
        line |= {name: value for name in FIELDS if (value := record.__dict__.get(name)) is not None}
        if trace:
            line["traceback"] = trace
        return json.dumps(line, ensure_ascii=False)


class PlainText(_Safe):
    def format(self, record: logging.LogRecord) -> str:
        at, message, trace = self.parts(record)
        who = [str(who) for name in ("user", "gpu") if (who := record.__dict__.get(name))]
        about = " ".join(filter(None, [request_id.get(), *who]))
        message = message.replace("\n", "\\n").replace("\r", "\\r")  # one record is one line
        line = f"{at} {record.levelname} {record.name}: {message}" + (f" [{about}]" if about else "")
        return f"{line}\n{trace}" if trace else line


def configure(
    level: Level,
    format: Format,
    ours: Iterable[str],
    *,
    stream: TextIO | None = None,
    told: tuple[type[BaseException], ...] = (),
) -> logging.Handler:
    """The whole process logs by one handler, which is returned. `ours`: loggers that `level` is about.

    Other people's loggers say no more than warnings, at any level: below that they quote what passes through them.
    """
    stream = stream or sys.stderr
    as_json = format == "json" or (format == "auto" and not stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter((JsonLines if as_json else PlainText)(told))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ours:
        logging.getLogger(name).setLevel(level.upper())
    _hook()
    return handler


def _hook() -> None:
    """What Python would print by itself, message and all, is a line of the log as well."""
    log = logging.getLogger("python")

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value:
            log.error("a thread ended", exc_info=(args.exc_type, args.exc_value, args.exc_traceback))

    def unraisable(args: Any) -> None:
        kind: type[BaseException] = args.exc_type
        value: BaseException = args.exc_value or kind()
        trace: TracebackType | None = args.exc_traceback
        log.error("an exception was ignored", exc_info=(kind, value, trace))

    def warned(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        log.warning("%s at %s:%d", category.__name__, filename, lineno)

    threading.excepthook = of_thread
    sys.unraisablehook = unraisable
    warnings.showwarning = warned


def loop_failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """For `loop.set_exception_handler`; asyncio's own one prints what the exception says."""
    exc = context.get("exception")
    info = (type(exc), exc, exc.__traceback__) if exc else None
    what = str(context.get("message", "")).partition(" in callback")[0]  # behind that, its arguments
    logging.getLogger("asyncio").error("the event loop: %s", what, exc_info=info)
