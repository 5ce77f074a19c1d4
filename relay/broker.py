"""What relay and Celery's workers say to each other through RabbitMQ: that there may be something to hand out.

A message is a job's id, or empty: all of its meaning is "look", for the database is the truth. So one that is lost
costs no more than the wait for the next, and one that comes twice costs nothing. Celery is imported where a broker is
named.
"""

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from functools import cached_property
from typing import Any

QUEUE = "imfine-dispatch"
DISPATCH, RECONCILE = "relay.dispatch", "relay.reconcile"
RECONCILE_S = 2.0  # between two looks that nobody asked for; they find what a lost message left
TASK_S = 50  # a task is a round of looking: far less than RabbitMQ's half hour for an acknowledgement
TELL_S = 2.0  # a broker that stands still, or is short of disk, takes nothing and says nothing
DELIVERIES = 20  # of one message, then it is dropped: whatever it meant, the next look finds
IN_TIME = {"timeout": TELL_S, "confirm_timeout": TELL_S}  # of a message's way there, and of the word that it came


def celery_app(url: str) -> Any:
    """A Celery with our settings and no task. https://docs.celeryq.dev/en/stable/userguide/configuration.html"""
    from celery import Celery
    from kombu import Queue

    app = Celery("relay", broker=url)
    app.conf.update(
        task_queues=[Queue(QUEUE, queue_arguments={"x-queue-type": "quorum", "x-delivery-limit": DELIVERIES})],
        task_default_queue=QUEUE,
        task_ignore_result=True,
        task_acks_late=True,  # a worker that dies leaves its message to another
        task_reject_on_worker_lost=True,  # also when it is killed, which would count as done otherwise
        task_time_limit=TASK_S,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_send_task_events=True,  # for Flower
        task_send_sent_event=True,
        broker_connection_retry_on_startup=True,
        broker_connection_timeout=TELL_S,
        broker_transport_options={"confirm_publish": True},
        beat_schedule={
            "reconcile": {
                "task": RECONCILE,
                "schedule": RECONCILE_S,
                "options": {"expires": 5 * RECONCILE_S, **IN_TIME},
            },
        },
        beat_max_loop_interval=RECONCILE_S,
    )
    return app


class Broker:
    """The relay's end."""

    def __init__(self, url: str) -> None:
        self._url = url

    @cached_property
    def _celery(self) -> Any:
        return celery_app(self._url)

    async def tell(self, job_ids: Iterable[str]) -> None:
        """Returns once RabbitMQ has them. Raises where it can't be reached, or stands still."""
        told = Future[None]()
        # No thread of an executor: at its end the process would wait for a broker that stands still.
        threading.Thread(target=self._send, args=(sorted(job_ids), told), name="broker", daemon=True).start()
        await asyncio.wrap_future(told)

    def _send(self, job_ids: list[str], told: "Future[None]") -> None:
        told.set_running_or_notify_cancel()
        try:
            for job_id in job_ids:
                # A wake is worth nothing later; what it would have said is in the database.
                once = {"retry_policy": {"max_retries": 1}, **IN_TIME}
                self._celery.send_task(DISPATCH, args=[job_id], expires=TASK_S, **once)
            told.set_result(None)
        except Exception as exc:  # of whichever library Celery speaks through; whoever waits is told
            told.set_exception(exc)
