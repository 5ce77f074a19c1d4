"""The layer spec on Stable Diffusion: blocks, parts, components, and what training a selection would keep."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel

from gpu_service import layers, sd, trainable
from gpu_service.errors import BadRequest, NoSuchLayer, UnsupportedModel
from gpu_service.layers import Selection, TensorInfo
from gpu_service.sd import PictureSource
from gpu_service.sd_tensors import sd_tensors
from tests.conftest import ROOT
from tests.gpu_service.test_costs import CLOSE, Kept
from wire import LayerSpec

DEMO = ROOT / "demo/diffusion/model"
# As stable-diffusion-v1-5 is configured, by its public config.json.
SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
BLOCKS15 = ("down.0", "down.1", "down.2", "down.3", "mid", "up.0", "up.1", "up.2", "up.3")


@pytest.fixture(scope="module")
def source() -> PictureSource:
    return sd.open_folder("demo-diffusion", DEMO, None)


@pytest.fixture(scope="module")
def sd15() -> list[TensorInfo]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    return sd_tensors({"unet": _shapes(unet), "text_encoder": {}, "vae": {}}, BLOCKS15)


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def chosen(tensors: Any, *specs: dict[str, Any]) -> Selection:
    return layers.select(tensors, [LayerSpec.model_validate({"method": "full", **s}) for s in specs], tied=False)


def names(tensors: Any, *specs: dict[str, Any]) -> list[str]:
    return [t.name for t in chosen(tensors, *specs).full]


def test_all_of_a_model_is_counted_and_every_tensor_has_a_part(source: PictureSource) -> None:
    assert len(source.tensors) == 326 + 36 + 184
    assert chosen(source.tensors, {"parts": ["norm"]}).total_tensors == 546
    stored = 0
    for file in DEMO.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored += len(opened.keys())
    assert stored == 546


def test_a_stable_diffusion_1_5_has_its_686_tensors_in_the_unet(sd15: list[TensorInfo]) -> None:
    assert len(sd15) == 686
    assert sum(t.n_params for t in sd15) == 859_520_964
    assert len(names(sd15, {"parts": ["attn"], "match": "to_"})) == 16 * 2 * 5
    lora = chosen(sd15, {"method": "lora", "parts": ["attn.self", "attn.cross"], "rank": 4})
    assert lora.n_tensors == 128
    assert lora.n_trainable == 797_184  # as diffusers' own recipe counts it for to_q, to_k, to_v and to_out.0


def test_blocks_are_taken_by_name_and_range(sd15: list[TensorInfo]) -> None:
    def blocks(text: str) -> set[str | None]:
        return {t.block for t in chosen(sd15, {"parts": ["conv", "attn"], "layers": text}).full}

    assert blocks("mid") == {"mid"}
    assert blocks("up.1-3") == {"up.1", "up.2", "up.3"}
    assert blocks("down, mid") == {"down.0", "down.1", "down.2", "down.3", "mid"}
    assert blocks("last:2") == {"up.2", "up.3"}
    assert blocks("first:1") == {"down.0"}
    assert blocks("all") == {*BLOCKS15, None}


def test_parts_are_told_apart(sd15: list[TensorInfo]) -> None:
    at = "unet.mid_block.attentions.0.transformer_blocks.0"
    mid = {"layers": "mid"}
    own = [f"{at}.attn1.to_{x}" for x in ("k.weight", "out.0.bias", "out.0.weight", "q.weight", "v.weight")]
    assert names(sd15, {"parts": ["attn.self"], **mid}) == own
    assert names(sd15, {"parts": ["attn.cross.k"], **mid}) == [f"{at}.attn2.to_k.weight"]
    assert names(sd15, {"parts": ["mlp"], **mid, "match": "weight"}) == [
        f"{at}.ff.net.0.proj.weight",
        f"{at}.ff.net.2.weight",
    ]
    assert all(".resnets." in n for n in names(sd15, {"parts": ["conv"], **mid}))
    times = names(sd15, {"parts": ["time"], **mid})
    assert times
    assert all("time_emb_proj" in n for n in times)
    assert any("unet.time_embedding." in n for n in names(sd15, {"parts": ["time"]}))
    assert chosen(sd15, {"parts": ["time.embed"], "layers": "up.3"}).lowest_layer == 0
    assert chosen(sd15, {"parts": ["attn.cross"], "layers": "mid,up.1-3"}).lowest_layer == 4
    assert chosen(sd15, {"parts": ["conv.out"], "layers": "mid"}).lowest_layer == len(BLOCKS15)


def test_the_text_encoder_is_a_component_with_numbered_layers(source: PictureSource) -> None:
    found = chosen(source.tensors, {"component": "text_encoder", "parts": ["attn", "mlp"], "layers": "last:1"})
    assert {t.layer for t in found.full} == {1}
    assert all(t.name.startswith("text_encoder.encoder.layers.1.") for t in found.full)
    assert found.lowest_layer == 0  # the whole UNet reads what it puts out
    both = chosen(source.tensors, {"parts": ["attn.cross"]}, {"component": "text_encoder", "parts": ["embed"]})
    assert {t.component for t in both.full} == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"layers": "up.7"}, "blocks down.0, down.1, down.2, mid, up.0, up.1, up.2"),
        ({"layers": "3"}, "'3' is no block of this model"),
        ({"layers": "side"}, "'side' is no block"),
        ({"parts": ["head"]}, "no part 'head'"),
        ({"parts": ["attn.x"]}, "attn.cross.k"),
        ({"component": "vae"}, "use unet or text_encoder"),
        ({"component": "text_encoder", "layers": "mid"}, "'mid' is no number of a layer"),
        ({"method": "lora", "parts": ["conv"]}, "'conv' has none"),
    ],
)
def test_what_a_model_lacks_is_refused_and_what_exists_is_named(
    source: PictureSource, spec: dict[str, Any], says: str
) -> None:
    with pytest.raises((NoSuchLayer, BadRequest)) as refused:
        chosen(source.tensors, {"parts": ["attn"], **spec})
    assert says in refused.value.message


def test_a_foreign_tensor_is_refused_by_name() -> None:
    shapes = {"unet": {"down_blocks.0.motion.weight": (4, 4)}, "text_encoder": {}, "vae": {}}
    with pytest.raises(UnsupportedModel, match=r"unet has a tensor 'down_blocks\.0\.motion\.weight'"):
        sd_tensors(shapes, ("down.0", "mid", "up.0"))


def test_names_of_old_checkpoints_are_read(source: PictureSource) -> None:
    encoder = {"text_model.final_layer_norm.weight": (96,), "text_model.embeddings.position_ids": (1, 77)}
    (only,) = sd_tensors({"unet": {}, "text_encoder": encoder, "vae": {}}, ())
    assert only.name == "text_encoder.final_layer_norm.weight"
    assert only.name in {t.name for t in source.tensors}


@pytest.mark.parametrize(
    "spec",
    [
        {"parts": ["attn.self", "attn.cross"]},
        {"parts": ["attn", "mlp", "norm", "conv", "time"]},
        {"parts": ["attn.cross"], "layers": "up.1-2"},
        {"parts": ["mlp"], "layers": "mid"},
        {"component": "text_encoder", "parts": ["attn", "mlp"]},
        {"component": "text_encoder", "parts": ["mlp"], "layers": "last:1"},
    ],
)
def test_what_is_kept_for_the_backward_pass_is_what_was_said(source: PictureSource, spec: dict[str, Any]) -> None:
    selection = chosen(source.tensors, spec)
    unet = UNet2DConditionModel.from_pretrained(source.folder / "unet")
    encoder = CLIPTextModel.from_pretrained(source.folder / "text_encoder", dtype=torch.float32)
    wanted = {t.name for t in selection.full}
    for component, network in (("unet", unet), ("text_encoder", encoder)):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(f"{component}.{name}" in wanted)
    side = source.native // source.factor
    known = [*unet.parameters(), *unet.buffers(), *encoder.parameters(), *encoder.buffers()]
    with Kept(known) as kept:
        seen = encoder(torch.ones((2, 77), dtype=torch.long))[0]
        out = unet(torch.randn(2, 4, side, side), 5, encoder_hidden_states=seen, return_dict=False)[0]
    assert out.requires_grad
    cost = source.cost(selection, 2, 4)
    assert cost.activations_bytes == pytest.approx(kept.n_bytes, rel=CLOSE)
    assert cost.weights_bytes == source.weights_bytes("none", 4)
    assert cost.gradients_bytes == 4 * sum(map(prod, trainable.shapes(selection).values()))


def test_a_description_is_of_one_component(source: PictureSource) -> None:
    told = layers.describe(source.tensors)
    assert (told["component"], told["components"]) == ("unet", ["unet", "text_encoder"])
    assert [layer["block"] for layer in told["layers"]] == list(source.blocks)
    assert sum(len(layer["tensors"]) for layer in told["layers"]) + len(told["outside"]) == 326
    text = layers.describe(source.tensors, "text_encoder")
    assert text["n_layers"] == 2
    assert sum(len(layer["tensors"]) for layer in text["layers"]) + len(text["outside"]) == 36
    with pytest.raises(NoSuchLayer, match="text model is one network"):
        layers.describe([TensorInfo("model.norm.weight", (4,), "norm.final", None, False)], "unet")


def test_the_files_that_ship_are_those_that_are_described(source: PictureSource) -> None:
    assert source.weights_bytes("none", 2) == pytest.approx(_bytes(DEMO), rel=0.02)


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
