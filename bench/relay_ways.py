"""The ways of `bench.relay`, each a process that is ready when its `with` begins: the relay, the stub, nginx, LiteLLM.

And the load on them, a process too.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import psutil

from bench import peers
from bench.relay_load import Target
from bench.relay_stub import MODEL
from tests.end_to_end.stack import free_port

ROOT = Path(__file__).parent.parent
PEER = ("litellm[proxy]==1.106.2",)
ADMIN_KEY, ENROL_TOKEN = "sk-fine-of-the-bench-of-the-relay", "enrol-token-of-the-bench"
GPU_KEY, PEER_KEY = "sk-gpu-of-the-bench", "sk-peer-of-the-bench"
CONNECTIONS = 16
START_S = 120.0


@contextmanager
def process(command: list[str], log: Path, **env: str) -> Iterator["subprocess.Popen[str]"]:
    """Its stdout is a pipe; what it says on stderr goes to `log`."""
    with log.open("w") as errors:
        running = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def until(true: Callable[[], bool], log: Path, running: "subprocess.Popen[str] | None" = None) -> None:
    """Asks again and again: there is no other sign of what a process has come to."""
    deadline = time.monotonic() + START_S
    while not true():
        if (running and running.poll() is not None) or time.monotonic() > deadline:
            raise RuntimeError(f"{log.stem} is not ready: {log.read_text()[-2000:]}")
        time.sleep(0.1)


def answers(target: Target) -> bool:
    body = {"model": target.model, "messages": [{"role": "user", "content": "How are you?"}]}
    headers = {"authorization": f"Bearer {target.key}"}
    try:
        return httpx2.post(f"{target.url}/v1/chat/completions", json=body, headers=headers).status_code == 200
    except httpx2.TransportError:
        return False


@contextmanager
def relay(folder: Path, name: str = "relay", **changes: str) -> Iterator[tuple[str, int]]:
    """Its URL and process id. Several of different names share the data folder."""
    log = folder / f"{name}.log"
    env = {
        "RELAY_PORT": "0",
        "RELAY_DATA_DIR": str(folder / "relay"),
        "RELAY_ADMIN_KEY": ADMIN_KEY,
        "RELAY_ENROL_TOKEN": ENROL_TOKEN,
        "RELAY_ALLOW_LOOPBACK_GPUS": "1",
    }
    with process([sys.executable, "-m", "relay", "serve"], log, **(env | changes)) as running:
        until(lambda: bool(re.search(r"http://127\.0\.0\.1:\d+", log.read_text())), log, running)
        yield re.findall(r"http://127\.0\.0\.1:\d+", log.read_text())[0], running.pid


@contextmanager
def stub(folder: Path, relay_url: str) -> Iterator[tuple[Target, int]]:
    """Where it is, and its process id."""
    command = [sys.executable, "-m", "bench.relay_stub", relay_url]
    with process(command, folder / "stub.log", BENCH_ENROL_TOKEN=ENROL_TOKEN, BENCH_GPU_KEY=GPU_KEY) as running:
        assert running.stdout
        yield Target(running.stdout.readline().strip(), GPU_KEY, MODEL), running.pid


@contextmanager
def nginx(folder: Path, name: str, key: str, *urls: str) -> Iterator[tuple[Target, int]]:
    """One worker, connections to what is behind it kept open, no buffering: as one puts it before a stream of events.

    Where it is, and its process id.
    """
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        raise RuntimeError("nginx is missing: install it, on Debian by 'apt-get install nginx-light'")
    port, log, conf = free_port(), folder / f"{name}.log", folder / f"{name}.conf"
    temporary = "".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    behind = " ".join(f"server {url.removeprefix('http://')};" for url in urls)
    conf.write_text(
        f"""daemon off; worker_processes 1; pid {folder}/{name}.pid; error_log stderr;
        events {{ worker_connections 4096; }}
        http {{
            access_log {folder}/{name}.access.log; {temporary}
            keepalive_requests 1000000000;
            upstream behind {{ {behind} keepalive 1024; keepalive_requests 1000000000; }}
            server {{
                listen 127.0.0.1:{port} backlog=2048;
                location / {{
                    proxy_pass http://behind; proxy_http_version 1.1;
                    proxy_set_header connection ""; proxy_buffering off;
                }}
            }}
        }}"""
    )
    with process([binary, "-p", str(folder), "-c", str(conf)], log) as running:
        target = Target(f"http://127.0.0.1:{port}", key, MODEL)
        until(lambda: answers(target), log, running)
        yield target, running.pid


@contextmanager
def litellm(folder: Path, stub_url: str) -> Iterator[Target]:
    """With a key of its own, and its log down to warnings."""
    python, port, log = peers.python(ROOT / "data/bench/litellm", PEER), free_port(), folder / "litellm.log"
    (folder / "litellm.yaml").write_text(
        json.dumps(  # YAML too
            {
                "model_list": [
                    {
                        "model_name": MODEL,
                        "litellm_params": {
                            "model": f"openai/{MODEL}",
                            "api_base": f"{stub_url}/v1",
                            "api_key": GPU_KEY,
                        },
                    }
                ],
                "general_settings": {"master_key": PEER_KEY},
                "litellm_settings": {"telemetry": False},
            }
        )
    )
    command = [str(python.parent / "litellm"), "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1"]
    options = ["--port", str(port), "--num_workers", "1"]
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "WARNING", "NO_DOCS": "True"}
    with process([*command, *options], log, **env) as running:
        target = Target(f"http://127.0.0.1:{port}", PEER_KEY, MODEL)
        until(lambda: answers(target), log, running)
        yield target


def load(do: str, *targets: Target, **order: Any) -> Any:
    told = json.dumps({"do": do, "targets": [asdict(target) for target in targets], **order})
    command = [sys.executable, "-m", "bench.relay_load"]
    done = subprocess.run(command, cwd=ROOT, input=told, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def resident_mb(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 1e6
