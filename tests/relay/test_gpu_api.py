"""Who may speak as a gpu, and what becomes of what it sends."""

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

import wire
from relay.errors import BadGpuUrl
from relay.gpus import check_url
from relay.settings import Settings
from tests.relay.conftest import Relay
from tests.relay.double_gpu import DoubleGpu, held
from tests.relay.test_jobs import create

ON_BOTH_DATABASES = {  # the others are about HTTP
    "test_enrolling_again_is_the_same_gpu_and_ends_the_old_epoch",
    "test_a_number_that_no_column_holds_is_refused",
    "test_a_fence_that_no_column_holds_is_refused",
    "test_a_blob_is_asked_for_before_it_is_sent",
    "test_another_gpu_can_not_write_to_a_job",
}
BEAT = wire.Heartbeat(free_bytes=1, models=[], leases=[], active_requests=0).model_dump_json().encode()


def code_of(response: httpx2.Response) -> Any:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic enrol-token-of-the-tests", "Bearer", "Bearer 열쇠"])
async def test_nobody_enrols_without_the_token(relay: Relay, header: str | None) -> None:
    headers = {b"authorization": header.encode()} if header else {}
    async with httpx2.AsyncClient(trust_env=False, verify=False) as http:
        response = await http.post(f"{relay.url}/gpu/enrol", content=b"not even JSON", headers=headers)
    assert code_of(response) == (401, "invalid_enrol_token")


async def test_an_older_protocol_is_refused_and_says_so(relay: Relay, gpu: DoubleGpu) -> None:
    body = gpu.enrol_request().model_copy(update={"protocol": 99})
    headers = {"authorization": f"Bearer {relay.settings.enrol_token}"}
    response = await gpu.http.post("/gpu/enrol", content=body.model_dump_json(), headers=headers)
    assert response.status_code == 400
    assert "update" in response.json()["error"]["message"]


async def test_an_unknown_field_is_refused_by_name(relay: Relay, gpu: DoubleGpu) -> None:
    headers = {"authorization": f"Bearer {relay.settings.enrol_token}"}
    body = gpu.enrol_request().model_dump()
    response = await gpu.http.post("/gpu/enrol", json={**body, "colour": "red"}, headers=headers)
    assert response.status_code == 400
    assert "colour" in response.json()["error"]["message"]


async def test_enrolling_again_is_the_same_gpu_and_ends_the_old_epoch(relay: Relay, gpu: DoubleGpu) -> None:
    old = gpu.sign("POST", "/gpu/heartbeat", BEAT)
    first = gpu.by
    await gpu.enrol()
    assert (gpu.by.gpu_id, gpu.by.epoch) == (first.gpu_id, first.epoch + 1)
    response = await gpu.http.post("/gpu/heartbeat", content=BEAT, headers=old)
    assert code_of(response) == (401, "unknown_gpu")


async def test_a_replayed_request_is_refused(relay: Relay, gpu: DoubleGpu) -> None:
    headers = gpu.sign("POST", "/gpu/heartbeat", BEAT)
    answers = [await gpu.http.post("/gpu/heartbeat", content=BEAT, headers=headers) for _ in range(2)]
    assert answers[0].status_code == 200
    assert code_of(answers[1]) == (401, "bad_signature")


async def test_altered_stale_and_misdirected_requests_are_refused(relay: Relay, gpu: DoubleGpu) -> None:
    target = "/gpu/heartbeat"
    altered = await gpu.http.post(target, content=BEAT.replace(b"1", b"2"), headers=gpu.sign("POST", target, BEAT))
    elsewhere = await gpu.http.post(target, content=BEAT, headers=gpu.sign("POST", "/gpu/enrol", BEAT))
    query = await gpu.http.post(target + "?fence=2", content=BEAT, headers=gpu.sign("POST", target, BEAT))
    method = await gpu.http.post(target, content=BEAT, headers=gpu.sign("PUT", target, BEAT))
    other_epoch = await gpu.http.post(
        target, content=BEAT, headers=gpu.sign("POST", target, BEAT) | {wire.HEADER_EPOCH: "9"}
    )
    stale_headers = gpu.sign("POST", target, BEAT)
    relay.clock.advance(wire.SIGNATURE_WINDOW_S + 1)
    stale = await gpu.http.post(target, content=BEAT, headers=stale_headers)
    unsigned = await gpu.http.post(target, content=BEAT)
    refused = [code_of(r) for r in (altered, elsewhere, query, method, stale, unsigned)]
    assert refused == [(401, "bad_signature")] * 6
    assert code_of(other_epoch) == (401, "unknown_gpu")


