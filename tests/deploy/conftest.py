"""What these tests need on the machine. Under CI it is there, or they fail."""

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.deploy.front import NGINX
from tests.deploy.machine import Machine


def program(name: str) -> str:
    if found := shutil.which(name):
        return found
    message = f"{name} is not installed"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="package", autouse=True)
def programs() -> None:
    for name in (NGINX, "openssl", "curl"):
        program(name)


@pytest.fixture(scope="package")
def machine(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Installed, and used by one test after the other as a machine is by its owner."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    try:
        machine.install()
        yield machine
    finally:
        machine.close()
