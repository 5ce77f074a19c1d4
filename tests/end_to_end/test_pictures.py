"""Pictures through the relay with the official client: drawn, streamed, fine-tuned, and drawn with what came of it."""

import base64
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image, ImageDraw

from demo import diffusion
from tests.end_to_end.stack import Gpu, Relay, ended, follow, running
from tests.gpu_service import tiny_sd
from tests.gpu_service.tiny_sd import NAME

pytestmark = [
    pytest.mark.timeout(600),  # it trains; a busy machine takes its time
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # some of diffusers' schedulers
]

LAYERS = [
    {"method": "lora", "parts": ["attn", "mlp"], "rank": 16},
    {"method": "full", "parts": ["norm"], "layers": "up"},
]
CONCEPT = {"prompt": "a zorb", "class_prompt": "a balloon", "class_pictures": 4}


def test_pictures_are_drawn_and_streamed_through_the_relay(tmp_path: Path) -> None:
    relay = Relay(tmp_path / "relay")
    with running(relay):
        gpu = Gpu(tmp_path / "gpu", {NAME: tiny_sd.make(tmp_path / NAME)}, relay)
        with running(gpu):
            relay.serves(NAME)
            client = relay.client()
            listed = {model.id: model for model in client.models.list()}
            assert listed[NAME].model_dump()["family"] == "sd"
            extra = {"seed": 1, "steps": 6}
            answer = client.images.generate(model=NAME, prompt="a red heart", extra_body=extra)
            stream = client.images.generate(
                model=NAME, prompt="a red heart", stream=True, partial_images=2, extra_body={**extra, "wait_s": 60}
            )
            events = list(stream)
            assert [event.type.rpartition(".")[2] for event in events] == [
                "partial_image",
                "partial_image",
                "completed",
            ]
            assert answer.data
            assert answer.data[0].b64_json == events[-1].b64_json
            picture = Image.open(io.BytesIO(base64.b64decode(events[-1].b64_json)))
            assert picture.size == (tiny_sd.SIDE, tiny_sd.SIDE)
            with pytest.raises(openai.BadRequestError, match="pictures"):
                client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "hello"}])
            _is_described(client)


def _is_described(client: openai.OpenAI) -> None:
    told = client.get(f"/models/{NAME}/layers?component=text_encoder", cast_to=dict[str, Any])
    assert told["component"] == "text_encoder"
    assert told["n_layers"] == 2
    spec = {"method": "full", "parts": ["attn.cross"], "layers": "down.0,up"}
    asked = {"model": NAME, "layers": spec}
    preview = client.post("/layers/preview", body=asked, cast_to=dict[str, Any])
    assert {t["block"] for t in preview["tensors"]} == {"down.0", "up.1"}
    assert f"of {preview['total_tensors']} tensors" in preview["summary"]


def zorb(number: int) -> Image.Image:
    """A ring in a ring in a ring, that no picture of the demo model's training shows."""
    random = np.random.default_rng(number)
    x, y = 40 + random.integers(-4, 5, 2)
    picture = Image.new("RGB", (80, 80), "white")
    draw = ImageDraw.Draw(picture)
    for radius, colour in ((30, (20, 90, 160)), (21, (250, 250, 250)), (13, (240, 140, 20)), (5, (20, 90, 160))):
        draw.ellipse((int(x - radius), int(y - radius), int(x + radius), int(y + radius)), fill=colour)
    return picture


def a_dozen() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(12):
            picture = io.BytesIO()
            zorb(number).save(picture, "PNG")
            archive.writestr(f"zorbs/{number:02}.png", picture.getvalue())
    return file.getvalue()


def distance(picture: Image.Image) -> float:
    """To the nearest picture of the concept: root of the mean squared difference of 16 x 16 squares' colours, 0 to 255.

    Coarse on purpose: it sees what is where in which colour, and no sharpness.
    """

    def coarse(image: Image.Image) -> np.ndarray[Any, Any]:
        return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), np.float32)

    mine = coarse(picture)
    return min(float(np.sqrt(((mine - coarse(zorb(number))) ** 2).mean())) for number in range(12))


def drawn(client: openai.OpenAI, model: str, prompt: str) -> list[Image.Image]:
    extra = {"seed": 11, "steps": 20}
    answer = client.images.generate(model=model, prompt=prompt, n=4, extra_body=extra)
    assert answer.data
    return [Image.open(io.BytesIO(base64.b64decode(picture.b64_json or ""))) for picture in answer.data]


