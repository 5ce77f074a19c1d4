"""Pictures on one gpu, held against diffusers' own pipelines on the same folder."""

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from PIL import Image

import wire
from adapter import AdapterMeta, LoraMeta
from gpu_service import artifacts
from gpu_service.artifacts import Adapter
from gpu_service.device import Device
from gpu_service.drawing import PictureBody
from gpu_service.errors import BadRequest
from gpu_service.layers import TensorInfo
from gpu_service.lora import Lora
from gpu_service.models import Models, locate
from gpu_service.resident import AdapterFiles
from gpu_service.sampling import Sampling
from gpu_service.sd import SCHEDULERS, PictureSource
from gpu_service.settings import BadSetting, Settings
from gpu_service.tuned import PLAIN, Tuned
from gpu_service.unet import Shallow, keeping, parse_blocks
from gpu_service.worker import Generation, Worker
from tests.conftest import TINY
from tests.gpu_service import tiny_sd
from tests.gpu_service.conftest import KEY, Gpu, run_gpu
from tests.gpu_service.tiny_sd import NAME, SIDE

PROMPT = "a red heart"
# Some of diffusers' schedulers hand torch tensors to numpy in a way that numpy 2 will drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.fixture(scope="module")
def sd_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd.make(tmp_path_factory.mktemp("models") / NAME)


@pytest.fixture(scope="module")
def pipeline(sd_dir: Path) -> Any:
    return tiny_sd.oracle(sd_dir)


@pytest.fixture(scope="module")
def models(sd_dir: Path, tiny_dir: Path, cpu: Device) -> Models:
    return Models((f"{NAME}={sd_dir}", f"{TINY}={tiny_dir}"), cpu)


@pytest.fixture(scope="module")
def source(models: Models) -> PictureSource:
    return models.picture_source(NAME)


@pytest.fixture(scope="module")
def painter(models: Models, cpu: Device) -> Iterator[Worker]:
    worker = Worker(Settings(), cpu, models)
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
async def gpu(sd_dir: Path, tiny_dir: Path, cpu: Device) -> AsyncIterator[Gpu]:
    async with run_gpu(tiny_dir, cpu, Settings(), f"{NAME}={sd_dir}") as running:
        yield running


@pytest.fixture(scope="module")
async def client(gpu: Gpu) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gpu.url}/v1", api_key=KEY, max_retries=0) as opened:
        yield opened


async def draw(painter: Worker, source: PictureSource, **asked: Any) -> list[np.ndarray[Any, Any]]:
    body = PictureBody(**{"model": NAME, "prompt": PROMPT, "seed": 3, "steps": 4, **asked})
    shown = [s async for s in painter.draw(body.wanted(source, ""))]
    return [s.pixels.numpy() for s in sorted(shown, key=lambda s: s.index)]


def expected(pipeline: Any, seed: int = 3, **asked: Any) -> np.ndarray[Any, Any]:
    asked = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(seed), **asked}
    return np.asarray(pipeline(PROMPT, **asked).images[0])


