"""Blobs in a bucket: what is there, what is not, and what happens while it can't be reached."""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from relay import errors
from relay.batches import LOST_AFTER_S
from relay.blobs import Bound
from relay.bucket import BucketBlobs
from relay.s3 import S3
from relay.settings import BadSetting, Settings, from_env
from relay.storage import blobs_of
from tests.conftest import ROOT
from tests.postgres import Postgres
from tests.relay import test_batches as batches
from tests.relay.conftest import ADMIN_KEY, CHAT_ROW, Clock, Relay, running_relay, until
from tests.relay.double_gpu import BASE, result_of
from tests.relay.processes import RelayProcess, run
from tests.s3 import SECRET, S3Server, environment, settings_of

BOUND = Bound(2**30, errors.TooLarge("too large"))


def name_of(bucket: dict[str, Any]) -> str:
    return str(bucket["blobs_url"]).split("/")[2]


def blobs_in(s3: S3Server, bucket: dict[str, Any]) -> dict[str, list[bytes]]:
    """Contents by SHA-256, marks too."""
    found: dict[str, list[bytes]] = {}
    for key in s3.keys(name_of(bucket)):
        if key.startswith("blobs/"):
            found.setdefault(key.split("/")[1], []).append(s3.content(name_of(bucket), key))
    return found


def sha_of(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


async def put(blobs: BucketBlobs, content: bytes) -> str:
    async with blobs.incoming(BOUND) as incoming:
        await incoming.write(content)
        await incoming.finish()
        await blobs.send(incoming)
        await blobs.keep(incoming)
    return sha_of(content)


async def content_of(blobs: BucketBlobs, sha256: str) -> bytes:
    return b"".join([chunk async for chunk in await blobs.read(sha256)])


@pytest.fixture
async def relay(start_relay: Callable[..., Any], bucket: dict[str, Any]) -> Relay:
    return await start_relay(**bucket)  # type: ignore[no-any-return]


@pytest.fixture
def blobs(tmp_path: Path, bucket: dict[str, Any]) -> Any:
    found = blobs_of(settings_of(tmp_path, bucket))
    (tmp_path / "blobs").mkdir()
    found.open()
    yield found
    found.close()


# --- through the whole relay ---


async def test_a_file_is_one_object_of_the_bucket_and_leaves_it_with_its_last_name(
    relay: Relay, s3: S3Server, bucket: dict[str, Any]
) -> None:
    file, same = await relay.upload(CHAT_ROW), await relay.upload(CHAT_ROW)
    assert blobs_in(s3, bucket) == {sha_of(CHAT_ROW): [CHAT_ROW.encode()]}
    assert (await relay.openai.files.content(file)).content == CHAT_ROW.encode()
    await relay.openai.files.delete(file)
    assert (await relay.openai.files.content(same)).content == CHAT_ROW.encode()
    await relay.openai.files.delete(same)
    assert blobs_in(s3, bucket) == {}


async def test_what_a_gpu_trains_comes_from_the_bucket_and_its_adapter_goes_there(
    relay: Relay, s3: S3Server, bucket: dict[str, Any]
) -> None:
    async with relay.gpu() as gpu:
        job = await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload(CHAT_ROW))
        grant = await gpu.next_grant()
        got = await gpu.call("GET", f"/gpu/blobs/{grant.job.training_file.sha256}")
        assert got.content == CHAT_ROW.encode()
        assert (await gpu.upload(grant, b"the trained tensors")).status_code == 200
        again = await gpu.upload(grant, b"the trained tensors")
        assert again.status_code == 200
        assert (await gpu.finish(grant, result_of(grant, b"the trained tensors"))).status_code == 200
    assert (await relay.openai.fine_tuning.jobs.retrieve(job.id)).status == "succeeded"
    assert blobs_in(s3, bucket)[sha_of(b"the trained tensors")] == [b"the trained tensors"]


