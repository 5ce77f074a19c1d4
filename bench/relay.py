"""What the relay costs, in one run: against the stub gpu itself, against nginx, and against the LiteLLM proxy.

    load -> stub            load -> nginx -> stub
    load -> relay -> stub   load -> LiteLLM -> stub

Each is a process; the relay has keys, signing, limits and its log on, nginx and LiteLLM one worker. The stub gpu
(relay_stub.py) enrols, is challenged and verifies what is signed. The load (relay_load.py) takes the ways in turn, and
medians of the repetitions count. On a machine with few cores they compete: with 2, the load and the stub take about a
core while the fastest ways are measured, so nginx's and the stub's own rates say as much of the load as of them.

Then what one relay process carries behind nginx, on SQLite and on PostgreSQL, and two on PostgreSQL (relay_sizes.py).

Then the database: how the time of claim, heartbeat and list queries grows from 100 gpus to 1,000 at 100,000 jobs, and
from 10,000 jobs to 100,000 at 1,000 gpus (relay_growth.py).

The last line is JSON. Ratios of speed above 1 mean that the relay is faster. How late a frame is: its distance from the
one before, less the pace at which the stub sends them; the stub's own lateness is in it. Run it by `make bench-relay`.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench.relay_growth import growth
from bench.relay_load import Target, percentile
from bench.relay_sizes import sizes
from bench.relay_stub import MODEL
from bench.relay_ways import (
    ADMIN_KEY,
    CONNECTIONS,
    GPU_KEY,
    answers,
    litellm,
    load,
    nginx,
    relay,
    resident_mb,
    stub,
    until,
)

RATE = 100.0  # requests/s at which what is added is measured
STREAMS = (200, 500)


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
        direct, _ = stack.enter_context(stub(folder, url))
        ours = Target(url, ADMIN_KEY, MODEL)
        before_stub, _ = stack.enter_context(nginx(folder, "nginx", GPU_KEY, direct.url))
        ways = {"stub": direct, "nginx": before_stub, "relay": ours}
        until(lambda: answers(ours), folder / "relay.log")  # which hears of a gpu some time after that has started
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
    found |= sizes(args.repetitions, args.seconds)
    grown = (0.0, 0.0) if args.no_growth else growth()
    print(json.dumps(found | {"growth_1000_gpus": grown[0], "growth_100k_jobs": grown[1]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
