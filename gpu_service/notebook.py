"""`serve()`, which the notebook calls: settings from wherever they are, the service in a thread, a live status.

The service has an event loop of its own in a thread of its own, so the kernel's loop needs no patching, and an
interrupt reaches this thread alone (docs/decisions/0007-the-notebook-serves-from-a-thread.md).
"""

import asyncio
import contextlib
import getpass
import html
import logging
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

import logs
from gpu_service import places
from gpu_service import tunnel as tunnels
from gpu_service.lone import LoneRelay, RelayDied, build_page
from gpu_service.places import Place
from gpu_service.service import Service, Status, listen
from gpu_service.settings import TABLE, BadSetting, Settings, environment, from_env
from gpu_service.tunnel import NoTunnel, TunnelFailed

REFRESH_S = 1.0
PLAIN_S = 10.0  # between two prints where nothing can be refreshed in place
STOP_S = 30.0
SMALL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SECRETS = ("GPU_RELAY_URL", "GPU_ENROL_TOKEN", "NGROK_AUTHTOKEN", "HF_TOKEN")


def serve(**given: str) -> None:
    """Until it is interrupted; then it may be called again. Settings by name, as in docs/settings.md.

    A setting that is empty here comes from the environment, else from the place's secrets; `"ask"` asks for it.
    """
    try:
        with _terminable():
            _serve(given)
    except (BadSetting, TunnelFailed, RelayDied) as exc:
        print(f"\n{exc}")
    except KeyboardInterrupt:
        print("Stopped; ports are free, jobs are handed back. Run the cell again to go on.\n"
              "멈췄습니다. 포트를 비우고 작업을 돌려주었습니다. 셀을 다시 실행하면 이어집니다.")  # fmt: skip


def _serve(given: dict[str, str]) -> NoReturn:
    env = environment()
    place = places.here(env)
    settings = from_env(_gathered(env, given, place))
    if settings.device is None and not _has_gpu():
        raise BadSetting(
            f"There is no GPU here ({place.name}). GPU가 없습니다.\n{place.no_gpu}\n"
            'Or go on without one, slowly: GPU_DEVICE = "cpu". CPU로 천천히 계속하려면: GPU_DEVICE = "cpu".'
        )
    if settings.runtime_ends_at is None and place.limit_s:
        settings = replace(settings, runtime_ends_at=psutil.Process().create_time() + place.limit_s)
    screen = Screen()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_log_to(settings.data_dir.parent / "notebook.log"))
        listener = stack.enter_context(contextlib.closing(_listen(settings)))
        lone = front = None
        if settings.relay_url is None:
            screen.show("Building the page, a minute the first time ... 페이지를 만드는 중, 처음에는 1분쯤 ...")
            if reason := build_page(env):
                print(
                    f"The page could not be built; the API works. 페이지를 만들지 못했습니다. API는 됩니다.\n{reason}"
                )
            screen.show("Starting a relay beside this gpu ... 릴레이를 시작하는 중 ...")
            lone = LoneRelay(settings.data_dir.parent, env)
            stack.callback(lone.stop)
            front = tunnels.choose(settings, lone.url, lambda: NoTunnel(None))
            settings = replace(
                settings,
                relay_url=lone.url,
                enrol_token=lone.enrol_token,
                tunnel="none",
                public_url=f"http://127.0.0.1:{listener.getsockname()[1]}",
            )
        thread = stack.enter_context(_Running(Service(settings, listener, front)))
        while True:
            thread.check()
            if lone:
                lone.check()
            status = thread.service.status()
            screen.show(_rendered(status, settings, lone, place) if status else _starting(thread.service))
            time.sleep(REFRESH_S)


def _gathered(env: dict[str, str], given: dict[str, str], place: Place) -> dict[str, str]:
    """Raises BadSetting for a name that is no setting."""
    if unknown := sorted(set(given) - set(TABLE)):
        raise BadSetting(f"no setting has the name {', '.join(unknown)}: docs/settings.md lists those that exist")
    found = env | {name: value for name, value in given.items() if value.strip()}
    for name in SECRETS:
        if not found.get(name, "").strip() and (secret := place.secret(name)):
            found[name] = secret
    for name, value in found.items():
        if name in TABLE and value.strip() == "ask":
            found[name] = _ask(name)
    if found.get("GPU_RELAY_URL", "").strip() and not found.get("GPU_ENROL_TOKEN", "").strip():
        found["GPU_ENROL_TOKEN"] = _ask("GPU_ENROL_TOKEN")
    return {"GPU_MODELS": SMALL_MODEL} | {name: value for name, value in found.items() if value.strip()}


def _ask(name: str) -> str:
    return getpass.getpass(f"{name} ({TABLE[name]}) ")


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available() or torch.backends.mps.is_available())


