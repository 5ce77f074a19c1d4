"""Fine-tuning on pictures, held against diffusers' own modules and recipe on a Stable Diffusion with random weights."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr
from PIL import Image
from torch import Tensor, nn

import wire
from adapter import AdapterMeta
from gpu_service import device as devices
from gpu_service import layers, learn_pictures, sd, train, trainable
from gpu_service import plan as plans
from gpu_service.artifacts import Adapter
from gpu_service.device import Device, Precision
from gpu_service.errors import BadDataset, BadRequest, OutOfMemory
from gpu_service.learn_pictures import PictureJob, PictureLearner
from gpu_service.lora import Lora
from gpu_service.picture_data import PictureStore
from gpu_service.samples import Prompt
from gpu_service.sd import PictureBase, PictureSource
from gpu_service.tuned import Tuned
from tests.gpu_service import tiny_sd
from tests.gpu_service.tiny_sd import NAME, SIDE

CROSS = {"method": "lora", "parts": ["attn.cross"], "rank": 4}
FULL = {"method": "full", "parts": ["attn.self", "norm"], "layers": "up"}
ENCODER = {"method": "lora", "parts": ["attn"], "component": "text_encoder", "rank": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are so small here that a second thread only makes the first wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PictureSource:
    return sd.open_folder(NAME, tiny_sd.make(tmp_path_factory.mktemp("models") / NAME), None)


@pytest.fixture(scope="module")
def base(source: PictureSource, cpu: Device) -> PictureBase:
    return sd.load(source, cpu)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six, of two colours."""
    path = tmp_path_factory.mktemp("data") / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(6):
            colour = "red" if number % 2 else "blue"
            archive.writestr(f"{number}.png", png(colour, 40 + number, 44))
            archive.writestr(f"{number}.txt", f"a {colour} wall")
    return path


