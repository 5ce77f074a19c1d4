"""A gpu service on a real port, in this event loop, so that a test can also look at its worker."""

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import uvicorn
from safetensors.torch import load_file, save_file

from gpu_service import device as devices
from gpu_service import models
from gpu_service.answering import Tuned
from gpu_service.app import Parts, create_app
from gpu_service.device import Device
from gpu_service.gate import Gate, Identity
from gpu_service.models import Base, Models
from gpu_service.settings import Settings
from gpu_service.worker import Worker
from tests.conftest import ROOT, TINY

KEY = "sk-gpu-of-the-test"


@pytest.fixture(scope="session")
def cpu() -> Device:
    return devices.choose(Settings(device="cpu", precision="fp32"))


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path, cpu: Device) -> Base:
    return Models((f"{TINY}={tiny_dir}",), cpu).load(TINY)


@pytest.fixture(scope="session")
def smol(smol_dir: Path, cpu: Device) -> Base:
    return Models((str(smol_dir),), cpu).load(smol_dir.name)


@pytest.fixture(scope="session")
def gpt2(cpu: Device) -> Base:
    return models.read_base(models.find(str(ROOT / "demo/gpt2/model")), cpu)


@pytest.fixture(scope="session")
def flat_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, to which all tokens are equally likely: what is written is the sampling's doing alone."""
    folder = tmp_path_factory.mktemp("flat") / TINY
    shutil.copytree(tiny_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def worker(tiny_dir: Path, cpu: Device) -> Iterator[Worker]:
    models = Models((f"{TINY}={tiny_dir}",), cpu)
    worker = Worker(Settings(), cpu, models)
    worker.start()
    yield worker
    worker.stop()


@dataclass
class Gpu:
    http: httpx2.AsyncClient
    url: str
    worker: Worker
    identity: Identity | None = None  # as if a relay had enrolled it


@asynccontextmanager
async def run_gpu(tiny_dir: Path, cpu: Device, settings: Settings, *more: str) -> AsyncIterator[Gpu]:
    models = Models((f"{TINY}={tiny_dir}", *more), cpu)
    worker = Worker(settings, cpu, models)
    running: Gpu

    async def no_tuned(model: str) -> Tuned | None:
        return None

    with ThreadPoolExecutor(max_workers=1) as tokenizing, ThreadPoolExecutor(max_workers=1) as packing:
        gate = Gate(KEY, settings.max_body_bytes, lambda: running.identity)
        parts = Parts(
            gate=gate,
            identity=lambda: running.identity,
            device=cpu,
            models=models,
            worker=worker,
            tokenizing=tokenizing,
            packing=packing,
            tuned=no_tuned,
        )
        listener = socket.create_server(("127.0.0.1", 0))  # listening: early requests wait in its backlog
        server = uvicorn.Server(uvicorn.Config(create_app(parts), log_level="warning", lifespan="off"))
        worker.start()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=60) as http:
            running = Gpu(http, url, worker)
            yield running
        server.should_exit = True
        await serving
        worker.stop()


@pytest.fixture(scope="session")
async def gpu(tiny_dir: Path, cpu: Device) -> AsyncIterator[Gpu]:
    async with run_gpu(tiny_dir, cpu, Settings()) as running:
        yield running
