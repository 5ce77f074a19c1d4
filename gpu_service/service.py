"""The whole service: puts the parts together, listens, enrols, serves; and says how it is doing.

`python -m gpu_service` and the notebook both run this, and differ in who stops it and where the status is shown.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from huggingface_hub.utils import disable_progress_bars

import logs
import wire
from gpu_service import device as devices
from gpu_service import openapi
from gpu_service import tunnel as tunnels
from gpu_service.answering import Tuned
from gpu_service.app import Parts, create_app
from gpu_service.artifacts import BlobCache, atomic_file
from gpu_service.batch import Pace
from gpu_service.device import Device
from gpu_service.dialout import DialOut
from gpu_service.errors import GpuError, OutOfMemory, RelayUnavailable
from gpu_service.gate import Gate
from gpu_service.hub import Download
from gpu_service.job import Jobs
from gpu_service.lease import Often
from gpu_service.link import Link, NotEnrolled
from gpu_service.models import Models
from gpu_service.reporter import JobView
from gpu_service.resident import AdapterFiles
from gpu_service.settings import BadSetting, Settings, one_tokenizing_thread
from gpu_service.tunnel import Kept, Tunnel
from gpu_service.worker import Worker

log = logging.getLogger("gpu_service")

GRACE_S = 3  # for answers under way when the service stops


@dataclass(frozen=True)
class Status:
    """How the service is doing now."""

    device: wire.Device
    models: list[wire.OfferedModel]
    jobs: list[JobView]
    active_requests: int
    url: str | None  # the public one
    tunnel: str
    link: str
    seconds_left: float | None


def listen(settings: Settings) -> socket.socket:
    """Raises BadSetting where the port can't be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol by name: asyncio turns Nagle's algorithm off only then, and with it answers come 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as exc:
        listener.close()
        raise BadSetting(
            f"port {settings.port} on {settings.host} can't be used ({exc.strerror}): "
            "stop what uses it, or set GPU_PORT to another"
        ) from exc
    return listener


