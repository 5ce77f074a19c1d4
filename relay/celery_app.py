"""The dispatcher woken by Celery over RabbitMQ: `celery -A relay.celery_app worker` beside `... beat`.

A task does what a round of the embedded loop does, by the same code and on the same database, and takes well under a
minute: it hands out jobs and never runs one. `python -m relay worker`, `beat` and `flower` start the three.
"""

import asyncio
import logging
import time
from functools import partial
from typing import Any

from celery.signals import worker_process_init, worker_process_shutdown

from relay import settings
from relay.broker import DISPATCH, RECONCILE, celery_app
from relay.dispatcher import HandOut
from relay.leases import Leases
from relay.metrics import Metrics
from relay.peers import is_watched
from relay.safety import check_safe
from relay.storage import blobs_of
from relay.store import Store

log = logging.getLogger("relay.celery")

config = settings.from_env()
if not config.broker_url:
    raise settings.BadSetting("RELAY_BROKER_URL is not set: amqp://user:password@host/ names the RabbitMQ to listen to")
check_safe(config)  # also where Celery's own command starts it
app = celery_app(config.broker_url)


class _Process:
    """What each process of a worker holds: a loop, and the database's connections on it."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._store = Store(config.database)
        leases = Leases(self._store, blobs_of(config), config, time.time)
        self._hand_out = HandOut(leases, Metrics(), partial(is_watched, self._store, config, time.time))

    def round(self) -> int:
        return self._runner.run(self._hand_out.round())

    def close(self) -> None:
        self._runner.run(self._store.close())
        self._runner.close()


_process: _Process | None = None


@worker_process_init.connect  # type: ignore[untyped-decorator]
def _open(**_: Any) -> None:
    global _process  # Celery gives its processes no object of their own
    _process = _Process()


@worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _close(**_: Any) -> None:
    if _process:
        _process.close()


@app.task(name=DISPATCH)  # type: ignore[untyped-decorator]
def dispatch(job_id: str) -> None:
    """Somebody has a reason to look; `job_id` is for who watches."""
    assert _process, "the worker's process has begun"
    given = _process.round()
    log.info("woken by %s: %d jobs given", job_id or "a gpu", given)


@app.task(name=RECONCILE)  # type: ignore[untyped-decorator]
def reconcile() -> None:
    """Nobody said anything: a message may be lost, a lease may be over."""
    assert _process, "the worker's process has begun"
    if given := _process.round():
        log.info("found by itself: %d jobs given", given)