async def test_a_batchs_parts_and_files_go_through_the_bucket(
    relay: Relay, s3: S3Server, bucket: dict[str, Any]
) -> None:
    async with relay.gpu() as gpu:
        batch = await batches.create(relay, 3)
        grant = await gpu.next_batch()
        assert (await gpu.answer_rows(grant, 2, 0)).status_code == 200
        assert (await gpu.answer_rows(grant, 1)).status_code == 200
        assert (await batches.finish(gpu, grant)).status_code == 200
        done = await batches.ended(relay, batch)
    answers = (await relay.openai.files.content(done.output_file_id)).content
    assert [line["custom_id"] for line in await batches.lines(relay, done.output_file_id)] == [
        "row-0",
        "row-1",
        "row-2",
    ]

    async def only_files() -> bool:  # the parts go once the files stand
        return len(blobs_in(s3, bucket)) == 2

    await until(only_files)
    assert blobs_in(s3, bucket)[sha_of(answers)] == [answers]


async def test_a_part_that_the_bucket_has_lost_is_said_of_its_rows(
    relay: Relay, s3: S3Server, bucket: dict[str, Any]
) -> None:
    async with relay.gpu() as gpu:
        batch = await batches.create(relay, 2)
        grant = await gpu.next_batch()
        before = blobs_in(s3, bucket)
        assert (await gpu.answer_rows(grant, 0)).status_code == 200
        (lost,) = blobs_in(s3, bucket).keys() - before.keys()
        assert (await gpu.answer_rows(grant, 1)).status_code == 200
        for key in s3.keys(name_of(bucket)):
            if lost in key:
                s3.client.delete_object(Bucket=name_of(bucket), Key=f"of/relay/{key}")
        (relay.settings.data_dir / "blobs/cache" / lost).unlink()
        assert (await batches.finish(gpu, grant)).status_code == 200
        relay.clock.advance(LOST_AFTER_S)
        done = await batches.ended(relay, batch)
    assert [line["custom_id"] for line in await batches.lines(relay, done.output_file_id)] == ["row-1"]
    (missing,) = await batches.lines(relay, done.error_file_id)
    assert (missing["custom_id"], missing["error"]["code"]) == ("row-0", "answer_lost")


async def test_an_account_that_is_deleted_leaves_nothing_in_the_bucket(
    relay: Relay, s3: S3Server, bucket: dict[str, Any]
) -> None:
    made = await run(relay.settings.data_dir, "-m", "relay", "keys", "create", "--user", "ada", **environment(bucket))
    key = made[1].split()[-1]
    client = relay.client(key)
    await client.files.create(file=("a.jsonl", (CHAT_ROW * 2).encode()), purpose="fine-tune")
    await client.close()
    mine = await relay.upload(CHAT_ROW)
    status, _, err = await run(relay.settings.data_dir, "-m", "relay", "users", "delete", "ada", **environment(bucket))
    assert (status, err) == (0, "")
    assert list(blobs_in(s3, bucket)) == [sha_of(CHAT_ROW)]
    assert (await relay.openai.files.content(mine)).content == CHAT_ROW.encode()


async def test_two_relays_in_folders_of_their_own_share_a_bucket(
    tmp_path: Path, clock: Clock, bucket: dict[str, Any], postgres: Postgres
) -> None:
    name = postgres.new()
    async with AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(
                running_relay(tmp_path / at, clock, database_url=postgres.url(name), has_peers=True, **bucket)
            )
            for at in ("one", "other")
        ]
        file = await one.upload(CHAT_ROW)
        assert (await other.openai.files.content(file)).content == CHAT_ROW.encode()
        await other.openai.files.delete(file)
        assert await one.upload(CHAT_ROW)
    postgres.drop(name)


# --- while it can't be reached ---


async def test_without_its_bucket_a_relay_says_so_keeps_nothing_half_and_goes_on_when_it_is_back(
    start_relay: Callable[..., Any], clock: Clock
) -> None:
    server = S3Server()
    server.start()
    try:
        bucket = server.settings(server.new())
        relay = await start_relay(**bucket)
        await relay.upload(CHAT_ROW)
        server.stop()
        file = {"file": ("a.jsonl", (CHAT_ROW * 2).encode())}
        refused = await relay.http.post("/v1/files", data={"purpose": "fine-tune"}, files=file)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert SECRET not in refused.text
        assert len((await relay.http.get("/v1/files")).json()["data"]) == 1
        assert not [p for p in (relay.settings.data_dir / "blobs" / "incoming").glob("*/*") if p.name != "lock"]

        async def reasons() -> list[str]:
            return [reason["code"] for reason in (await relay.http.get("/readyz")).json()["reasons"]]

        await until(lambda: _is(reasons, ["storage"]))
        server.start()
        server.client.create_bucket(Bucket=name_of(bucket))
        await until(lambda: _is(reasons, []))
        await relay.upload(CHAT_ROW * 2)
    finally:
        server.stop()


