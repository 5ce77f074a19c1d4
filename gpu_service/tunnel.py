"""How this service is reached from outside: a tunnel opens, is watched, and closes. One interface, four kinds.

`relay` is in dialout.py. Knows nothing of who is told about a URL; `keep` tells whoever asked.
"""

import asyncio
import contextlib
import logging
import os
import re
import shutil
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

from gpu_service.link import Pauses
from gpu_service.settings import Settings

log = logging.getLogger(__name__)

WATCH_S = 5.0
CLOUDFLARED_S = 60.0  # from its start to a connection
STOP_S = 3.0
DIED_MEANWHILE = (OSError, HTTPException)  # in the middle of an answer, which pyngrok lets through as it is
NGROK_QUOTA = "a free account has 20,000 requests and 1 GB out a month"  # https://ngrok.com/pricing

# https://ngrok.com/docs/errors: by number, what to do, and whether trying again can help.
NGROK_ERRORS: dict[int, tuple[str, bool]] = {
    105: ("NGROK_AUTHTOKEN is no authtoken (an API key, perhaps): copy it anew from dashboard.ngrok.com", False),
    107: ("NGROK_AUTHTOKEN is not valid, or was revoked: copy it anew from dashboard.ngrok.com", False),
    108: ("the account's agents are all in use: stop the other notebook, or its agent at dashboard.ngrok.com", True),
    120: ("the ngrok program is too old: delete it, and it is fetched anew", False),
    121: ("the ngrok program is too old: delete it, and it is fetched anew", False),
    123: ("confirm the account's e-mail address at dashboard.ngrok.com", False),
    313: ("the account may not choose its domain: unset GPU_NGROK_DOMAIN, or reserve it first", False),
    319: ("GPU_NGROK_DOMAIN is not reserved: reserve it at dashboard.ngrok.com, or unset it", False),
    320: ("GPU_NGROK_DOMAIN belongs to another account: check its spelling, or unset it", False),
    324: ("the account may not run more endpoints: stop another one at dashboard.ngrok.com", True),
    334: ("GPU_NGROK_DOMAIN is in use already: stop the other notebook, or unset it", True),
    725: ("the month's traffic is spent: use GPU_TUNNEL=relay or cloudflared, or wait for the next month", False),
    727: ("the month's requests are spent: use GPU_TUNNEL=relay or cloudflared, or wait for the next month", False),
    4018: ("ngrok wants an account and its authtoken: set NGROK_AUTHTOKEN from dashboard.ngrok.com", False),
    9040: ("ngrok takes no agents from this address: use GPU_TUNNEL=relay or cloudflared", False),
}


