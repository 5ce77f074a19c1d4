"""Pictures through the relay with the official client. A tiny model with random weights."""

import base64
import io
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.end_to_end.stack import Gpu, Relay, running
from tests.gpu_service import tiny_sd
from tests.gpu_service.tiny_sd import NAME


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
            _is_described_and_not_trained(client)


def _is_described_and_not_trained(client: openai.OpenAI) -> None:
    told = client.get(f"/models/{NAME}/layers?component=text_encoder", cast_to=dict[str, Any])
    assert told["component"] == "text_encoder"
    assert told["n_layers"] == 2
    spec = {"method": "full", "parts": ["attn.cross"], "layers": "down.0,up"}
    asked = {"model": NAME, "layers": spec}
    preview = client.post("/layers/preview", body=asked, cast_to=dict[str, Any])
    assert {t["block"] for t in preview["tensors"]} == {"down.0", "up.1"}
    assert f"of {preview['total_tensors']} tensors" in preview["summary"]
    assert any("not trained yet" in note for note in preview["notes"])
    with pytest.raises(openai.BadRequestError, match="not trained yet"):
        client.fine_tuning.jobs.create(model=NAME, training_file="file-none")
