"""Webhooks: told at least once, signed, to nobody inside; a real receiver, and the official client to check it."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from relay import errors
from relay.outbox import AGAIN_AFTER_S, CLAIM_S
from relay.webhooks import checked
from tests.relay.conftest import CHAT_ROW, Clock, Relay, running_relay, until
from tests.relay.double_gpu import BASE, DoubleGpu, failed
from tests.relay.processes import RelayProcess

ON_BOTH_DATABASES = {  # the others are about HTTP
    "test_each_end_of_a_job_is_told_once_and_the_official_client_takes_the_signature",
    "test_a_webhook_is_its_owners_alone_and_its_secret_is_shown_once",
    "test_a_delivery_goes_to_no_address_inside_whatever_its_name_led_to_before",
}
Answer = Callable[[], Awaitable[web.Response]]
HOOKS = "/v1/webhook_endpoints"
EVENTS: Any = [f"fine_tuning.job.{how}" for how in ("succeeded", "failed", "cancelled", "paused")]
PATIENCE_S = 60.0


async def fine() -> web.Response:
    return web.Response(status=204)


class Receiver:
    """Somebody else's server."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str]]] = []
        self.answer: Answer = fine
        self.url = ""

    async def _take(self, request: web.Request) -> web.Response:
        self.got.append(((await request.read()).decode(), dict(request.headers)))
        return await self.answer()

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator["Receiver"]:
        app = web.Application()
        app.router.add_post("/hooks", self._take)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hooks"
        try:
            yield self
        finally:
            await runner.cleanup()

    def read(self, client: openai.AsyncOpenAI, secret: str, at: int = -1) -> Any:
        """Raises InvalidWebhookSignatureError."""
        body, headers = self.got[at]
        return client.webhooks.unwrap(body, headers, secret=secret)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver().serving() as receiver:
        yield receiver


async def create(relay: Relay, url: str) -> tuple[str, str]:
    made = await relay.openai.webhooks.create(name="mine", url=url, event_types=EVENTS)
    return made.id, made.signing_secret


async def new_job(relay: Relay) -> str:
    return (await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())).id


async def log_of(relay: Relay, hook: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await relay.http.get(f"{HOOKS}/{hook}/deliveries")).raise_for_status().json()["data"]
    return found


async def test_each_end_of_a_job_is_told_once_and_the_official_client_takes_the_signature(
    relay: Relay, gpu: DoubleGpu, receiver: Receiver
) -> None:
    hook, secret = await create(relay, receiver.url)
    told: list[tuple[str, str]] = []

    async def end(job_id: str, how: str) -> None:
        told.append((f"fine_tuning.job.{how}", job_id))
        await until(lambda: len(receiver.got) == len(told), PATIENCE_S)
        event = receiver.read(relay.openai, secret)
        assert (event.type, event.data.id) == told[-1]

    job = await new_job(relay)
    await gpu.succeed(await gpu.next_grant())
    await end(job, "succeeded")
    job = await new_job(relay)
    await gpu.finish(grant := await gpu.next_grant(), failed(grant, retry=False))
    await end(job, "failed")
    async with relay.gpu(enrol=False):
        await relay.http.post(f"/api/gpus/{gpu.by.gpu_id}/drain")
        job = await new_job(relay)
        await relay.http.post(f"/v1/fine_tuning/jobs/{job}/pause")
        await end(job, "paused")
        await relay.http.post(f"/v1/fine_tuning/jobs/{job}/cancel")
        await end(job, "cancelled")

    async def all_delivered() -> bool:
        return {line["state"] for line in await log_of(relay, hook)} == {"delivered"}

    await until(all_delivered, PATIENCE_S)
    log = await log_of(relay, hook)
    assert [(line["event_type"], line["job_id"]) for line in reversed(log)] == told
    assert {(line["state"], line["attempts"], line["last_status"]) for line in log} == {("delivered", 1, 204)}
    assert len({headers["webhook-id"] for _, headers in receiver.got}) == 4
    with pytest.raises(openai.InvalidWebhookSignatureError):
        receiver.read(relay.openai, "whsec_" + "A" * 43 + "=")


async def test_what_is_not_received_is_sent_again_more_and_more_seldom_and_then_given_up(
    relay: Relay, gpu: DoubleGpu, receiver: Receiver, clock: Clock
) -> None:
    hook, _ = await create(relay, receiver.url)
    answers = iter((500, 302, *[404] * 20))

    async def refuse() -> web.Response:
        return web.Response(status=next(answers), headers={"location": receiver.url})

    receiver.answer = refuse
    await relay.http.post(f"/v1/fine_tuning/jobs/{await new_job(relay)}/cancel")

    async def tried(n: int) -> bool:
        log = await log_of(relay, hook)
        return len(receiver.got) == n == int(log[0]["attempts"]) and log[0]["next_at"] != int(clock() + CLAIM_S)

    for n, wait_s in enumerate((*AGAIN_AFTER_S, None), 1):
        await until(lambda n=n: tried(n), PATIENCE_S)  # type: ignore[misc]
        line = (await log_of(relay, hook))[0]
        if wait_s is None:
            assert (line["state"], line["next_at"]) == ("given_up", None)
        else:
            assert line["state"] == "waiting"
            assert line["next_at"] == pytest.approx(clock() + wait_s, abs=2)
            if n == 2:
                assert line["last_error"] == "redirects are not followed"
            clock.advance(wait_s + CLAIM_S)
    assert len(receiver.got) == len(AGAIN_AFTER_S) + 1
    assert len({headers["webhook-id"] for _, headers in receiver.got}) == 1
    assert len({headers["webhook-timestamp"] for _, headers in receiver.got}) > 5  # of the sending, for replays


