"""The shipped nginx.conf before two relay processes: what it passes on, what it keeps back, what it never holds."""

import asyncio
import contextlib
import json
import re
import ssl
import subprocess
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from aiohttp import web

from relay.settings import Settings
from tests.deploy.front import DOMAIN, Nginx
from tests.end_to_end.side import ADMIN_KEY, DEAD, ENROL_TOKEN, Side, beating
from tests.end_to_end.stack import free_port
from tests.postgres import Postgres
from tests.relay.conftest import CHAT_ROW, until
from tests.relay.dialler import DiallingGpu
from tests.relay.double_gpu import BASE, DONE, FRAMES, DoubleGpu, say_fine, start_stream

UPLOAD_BYTES = 3_000_000
ASK: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "How are you?"}]}
PAGE = {"x-imfine-page": "1"}
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
async def side(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Side]:
    """Which of the two a connection comes to is nginx's choice."""
    postgres = Postgres(port=free_port())
    try:
        postgres.start()
        postgres.make_template()
        url = postgres.url(postgres.new(), tcp=True)
        async with Side(tmp_path_factory.mktemp("side"), url, RELAY_MAX_UPLOAD_BYTES=str(UPLOAD_BYTES)).running() as s:
            yield s
    finally:
        postgres.close()


def before(side: Side, folder: Path) -> Nginx:
    return Nginx(folder, [relay.url for relay in side.relays], RELAY_MAX_UPLOAD_BYTES=str(UPLOAD_BYTES))


@pytest.fixture(scope="module")
async def nginx(side: Side, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Nginx]:
    async with before(side, tmp_path_factory.mktemp("nginx")).serving() as nginx:
        yield nginx


@pytest.fixture
async def caller(nginx: Nginx) -> AsyncIterator[httpx2.AsyncClient]:
    async with nginx.client(ADMIN_KEY) as client:
        yield client


@pytest.fixture(scope="module")
async def one_gpu(side: Side) -> AsyncIterator[DoubleGpu]:
    async with DoubleGpu(side.relays[0].url, ENROL_TOKEN, time.time, [BASE]).serving() as gpu:
        await gpu.enrol()
        await gpu.until_reachable()
        async with side.client(side.relays[1].url) as there:

            async def answered() -> bool:
                return (await there.post("/v1/chat/completions", json=ASK)).status_code == 200

            await until(answered, 10)
        async with beating(gpu, []):
            yield gpu


@pytest.fixture
def gpu(one_gpu: DoubleGpu) -> DoubleGpu:
    """The same one, so that none is asked which went with its test."""
    one_gpu.answer = say_fine
    one_gpu.left.clear()
    return one_gpu


# --- the file ---


def test_nginx_takes_the_file_as_it_is_rendered(nginx: Nginx) -> None:
    assert "test is successful" in nginx.check()
    assert not re.search(r"@[A-Z_]+@", nginx.conf.read_text())


def test_its_limits_are_the_relays(tmp_path: Path) -> None:
    nginx, settings = Nginx(tmp_path / "n", ["http://127.0.0.1:1"]), Settings()
    sizes = set(re.findall(r"client_max_body_size (\d+);", nginx.render()))
    form_bytes = 2**20
    limits = settings.max_body_bytes, settings.max_upload_bytes + form_bytes, settings.max_adapter_bytes
    assert sizes == {str(limit) for limit in limits}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DOMAIN", ""),
        ("DOMAIN", "a; b"),
        ("DOMAIN", "a\nb"),
        ("RELAYS", "localhost"),
        ("FLOWER", "127.0.0.1:5555; deny all"),
        ("TLS_DIR", "/a;b"),
        ("HTTPS_PORT", "x"),
    ],
)
def test_a_value_that_would_be_another_directive_is_refused(tmp_path: Path, name: str, value: str) -> None:
    nginx = Nginx(tmp_path / "n", ["http://127.0.0.1:1"])
    nginx.env[name] = value
    with pytest.raises(subprocess.CalledProcessError):
        nginx.render()


# --- by http, and by other names ---