def _listen(settings: Settings) -> socket.socket:
    try:
        return listen(settings)
    except BadSetting:
        return listen(replace(settings, port=0))  # another notebook has it; nobody has to know the number


class _Running:
    """The service in its thread, from entering to leaving."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(service.run())
        self._thread = threading.Thread(target=self._run, name="gpu service", daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with contextlib.suppress(asyncio.CancelledError, Exception):  # `check` says what it was
            self._loop.run_until_complete(self._task)
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def check(self) -> None:
        """Raises what ended the service, if that is over."""
        if not self._thread.is_alive():
            self._task.result()
            raise BadSetting("the service ended by itself; data/notebook.log says more")

    def __enter__(self) -> "_Running":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """A second interrupt does not cut this short: leases would stay behind."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
        deadline = time.monotonic() + STOP_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(KeyboardInterrupt):
                self._thread.join(0.2)


class _Terminated(BaseException):
    """SIGTERM: the place ends the runtime, or somebody the kernel."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM first stops the service in order, and then does what it did before."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """The cell shows the status; the log is for when that is not enough."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger, handler = logging.getLogger("gpu_service"), logging.FileHandler(path)
    handler.setFormatter(logs.PlainText((RuntimeError,)))  # for a person, who opens it
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
        handler.close()


class Screen:
    """One text that is replaced in place where IPython can; else printed now and then."""

    def __init__(self) -> None:
        self._text = ""
        self._printed_at = 0.0
        self._update: Callable[[str], None] = self._print
        with contextlib.suppress(ImportError):
            from IPython import get_ipython
            from IPython.display import HTML, DisplayHandle

            if get_ipython():
                handle = DisplayHandle()
                handle.display(HTML(""))
                self._update = lambda text: handle.update(HTML(_as_html(text)))

    def show(self, text: str) -> None:
        if text != self._text:
            self._text = text
            self._update(text)

    def _print(self, text: str) -> None:
        if time.monotonic() - self._printed_at >= PLAIN_S:
            self._printed_at = time.monotonic()
            print(text, flush=True)


def _as_html(text: str) -> str:
    linked = re.sub(r"(https?://[^\s&<]+)", r'<a href="\1" target="_blank">\1</a>', html.escape(text, quote=False))
    return f"<pre>{linked}</pre>"


def _starting(service: Service) -> str:
    if service.download and service.download.done_bytes < service.download.total_bytes:
        return f"Downloading {service.download} ... 모델을 내려받는 중 ..."
    return "Starting: the model is being loaded ... 모델을 불러오는 중 ..."


def _rendered(status: Status, settings: Settings, lone: LoneRelay | None, place: Place) -> str:
    d = status.device
    used = f"{(d.memory_bytes - d.free_bytes) / 1e9:.1f} of {d.memory_bytes / 1e9:.1f} GB in use"
    lines = [
        f"I'm Fine 아임파인 · {place.name} · interrupt the cell to stop 셀을 중단하면 멈춥니다",
        f"  GPU      {d.name}, {d.precision}; {used}",
        f"  Models   {', '.join(m.id for m in status.models) or 'none'}",
        f"  Link     {status.link}",
        f"  Tunnel   {status.tunnel}",
        f"  Now      {status.active_requests} answers under way",
    ]
    for job in status.jobs:
        step = f"step {job.step}/{job.total_steps}" if job.total_steps else "preparing the data"
        loss = f", loss {job.loss:.4f}" if job.loss is not None else ""
        eta = f", {job.eta_s:.0f} s left" if job.eta_s is not None else ""
        lines.append(f"  Job      {job.job_id} on {job.model}: {step}{loss}{eta}")
    if status.seconds_left is not None:
        hours, minutes = divmod(max(0, int(status.seconds_left)) // 60, 60)
        lines.append(f"  Time     {hours} h {minutes:02d} min left at most 남은 시간(최대)")
    return "\n".join([*lines, "", *_how_to_call(status, settings, lone)])


def _how_to_call(status: Status, settings: Settings, lone: LoneRelay | None) -> list[str]:
    model = status.models[0].id if status.models else "MODEL"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "How are you?"}}]}}'

    def curl(url: str, key: str) -> list[str]:
        return [
            f"curl {url}/v1/chat/completions \\",
            f'  -H "Authorization: Bearer {key}" \\',
            '  -H "Content-Type: application/json" \\',
            f"  -d {shlex.quote(body)}",
        ]

    if lone:
        url = status.url or lone.url
        hint = "Keys are secret: clear this output before you share the notebook. 공유하기 전에 출력을 지우세요."
        return [f"Relay 릴레이  {url}", f"Key 열쇠     {lone.admin_key}", "", *curl(url, lone.admin_key), "", hint]
    assert settings.relay_url
    return [f"Relay 릴레이  {settings.relay_url}", "", *curl(settings.relay_url, "YOUR-KEY")]


__all__ = ["serve"]