async def test_a_webhook_is_its_owners_alone_and_its_secret_is_shown_once(relay: Relay, gpu: DoubleGpu) -> None:
    hook, secret = await create(relay, "https://example.com/hooks?token=mine")
    other = relay.client((await relay.http.post("/api/keys", json={"user": "bob"})).json()["key"])
    assert [h.id async for h in relay.openai.webhooks.list()] == [hook]
    assert secret not in (await relay.http.get(HOOKS)).text
    assert [h.id async for h in other.webhooks.list()] == []
    for call in (other.webhooks.retrieve, other.webhooks.delete):
        with pytest.raises(openai.NotFoundError):
            await call(hook)
    with pytest.raises(openai.NotFoundError):
        await other.get(f"{HOOKS.removeprefix('/v1')}/{hook}/deliveries", cast_to=object)
    audit = (await relay.http.get("/api/audit")).json()["data"]
    assert ("webhook.create", hook) in {(line["action"], line["target"]) for line in audit}
    assert "token=mine" not in str(audit)
    limited = (await relay.http.post("/api/keys", json={"expires_in_s": 60})).json()["key"]
    with pytest.raises(openai.PermissionDeniedError):
        async with relay.client(limited) as client:
            await client.webhooks.create(name="", url="https://example.com", event_types=EVENTS)
    for _ in range(9):
        await create(relay, "https://example.com/")
    with pytest.raises(openai.RateLimitError):
        await create(relay, "https://example.com/")
    assert (await relay.openai.webhooks.delete(hook)).deleted
    await other.close()


@pytest.mark.parametrize(
    "url",
    ["http://example.com/", "https://example.com:8443/", "https://u:p@example.com/", "https://example.com/#x", "https://[::1]/",
     "https://127.0.0.1/", "https://169.254.169.254/latest", "https://10.0.0.1/", "https://localhost/", "https://2130706433/",
     "https://0x7f.1/", "https://[::ffff:10.0.0.1]/", "ftp://example.com/", "https://example.com\\@10.0.0.1/", "https:///x",
     "https://exa mple.com/", "https://metadata/", "https://[64:ff9b::a00:1]/"],
)  # fmt: skip
def test_a_url_that_leads_inside_is_refused(url: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        checked(url, allow_loopback=False)
    assert checked("https://example.com/a?b=c", allow_loopback=False) == "https://example.com/a?b=c"


async def test_a_delivery_goes_to_no_address_inside_whatever_its_name_led_to_before(
    tmp_path: Path, clock: Clock, database: str, receiver: Receiver
) -> None:
    async with running_relay(tmp_path, clock, database_url=database) as relay, relay.gpu():
        hook, _ = await create(relay, receiver.url)
        await relay.http.post(f"/api/gpus/{(await relay.http.get('/api/gpus')).json()['data'][0]['id']}/drain")
        job = await new_job(relay)
    async with running_relay(tmp_path, clock, database_url=database, allow_loopback_gpus=False) as relay:
        await relay.http.post(f"/v1/fine_tuning/jobs/{job}/cancel")

        async def tried() -> bool:
            return bool([line for line in await log_of(relay, hook) if line["last_error"]])

        await until(tried, PATIENCE_S)
        assert (await log_of(relay, hook))[0]["last_error"] == "no public address"
    assert receiver.got == []


@pytest.mark.long
async def test_an_event_outlives_a_relay_that_is_killed_before_and_during_its_delivery(tmp_path: Path) -> None:
    relay, receiver = RelayProcess(tmp_path), Receiver()
    async with receiver.serving():
        port = int(receiver.url.split(":")[2].partition("/")[0])
    await relay.start()
    gpu = DoubleGpu(relay.url, relay.secret("enrol.token"), time.time, [BASE])
    client = openai.AsyncOpenAI(base_url=f"{relay.url}/v1", api_key=relay.secret("admin.key"))
    try:
        async with gpu.serving():
            await gpu.enrol()
            await gpu.until_reachable()
        secret = (await client.webhooks.create(name="", url=receiver.url, event_types=EVENTS)).signing_secret
        file = await client.files.create(file=("rows.jsonl", CHAT_ROW.encode() * 3), purpose="fine-tune")
        job = await client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
        await client.fine_tuning.jobs.cancel(job.id)
        await relay.stop()  # SIGKILL; nobody has listened at the receiver's port so far
        assert receiver.got == []

        async def kill() -> web.Response:
            await relay.stop()  # it has sent the event, and never hears that it was received
            return await fine()

        receiver.answer = kill
        async with receiver.serving(port):
            await relay.start()
            await until(lambda: relay.process.returncode is not None, PATIENCE_S)
            receiver.answer = fine
            n = len(receiver.got)
            await relay.start()
            await until(lambda: len(receiver.got) > n, PATIENCE_S)
            await asyncio.sleep(0)
        assert len({headers["webhook-id"] for _, headers in receiver.got}) == 1, "one event, told at least once"
        assert receiver.read(client, secret).data.id == job.id
    finally:
        await relay.stop()
        await client.close()
