"""nginx with the configuration that is shipped, on free loopback ports, with a certificate made for the test."""

import asyncio
import os
import signal
import ssl
import subprocess
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2

from tests.conftest import ROOT
from tests.end_to_end.stack import free_port

DOMAIN = "localhost"  # the one name that leads here on every machine
NGINX = "/usr/sbin/nginx"


def certificate(folder: Path) -> Path:
    """For DOMAIN, by an authority of its own."""
    folder.mkdir(parents=True)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={DOMAIN}", "-addext", f"subjectAltName=DNS:{DOMAIN}"]
    command += ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "fullchain.pem"


class Nginx:
    """Before the relays at these URLs. `settings` are render.sh's and the relay's."""

    def __init__(self, folder: Path, relays: Sequence[str], **settings: str) -> None:
        self.folder = folder
        self.http_port, self.https_port = free_port(), free_port()
        self.url = f"https://{DOMAIN}:{self.https_port}"
        self.authority = certificate(folder / "tls")
        (folder / "acme").mkdir()
        self.env = {
            "PATH": os.environ["PATH"],
            "DOMAIN": DOMAIN,
            "RELAYS": " ".join(url.removeprefix("http://") for url in relays),
            "ADDRESSES": "127.0.0.1",
            "HTTP_PORT": str(self.http_port),
            "HTTPS_PORT": str(self.https_port),
            "TLS_DIR": str(folder / "tls"),
            "ACME_ROOT": str(folder / "acme"),
            "STATE": str(folder),
            "PID": str(folder / "pid"),
            "ERROR_LOG": str(folder / "error.log"),
            **settings,
        }
        self.conf = folder / "nginx.conf"
        self._process: Process | None = None

    def render(self) -> str:
        command = ["sh", str(ROOT / "deploy/nginx/render.sh")]
        done = subprocess.run(command, env=self.env, check=True, capture_output=True, text=True)
        return done.stdout

    def write(self, text: str) -> None:
        self.conf.write_text(text)

    def check(self) -> str:
        """What `nginx -t` says. Raises CalledProcessError."""
        done = subprocess.run(self._command("-t"), check=True, capture_output=True, text=True)
        return done.stderr

    def _command(self, *more: str) -> list[str]:
        user = "user root; " if os.getuid() == 0 else ""  # the test's folder is its owner's only
        return [NGINX, "-c", str(self.conf), "-e", str(self.folder / "error.log"), "-g", f"{user}daemon off;", *more]

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Nginx"]:
        if not self.conf.exists():
            self.write(self.render())
        self._process = await asyncio.create_subprocess_exec(*self._command())
        try:
            async with asyncio.timeout(20):
                while not (self.folder / "pid").exists():
                    assert self._process.returncode is None
                    await asyncio.sleep(0.01)
            yield self
        finally:
            if self._process.returncode is None:
                self._process.send_signal(signal.SIGTERM)
            await self._process.wait()

    # --- ways to it ---

    def client(self, key: str, source: str | None = None) -> httpx2.AsyncClient:
        context = ssl.create_default_context(cafile=str(self.authority))
        return httpx2.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            transport=httpx2.AsyncHTTPTransport(verify=context, local_address=source),
            timeout=20,
        )

    async def curl(self, *arguments: str) -> str:
        command = ["curl", "--silent", "--show-error", "--max-time", "20", "--noproxy", "*"]
        command += ["--cacert", str(self.authority), *arguments]
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()
