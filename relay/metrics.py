"""What the relay counts, in Prometheus' terms. Every label has a bounded set of values: a route's template, a class of
statuses, a code of ours, a state. Never a user, a key, a gpu, a model or anything else that a caller chooses.

One process counts for itself, from its start. Knows where nothing comes from; vitals.py looks at what has to be asked.
https://prometheus.io/docs/practices/naming/
"""

import asyncio
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from logs import Seen

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
LATENCIES_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
WAITS_S = (0.1, 1, 5, 15, 60, 180, 600, 3600)
LAGS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
LOOK_AT_LAG_S = 0.5
LINES: Final = ("api", "page")  # where somebody waits for a gpu


class Metrics:
    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double what there is
        ProcessCollector(registry=registry)

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"relay_{name}", meaning, labels, registry=registry)

        def gauge(name: str, meaning: str, *labels: str) -> Gauge:
            return Gauge(f"relay_{name}", meaning, labels, registry=registry)

        def seconds(name: str, meaning: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"relay_{name}_seconds", meaning, labels, buckets=buckets, registry=registry)

        self._requests = counter("requests", "Requests that are over.", "method", "route", "status")
        meaning = "From a request's head to the end of its answer; of a stream, all of it."
        self._duration = seconds("request_duration", meaning, LATENCIES_S, "route")
        traffic = counter("http_bytes", "Bytes of bodies.", "direction")
        self._received, self._sent = traffic.labels("received"), traffic.labels("sent")
        self._streams = gauge("live_streams", "Event streams that are open.")
        self.first_byte = seconds("first_byte", "From asking a gpu to the first byte of its answer.", LATENCIES_S)
        self._errors = counter("errors", "Answers that were errors of the relay's own.", "code")
        waited = seconds("waited", "How long requests stood in line, served or not.", WAITS_S, "line")
        self.waited = {line: waited.labels(line) for line in LINES}
        self.leases_lost = counter("leases_lost", "Leases of jobs that ran out.")
        self.checkpoints = counter("checkpoints_stored", "Checkpoints that gpus stored.")
        self._webhooks = counter("webhook_deliveries", "Attempts to deliver a webhook.", "outcome")
        self._lag = seconds("event_loop_lag", "How late the event loop woke up.", LAGS_S)
        self._states = {
            "gpus": gauge("gpus", "Gpus that are heard from, by what they can do.", "state"),
            "breakers": gauge("breakers", "Circuit breakers of gpus that are heard from.", "state"),
            "jobs": gauge("jobs", "Fine-tunes and batches.", "state"),
            "waiting": gauge("waiting", "Requests that stand in line for a gpu.", "line"),
        }
        self._sizes = {
            "blobs": gauge("blobs_bytes", "What the blobs take on the disk."),
            "disk_free": gauge("disk_free_bytes", "Free on the disk of the data folder."),
        }

    # --- logs.Watch ---

    def streaming(self, by: int) -> None:
        self._streams.inc(by)

    def ended(self, seen: Seen) -> None:
        counted, timed = self._of(seen.method, seen.route, f"{seen.status // 100}xx" if seen.status else "left")
        counted.inc()
        timed.observe(seen.duration_s)
        self._received.inc(seen.received_bytes)
        self._sent.inc(seen.sent_bytes)

    @lru_cache(maxsize=2048)  # noqa: B019  one for the process; to look a label up costs more than to count
    def _of(self, method: str, route: str, status: str) -> tuple[Counter, Histogram]:
        return self._requests.labels(method, route, status), self._duration.labels(route)

    # --- the rest ---

    def refused(self, code: str) -> None:
        """`code` is one of ours: errors.py."""
        self._errors.labels(code).inc()

    def webhooks(self, outcome: str) -> None:
        """delivered, failed (it is tried again) or given_up."""
        self._webhooks.labels(outcome).inc()

    def set_states(self, name: str, found: Mapping[str, int]) -> None:
        """All that there can be, also those that are 0."""
        for state, n in found.items():
            self._states[name].labels(state).set(n)

    def set_bytes(self, name: str, size_bytes: int) -> None:
        self._sizes[name].set(size_bytes)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    async def watch_loop(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LOOK_AT_LAG_S
            await asyncio.sleep(LOOK_AT_LAG_S)
            self._lag.observe(max(0.0, loop.time() - due))