def kept_secret(path: Path, given: str | None, prefix: str) -> str:
    """The setting, or what an earlier start wrote, or a new one, written for this user alone."""
    if given:
        return given
    if not path.exists():
        with atomic_file(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(f"{prefix}{secrets.token_urlsafe(32)}\n".encode())
        print(f"made {path}", flush=True)
    return path.read_text().strip()


class Service:
    def __init__(self, settings: Settings, listener: socket.socket, front: Tunnel | None = None) -> None:
        """`front` is a tunnel to something else, kept for as long as this runs: a lone notebook's relay."""
        self._settings, self._listener, self._front = settings, listener, front
        self._device: Device | None = None
        self._models: Models | None = None
        self._worker: Worker | None = None
        self._link: Link | None = None
        self._jobs: Jobs | None = None
        self._tunnel: Kept | None = None
        self.goodbye = "stopped by its owner"
        self.download: Download | None = None  # of a model, while it is starting

    @property
    def key_file(self) -> Path:
        return self._settings.data_dir / "gpu.key"

    def status(self) -> Status | None:
        """None while it is starting. May be called from any thread."""
        if not (self._device and self._models and self._worker and self._tunnel):
            return None
        ends_at = self._settings.runtime_ends_at
        return Status(
            device=self._device.wire(),
            models=self._models.offered(),
            jobs=self._jobs.views() if self._jobs else [],
            active_requests=self._worker.active_requests,
            url=self._tunnel.url,
            tunnel=self._tunnel.status(),
            link=self._link.status() if self._link else "stands alone: no relay",
            seconds_left=ends_at - time.time() if ends_at else None,
        )

    async def run(self) -> None:
        """Until cancelled; then answers under way are ended, and nothing is left running. Raises BadSetting."""
        settings = self._settings
        asyncio.get_running_loop().set_exception_handler(logs.loop_failed)
        disable_progress_bars()  # neither a log nor a notebook's cell is the place
        one_tokenizing_thread()
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        with locked(settings.data_dir):
            await self._run(settings)

    async def _run(self, settings: Settings) -> None:
        key = kept_secret(self.key_file, settings.key, "sk-gpu-")
        instance = kept_secret(settings.data_dir / "instance", None, "")
        device = self._device = devices.choose(settings)
        log.info("%s in %s: %s", device.name, device.precision.name, device.precision.why)
        models = self._models = await asyncio.to_thread(
            Models, settings.models, device, settings.hf_token, settings.models_dir, self._downloading
        )
        cache = BlobCache(settings.data_dir / "blobs", settings.blob_bytes)
        worker = self._worker = Worker(settings, device, models)
        active = lambda: worker.active_requests  # noqa: E731
        link = self._link = Link(settings, instance, device, models, active) if settings.relay_url else None
        often = Often(every_s=settings.checkpoint_every_s, runtime_ends_at=settings.runtime_ends_at)
        folder = settings.data_dir / "jobs"
        tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizing")
        packing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="packing")
        pace = Pace(rows=settings.batch_rows, every_s=settings.checkpoint_every_s)
        parts = worker, models, device, cache, tokenizing, pace, often
        jobs = self._jobs = Jobs(folder, link, *parts) if link else None
        async with contextlib.AsyncExitStack() as stack:  # unwinds from the last to the first
            stack.enter_context(tokenizing)
            stack.enter_context(packing)
            if link:
                stack.push_async_callback(link.aclose)
            worker.start()
            stack.push_async_callback(asyncio.to_thread, worker.stop)
            for model in models.ids():
                try:
                    await worker.load(model)
                except OutOfMemory as exc:  # its upper layers can be trained all the same, streamed
                    if models.makes_pictures(model):
                        raise BadSetting(f"GPU_MODELS names '{model}': {exc.message}") from exc
                    log.warning("%s Until there is room it only trains, with streamed layers.", exc.message)
                except GpuError as exc:
                    raise BadSetting(f"GPU_MODELS names '{model}': {exc.message}") from exc
            identity = link.identity if link else lambda: None
            app = create_app(
                Parts(
                    gate=Gate(key, settings.max_body_bytes, identity),
                    identity=identity,
                    device=device,
                    models=models,
                    worker=worker,
                    tokenizing=tokenizing,
                    packing=packing,
                    tuned=lambda model: tuned(model, link, cache),
                )
            )
            openapi.truthful(app)
            server = Server(
                uvicorn.Config(
                    app, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_S, lifespan="off"
                )
            )
            answering = asyncio.create_task(server.serve(sockets=[self._listener]))
            stack.push_async_callback(asyncio.wait, {answering})
            stack.callback(setattr, server, "should_exit", True)

            def dialled() -> Tunnel:
                assert link
                assert settings.relay_url
                return DialOut(settings.relay_url, link, app)

            own = Kept(tunnels.choose(settings, self._local_url(), dialled), link.moved if link else lambda url: None)
            self._tunnel = Kept(self._front, lambda url: None) if self._front else own
            kept = {own, self._tunnel}
            for tunnel in kept:
                stack.push_async_callback(tunnel.close)
                await tunnel.open()
            stack.callback(worker.refuse)  # answers under way end now, rather than at the end of the grace
            if link and jobs:
                stack.push_async_callback(self._say_goodbye, link)
                stack.push_async_callback(jobs.aclose)
            log.info("serving %s on %s", ", ".join(models.ids()) or "no model", self._local_url())
            lasting = [answering, *(asyncio.create_task(tunnel.run()) for tunnel in kept)]
            if link and jobs:
                lasting.append(asyncio.create_task(link.run(jobs)))
            stack.push_async_callback(_cancel, lasting[1:])
            done, _ = await asyncio.wait(lasting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    def _downloading(self, download: Download) -> None:
        self.download = download

    async def _say_goodbye(self, link: Link) -> None:
        await link.goodbye(self.goodbye)

    def _local_url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        return f"http://{host}:{port}"


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two services in one folder would be one gpu to the relay, and take each other's jobs. Raises BadSetting."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise BadSetting(
                f"another gpu service uses the folder {folder}: stop it, or set GPU_DATA_DIR to another folder"
            ) from exc
        yield


async def tuned(model: str, link: Link | None, cache: BlobCache) -> Tuned | None:
    """A tuned model by id, its files fetched. Only a relay has any."""
    found = await link.tuned(model) if link else None
    if link is None or found is None:
        return None
    with cache.keep(*(ref.sha256 for ref in found.adapter.files)):
        try:
            files = {ref.name: await link.fetch(ref, cache) for ref in found.adapter.files}
        except NotEnrolled as exc:
            raise RelayUnavailable("This gpu is enrolling with its relay: try again in a moment.") from exc
    content = "-".join(ref.sha256 for ref in found.adapter.files)
    return Tuned(found.adapter.base_model, AdapterFiles(content, files))


class Server(uvicorn.Server):
    """Signals are ours: uvicorn's own handling would end the process before the leases are handed back."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
