"""The log of both services: a line a request, an id all the way, and nothing of what anybody sent."""

import asyncio
import io
import json
import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

import logs
from tests.relay.conftest import until
from tests.relay.double_gpu import BASE, DoubleGpu
from tests.relay.processes import RelayProcess

SECRET = "what-nobody-may-read"


@pytest.fixture
def kept() -> Iterator[None]:
    """What `configure` changes in the process."""
    root, hooks = logging.getLogger(), (threading.excepthook, sys.unraisablehook, warnings.showwarning)
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks


def said(format: logs.Format, told: tuple[type[BaseException], ...] = ()) -> tuple[logging.Logger, io.StringIO]:
    out = io.StringIO()
    logs.configure("debug", format, ("of_the_test",), stream=out, told=told)
    return logging.getLogger("of_the_test"), out


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("format", ["json", "text"])
def test_an_exception_is_told_by_frames_and_type_and_not_by_its_message(format: logs.Format) -> None:
    log, out = said(format, told=(LookupError,))

    def convert() -> None:
        try:
            int(SECRET)
        except ValueError as exc:
            raise KeyError(SECRET) from exc

    for work in (convert, lambda: open(f"/{SECRET}")):  # noqa: SIM115
        try:
            work()
        except Exception:
            log.exception("it failed")
    log.exception("told", exc_info=LookupError("a word of ours"))
    text = out.getvalue()
    assert SECRET not in text
    assert "ValueError" in text
    assert "KeyError" in text
    assert "in convert" in text
    assert "No such file or directory" in text
    assert "a word of ours" in text


@pytest.mark.usefixtures("kept")
def test_what_python_prints_by_itself_and_what_libraries_say_is_held_to_the_same_rule() -> None:
    log, out = said("json")

    def fail() -> None:
        raise ValueError(SECRET)

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    warnings.showwarning(SECRET, UserWarning, "file.py", 1)
    ignored: Any = SimpleNamespace(exc_type=ValueError, exc_value=ValueError(SECRET), exc_traceback=None)
    sys.unraisablehook(ignored)
    logging.getLogger("aiosqlite").debug("INSERT %s", SECRET)
    logging.getLogger("websockets.client").info(SECRET)

    async def forgotten() -> None:
        asyncio.get_running_loop().set_exception_handler(logs.loop_failed)
        asyncio.get_running_loop().call_soon(int, SECRET)
        await asyncio.sleep(0.01)

    asyncio.run(forgotten())
    log.debug("of ours")
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert SECRET not in out.getvalue()
    assert [line["logger"] for line in lines] == ["python", "python", "python", "asyncio", "of_the_test"]


@pytest.mark.usefixtures("kept")
def test_one_record_is_one_line_whatever_is_in_it() -> None:
    log, out = said("text")
    log.warning("a name with %s", "a\nline 2026-01-01 ERROR forged: break")
    assert len(out.getvalue().splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "kept"),
    [("req-1234", True), ("0b5c1d2e-77aa-4f", True), ("short", False), ("a" * 65, False), ("with space-1", False),
     ("line\nbreak-1", False), ("sk-fine-abcdefgh", False), ("", False), ("-leading-dash", False)],
)  # fmt: skip
def test_a_callers_id_is_taken_only_where_it_can_stand_in_a_log(given: str, kept: bool) -> None:
    assert (logs.id_of(given.encode()) == given) is kept
    assert logs.id_of(None) != logs.id_of(None)


async def test_a_request_is_one_line_of_json_with_its_id_on_the_relay_and_at_the_gpu(tmp_path: Path) -> None:
    relay = RelayProcess(tmp_path, RELAY_LOG_LEVEL="debug")
    await relay.start()
    key = relay.secret("admin.key")
    gpu = DoubleGpu(relay.url, relay.secret("enrol.token"), time.time, [BASE])
    headers = {"authorization": f"Bearer {key}", "x-request-id": "of-the-caller-1"}
    try:
        async with gpu.serving(), httpx2.AsyncClient(base_url=relay.url, trust_env=False, verify=False) as http:
            await gpu.enrol()
            await gpu.until_reachable()
            body = {"model": BASE, "messages": [{"role": "user", "content": SECRET}]}
            answer = await http.post("/v1/chat/completions", json=body, headers=headers)
            assert (answer.status_code, answer.headers["x-request-id"]) == (200, "of-the-caller-1")
            assert gpu.headers[-1]["x-request-id"] == "of-the-caller-1"
            me = (await http.get("/api/me", headers=headers)).json()["user"]["id"]
            await http.get(f"/v1/files/{SECRET}?secret={SECRET}", headers=headers)
            await http.get(f"/{SECRET}")
            await until(lambda: '"unknown"' in relay.log)  # the line is written once the answer is out
    finally:
        await relay.stop()
    lines: list[dict[str, Any]] = [json.loads(line) for line in relay.log.splitlines()]
    found = [line for line in lines if line.get("request_id") == "of-the-caller-1" and "status" in line]
    asked = found[0]
    assert (asked["method"], asked["route"], asked["status"]) == ("POST", "/v1/chat/completions", 200)
    assert asked["user"] == me
    assert asked["duration_ms"] > 0
    assert asked["sent_bytes"] == len(answer.content)
    assert [line["route"] for line in found] == ["/v1/chat/completions", "/api/me", "/v1/files/{file_id}"]
    assert [line["gpu"] for line in lines if line.get("route") == "/gpu/heartbeat"][-1].startswith("gpu-")
    assert any(line.get("route") == "unknown" and line["status"] == 404 for line in lines)
    for secret in (SECRET, key):
        assert secret not in relay.log