def near(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Sums in another order may round the last bit of a byte the other way; which do is up to the processor."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


def opened(data: str | None) -> Image.Image:
    assert data
    return Image.open(io.BytesIO(base64.b64decode(data)))


# --- equal to diffusers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
async def test_a_picture_is_that_of_the_pipeline(
    painter: Worker, source: PictureSource, pipeline: Any, scheduler: str | None
) -> None:
    pipeline.scheduler = source.new_scheduler(scheduler)
    asked: dict[str, Any] = {"negative_prompt": "blue", "width": 48, "height": SIDE}
    [made] = await draw(painter, source, scheduler=scheduler, negative_prompt="blue", size=f"48x{SIDE}")
    assert near(made, expected(pipeline, **asked))


async def test_a_model_that_predicts_velocity_is_equal_too(tmp_path: Path, cpu: Device) -> None:
    folder = tiny_sd.make(tmp_path / NAME, prediction="v_prediction")
    models = Models((str(folder),), cpu)
    worker = Worker(Settings(), cpu, models)
    worker.start()
    [made] = await draw(worker, models.picture_source(NAME), guidance=1)
    worker.stop()
    assert near(made, expected(tiny_sd.oracle(folder), guidance_scale=1))


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
async def test_a_picture_to_begin_with_is_changed_as_the_pipeline_changes_it(
    painter: Worker, source: PictureSource, pipeline: Any, scheduler: str | None
) -> None:
    start = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    other.scheduler = source.new_scheduler(scheduler)
    [made] = await draw(painter, source, image=as_base64(start), strength=0.5, scheduler=scheduler)
    assert near(made, expected(other, image=start, strength=0.5))


async def test_pictures_of_several_requests_share_a_batch_and_are_those_of_each_alone(
    painter: Worker, source: PictureSource
) -> None:
    asked: list[dict[str, Any]] = [
        {"seed": 1, "scheduler": "ddim", "steps": 6},
        {"seed": 2, "scheduler": "euler", "steps": 3},
        {"seed": 3, "guidance": 1, "dials": {"attn": 0.5}},
        {"seed": 4, "n": 2, "dials": {"eps": 1e5}},
    ]
    alone = [await draw(painter, source, **each) for each in asked]
    together = await asyncio.gather(*(draw(painter, source, **each) for each in asked))
    for one, other in zip([p for ps in alone for p in ps], [p for ps in together for p in ps], strict=True):
        assert near(one, other)


async def test_the_second_of_n_pictures_is_the_one_of_the_next_seed(painter: Worker, source: PictureSource) -> None:
    both = await draw(painter, source, n=2, seed=8)
    assert np.abs(both[1].astype(int) - (await draw(painter, source, seed=9))[0]).max() <= 1
    assert not np.array_equal(both[0], both[1])


# --- dials -----------------------------------------------------------------------------------------------------------


async def test_dials_that_turn_nothing_change_no_bit(painter: Worker, source: PictureSource) -> None:
    dials = {"attn": 1.0, "bands": [{"layers": "mid", "mlp": 1.0}]}
    [plain], [turned] = await draw(painter, source), await draw(painter, source, dials=dials)
    assert np.array_equal(plain, turned)


@pytest.mark.parametrize("dial", ["attn_self", "attn_cross", "mlp"])
async def test_a_gain_is_the_same_as_scaling_the_output_projection(
    painter: Worker, source: PictureSource, sd_dir: Path, dial: str
) -> None:
    ending = {"attn_self": "attn1.to_out.0", "attn_cross": "attn2.to_out.0", "mlp": "ff.net.2"}[dial]
    baked = tiny_sd.oracle(sd_dir)
    for name, module in baked.unet.named_modules():
        if name.startswith("up_blocks.1.") and name.endswith(ending):
            module.weight.data *= 2.0
            module.bias.data *= 2.0
    [made] = await draw(painter, source, dials={"bands": [{"layers": "up.1", dial: 2.0}]})
    assert np.abs(made.astype(int) - expected(baked)).max() <= 1
    assert not np.array_equal(made, (await draw(painter, source))[0])


async def test_eps_multiplies_that_of_the_norms(painter: Worker, source: PictureSource, sd_dir: Path) -> None:
    changed = tiny_sd.oracle(sd_dir)
    for module in changed.unet.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.eps *= 1e4
    [made] = await draw(painter, source, dials={"eps": 1e4})
    assert np.abs(made.astype(int) - expected(changed)).max() <= 1
    assert not np.array_equal(made, (await draw(painter, source))[0])


def test_blocks_are_named_as_ranges() -> None:
    known = ["down.0", "down.1", "mid", "up.0", "up.1"]
    assert parse_blocks(known, "all") == known
    assert parse_blocks(known, "mid, up.0-1") == ["mid", "up.0", "up.1"]
    for wrong in ("up.1-2", "side", "down.1-0", ""):
        with pytest.raises(BadRequest, match=r"down\.0, down\.1, mid"):
            parse_blocks(known, wrong)


# --- over HTTP -------------------------------------------------------------------------------------------------------


async def test_the_openai_client_gets_png_files_that_carry_their_settings(client: openai.AsyncOpenAI) -> None:
    extra = {"seed": 5, "steps": 3, "dials": {"attn_cross": 1.2}}
    answer = await client.images.generate(model=NAME, prompt="ein grünes Herz", n=2, extra_body=extra)
    assert answer.data
    for number, each in enumerate(answer.data):
        picture = opened(each.b64_json)
        assert (picture.format, picture.size) == ("PNG", (SIDE, SIDE))
        told = json.loads(picture.info["im-fine"])
        assert told["prompt"] == "ein grünes Herz"
        assert (told["seed"], told["steps"], told["dials"]) == (5 + number, 3, {"attn_cross": 1.2})


async def test_partial_pictures_are_streamed_in_the_openai_shape(client: openai.AsyncOpenAI) -> None:
    stream = await client.images.generate(
        model=NAME, prompt=PROMPT, stream=True, partial_images=2, output_format="webp", extra_body={"steps": 6}
    )
    events = [event async for event in stream]
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    assert {opened(event.b64_json).format for event in events} == {"WEBP"}


async def test_a_caller_who_leaves_ends_the_picture(gpu: Gpu) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "steps": 200, "stream": True, "partial_images": 10}
    async with gpu.http.stream("POST", "/v1/images/generations", json=asked) as answer:
        await anext(answer.aiter_lines())
        assert len(gpu.worker._pictures) == 1
    async with asyncio.timeout(60):
        while gpu.worker.active_requests or gpu.worker._pictures:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("kind", "compression"), [("jpeg", None), ("jpeg", 20), ("webp", 20)])