class TunnelFailed(Exception):
    """One line that says what to do. `hopeless`: trying again can't help."""

    def __init__(self, message: str, *, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


class Tunnel(Protocol):
    @property
    def kind(self) -> str: ...

    async def open(self) -> str | None:
        """The public URL, if this kind has one. May be called again after `watch` returned. Raises TunnelFailed."""

    async def watch(self) -> None:
        """Returns when the URL is not good any more: the tunnel died, or has another one."""

    async def close(self) -> None: ...

    def status(self) -> str:
        """For a person."""


class NoTunnel:
    kind = "none"

    def __init__(self, url: str | None) -> None:
        self._url = url

    async def open(self) -> str | None:
        return self._url

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None: ...

    def status(self) -> str:
        return "no tunnel"


class Cloudflared:
    """A quick tunnel: no account, and a new URL at every start. https://try.cloudflare.com"""

    kind = "cloudflared"

    def __init__(self, target: str) -> None:
        self._target = target
        self._process: Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._last_line = ""

    async def open(self) -> str:
        await self.close()
        program = shutil.which("cloudflared")
        if program is None:
            raise TunnelFailed(
                "there is no cloudflared on the PATH: install it, or use another GPU_TUNNEL", hopeless=True
            )
        self._process = await asyncio.create_subprocess_exec(
            *(program, "tunnel", "--no-autoupdate", "--url", self._target),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            start_new_session=True,  # Ctrl-C is for us; we stop it in order
        )
        try:
            async with asyncio.timeout(CLOUDFLARED_S):
                url = await self._until_connected()
        except TimeoutError as exc:
            raise TunnelFailed(f"cloudflared did not connect in {CLOUDFLARED_S:.0f} s: {self._last_line}") from exc
        self._reading = asyncio.create_task(self._read_on())  # a full pipe would stop it
        return url

    async def _until_connected(self) -> str:
        url = ""
        while line := await self._line():
            # Its own messages name api.trycloudflare.com; the tunnel's URL stands in a frame of its own.
            if found := re.search(r"\|\s+(https://[a-z0-9-]+\.trycloudflare\.com)\s", line):
                url = found.group(1)
            if url and re.search(r"Registered tunnel connection|Connection \S+ registered", line):
                return url
        busy = "Too Many Requests" in self._last_line or "429" in self._last_line
        hint = " (too many quick tunnels from this address: wait some minutes)" if busy else ""
        raise TunnelFailed(f"cloudflared gave up{hint}: {self._last_line or 'it said nothing'}")

    async def _line(self) -> str:
        assert self._process
        assert self._process.stderr
        line = (await self._process.stderr.readline()).decode(errors="replace")
        self._last_line = line.strip() or self._last_line
        return line

    async def _read_on(self) -> None:
        while await self._line():
            pass

    async def watch(self) -> None:
        """Its URL holds for as long as the process; it mends its connections by itself."""
        assert self._process, "open() comes first"
        await self._process.wait()
        log.warning("cloudflared ended: %s", self._last_line)

    async def close(self) -> None:
        process, self._process = self._process, None
        if process and process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_S)
            if process.returncode is None:
                process.kill()
                await process.wait()
        if self._reading:
            await asyncio.wait({self._reading})
            self._reading = None

    def status(self) -> str:
        return "cloudflared quick tunnel: a new URL at each start, no promise of uptime"


class Ngrok:
    """pyngrok drives the agent: it fetches the program where there is none, and speaks to its API on this machine."""

    kind = "ngrok"

    def __init__(self, target: str, token: str, domain: str | None, folder: Path, *, watch_s: float = WATCH_S) -> None:
        self._target, self._token, self._domain, self._folder = target, token, domain, folder
        self._watch_s = watch_s
        self._config: Any = None
        self._process: Any = None
        self._url = ""
        self._n_requests = 0

    async def open(self) -> str:
        return await asyncio.to_thread(self._open)

    def _open(self) -> str:
        try:
            from pyngrok import conf, exception, ngrok
        except ImportError as exc:
            what = "pyngrok is not installed: pip install -r gpu_service/requirements.txt"
            raise TunnelFailed(what, hopeless=True) from exc
        logging.getLogger("pyngrok").setLevel(logging.CRITICAL)  # what matters is said below
        self._folder.mkdir(parents=True, exist_ok=True)
        self._config = conf.PyngrokConfig(
            ngrok_path=shutil.which("ngrok"),
            config_path=str(self._folder / "ngrok.yml"),
            config_version="2",  # the agent's tunnels, which count their requests
            auth_token=self._token,
            start_new_session=os.name == "posix",
        )
        options = {"domain": self._domain} if self._domain else {}
        try:
            ngrok.kill(self._config)  # what is left of one that died
            tunnel = ngrok.connect(self._target, "http", pyngrok_config=self._config, inspect=False, **options)
            self._process = ngrok.get_ngrok_process(self._config)
        except (exception.PyngrokError, *DIED_MEANWHILE) as exc:
            ngrok.kill(self._config)
            raise explained(" ".join(filter(None, (str(exc), str(getattr(exc, "ngrok_error", "") or ""))))) from exc
        self._url = str(tunnel.public_url)
        return self._url

    async def watch(self) -> None:
        """The agent reconnects by itself and keeps its URL; so this is about the process, and what it lists."""
        while await asyncio.to_thread(self._is_good):  # noqa: ASYNC110  nobody tells us
            await asyncio.sleep(self._watch_s)

    def _is_good(self) -> bool:
        from pyngrok import exception, ngrok

        if self._process.proc.poll() is not None:
            log.warning("the ngrok agent ended")
            return False
        try:
            tunnels = {t.public_url: t for t in ngrok.get_tunnels(self._config)}
        except (exception.PyngrokError, *DIED_MEANWHILE) as exc:
            log.warning("the ngrok agent does not answer: %s", exc)
            return False
        if self._url not in tunnels:
            log.warning("ngrok's URL changed")
            return False
        metrics = tunnels[self._url].metrics or {}
        self._n_requests = max(int(metrics.get(kind, {}).get("count", 0)) for kind in ("http", "conns"))
        return True

    async def close(self) -> None:
        if self._config:
            from pyngrok import ngrok

            await asyncio.to_thread(ngrok.kill, self._config)

    def status(self) -> str:
        return f"ngrok: {self._n_requests:,} requests since its start; {NGROK_QUOTA}"


