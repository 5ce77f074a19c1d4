"""Tunnels against doubles of the programs behind them: URLs, errors by number, deaths and changes."""

import asyncio
import os
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gpu_service import tunnel as tunnels
from gpu_service.settings import BadSetting, Settings, from_env
from gpu_service.tunnel import Cloudflared, Kept, Ngrok, NoTunnel, Tunnel, TunnelFailed
from tests.conftest import ROOT

TARGET = "http://127.0.0.1:8001"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts the double of a program on the PATH; returns the folder that tells it what to do."""

    def install(name: str) -> Path:
        folder = tmp_path / f"{name}-double"
        folder.mkdir()
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/doubles/{name}.py" "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv(f"{name.upper()}_DOUBLE", str(folder))
        return folder

    return install


@pytest.fixture
def ngrok(program: Callable[[str], Path]) -> Path:
    return program("ngrok")


@pytest.fixture
def cloudflared(program: Callable[[str], Path]) -> Path:
    return program("cloudflared")


def children(name: str) -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if any(f"{name}.py" in a for a in p.cmdline())]


async def closed(tunnel: Tunnel, name: str) -> None:
    await tunnel.close()
    assert not children(name)


# --- ngrok ---


async def test_ngrok_gives_its_url_and_what_it_was_told(ngrok: Path, tmp_path: Path) -> None:
    tunnel = Ngrok(TARGET, "a-token", None, tmp_path)
    assert await tunnel.open() == "https://d0ub-1e.ngrok-free.app"
    assert '"--authtoken", "a-token"' in (ngrok / "started").read_text()
    assert f'"addr": "{TARGET}"' in (ngrok / "asked").read_text()
    (ngrok / "requests").write_text("1234")
    with suppress(TimeoutError):
        await asyncio.wait_for(tunnel.watch(), 0.5)
    assert "1,234 requests" in tunnel.status()
    assert "20,000 requests and 1 GB" in tunnel.status()
    await closed(tunnel, "ngrok")


async def test_a_reserved_domain_is_asked_for(ngrok: Path, tmp_path: Path) -> None:
    tunnel = Ngrok(TARGET, "a-token", "mine.ngrok-free.app", tmp_path)
    assert await tunnel.open() == "https://mine.ngrok-free.app"
    await closed(tunnel, "ngrok")


@pytest.mark.parametrize(
    ("words", "says", "hopeless"),
    [
        ("authentication failed: The authtoken you specified is invalid.\nERR_NGROK_107", "copy it anew", True),
        ("authentication failed: Your account is limited to 1 agent.\nERR_NGROK_108", "stop the other notebook", False),
        ("Something new.\nERR_NGROK_99999", "ERR_NGROK_99999 at ngrok.com/docs/errors", False),
    ],
)
async def test_what_the_agent_dies_of_is_said_by_number(
    ngrok: Path, tmp_path: Path, words: str, says: str, hopeless: bool
) -> None:
    (ngrok / "error").write_text(words)
    with pytest.raises(TunnelFailed, match=says) as failed:
        await Ngrok(TARGET, "a-token", None, tmp_path).open()
    assert failed.value.hopeless is hopeless
    assert not children("ngrok")


async def test_a_refused_endpoint_is_said_by_number(ngrok: Path, tmp_path: Path) -> None:
    (ngrok / "refuse").write_text("failed to start tunnel: The endpoint is already online.\n\nERR_NGROK_334\n")
    with pytest.raises(TunnelFailed, match="in use already"):
        await Ngrok(TARGET, "a-token", "mine.ngrok-free.app", tmp_path).open()
    assert not children("ngrok")


@pytest.mark.parametrize("how", ["killed", "changed"])
async def test_an_agent_that_dies_or_changes_its_url_is_noticed_and_opened_again(
    ngrok: Path, tmp_path: Path, how: str
) -> None:
    told: list[str | None] = []
    kept = Kept(Ngrok(TARGET, "a-token", None, tmp_path, watch_s=0.05), told.append)
    await kept.open()
    running = asyncio.create_task(kept.run())
    (ngrok / "url").write_text("https://an-other.ngrok-free.app")
    if how == "killed":
        for process in children("ngrok"):
            process.send_signal(signal.SIGKILL)
    async with asyncio.timeout(20):
        while len(told) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert told == ["https://d0ub-1e.ngrok-free.app", None, "https://an-other.ngrok-free.app"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await kept.close()
    assert not children("ngrok")


# --- cloudflared ---


async def test_cloudflared_gives_the_url_out_of_its_frame_and_is_read_on(cloudflared: Path) -> None:
    tunnel = Cloudflared(TARGET)
    url = await tunnel.open()
    assert url.startswith("https://d0ub-")
    assert url.endswith(".trycloudflare.com")
    assert (cloudflared / "target").read_text() == TARGET
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(tunnel.watch(), 0.5)
    assert "connIndex=9999" in tunnel._last_line  # nothing was left in the pipe
    await closed(tunnel, "cloudflared")


async def test_cloudflared_that_gives_up_says_why(cloudflared: Path) -> None:
    words = 'failed to request quick Tunnel: Post "https://api.trycloudflare.com/tunnel": no such host'
    (cloudflared / "error").write_text(words)
    tunnel = Cloudflared(TARGET)
    with pytest.raises(TunnelFailed, match="no such host"):
        await tunnel.open()
    (cloudflared / "error").write_text(
        'ERR Error unmarshaling QuickTunnel response status_code="429 Too Many Requests"'
    )
    with pytest.raises(TunnelFailed, match="wait some minutes"):
        await tunnel.open()
    await closed(tunnel, "cloudflared")


async def test_cloudflared_that_ends_is_opened_again_with_its_new_url(cloudflared: Path) -> None:
    (cloudflared / "die_after_s").write_text("0.1")
    told: list[str | None] = []
    kept = Kept(Cloudflared(TARGET), told.append)
    await kept.open()
    running = asyncio.create_task(kept.run())
    async with asyncio.timeout(20):
        while len(told) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    first, gone, second = told[:3]
    assert first
    assert gone is None  # at once, so that a stranger who gets the old URL gets no prompt
    assert second
    assert second != first
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await closed(kept, "cloudflared")  # type: ignore[arg-type]


async def test_without_the_program_it_is_hopeless_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TunnelFailed, match="install it") as failed:
        await Cloudflared(TARGET).open()
    assert failed.value.hopeless


# --- keeping one, and choosing one ---


class Moody:
    """Fails as often as it is told."""

    kind = "moody"

    def __init__(self, failures: list[TunnelFailed]) -> None:
        self._failures = failures

    async def open(self) -> str:
        if self._failures:
            raise self._failures.pop(0)
        return "https://at.last"

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None: ...

    def status(self) -> str:
        return "in a good mood"


async def test_trouble_that_may_pass_is_shown_and_tried_again_and_hopeless_trouble_is_raised() -> None:
    told: list[str | None] = []
    kept = Kept(Moody([TunnelFailed("not now"), TunnelFailed("not yet")]), told.append)
    await kept.open()
    assert kept.status() == "moody: not now"
    running = asyncio.create_task(kept.run())
    async with asyncio.timeout(5):
        while not told:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert kept.status() == "in a good mood"
    running.cancel()
    with pytest.raises(TunnelFailed, match="never"):
        await Kept(Moody([TunnelFailed("never", hopeless=True)]), told.append).open()


RELAY = {"GPU_RELAY_URL": "https://relay.example", "GPU_ENROL_TOKEN": "token"}


@pytest.mark.parametrize(
    ("env", "kind"),
    [
        ({}, "none"),
        (RELAY, "relay"),
        ({**RELAY, "NGROK_AUTHTOKEN": "t"}, "ngrok"),
        ({**RELAY, "NGROK_AUTHTOKEN": "t", "GPU_TUNNEL": "relay"}, "relay"),
        ({**RELAY, "GPU_PUBLIC_URL": "https://here.example"}, "none"),
        ({"NGROK_AUTHTOKEN": "t"}, "ngrok"),
    ],
)
def test_the_default_is_the_most_settled_that_there_is(env: dict[str, str], kind: str) -> None:
    assert from_env(env).tunnel == kind


def test_cloudflared_is_chosen_where_it_is_found(cloudflared: Path) -> None:
    assert from_env({"PATH": os.environ["PATH"]}).tunnel == "cloudflared"


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"GPU_TUNNEL": "relay"}, "no relay to dial"),
        ({"GPU_TUNNEL": "ngrok"}, "NGROK_AUTHTOKEN"),
        ({"GPU_TUNNEL": "pigeon"}, "none, ngrok, cloudflared, relay"),
        ({**RELAY, "GPU_TUNNEL": "relay", "GPU_PUBLIC_URL": "https://here.example"}, "GPU_TUNNEL=none"),
        ({"GPU_RUNTIME_ENDS_AT": "tomorrow"}, "unix seconds"),
    ],
)
def test_a_tunnel_that_can_not_be_is_one_line(env: dict[str, str], says: str) -> None:
    with pytest.raises(BadSetting, match=says):
        from_env(env)


async def test_none_has_the_url_that_it_was_given() -> None:
    tunnel = tunnels.choose(Settings(public_url="https://here.example"), TARGET, lambda: NoTunnel(None))
    assert await tunnel.open() == "https://here.example"