@pytest.mark.parametrize("epoch", ["99999999999999999999", str(2**31), "-1", "one"])
async def test_an_epoch_that_can_not_be_is_no_signature(relay: Relay, gpu: DoubleGpu, epoch: str) -> None:
    headers = gpu.sign("POST", "/gpu/heartbeat", BEAT) | {wire.HEADER_EPOCH: epoch}
    assert code_of(await gpu.http.post("/gpu/heartbeat", content=BEAT, headers=headers)) == (401, "bad_signature")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/gpu/heartbeat", {"free_bytes": 2**64, "models": [], "leases": [], "active_requests": 0}),
        ("/gpu/heartbeat", {"free_bytes": 1, "models": [], "leases": [], "active_requests": 2**64}),
        (
            "/gpu/heartbeat",
            {"free_bytes": 1, "models": [], "active_requests": 0, "leases": [{"job_id": "j", "fence": 2**64}]},
        ),
        ("/gpu/jobs/j/events", {"fence": 2**64, "events": []}),
        ("/gpu/jobs/j/events", {"fence": 1, "events": [{"seq": 2**64, "at": 1, "message": "m"}]}),
        ("/gpu/jobs/j/finish", {"fence": 1, "trained_tokens": 2**64}),
    ],
)
async def test_a_number_that_no_column_holds_is_refused(
    relay: Relay, gpu: DoubleGpu, target: str, message: dict[str, Any]
) -> None:
    assert code_of(await gpu.call("POST", target, json.dumps(message).encode())) == (400, "invalid_value")


async def test_a_fence_that_no_column_holds_is_refused(relay: Relay, gpu: DoubleGpu) -> None:
    sha256 = hashlib.sha256(b"x").hexdigest()
    for method, body in (("HEAD", b""), ("PUT", b"x")):
        response = await gpu.call(method, f"/gpu/jobs/j/blobs/{sha256}?fence={2**64}", body)
        assert response.status_code == 400


async def test_a_signature_is_checked_before_the_body_is_parsed(relay: Relay, gpu: DoubleGpu) -> None:
    response = await gpu.http.post("/gpu/heartbeat", content=b"{{{")
    assert code_of(response) == (401, "bad_signature")
    signed = await gpu.call("POST", "/gpu/heartbeat", b"{{{")
    assert code_of(signed) == (400, "not_json")


async def test_a_blob_is_asked_for_before_it_is_sent(relay: Relay, gpu: DoubleGpu) -> None:
    await create(relay)
    grant = await gpu.next_grant()
    target = gpu.blob_target(grant, hashlib.sha256(b"weights").hexdigest())
    assert (await gpu.call("HEAD", target)).status_code == 404
    assert (await gpu.upload(grant, b"weights")).status_code == 200
    found = await gpu.call("HEAD", target)
    assert (found.status_code, found.headers["content-length"]) == (200, "7")
    assert (await gpu.upload(grant, b"weights")).status_code == 200


async def test_a_damaged_or_misnamed_blob_leaves_nothing(relay: Relay, gpu: DoubleGpu) -> None:
    await create(relay)
    grant = await gpu.next_grant()
    before = relay.stored()
    sha256 = hashlib.sha256(b"weights").hexdigest()
    target = gpu.blob_target(grant, sha256)
    damaged = await gpu.http.put(target, content=b"weightz", headers=gpu.sign("PUT", target, sha256=sha256))
    assert code_of(damaged) == (400, "blob_damaged")
    misnamed = await gpu.http.put(target, content=b"others", headers=gpu.sign("PUT", target, b"others"))
    assert code_of(misnamed) == (401, "bad_signature")
    outside = await gpu.call("PUT", f"/gpu/jobs/{grant.job.job_id}/blobs/..%2F..%2Fadmin.key?fence=1", b"x")
    assert outside.status_code in (400, 404)
    assert relay.stored() == before