async def test_the_openai_client_may_ask_for_smaller_files(
    client: openai.AsyncOpenAI, kind: Any, compression: int | None
) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "quality": "hd", "extra_body": {"steps": 2, "seed": 1}}
    if compression is not None:
        asked["output_compression"] = compression
    made = await client.images.generate(output_format=kind, **asked)
    whole = await client.images.generate(output_format="webp", **(asked | {"output_compression": 100}))
    assert made.data
    assert whole.data
    assert made.output_format == kind
    small, exact = opened(str(made.data[0].b64_json)), opened(str(whole.data[0].b64_json))
    assert small.format == kind.upper()
    difference = np.abs(np.asarray(small, np.int16) - np.asarray(exact, np.int16)).mean()
    assert 0 < difference < 30


async def test_a_relay_is_told_what_was_drawn_as_it_is_shown(gpu: Gpu) -> None:
    relay, asked = {wire.HEADER_CALLER: "user-1"}, {"model": NAME, "prompt": PROMPT, "steps": 4, "n": 2}
    whole = await gpu.http.post("/v1/images/generations", json=asked, headers=relay)
    read = whole.json()["usage"]["input_tokens"]
    assert whole.headers[wire.HEADER_USAGE] == f"{read},8"
    streamed = {**asked, "stream": True, "partial_images": 1, "n": 1}
    told = await gpu.http.post("/v1/images/generations", json=streamed, headers=relay)
    comments = [frame for frame in told.text.split("\n\n") if frame.startswith(":")]
    assert comments == [wire.USAGE_COMMENT.decode() + f"{read},{drawn}" for drawn in (0, 2, 4)]
    plain = await gpu.http.post("/v1/images/generations", json=streamed)
    assert wire.USAGE_COMMENT.decode() not in plain.text


async def test_who_stops_reading_stops_the_picture_within_one_step(painter: Worker, source: PictureSource) -> None:
    def steps() -> int:
        [count] = re.findall(r'gpu_device_seconds_count\{kind="image"\} (\d+)', painter.metrics.text().decode())
        return int(count)

    wanted = replace(PictureBody(model=NAME, prompt=PROMPT, steps=200).wanted(source, ""), previews=10)
    async with aclosing(painter.draw(wanted)) as shown:  # type: ignore[type-var]
        await anext(shown)
        before = steps()
    async with asyncio.timeout(60):
        while painter._pictures:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert steps() - before <= 2, "the one under way, and the look that ends it"


async def test_previews_of_few_steps_are_numbered_without_a_gap(painter: Worker, source: PictureSource) -> None:
    wanted = replace(PictureBody(model=NAME, prompt=PROMPT, steps=4, scheduler="ddim").wanted(source, ""), previews=5)
    assert [shown.preview async for shown in painter.draw(wanted)] == [0, 1, 2, None]