def png(colour: str, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


Make = Callable[..., PictureJob]


@pytest.fixture
def make(source: PictureSource, cpu: Device, pictures: Path, tmp_path: Path) -> Make:
    def made(*specs: dict[str, Any], job: dict[str, Any] | None = None, **asked: Any) -> PictureJob:
        selection = layers.select(source.tensors, [wire.LayerSpec.model_validate(s) for s in specs], tied=False)
        store = PictureStore.build(pictures, tmp_path / "store", source, SIDE)
        wanted = {"n_epochs": 2, "batch_size": 4, "micro_batch_rows": 2, "learning_rate": 1e-3, **asked}
        plan = plans.resolve_pictures(
            wire.Hyperparameters.model_validate(wanted), source, selection, len(store), cpu, validates=True
        )
        return PictureJob(source, selection, plan, store, None, 5, **(job or {}))

    return made


def of_class(count: int, **more: Any) -> wire.Concept:
    """Its own prompt names nothing here, for the data has captions."""
    return wire.Concept(prompt="a sks wall", class_prompt="a wall", class_pictures=count, **more)


def ran(job: PictureJob, base: PictureBase, device: Device, **more: Any) -> list[train.Report]:
    return list(learn_pictures.steps(job, device, lambda: base, **more))


def losses(items: list[train.Report]) -> list[float]:
    return [i.train_loss for i in items if isinstance(i, train.Progress) and i.train_loss is not None]


def end(items: list[train.Report]) -> train.Trained:
    assert isinstance(items[-1], train.Trained)
    return items[-1]


def tensors(trained: train.Trained) -> dict[str, Tensor]:
    pairs = {f"{name}:{side}": getattr(pair, side) for name, pair in trained.lora.items() for side in "ab"}
    return {**trained.full, **pairs}


def state(base: PictureBase) -> dict[str, Tensor]:
    parts = {"unet": base.unet, "vae": base.vae, "text_encoder": base.text_encoder}
    return {f"{n}.{key}": x.clone() for n, part in parts.items() for key, x in part.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_changes_what_was_selected_and_nothing_in_the_model_that_serves(
    make: Make, base: PictureBase, cpu: Device
) -> None:
    before = state(base)
    trained = end(ran(make(CROSS, FULL, n_epochs=4), base, cpu))
    assert same(before, state(base)), "the base model serves on, unchanged to the bit"
    assert all("attn2" in name for name in trained.lora)
    assert all(name.startswith("unet.up_blocks.") and ("attn1" in name or "norm" in name) for name in trained.full)
    moved = [name for name, x in trained.full.items() if not torch.equal(x, before[name])]
    assert len(moved) > len(trained.full) // 2, "a key's bias has no gradient; the others move"
    assert all(bool(pair.b.any()) for pair in trained.lora.values())


def test_training_lowers_the_loss(make: Make, base: PictureBase, cpu: Device) -> None:
    found = losses(ran(make({"method": "full", "parts": ["conv", "attn"]}, n_epochs=25, learning_rate=5e-3), base, cpu))
    assert sum(found[-10:]) < 0.9 * sum(found[:10])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_is_that_of_diffusers_recipe(
    prediction: str, gamma: float, cpu: Device, pictures: Path, tmp_path: Path
) -> None:
    source = sd.open_folder(NAME, tiny_sd.make(tmp_path / "model", prediction=prediction), None)
    base = sd.load(source, cpu)
    selection = layers.select(source.tensors, [wire.LayerSpec.model_validate(CROSS)], tied=False)
    store = PictureStore.build(pictures, tmp_path / "store", source, SIDE)
    asked = wire.Hyperparameters(min_snr_gamma=gamma, batch_size=4)
    job = PictureJob(
        source,
        selection,
        plans.resolve_pictures(asked, source, selection, len(store), cpu),
        store,
        None,
        5,
    )
    learner = PictureLearner(job, base, cpu, trainable.build(selection, base, 5))
    for _ in learner.prepare():
        pass
    seen = [learner._training(row, 3) for row in range(4)]
    ours = learner.loss(range(4), 3) / learner.weight(range(4))

    scheduler = DDPMScheduler.from_config(dict(source.scheduler))
    clean, noise = torch.stack([s.clean for s in seen]), torch.stack([s.noise for s in seen])
    times = torch.tensor([s.time for s in seen])
    ids = torch.cat([source.chunks(store.caption(row))[0] for row in range(4)])
    told = base.unet(scheduler.add_noise(clean, noise, times), times, base.text_encoder(ids)[0]).sample
    aim = noise if prediction == "epsilon" else scheduler.get_velocity(clean, noise, times)
    errors = ((told - aim) ** 2).mean((1, 2, 3))
    if gamma:
        snr = compute_snr(scheduler, times)
        errors = errors * snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
    assert ours.item() == pytest.approx(errors.mean().item(), rel=1e-4)


def test_latents_are_what_the_autoencoder_says_of_the_picture(make: Make, base: PictureBase, cpu: Device) -> None:
    job = make(CROSS)
    learner = PictureLearner(job, base, cpu, trainable.build(job.selection, base, 5))
    for _ in learner.prepare():
        pass
    with torch.no_grad():
        told = base.vae.encode(job.store.pixels(1)[None]).latent_dist
    drawn = torch.stack([learner._clean("training", 1, torch.Generator().manual_seed(n)) for n in range(64)])
    scale = float(base.vae.config.scaling_factor)
    spread = float(told.std.max()) * scale / 8  # of a mean of 64
    assert torch.allclose(drawn.mean(0), told.mean[0] * scale, atol=5 * spread)
    assert not torch.equal(drawn[0], drawn[1]), "each epoch draws anew"


def test_how_a_batch_is_cut_changes_no_more_than_rounding(make: Make, base: PictureBase, cpu: Device) -> None:
    whole = losses(ran(make(CROSS, micro_batch_rows=4), base, cpu))
    cut = losses(ran(make(CROSS, micro_batch_rows=1), base, cpu))
    assert cut == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("specs", [(CROSS, FULL), (CROSS, ENCODER)], ids=["unet", "text encoder too"])
def test_a_run_that_goes_on_elsewhere_ends_with_the_same_bits(
    specs: tuple[dict[str, Any], ...], make: Make, source: PictureSource, cpu: Device
) -> None:
    """With pictures of a class, captions left out, sample pictures and two slices a step."""
    concept = {"concept": of_class(2), "prompts": (Prompt("a red wall", ()),)}
    job = make(*specs, job=concept, caption_dropout=0.3, samples_every_steps=2)
    whole = ran(job, sd.load(source, cpu), cpu)
    slices, stopped = 0, list[train.State]()

    def wanted() -> bool:
        return not stopped and slices > 40

    for item in learn_pictures.steps(job, cpu, lambda: sd.load(source, cpu), wanted=wanted):
        slices += 1
        if isinstance(item, train.State):
            stopped.append(item)
            if 0 < item.step < job.plan.total_steps:
                break
            stopped.clear()
    [at] = stopped
    rest = ran(job, sd.load(source, cpu), cpu, start=at)
    assert losses(rest) == losses(whole)[at.step :]
    assert same(tensors(end(whole)), tensors(end(rest)))
    assert end(whole).course.last_answers == end(rest).course.last_answers
    assert len(end(whole).course.last_answers) == 1
    assert end(whole).course.last_answers[0].startswith("data:image/webp;base64,")


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_learns_on_from_a_tuned_model_with_a_class_and_validation(
    name: str, make: Make, source: PictureSource, cpu: Device
) -> None:
    """What a T4 does, with its scaler. The text encoder is carried: it is read once, and as the tuned model has it."""
    first = end(ran(make(CROSS, ENCODER), sd.load(source, cpu), cpu))
    begin = Adapter(_meta(source, first), first.full, first.lora)
    half = replace(cpu, precision=Precision(name, devices.DTYPES[name], name == "fp16", "a test says so"))
    base, read = sd.load(source, half), list[int]()
    base.text_encoder.register_forward_hook(lambda *_: read.append(1))
    job = make(FULL, job={"begin": begin, "concept": of_class(2)}, n_epochs=4)
    job = replace(job, validation=job.store, prompts=(Prompt("a red wall", ()),))
    items = ran(job, base, half)
    found = end(items)
    assert all(np.isfinite(loss) for loss in losses(items))
    valid = [i.valid_loss for i in items if isinstance(i, train.Progress) and i.valid_loss is not None]
    assert len(valid) == 5
    assert found.lora.keys() >= {n for n in first.lora if n.startswith("text_encoder.")}, "carried along"
    assert any(not torch.equal(x, base.whole(n).float()) for n, x in found.full.items())
    drawing = 2 * (2 + 2)  # each picture reads its prompt and none
    assert len(read) == 1 + len(job.store.captions) + 2 + drawing, "by the trial; each caption, the class and none once"


def _meta(source: PictureSource, trained: train.Trained) -> AdapterMeta:
    shapes = {t.name: t.shape for t in source.tensors}
    return AdapterMeta(
        family="sd",
        base_model=NAME,
        base_revision=source.revision,
        layers=[],
        lora=trained.meta,
        tensors={name: shapes[name] for name in [*trained.full, *trained.lora]},
        hyperparameters=wire.Hyperparameters(),
        created_at=0,
        trained_tokens=trained.tokens,
    )


def test_what_is_learned_does_not_hang_on_free_memory(make: Make, base: PictureBase, cpu: Device) -> None:
    job = make(CROSS, job={"concept": of_class(2)})
    ample = losses(ran(job, base, cpu))
    assert losses(ran(job, replace(base, free_bytes=lambda: 0), cpu)) == ample
    kept = []
    for short in (replace(base, free_bytes=lambda: 2**40), replace(base, free_bytes=lambda: 0)):
        learner = PictureLearner(job, short, cpu, trainable.build(job.selection, base, 5))
        for _ in learner.prepare():
            pass
        kept.append([learner._latents["class"].get(n) for n in range(2)])
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


def test_a_sample_picture_whose_numbers_overflow_is_left_out_and_the_run_goes_on(
    make: Make, source: PictureSource, cpu: Device
) -> None:
    base = sd.load(source, cpu)
    base.vae.decoder.conv_out.register_forward_hook(lambda _, __, out: out * float("nan"))
    items = ran(make(CROSS, job={"prompts": (Prompt("a red wall", ()),)}), base, cpu)
    assert end(items).course.last_answers == [""]


def test_a_disk_without_room_is_said_before_anything_is_written(
    source: PictureSource, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutOfMemory, match=r"take .* MB on the gpu's disk"):
        PictureStore.build(pictures, tmp_path / "store", source, 2**20)


def test_a_trained_text_encoder_is_read_anew_in_every_step(make: Make, base: PictureBase, cpu: Device) -> None:
    trained = end(ran(make(ENCODER), base, cpu))
    assert trained.lora
    assert all(name.startswith("text_encoder.encoder.layers.") and bool(x.b.any()) for name, x in trained.lora.items())


def test_a_trial_reads_as_many_texts_as_a_slice_may_where_the_encoder_is_trained(
    make: Make, base: PictureBase, cpu: Device
) -> None:
    for spec, expected in ((ENCODER, 3), (CROSS, 1)):
        job = make(spec)
        learner = PictureLearner(job, base, cpu, trainable.build(job.selection, base, 5))
        read: list[int] = []
        hook = base.text_encoder.register_forward_hook(lambda *_, read=read: read.append(1))
        try:
            learner.trial(8)
        finally:
            hook.remove()
        assert len(read) == expected, "two captions and none"


def test_pictures_of_the_class_are_the_models_own_and_each_has_its_turn(
    make: Make, base: PictureBase, cpu: Device
) -> None:
    job = make(CROSS, job={"concept": of_class(3, prior_weight=0.5)}, min_snr_gamma=0)
    learner = PictureLearner(job, base, cpu, trainable.build(job.selection, base, 5))
    for _ in learner.prepare():
        pass
    held = [learner._latents["class"].get(n) for n in range(3)]
    assert not torch.equal(held[0], held[1])
    priors = [learner._prior(row, 0) for row in range(6)]
    assert {p.weight for p in priors} == {0.5}
    assert {p.caption for p in priors} == {learner._captions["a wall"]}
    with torch.no_grad():
        both = learner.loss(range(2), 0)
        alone = learner._loss([learner._training(row, 0) for row in range(2)])
        prior = learner._loss([learner._prior(row, 0) for row in range(2)])
    assert both.item() == pytest.approx((alone + prior).item(), rel=1e-5)
    assert learner.seen(range(2)) == 4


def test_the_validation_loss_is_the_same_for_the_same_weights(make: Make, base: PictureBase, cpu: Device) -> None:
    job = make(CROSS, learning_rate=1e-9, early_stop_patience=2)
    job = replace(job, validation=job.store)
    found = [i.valid_loss for i in ran(job, base, cpu) if isinstance(i, train.Progress) and i.valid_loss is not None]
    assert len(found) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_tuned_pass_is_the_pass_of_a_model_with_those_weights(
    source: PictureSource, base: PictureBase, cpu: Device
) -> None:
    torch.manual_seed(1)
    linear = next(t for t in source.tensors if t.component == "unet" and t.part == "attn.self.q")
    conv = next(t for t in source.tensors if t.component == "unet" and t.part == "conv.resnet" and len(t.shape) == 4)
    pair = Lora(torch.randn(3, linear.shape[1]), torch.randn(linear.shape[0], 3), 0.5)
    weight = torch.randn(conv.shape)
    given = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 77, 32)
    with torch.no_grad():
        plain = base.unet(*given).sample
        tuned = Tuned({conv.name: weight}, {linear.name: pair})("unet", base.unet, *given).sample
        assert torch.equal(base.unet(*given).sample, plain)
        other = sd.load(source, cpu)
        other.whole(conv.name).copy_(weight)
        other.whole(linear.name).add_(pair.b @ pair.a, alpha=0.5)
        expected = other.unet(*given).sample
    assert torch.allclose(tuned, expected, atol=1e-4)
    assert not torch.allclose(tuned, plain, atol=1e-2)


def test_lora_on_a_convolution_of_one_by_one_is_a_matrix_by_place() -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Conv2d(6, 8, 1))
    pair = Lora(torch.randn(2, 6), torch.randn(8, 2), 0.7)
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        ours = Tuned({}, {"unet.0.weight": pair})("unet", module, x)
        module.get_parameter("0.weight").add_((0.7 * pair.b @ pair.a)[..., None, None])
        assert torch.allclose(ours, module(x), atol=1e-5)