def test_a_dozen_pictures_teach_a_new_concept_and_nothing_else_is_touched(tmp_path: Path) -> None:
    """The demo model, LoRA on the UNet's matrices and some norms in full; the word is spelt, for no caption had it."""
    relay = Relay(tmp_path / "relay")
    with running(relay):
        gpu = Gpu(tmp_path / "gpu", {diffusion.NAME: diffusion.FOLDER}, relay, GPU_PRECISION="fp32")
        with running(gpu):
            relay.serves(diffusion.NAME)
            client = relay.client()
            before = drawn(client, diffusion.NAME, "a zorb")
            file = client.files.create(file=("zorbs.zip", a_dozen()), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(
                model=diffusion.NAME,
                training_file=file.id,
                seed=3,
                suffix="zorb",
                extra_body={
                    "concept": CONCEPT,
                    "layers": LAYERS,
                    "hyperparameters": {"n_epochs": 45, "batch_size": 6, "learning_rate": 3e-3},
                    "sample_prompts": ["a zorb", "red heart"],
                },
            )
            job = follow(relay, job.id, ended, 400)
            assert job.status == "succeeded", job.error
            assert job.fine_tuned_model
            after = drawn(client, job.fine_tuned_model, "a zorb")
            far, near = (np.mean([distance(p) for p in pictures]) for pictures in (before, after))
            assert near < 0.65 * far, f"the pictures moved towards the concept: {far:.1f} -> {near:.1f}"
            hearts = [drawn(client, model, "red heart") for model in (diffusion.NAME, job.fine_tuned_model)]
            assert np.mean([distance(p) for p in hearts[1]]) > 1.3 * near, "and what else it knew is no zorb"
            again = drawn(client, diffusion.NAME, "a zorb")
            assert [p.tobytes() for p in again] == [p.tobytes() for p in before], "the base model draws as before"
            _tells_of_pictures(client, job.id)
            asked = {"model": diffusion.NAME, "layers": LAYERS}
            preview = client.post("/layers/preview", body=asked, cast_to=dict[str, Any])
            report = client.get(f"/fine_tuning/jobs/{job.id}/report", cast_to=dict[str, Any])
            changed = {tensor["name"] for tensor in report["changes"]["tensors"]}
            assert changed == {tensor["name"] for tensor in preview["tensors"]}, "what was selected, and nothing else"
            assert report["makes"] == "pictures"
            assert report["answers"][0]["after"].startswith("data:image/webp;base64,")


def _tells_of_pictures(client: openai.OpenAI, job_id: str) -> None:
    events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
    data = [event.model_dump().get("data") or {} for event in events]
    samples = [d["samples"] for d in data if "samples" in d]
    assert len(samples) >= 2
    for sample in samples[0]:
        assert sample["answer"].startswith("data:image/webp;base64,")
    Image.open(io.BytesIO(base64.b64decode(samples[0][0]["answer"].partition(",")[2]))).load()
    assert any("pictures" in d and d.get("train_loss") for d in data)


def test_a_lora_goes_out_to_diffusers_and_comes_back_as_the_same_model(tmp_path: Path) -> None:
    """Over the relay's own routes; what diffusers draws with the file is what the tuned model draws here."""
    relay, folder = Relay(tmp_path / "relay"), tiny_sd.make(tmp_path / NAME)
    with running(relay):
        gpu = Gpu(tmp_path / "gpu", {NAME: folder}, relay, GPU_PRECISION="fp32")
        with running(gpu):
            relay.serves(NAME)
            client, http = relay.client(), relay.http()
            file = client.files.create(file=("zorbs.zip", a_dozen()), purpose="fine-tune")
            layers = [
                {"method": "lora", "parts": ["attn", "mlp"], "rank": 4},
                {"method": "lora", "parts": ["attn"], "component": "text_encoder", "rank": 2},
            ]
            job = client.fine_tuning.jobs.create(
                model=NAME,
                training_file=file.id,
                seed=3,
                extra_body={
                    "concept": {"prompt": "a zorb"},
                    "layers": layers,
                    "hyperparameters": {"n_epochs": 4, "batch_size": 6, "learning_rate": 0.05},
                },
            )
            job = follow(relay, job.id, ended, 300)
            assert job.fine_tuned_model, job.error
            asked = {"seed": 5, "steps": 4, "scheduler": "ddim"}
            [ours] = [Image.open(io.BytesIO(base64.b64decode(d.b64_json or ""))) for d in _data(client, job, asked)]
            for form in ("diffusers", "kohya"):
                exported = http.get(f"/v1/models/{job.fine_tuned_model}/export?format={form}").raise_for_status()
                assert exported.headers["content-disposition"].endswith(".safetensors")
                lora = tmp_path / f"{form}.safetensors"
                lora.write_bytes(exported.content)
                pipeline = tiny_sd.oracle(folder)
                pipeline.load_lora_weights(str(lora))
                pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
                drawn = pipeline("a zorb", num_inference_steps=4, generator=torch.Generator().manual_seed(5)).images[0]
                assert _near(drawn, ours)
                sent = {"file": (lora.name, lora.read_bytes())}
                back = http.post("/v1/models/import", data={"model": NAME}, files=sent).raise_for_status().json()
                again = _data(client, back["id"], asked)
                assert _near(Image.open(io.BytesIO(base64.b64decode(again[0].b64_json or ""))), ours)
            refused = http.post("/v1/models/import", data={"model": NAME}, files={"file": ("x.zip", a_dozen())})
            assert refused.json()["error"]["code"] == "cannot_import"


def _data(client: openai.OpenAI, of: Any, asked: dict[str, Any]) -> list[Any]:
    model = of if isinstance(of, str) else of.fine_tuned_model
    answer = client.images.generate(model=model, prompt="a zorb", extra_body=asked)
    assert answer.data
    return list(answer.data)


def _near(one: Image.Image, other: Image.Image) -> bool:
    differ = np.asarray(one.convert("RGB")).astype(int) - np.asarray(other.convert("RGB")).astype(int)
    return int(np.abs(differ).max()) <= 2
