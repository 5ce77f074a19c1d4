"""Canary strings go through everything that can go right or wrong, and no log, audit row, metric or stranger sees one.

Both services run at their most talkative level.
"""

import json
import secrets
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx2
import pytest

from tests.chaos.test_jobs import until_status
from tests.chaos.world import Gpu, Way, World
from tests.conftest import TINY
from tests.relay.conftest import CHAT_ROW, until

PAGE = {"x-imfine-page": "1"}


class Canaries:
    """Strings that occur nowhere else, by what they are."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def __call__(self, kind: str) -> str:
        return self.of.setdefault(kind, f"canary-{kind}-{secrets.token_hex(6)}")

    def found_in(self, text: str) -> list[str]:
        return [kind for kind, canary in self.of.items() if canary in text]


def chat(content: Any, **more: Any) -> dict[str, Any]:
    return {"model": TINY, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **more}


async def generate(http: httpx2.AsyncClient, canary: Canaries) -> None:
    """What is understood, and what is refused in every way that was thought of; on relay and gpu alike."""
    path, deep = "/v1/chat/completions", [canary("prompt")] * 3
    answer = await http.post(path, json=chat(canary("prompt"), ignore_eos=True))
    assert answer.status_code == 200, answer.text
    canary.of["answer"] = answer.json()["choices"][0]["message"]["content"].strip()
    async with http.stream("POST", path, json=chat(canary("prompt"), stream=True)) as response:
        async for _ in response.aiter_bytes():
            break  # and leaves
    for body in [
        chat(deep),
        chat(canary("prompt") * 2000),
        chat(canary("prompt"), model=canary("model")),
        chat(canary("prompt"), dials=canary("dials")),
        chat(canary("prompt"), stop=[canary("stop")] * 9),
        chat(canary("prompt"), logit_bias={canary("bias"): 1}),
        chat(canary("prompt"), temperature=canary("temperature")),
        chat(canary("prompt"), **{canary("field"): canary("value")}),
        {"model": TINY, "messages": canary("prompt")},
        {"model": TINY, "messages": [{"role": canary("role"), "content": canary("prompt")}]},
        [canary("prompt")],
    ]:
        refused = await http.post(path, json=body)
        assert 400 <= refused.status_code < 500, refused.text
    for raw in (f'{{"model": "{TINY}", "messages": {canary("broken")}', f"\xff{canary('broken')}".encode("latin-1")):
        assert (await http.post(path, content=raw)).status_code == 400
    layers = {"model": TINY, "layers": {"match": f"({canary('match')}", "parts": [canary("parts")]}}
    assert (await http.post("/v1/layers/preview", json=layers)).status_code == 400
    for method, target in [
        ("GET", f"/v1/models/{canary('path')}/layers?q={canary('query')}"),
        ("GET", f"/{canary('path')}"),
    ]:
        headers = {
            "user-agent": canary("agent"),
            "cookie": f"imfine_session={canary('cookie')}",
            "referer": canary("agent"),
        }
        assert (await http.request(method, target, headers=headers)).status_code == 404
    wrong = {"authorization": f"Bearer sk-fine-{canary('wrong-key')}"}
    assert (await http.post(path, json=chat(canary("prompt")), headers=wrong)).status_code == 401


async def sign_in_and_enrol(http: httpx2.AsyncClient, canary: Canaries) -> None:
    password = canary("password")
    assert (await http.put("/api/me/password", json={"password": password})).status_code == 200
    for body in [
        {"name": "admin", "password": password},
        {"name": "admin", "password": canary("wrong-password")},
        {"name": canary("name"), "password": password},
        {"name": password, "password": "in the wrong field"},
        {"key": canary("wrong-key")},
        {"key": [canary("wrong-key")]},
        {canary("field"): canary("wrong-key")},
    ]:
        response = await http.post("/api/session", json=body, headers=PAGE)
        for cookie in response.cookies.values():
            canary.of["session"] = cookie
    http.cookies.clear()
    token = (await http.post("/api/enrol-tokens", json={"name": canary("token-name")})).json()["token"]
    canary.of["enrol-token"] = token
    for given in (token, canary("wrong-token")):
        headers = {"authorization": f"Bearer {given}"}
        assert (await http.post("/gpu/enrol", json={canary("field"): given}, headers=headers)).status_code in (400, 401)
    signed = {"x-imfine-gpu": canary("gpu"), "x-imfine-epoch": "1", "x-imfine-signature": canary("signature")}
    assert (await http.post("/gpu/heartbeat", content=canary("broken"), headers=signed)).status_code == 401
    url = f"https://example.com/{canary('hook-path')}?secret={canary('hook-query')}"
    made = await http.post("/v1/webhook_endpoints", json={"url": url, "name": canary("hook-name")})
    canary.of["webhook-secret"] = made.json()["signing_secret"]
    refused = await http.post("/v1/webhook_endpoints", json={"url": f"http://{canary('hook-path')}", "name": 7})
    assert refused.status_code == 400


async def train(world: World, canary: Canaries) -> list[str]:
    """Ids of a file and of jobs, one of which ends well and the others not."""
    rows = CHAT_ROW.replace("How are you?", canary("row-question")).replace("Fine.", canary("row-answer")) * 4
    broken = rows + '{"messages": [{"role": "user", "content": "' + canary("row-broken") + "\n"
    ids: list[str] = []
    for content in (broken, canary("row-broken"), rows):
        files = {"file": (f"{canary('file-name')}.jsonl", content.encode())}
        uploaded = await world.http.post("/v1/files", data={"purpose": "fine-tune"}, files=files)
        if uploaded.status_code == 200:
            ids = [uploaded.json()["id"]]
    asked: dict[str, Any] = {"model": TINY, "training_file": ids[0], "suffix": canary("suffix")[:60]}
    refused = await world.http.post("/v1/fine_tuning/jobs", json={**asked, "seed": canary("seed")})
    assert refused.status_code == 400
    for match, status in ((None, "succeeded"), (canary("match"), "failed")):
        layers = {"method": "lora", "parts": ["attn"], "rank": 2} | ({"match": match} if match else {})
        started = await world.http.post("/v1/fine_tuning/jobs", json={**asked, "layers": layers})
        if started.status_code == 400:  # a gpu was asked, and refused it at once
            continue
        await until_status(world, started.json()["id"], status)
        ids.append(started.json()["id"])
    sha256 = world.rows("select sha256 from files where id = ?", ids[0])[0]["sha256"]
    world.blob(sha256).write_bytes(canary("row-broken").encode() * 20)  # what the gpu fetches is damaged
    again = await world.http.post("/v1/fine_tuning/jobs", json={**asked, "seed": 5})
    if again.status_code == 200:
        ids.append(again.json()["id"])
    return ids


async def break_the_database(world: World, canary: Canaries) -> None:
    """So that the relay has faults of its own, with tracebacks."""

    def execute(statement: str) -> None:
        with closing(sqlite3.connect(world.folder / "relay/relay.db", timeout=20)) as db:
            db.execute(statement)

    execute("ALTER TABLE files RENAME TO files_away")
    execute("ALTER TABLE models RENAME TO models_away")
    try:
        files = {"file": (f"{canary('file-name')}.jsonl", CHAT_ROW.replace("Fine.", canary("row-answer")).encode())}
        failed = await world.http.post("/v1/files", data={"purpose": "fine-tune"}, files=files)
        assert failed.status_code == 500, failed.text
        failed = await world.http.post("/v1/chat/completions", json=chat(canary("prompt"), model=canary("model")))
        assert failed.status_code == 500, failed.text
        assert "Traceback" in world.relay.log or "traceback" in world.relay.log
        assert not canary.found_in(failed.text)
    finally:
        execute("ALTER TABLE models_away RENAME TO models")
        execute("ALTER TABLE files_away RENAME TO files")


@pytest.mark.long
async def test_no_canary_is_in_a_log_an_audit_row_a_metric_or_a_strangers_error(
    start_world: Callable[..., Any], way: Way
) -> None:
    canary = Canaries()
    world: World = await start_world(RELAY_LOG_LEVEL="debug", RELAY_METRICS_TOKEN=canary("metrics-token"))
    gpu: Gpu = await world.gpu("first", way, GPU_LOG_LEVEL="debug", GPU_KEY=f"sk-gpu-{canary('gpu-key')}")
    await world.until_reachable("first")
    canary.of |= {"admin-key": world.relay.secret("admin.key"), "fixed-token": world.relay.secret("enrol.token")}
    bearer = {"authorization": f"Bearer sk-gpu-{canary('gpu-key')}"}
    async with httpx2.AsyncClient(base_url=gpu.url, headers=bearer, timeout=60, trust_env=False) as direct:
        await generate(world.http, canary)
        await generate(direct, canary)
        await sign_in_and_enrol(world.http, canary)
        ids = await train(world, canary)
        made = (await world.http.post("/api/keys", json={"user": "bob", "name": canary("key-name")})).json()["key"]
        canary.of["bobs-key"] = made
        canary.of["signing-key"] = world.rows("select signing_key from gpus")[0]["signing_key"]
        strangers: list[str] = []
        async with httpx2.AsyncClient(base_url=world.relay.url, headers={"authorization": f"Bearer {made}"}) as bob:
            for path in [*(f"/v1/files/{i}" for i in ids), *(f"/v1/fine_tuning/jobs/{i}/events" for i in ids)]:
                strangers.append((await bob.get(path)).text)
            for path in (
                "/v1/models",
                "/v1/files",
                "/v1/fine_tuning/jobs",
                "/v1/webhook_endpoints",
                "/api/gpus",
                "/api/usage",
            ):
                strangers.append((await bob.get(path)).text)
            strangers.append((await bob.post("/v1/chat/completions", json=chat("hello", model="no-such-model"))).text)
        await break_the_database(world, canary)
        metrics = [(await world.http.get("/metrics")).text, (await direct.get("/metrics")).text]
    audit = json.dumps(world.rows("select * from audit"))
    await gpu.stop()

    async def logged() -> bool:
        return "said goodbye" in world.relay.log

    await until(logged, 30)
    assert '"level": "error"' in world.relay.log
    seen = {
        "the relay's log": world.relay.log,
        "the gpu's log": gpu.log(),
        "the audit log": audit,
        "the relay's metrics": metrics[0],
        "the gpu's metrics": metrics[1],
        "a stranger's answers": "\n".join(strangers).replace(canary("key-name"), ""),  # bob's own
    }
    found = {where: kinds for where, text in seen.items() if (kinds := canary.found_in(text))}
    assert not found, {
        where: [line for line in seen[where].splitlines() if canary.found_in(line)][:3] for where in found
    }
    stored = b"".join((world.folder / "relay" / name).read_bytes() for name in ("relay.db", "relay.db-wal"))
    kept = [
        kind
        for kind in ("prompt", "answer", "password", "bobs-key", "enrol-token")
        if canary.of[kind].encode() in stored
    ]
    assert not kept, "prompts, answers, passwords, keys and tokens are not kept"
