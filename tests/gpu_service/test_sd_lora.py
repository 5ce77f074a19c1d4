"""LoRA files of Stable Diffusion, held against diffusers: what it loads of ours, and what it saved for us."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

import wire
from adapter import DESCRIPTION, WEIGHTS, AdapterMeta, Description, LoraMeta
from gpu_service import artifacts, layers, sd
from gpu_service.artifacts import Adapter
from gpu_service.device import Device
from gpu_service.image import Pictures, Request, Wanted
from gpu_service.layers import TensorInfo
from gpu_service.lora import Lora
from gpu_service.sd import PictureBase, PictureSource
from gpu_service.tuned import Tuned
from relay import sd_lora, tensor_file
from relay.adapters import base_tensors
from relay.errors import InvalidRequest
from relay.peft import CannotExport
from relay.peft_import import BaseTensors, CannotImport
from relay.tensor_file import TensorFile
from tests.gpu_service import tiny_sd
from tests.gpu_service.tiny_sd import NAME, SIDE

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
FORMS: tuple[sd_lora.Format, ...] = ("diffusers", "kohya")
CLOSE = 2e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd.make(tmp_path_factory.mktemp("models") / NAME)


@pytest.fixture(scope="module")
def source(folder: Path) -> PictureSource:
    return sd.open_folder(NAME, folder, None)


@pytest.fixture(scope="module")
def base(source: PictureSource, cpu: Device) -> PictureBase:
    return sd.load(source, cpu)


@pytest.fixture(scope="module")
def told(source: PictureSource) -> BaseTensors:
    """As the relay hears it."""
    answers = []
    for component in (None, "text_encoder"):
        more = {"family": "sd", "tied": False}
        answers.append(json.loads(json.dumps({**more, **layers.describe(source.tensors, component)})))
    return base_tensors(answers)


def linear(source: PictureSource) -> Iterator[TensorInfo]:
    """Matrices of all kinds, in both networks, and one that stands as a convolution."""
    wanted = {("unet", p) for p in ("attn.self.q", "attn.cross.o", "attn.proj", "mlp.up", "mlp.down", "time.resnet")}
    wanted |= {("text_encoder", p) for p in ("attn.q", "attn.o", "mlp.up")}
    for tensor in source.tensors:
        if (tensor.component, tensor.part) in wanted and tensor.linear:
            yield tensor


def random_adapter(source: PictureSource, *, full: bool = False, mixed: bool = True) -> Adapter:
    """`mixed`: ranks and alphas differ."""
    torch.manual_seed(3)
    lora, metas = {}, {}
    for number, tensor in enumerate(linear(source)):
        number *= mixed
        how = LoraMeta(rank=2 + number % 3, alpha=3.0 + number % 2, rslora=mixed and number % 2 == 0)
        out, width = tensor.matrix
        lora[tensor.name] = Lora(torch.randn(how.rank, width) / 4, torch.randn(out, how.rank) / 4, how.scale)
        metas[tensor.name] = how
    assert any(len(t.shape) == 4 for t in linear(source))
    norm = next(t for t in source.tensors if t.part == "norm.self")
    whole = {norm.name: torch.randn(norm.shape)} if full else {}
    shapes = {t.name: t.shape for t in source.tensors if t.name in lora or t.name in whole}
    meta = AdapterMeta(
        family="sd",
        base_model=NAME,
        base_revision=source.revision,
        layers=[],
        lora=metas,
        tensors=shapes,
        hyperparameters=wire.Hyperparameters(),
        created_at=0,
        trained_tokens=0,
    )
    return Adapter(meta, whole, lora)


def export(adapter: Adapter, folder: Path, form: sd_lora.Format) -> Path:
    artifacts.save(folder / "ours", adapter)
    made = folder / f"{form}.safetensors"
    with (folder / "ours" / WEIGHTS).open("rb") as weights, made.open("wb") as out:
        tensor_file.write(out.write, *sd_lora.exported(adapter.meta, TensorFile(weights), form))
    return made


def read_in(file: Path, told: BaseTensors, source: PictureSource, folder: Path) -> Adapter:
    """As the relay imports it and a gpu reads it."""
    folder.mkdir(exist_ok=True)
    weights, description = folder / WEIGHTS, folder / DESCRIPTION
    with file.open("rb") as opened, weights.open("wb") as out:
        found = sd_lora.imported(TensorFile(opened), told)
        tensor_file.write(out.write, found.pieces)
    meta = random_adapter(source).meta.model_copy(update={"lora": found.lora, "tensors": found.tensors})
    description.write_text(Description(meta=meta, weights=artifacts.file_ref(weights)).model_dump_json())
    return artifacts.load({p.name: p for p in (weights, description)}, source.tensors)


def ours(base: PictureBase, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """What the UNet and the text encoder make of the same things."""
    tuned, ids = Tuned(adapter.full, adapter.lora), base.source.chunks("a red wall")[0]
    given = passed()
    with torch.no_grad():
        return tuned("unet", base.unet, *given).sample, base.read(ids, tuned)


def theirs(pipeline: Any, source: PictureSource) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return pipeline.unet(*passed()).sample, pipeline.text_encoder(source.chunks("a red wall")[0])[0]


def passed() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    latents, texts = torch.randn((2, 4, 16, 16), generator=random), torch.randn((2, 77, 32), generator=random)
    return latents, torch.tensor([20, 500]), texts


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=CLOSE, rtol=CLOSE) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_diffusers_loads_what_is_exported_and_draws_the_same_picture(
    form: sd_lora.Format, folder: Path, source: PictureSource, base: PictureBase, tmp_path: Path
) -> None:
    adapter = random_adapter(source)
    pipeline = tiny_sd.oracle(folder)
    plain = theirs(pipeline, source)
    pipeline.load_lora_weights(str(export(adapter, tmp_path, form)))
    assert same(theirs(pipeline, source), ours(base, adapter))
    assert not torch.allclose(plain[0], ours(base, adapter)[0], atol=0.05)

    shown: list[Any] = []
    prompt, nothing = source.chunks("a red wall", "")
    wanted = Wanted(NAME, prompt, nothing, SIDE, SIDE, 4, 7.5, "ddim", (9,))
    pictures = Pictures()
    pictures.add(Request(base, wanted, shown.append, lambda: False, Tuned(adapter.full, adapter.lora)))
    while pictures:
        pictures.step()
    pipeline.scheduler = source.new_scheduler("ddim")
    drawn = pipeline("a red wall", num_inference_steps=4, generator=torch.Generator().manual_seed(9)).images[0]
    differ = np.abs(np.asarray(drawn).astype(int) - shown[0].pixels.numpy().astype(int))
    assert differ.max() <= 2, "rounding alone"


def test_an_encoder_with_a_module_around_it_takes_it_too(folder: Path, source: PictureSource, tmp_path: Path) -> None:
    """As CLIPTextModel was before transformers 5.6, and CLIPTextModelWithProjection is."""
    adapter = random_adapter(source)
    pipeline = tiny_sd.oracle(folder)
    config = pipeline.text_encoder.config
    pipeline.text_encoder = CLIPTextModelWithProjection(config)
    file = export(adapter, tmp_path, "diffusers")
    keys = [key for key in safetensors.torch.load_file(file) if key.startswith("text_encoder.")]
    assert all(key.startswith("text_encoder.text_model.encoder.layers.") for key in keys), "the earlier ones need it"
    pipeline.load_lora_weights(str(file))
    inside = pipeline.text_encoder.text_model
    ours = {n.removeprefix("text_encoder."): pair for n, pair in adapter.lora.items() if n.startswith("text_encoder.")}
    assert 2 * len(ours) == len(keys) > 0
    for name, pair in ours.items():
        added = inside.get_submodule(name.removesuffix(".weight")).get_delta_weight("default_0")
        torch.testing.assert_close(added, pair.scale * pair.b @ pair.a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("form", "mixed"), [("diffusers", True), ("diffusers", False), ("kohya", False)])
def test_a_round_trip_changes_no_bit(
    form: sd_lora.Format, mixed: bool, source: PictureSource, told: BaseTensors, tmp_path: Path
) -> None:
    adapter = random_adapter(source, mixed=mixed)
    again = read_in(export(adapter, tmp_path, form), told, source, tmp_path / "again")
    assert again.lora.keys() == adapter.lora.keys()
    for name, pair in adapter.lora.items():
        assert torch.equal(again.lora[name].a, pair.a)
        assert torch.equal(again.lora[name].b, pair.b)
        assert again.lora[name].scale == pytest.approx(pair.scale, rel=1e-6)


Saved = Callable[[str], tuple[Path, Any]]


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Saved:
    """A file that diffusers saved, in one of its forms, and the pipeline that it came from."""

    def save(form: str) -> tuple[Path, Any]:
        torch.manual_seed(7)
        pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        wide = ["to_q", "to_k", "to_out.0", "proj_in", "ff.net.2"]
        pipeline.unet.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=wide, init_lora_weights=False))
        narrow = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "fc1"], init_lora_weights=False)
        pipeline.text_encoder.add_adapter(narrow)
        unet, encoder = (get_peft_model_state_dict(m) for m in (pipeline.unet, pipeline.text_encoder))
        told = _collate_lora_metadata({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
        out, file = tmp_path / "theirs", tmp_path / "kohya.safetensors"
        if form == "diffusers":
            StableDiffusionPipeline.save_lora_weights(out, unet, encoder, **told)
            return out / "pytorch_lora_weights.safetensors", pipeline
        if form == "old":
            safetensors.torch.save_file(_old(unet, encoder), file)
            return file, pipeline
        kohya = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in unet.items()})
        # That function knows neither the prefixes that kohya's scripts write nor an alpha other than the rank.
        made = {}
        for key, value in kohya.items():
            name = key.replace("lora_unet_", "").removeprefix("unet_")
            made[f"lora_unet_{name}"] = torch.tensor(7.0) if name.endswith("alpha") else value
        for key, value in encoder.items():
            module, _, ending = key.partition(".lora_")
            name = f"lora_te_text_model_{module.replace('.', '_')}"
            made[f"{name}.{'lora_down' if ending[0] == 'A' else 'lora_up'}.weight"] = value
            made[f"{name}.alpha"] = torch.tensor(5.0)
        _convert_non_diffusers_lora_to_diffusers(dict(made))  # diffusers takes these names for kohya's
        safetensors.torch.save_file({k: v.contiguous() for k, v in made.items()}, file)
        return file, pipeline

    return save


def _old(unet: dict[str, Tensor], encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """As earlier versions of diffusers wrote it, when the encoder had a module around it."""
    made = {}
    for start, between, tensors, alpha in (
        ("unet.", ".lora", unet, 7.0),
        ("text_encoder.text_model.", ".lora_linear_layer", encoder, 5.0),
    ):
        for key, value in tensors.items():
            module, _, ending = key.partition(".lora_")
            made[f"{start}{module}{between}.{'down' if ending[0] == 'A' else 'up'}.weight"] = value.contiguous()
            made[f"{start}{module}.alpha"] = torch.tensor(alpha)
    return made


@pytest.mark.parametrize("form", ["diffusers", "old", "kohya"])
def test_a_lora_that_diffusers_made_is_the_same_here(
    form: str, saved: Saved, source: PictureSource, base: PictureBase, told: BaseTensors, tmp_path: Path
) -> None:
    file, pipeline = saved(form)
    adapter = read_in(file, told, source, tmp_path / "in")
    assert {how.alpha for how in adapter.meta.lora.values()} == {5.0, 7.0}
    assert same(ours(base, adapter), theirs(pipeline, source))
    assert any(len(shape) == 4 for shape in adapter.meta.tensors.values())


def test_a_file_that_says_no_alpha_means_the_rank(
    saved: Saved, source: PictureSource, told: BaseTensors, tmp_path: Path
) -> None:
    file, _ = saved("kohya")
    tensors = {k: v for k, v in safetensors.torch.load_file(file).items() if not k.endswith("alpha")}
    half = {k: v.to(torch.bfloat16 if "unet" in k else torch.float16) for k, v in tensors.items()}
    safetensors.torch.save_file(half, file)
    adapter = read_in(file, told, source, tmp_path / "in")
    assert all(how.scale == 1.0 for how in adapter.meta.lora.values())


def test_what_was_trained_in_full_has_no_place_in_a_lora_file(source: PictureSource, tmp_path: Path) -> None:
    with pytest.raises(CannotExport, match="trained in full"):
        export(random_adapter(source, full=True), tmp_path, "kohya")


DOWN = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
UP = DOWN.replace("lora_down", "lora_up")
M = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({DOWN: (2, 32)}, "one half of its pair"),
        ({DOWN: (2, 31), UP: (32, 2)}, "choose the model it was made for"),
        ({DOWN: (2, 32), UP: (32, 3)}, "no pair of LoRA"),
        ({DOWN: (2, 32, 3, 3), UP: (32, 2)}, "no pair of LoRA"),
        ({DOWN: (), UP: (32, 2)}, "no pair of LoRA"),
        ({f"{CONV}.lora_down.weight": (2, 16, 3, 3), f"{CONV}.lora_up.weight": (16, 2, 1, 1)}, "LoCon"),
        ({DOWN.replace("lora_down.weight", "dora_scale"): (32,)}, "DoRA"),
        ({DOWN.replace("lora_down.weight", "hada_w1_a"): (32, 2)}, "LoHa"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 32)}, "SDXL"),
        ({"lora_unet_up_blocks_7_attentions_0_proj_in.lora_down.weight": (2, 32)}, "is not in this model"),
        ({"unet.up_blocks.7.attentions.0.proj_in.lora_A.weight": (2, 32)}, "is not in this model"),
        ({"something": (3,)}, "no tensor of a LoRA"),
        ({DOWN: (2, 32), UP: (32, 2), DOWN.replace("lora_down.weight", "alpha"): (2,)}, "one number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_plain_lora_of_the_model_is_refused_by_name(
    tensors: dict[str, tuple[int, ...]], says: str, told: BaseTensors, tmp_path: Path
) -> None:
    file = tmp_path / "bad.safetensors"
    safetensors.torch.save_file({key: torch.ones(shape) for key, shape in tensors.items()}, file)
    with file.open("rb") as opened, pytest.raises(CannotImport, match=says):
        sd_lora.imported(TensorFile(opened), told)


@pytest.mark.parametrize("metadata", ["[", "[]", '{"unet.r": "many"}', '{"unet.use_dora": true, "unet.r": 2}'])
def test_metadata_that_is_no_config_is_refused(metadata: str, told: BaseTensors, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    pair = {DOWN: torch.ones(2, 32), UP: torch.ones(32, 2)}
    safetensors.torch.save_file(pair, file, {sd_lora.METADATA: metadata})
    with file.open("rb") as opened, pytest.raises(InvalidRequest, match=r"JSON|r:|DoRA"):
        sd_lora.imported(TensorFile(opened), told)


def test_the_converter_of_diffusers_counts_alphas_and_numbers_the_text_encoder(
    folder: Path, source: PictureSource, told: BaseTensors, tmp_path: Path
) -> None:
    """Its alphas are integers, and its encoder is te1, without text_model: as it writes it, nothing renamed."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.unet.add_adapter(LoraConfig(r=3, target_modules=["to_q"], init_lora_weights=False))
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    tensors = {f"{n}.{k}": v.contiguous() for n, m in parts.items() for k, v in get_peft_model_state_dict(m).items()}
    made = convert_state_dict_to_kohya(tensors)
    assert {t.dtype for key, t in made.items() if key.endswith(".alpha")} == {torch.int64}
    assert any(key.startswith("lora_te1_encoder_") for key in made)
    safetensors.torch.save_file(made, tmp_path / "kohya.safetensors")
    adapter = read_in(tmp_path / "kohya.safetensors", told, source, tmp_path / "in")
    assert {how.alpha for how in adapter.meta.lora.values()} == {2.0, 3.0}
    for name, pair in adapter.lora.items():
        assert torch.equal(pair.a, tensors[f"{name.removesuffix('.weight')}.lora_A.weight"])
        assert torch.equal(pair.b, tensors[f"{name.removesuffix('.weight')}.lora_B.weight"])


