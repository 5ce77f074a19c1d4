"""Two more browsers, each by the automation protocol that it speaks itself: no driver has to be fetched.

Firefox by WebDriver BiDi (https://w3c.github.io/webdriver-bidi/), WebKitGTK by WebDriver (https://w3c.github.io/webdriver/).
"""

import asyncio
import base64
import itertools
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from tests.end_to_end.stack import free_port

START_S = 150.0  # a busy machine starts a browser slowly


class Engine(Protocol):
    async def go(self, url: str) -> None: ...

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""

    async def picture(self, path: Path) -> None: ...


@asynccontextmanager
async def process(command: list[str], folder: Path, **env: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    with (folder / "browser.log").open("ab") as log:
        clean = {k: v for k, v in os.environ.items() if k.lower() not in ("http_proxy", "https_proxy", "all_proxy")}
        running = subprocess.Popen(  # noqa: ASYNC220
            command, env={**clean, "HOME": str(folder), **env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            await asyncio.to_thread(running.wait, 10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


class Firefox:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._context = ""

    async def call(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(START_S):
            while (answer := await self._socket.receive_json()).get("id") != number:
                pass
        assert answer["type"] == "success", answer
        return answer["result"]

    async def open(self) -> None:
        await self.call("session.new", capabilities={})
        tree = await self.call("browsingContext.getTree")
        self._context = tree["contexts"][0]["context"]

    async def go(self, url: str) -> None:
        await self.call("browsingContext.navigate", context=self._context, url=url, wait="complete")

    async def run(self, script: str) -> Any:
        target = {"context": self._context}
        answer = await self.call("script.evaluate", expression=f"({script})", target=target, awaitPromise=True)
        assert answer["type"] == "success", answer
        return answer["result"].get("value")

    async def picture(self, path: Path) -> None:
        answer = await self.call("browsingContext.captureScreenshot", context=self._context)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(answer["data"]))


@asynccontextmanager
async def firefox(program: str, folder: Path) -> AsyncIterator[Engine]:
    port = free_port()
    profile = folder / "profile"
    profile.mkdir()
    (profile / "user.js").write_text(
        'user_pref("intl.accept_languages", "en-US");\nuser_pref("intl.locale.requested", "en-US");\n'
    )
    command = [program, "--headless", "--no-remote", "--profile", str(profile), f"--remote-debugging-port={port}"]
    async with process([*command, "about:blank"], folder), aiohttp.ClientSession() as session:
        async with asyncio.timeout(START_S):
            while True:
                try:
                    socket = await session.ws_connect(f"http://127.0.0.1:{port}/session", max_msg_size=0)
                    break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.2)
        async with socket:
            browser = Firefox(socket)
            await browser.open()
            yield browser


class WebKit:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        async with self._session.request(method, self._url + path, json=body) as response:
            answer = (await response.json())["value"]
            assert response.status == 200, answer
            return answer

    async def go(self, url: str) -> None:
        await self.call("POST", "/url", {"url": url})

    async def run(self, script: str) -> Any:
        return await self.call("POST", "/execute/sync", {"script": f"return ({script})", "args": []})

    async def picture(self, path: Path) -> None:
        await asyncio.to_thread(path.write_bytes, base64.b64decode(await self.call("GET", "/screenshot")))


@asynccontextmanager
async def webkit(driver: str, browser: str, xvfb: str, folder: Path) -> AsyncIterator[Engine]:
    port, reading, writing = free_port(), *os.pipe()
    screen = [xvfb, "-displayfd", str(writing), "-screen", "0", "1440x900x24", "-nolisten", "tcp"]
    with (folder / "screen.log").open("ab") as log:
        display = subprocess.Popen(screen, pass_fds=[writing], stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # noqa: ASYNC220
    os.close(writing)
    try:
        with os.fdopen(reading) as told:
            number = (await asyncio.to_thread(told.readline)).strip()  # Xvfb took a free one
        env = {"DISPLAY": f":{number}", "GDK_BACKEND": "x11", "LIBGL_ALWAYS_SOFTWARE": "1", "LANG": "C.UTF-8"}
        env |= {"WEBKIT_DISABLE_COMPOSITING_MODE": "1", "WEBKIT_DISABLE_DMABUF_RENDERER": "1", "NO_AT_BRIDGE": "1"}
        options = {"webkitgtk:browserOptions": {"binary": browser, "args": ["--automation"]}}
        timeout = aiohttp.ClientTimeout(START_S)
        root = f"http://127.0.0.1:{port}/session"
        command = [driver, f"--port={port}", "--host=127.0.0.1"]
        async with process(command, folder, **env), aiohttp.ClientSession(timeout=timeout) as session:
            one = WebKit(session, f"{root}/{await _started(session, root, options)}")
            try:
                yield one
            finally:
                await one.call("DELETE", "")
    finally:
        display.terminate()
        display.wait()


async def _started(session: aiohttp.ClientSession, root: str, options: dict[str, Any]) -> str:
    async with asyncio.timeout(START_S):
        while True:
            try:
                async with session.post(root, json={"capabilities": {"alwaysMatch": options}}) as response:
                    answer = (await response.json())["value"]
                    assert response.status == 200, answer
                    return str(answer["sessionId"])
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.2)
