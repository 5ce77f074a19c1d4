"""The page in Firefox and in WebKit: sign in, ask, read the first words, stop, see what a choice of layers costs."""

import asyncio
import json
from collections.abc import AsyncIterator
from glob import glob
from pathlib import Path

import pytest

from tests.browser.conftest import QUESTION, Stack, program
from tests.browser.engines import Engine, firefox, webkit
from tests.browser.visit import ANSWERED

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(params=["firefox", "webkit"])
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Engine]:
    if request.param == "firefox":
        async with firefox(program("firefox-esr", "firefox"), tmp_path) as browser:
            yield browser
    else:
        found = glob("/usr/lib/*/webkit2gtk-4.*/MiniBrowser") + glob("/usr/libexec/webkit2gtk-4.*/MiniBrowser")
        driver, xvfb, mini = program("WebKitWebDriver"), program("Xvfb"), program(*(found or ["MiniBrowser"]))
        async with webkit(driver, mini, xvfb, tmp_path) as browser:
            yield browser


async def appears(engine: Engine, script: str, within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not await engine.run(f"Boolean({script})"):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def write(engine: Engine, selector: str, text: str) -> None:
    """As typed: the browser itself changes the field and tells the page."""
    await appears(engine, f"document.querySelector({json.dumps(selector)})")
    done = await engine.run(
        f"(document.querySelector({json.dumps(selector)}).focus(), "
        f"document.execCommand('insertText', false, {json.dumps(text)}))"
    )
    assert done


async def click(engine: Engine, selector: str) -> None:
    await engine.run(f"document.querySelector({json.dumps(selector)}).click()")


async def test_a_first_visit(engine: Engine, stack: Stack, pictures: Path, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["engine"]
    await engine.go(stack.relay.url)
    await write(engine, "input[type=password]", stack.relay.admin_key)
    await click(engine, "button[type=submit]")
    await write(engine, "main form textarea", QUESTION)
    await click(engine, "main form button[type=submit]")
    await appears(engine, f"document.querySelector('{ANSWERED}')?.textContent.length > 10", 120)
    await engine.picture(pictures / f"{name}-writing.png")
    await click(engine, "main form button")
    await appears(engine, "document.querySelector('article [aria-busy=false]')")
    await engine.go(f"{stack.relay.url}/training/new")
    await appears(engine, "document.querySelector('aside')?.textContent.includes('272')")
    await engine.picture(pictures / f"{name}-training.png")
    assert (
        await engine.run("getComputedStyle(document.querySelector('[aria-pressed=true]')).backgroundColor")
        == "rgb(11, 110, 95)"
    )