Q = "encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("nested", ["", "text_model."])
def test_patterns_are_of_the_names_that_their_writer_had(
    nested: str, source: PictureSource, told: BaseTensors, tmp_path: Path
) -> None:
    """transformers before 5 had a module around the encoder's."""
    out, width = told.shapes[f"text_encoder.{Q}.weight"]
    pair = {
        f"text_encoder.{nested}{Q}.lora_{x}.weight": torch.ones(s) for x, s in {"A": (2, width), "B": (out, 2)}.items()
    }
    config = {"text_encoder.r": 2, "text_encoder.lora_alpha": 2, "text_encoder.alpha_pattern": {f"^{nested}{Q}": 9}}
    safetensors.torch.save_file(pair, tmp_path / "a.safetensors", {sd_lora.METADATA: json.dumps(config)})
    adapter = read_in(tmp_path / "a.safetensors", told, source, tmp_path / "in")
    assert adapter.meta.lora[f"text_encoder.{Q}.weight"].alpha == 9


def test_an_alpha_without_end_is_refused(told: BaseTensors, tmp_path: Path) -> None:
    pair = {f"{M}.lora_A.weight": torch.ones(2, 32), f"{M}.lora_B.weight": torch.ones(32, 2)}
    said = json.dumps({"unet.r": 2, "unet.alpha_pattern": {".*": float("inf")}})
    safetensors.torch.save_file(pair, tmp_path / "a.safetensors", {sd_lora.METADATA: said})
    with (tmp_path / "a.safetensors").open("rb") as opened, pytest.raises(CannotImport, match="has inf"):
        sd_lora.imported(TensorFile(opened), told)


