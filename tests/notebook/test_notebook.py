"""The notebook, executed from top to bottom in a real kernel: with a relay elsewhere, and alone."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import nbformat
import openai
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT, TINY
from tests.end_to_end.stack import Relay, running

# The message queue that kernels speak by uses tornado's loop, which complains about how pytest set up ours.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(240)]

NOTEBOOK = ROOT / "colab_server.ipynb"
ASK = {"model": TINY, "messages": [{"role": "user", "content": "How are you?"}], "max_tokens": 4}


class Kernel:
    """A kernel with the notebook open."""

    def __init__(self) -> None:
        self.notebook = nbformat.read(NOTEBOOK, as_version=4)
        self.client = NotebookClient(self.notebook, timeout=200, resources={"metadata": {"path": str(ROOT)}})

    @property
    def serve_cell(self) -> Any:
        return self.notebook.cells[-1]

    async def run_up_to_serve(self) -> None:
        for i, cell in enumerate(self.notebook.cells[:-1]):
            if cell.cell_type == "code":
                await self.client.async_execute_cell(cell, i)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Callable[[str], Any]]:
        """Runs the last cell; interrupts it at the end, and waits until it has stopped."""
        cell, i = self.serve_cell, len(self.notebook.cells) - 1
        cell.outputs = []
        running = asyncio.create_task(self.client.async_execute_cell(cell, i))

        async def shown(pattern: str) -> str:
            async with asyncio.timeout(120):
                while not (found := re.search(pattern, self.shown())):
                    assert not running.done(), self.shown()
                    await asyncio.sleep(0.1)
            return found.group(1)

        try:
            yield shown
        finally:
            await self.client.km.interrupt_kernel()
            await asyncio.wait_for(running, 40)
        assert "Stopped" in self.shown()

    def shown(self) -> str:
        parts = []
        for output in self.serve_cell.outputs:
            html = output.get("data", {}).get("text/html", "")
            parts.append(output.get("text", "") + re.sub(r"<[^>]+>", "", html))
        return "\n".join(parts)


@asynccontextmanager
async def kernel(folder: Path, tiny_dir: Path, **settings: str) -> AsyncIterator[Kernel]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RELAY_", "GPU_"))}
    env = {
        **clean,
        "GPU_DATA_DIR": str(folder / "gpu"),
        "GPU_DEVICE": "cpu",
        "GPU_MODELS": f"{TINY}={tiny_dir}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    opened = Kernel()
    async with opened.client.async_setup_kernel(env=env):
        yield opened


async def chat(url: str, key: str) -> int:
    async with httpx2.AsyncClient(timeout=60, trust_env=False) as http:
        headers = {"authorization": f"Bearer {key}"}
        return (await http.post(f"{url}/v1/chat/completions", json=ASK, headers=headers)).status_code


async def until_it_answers(url: str, key: str) -> None:
    async with asyncio.timeout(30):
        while await chat(url, key) != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def test_it_has_no_logic_and_few_lines() -> None:
    cells = [c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    assert len(cells) <= 6
    assert sum(len(source.splitlines()) for source in cells) <= 60
    assert not any(re.search(r"(?m)^\s*(def|class|for|while|try)\b", source) for source in cells)
    assert all(c.get("outputs", []) == [] for c in nbformat.read(NOTEBOOK, as_version=4).cells)


async def test_with_a_relay_it_dials_in_and_can_be_interrupted_and_run_again(tiny_dir: Path, tmp_path: Path) -> None:
    relay = Relay(tmp_path / "relay")
    with running(relay):
        settings = {"GPU_RELAY_URL": relay.url, "GPU_ENROL_TOKEN": relay.enrol_token}
        async with kernel(tmp_path, tiny_dir, **settings) as opened:
            await opened.run_up_to_serve()
            for _ in range(2):
                async with opened.serving() as shown:
                    await shown(r"(by the WebSocket that it opened)")
                    await until_it_answers(relay.url, relay.admin_key)
                assert await chat(relay.url, relay.admin_key) == 503  # it said goodbye: at once, not after a silence


async def test_alone_it_is_complete_and_keeps_its_key(tiny_dir: Path, tmp_path: Path) -> None:
    async with kernel(tmp_path, tiny_dir, GPU_TUNNEL="none") as opened:
        await opened.run_up_to_serve()
        keys = set()
        for _ in range(2):
            async with opened.serving() as shown:
                url, key = await shown(r"Relay 릴레이\s+(\S+)"), await shown(r"Key 열쇠\s+(\S+)")
                keys.add(key)
                await until_it_answers(url, key)
                assert await curl(await shown(r"(?s)(curl http.*?\}')")) == 0
                async with httpx2.AsyncClient(base_url=url, trust_env=False) as http:
                    assert '<div id="root"' in (await http.get("/", headers={"accept": "text/html"})).text, "the page"
                await fine_tune(url, key)
            with pytest.raises(httpx2.ConnectError):
                await chat(url, key)
        assert len(keys) == 1


async def fine_tune(url: str, key: str) -> None:
    """A file, a job, and a word from the tuned model, as in production."""
    row = b'{"prompt": "One, two,", "completion": " three."}'
    http = httpx2.AsyncClient(trust_env=False)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, http_client=http) as client:
        file = await client.files.create(file=("rows.jsonl", b"\n".join([row] * 8)), purpose="fine-tune")
        job = await client.fine_tuning.jobs.create(
            model=TINY, training_file=file.id, hyperparameters={"n_epochs": 1}, extra_body={"layers": {"layers": "3"}}
        )
        async with asyncio.timeout(90):
            while job.status not in ("succeeded", "failed"):
                await asyncio.sleep(0.2)
                job = await client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model
        await client.completions.create(model=job.fine_tuned_model, prompt="One,", max_tokens=2)


async def curl(line: str) -> int:
    """The line as a person pastes it."""
    text = line.replace("&quot;", '"').replace("curl ", "curl -sSf --noproxy '*' ", 1)
    process = await asyncio.create_subprocess_shell(text, stdout=asyncio.subprocess.DEVNULL)
    return await process.wait()


async def test_without_a_gpu_it_says_at_once_what_to_click(tiny_dir: Path, tmp_path: Path) -> None:
    settings = {"GPU_DEVICE": "", "CUDA_VISIBLE_DEVICES": "", "COLAB_RELEASE_TAG": "test"}
    async with kernel(tmp_path, tiny_dir, **settings, PYTHONPATH=str(ROOT / "tests/doubles/colab")) as opened:
        await opened.run_up_to_serve()
        await opened.client.async_execute_cell(opened.serve_cell, len(opened.notebook.cells) - 1)
        assert "Runtime > Change runtime type" in opened.shown()
        assert "런타임 유형 변경" in opened.shown()