def test_pictures_are_fitted_and_told_of(source: PictureSource, pictures: Path, tmp_path: Path) -> None:
    store = PictureStore.build(pictures, tmp_path / "store", source, SIDE)
    assert store.report.summary() == (
        "6 pictures at 32 x 32, 2 different captions; 5 are not square and lose their edges; 4 duplicates"
    )
    assert store.pixels(1).shape == (3, SIDE, SIDE)
    assert store.pixels(1)[0].min() == 1, "red"
    assert [store.caption(row) for row in range(2)] == ["a blue wall", "a red wall"]


def test_a_concept_names_pictures_without_captions(source: PictureSource, tmp_path: Path) -> None:
    path = tmp_path / "plain.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png("green", 64, 64))
    store = PictureStore.build(path, tmp_path / "store", source, SIDE, concept=wire.Concept(prompt="a sks wall"))
    assert store.captions == ("a sks wall",)


def test_a_caption_that_the_model_cannot_read_is_refused_by_file(source: PictureSource, tmp_path: Path) -> None:
    path = tmp_path / "long.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png("green", 64, 64))
        archive.writestr("metadata.jsonl", json.dumps({"file_name": "a.png", "text": "word " * 390}))
    with pytest.raises(BadDataset, match=r"a\.png"):
        PictureStore.build(path, tmp_path / "store", source, SIDE)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"resolution": 33}, "multiple of 4 up to 64"),
        ({"resolution": 128}, "multiple of 4 up to 64"),
        ({"packing": True}, "Only models of text have packing"),
        ({"early_stop_patience": 2}, "validation_file"),
    ],
)
def test_what_pictures_cannot_have_is_refused(
    asked: dict[str, Any], says: str, source: PictureSource, cpu: Device
) -> None:
    selection = layers.select(source.tensors, [wire.LayerSpec.model_validate(CROSS)], tied=False)
    wanted = wire.Hyperparameters.model_validate(asked)
    with pytest.raises(BadRequest, match=says):
        plans.resolve_pictures(wanted, source, selection, 4, cpu, validates=False)


@pytest.mark.parametrize("spec", [{**CROSS, "method": "dora"}, {**CROSS, "quantize": "4bit"}])
def test_ways_of_text_are_refused(spec: dict[str, Any], source: PictureSource, cpu: Device) -> None:
    selection = layers.select(source.tensors, [wire.LayerSpec.model_validate(spec)], tied=False)
    with pytest.raises(BadRequest, match="that makes pictures"):
        plans.resolve_pictures(wire.Hyperparameters(), source, selection, 4, cpu)
