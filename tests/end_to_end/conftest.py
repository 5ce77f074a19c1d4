"""Servers of the tests' own, one for each module that asks for it."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.rabbit import Rabbit
from tests.end_to_end.stack import free_port
from tests.postgres import Postgres


@pytest.fixture(scope="module")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rabbit]:
    rabbit = Rabbit(tmp_path_factory.mktemp("rabbit"))
    try:
        rabbit.start()
        yield rabbit
    finally:
        rabbit.close()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """By TCP and with a password, as another machine's."""
    server = Postgres(port=free_port())
    try:
        server.start()
        server.make_template()
        yield server
    finally:
        server.close()