def test_an_alpha_that_kohyas_files_cannot_say_is_refused(source: PictureSource, tmp_path: Path) -> None:
    adapter = random_adapter(source)
    how = {name: LoraMeta(rank=x.rank, alpha=1e200) for name, x in adapter.meta.lora.items()}
    large = Adapter(adapter.meta.model_copy(update={"lora": how}), adapter.full, adapter.lora)
    with pytest.raises(CannotExport, match="1e"):
        export(large, tmp_path, "kohya")


def test_each_component_has_its_own_alpha_in_kohyas_file_in_half_precision_too(
    folder: Path, source: PictureSource, tmp_path: Path
) -> None:
    """diffusers gives each a config of its own."""
    adapter = random_adapter(source)
    how = {n: LoraMeta(rank=x.rank, alpha=6 if n.startswith("unet.") else 1.5) for n, x in adapter.meta.lora.items()}
    lora = {n: Lora(x.a.half(), x.b.half(), how[n].scale, None) for n, x in adapter.lora.items()}
    apart = Adapter(adapter.meta.model_copy(update={"lora": how}), {}, lora)
    file = export(apart, tmp_path, "kohya")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.load_lora_weights(str(file))
    for name, pair in lora.items():
        component, _, module = name.removesuffix(".weight").partition(".")
        added = getattr(pipeline, component).get_submodule(module).get_delta_weight("default_0")
        torch.testing.assert_close(added.flatten(1), pair.scale * pair.b.float() @ pair.a.float(), rtol=1e-3, atol=1e-4)