async def test_text_goes_on_between_the_steps_of_a_picture(gpu: Gpu) -> None:
    steps = 200
    picture = asyncio.create_task(
        gpu.http.post("/v1/images/generations", json={"model": NAME, "prompt": PROMPT, "steps": steps})
    )
    async with asyncio.timeout(60):
        while not gpu.worker._pictures:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    asked = Generation(TINY, None, [5, 6, 7], Sampling(max_tokens=5, ignore_eos=True), None)
    assert [event async for event in gpu.worker.generate(asked)]
    assert not picture.done()
    assert (await picture).status_code == 200


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"size": "10000x10000"}, "size"),
        ({"size": "33x32"}, "size"),
        ({"size": "0x32"}, "size"),
        ({"n": 11}, "n"),
        ({"steps": 0}, "steps"),
        ({"scheduler": "best"}, "scheduler"),
        ({"image": "bm8="}, "image"),
        ({"image": "!"}, "image"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"response_format": "url"}, "response_format"),
        ({"dials": {"bands": [{"layers": "up.7"}]}}, "dials"),
        ({"background": "transparent"}, "background"),
        ({"prompt": "word " * 400}, "prompt"),
        ({"cfg": 3}, "cfg"),
        ({"model": TINY}, "model"),
    ],
)
async def test_what_can_not_be_drawn_is_refused_by_name(gpu: Gpu, asked: dict[str, Any], param: str) -> None:
    answer = await gpu.http.post("/v1/images/generations", json={"model": NAME, "prompt": PROMPT, **asked})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_dials_that_overflow_are_an_error_and_no_black_picture(gpu: Gpu) -> None:
    dials = {"attn": 100, "mlp": 100, "bands": [{"layers": "all", "attn": 100, "mlp": 100}] * 32}
    answer = await gpu.http.post("/v1/images/generations", json={"model": NAME, "prompt": PROMPT, "dials": dials})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_finite")


async def test_a_model_of_pictures_answers_no_chat(gpu: Gpu) -> None:
    messages = [{"role": "user", "content": "hello"}]
    for path, body in (
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/completions", {"prompt": "hello"}),
    ):
        answer = await gpu.http.post(path, json={"model": NAME, **body})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_kind_of_model")
    listed = (await gpu.http.get("/v1/models")).json()["data"]
    assert {each["id"]: each["family"] for each in listed} == {TINY: "llama", NAME: "sd"}


async def test_a_preview_tells_what_training_on_pictures_takes(gpu: Gpu, source: PictureSource) -> None:
    async def preview(**more: Any) -> dict[str, Any]:
        asked = {"model": NAME, "layers": {"parts": ["attn"]}, **more}
        return (await gpu.http.post("/v1/layers/preview", json=asked)).json()  # type: ignore[no-any-return]

    await gpu.worker.load(NAME)
    alone = await preview()
    assert alone["batch"] == {"rows": 1, "width": SIDE, "height": SIDE}
    assert "time_s" not in alone
    small, large = {"rows": 12, "bytes": 10**6}, {"rows": 1200, "bytes": 10**8}
    asked = {"n_epochs": 10, "resolution": 2 * SIDE}
    few, many = [await preview(data=size, hyperparameters=asked) for size in (small, large)]
    assert few["batch"] == {"rows": 1, "width": 2 * SIDE, "height": 2 * SIDE}, "more would keep chat waiting"
    assert many["time_s"] == pytest.approx(100 * few["time_s"], rel=0.1)
    concept = {"prompt": "a sks wall", "class_prompt": "a wall"}
    kept = await preview(data=small, hyperparameters=asked, concept=concept)
    assert kept["time_s"] > 2 * few["time_s"]
    assert kept["memory_bytes"]["activations"] == 2 * few["memory_bytes"]["activations"]
    for spec, says in (({"quantize": "8bit"}, "not quantised"), ({"method": "dora"}, "dora is for text")):
        refused = await preview(layers={"parts": ["attn"], **spec})
        assert says in refused["error"]["message"]
        assert refused["error"]["param"] == "layers"


# --- prompts and pictures that come in -------------------------------------------------------------------------------


