"""Settings, finding models, and how the process starts and stops, seen from outside."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
import torch

from gpu_service import device as devices
from gpu_service import settings
from gpu_service.device import Device, quick_vectors
from gpu_service.models import Models, find
from gpu_service.service import Service, listen, locked
from gpu_service.settings import BadSetting, Settings, from_env
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"GPU_PORT": "eighty"}, "GPU_PORT"),
        ({"GPU_DEVICE": "tpu"}, "cpu, cuda, mps"),
        ({"GPU_PRECISION": "fp8"}, "fp32"),
        ({"GPU_RELAY_URL": "relay.example"}, "https://"),
        ({"GPU_RELAY_URL": "https://relay.example"}, "GPU_ENROL_TOKEN"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(env: dict[str, str], says: str) -> None:
    with pytest.raises(BadSetting, match=says) as caught:
        from_env(env)
    assert "\n" not in str(caught.value)


def test_every_setting_stands_in_the_documentation() -> None:
    text = (ROOT / "docs/settings.md").read_text()
    for name, meaning in settings.TABLE.items():
        assert f"| `{name}` |" in text, name
        assert meaning in text, name


def test_an_argument_is_answered_with_the_settings_and_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu_service", "--help"]
    env = {**os.environ, "GPU_DATA_DIR": str(tmp_path / "data")}
    helped = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert helped.returncode == 0
    assert all(name in helped.stdout for name in settings.TABLE)
    assert not (tmp_path / "data").exists()


def test_a_name_that_is_neither_folder_nor_on_the_hub_says_what_to_check() -> None:
    with pytest.raises(BadSetting, match="Check the name and the network"):
        find("nobody/nothing-of-that-name")
    with pytest.raises(BadSetting, match="no folder"):
        find("name=/no/such/folder")


def test_an_architecture_that_is_not_covered_is_refused_by_name(tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt"
    shutil.copytree(tiny_dir, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}))
    with pytest.raises(BadSetting, match=r"'gpt_neox'.*llama"):
        find(str(folder))


def test_pickled_weights_are_never_loaded(tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_dir, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadSetting, match="pickled weights"):
        find(str(folder))


def test_the_revision_follows_the_content_and_not_the_place(tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dir, tmp_path / "copy")
    shutil.copytree(tiny_dir, tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert find(str(tmp_path / "copy")).revision == find(str(tiny_dir)).revision
    assert find(str(tmp_path / "other")).revision != find(str(tiny_dir)).revision


def test_a_folder_can_be_given_a_name_and_weights_are_read_once(tiny_dir: Path, cpu: Device) -> None:
    models = Models((f"my-model={tiny_dir}",), cpu)
    assert models.ids() == ["my-model"]
    assert not models.offered()[0].loaded
    assert models.load("my-model") is models.load("my-model")
    assert models.offered()[0].loaded


def start(tmp_path: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpu_service"],
        cwd=ROOT,
        env={**os.environ, "GPU_DATA_DIR": str(tmp_path / "gpu"), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(tmp_path, GPU_PORT=str(port))
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output.strip().count("\n") == 0
    assert str(port) in output
    assert "GPU_PORT" in output


def test_a_second_service_in_the_same_folder_says_so_and_harms_nothing(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(BadSetting, match="GPU_DATA_DIR"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_it_starts_alone_keeps_its_key_to_itself_and_stops_quickly_on_sigterm(tiny_dir: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(tmp_path, GPU_PORT=str(port), GPU_MODELS=f"tiny={tiny_dir}")
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            wait_until_up(http)
            key_file = tmp_path / "gpu" / "gpu.key"
            assert key_file.stat().st_mode & 0o777 == 0o600
            headers = {"authorization": f"Bearer {key_file.read_text().strip()}"}
            assert http.get("/v1/models", headers=headers).json()["data"][0]["id"] == "tiny"
            body = {"model": "tiny", "prompt": "Once", "max_tokens": 400, "stream": True}
            with http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                frames = response.iter_lines()
                next(frames)
                stopped = time.monotonic()
                process.send_signal(signal.SIGTERM)
                rest = [line for line in frames if line]
        output, _ = process.communicate(timeout=20)
        assert time.monotonic() - stopped < 8
        assert process.returncode == 0
        assert "gpu_stopping" in rest[-1], "the caller is told"
        assert "Traceback" not in output
        assert headers["authorization"].split()[1] not in output, "no secret in the log"
    finally:
        process.kill()
        process.wait()


def wait_until_up(http: httpx2.Client) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            http.get("/healthz").raise_for_status()
            return
        except httpx2.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_precision_is_chosen_with_a_reason_and_can_be_set() -> None:
    chosen = devices.choose(Settings(device="cpu")).precision
    assert chosen.name in ("bf16", "fp32")
    assert ("AMX" in chosen.why or "AVX512-BF16" in chosen.why) == (chosen.name == "bf16")
    assert devices.choose(Settings(device="cpu", precision="fp16")).precision.scaler


def test_a_step_of_one_row_leaves_the_library_as_it_was() -> None:
    cpu, before = torch.device("cpu"), torch.backends.mkldnn.enabled
    with quick_vectors(1, torch.bfloat16, cpu):
        assert not torch.backends.mkldnn.enabled
    for rows, dtype in ((8, torch.bfloat16), (1, torch.float32)):
        with quick_vectors(rows, dtype, cpu):
            assert torch.backends.mkldnn.enabled == before
    assert torch.backends.mkldnn.enabled == before


async def test_a_model_without_room_is_offered_for_training_with_streamed_layers(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices.Device, "free_bytes", lambda self: 100_000)
    asked = Settings(device="cpu", port=0, data_dir=tmp_path / "gpu", models=(f"tiny={tiny_dir}",), key="sk-gpu-test")
    with contextlib.closing(listen(asked)) as listener:
        running = asyncio.create_task(Service(asked, listener).run())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            async with httpx2.AsyncClient(
                base_url=url, timeout=30, headers={"authorization": "Bearer sk-gpu-test"}, trust_env=False
            ) as http:
                with httpx2.Client(base_url=url, trust_env=False) as outside:
                    await asyncio.to_thread(wait_until_up, outside)
                (model,) = (await http.get("/v1/models")).json()["data"]
                assert not model["loaded"]
                body = {"model": "tiny", "layers": {"layers": "last:1"}}
                preview = (await http.post("/v1/layers/preview", json=body)).json()
                assert preview["stream_layers"]
                assert any("No time is said" in note for note in preview["notes"])
                refused = await http.post("/v1/completions", json={"model": "tiny", "prompt": "Once"})
                assert "MB are free on this gpu" in refused.json()["error"]["message"]
        finally:
            running.cancel()
            await asyncio.wait({running})
