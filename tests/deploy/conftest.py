"""What these tests need on the machine. Under CI it is there, or they fail."""

import os
import shutil

import pytest

from tests.deploy.front import NGINX


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