async def test_a_prompt_past_the_encoder_s_length_is_read_in_chunks_and_never_cut(
    painter: Worker, source: PictureSource
) -> None:
    long = "heart " * 20  # 100 letters, each a token here
    body = PictureBody(model=NAME, prompt=long, negative_prompt="blue")
    wanted = body.wanted(source, "")
    assert wanted.prompt.shape == wanted.negative.shape == (2, 77)
    [one], [other] = await draw(painter, source, prompt=long), await draw(painter, source, prompt=long + "x")
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_pictures_of_any_usual_mode_are_taken(source: PictureSource, mode: str) -> None:
    picture = Image.new("RGB", (100, 60), "red").convert(mode)
    wanted = PictureBody(model=NAME, prompt=PROMPT, image="data:image/png;base64," + as_base64(picture)).wanted(
        source, ""
    )
    assert wanted.start is not None
    assert tuple(wanted.start.shape) == (1, 3, wanted.height, wanted.width)
    assert (wanted.width, wanted.height) == (64, 38)  # as large as the model draws, in its proportions


def test_a_phones_picture_and_base64_in_lines_are_taken(source: PictureSource) -> None:
    """With a second picture behind it, and EXIF that is broken."""
    file, red = io.BytesIO(), Image.new("RGB", (64, 64), "red")
    red.save(file, "MPO", save_all=True, append_images=[red], exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    lines = base64.encodebytes(file.getvalue()).decode()
    start = PictureBody(model=NAME, prompt=PROMPT, image=lines).wanted(source, "").start
    assert start is not None
    assert start[0, 0].mean() > 0.9


def test_moving_deep_and_huge_pictures_are_refused(source: PictureSource) -> None:
    moving = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(moving, "PNG", save_all=True, append_images=frames[1:])
    for text, said in (
        (base64.b64encode(moving.getvalue()).decode(), "moves"),
        (as_base64(Image.new("I;16", (20, 20))), "save it with 8"),
        (as_base64(Image.new("1", (8000, 8000))), "megapixels"),
        (as_base64(Image.new("RGB", (64, 64)))[:60], "a part is missing"),
        ("not base64!", "no base64"),
        ("nö", "no base64"),
    ):
        with pytest.raises(BadRequest, match=said):
            PictureBody(model=NAME, prompt=PROMPT, image=text).wanted(source, "")


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folders_that_are_not_covered_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_sd.make(tmp_path / NAME)
    index = folder / "model_index.json"
    whole = index.read_text()
    tiny_sd.rewrite(index, _class_name="StableDiffusionXLPipeline")
    with pytest.raises(BadSetting, match="StableDiffusionXLPipeline"):
        locate(str(folder))
    index.write_text(whole)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BadSetting, match="pickled weights"):
        locate(str(folder))
    weights.with_suffix(".bin").rename(weights)
    tiny_sd.rewrite(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(BadSetting, match="sample"):
        locate(str(folder))


def as_base64(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


async def test_previews_are_sketched_at_half_the_size_and_the_picture_is_drawn_whole(
    painter: Worker, models: Models, source: PictureSource
) -> None:
    await painter.load(NAME)
    sizes: list[int] = []
    decoder = models.load_pictures(NAME).vae.decoder
    handle = decoder.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-1]))
    body = PictureBody(model=NAME, prompt=PROMPT, seed=3, steps=6, stream=True, partial_images=2)
    shown = [s async for s in painter.draw(body.wanted(source, ""))]
    handle.remove()
    assert sizes == [8, 8, 16]
    assert {tuple(s.pixels.shape) for s in shown} == {(SIDE, SIDE, 3)}


# --- tuned models ----------------------------------------------------------------------------------------------------


def tuned_files(folder: Path, source: PictureSource, seed: int) -> AdapterFiles:
    """A matrix by LoRA, a convolution in full and a matrix of the text encoder, all of them far from the base's."""
    torch.manual_seed(seed)

    def first(component: str, part: str) -> TensorInfo:
        found = (t for t in source.tensors if t.component == component and t.part == part)
        return next(t for t in found if t.name.endswith("weight"))

    conv, linear = first("unet", "conv.resnet"), [first("unet", "attn.cross.k"), first("text_encoder", "attn.v")]
    full = {conv.name: torch.randn(conv.shape) / 5}
    pairs = {t.name: Lora(torch.randn(3, t.shape[1]), torch.randn(t.shape[0], 3), 0.5) for t in linear}
    meta = AdapterMeta(
        family="sd",
        base_model=NAME,
        base_revision=source.revision,
        layers=[],
        lora={name: LoraMeta(rank=3, alpha=1.5) for name in pairs},
        tensors={t.name: t.shape for t in (conv, *linear)},
        hyperparameters=wire.Hyperparameters(),
        created_at=0,
        trained_tokens=0,
    )
    refs = artifacts.save(folder, Adapter(meta, full, pairs))
    return AdapterFiles(f"tuned-{seed}", {ref.name: folder / ref.name for ref in refs.files})


