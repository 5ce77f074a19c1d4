"""LoRA files of pictures come in and go out over the API, by the routes of peft's adapters."""

import io
import json
import struct
import zipfile
from collections.abc import AsyncIterator
from typing import Any

import pytest
import safetensors.torch
import torch
from aiohttp import web
from torch import Tensor

from relay.sd_lora import METADATA
from tests.relay.conftest import Relay
from tests.relay.double_gpu import BASE_OF_PICTURES as BASE
from tests.relay.double_gpu import DoubleGpu

H = 8
QUERY, MLP = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "encoder.layers.0.mlp.fc1"
PROJECTION = "mid_block.attentions.0.proj_in"
KOHYA = f"lora_unet_{QUERY.replace('.', '_')}"


def told(component: str) -> dict[str, Any]:
    """As a gpu describes one network of a Stable Diffusion."""
    tensors = {
        "unet": [
            {"name": f"unet.{QUERY}.weight", "shape": [H, H], "linear": True},
            {"name": f"unet.{PROJECTION}.weight", "shape": [H, H, 1, 1], "linear": False},
        ],
        "text_encoder": [{"name": f"text_encoder.{MLP}.weight", "shape": [H, H], "linear": True}],
    }
    layers = [{"layer": 0, "block": "mid", "tensors": tensors[component]}]
    components = {"component": component, "components": list(tensors)}
    return {"model": BASE, "family": "sd", "tied": False, **components, "layers": layers, "outside": []}


@pytest.fixture
async def gpu(relay: Relay) -> AsyncIterator[DoubleGpu]:
    async def layers(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.json_response(told(request.query.get("component", "unet")))

    async with relay.gpu(BASE) as gpu:
        gpu.layers = layers
        yield gpu


def tensors() -> dict[str, Tensor]:
    """By the names that diffusers takes with every version of transformers."""
    return {
        f"unet.{QUERY}.lora_A.weight": torch.randn(2, H),
        f"unet.{QUERY}.lora_B.weight": torch.randn(H, 2),
        f"text_encoder.text_model.{MLP}.lora_A.weight": torch.randn(3, H),
        f"text_encoder.text_model.{MLP}.lora_B.weight": torch.randn(H, 3),
    }


def saved(tensors: dict[str, Tensor], **alphas: float) -> bytes:
    ranks = {"unet": 2, "text_encoder": 3}
    fields = {f"{network}.lora_alpha": alpha for network, alpha in alphas.items()}
    fields |= {f"{network}.r": ranks[network] for network in alphas}
    return bytes(safetensors.torch.save(tensors, {METADATA: json.dumps(fields)}))


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


async def send(relay: Relay, content: bytes, **fields: str) -> Any:
    form = {"model": BASE, "suffix": "heart", **fields}
    return await relay.http.post("/v1/models/import", data=form, files={"file": ("heart.safetensors", content)})


async def taken(relay: Relay, content: bytes) -> str:
    answer = await send(relay, content)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


async def export(relay: Relay, model: str, form: str = "") -> Any:
    return await relay.http.get(f"/v1/models/{model}/export{form and f'?format={form}'}")


async def test_a_file_of_diffusers_is_a_model_that_comes_out_as_it_went_in(relay: Relay, gpu: DoubleGpu) -> None:
    sent = tensors()
    model = await taken(relay, saved(sent, unet=6, text_encoder=1.5))
    assert model.startswith(f"ft:{BASE}:heart:")
    out = await export(relay, model)
    assert (out.status_code, out.headers["content-type"]) == (200, "application/octet-stream")
    assert out.headers["content-disposition"].endswith(".safetensors")
    back = safetensors.torch.load(out.content)
    assert back.keys() == sent.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in sent.items())
    again = await taken(relay, out.content)
    assert (await export(relay, again)).content == out.content


async def test_the_same_model_goes_out_for_other_programs_and_comes_back_from_them(
    relay: Relay, gpu: DoubleGpu
) -> None:
    sent = tensors()
    model = await taken(relay, saved(sent, unet=6, text_encoder=1.5))
    out = await export(relay, model, "kohya")
    stored = safetensors.torch.load(out.content)
    assert torch.equal(stored[f"{KOHYA}.lora_down.weight"], sent[f"unet.{QUERY}.lora_A.weight"])
    assert stored[f"{KOHYA}.alpha"] == 6
    assert stored[f"lora_te_text_model_{MLP.replace('.', '_')}.alpha"] == 1.5
    back = safetensors.torch.load((await export(relay, await taken(relay, out.content))).content)
    assert torch.equal(back[f"unet.{QUERY}.lora_B.weight"], sent[f"unet.{QUERY}.lora_B.weight"])


