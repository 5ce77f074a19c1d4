"""Models from the hub, with the hub's own client against a small server that answers as the hub does."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gpu_service.device import Device
from gpu_service.errors import ModelUnreadable
from gpu_service.models import Models
from tests.conftest import ROOT, TINY

COMMIT = "5d0f2a1c7b9e4d3f8a6b1c2d3e4f5a6b7c8d9e0f"
# Fetches as the service does, says what it heard, and ends with the folder or the one line of the error.
FETCH = """
import sys
from pathlib import Path
from gpu_service import hub
from gpu_service.settings import BadSetting
folder = Path(sys.argv[2]) if sys.argv[2] else None
try:
    print("FOUND", hub.fetch(sys.argv[1], None, folder, lambda d: print("HEARD", d.done_bytes, d.total_bytes)))
except BadSetting as exc:
    print("REFUSED", exc)
"""


class Hub:
    """One repository. `cut`: the connection breaks before the weights' end; `refuses`: status and code."""

    def __init__(self, folder: Path) -> None:
        self.files = {p.name: p.read_bytes() for p in folder.iterdir()} | {"pytorch_model.bin": b"a pickle"}
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.cut = False
        self.sizes: dict[str, int] = {}  # as told, where that differs
        self.refuses: tuple[int, str] | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        path = to.path.partition("?")[0]
        self.asked.append((to.command, path, to.headers.get("range")))
        if self.refuses:
            status, code = self.refuses
            self.send(to, status, json.dumps({"error": code}).encode(), {"x-error-code": code, "x-error-message": code})
        elif path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {"type": "file", "path": n, "size": self.size(n), "oid": self.etag(n)} for n in sorted(self.files)
            ]
            self.send(to, 200, json.dumps(entries).encode(), {})
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": n, "size": self.size(n)} for n in sorted(self.files)]
            about = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": []}
            self.send(to, 200, json.dumps(about).encode(), {})
        elif path.startswith("/org/tiny/resolve/") and (name := path.rpartition("/")[2]) in self.files:
            self.send_file(to, name)
        else:
            self.send(to, 404, b"{}", {"x-error-code": "RepoNotFound"})

    def size(self, name: str) -> int:
        return self.sizes.get(name, len(self.files[name]))

    def etag(self, name: str) -> str:
        return hashlib.sha1(self.files[name], usedforsecurity=False).hexdigest()

    def send(self, to: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]) -> None:
        to.send_response(status)
        for key, value in {"content-type": "application/json", "content-length": str(len(content)), **headers}.items():
            to.send_header(key, value)
        to.end_headers()
        if to.command == "GET":
            to.wfile.write(content)

    def send_file(self, to: BaseHTTPRequestHandler, name: str) -> None:
        whole, status, start = self.files[name], 200, 0
        headers = {"etag": f'"{self.etag(name)}"', "x-repo-commit": COMMIT, "accept-ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-", to.headers.get("range") or ""):
            status, start = 206, int(wanted[1])
            headers["content-range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        part = whole[start:]
        cut = self.cut and name.endswith(".safetensors")
        to.send_response(status)
        length = len(part) if to.command == "GET" else self.size(name)
        for key, value in {**headers, "content-length": str(length)}.items():
            to.send_header(key, value)
        to.end_headers()
        if to.command == "GET":
            to.wfile.write(part[:-1000] if cut else part)
            to.close_connection = cut


@pytest.fixture
def hub(tiny_dir: Path) -> Iterator[Hub]:
    hub = Hub(tiny_dir)
    thread = threading.Thread(target=hub.server.serve_forever)
    thread.start()
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


class Fetched:
    def __init__(self, output: str) -> None:
        self.output = output
        found = re.search(r"^FOUND (.+)$", output, re.MULTILINE)
        refused = re.search(r"^REFUSED (.+)\Z", output.strip(), re.MULTILINE)
        self.folder = Path(found[1]) if found else None
        self.refused = refused[1] if refused else ""
        self.heard = [(int(a), int(b)) for a, b in re.findall(r"^HEARD (\d+) (\d+)$", output, re.MULTILINE)]


def fetch(url: str, home: Path, name: str = "org/tiny", folder: Path | None = None, **env: str) -> Fetched:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, name, str(folder or "")],
        cwd=ROOT,
        env={**clean, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return Fetched(done.stdout)


def test_a_model_is_fetched_at_its_commit_without_pickles_and_then_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    first = fetch(hub.url, tmp_path / "home", folder=tmp_path / "drive")
    assert first.folder, first.output
    assert first.folder.name == COMMIT
    assert first.folder.is_relative_to(tmp_path / "drive")
    assert {p.name for p in first.folder.iterdir()} == set(hub.files) - {"pytorch_model.bin"}
    assert first.heard[-1][0] == first.heard[-1][1] == sum(p.stat().st_size for p in first.folder.iterdir())
    again = fetch("http://127.0.0.1:9", tmp_path / "home", folder=tmp_path / "drive", HF_HUB_OFFLINE="1")
    assert again.folder == first.folder
    assert not again.heard


def test_a_broken_connection_goes_on_where_it_stopped_and_a_later_start_keeps_whole_files(
    hub: Hub, tmp_path: Path
) -> None:
    def read() -> list[tuple[str, str | None]]:
        return [
            (path.rpartition("/")[2], r) for method, path, r in hub.asked if method == "GET" and "/resolve/" in path
        ]

    hub.cut = True
    first = fetch(hub.url, tmp_path)
    assert "files that are whole are kept" in first.refused, first.output
    assert ("model.safetensors", f"bytes={10 * 2**20}-") in read(), "the client writes in pieces of this size"
    hub.cut = False
    hub.asked.clear()
    assert fetch(hub.url, tmp_path).folder
    assert {name for name, _ in read()} == {"model.safetensors"}
    found = next(tmp_path.glob("hub/*/snapshots/*/model.safetensors"))
    assert found.read_bytes() == hub.files["model.safetensors"]


@pytest.mark.parametrize(
    ("refuses", "says"),
    [
        ((401, "GatedRepo"), ["accept a licence", "/org/tiny", "HF_TOKEN"]),
        ((403, "GatedRepo"), ["accept a licence", "/org/tiny", "HF_TOKEN"]),
        ((404, "RepoNotFound"), ["no such model", "HF_TOKEN"]),
        ((403, "Forbidden"), ["refuses it (403)", "HF_TOKEN"]),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    hub: Hub, tmp_path: Path, refuses: tuple[int, str], says: list[str]
) -> None:
    hub.refuses = refuses
    refused = fetch(hub.url, tmp_path).refused
    assert "\n" not in refused
    for part in ["GPU_MODELS names 'org/tiny'", *says]:
        assert part in refused


def test_a_disk_that_is_too_small_is_told_with_both_figures_before_anything_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    hub.sizes["model.safetensors"] = 10**15
    refused = fetch(hub.url, tmp_path).refused
    assert "1,000,000,0" in refused
    assert re.search(r"[\d,]+ MB are free", refused)
    assert not any(method == "GET" and path.endswith(".safetensors") for method, path, _ in hub.asked)


def test_a_drive_that_is_not_there_is_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert "is the drive mounted?" in fetch(hub.url, tmp_path, folder=tmp_path / "file" / "models").refused


def test_files_that_vanish_or_are_cut_before_they_are_read_are_a_clear_error(
    tiny_dir: Path, cpu: Device, tmp_path: Path
) -> None:
    for harm in ("vanish", "cut"):
        folder = tmp_path / harm
        folder.mkdir()
        for file in tiny_dir.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        models = Models((f"{TINY}={folder}",), cpu)
        weights = folder / "model.safetensors"
        if harm == "vanish":
            weights.unlink()
        else:
            weights.write_bytes(weights.read_bytes()[:5000])
        with pytest.raises(ModelUnreadable, match="drive is mounted"):
            models.load(TINY)