async def test_a_tuned_model_draws_as_a_pipeline_with_its_weights_and_beside_it_others_as_alone(
    painter: Worker, source: PictureSource, sd_dir: Path, tmp_path: Path
) -> None:
    files = [tuned_files(tmp_path / str(seed), source, seed) for seed in (1, 2)]
    body = PictureBody(model=NAME, prompt=PROMPT, seed=3, steps=4, scheduler="ddim")

    async def drawn(adapter: AdapterFiles | None) -> np.ndarray[Any, Any]:
        [shown] = [s async for s in painter.draw(body.wanted(source, ""), adapter)]
        return shown.pixels.numpy()

    plain = await drawn(None)
    together = await asyncio.gather(*(drawn(f) for f in (files[0], None, files[1], files[0])))
    assert np.array_equal(together[1], plain), "who is not tuned draws as ever"
    assert near(together[0], together[3])
    assert not near(together[0], together[2])
    for picture, file in ((together[0], files[0]), (together[2], files[1])):
        adapter = artifacts.load(file.files, source.tensors)
        oracle = tiny_sd.oracle(sd_dir)
        oracle.scheduler = source.new_scheduler("ddim")
        with torch.no_grad():
            for name, weight in adapter.full.items():
                getattr(oracle, name.partition(".")[0]).get_parameter(name.partition(".")[2]).copy_(weight)
            for name, pair in adapter.lora.items():
                parameter = getattr(oracle, name.partition(".")[0]).get_parameter(name.partition(".")[2])
                parameter.add_(pair.b @ pair.a, alpha=pair.scale)
        assert near(picture, expected(oracle))


# --- fast ------------------------------------------------------------------------------------------------------------


def test_a_shallow_pass_with_what_is_deep_in_the_same_step_is_the_whole_pass(
    models: Models, source: PictureSource
) -> None:
    torch.manual_seed(0)
    unet = models.load_pictures(NAME).unet
    given = torch.randn(2, 4, 16, 16), torch.tensor([10, 600]), torch.randn(2, 77, 32)
    value = next(t for t in source.tensors if t.component == "unet" and t.part == "attn.cross.v" and t.layer == 0)
    tuned = Tuned({value.name: torch.randn(value.shape)}, {})
    with torch.no_grad():
        for way in (PLAIN, tuned):
            with keeping(unet) as kept:
                whole = way("unet", unet, given[0], given[1], encoder_hidden_states=given[2]).sample
            shallow = way("unet", Shallow(unet), *given, kept[0], within="unet")
            assert torch.equal(shallow, whole)
        assert not torch.equal(way("unet", Shallow(unet), *given, torch.zeros_like(kept[0]), within="unet"), whole)


async def test_a_fast_picture_takes_two_steps_of_three_from_the_one_before(
    painter: Worker, models: Models, source: PictureSource
) -> None:
    await painter.load(NAME)  # which measures how long a pass takes
    unet = models.load_pictures(NAME).unet
    passes: list[int] = []
    handle = unet.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    [whole] = await draw(painter, source, steps=8, scheduler="ddim")
    assert passes == [2] * 8
    passes.clear()
    [fast] = await draw(painter, source, steps=8, scheduler="ddim", fast=True)
    handle.remove()
    assert passes == [2] * 3
    assert not np.array_equal(fast, whole)
    asked: list[dict[str, Any]] = [
        {"fast": True},
        {"seed": 4, "fast": True, "dials": {"attn": 0.5}},
        {"fast": False},
        {"seed": 5, "fast": True, "guidance": 1},
    ]
    alone = [await draw(painter, source, steps=8, scheduler="ddim", **each) for each in asked]
    together = await asyncio.gather(*(draw(painter, source, steps=8, scheduler="ddim", **each) for each in asked))
    assert near(alone[0][0], fast)
    assert all(near(one, other) for [one], [other] in zip(alone, together, strict=True))
