"""`make demo`: relay and gpu service on this machine, the tour, then both stay up until Ctrl-C."""

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx2

from demo import diffusion, gpt2, model, screen, services
from demo.screen import Screen
from demo.services import Died, Service
from demo.tour import ANSWER_TOKENS, QUESTION, Tour, TourFailed

MODEL_BYTES = 800_000_000  # the conversion writes 270 MB, and adapters, logs and data sets need room
START_S = 60.0
HOST = "127.0.0.1"
# The demo is a world of its own: secrets and a database that the user set for another service stay out of it.
OWN_WORLD = dict.fromkeys(("RELAY_ADMIN_KEY", "RELAY_ENROL_TOKEN", "RELAY_DATABASE_URL", "GPU_KEY"), "")


class CannotStart(Exception):
    """One line that says what to do."""


class Stopped(BaseException):
    """Ctrl-C, or a polite kill. Not an Exception: nothing on the way should take it for a failure."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    data_dir: Path
    relay_port: int
    gpu_port: int
    tour: bool
    need_bytes: int

    @property
    def relay_url(self) -> str:
        return f"http://{HOST}:{self.relay_port}"

    @property
    def gpu_url(self) -> str:
        return f"http://{HOST}:{self.gpu_port}"


def from_env(env: Mapping[str, str] = os.environ) -> Settings:
    def port(name: str, default: int) -> int:
        text = env.get(name) or str(default)
        if not text.isdigit() or not 0 < int(text) < 65536:
            raise CannotStart(f"{name} is '{text}': use a number from 1 to 65535")
        return int(text)

    return Settings(
        data_dir=Path(env.get("DATA") or "data"),
        relay_port=port("RELAY_PORT", 8000),
        gpu_port=port("GPU_PORT", 8001),
        tour=env.get("TOUR", "1") != "0",
        need_bytes=int(env.get("DEMO_NEED_BYTES") or MODEL_BYTES),
    )


def main() -> int:
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _stop)
    out = screen.of_terminal()
    running: list[Service] = []
    try:
        _serve(from_env(), out, running)
    except Stopped:
        return 0
    except (CannotStart, Died, model.ModelError) as exc:
        out.wipe()
        print(f"demo: {exc}", file=sys.stderr)
        return 1
    finally:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)  # one Ctrl-C is enough; impatience must not leave a process behind
        if running:
            out.wipe()
            out.say("\nStopping ...", "\n멈추는 중 ...")
            services.stop(running)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise Stopped


def _serve(settings: Settings, out: Screen, running: list[Service]) -> NoReturn:
    """Appends each service to `running` as it starts. Leaves only by an exception."""
    _check_ports(settings)
    folder = _model(settings, out)
    relay = Service(
        "relay",
        "relay",
        ["serve"],
        OWN_WORLD
        | {
            "RELAY_HOST": HOST,
            "RELAY_PORT": str(settings.relay_port),
            "RELAY_DATA_DIR": str(settings.data_dir / "relay"),
            "RELAY_ALLOW_LOOPBACK_GPUS": "1",
            "RELAY_LOG_FORMAT": "text",  # a person opens it
        },
        settings.data_dir / "relay.log",
    )
    running.append(relay)
    with httpx2.Client(base_url=settings.relay_url, timeout=httpx2.Timeout(120), trust_env=False) as client:
        _wait_for_health(client, relay, out)
        token = (settings.data_dir / "relay" / "enrol.token").read_text().strip()
        gpu = Service(
            "gpu service",
            "gpu_service",
            [],
            OWN_WORLD
            | {
                "GPU_HOST": HOST,
                "GPU_PORT": str(settings.gpu_port),
                "GPU_LOG_FORMAT": "text",
                "GPU_DATA_DIR": str(settings.data_dir / "gpu"),
                "GPU_RELAY_URL": settings.relay_url,
                "GPU_ENROL_TOKEN": token,
                "GPU_DEVICE": os.environ.get("GPU_DEVICE") or "cpu",
                "GPU_TUNNEL": "none",
                "GPU_PUBLIC_URL": settings.gpu_url,
                "GPU_MODELS": ",".join(f"{name}={at}" for name, at in _served(folder).items()),
                "HF_HUB_OFFLINE": "1",
            },
            settings.data_dir / "gpu.log",
        )
        running.append(gpu)

        def check() -> None:
            relay.check()
            gpu.check()

        client.headers["authorization"] = f"Bearer {_key(settings.data_dir / 'relay' / 'admin.key')}"
        tour = Tour(client, out, check, model.NAME)
        served = model.NAME
        try:
            out.waiting(out.pick("  Loading the model ...", "  모델을 불러오는 중 ..."))
            tour.wait_until_served()
            out.wipe()
            if settings.tour:
                served = tour.run()
        except TourFailed as exc:
            out.wipe()
            logs = f"{settings.data_dir / 'relay.log'}, {settings.data_dir / 'gpu.log'}"
            out.say(f"\nThe tour failed: {exc}\nLook at {logs}. Both services are still up.")
        _say_how_to_call(settings, out, served)
        while True:
            check()
            time.sleep(0.5)


def _check_ports(settings: Settings) -> None:
    for name, port in (("RELAY_PORT", settings.relay_port), ("GPU_PORT", settings.gpu_port)):
        if not services.is_free(port):
            raise CannotStart(
                f"port {port} is taken, perhaps by another `make demo`. Stop what listens there, "
                f"or choose another one: make demo {name}={port + 10}"
            )


def _model(settings: Settings, out: Screen) -> Path:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.data_dir).free
    is_there = (settings.data_dir / "models" / model.NAME).is_dir()
    if free < settings.need_bytes and not is_there:
        raise CannotStart(
            f"too little disk: {settings.need_bytes / 1e6:,.0f} MB are needed in {settings.data_dir.absolute()}, "
            f"{free / 1e6:,.0f} MB are free. Make room, or name another folder: make demo DATA=/path"
        )
    if not is_there:
        out.say(
            f"Converting {model.NAME} to safetensors, once; about 20 s ...",
            f"{model.NAME} 을(를) safetensors로 변환합니다. 처음 한 번만, 약 20초 ...",
        )
    return model.ensure(settings.data_dir)


def _served(llama: Path) -> dict[str, Path]:
    return {model.NAME: llama, gpt2.NAME: gpt2.FOLDER, diffusion.NAME: diffusion.FOLDER}


def _wait_for_health(client: httpx2.Client, relay: Service, out: Screen) -> None:
    out.waiting(out.pick("  Starting the relay ...", "  릴레이를 시작하는 중 ..."))
    deadline = time.monotonic() + START_S
    while True:
        relay.check()
        try:
            if client.get("/healthz").is_success:
                return
        except httpx2.TransportError:
            pass  # not listening yet
        if time.monotonic() > deadline:
            raise CannotStart(f"the relay did not answer within {START_S:.0f} s")
        time.sleep(0.1)


def _key(file: Path) -> str:
    return file.read_text().strip()


def _say_how_to_call(settings: Settings, out: Screen, served: str) -> None:
    relay_key, gpu_key = settings.data_dir / "relay" / "admin.key", settings.data_dir / "gpu" / "gpu.key"
    out.say()
    out.say("I'm Fine is up. Ctrl-C stops it.", "아임파인이 켜졌습니다. Ctrl-C로 끕니다.")
    out.say()
    out.say(f"  relay  {settings.relay_url}  key {_key(relay_key)}  ({relay_key})")
    out.say(f"  gpu    {settings.gpu_url}  key {_key(gpu_key)}  ({gpu_key})")
    out.say()
    out.say(
        f"Open {settings.relay_url} in a browser and sign in with the relay's key.",
        f"브라우저에서 {settings.relay_url} 을(를) 열고 relay의 key로 로그인하세요.",
    )
    out.say()
    out.say("Ask it yourself, through the relay:", "직접 물어보세요. 릴레이를 거쳐서:")
    out.say(_curl(settings.relay_url, relay_key, served))
    out.say("or the gpu directly:", "또는 gpu에 바로:")
    out.say(_curl(settings.gpu_url, gpu_key, model.NAME))


def _curl(url: str, key_file: Path, model_id: str) -> str:
    question = f'{{"role": "user", "content": "{QUESTION}"}}'
    body = f'{{"model": "{model_id}", "max_tokens": {ANSWER_TOKENS}, "messages": [{question}]}}'
    return (
        f"\n  curl {url}/v1/chat/completions \\\n"
        f'    -H "Authorization: Bearer $(cat {shlex.quote(str(key_file))})" \\\n'
        f"    -H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'\n"
    )


if __name__ == "__main__":
    sys.exit(main())
