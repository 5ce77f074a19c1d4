"""A relay and gpus as real processes on free ports, started, asked and killed as a test needs it."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai

from tests.conftest import ROOT

START_S = 240.0  # a loaded machine imports torch slowly
STOP_S = 15.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Service:
    """One process of `python -m <module>`, which may be started again on the same port and data."""

    def __init__(self, module: list[str], folder: Path, env: dict[str, str]) -> None:
        self.folder, self._module, self._env = folder, module, env
        self._log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self._clients = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RELAY_", "GPU_"))}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self._module],
                cwd=ROOT,
                env={**clean, **self._env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """As when the power fails."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """As Ctrl-C does. Returns the exit status."""
        assert self.process
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_S)

    def close(self) -> None:
        self.kill()
        self._clients.close()

    def openai(self, url: str, key: str) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
        self._clients.callback(client.close)
        return client

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, true: Callable[[], Any], within_s: float = START_S) -> Any:
        """What `true` returns, once it returns something. Fails with the log when it takes too long."""
        deadline = time.monotonic() + within_s
        while True:
            with suppress(httpx2.TransportError):
                if found := true():
                    return found
            assert self.process
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.log()[-3000:]}"
            assert time.monotonic() < deadline, self.log()[-3000:]
            time.sleep(0.05)


class Relay(Service):
    def __init__(self, folder: Path, **settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        env = {
            "RELAY_PORT": str(self.port),
            "RELAY_DATA_DIR": str(folder / "data"),
            "RELAY_ALLOW_LOOPBACK_GPUS": "1",
            "RELAY_HEARTBEAT_S": "1",
            "RELAY_LEASE_S": "6",
            **settings,
        }
        super().__init__(["relay", "serve"], folder, env)

    def start(self) -> None:
        super().start()
        self.wait(lambda: httpx2.get(f"{self.url}/healthz").is_success)

    @property
    def admin_key(self) -> str:
        return (self.folder / "data/admin.key").read_text().strip()

    @property
    def enrol_token(self) -> str:
        return (self.folder / "data/enrol.token").read_text().strip()

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.admin_key}"}

    def client(self, key: str | None = None) -> openai.OpenAI:
        return self.openai(self.url, key or self.admin_key)

    def http(self) -> httpx2.Client:
        client = httpx2.Client(base_url=self.url, headers=self.headers, timeout=120)
        self._clients.callback(client.close)
        return client

    def serves(self, model: str, within_s: float = START_S) -> None:
        """Until a gpu answers for it."""

        def listed() -> bool:
            found = httpx2.get(f"{self.url}/v1/models", headers=self.headers).json()["data"]
            return any(m["id"] == model and m["available"] for m in found)

        self.wait(listed, within_s)


class Gpu(Service):
    def __init__(self, folder: Path, models: dict[str, Path], relay: Relay | None = None, **settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        env = {
            "GPU_PORT": str(self.port),
            "GPU_DATA_DIR": str(folder / "data"),
            "GPU_DEVICE": "cpu",
            "GPU_PRECISION": "fp32",  # rows repeat in any batch, so answers can be compared
            "GPU_MODELS": ",".join(f"{name}={path}" for name, path in models.items()),
            "GPU_TUNNEL": "none",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # threads of several processes that spin for two cores would slow each other down
        }
        if relay:
            env |= {
                "GPU_RELAY_URL": relay.url,
                "GPU_ENROL_TOKEN": relay.enrol_token,
                "GPU_PUBLIC_URL": self.url,
            }
        super().__init__(["gpu_service"], folder, {**env, **settings})

    @property
    def key(self) -> str:
        return (self.folder / "data/gpu.key").read_text().strip()

    def client(self) -> openai.OpenAI:
        return self.openai(self.url, self.key)

    def is_up(self) -> None:
        self.wait(lambda: httpx2.get(f"{self.url}/healthz").is_success)


@contextmanager
def running(*services: Service) -> Iterator[None]:
    """Whatever happens, none of them outlives the test."""
    with ExitStack() as stack:
        for service in services:
            stack.callback(service.close)
        for service in services:
            service.start()
        yield


def follow(relay: Relay, job_id: str, until: Callable[[Any], bool], within_s: float = 600) -> Any:
    """The job, once `until` holds for it."""
    client = relay.client()

    def look() -> Any:
        try:
            job = client.fine_tuning.jobs.retrieve(job_id)
        except openai.APIConnectionError:
            return None
        return job if until(job) else None

    return relay.wait(look, within_s)


def ended(job: Any) -> bool:
    return job.status in ("succeeded", "failed", "cancelled")


async def gather(*calls: Callable[[], Any]) -> list[Any]:
    """Blocking calls side by side."""
    return list(await asyncio.gather(*(asyncio.to_thread(call) for call in calls)))
