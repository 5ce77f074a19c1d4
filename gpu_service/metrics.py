"""What a gpu counts, in Prometheus' terms. No label has a value that a caller chooses: no caller, no model, no job.

Whoever does the work counts it, from whatever thread; what is a state is asked when somebody reads. Knows no torch.
https://prometheus.io/docs/practices/naming/
"""

from collections.abc import Callable, Sequence
from typing import Final, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from gpu_service.scheduler import Kind
from logs import Seen

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
LATENCIES_S = (0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
STEPS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 15, 60)


class Metrics:
    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double what there is
        ProcessCollector(registry=registry)

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"gpu_{name}", meaning, labels, registry=registry)

        def seconds(name: str, meaning: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"gpu_{name}_seconds", meaning, labels, buckets=buckets, registry=registry)

        self._requests = counter("requests", "Requests that are over.", "method", "route", "status")
        meaning = "From a request's head to the end of its answer; of a stream, all of it."
        self._duration = seconds("request_duration", meaning, LATENCIES_S, "route")
        self._streams = Gauge("gpu_live_streams", "Event streams that are open.", registry=registry)
        tokens = counter("tokens", "Tokens of text: read in prompts, written in answers, seen in training.", "what")
        self.read, self.written, self.trained = (tokens.labels(what) for what in ("read", "written", "trained"))
        meaning = "A step of text, of a batch or of pictures, or a slice of training."
        self._device = seconds("device", meaning, STEPS_S, "kind")
        self.train_step = seconds("train_step", "An optimizer step, without what was served in between.", STEPS_S)
        self._errors = counter("errors", "Answers that were errors of this gpu's own.", "code")

    def ask(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """A number that is asked for when somebody reads."""
        gauge = Gauge(f"gpu_{name}", meaning, registry=self._registry)
        gauge.set_function(value)

    def ran(self, kind: Kind | Literal["batch"], seconds: float) -> None:
        self._device.labels(kind).observe(seconds)

    def refused(self, code: str) -> None:
        """`code` is one of ours: errors.py."""
        self._errors.labels(code).inc()

    # --- logs.Watch ---

    def streaming(self, by: int) -> None:
        self._streams.inc(by)

    def ended(self, seen: Seen) -> None:
        status = f"{seen.status // 100}xx" if seen.status else "left"
        self._requests.labels(seen.method, seen.route, status).inc()
        self._duration.labels(seen.route).observe(seen.duration_s)

    def text(self) -> bytes:
        return generate_latest(self._registry)
