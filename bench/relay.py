"""What the relay costs, in one run: against the stub gpu itself, against nginx, and against the LiteLLM proxy.

    load -> stub            load -> nginx -> stub
    load -> relay -> stub   load -> LiteLLM -> stub

Each is a process; the relay has keys, signing, limits and its log on, nginx and LiteLLM one worker. The stub gpu
(relay_stub.py) enrols, is challenged and verifies what is signed. The load (relay_load.py) takes the ways in turn, and
medians of the repetitions count. On a machine with few cores they compete: with 2, the load and the stub take about a
core while the fastest ways are measured, so nginx's and the stub's own rates say as much of the load as of them.

Then the database: how the time of claim, heartbeat and list queries grows from 100 gpus to 1,000 at 100,000 jobs, and
from 10,000 jobs to 100,000 at 1,000 gpus (relay_growth.py).

The last line is JSON. Ratios of speed above 1 mean that the relay is faster. How late a frame is: its distance from the
one before, less the pace at which the stub sends them; the stub's own lateness is in it. Run it by `make bench-relay`.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import psutil

from bench import peers
from bench.relay_growth import growth
from bench.relay_load import Target, percentile
from bench.relay_stub import MODEL
from tests.end_to_end.stack import free_port

ROOT = Path(__file__).parent.parent
PEER = ("litellm[proxy]==1.106.2",)
ADMIN_KEY, ENROL_TOKEN = "sk-fine-of-the-bench-of-the-relay", "enrol-token-of-the-bench"
GPU_KEY, PEER_KEY = "sk-gpu-of-the-bench", "sk-peer-of-the-bench"
CONNECTIONS = 16
RATE = 100.0  # requests/s at which what is added is measured
STREAMS = (200, 500)
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


def until(true: Callable[[], bool], running: "subprocess.Popen[str]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not true():
        if running.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{log.stem} did not start: {log.read_text()[-2000:]}")
        time.sleep(0.1)


def answers(target: Target) -> bool:
    body = {"model": target.model, "messages": [{"role": "user", "content": "How are you?"}]}
    headers = {"authorization": f"Bearer {target.key}"}
    try:
        return httpx2.post(f"{target.url}/v1/chat/completions", json=body, headers=headers).status_code == 200
    except httpx2.TransportError:
        return False


@contextmanager
def relay(folder: Path) -> Iterator[tuple[str, int]]:
    """Its URL and process id."""
    log = folder / "relay.log"
    env = {
        "RELAY_PORT": "0",
        "RELAY_DATA_DIR": str(folder / "relay"),
        "RELAY_ADMIN_KEY": ADMIN_KEY,
        "RELAY_ENROL_TOKEN": ENROL_TOKEN,
        "RELAY_ALLOW_LOOPBACK_GPUS": "1",
    }
    with process([sys.executable, "-m", "relay", "serve"], log, **env) as running:
        until(lambda: bool(re.search(r"http://127\.0\.0\.1:\d+", log.read_text())), running, log)
        yield re.findall(r"http://127\.0\.0\.1:\d+", log.read_text())[0], running.pid


@contextmanager
def stub(folder: Path, relay_url: str) -> Iterator[Target]:
    command = [sys.executable, "-m", "bench.relay_stub", relay_url]
    with process(command, folder / "stub.log", BENCH_ENROL_TOKEN=ENROL_TOKEN, BENCH_GPU_KEY=GPU_KEY) as running:
        assert running.stdout
        yield Target(running.stdout.readline().strip(), GPU_KEY, MODEL)


@contextmanager
def nginx(folder: Path, stub_url: str) -> Iterator[Target]:
    """One worker, connections to the stub kept open, no buffering: as one puts it before a stream of events."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        raise RuntimeError("nginx is missing: install it, on Debian by 'apt-get install nginx-light'")
    port, log = free_port(), folder / "nginx.log"
    temporary = "".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"""daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;
        events {{ worker_connections 4096; }}
        http {{
            access_log {folder}/access.log; {temporary}
            keepalive_requests 1000000000;
            upstream stub {{
                server {stub_url.removeprefix("http://")}; keepalive 1024; keepalive_requests 1000000000;
            }}
            server {{
                listen 127.0.0.1:{port} backlog=2048;
                location / {{
                    proxy_pass http://stub; proxy_http_version 1.1; proxy_set_header connection ""; proxy_buffering off;
                }}
            }}
        }}"""
    )
    with process([binary, "-p", str(folder), "-c", str(folder / "nginx.conf")], log) as running:
        target = Target(f"http://127.0.0.1:{port}", GPU_KEY, MODEL)
        until(lambda: answers(target), running, log)
        yield target


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
        until(lambda: answers(target), running, log)
        yield target