async def test_a_blob_over_the_limit_is_413(start_relay: Any) -> None:
    relay = await start_relay(max_adapter_bytes=10)
    async with relay.gpu() as gpu:
        await create(relay)
        grant = await gpu.next_grant()
        assert (await gpu.upload(grant, b"x" * 11)).status_code == 413
        assert len(relay.stored()) == 1  # the training file


async def test_another_gpu_can_not_write_to_a_job(relay: Relay, gpu: DoubleGpu) -> None:
    await create(relay)
    grant = await gpu.next_grant()
    async with relay.gpu() as other:
        assert (await other.report(grant)).status_code == 409
        assert (await other.upload(grant, b"x")).status_code == 409
        assert (await other.call("HEAD", gpu.blob_target(grant, "0" * 64))).status_code == 409
        cancel = wire.CancelLease(job_id=grant.job.job_id, fence=grant.fence)
        assert (await other.beat(held(grant))).commands == [cancel]


async def test_a_result_is_either_a_model_or_an_error(relay: Relay, gpu: DoubleGpu) -> None:
    await create(relay)
    grant = await gpu.next_grant()
    assert (await gpu.finish(grant, wire.JobResult(fence=grant.fence))).status_code == 400


async def test_what_a_gpu_asks_for_and_is_not_there_is_404(relay: Relay, gpu: DoubleGpu) -> None:
    assert code_of(await gpu.call("GET", f"/gpu/blobs/{'0' * 64}")) == (404, "not_found")
    assert code_of(await gpu.call("GET", "/gpu/models/ft:nobody:x:y")) == (404, "model_not_found")
    assert (await gpu.call("GET", "/gpu/blobs/nonsense")).status_code == 400


@pytest.mark.parametrize(
    "url",
    [
        "http://name.ngrok-free.app",
        "https://evil.example",
        "https://ngrok-free.app.evil.example",
        "https://name.ngrok-free.app:8443",
        "https://name.ngrok-free.app/path",
        "https://name.ngrok-free.app?x",
        "https://user@name.ngrok-free.app",
        "https://169.254.169.254",
        "https://10.0.0.1",
        "http://127.0.0.1:8001",
        "http://localhost",
        "http://[::1]:80",
        "https://[",
        "https://name.ngrok-free.app:port",
        "file:///etc/passwd",
        "https://evil.example#.ngrok-free.app",
        "https://evil.example\\.ngrok-free.app",
        "https://ev il.ngrok-free.app",
        "",
    ],
)
def test_a_url_that_is_no_known_tunnel_is_refused(url: str) -> None:
    with pytest.raises(BadGpuUrl, match="url: "):
        check_url(url, Settings())


def test_a_url_of_a_known_tunnel_is_taken_and_loopback_only_when_allowed() -> None:
    assert check_url("https://Name.ngrok-free.app/", Settings()) == "https://name.ngrok-free.app"
    assert check_url("https://a-b-c.trycloudflare.com", Settings()) == "https://a-b-c.trycloudflare.com"
    loopback = Settings(allow_loopback_gpus=True)
    assert check_url("http://127.0.0.1:8001", loopback) == "http://127.0.0.1:8001"
    assert check_url("http://[::1]:8001/", loopback) == "http://[::1]:8001"
    with pytest.raises(BadGpuUrl):
        check_url("http://10.0.0.1:8001", loopback)


async def test_a_gpu_with_a_bad_url_is_told_so(relay: Relay) -> None:
    async with relay.gpu(enrol=False) as gpu:
        response = await gpu.enrol(url="https://evil.example")
        assert code_of(response) == (400, "bad_gpu_url")
        assert "RELAY_GPU_HOST_SUFFIXES" in response.json()["error"]["message"]


async def test_the_openapi_document_names_every_route(relay: Relay, tmp_path: Path) -> None:
    paths = json.loads((await relay.http.get("/openapi.json")).text)["paths"]
    assert {"/v1/chat/completions", "/v1/files", "/v1/fine_tuning/jobs", "/gpu/enrol", "/healthz"} <= paths.keys()