async def _is(ask: Callable[[], Any], wanted: Any) -> bool:
    return bool(await ask() == wanted)


async def test_a_bucket_that_is_throttled_is_asked_again_and_one_that_refuses_is_a_503(tmp_path: Path) -> None:
    """A server that says what S3 says: SlowDown twice, then yes; and later AccessDenied."""
    answers = [(503, "SlowDown"), (503, "SlowDown"), (200, ""), (403, "AccessDenied")]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answers:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head.lower())
            await reader.readexactly(int(length[1]) if length else 0)
            status, code = answers.pop(0)
            body = f"<Error><Code>{code}</Code><AWSAccessKeyId>mine</AWSAccessKeyId></Error>".encode() if code else b""
            told = f'HTTP/1.1 {status} X\r\nETag: "x"\r\ncontent-length: {len(body)}\r\n\r\n'
            writer.write(told.encode() + body)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    s3 = S3(
        Settings(
            data_dir=tmp_path,
            blobs_url="s3://bucket",
            s3_endpoint=f"http://127.0.0.1:{port}",
            s3_access_key_id="mine",
            s3_secret_access_key=SECRET,
        )
    )
    await s3.put("a", b"content")
    with pytest.raises(errors.StorageUnavailable, match="AccessDenied") as caught:
        await s3.put("a", b"content")
    assert "mine" not in str(caught.value)
    assert answers == []
    server.close()


async def test_a_relay_killed_while_it_sends_to_the_bucket_leaves_nothing_that_is_seen(
    tmp_path: Path, bucket: dict[str, Any], s3: S3Server
) -> None:
    """What is between them passes 9 MB and then no more, which is in the middle of the parts."""
    passed, stuck = 0, asyncio.Event()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool) -> None:
        nonlocal passed
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(2**16):
                    passed += len(data) * counted
                    if passed > 9_000_000:
                        stuck.set()
                        await asyncio.Event().wait()
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.transport.abort()

    async with asyncio.TaskGroup() as group:

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, to = await asyncio.open_connection("127.0.0.1", s3.port)
            copying.append(group.create_task(copy(reader, to, counted=True)))
            copying.append(group.create_task(copy(there, writer, counted=False)))

        copying: list[asyncio.Task[None]] = []
        server = await asyncio.start_server(between, "127.0.0.1", 0)
        through = {"RELAY_S3_ENDPOINT": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}
        process = RelayProcess(tmp_path / "data", RELAY_ADMIN_KEY=ADMIN_KEY, **environment(bucket) | through)
        await process.start()
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        file = {"file": ("a.jsonl", CHAT_ROW.encode() * 200_000)}
        async with httpx2.AsyncClient(base_url=process.url, trust_env=False, verify=False, headers=headers) as http:
            sending = asyncio.create_task(
                http.post("/v1/files", data={"purpose": "fine-tune"}, files=file, timeout=120)
            )
            await stuck.wait()
            await process.stop(signal.SIGKILL)
            with pytest.raises(httpx2.TransportError):
                await sending
        server.close()
        for task in copying:
            task.cancel()
    assert s3.client.list_multipart_uploads(Bucket=name_of(bucket)).get("Uploads")  # what a lifecycle rule removes
    assert blobs_in(s3, bucket) == {}
    assert SECRET not in process.log
    process.changes |= environment(bucket)
    await process.start()
    assert not [p for p in (tmp_path / "data/blobs/incoming").glob("*/*") if p.name != "lock"]
    assert await process.stop(signal.SIGTERM) == 0


# --- the store by itself ---


async def test_a_large_blob_goes_in_parts_and_comes_back_whole(blobs: BucketBlobs, tmp_path: Path) -> None:
    content = os.urandom(2**20) * 20
    sha256 = await put(blobs, content)
    assert await blobs.sizes([sha256, "0" * 64]) == {sha256: len(content)}
    assert await content_of(blobs, sha256) == content
    assert await blobs.total_bytes() == len(content)