def load(do: str, *targets: Target, **order: Any) -> Any:
    told = json.dumps({"do": do, "targets": [asdict(target) for target in targets], **order})
    command = [sys.executable, "-m", "bench.relay_load"]
    done = subprocess.run(command, cwd=ROOT, input=told, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def resident_mb(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 1e6


def rates(ways: dict[str, Target], repetitions: int, seconds: float) -> dict[str, float]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, target in ways.items():
            found[name].append(load("flood", target, connections=CONNECTIONS, seconds=seconds))
    medians = {name: statistics.median(run["rps"] for run in runs) for name, runs in found.items()}
    for name, runs in found.items():
        p50, p99 = (statistics.median(run[key] for run in runs) for key in ("p50_ms", "p99_ms"))
        each = " ".join(f"{run['rps']:.0f}" for run in runs)
        print(
            f"  {name:8} {medians[name]:8.0f} requests/s, p50 {p50:7.2f} ms, p99 {p99:7.2f} ms   ({each})", flush=True
        )
    return medians


def added(direct: Target, through: Target, repetitions: int, seconds: float) -> tuple[float, float]:
    """p50 and p99 of what the relay adds, ms: the difference of the two ways' percentiles."""
    pairs = []
    for _ in range(repetitions):
        ways = load("paced", direct, through, rate=RATE, seconds=seconds)
        (a50, a99), (b50, b99) = ((percentile(way, 0.5), percentile(way, 0.99)) for way in ways)
        print(f"  stub p50 {a50:.2f} p99 {a99:.2f} ms, through the relay p50 {b50:.2f} p99 {b99:.2f} ms", flush=True)
        pairs.append((b50 - a50, b99 - a99))
    return statistics.median(p50 for p50, _ in pairs), statistics.median(p99 for _, p99 in pairs)


def storm(ways: dict[str, Target], repetitions: int) -> dict[int, dict[str, float]]:
    """For each number of streams, what the relay did with them: the median lateness, the worst of the rest."""
    found: dict[int, dict[str, float]] = {}
    for n in STREAMS:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(repetitions):
            for name, target in ways.items():
                runs[name].append(load("streams", target, n=n))
        for name, of in runs.items():
            found[n] = {
                "ok": min(run["ok"] for run in of),
                "lost": sum(run["lost"] for run in of),
                "late_p99_ms": statistics.median(run["late_p99_ms"] for run in of),
            }
            print(f"  {n} streams, {name:5}: {found[n]}", flush=True)
    return found


def measure(repetitions: int, seconds: float, *, with_peer: bool) -> dict[str, float]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url, pid = stack.enter_context(relay(folder))
        direct = stack.enter_context(stub(folder, url))
        ours = Target(url, ADMIN_KEY, MODEL)
        ways = {"stub": direct, "nginx": stack.enter_context(nginx(folder, direct.url)), "relay": ours}
        deadline = time.monotonic() + START_S
        while not answers(ours):
            assert time.monotonic() < deadline, (folder / "relay.log").read_text()[-2000:]
            time.sleep(0.1)
        time.sleep(2)
        idle_mb = resident_mb(pid)
        print(f"added at {RATE:.0f} requests/s:", flush=True)
        load("flood", ours, connections=4, seconds=1)  # warm
        added_p50_ms, added_p99_ms = added(direct, ours, repetitions, 2 * seconds)
        print("streams, of which each frame's lateness:", flush=True)
        stormy = storm({"stub": direct, "relay": ours}, repetitions)
        time.sleep(2)
        growth_mb = resident_mb(pid) - idle_mb
        print(f"resident: {idle_mb:.0f} MB idle, {growth_mb:+.0f} MB after the storm", flush=True)
        if with_peer:
            ways["litellm"] = stack.enter_context(litellm(folder, direct.url))
        print(f"whole answers, {CONNECTIONS} connections:", flush=True)
        rps = rates(ways, repetitions, seconds)
    return {
        "rps": round(rps["relay"]),
        "rps_vs_litellm": round(rps["relay"] / rps.get("litellm", math.inf), 1),
        "rps_vs_nginx": round(rps["relay"] / rps["nginx"], 3),
        "added_p50_ms": round(added_p50_ms, 2),
        "added_p99_ms": round(added_p99_ms, 2),
        "streams_ok": int(stormy[500]["ok"]),
        "frames_lost": int(sum(found["lost"] for found in stormy.values())),
        "interframe_p99_ms_200": round(stormy[200]["late_p99_ms"], 2),
        "rss_idle_mb": round(idle_mb, 1),
        "rss_growth_mb": round(growth_mb, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What the relay costs.")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measured load")
    parser.add_argument("--no-peer", action="store_true", help="without LiteLLM; its ratio is then 0")
    parser.add_argument("--no-growth", action="store_true", help="without the database; its ratios are then 0")
    args = parser.parse_args()
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores", flush=True)
    found = measure(args.repetitions, args.seconds, with_peer=not args.no_peer)
    grown = (0.0, 0.0) if args.no_growth else growth()
    print(json.dumps(found | {"growth_1000_gpus": grown[0], "growth_100k_jobs": grown[1]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