async def test_http_leads_to_https_except_for_the_proof_of_the_domain(nginx: Nginx) -> None:
    base = f"http://{DOMAIN}:{nginx.http_port}"
    proof = nginx.folder / "acme/.well-known/acme-challenge"
    proof.mkdir(parents=True)
    (proof / "token").write_text("the proof")
    assert await nginx.curl(f"{base}/.well-known/acme-challenge/token") == "the proof"
    shown = await nginx.curl("-o", "/dev/null", "-w", "%{http_code} %{redirect_url}", f"{base}/v1/models?a=b")
    assert shown == f"308 {nginx.url}/v1/models?a=b"
    missing = await nginx.curl("-o", "/dev/null", "-w", "%{http_code}", f"{base}/.well-known/acme-challenge/no")
    assert missing == "404"


async def test_what_relays_ask_each_other_is_not_to_be_had_from_outside(
    nginx: Nginx, caller: httpx2.AsyncClient
) -> None:
    for path in ("/peer/gpus/gpu-1/1", "/peer/generations/gen-1"):
        response = await caller.post(path, content=b"")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "no_such_route"


async def test_without_flower_its_path_is_the_relays_to_refuse(caller: httpx2.AsyncClient) -> None:
    for path in ("/flower", "/flower/", "/flower/metrics"):
        response = await caller.get(path)
        assert response.status_code == 404
        assert "x-request-id" in response.headers, "the relay has answered"


async def test_another_name_gets_no_answer(nginx: Nginx) -> None:
    other = f"other.test:{nginx.https_port}"
    with pytest.raises(AssertionError, match="unrecognized name"):
        await nginx.curl("--resolve", f"{other}:127.0.0.1", f"https://{other}/healthz")
    with pytest.raises(AssertionError, match=r"Empty reply|reset by peer"):
        await nginx.curl("-H", "host: other.test", f"http://{DOMAIN}:{nginx.http_port}/")


@pytest.mark.parametrize(("version", "taken"), [("1.1", False), ("1.2", True), ("1.3", True)])
async def test_old_tls_is_refused(nginx: Nginx, version: str, taken: bool) -> None:
    options = ["--tls-max", version, "--tlsv" + version, "-o", "/dev/null", "-w", "%{http_code}"]
    if version == "1.1":
        options += ["--ciphers", "DEFAULT@SECLEVEL=0"]
    try:
        assert await nginx.curl(*options, f"{nginx.url}/healthz") == "200"
        assert taken
    except AssertionError:
        assert not taken