async def test_a_reader_keeps_its_copy_though_it_is_evicted_meanwhile(tmp_path: Path, bucket: dict[str, Any]) -> None:
    blobs = blobs_of(settings_of(tmp_path, {**bucket, "s3_cache_bytes": 100}))
    (tmp_path / "blobs").mkdir()
    blobs.open()
    assert isinstance(blobs, BucketBlobs)
    first = await put(blobs, b"a" * 60)
    async with blobs.local(first) as path:
        await put(blobs, b"b" * 60)
        await put(blobs, b"c" * 60)
        assert [p.stat().st_size for p in (tmp_path / "blobs/cache").iterdir()] == [60]
        assert path.read_bytes() == b"a" * 60
    assert not path.exists()
    async with blobs.local(first) as path:
        assert path.read_bytes() == b"a" * 60
    blobs.close()


async def test_a_damaged_copy_is_fetched_anew_and_a_damaged_object_is_told(
    blobs: BucketBlobs, tmp_path: Path, s3: S3Server, bucket: dict[str, Any]
) -> None:
    sha256 = await put(blobs, b"rows")
    (tmp_path / "blobs/cache" / sha256).write_bytes(b"rot!")
    async with blobs.local(sha256) as path:
        assert path.read_bytes() == b"rows"
    assert (tmp_path / "blobs/cache" / sha256).read_bytes() == b"rows"
    (tmp_path / "blobs/cache" / sha256).unlink()
    (key,) = s3.keys(name_of(bucket))
    s3.client.put_object(Bucket=name_of(bucket), Key=f"of/relay/{key}", Body=b"rot!")
    with pytest.raises(errors.StorageUnavailable, match="damaged"):
        async with blobs.local(sha256):
            pass
    with pytest.raises(FileNotFoundError):
        async with blobs.local("0" * 64):
            pass


async def test_what_is_on_its_way_out_can_not_be_named_and_comes_anew_under_another_name(
    blobs: BucketBlobs, s3: S3Server, bucket: dict[str, Any]
) -> None:
    sha256, aside = await put(blobs, b"rows"), list[str]()
    await blobs.set_aside([sha256], float("inf"), aside)
    assert await blobs.size_bytes(sha256) is None
    await put(blobs, b"rows")  # somebody names it again, before the removal comes to its end
    await blobs.drop(aside)
    assert await content_of(blobs, sha256) == b"rows"
    assert len(s3.keys(name_of(bucket))) == 1


async def test_more_than_one_page_of_blobs_is_counted(blobs: BucketBlobs, s3: S3Server, bucket: dict[str, Any]) -> None:
    for number in range(1003):
        s3.client.put_object(Bucket=name_of(bucket), Key=f"of/relay/blobs/{number:064x}/n", Body=b"xy")
    assert await blobs.total_bytes() == 2006
    assert len(await blobs.older_than(float("inf"))) == 1003


async def test_what_does_not_fit_on_the_local_disk_is_refused(tmp_path: Path, bucket: dict[str, Any]) -> None:
    blobs = blobs_of(settings_of(tmp_path, {**bucket, "min_free_bytes": 2**62}))
    (tmp_path / "blobs").mkdir()
    blobs.open()
    with pytest.raises(errors.DiskFull):
        async with blobs.incoming(BOUND):
            pass
    blobs.close()


# --- the start, and moving ---


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({"RELAY_S3_ENDPOINT": "https://s3.example.com"}, "name the bucket"),
        ({"RELAY_BLOBS_URL": "s3://bucket", "RELAY_S3_ACCESS_KEY_ID": "mine"}, "set both"),
        ({"RELAY_BLOBS_URL": "s3://bucket", "RELAY_S3_ENDPOINT": "http://minio.example.com"}, "use https"),
        ({"RELAY_BLOBS_URL": "https://bucket"}, "use s3://bucket"),
        ({"RELAY_BLOBS_URL": "s3://bucket", "RELAY_S3_ENDPOINT": "https://a:b@host"}, "without a bucket"),
    ],
)
def test_settings_that_are_unsafe_or_half_are_refused(environ: dict[str, str], why: str) -> None:
    with pytest.raises(BadSetting, match=why) as caught:
        from_env(environ)
    assert "a:b" not in str(caught.value)


