"""What /openapi.json says is true: schemathesis asks every route of real processes, and finds no fault and no surprise.

As the admin, as a plain user and as nobody; a fixed seed, few examples a route. Names of models, files and jobs are
those that exist, or next to nothing would get past 404. https://schemathesis.readthedocs.io/
"""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from relay.sessions import PAGE_HEADER
from tests.chaos.test_jobs import start_job, until_step
from tests.chaos.world import World
from tests.conftest import ROOT, TINY
from tests.gpu_service import tiny_sd
from tests.relay.conftest import CHAT_ROW

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
OPTIONS = ["--checks", CHECKS, "--seed", "4", "--generation-database", "none"]
QUIET = ["--request-timeout", "60", "--warnings", "off", "--no-color", "--max-failures", "10"]
CONFIG = '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 502, 503, 507]\n'  # which are told of
EXAMPLES = 6
RIGHT, WRONG, MADE_UP = "examples", "coverage", "fuzzing"  # its phases; in the second each way to be wrong, in turn
MOST_S = 900.0
MODELS = [TINY, tiny_sd.NAME]
HOOKS = "tests.chaos.signed_calls"
BEAT = "^/gpu/heartbeat"
OF_A_LEASE = "^/gpu/(?!enrol|goodbye|heartbeat)"  # goodbye would end it
SIGNED = "^/gpu/(?!enrol)|^/challenge"  # without a signature each is 401 in the same way

Names = Mapping[str, list[str]]
Bodies = Mapping[str, list[dict[str, Any]]]