# --- what passes ---


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_both_versions_of_http_answer_with_each_header_once(nginx: Nginx, version: str) -> None:
    shown = await nginx.curl(version, "-i", f"{nginx.url}/healthz")
    assert shown.startswith("HTTP/2 200" if version == "--http2" else "HTTP/1.1 200")
    names = re.findall(r"^([\w-]+):", shown, re.MULTILINE)
    assert len(names) == len(set(names))
    assert {"strict-transport-security", "x-frame-options", "content-security-policy"} <= {n.lower() for n in names}


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_a_frame_arrives_before_the_next_is_made(nginx: Nginx, gpu: DoubleGpu, version: str) -> None:
    go_on = asyncio.Event()

    async def haltingly(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        await response.write(FRAMES[0].encode())
        await go_on.wait()
        await response.write(DONE.encode())
        return response

    gpu.answer = haltingly
    head = ["-H", f"authorization: Bearer {ADMIN_KEY}", "-H", "content-type: application/json"]
    command = ["curl", "-sN", version, "--cacert", str(nginx.authority), "--max-time", "20", *head]
    command += ["-d", json.dumps({**ASK, "stream": True}), f"{nginx.url}/v1/chat/completions"]
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
    assert process.stdout
    assert (await process.stdout.readline()).decode() == FRAMES[0].strip() + "\n"
    go_on.set()
    assert (await process.stdout.read()).decode().endswith(DONE)
    assert await process.wait() == 0


async def test_a_caller_who_leaves_stops_the_gpu(caller: httpx2.AsyncClient, gpu: DoubleGpu) -> None:
    async def for_ever(request: web.Request, body: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        while True:
            await response.write(FRAMES[0].encode())
            await asyncio.sleep(0.01)

    gpu.answer = for_ever
    async with caller.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
        assert await anext(response.aiter_lines()) == FRAMES[0].strip()
    await asyncio.wait_for(gpu.left.wait(), 5)


async def test_a_gpu_dials_out_through_it(
    nginx: Nginx, side: Side, caller: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(nginx.authority))  # what the system trusts
    gpu = DiallingGpu(side.relays[0].url, ENROL_TOKEN, time.time, ["lab/dialled"])
    async with gpu.dialling(nginx.url):
        await gpu.enrol_and_tell()
        await gpu.until_reachable()
        response = await caller.post("/v1/chat/completions", json={**ASK, "model": "lab/dialled", "stream": True})
        assert response.text == "".join(FRAMES) + DONE


# --- who asks ---


async def test_the_callers_own_address_is_noted_and_a_forged_one_is_not(
    nginx: Nginx, caller: httpx2.AsyncClient
) -> None:
    forged = {"x-forwarded-for": "203.0.113.9", "forwarded": "for=203.0.113.9", "x-real-ip": "203.0.113.9"}
    async with nginx.client("", source="127.0.0.7") as client:
        response = await client.post("/api/session", json={"key": "sk-fine-wrong"}, headers={**PAGE, **forged})
        assert response.status_code == 401
    (noted, *_) = (await caller.get("/api/audit", params={"action": "session.refused"})).json()["data"]
    assert noted["address"] == "127.0.0.7"


async def test_the_session_is_a_secure_cookie_of_the_domain(nginx: Nginx, caller: httpx2.AsyncClient) -> None:
    del caller.headers["authorization"]
    signed_in = await caller.post("/api/session", json={"key": ADMIN_KEY}, headers={**PAGE, "origin": nginx.url})
    assert signed_in.status_code == 200
    assert signed_in.headers["set-cookie"].startswith("__Host-")
    assert "Secure" in signed_in.headers["set-cookie"]


async def test_a_flood_of_sign_ins_ends_at_nginx_and_touches_nobody_else(nginx: Nginx) -> None:
    async with nginx.client("", source="127.0.0.8") as flood, nginx.client("", source="127.0.0.9") as other:
        tries = [flood.post("/api/session", json={"key": "sk-fine-wrong"}, headers=PAGE) for _ in range(40)]
        answers = await asyncio.gather(*tries)
        refused = [a for a in answers if a.status_code == 429]
        assert len(refused) >= 15
        assert refused[0].json()["error"]["code"] == "too_many"
        assert refused[0].headers["retry-after"] == "10"
        assert (await flood.get("/healthz")).status_code == 200
        assert (await other.post("/api/session", json={"key": "sk-fine-x"}, headers=PAGE)).status_code == 401


# --- bodies ---


async def test_an_upload_goes_in_as_it_comes_and_lies_in_no_file_of_nginx(
    nginx: Nginx, side: Side, caller: httpx2.AsyncClient
) -> None:
    incoming, go_on = side.relays[0].folder / "blobs" / "incoming", asyncio.Event()
    boundary, rows = "x" * 20, CHAT_ROW.encode() * 20_000
    head = f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--{boundary}\r\n'
    head += 'content-disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'

    async def body() -> AsyncIterator[bytes]:
        yield head.encode() + rows[:2_000_000]
        await go_on.wait()
        yield rows[2_000_000:] + f"\r\n--{boundary}--\r\n".encode()

    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    sending = asyncio.create_task(caller.post("/v1/files", content=body(), headers=kind))
    await until(lambda: sum(p.stat().st_size for p in incoming.rglob("*") if p.is_file()) > 500_000)
    assert not [p for p in (nginx.folder / "body").rglob("*") if p.is_file()]
    go_on.set()
    response = await sending
    assert response.status_code == 200, response.text
    assert response.json()["bytes"] == len(rows)


@pytest.mark.parametrize(
    ("path", "size"), [("/v1/chat/completions", 8 * 2**20 + 1), ("/v1/files", UPLOAD_BYTES + 2**20 + 1)]
)
@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_too_large_is_said_before_it_is_sent(
    nginx: Nginx, path: str, size: int, version: str, tmp_path: Path
) -> None:
    (tmp_path / "body").write_bytes(b"x" * size)
    key = f"authorization: Bearer {ADMIN_KEY}"
    options = [version, "-H", key, "-H", "content-type: multipart/form-data; boundary=x", "-H", "expect: 100-continue"]
    options += ["--data-binary", f"@{tmp_path / 'body'}", "--expect100-timeout", "10"]
    shown = await nginx.curl(*options, "-w", "\n%{http_code} %{size_upload}", f"{nginx.url}{path}")
    answer, _, counted = shown.rpartition("\n")
    status, sent = counted.split()
    assert status == "413"
    assert json.loads(answer)["error"]["code"] == "request_too_large"
    assert int(sent) < size


async def test_an_upload_over_the_relays_limit_is_its_own_413(nginx: Nginx, caller: httpx2.AsyncClient) -> None:
    file = {"file": ("rows.jsonl", b"x" * (UPLOAD_BYTES + 200_000))}
    response = await caller.post("/v1/files", files=file, data={"purpose": "fine-tune"})
    assert response.status_code == 413, response.text
    assert f"{UPLOAD_BYTES:,}" in response.json()["error"]["message"]


async def test_slow_callers_hold_nobody_up_and_are_let_go(side: Side, tmp_path: Path) -> None:
    nginx = before(side, tmp_path / "n")
    text = nginx.render()
    for name in ("client_header_timeout 15s", "client_body_timeout 60s"):
        assert name in text
        text = text.replace(name, name.split()[0] + " 1s")
    nginx.write(text)
    async with nginx.serving(), nginx.client(ADMIN_KEY) as caller:
        context = ssl.create_default_context(cafile=str(nginx.authority))
        request = f"POST /v1/files HTTP/1.1\r\nhost: {DOMAIN}:{nginx.https_port}\r\ncontent-length: 1000\r\n"
        opened = []
        for begun in (request, request + "content-type: multipart/form-data; boundary=x\r\n\r\n--x"):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", nginx.https_port, ssl=context, server_hostname=DOMAIN
            )
            writer.write(begun.encode())
            await writer.drain()
            opened.append((reader, writer))
        began = time.monotonic()
        assert (await caller.get("/v1/models")).status_code == 200
        assert time.monotonic() - began < 0.9
        for reader, writer in opened:
            with contextlib.suppress(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 10)
            writer.close()


# --- several relays ---


async def test_a_relay_is_killed_in_mid_load_and_only_what_was_with_it_notices(
    side: Side, nginx: Nginx, caller: httpx2.AsyncClient, gpu: DoubleGpu
) -> None:
    doomed, go_on = side.relays[1], asyncio.Event()

    async def haltingly(request: web.Request, body: bytes) -> web.StreamResponse:
        if json.loads(body).get("user") != "patient":
            return await say_fine(request, body)
        response = await start_stream(request)
        await response.write(FRAMES[0].encode())
        await go_on.wait()
        await response.write(DONE.encode())
        return response

    async def patient(read: list[str]) -> bool:
        """Whether all of it came."""
        with contextlib.suppress(*DEAD):
            asked = {**ASK, "stream": True, "user": "patient"}
            async with caller.stream("POST", "/v1/chat/completions", json=asked) as response:
                async for line in response.aiter_lines():
                    read.append(line)
        return "data: [DONE]" in read

    statuses: list[int] = []

    async def ask(_: int) -> None:
        asked = [
            partial(caller.get, "/v1/models"),
            partial(caller.post, "/v1/files", content=b"no form"),
            partial(caller.post, "/v1/chat/completions", json={**ASK, "stream": True}),
        ]
        for i in range(24):
            try:
                response = await asked[i % 3]()
                broke_off = response.is_success and i % 3 == 2 and response.text != "".join(FRAMES) + DONE
            except DEAD:
                broke_off = True
            statuses.append(0 if broke_off else response.status_code)

    gpu.answer = haltingly
    read: list[list[str]] = [[], [], [], []]  # the fewest connections get the next: both have some
    patients = asyncio.gather(*map(patient, read))
    try:
        await until(lambda: all(read))
        asking = asyncio.gather(*map(ask, range(4)))
        await until(lambda: len(statuses) > 10)
        await doomed.stop()
        await asking
        go_on.set()
        whole = await patients
    finally:
        await doomed.start()
    assert 0 < whole.count(True) < len(whole), whole
    assert len(statuses) == 4 * 24
    late = [status for status in statuses if status in (0, 503)]  # a POST is never sent twice
    assert len(late) <= 4
    assert len(statuses) - len(late) == statuses.count(200) + statuses.count(400)


async def test_with_no_relay_left_nginx_says_when_to_try_again(tmp_path: Path) -> None:
    nobody = Nginx(tmp_path / "n", [f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"])
    async with nobody.serving(), nobody.client(ADMIN_KEY) as caller:
        response = await caller.get("/v1/models")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "2"
        assert response.json()["error"]["code"] == "unavailable"
