"""The processes beside the relay where a broker is named: Celery's worker and beat, and Flower, which shows them.

Each takes the place of the process that asked for it. What is secret goes by environment, for everybody on a machine
may read a command line.
"""

import os
import sys
from typing import NoReturn

from relay.safety import check_safe
from relay.settings import BadSetting, Settings, environment, secret

FLOWER_USER, FLOWER_PREFIX = "admin", "pw-flower-"
CELERY = (sys.executable, "-m", "celery", "--quiet", "-A", "relay.celery_app")


def worker(settings: Settings, concurrency: int, name: str | None = None) -> NoReturn:
    """The broker refuses the second of one name, and a machine may run several: without one, it goes by its process."""
    _run(
        settings,
        "worker",
        "--loglevel",
        "info",
        "--concurrency",
        str(concurrency),
        "--hostname",
        f"{name or f'relay-{os.getpid()}'}@%h",
        "--without-gossip",
        "--without-mingle",
    )


def beat(settings: Settings) -> NoReturn:
    _run(settings, "beat", "--loglevel", "info", "--schedule", str(settings.data_dir / "beat"))


def flower(settings: Settings, port: int) -> NoReturn:
    """For nginx to pass on under /flower, and never without a password: on loopback, or where RELAY_HOST says."""
    password = secret(settings.flower_password, settings.flower_password_file, FLOWER_PREFIX)
    _run(
        settings,
        "flower",
        FLOWER_ADDRESS=settings.host,
        FLOWER_PORT=str(port),
        FLOWER_URL_PREFIX="flower",
        FLOWER_BASIC_AUTH=f"{FLOWER_USER}:{password}",
    )


def _run(settings: Settings, *command: str, **env: str) -> NoReturn:
    if not settings.broker_url:
        raise BadSetting("RELAY_BROKER_URL is not set: amqp://user:password@host/ names the RabbitMQ to listen to")
    check_safe(settings)
    os.execve(sys.executable, [*CELERY, *command], environment() | env)  # noqa: S606
