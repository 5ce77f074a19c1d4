"""The built page on a real relay with a real gpu process and the demo's model, and the browsers that look at it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from demo.model import NAME
from tests.conftest import ROOT
from tests.end_to_end.stack import Gpu, Relay, running

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]

QUESTION = "Give me three ideas for a rainy Sunday."


@dataclass(frozen=True)
class Stack:
    relay: Relay
    gpu: Gpu
    model: str


def program(*names: str) -> str:
    """The first of these programs that is there. Under CI a missing one is a failure, never a skip."""
    for name in names:
        if found := shutil.which(name):
            return found
    message = f"none of {', '.join(names)} is installed"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def page_built() -> None:
    done = subprocess.run(["sh", str(ROOT / "web/build.sh")], capture_output=True, text=True, timeout=280)
    if done.returncode == 3 and not os.environ.get("CI"):
        pytest.skip("no Node to build the page with")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")  # its driver keeps an event loop running, in which no asynchronous test can start
def chromium() -> Iterator[Browser]:
    path = program("chromium", "chromium-browser", "google-chrome")
    expect.set_options(timeout=20_000)  # a machine that does other things too
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def stack(page_built: None, smol_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    relay = Relay(folder / "relay")
    with running(relay):
        gpu = Gpu(folder / "gpu", {NAME: smol_dir}, relay)
        with running(gpu):
            relay.serves(NAME)
            yield Stack(relay, gpu, NAME)


@pytest.fixture(scope="session")
def pictures() -> Path:
    """Where screenshots go, to be looked at: $PICTURES, or data/pictures."""
    folder = Path(os.environ.get("PICTURES") or ROOT / "data" / "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