def test_http_is_allowed_on_a_private_network_and_where_it_is_said() -> None:
    url = {"RELAY_BLOBS_URL": "s3://bucket/prefix"}
    assert from_env({**url, "RELAY_S3_ENDPOINT": "http://10.0.0.5:9000"}).s3_endpoint == "http://10.0.0.5:9000"
    assert from_env({**url, "RELAY_S3_ENDPOINT": "http://minio:9000", "RELAY_S3_ALLOW_HTTP": "1"}).s3_allow_http


async def test_a_bucket_that_is_not_there_or_is_anothers_is_one_line_at_the_start(
    tmp_path: Path, s3: S3Server, bucket: dict[str, Any]
) -> None:
    nowhere = environment({**bucket, "blobs_url": "s3://no-such-bucket"})
    status, _, err = await run(tmp_path / "a", "-m", "relay", "serve", **nowhere)
    assert (status, "there is no such bucket" in err) == (2, True)
    assert SECRET not in err

    mine = RelayProcess(tmp_path / "mine", **environment(bucket))
    await mine.start()
    await mine.stop(signal.SIGTERM)
    await mine.start()
    await mine.stop(signal.SIGTERM)
    status, _, err = await run(tmp_path / "other", "-m", "relay", "serve", **environment(bucket))
    assert (status, "belongs to another database" in err) == (2, True)


async def test_from_the_folder_to_a_bucket_and_a_backup_of_it(
    tmp_path: Path, s3: S3Server, bucket: dict[str, Any]
) -> None:
    process = RelayProcess(tmp_path / "data", RELAY_ADMIN_KEY=ADMIN_KEY)
    await process.start()

    async def http() -> httpx2.AsyncClient:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        return httpx2.AsyncClient(base_url=process.url, trust_env=False, verify=False, headers=headers)

    async with await http() as client:
        sent = await client.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", CHAT_ROW.encode())}
        )
        file = sent.json()["id"]
    await process.stop(signal.SIGTERM)
    process.changes |= environment(bucket)
    status, _, err = await run(process.folder, "-m", "relay", "serve", **process.changes)
    assert (status, "blobs copy" in err) == (2, True)
    status, out, err = await run(process.folder, "-m", "relay", "blobs", "copy", **process.changes)
    assert (status, err) == (0, "")
    assert "has 1 blobs" in out
    await process.start()
    async with await http() as client:
        assert (await client.get(f"/v1/files/{file}/content")).text == CHAT_ROW

    saved = tmp_path / "saved.tar"
    status, out, err = await run(process.folder, "-m", "relay", "backup", str(saved), **process.changes)
    assert (status, err) == (0, "")
    assert "the list of 1 blobs" in out
    with tarfile.open(saved) as tar:
        assert not [name for name in tar.getnames() if name.startswith("blobs/")]
        manifest = tar.extractfile("manifest.json")
        assert manifest
        assert json.load(manifest)["in_bucket"] == [sha_of(CHAT_ROW)]
    await process.stop(signal.SIGTERM)
    status, _, err = await run(tmp_path / "elsewhere", "-m", "relay", "restore", str(saved))
    assert (status, "RELAY_BLOBS_URL" in err) == (2, True)

    process.folder = tmp_path / "elsewhere"
    status, _, err = await run(process.folder, "-m", "relay", "restore", str(saved), **process.changes)
    assert (status, err) == (0, "")
    await process.start()
    async with await http() as client:
        assert (await client.get(f"/v1/files/{file}/content")).text == CHAT_ROW
        await client.delete(f"/v1/files/{file}")
    await process.stop(signal.SIGTERM)
    mark = f"of/relay/blobs/{sha_of(CHAT_ROW)}/{'0' * 32}.gone"  # what a removal leaves that is cut off at its end
    s3.client.put_object(Bucket=name_of(bucket), Key=mark, Body=b"")
    status, _, err = await run(tmp_path / "later", "-m", "relay", "restore", str(saved), **process.changes)
    assert (status, sha_of(CHAT_ROW) in err) == (1, True)


def test_a_relay_on_a_folder_does_not_load_the_buckets_library(tmp_path: Path) -> None:
    code = (
        "import sys; from relay.app import create_app; from relay.settings import Settings; from pathlib import Path; "
        f"create_app(Settings(data_dir=Path({str(tmp_path)!r}))); print('obstore' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
