"""The relay as a process: what a crash loses, how it stops, what it costs, what it logs."""

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import psutil
import pytest
from aiohttp import web
from openai import APIError, AsyncOpenAI, NotFoundError

import wire
from tests.relay.conftest import CHAT_ROW, until
from tests.relay.double_gpu import BASE, FRAMES, DoubleGpu, held, start_stream
from tests.relay.processes import RelayProcess, run

SECRET_PROMPT = "nobody may read this"


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[RelayProcess]:
    process = RelayProcess(tmp_path / "data", RELAY_HEARTBEAT_S="1", RELAY_LEASE_S="5")
    await process.start()
    yield process
    await process.stop()


@pytest.fixture
async def client(process: RelayProcess) -> AsyncIterator[AsyncOpenAI]:
    http = httpx2.AsyncClient(trust_env=False, verify=False)
    async with AsyncOpenAI(
        base_url=f"{process.url}/v1", api_key=process.secret("admin.key"), max_retries=0, http_client=http
    ) as client:
        yield client


@pytest.fixture
async def gpu(process: RelayProcess) -> AsyncIterator[DoubleGpu]:
    async with DoubleGpu(process.url, process.secret("enrol.token"), time.time, [BASE]).serving() as gpu:
        await gpu.enrol()
        await gpu.until_reachable()
        yield gpu


async def test_kill_9_loses_nothing_that_was_acknowledged(
    process: RelayProcess, client: AsyncOpenAI, gpu: DoubleGpu
) -> None:
    file = await client.files.create(file=("a.jsonl", CHAT_ROW.encode()), purpose="fine-tune")
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    grant = await gpu.next_grant()
    event = wire.JobEvent(seq=0, at=time.time(), message="a tenth is done")
    assert (await gpu.report(grant, event)).status_code == 200
    assert (await gpu.upload(grant, b"the trained tensors")).status_code == 200
    # And in the middle of an upload:
    host, port = process.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    target = gpu.blob_target(grant, wire.body_sha256(b"x" * 1000))
    head = [f"PUT {target} HTTP/1.1", "host: x", "content-length: 1000"]
    head += [f"{k}: {v}" for k, v in gpu.sign("PUT", target, b"x" * 1000).items()]
    writer.write("\r\n".join([*head, "", "xxx"]).encode())
    await writer.drain()
    incoming = process.folder / "blobs" / "incoming"
    await until(lambda: len([p for p in incoming.rglob("*") if p.is_file()]) == 2)  # its lock, and the half

    await process.stop(signal.SIGKILL)
    writer.close()
    await process.start()

    assert len([p for p in incoming.rglob("*") if p.is_file()]) == 1
    assert (await client.files.content(file.id)).text == CHAT_ROW
    events = [e.message async for e in client.fine_tuning.jobs.list_events(job.id)]
    assert events[0] == "a tenth is done"
    # The lease has outlived the relay, and the gpu goes on where it was.
    assert (await gpu.beat(held(grant))).commands == []
    assert (await gpu.succeed(grant)).status_code == 200
    await gpu.until_reachable()
    model = (await client.fine_tuning.jobs.retrieve(job.id)).fine_tuned_model
    assert model
    await client.chat.completions.create(model=model, messages=[])


async def test_it_stops_within_two_seconds_whatever_is_open(
    process: RelayProcess, client: AsyncOpenAI, gpu: DoubleGpu
) -> None:
    async def talk(request: web.Request, _: bytes) -> web.StreamResponse:
        response = await start_stream(request)
        while True:
            await response.write(FRAMES[0].encode())
            await asyncio.sleep(0.02)

    gpu.answer = talk
    stream = await client.chat.completions.create(model=BASE, messages=[], stream=True)
    beating = asyncio.create_task(gpu.beat())
    host, port = process.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n")  # and never sends the rest
    await anext(aiter(stream))
    await asyncio.sleep(0.1)

    began = time.monotonic()
    status = await process.stop(signal.SIGTERM)
    assert status == 0
    assert time.monotonic() - began < 2.5
    assert "Traceback" not in process.log
    assert "ERROR" not in process.log
    await beating
    await asyncio.wait_for(gpu.left.wait(), 1)
    with pytest.raises(APIError, match="being restarted"):
        [chunk async for chunk in stream]
    writer.close()


async def test_it_stays_small_and_its_log_keeps_secrets(
    process: RelayProcess, client: AsyncOpenAI, gpu: DoubleGpu
) -> None:
    await client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": SECRET_PROMPT}])
    with pytest.raises(NotFoundError):
        await client.chat.completions.create(model="none", messages=[{"role": "user", "content": SECRET_PROMPT}])
    assert psutil.Process(process.process.pid).memory_info().rss <= 120e6
    await process.stop(signal.SIGINT)
    assert "POST /v1/chat/completions 200" in process.log
    for hidden in (SECRET_PROMPT, process.secret("admin.key"), process.secret("enrol.token")):
        assert hidden not in process.log


async def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = await run(tmp_path, "-m", "relay", "serve", RELAY_PORT=str(port))
    assert (status, err) == (2, f"port {port} on 127.0.0.1 is taken: stop what uses it or set RELAY_PORT\n")


