"""peft's adapters come in and go out over the API: what is whole is kept and counted, what is not leaves nothing."""

import io
import json
import stat
import zipfile
from typing import Any

import pytest
import safetensors.torch
import torch
from aiohttp import web

from relay.peft import CONFIG, WEIGHTS
from tests.relay.conftest import Relay
from tests.relay.double_gpu import BASE, DoubleGpu

H = 8
Q, NORM = "model.layers.0.self_attn.q_proj", "model.norm"
LAYERS = {
    "model": BASE,
    "family": "llama",
    "tied": True,
    "layers": [{"layer": 0, "tensors": [{"name": f"{Q}.weight", "shape": [H, H], "linear": True}]}],
    "outside": [
        {"name": "model.embed_tokens.weight", "shape": [30, H], "linear": False},
        {"name": f"{NORM}.weight", "shape": [H], "linear": False},
    ],
}
TOLD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}


def tensors() -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{Q}.lora_A.weight": torch.randn(2, H),
        f"base_model.model.{Q}.lora_B.weight": torch.randn(H, 2),
        f"base_model.model.{NORM}.weight": torch.randn(H),
    }


def zipped(files: dict[str, bytes] | None = None, told: dict[str, Any] | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (files or plain(told)).items():
            archive.writestr(name, content)
    return out.getvalue()


def plain(told: dict[str, Any] | None = None) -> dict[str, bytes]:
    return {
        f"out/{CONFIG}": json.dumps(TOLD | (told or {})).encode(),
        f"out/{WEIGHTS}": safetensors.torch.save(tensors()),
        "out/README.md": b"# A model card",
    }


@pytest.fixture
def gpu(gpu: DoubleGpu) -> DoubleGpu:
    async def layers(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response(LAYERS)

    gpu.layers = layers
    return gpu


async def send(relay: Relay, content: bytes, **fields: str) -> Any:
    form = {"model": BASE, "suffix": "captain", **fields}
    return await relay.http.post("/v1/models/import", data=form, files={"file": ("adapter.zip", content)})


async def test_an_imported_adapter_is_a_model_that_comes_out_as_it_went_in_and_can_be_deleted(
    relay: Relay, gpu: DoubleGpu
) -> None:
    files = plain()
    answer = await send(relay, zipped(files))
    assert answer.status_code == 200, answer.text
    model = answer.json()
    assert model["id"].startswith(f"ft:{BASE}:captain:")
    assert model["parent"] == BASE
    assert model["id"] in {m.id for m in (await relay.openai.models.list()).data}

    out = await relay.http.get(f"/v1/models/{model['id']}/export")
    assert (out.status_code, out.headers["content-type"]) == (200, "application/zip")
    with zipfile.ZipFile(io.BytesIO(out.content)) as archive:
        back = safetensors.torch.load(archive.read(WEIGHTS))
        told = json.loads(archive.read(CONFIG))
    expected = safetensors.torch.load(files[f"out/{WEIGHTS}"])
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in expected.items())
    assert (told["r"], told["lora_alpha"], told["target_modules"]) == (2, 4, [Q])
    assert told["modules_to_save"] == [NORM]

    await relay.openai.models.delete(model["id"])
    assert (await relay.http.get(f"/v1/models/{model['id']}/export")).status_code == 404
    assert await relay.http.get("/readyz")


async def refused(relay: Relay, content: bytes, said: str, status: int = 400, **fields: str) -> None:
    answer = await send(relay, content, **fields)
    assert (answer.status_code, said in answer.json()["error"]["message"]) == (status, True), answer.text
    assert relay.stored() == []


async def test_what_is_no_honest_zip_of_safetensors_and_json_is_refused_and_nothing_stays(
    relay: Relay, gpu: DoubleGpu
) -> None:
    await refused(relay, b"no zip at all", "is no zip")
    await refused(relay, zipped()[:-30], "is no zip")
    await refused(relay, zipped({CONFIG: b"{}"}), f"0 files {WEIGHTS}")
    await refused(relay, zipped(plain() | {"out/optimizer.pt": b"x"}), "can run code")
    await refused(relay, zipped(plain() | {"../../etc/passwd": b"x"}), "leads out of the zip")
    await refused(relay, zipped(plain() | {"/etc/passwd": b"x"}), "leads out of the zip")
    await refused(relay, zipped(plain() | {f"n/{i}": b"" for i in range(200)}), "more than 100 entries")
    await refused(relay, zipped(plain() | {f"out/{WEIGHTS}": b"\x80\x04pickle"}), "no safetensors file")
    await refused(relay, zipped(plain() | {f"out/{CONFIG}": b"[" * 99_999}), "is not JSON")
    await refused(relay, zipped(told={"peft_type": "PREFIX_TUNING"}), "only LORA")
    await refused(relay, zipped(told={"r": 3}), "has rank 2 and 2")
    await refused(relay, zipped(told={"modules_to_save": None}), "does not name it")
    await refused(relay, zipped(told={"alpha_pattern": {".*": float("inf")}}), "has inf")
    no_number = safetensors.torch.save(tensors() | {f"base_model.model.{NORM}.weight": torch.full((H,), torch.nan)})
    await refused(relay, zipped(plain() | {f"out/{WEIGHTS}": no_number}), f"{NORM}.weight has values that are no")
    damaged = bytearray(zipped())
    damaged[200] ^= 0xFF
    assert (await send(relay, bytes(damaged))).status_code == 400


async def test_a_link_in_a_zip_is_refused(relay: Relay, gpu: DoubleGpu) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        link = zipfile.ZipInfo("out/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        for name, content in plain().items():
            archive.writestr(name, content)
    await refused(relay, out.getvalue(), "is a link")


async def test_a_zip_that_grows_beyond_the_limit_is_stopped_whatever_it_says_of_itself(
    relay: Relay, gpu: DoubleGpu
) -> None:
    """The limit of uploads is 200,000 bytes here; 50 MB of zeros fit into 50 kB."""
    bomb = zipped(plain() | {f"out/{WEIGHTS}": bytes(50_000_000)})
    assert len(bomb) < 100_000
    await refused(relay, bomb, "larger than 200,000 bytes")
    entry = zipfile.ZipFile(io.BytesIO(bomb)).getinfo(f"out/{WEIGHTS}")
    lies = bomb.replace(entry.file_size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    answer = await send(relay, lies)
    assert answer.status_code == 400
    assert relay.stored() == []
    await refused(relay, bytes(300_000), "larger than 200,000 bytes", 413)


async def test_only_its_owner_exports_a_model_and_only_a_key_that_may_train_imports_one(
    relay: Relay, gpu: DoubleGpu
) -> None:
    model = (await send(relay, zipped())).json()["id"]
    made = await relay.http.post("/api/keys", json={"user": "else", "name": "x"})
    other = {"authorization": f"Bearer {made.json()['key']}"}
    assert (await relay.http.get(f"/v1/models/{model}/export", headers=other)).status_code == 404
    weak = await relay.http.post("/api/keys", json={"scopes": ["generate"]})
    headers = {"authorization": f"Bearer {weak.json()['key']}"}
    for answer in (
        await relay.http.get(f"/v1/models/{model}/export", headers=headers),
        await relay.http.post("/v1/models/import", headers=headers, files={"file": ("a.zip", zipped())}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")


async def test_an_import_counts_as_storage_and_a_file_does_too(start_relay: Any) -> None:
    relay = await start_relay(user_quota_bytes=2_500)
    async with relay.gpu() as gpu:
        gpu.layers = lambda request, body: _answer()
        assert (await send(relay, zipped())).status_code == 200
        answer = await send(relay, zipped(), suffix="again")
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "quota_exceeded")
        row = b'{"text": "' + b"a" * 2_000 + b'"}'
        sent = await relay.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", row)})
        assert (sent.status_code, sent.json()["error"]["code"]) == (413, "quota_exceeded")


async def _answer() -> web.StreamResponse:
    return web.json_response(LAYERS)


async def test_without_a_gpu_that_knows_the_model_an_import_says_so(relay: Relay) -> None:
    async with relay.gpu():
        pass
    relay.clock.advance(3600)
    answer = await send(relay, zipped())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_gpu")
    assert "compared with the tensors" in answer.json()["error"]["message"]
