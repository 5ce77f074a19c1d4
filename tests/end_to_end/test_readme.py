"""The README's `curl` lines, as they stand there: on the relay, on the gpu, and with what a notebook shows."""

import asyncio
import os
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.end_to_end.stack import Gpu, Relay, running

BLOCKS = [
    block
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    if "curl" in block
]
DEMO, HUB = "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"


async def shell(text: str, folder: Path, **env: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", text),
        cwd=folder,
        env={**os.environ, **env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.timeout(200)
async def test_every_curl_line_of_the_readme_works(tiny_dir: Path, tmp_path: Path) -> None:
    """On free ports in place of 8000 and 8001, and with a small model under the demo's name."""
    relay = Relay(tmp_path / "relay")
    with running(relay):
        gpu = Gpu(tmp_path / "gpu", {DEMO: tiny_dir, HUB: tiny_dir}, relay)
        with running(gpu):
            relay.serves(HUB)
            for name, service in (("relay", relay), ("gpu", gpu)):
                (tmp_path / "data").mkdir(exist_ok=True)
                (tmp_path / "data" / name).symlink_to(service.folder / "data")
            (tmp_path / "demo").symlink_to(ROOT / "demo")
            assert len(BLOCKS) == 4
            for block in BLOCKS:
                text = block.replace("127.0.0.1:8000", f"127.0.0.1:{relay.port}")
                text = text.replace("127.0.0.1:8001", f"127.0.0.1:{gpu.port}")
                for url, key in ((relay.url, relay.admin_key), (gpu.url, gpu.key)):
                    answer = await shell(text, tmp_path, URL=url, KEY=key)
                    assert re.search(r'"choices"|ftevent-', answer), (block, answer)
                    assert '"error":{' not in answer.replace(" ", "")
                    if "$URL" not in block:
                        break