async def test_a_bad_setting_is_one_clear_line(tmp_path: Path) -> None:
    status, _, err = await run(tmp_path, "-m", "relay", "serve", RELAY_LEASE_S="soon")
    assert status == 2
    assert err.startswith("RELAY_LEASE_S is 'soon'")
    assert err.count("\n") == 1


async def test_importing_the_app_loads_no_torch_and_touches_nothing(tmp_path: Path) -> None:
    code = "import relay.app, sys; print(*({'torch', 'transformers', 'numpy', 'openai'} & sys.modules.keys()))"
    status, out, err = await run(tmp_path / "data", "-c", code)
    assert (status, out.strip(), err) == (0, "", "")
    assert not (tmp_path / "data").exists()


async def test_keys_made_and_revoked_on_the_command_line_count_at_once(
    process: RelayProcess, client: AsyncOpenAI
) -> None:
    status, out, _ = await run(process.folder, "-m", "relay", "keys", "create", "--user", "bora")
    assert status == 0
    key_id, key = out.split()[0], out.split()[-1]
    mine = AsyncOpenAI(base_url=client.base_url, api_key=key, max_retries=0)
    async with mine:
        theirs = await client.files.create(file=("a.jsonl", CHAT_ROW.encode()), purpose="fine-tune")
        assert [f async for f in mine.files.list()] == []
        with pytest.raises(NotFoundError):
            await mine.files.content(theirs.id)
        _, out, _ = await run(process.folder, "-m", "relay", "keys", "list")
        assert key_id in out
        assert key not in out
        assert (await run(process.folder, "-m", "relay", "keys", "revoke", key_id))[0] == 0
        response = await httpx_get(f"{process.url}/v1/files", key)
        assert response.status_code == 401
        assert "revoked" in response.json()["error"]["message"]
    assert (await run(process.folder, "-m", "relay", "keys", "revoke", key_id))[0] == 2
    for what in ("gpus", "jobs"):
        assert (await run(process.folder, "-m", "relay", what))[0] == 0


async def test_enrol_tokens_are_made_listed_and_revoked_on_the_command_line(process: RelayProcess) -> None:
    tokens = ("-m", "relay", "tokens")
    status, out, _ = await run(process.folder, *tokens, "create", "--name", "lab", "--expires-days", "1")
    assert status == 0
    token_id, token = out.split(",")[0], out.split()[-1]
    _, out, _ = await run(process.folder, *tokens, "list")
    assert {token_id, "lab", "one-time"} <= set(out.split())
    assert token not in out
    assert (await run(process.folder, *tokens, "revoke", token_id))[0] == 0
    status, _, said = await run(process.folder, *tokens, "revoke", token_id)
    assert (status, len(said.splitlines())) == (2, 1)


async def test_a_user_is_disabled_enabled_and_deleted_on_the_command_line(process: RelayProcess) -> None:
    relay = ("-m", "relay")
    _, out, _ = await run(process.folder, *relay, "keys", "create", "--user", "bora")
    key = out.split()[-1]
    for what, status in (("disable", 401), ("enable", 200), ("delete", 401)):
        assert (await run(process.folder, *relay, "users", what, "bora"))[0] == 0

        async def so(status: int = status) -> bool:  # the relay remembers a key for a second
            return (await httpx_get(f"{process.url}/v1/files", key)).status_code == status

        await until(so)
    assert "bora" not in (await run(process.folder, *relay, "users", "list"))[1]
    _, out, _ = await run(process.folder, *relay, "audit")
    assert {"user.disable", "user.enable", "user.delete", "user.deleted"} <= set(out.split())
    assert (await run(process.folder, *relay, "users", "delete", "admin"))[0] == 2


@pytest.mark.parametrize(("trusted", "believed"), [("", True), ("none", False), ("10.0.0.0/8", False)])
async def test_what_a_proxy_says_of_its_caller_is_believed_where_the_proxy_is_trusted(
    tmp_path: Path, trusted: str, believed: bool
) -> None:
    process = RelayProcess(tmp_path / "data", RELAY_TRUSTED_PROXIES=trusted, FORWARDED_ALLOW_IPS="*")
    await process.start()
    says = {"x-forwarded-for": "203.0.113.9", "x-forwarded-proto": "https", "x-imfine-page": "1"}
    async with httpx2.AsyncClient(base_url=process.url, headers=says, trust_env=False, verify=False) as http:
        await http.post("/api/session", json={"key": "sk-fine-wrong"})
        answer = await http.get("/api/audit", headers={"authorization": f"Bearer {process.secret('admin.key')}"})
    await process.stop()
    assert answer.json()["data"][0]["address"] == ("203.0.113.9" if believed else "127.0.0.1")
    assert ("strict-transport-security" in answer.headers) is believed


async def test_an_unsafe_setting_is_one_line_and_nothing_listens(tmp_path: Path) -> None:
    status, _, err = await run(tmp_path / "data", "-m", "relay", "serve", RELAY_HOST="0.0.0.0")
    assert status == 2
    assert err.startswith("RELAY_HOST=0.0.0.0 can be reached from other machines, and RELAY_ALLOW_LOOPBACK_GPUS")
    assert len(err.splitlines()) == 1


async def httpx_get(url: str, key: str) -> httpx2.Response:
    async with httpx2.AsyncClient(trust_env=False, verify=False) as http:
        return await http.get(url, headers={"authorization": f"Bearer {key}"})
