"""Several relay processes on one database and one data folder: each answers for all."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import delete, select, update
from starlette.requests import Request
from starlette.responses import Response

import wire
from frames import RequestHead
from relay import errors, hop
from relay.blobs import FolderBlobs
from relay.folder import check
from relay.store import Store
from relay.tables import folders, gpus, jobs, relays, users
from tests.cable import Cable
from tests.postgres import Postgres
from tests.relay.conftest import ENROL_TOKEN, Clock, Relay, running_relay, until
from tests.relay.dialler import DiallingGpu, fine, streamed
from tests.relay.double_gpu import BASE, DONE, FRAMES
from tests.relay.processes import RelayProcess, run
from tests.relay.test_generations import kinds, reading, words
from tests.relay.test_usage import telling, used
from tests.relay.test_webhooks import Receiver, create, log_of

ASK: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "How are you?"}]}


class Pair:
    """Two relays, `a` and `b`, and the stack that `a` alone stands on."""

    def __init__(self, folder: Path, clock: Clock, url: str) -> None:
        self._folder, self._clock, self.store = folder, clock, Store(url)
        self._url = url
        self._of_a = AsyncExitStack()

    def running(self, **changes: Any) -> Any:
        values = {"database_url": self._url, "has_peers": True} | changes
        return running_relay(self._folder, self._clock, **values)

    async def start(self, stack: AsyncExitStack) -> "Pair":
        stack.push_async_callback(self.store.close)
        self.b: Relay = await stack.enter_async_context(self.running())
        self.a: Relay = await self._of_a.enter_async_context(self.running())
        stack.push_async_callback(self._of_a.aclose)
        return self

    async def stop_a(self) -> None:
        await self._of_a.aclose()

    async def ids(self) -> dict[str, str]:
        """Of the processes, by their URLs."""
        async with self.store.read() as db:
            return {row.url: row.id for row in await db.execute(select(relays))}


@pytest.fixture
async def pair(tmp_path: Path, clock: Clock, postgres: Postgres) -> AsyncIterator[Pair]:
    name = postgres.new()
    async with AsyncExitStack() as stack:
        yield await Pair(tmp_path / "data", clock, postgres.url(name)).start(stack)
    postgres.drop(name)


@asynccontextmanager
async def dialled_to(relay: Relay, url: str | None = None) -> AsyncIterator[DiallingGpu]:
    gpu = DiallingGpu(relay.url, ENROL_TOKEN, relay.clock, [BASE])
    async with gpu.dialling(url or relay.url):
        await gpu.enrol_and_tell()
        await gpu.until_reachable()
        yield gpu


async def asked(relay: Relay, **more: Any) -> httpx2.Response:
    return await relay.http.post("/v1/chat/completions", json={**ASK, **more})


async def until_answered(relay: Relay) -> None:
    async def answered() -> bool:
        return (await asked(relay)).status_code == 200

    await until(answered, 10)


async def test_a_gpu_that_dialled_in_to_one_is_reached_by_the_other(pair: Pair) -> None:
    async with dialled_to(pair.a) as gpu:
        await until_answered(pair.b)
        for relay in (pair.a, pair.b):
            assert (await asked(relay)).json() == {"content": "I'm fine."}
            assert (await asked(relay, stream=True)).text == "".join(FRAMES) + DONE
        assert gpu.prompts

        async def echo(request: Request, body: bytes) -> Response:
            return Response(body, media_type="application/json")

        gpu.reply_with = echo
        text = "나는 괜찮아요. " * 40_000  # about a megabyte
        body = json.dumps({"model": BASE, "messages": [{"role": "user", "content": text}]}, ensure_ascii=False).encode()
        assert (await pair.b.http.post("/v1/chat/completions", content=body)).content == body


async def test_frames_come_through_the_other_as_they_are_made(pair: Pair) -> None:
    go_on = asyncio.Event()

    async def haltingly() -> AsyncIterator[str]:
        yield FRAMES[0]
        await go_on.wait()
        yield DONE

    async def reply(request: Request, body: bytes) -> Response:
        return streamed(haltingly())

    async with dialled_to(pair.a) as gpu:
        await until_answered(pair.b)
        gpu.reply_with = reply
        async with pair.b.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
            lines = response.aiter_lines()
            assert await anext(lines) == FRAMES[0].strip()
            go_on.set()
            assert [line async for line in lines][-2:] == [DONE.strip(), ""]


async def test_a_caller_who_leaves_the_other_stops_the_gpu(pair: Pair) -> None:
    stopped = asyncio.Event()

    async def for_ever() -> AsyncIterator[str]:
        try:
            while True:
                yield FRAMES[0]
                await asyncio.sleep(0.01)
        finally:
            stopped.set()

    async def reply(request: Request, body: bytes) -> Response:
        return streamed(for_ever())

    async with dialled_to(pair.a) as gpu:
        await until_answered(pair.b)
        gpu.reply_with = reply
        async with pair.b.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
            await anext(response.aiter_lines())
        async with asyncio.timeout(5):
            await stopped.wait()


async def test_a_slow_reader_at_the_other_stops_the_gpu_and_fills_no_memory(pair: Pair) -> None:
    given_bytes = 0

    async def flood() -> AsyncIterator[str]:
        nonlocal given_bytes
        frame = "data: " + "x" * 8000 + "\n\n"
        for _ in range(50_000):  # 400 MB, if anybody took it
            yield frame
            given_bytes += len(frame)

    async def reply(request: Request, body: bytes) -> Response:
        return streamed(flood()) if json.loads(body).get("user") == "slow" else await fine(request, body)

    async with dialled_to(pair.a) as gpu:
        await until_answered(pair.b)
        gpu.reply_with = reply
        slow = {**ASK, "stream": True, "user": "slow"}
        async with pair.b.http.stream("POST", "/v1/chat/completions", json=slow) as response:
            await anext(response.aiter_raw())
            last = -1
            while given_bytes != last:  # until everything between us is full
                last = given_bytes
                await asyncio.sleep(0.3)
            assert (await asked(pair.b, stream=True)).text == "".join(FRAMES) + DONE
            assert given_bytes == last
        assert given_bytes < 32 * 2**20  # sockets' own buffers, of two hops


async def test_an_answer_that_breaks_off_at_the_one_ends_at_the_other_with_an_error(pair: Pair) -> None:
    async with Cable.to(pair.a.url) as cable, dialled_to(pair.a, cable.url) as gpu:
        await until_answered(pair.b)

        async def half() -> AsyncIterator[str]:
            yield FRAMES[0]
            await asyncio.Event().wait()

        async def reply(request: Request, body: bytes) -> Response:
            return streamed(half())

        gpu.reply_with = reply
        async with pair.b.http.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as response:
            lines = response.aiter_lines()
            assert await anext(lines) == FRAMES[0].strip()
            cable.cut()
            rest = "\n".join([line async for line in lines])
        assert '"gpu_unreachable"' in rest
        assert "[DONE]" not in rest


async def test_when_the_one_ends_the_gpu_dials_the_other_and_goes_on(pair: Pair) -> None:
    parts = httpx2.URL(pair.b.url)
    async with Cable.to(pair.a.url) as cable, dialled_to(pair.a, cable.url) as gpu:  # as nginx stands before both
        await until_answered(pair.b)
        cable.leads_to(parts.host, parts.port or 0)
        await pair.stop_a()
        gpu.http.base_url = parts
        await until_answered(pair.b)
        async with pair.store.read() as db:
            holder = (await db.execute(select(gpus.c.relay_id))).scalar_one()
        assert {holder} == set((await pair.ids()).values())


async def test_an_owner_that_is_dead_or_knows_nothing_of_the_gpu_is_a_gpu_that_can_not_be_reached(pair: Pair) -> None:
    async with dialled_to(pair.a):
        await until_answered(pair.b)
        ids = await pair.ids()
        for owner in ("relay-that-is-dead", ids[pair.b.url]):
            async with pair.store.write() as db:
                await db.execute(update(gpus).values(relay_id=owner))

            async def refused() -> bool:
                response = await asked(pair.b)
                return bool(response.status_code == 503 and response.json()["error"]["code"] in GONE)

            await until(refused, 10)


GONE = ("gpu_unreachable", "no_gpu")


async def test_an_answer_by_way_of_a_machine_without_power_ends_once_its_gpu_is_elsewhere(
    pair: Pair, clock: Clock
) -> None:
    """No connection breaks there: nothing says that nothing will come."""
    asked_for = asyncio.Event()

    async def never(request: Request, body: bytes) -> Response:
        asked_for.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with dialled_to(pair.a) as gpu:
        await until_answered(pair.b)
        gpu.reply_with = never
        waiting = asyncio.create_task(asked(pair.b))
        async with asyncio.timeout(10):
            await asked_for.wait()
        gpu.reply_with = fine
        async with pair.store.write() as db:
            elsewhere = {"relay_id": "relay-elsewhere", "last_seen_at": clock() + 2 * pair.b.settings.alive_s}
            await db.execute(update(gpus).values(**elsewhere))

        async def is_seen() -> bool:
            return (await asked(pair.b)).status_code == 503

        await until(is_seen)
        clock.advance(pair.b.settings.alive_s + 1)
        async with asyncio.timeout(10):
            answer = await waiting
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gpu_unreachable")


@pytest.mark.parametrize("how", ["not at all", "for another", "twice", "another body", "as a gpu"])
async def test_who_is_no_relay_process_asks_nothing_of_one(pair: Pair, clock: Clock, how: str) -> None:
    async with dialled_to(pair.a) as gpu:
        target = f"{hop.GPUS}/{gpu.by.gpu_id}/{gpu.by.epoch}"
        head = (
            wire.sign(gpu.reply.signing_key, gpu.by, "POST", "/x", wire.body_sha256(b""), clock()) if gpu.reply else {}
        )
        body = hop.packed(RequestHead(method="POST", target="/x", headers=head), b"")
        async with pair.store.read() as db:
            rows = {row.url: row for row in await db.execute(select(relays))}
        to = rows[pair.b.url if how == "for another" else pair.a.url]
        by = wire.SignedBy(gpu_id=to.id, epoch=0)
        headers = wire.sign(to.secret, by, "POST", target, wire.body_sha256(body), clock())
        if how == "twice":
            await pair.a.http.post(target, content=body, headers=headers)
        elif how == "not at all":
            headers = {}
        elif how == "as a gpu":
            headers = gpu.sign("POST", target, body)
        elif how == "another body":
            body += b"!"
        came = gpu.asked
        response = await pair.a.http.post(target, content=body, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "bad_signature"
        assert gpu.asked == came


async def test_an_answer_for_the_page_is_picked_up_and_stopped_through_the_other(pair: Pair) -> None:
    go_on = asyncio.Event()

    async def haltingly() -> AsyncIterator[str]:
        yield FRAMES[0]
        await go_on.wait()
        for frame in (*FRAMES[1:], DONE):
            yield frame

    async def reply(request: Request, body: bytes) -> Response:
        return streamed(haltingly())

    async with dialled_to(pair.a) as gpu:
        gpu.reply_with = reply
        async with reading(pair.a) as reader:
            started = (await reader.next())[1]
            path = f"/api/generations/{started['id']}"
        async with reading(pair.b, path, after=1) as again:
            go_on.set()
            assert words(await again.rest()) == words([(None, json.loads(frame[6:])) for frame in FRAMES])
        theirs = (await pair.a.http.post("/api/keys", json={"user": "other"})).json()["key"]
        stranger = {"authorization": f"Bearer {theirs}"}
        assert (await pair.b.http.get(path, headers=stranger)).status_code == 404
        assert (await pair.b.http.delete(path, headers=stranger)).status_code == 404
        assert (await pair.b.http.delete(path)).json()["deleted"]
        assert (await pair.a.http.get(path)).status_code == 404
        assert (await pair.b.http.get(path)).status_code == 404


async def test_an_answer_for_the_page_that_went_with_its_process_is_not_found(pair: Pair) -> None:
    async with pair.a.gpu():
        pass  # the model is known from here on, and no gpu has it
    async with reading(pair.a) as reader:
        started = (await reader.next())[1]
        assert kinds([(None, started)]) == ["started"]
    await pair.stop_a()
    response = await pair.b.http.get(f"/api/generations/{started['id']}")
    assert response.status_code == 404


async def test_a_start_beside_another_gives_no_lease_a_term_of_grace(pair: Pair, clock: Clock) -> None:
    async with pair.a.gpu() as gpu:
        await pair.a.openai.fine_tuning.jobs.create(model=BASE, training_file=await pair.a.upload())
        grant = await gpu.next_grant()
        clock.advance(20)

        async def lease_until() -> float:
            async with pair.store.read() as db:
                return float(
                    (await db.execute(select(jobs.c.lease_until).where(jobs.c.fence == grant.fence))).scalar_one()
                )

        async with pair.store.write() as db:
            await db.execute(update(relays).values(seen_at=clock()))  # its loop beats by another clock
        before = await lease_until()
        async with pair.running():
            assert await lease_until() == before
        assert before < clock() + pair.a.settings.lease_s


async def test_a_held_heartbeat_hears_what_is_done_through_the_other(
    tmp_path: Path, clock: Clock, postgres: Postgres
) -> None:
    name = postgres.new()
    async with AsyncExitStack() as stack:
        both = Pair(tmp_path / "data", clock, postgres.url(name))
        stack.push_async_callback(both.store.close)
        a = await stack.enter_async_context(both.running(heartbeat_s=15.0))
        b = await stack.enter_async_context(both.running(heartbeat_s=15.0))
        gpu = await stack.enter_async_context(a.gpu())
        job = await b.openai.fine_tuning.jobs.create(model=BASE, training_file=await b.upload())
        grant = await gpu.next_grant()
        beat = asyncio.create_task(gpu.beat(wire.HeldLease(job_id=job.id, fence=grant.fence)))
        await asyncio.sleep(0.2)
        assert not beat.done()
        await b.openai.fine_tuning.jobs.cancel(job.id)
        async with asyncio.timeout(5):
            assert [command.kind for command in (await beat).commands] == ["cancel"]
    postgres.drop(name)


async def test_what_has_to_be_told_outside_is_told_once_though_both_look_for_it(pair: Pair) -> None:
    async with pair.a.gpu() as gpu, Receiver().serving() as receiver:
        await pair.a.http.post(f"/api/gpus/{gpu.by.gpu_id}/drain")
        hook, _ = await create(pair.a, receiver.url)
        file = await pair.a.upload()
        for n in range(12):
            relay = (pair.a, pair.b)[n % 2]
            job = await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=file)
            await relay.openai.fine_tuning.jobs.cancel(job.id)

        async def all_told() -> bool:
            return all(row["delivered_at"] for row in await log_of(pair.b, hook))

        await until(all_told, 30)
        assert [row["attempts"] for row in await log_of(pair.a, hook)] == [1] * 12
        assert len({body for body, _ in receiver.got}) == len(receiver.got) == 12


async def test_what_others_send_a_gpu_counts_when_one_is_chosen(pair: Pair, clock: Clock) -> None:
    async with pair.a.gpu() as first, pair.a.gpu() as second:
        clock.advance(pair.a.settings.heartbeat_s + 0.01)
        await until_answered(pair.b)
        first.active_requests = 5
        for gpu in (first, second):
            await gpu.beat(wire.HeldLease(job_id="nobody's", fence=1))

        async def goes_to_the_second() -> bool:
            before = len(first.prompts), len(second.prompts)
            for _ in range(6):
                assert (await asked(pair.b)).status_code == 200
            return (len(first.prompts) - before[0], len(second.prompts) - before[1]) == (0, 6)

        await until(goes_to_the_second, 10)


async def test_what_a_user_used_through_both_is_one_sum(pair: Pair, clock: Clock) -> None:
    async with pair.a.gpu() as gpu:
        gpu.answer = telling
        clock.advance(pair.a.settings.heartbeat_s + 0.01)  # so long the other leaves a new gpu to itself
        await until_answered(pair.b)
        for relay in (pair.a, pair.b, pair.b):
            assert (await asked(relay)).status_code == 200
        await used(pair.a)  # which writes down what it has noted
        assert (await used(pair.b))["tokens"] == 10 * len(gpu.prompts)


async def test_two_that_start_at_once_in_an_empty_folder_have_one_key_and_one_token(
    tmp_path: Path, clock: Clock, postgres: Postgres
) -> None:
    name = postgres.new(empty=True)
    url, folder = postgres.url(name), tmp_path / "data"
    async with AsyncExitStack() as stack:
        start = [running_relay(folder, clock, database_url=url, admin_key=None, enrol_token=None) for _ in range(3)]
        started = await asyncio.gather(*(stack.enter_async_context(one) for one in start))
        key = (folder / "admin.key").read_text().strip()
        for relay in started:
            me = await relay.http.get("/api/me", headers={"authorization": f"Bearer {key}"})
            assert me.status_code == 200, me.text
            token = await relay.http.get("/api/enrol-token", headers={"authorization": f"Bearer {key}"})
            assert token.json()["token"] == (folder / "enrol.token").read_text().strip()
        store = Store(url)
        async with store.read() as db:
            assert [row.name for row in await db.execute(select(users))] == ["admin"]
        await store.close()
    postgres.drop(name)


async def test_a_folder_and_a_database_that_do_not_belong_together_touch_nothing(
    tmp_path: Path, clock: Clock, postgres: Postgres
) -> None:
    """Or the sweep would find that nothing names the blobs."""
    names = [postgres.new() for _ in range(2)]
    async with running_relay(tmp_path / "data", clock, database_url=postgres.url(names[0])) as relay:
        await relay.upload()
        stored = relay.stored()

    async def starts(name: str, folder: Path) -> None:
        store = Store(postgres.url(name) if name else f"sqlite+aiosqlite:///{folder / 'relay.db'}")
        try:
            await store.open()
            await check(store, FolderBlobs(folder / "blobs"), folder)
        finally:
            await store.close()

    for other in (names[1], ""):
        with pytest.raises(errors.WrongFolder, match="belongs to another database"):
            await starts(other, tmp_path / "data")
    (tmp_path / "empty" / "blobs").mkdir(parents=True)
    with pytest.raises(errors.WrongFolder, match="is it mounted"):
        await starts(names[0], tmp_path / "empty")
    (tmp_path / "data" / "database.id").unlink()
    with pytest.raises(errors.WrongFolder, match="of another relay"):
        await starts(names[1], tmp_path / "data")
    await starts(names[0], tmp_path / "data")  # as after a restore
    assert relay.stored() == stored
    for name in names:
        postgres.drop(name)


async def test_an_older_copy_of_sqlites_file_may_be_put_back(tmp_path: Path, clock: Clock) -> None:
    async with running_relay(tmp_path / "data", clock) as relay:
        await relay.upload()
        store = Store(relay.settings.database)
        async with store.write() as db:
            await db.execute(delete(folders))  # as it was before there were pairs
        await store.close()
        stored = relay.stored()
    async with running_relay(tmp_path / "data", clock) as relay:
        assert relay.stored() == stored


async def test_a_second_relay_on_sqlite_does_not_start_and_says_why(tmp_path: Path) -> None:
    first = RelayProcess(tmp_path / "data")
    await first.start()
    try:
        status, _, said = await run(tmp_path / "data", "-m", "relay", "serve")
        assert status == 2
        assert "PostgreSQL" in said
        assert len(said.splitlines()) == 1
    finally:
        await first.stop()
    again = RelayProcess(tmp_path / "data")
    await again.start()  # killed is not running
    await again.stop()


async def test_a_process_is_alone_on_sqlite_and_writes_no_row(tmp_path: Path, clock: Clock) -> None:
    async with running_relay(tmp_path / "data", clock) as relay:
        store = Store(relay.settings.database)
        async with store.read() as db:
            assert (await db.execute(select(relays))).all() == []
        await store.close()
