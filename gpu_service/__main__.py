"""`python -m gpu_service`: builds everything, listens, enrols, serves until it is told to stop."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Before transformers is imported: no progress bars and no hints in a service's log.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one request a time; its threads would fight the model's

import uvicorn

from gpu_service import device as devices
from gpu_service.app import Parts, Tuned, create_app
from gpu_service.artifacts import BlobCache, atomic_file
from gpu_service.gate import Gate
from gpu_service.job import Jobs
from gpu_service.link import Link
from gpu_service.models import Models
from gpu_service.settings import BadSetting, Settings, from_env
from gpu_service.worker import AdapterFiles, Worker

log = logging.getLogger("gpu_service")

GRACE_S = 3  # for answers under way when the service stops


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        settings = from_env()
        listener = listen(settings)
        with contextlib.closing(listener):
            return asyncio.run(run(settings, listener))
    except BadSetting as exc:
        print(f"gpu_service: {exc}", file=sys.stderr)
        return 2


def listen(settings: Settings) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
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


async def run(settings: Settings, listener: socket.socket) -> int:
    """Serve until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving, stopped = asyncio.create_task(serve(settings, listener)), asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if stopped.done():
        log.info("stopping")
        serving.cancel()
    stopped.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    return 0


async def serve(settings: Settings, listener: socket.socket) -> None:
    """Runs until cancelled; then answers under way are ended, and nothing is left running."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    key = kept_secret(settings.data_dir / "gpu.key", settings.key, "sk-gpu-")
    instance = kept_secret(settings.data_dir / "instance", None, "")
    device = devices.choose(settings)
    log.info("%s in %s: %s", device.name, device.precision.name, device.precision.why)
    models = await asyncio.to_thread(Models, settings.models, device, settings.hf_token)
    cache = BlobCache(settings.data_dir / "blobs", settings.blob_cache_bytes)
    worker = Worker(settings, device, models)
    link = Link(settings, instance, device, models, lambda: worker.active_requests) if settings.relay_url else None
    jobs = Jobs(settings.data_dir / "jobs", link, worker, models, device, cache) if link else None
    async with contextlib.AsyncExitStack() as stack:  # unwinds from the last to the first
        tokenizing = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizing"))
        if link:
            stack.push_async_callback(link.aclose)
        worker.start()
        stack.push_async_callback(asyncio.to_thread, worker.stop)
        for model in models.ids():
            await worker.load(model)
        identity = link.identity if link else lambda: None
        app = create_app(
            Parts(
                gate=Gate(key, settings.max_body_bytes, identity),
                identity=identity,
                device=device,
                models=models,
                worker=worker,
                tokenizing=tokenizing,
                tuned=lambda model: tuned(model, link, cache),
            )
        )
        server = Server(
            uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S, lifespan="off"
            )
        )
        answering = asyncio.create_task(server.serve(sockets=[listener]))
        stack.push_async_callback(asyncio.wait, {answering})
        stack.callback(setattr, server, "should_exit", True)
        stack.callback(worker.refuse)  # answers under way end now, rather than at the end of the grace
        if jobs:
            stack.push_async_callback(jobs.aclose)
        log.info("serving %s on http://%s:%d", ", ".join(models.ids()) or "no model", *listener.getsockname()[:2])
        await asyncio.gather(answering, *([link.run(jobs)] if link and jobs else []))


async def tuned(model: str, link: Link | None, cache: BlobCache) -> Tuned | None:
    """A tuned model by id, its files fetched. Only a relay has any."""
    found = await link.tuned(model) if link else None
    if link is None or found is None:
        return None
    with cache.keep(*(ref.sha256 for ref in found.adapter.files)):
        files = {ref.name: await link.fetch(ref, cache) for ref in found.adapter.files}
    content = "-".join(ref.sha256 for ref in found.adapter.files)
    return Tuned(found.adapter.base_model, AdapterFiles(content, files))


class Server(uvicorn.Server):
    """Signals are ours: uvicorn's own handling would end the process before the leases are handed back."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


if __name__ == "__main__":
    sys.exit(main())