async def test_a_zip_that_holds_one_is_read_too(relay: Relay, gpu: DoubleGpu) -> None:
    content = saved(tensors(), unet=6, text_encoder=1.5)
    whole = zipped({"lora/pytorch_lora_weights.safetensors": content, "lora/README.md": b"# A card"})
    plain, packed = await taken(relay, content), await taken(relay, whole)
    assert (await export(relay, plain)).content == (await export(relay, packed)).content


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
async def test_half_precision_stays_what_it_was(relay: Relay, gpu: DoubleGpu, dtype: torch.dtype) -> None:
    sent = {key: tensor.to(dtype) for key, tensor in tensors().items()}
    model = await taken(relay, saved(sent, unet=2))
    back = safetensors.torch.load((await export(relay, model)).content)
    assert all(back[key].dtype == dtype and torch.equal(back[key], tensor) for key, tensor in sent.items())
    kohya = safetensors.torch.load((await export(relay, model, "kohya")).content)
    assert {tensor.dtype for key, tensor in kohya.items() if key.endswith(".alpha")} == {torch.float32}


async def refused(relay: Relay, content: bytes, said: str) -> None:
    answer = await send(relay, content)
    assert (answer.status_code, said in answer.json()["error"]["message"]) == (400, True), answer.text
    assert answer.json()["error"]["code"] == "cannot_import"
    assert relay.stored() == []


def raw(header: object, data: bytes = b"", told_bytes: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if told_bytes is None else told_bytes) + text + data


def place(start: int, end: int, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


async def test_what_is_no_honest_file_is_refused_and_nothing_stays(relay: Relay, gpu: DoubleGpu) -> None:
    good = saved(tensors(), unet=2)
    pickled = b"\x80\x02}q\x00X\x04\x00\x00\x00unet"
    await refused(relay, b"", "no safetensors file")
    await refused(relay, pickled, "no safetensors file")
    await refused(relay, good[:-4], "its header names")
    await refused(relay, good + b"more", "its header names")
    await refused(relay, raw({}, told_bytes=2**62), "no header")
    await refused(relay, raw(b"[" * 99_999), "its header is malformed")
    await refused(relay, raw({"a": place(0, 16), "b": place(8, 24)}, bytes(24)), "overlap")
    await refused(relay, raw({"a": place(0, 16), "b": place(20, 36)}, bytes(36)), "leave gaps")
    await refused(relay, raw({"a": place(0, 16, [2**39, 2**39])}, bytes(16)), "not the bytes of its shape")
    await refused(relay, raw({"a": place(0, 16, [-4])}, bytes(16)), "is malformed")
    await refused(relay, raw({"a": place(0, 16, [16], "I8")}, bytes(16)), "is of type I8")
    await refused(relay, raw({"a": place(0, 32, [4], "I64")}, bytes(32)), "is of type I64")
    await refused(relay, raw({"a": place(0, 16, [4], ["F32"])}, bytes(16)), "malformed")
    await refused(relay, raw({"__metadata__": 5, "a": place(0, 16)}, bytes(16)), "its header is malformed")
    await refused(relay, zipped({"a/data.pkl": pickled, "a/data/0": b"1"}), "can run code")
    await refused(relay, zipped({"a.txt": b"x"}), "0 safetensors files")
    await refused(relay, zipped({"a.safetensors": good, "b.safetensors": good}), "2 safetensors files")
    await refused(relay, zipped({"../a.safetensors": good}), "leads out of")
    await refused(relay, zipped({"a.safetensors": bytes(50_000_000)}), "larger than 200,000 bytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
async def test_what_is_no_number_is_refused_by_name(
    relay: Relay, gpu: DoubleGpu, dtype: torch.dtype, value: float
) -> None:
    sent = {key: tensor.to(dtype) for key, tensor in tensors().items()}
    sent[f"unet.{QUERY}.lora_B.weight"][-1, -1] = value
    await refused(relay, saved(sent, unet=2), f"unet.{QUERY}.lora_B.weight has values that are no finite numbers")
    sent[f"unet.{QUERY}.lora_B.weight"][-1, -1] = torch.finfo(dtype).max
    await taken(relay, saved(sent, unet=2))
