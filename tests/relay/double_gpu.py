"""A gpu that keeps the protocol, and breaks it where a test asks: a real HTTP server, real signatures, no model.

What it answers to a generation is `answer`, which a test replaces.
"""

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from aiohttp import web

import wire

BASE = "lab/tiny-llama"
BASE_OF_PICTURES = "lab/tiny-sd"
FRAMES = [f'data: {{"choices":[{{"index":0,"delta":{{"content":"{word}"}}}}]}}\n\n' for word in ("I'm", " fine", ".")]
DONE = "data: [DONE]\n\n"

Answer = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]


async def say_fine(request: web.Request, body: bytes) -> web.StreamResponse:
    """What a healthy gpu does."""
    if not json.loads(body).get("stream"):
        message = {"role": "assistant", "content": "I'm fine."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response(
            {"id": "c-1", "object": "chat.completion", "created": 1, "model": BASE, "choices": [choice]}
        )
    response = await start_stream(request)
    for frame in (*FRAMES, DONE):
        await response.write(frame.encode())
    return response


async def start_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    return response


def cut(request: web.Request) -> None:
    """The connection is gone, without a goodbye."""
    assert request.transport
    request.transport.abort()


class DoubleGpu:
    def __init__(self, relay_url: str, enrol_token: str, now: Callable[[], float], models: Sequence[str]) -> None:
        self.answer: Answer = say_fine
        self.layers: Answer = say_layers
        self.loaded = True
        self.draining = False
        self.proves = True  # whether it can answer the challenge
        self.prompts: list[bytes] = []  # bodies of generations, as they came
        self.headers: list[dict[str, str]] = []
        self.left = asyncio.Event()  # a caller went away before the answer was complete
        self.instance = secrets.token_hex(16)
        self.url: str | None = None
        self.active_requests = 0
        self.reply: wire.EnrolReply | None = None
        self._enrol_token, self._now, self._models = enrol_token, now, models
        self._seen = wire.SeenNonces()
        self.http = httpx2.AsyncClient(base_url=relay_url, timeout=20, trust_env=False, verify=False)

    # --- towards the relay ---

    @property
    def by(self) -> wire.SignedBy:
        assert self.reply
        return wire.SignedBy(gpu_id=self.reply.gpu_id, epoch=self.reply.epoch)

    def offered(self) -> list[wire.OfferedModel]:
        return [
            wire.OfferedModel(id=m, family=_family(m), n_layers=4, context_tokens=128, loaded=self.loaded)
            for m in self._models
        ]

    def enrol_request(self, leases: Sequence[wire.HeldLease] = (), url: str | None = None) -> wire.EnrolRequest:
        return wire.EnrolRequest(
            instance=self.instance,
            process=secrets.token_hex(8),
            name="double",
            url=url or self.url,
            tunnel="none",
            device=wire.Device(
                kind="cpu", name="test", memory_bytes=1, free_bytes=1, precision="float32", precision_why="a test"
            ),
            families=sorted({_family(m) for m in self._models}),
            models=self.offered(),
            leases=list(leases),
        )

    async def enrol(self, leases: Sequence[wire.HeldLease] = (), url: str | None = None) -> httpx2.Response:
        response = await self.http.post(
            "/gpu/enrol",
            content=self.enrol_request(leases, url).model_dump_json(),
            headers={"authorization": f"Bearer {self._enrol_token}"},
        )
        if response.status_code == 200:
            self.reply = wire.EnrolReply.model_validate_json(response.content)
        return response

    def sign(self, method: str, target: str, body: bytes = b"", sha256: str | None = None) -> dict[str, str]:
        assert self.reply
        digest = sha256 or wire.body_sha256(body)
        return wire.sign(self.reply.signing_key, self.by, method, target, digest, self._now())

    async def call(self, method: str, target: str, message: wire.Message | bytes = b"") -> httpx2.Response:
        body = message if isinstance(message, bytes) else message.model_dump_json().encode()
        return await self.http.request(method, target, content=body, headers=self.sign(method, target, body))

    async def beat(self, *leases: wire.HeldLease) -> wire.HeartbeatReply:
        beat = wire.Heartbeat(
            free_bytes=1,
            models=self.offered(),
            leases=list(leases),
            active_requests=self.active_requests,
            draining=self.draining,
        )
        response = (await self.call("POST", "/gpu/heartbeat", beat)).raise_for_status()
        return wire.HeartbeatReply.model_validate_json(response.content)

    async def until_reachable(self) -> None:
        """Held heartbeats answer late, so this asks with leases that are nobody's: their cancel comes at once."""
        async with asyncio.timeout(10):
            while not (await self.beat(wire.HeldLease(job_id="nobody's", fence=1))).reachable:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def next_grant(self, *leases: wire.HeldLease) -> wire.GrantLease:
        async with asyncio.timeout(10):
            while True:
                for command in (await self.beat(*leases)).commands:
                    if isinstance(command, wire.GrantLease):
                        return command

    async def next_batch(self, *leases: wire.HeldLease) -> wire.GrantBatch:
        async with asyncio.timeout(10):
            while True:
                for command in (await self.beat(*leases)).commands:
                    if isinstance(command, wire.GrantBatch):
                        return command

    async def answer_rows(self, grant: wire.GrantBatch, *rows: int, fence: int = 0, **more: Any) -> httpx2.Response:
        """A part with an answer to each of these, stored and told."""
        lines = [answer_to(row, **more).model_dump_json().encode() + b"\n" for row in rows]
        return await self.send_part(grant, b"".join(lines), fence)

    async def send_part(self, grant: wire.GrantBatch, part: bytes, fence: int = 0) -> httpx2.Response:
        job, sha256, fence = f"/gpu/jobs/{grant.job.job_id}", hashlib.sha256(part).hexdigest(), fence or grant.fence
        stored = await self.call("PUT", f"{job}/chunks/{sha256}?fence={fence}", part)
        if stored.status_code != 200:
            return stored
        return await self.call("POST", f"{job}/parts", wire.PartStored(fence=fence, sha256=sha256, bytes=len(part)))

    async def report(self, grant: wire.GrantLease | wire.GrantBatch, *events: wire.JobEvent) -> httpx2.Response:
        batch = wire.JobEvents(fence=grant.fence, events=list(events))
        return await self.call("POST", f"/gpu/jobs/{grant.job.job_id}/events", batch)

    async def upload(self, grant: wire.GrantLease, blob: bytes) -> httpx2.Response:
        return await self.call("PUT", self.blob_target(grant, hashlib.sha256(blob).hexdigest()), blob)

    def blob_target(self, grant: wire.GrantLease, sha256: str) -> str:
        return f"/gpu/jobs/{grant.job.job_id}/blobs/{sha256}?fence={grant.fence}"

    async def finish(self, grant: wire.GrantLease | wire.GrantBatch, result: wire.JobResult) -> httpx2.Response:
        return await self.call("POST", f"/gpu/jobs/{grant.job.job_id}/finish", result)

    async def succeed(self, grant: wire.GrantLease, blob: bytes = b"the trained tensors") -> httpx2.Response:
        """Upload a result and finish."""
        assert (await self.upload(grant, blob)).status_code == 200
        return await self.finish(grant, result_of(grant, blob))

    # --- towards callers ---

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["DoubleGpu"]:
        app = web.Application()
        app.router.add_post("/challenge", self._challenge)
        app.router.add_route("*", "/v1/layers/preview", self._layers)
        app.router.add_post("/v1/data/report", self._layers)
        app.router.add_get("/v1/models/{model:.+}/layers", self._layers)
        app.router.add_route("*", "/v1/{path:.+}", self._generate)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await self.http.aclose()
            await runner.cleanup()

    async def _verified(self, request: web.Request) -> bytes:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        assert self.reply
        assert wire.SignedBy.claimed(headers) == self.by
        key, target = self.reply.signing_key, request.raw_path
        assert wire.body_sha256(body) == wire.verify(
            key, self.by, request.method, target, headers, self._now(), self._seen
        )
        self.headers.append(headers)
        return body

    async def _challenge(self, request: web.Request) -> web.StreamResponse:
        asked = wire.Challenge.model_validate_json(await self._verified(request))
        assert self.reply
        key = self.reply.signing_key if self.proves else secrets.token_hex(32)
        return web.json_response({"proof": wire.challenge_proof(key, asked.nonce, self.by)})

    async def _layers(self, request: web.Request) -> web.StreamResponse:
        return await self.layers(request, await self._verified(request))

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await self._verified(request)
        self.prompts.append(body)
        try:
            return await self.answer(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise


def _family(model: str) -> wire.Family:
    return "sd" if model == BASE_OF_PICTURES else "llama"


async def say_layers(request: web.Request, body: bytes) -> web.StreamResponse:
    return web.json_response({"path": request.raw_path, "asked": json.loads(body) if body else None})


def result_of(grant: wire.GrantLease, blob: bytes) -> wire.JobResult:
    ref = wire.FileRef(name="adapter.safetensors", sha256=hashlib.sha256(blob).hexdigest(), bytes=len(blob))
    chosen = wire.Hyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=1.0)
    return wire.JobResult(
        fence=grant.fence,
        adapter=wire.AdapterManifest(base_model=grant.job.base_model, base_revision="r1", files=[ref]),
        trained_tokens=123,
        hyperparameters=chosen,
    )


def answer_to(row: int, status_code: int = 200, completion_tokens: int = 3) -> wire.RowAnswer:
    """As a gpu gives it; of 400 it has an error."""
    usage = {"prompt_tokens": 7, "completion_tokens": completion_tokens, "prompt_tokens_details": {"cached_tokens": 2}}
    good = {"object": "chat.completion", "choices": [{"message": {"content": f"Fine, {row}."}}], "usage": usage}
    body = good if status_code == 200 else wire.error_body("too long", type="invalid_request_error")
    return wire.RowAnswer(row=row, status_code=status_code, request_id=f"req-{row}", body=body)


def held(grant: wire.GrantLease | wire.GrantBatch) -> wire.HeldLease:
    return wire.HeldLease(job_id=grant.job.job_id, fence=grant.fence)


def failed(grant: wire.GrantLease | wire.GrantBatch, *, retry: bool) -> wire.JobResult:
    error = wire.JobError(message="out of memory", code="out_of_memory", retry=retry)
    return wire.JobResult(fence=grant.fence, error=error)