ROW = json.loads(CHAT_ROW)
CHAT = {"model": TINY, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
COMPLETION = {"model": TINY, "prompt": "Hello", "max_tokens": 2}
PICTURE = {"model": tiny_sd.NAME, "prompt": "a heart", "steps": 2}
# What ought to be answered with 200, by route: what is made up alone seldom is.
ON_BOTH: Bodies = {
    "/v1/chat/completions": [CHAT, {**CHAT, "stream": True}],
    "/v1/completions": [COMPLETION, {**COMPLETION, "stream": True}],
    "/v1/images/generations": [PICTURE, {**PICTURE, "stream": True}],
    "/v1/layers/preview": [{"model": TINY, "layers": [{"layers": "1"}]}],
}
ON_GPU: Bodies = {**ON_BOTH, "/v1/data/report": [{"model": TINY, "rows": [{"line": 1, "row": ROW}]}]}
ON_RELAY: Bodies = {
    **ON_BOTH,
    "/api/datasets": [{"name": "rows", "rows": [ROW]}],
    "/api/datasets/{dataset_id}/rows": [{"rows": [ROW]}],
    "/api/generations": [{"kind": "chat", "body": CHAT}],
    "/v1/webhook_endpoints": [{"url": "http://127.0.0.1:9/"}],
}


def exemplified(described: dict[str, Any], bodies: Bodies) -> dict[str, Any]:
    """With these bodies as examples."""
    for path, values in bodies.items():
        content = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        content["examples"] = {str(number): {"value": value} for number, value in enumerate(values)}
    return described


def answered(log: str) -> set[str]:
    """The routes of POST requests that succeeded."""
    lines = [json.loads(line) for line in log.splitlines() if '"method": "POST"' in line and '"status": 200' in line]
    return {line["route"] for line in lines}


def narrowed(found: Any, names: Names) -> Any:
    """Parameters and fields of these names take what exists, or something that does not."""
    if isinstance(found, list):
        return [narrowed(part, names) for part in found]
    if not isinstance(found, dict):
        return found
    if found.get("in") in ("path", "query") and found["name"] in names:
        return {**found, "schema": {"enum": names[found["name"]]}}
    made = {key: narrowed(part, names) for key, part in found.items()}
    if isinstance(fields := made.get("properties"), dict):
        made["properties"] = {key: {"enum": names[key]} if key in names else part for key, part in fields.items()}
    return made


@pytest.fixture
def models(tiny_dir: Path, tmp_path: Path) -> str:
    """One that writes and one that draws."""
    return f"{TINY}={tiny_dir},{tiny_sd.NAME}={tiny_sd.make(tmp_path / tiny_sd.NAME)}"


async def ask(
    url: str,
    folder: Path,
    key: str | None,
    names: Names,
    phases: str,
    *more: str,
    bodies: Bodies | None = None,
    examples: int = EXAMPLES,
    signed_as: Mapping[str, Any] | None = None,
) -> None:
    async with httpx2.AsyncClient(trust_env=False, timeout=60) as http:
        described = (await http.get(f"{url}/openapi.json")).json()
    await asyncio.to_thread(folder.mkdir)
    await asyncio.to_thread((folder / "schemathesis.toml").write_text, CONFIG)
    asked = exemplified(narrowed(described, names), bodies or {})
    await asyncio.to_thread((folder / "openapi.json").write_text, json.dumps(asked))
    headers = ["--header", f"{PAGE_HEADER}: 1", *(["--header", f"Authorization: Bearer {key}"] if key else [])]
    arguments = [
        "run",
        "openapi.json",
        "--url",
        url,
        *headers,
        *OPTIONS,
        *QUIET,
        "--phases",
        phases,
        "--max-examples",
        str(examples),
        *more,
    ]
    env = dict(os.environ)
    if signed_as:
        env |= {"SCHEMATHESIS_HOOKS": HOOKS, "SIGNED_AS": json.dumps(signed_as), "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", *arguments), cwd=folder, env=env, stdout=PIPE, stderr=STDOUT
    )
    async with asyncio.timeout(MOST_S):
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()[-12_000:]
    assert " 0 passed" not in out.decode()


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_the_relays_openapi_is_true_for_the_admin_a_user_and_nobody(
    world: World, tmp_path: Path, models: str
) -> None:
    await world.gpu("first", GPU_MODELS=models)
    await world.until_reachable("first")
    url = world.relay.url
    bob = (await world.http.post("/api/keys", json={"user": "bob"})).json()["key"]
    for who, key in (("admin", world.relay.secret("admin.key")), ("bob", bob)):
        async with world.client(key) as client:
            file = await client.files.create(file=("rows.jsonl", CHAT_ROW.encode() * 3), purpose="fine-tune")
            job = await client.fine_tuning.jobs.create(model=TINY, training_file=file.id)
        names = {"model": MODELS, "model_id": [*MODELS, "none"], "job_id": [job.id, "none"], "training_file": [file.id]}
        names |= {"dataset_id": [file.id], "file_id": [file.id, "none"]}  # no gpu_id, or it would be drained
        unless = f"{SIGNED}|^/api/me" if who == "bob" else SIGNED  # or he would delete himself
        await ask(url, tmp_path / f"{who}-right", key, names, RIGHT, bodies=ON_RELAY)
        phases = MADE_UP if who == "bob" else f"{WRONG},{MADE_UP}"
        await ask(url, tmp_path / who, key, names, phases, "--exclude-path-regex", unless)
    await ask(url, tmp_path / "nobody", None, {}, MADE_UP, examples=1)
    assert (await world.http.get("/readyz")).status_code == 200
    assert '"level": "error"' not in world.relay.log
    assert answered(world.relay.log) >= ON_RELAY.keys()
    assert '"level": "error"' not in world.gpus["first"].log()


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_the_routes_for_gpus_stand_a_gpu_that_signs_nonsense(world: World, tmp_path: Path) -> None:
    """It died, and somebody has its key, a job of its own and that job's fence."""
    gpu = await world.gpu("first")
    await world.until_reachable("first")
    job_id = await start_job(world, n_epochs=50)
    await until_step(world, job_id, 1)
    await gpu.kill()
    query = "select g.id as gpu_id, g.epoch, g.signing_key as key, j.fence from gpus g join jobs j on j.gpu_id = g.id"
    (me,) = world.rows(query)
    names = {"job_id": [job_id, "none"], "fence": [me.pop("fence")], "model_id": [TINY, "none"]}
    of_a_lease, beat = (("--include-path-regex", these) for these in (OF_A_LEASE, BEAT))
    await ask(world.relay.url, tmp_path / "lease", None, names, f"{WRONG},{MADE_UP}", *of_a_lease, signed_as=me)
    # Its answer repeats what it says, and so must not be narrowed; it is held back for a second each time.
    await ask(world.relay.url, tmp_path / "beat", None, {}, MADE_UP, *beat, signed_as=me)
    assert (await world.http.get("/readyz")).status_code == 200
    assert '"level": "error"' not in world.relay.log
    assert {"/gpu/heartbeat", "/gpu/jobs/{job_id}/events"} <= answered(world.relay.log), "signatures and fence are good"


@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_a_gpus_openapi_is_true_with_its_key_and_without(world: World, tmp_path: Path, models: str) -> None:
    key = "sk-gpu-of-the-schema-test"
    gpu = await world.gpu("first", GPU_KEY=key, GPU_MODELS=models)
    await world.until_reachable("first")
    names = {"model": [*MODELS, "none"]}
    await ask(gpu.url, tmp_path / "right", key, {}, RIGHT, bodies=ON_GPU)
    await ask(gpu.url, tmp_path / "key", key, names, f"{WRONG},{MADE_UP}", "--exclude-path-regex", SIGNED)
    await ask(gpu.url, tmp_path / "nobody", None, names, MADE_UP, examples=1)
    assert '"level": "error"' not in gpu.log()
    assert answered(gpu.log()) >= ON_GPU.keys()