def explained(words: str) -> TunnelFailed:
    """ngrok's words by their number: what to do."""
    if found := re.search(r"ERR_NGROK_(\d+)", words):
        if known := NGROK_ERRORS.get(int(found.group(1))):
            return TunnelFailed(f"{known[0]} (ERR_NGROK_{found.group(1)})", hopeless=not known[1])
        return TunnelFailed(f"ngrok refused: look up {found.group()} at ngrok.com/docs/errors")
    return TunnelFailed(f"ngrok did not start: {words[:300]}")


def choose(settings: Settings, target: str, dialled: Callable[[], Tunnel]) -> Tunnel:
    """The kind that the settings name. `target` is where the tunnel leads, on this machine."""
    if settings.tunnel == "ngrok":
        assert settings.ngrok_token
        return Ngrok(target, settings.ngrok_token, settings.ngrok_domain, settings.data_dir)
    if settings.tunnel == "cloudflared":
        return Cloudflared(target)
    return dialled() if settings.tunnel == "relay" else NoTunnel(settings.public_url)


class Kept:
    """A tunnel that is opened again whenever it breaks, and tells each time where it leads."""

    def __init__(self, tunnel: Tunnel, moved: Callable[[str | None], None]) -> None:
        self._tunnel, self._moved = tunnel, moved
        self.url: str | None = None
        self.trouble = ""

    async def open(self) -> None:
        """The first time. Raises TunnelFailed only where trying again can't help; else `run` does that."""
        try:
            self._tell(await self._tunnel.open())
        except TunnelFailed as exc:
            if exc.hopeless:
                raise
            self.trouble = str(exc)

    async def run(self) -> None:
        """Ends only by being cancelled."""
        pauses = Pauses()
        while True:
            if not self.trouble:
                await self._tunnel.watch()
                # At once: whoever gets this URL next must not get our prompts.
                self._tell(None)
            try:
                self._tell(await self._tunnel.open())
                self.trouble, pauses = "", Pauses()
            except TunnelFailed as exc:
                pause = next(pauses)
                self.trouble = str(exc)
                log.warning("no tunnel: %s. Trying again in %.0f s.", exc, pause)
                await asyncio.sleep(pause)

    async def close(self) -> None:
        await self._tunnel.close()

    def status(self) -> str:
        return f"{self._tunnel.kind}: {self.trouble}" if self.trouble else self._tunnel.status()

    def _tell(self, url: str | None) -> None:
        if url != self.url:
            log.info("reachable at %s", url) if url else log.warning("the tunnel is gone")
            self.url = url
        self._moved(url)
