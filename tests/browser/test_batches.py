"""Batches in Chromium: from a file that is refused to the files of answers, in both languages and on a narrow phone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ViewportSize, expect

from tests.browser.conftest import Stack
from tests.browser.visit import LANGUAGES, SLOW_MS, visiting
from tests.conftest import TINY
from tests.end_to_end.stack import Gpu, Relay, running

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

CHAT: Any = "/v1/chat/completions"
NARROW = ViewportSize(width=360, height=740)
DROP = """([name, content]) => {
  const carried = new DataTransfer();
  carried.items.add(new File([content], name));
  return carried;
}"""


@pytest.fixture(scope="module")
def stack(page_built: None, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """With a model so small that what is watched here happens at once."""
    folder = tmp_path_factory.mktemp("batches")
    relay = Relay(folder / "relay")
    with running(relay):
        gpu = Gpu(folder / "gpu", {TINY: tiny_dir}, relay, GPU_CHECKPOINT_EVERY_S="0.5", GPU_BATCH_ROWS="8")
        with running(gpu):
            relay.serves(TINY)
            yield Stack(relay, gpu, TINY)


def row(model: str, number: int, **more: Any) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": f"Count to {number}."}], "max_tokens": 4, **more}
    return json.dumps({"custom_id": f"row-{number}", "method": "POST", "url": CHAT, "body": body})


def key_of(relay: Relay, user: str, **limits: Any) -> str:
    made = relay.http().post("/api/keys", json={"user": user, **limits}).raise_for_status().json()
    return str(made["key"])


def start(relay: Relay, key: str, rows: list[str]) -> str:
    client = relay.client(key)
    file = client.files.create(file=("rivers.jsonl", "\n".join(rows).encode()), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"description": "rivers.jsonl"}
    ).id


def test_from_a_refused_file_to_its_answers(chromium: Browser, stack: Stack, pictures: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([row(stack.model, 1), "{broken", row("other", 3)]))
    good = "\n".join([*(row(stack.model, n) for n in range(5)), row(stack.model, 5, max_tokens=-1)])
    with visiting(chromium, stack.relay) as visit:
        page = visit.page
        visit.sign_in(key_of(stack.relay, "ada"))
        page.get_by_role("link", name="Batches").click()
        expect(page.get_by_role("heading", name="No batch yet")).to_be_visible()
        expect(page.locator("pre")).to_contain_text(stack.model)
        visit.look(pictures / "batches-none.png")
        page.get_by_role("link", name="New batch").click()
        page.locator("input[type=file]").set_input_files(bad)
        report = page.get_by_role("alert")
        expect(report).to_contain_text("bad.jsonl was not accepted")
        expect(report).to_contain_text("Line 2")
        expect(report).to_contain_text("Line 3")
        expect(report).to_contain_text("Correct these lines")
        visit.look(pictures / "batch-refused.png")

        field = page.get_by_text("Drop a file here").locator("..")
        field.dispatch_event("drop", {"dataTransfer": page.evaluate_handle(DROP, ["good.jsonl", good])})
        expect(page.get_by_role("radio", name="good.jsonl")).to_be_checked()
        asks = page.locator("section").filter(has_text="What the file asks for")
        expect(asks).to_contain_text(stack.model)
        expect(asks).to_contain_text(CHAT)
        expect(asks).to_contain_text("6 rows")
        page.get_by_role("combobox", name="Window").click()
        page.get_by_role("option", name="6 hours").click()
        visit.look(pictures / "batch-new.png")
        visit.button("Start the batch").click()

        page.wait_for_url(re.compile(r"/batches/batch_"))
        expect(page.get_by_role("heading", name="good.jsonl")).to_be_visible()
        expect(page.get_by_text("Done", exact=True)).to_be_visible(timeout=SLOW_MS)  # no reload: it comes by itself
        expect(page.get_by_text("5 of 6 answered")).to_be_visible()
        expect(page.get_by_text("1 refused")).to_be_visible()
        expect(page.get_by_text("5 answers and 1 errors are ready.")).to_be_visible()
        visit.look(pictures / "batch-done.png")
        with page.expect_download() as answers:
            visit.button("Download answers").click()
        lines = [json.loads(line) for line in answers.value.path().read_text().splitlines()]
        assert [line["custom_id"] for line in lines] == [f"row-{n}" for n in range(5)]
        assert re.fullmatch(r"batch_\w+_output\.jsonl", answers.value.suggested_filename)
        with page.expect_download() as errors:
            visit.button("Download errors").click()
        assert json.loads(errors.value.path().read_text())["custom_id"] == "row-5"
        page.get_by_role("link", name="All batches").click()
        expect(page.get_by_role("link", name=re.compile("good.jsonl.*Done.*5 of 6 answered"))).to_be_visible()
        page.get_by_role("link", name=re.compile("good.jsonl")).click()
        visit.button("Run it again").click()
        expect(page.get_by_role("radio", name="good.jsonl")).to_be_checked()


def test_a_batch_is_paused_goes_on_and_is_cancelled_by_keyboard(
    chromium: Browser, stack: Stack, pictures: Path
) -> None:
    key = key_of(stack.relay, "bob")
    batch = start(stack.relay, key, [row(stack.model, n, max_tokens=400, ignore_eos=True) for n in range(400)])
    with visiting(chromium, stack.relay) as visit:
        page = visit.page
        visit.sign_in(key)
        visit.go(f"/batches/{batch}")
        expect(page.get_by_role("status").get_by_text("Answering", exact=True)).to_be_visible(timeout=SLOW_MS)
        visit.look(pictures / "batch-answering.png")
        visit.button("Pause").press("Enter")
        expect(page.get_by_text("Paused", exact=True)).to_be_visible(timeout=SLOW_MS)
        visit.button("Resume").press("Enter")
        expect(visit.button("Pause")).to_be_visible(timeout=SLOW_MS)
        visit.button("Cancel batch").press("Enter")
        expect(page.get_by_role("dialog")).to_contain_text("What is answered by now is kept")
        expect(visit.button("Let it run")).to_be_focused()  # the way out
        visit.look(pictures / "batch-cancel.png")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_text("Cancelled", exact=True)).to_be_visible(timeout=SLOW_MS)
        expect(page.get_by_text(re.compile("rows have no answer. The errors file names them"))).to_be_visible()
        expect(visit.button("Download errors")).to_be_visible()


def test_a_batch_that_failed_says_why_and_what_to_do(chromium: Browser, stack: Stack, pictures: Path) -> None:
    key = key_of(stack.relay, "eve", tokens_per_month=30)
    batch = start(stack.relay, key, [row(stack.model, n, max_tokens=100, ignore_eos=True) for n in range(200)])
    with visiting(chromium, stack.relay) as visit:
        visit.sign_in(key)
        visit.go(f"/batches/{batch}")
        alert = visit.page.get_by_role("alert")
        expect(alert).to_contain_text("This month’s share of the key is used up", timeout=SLOW_MS)
        expect(alert).to_contain_text("full again at the start of the next month")
        expect(visit.page.get_by_text(re.compile("send those rows again as a new batch"))).to_be_visible()
        visit.look(pictures / "batch-failed.png")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_it_is_whole_at_360_pixels(chromium: Browser, stack: Stack, pictures: Path, language: str, theme: str) -> None:
    def picture(name: str) -> Path:
        return pictures / f"{name}-{language}-narrow-{theme}.png"

    key = key_of(stack.relay, f"narrow-{language}-{theme}")
    with visiting(chromium, stack.relay, language, "phone", theme == "dark") as visit:
        page = visit.page
        page.set_viewport_size(NARROW)
        visit.sign_in(key)
        visit.go("/batches")
        expect(page.locator("pre")).to_be_visible()
        visit.look(picture("batches-none"))
        done = start(stack.relay, key, [row(stack.model, 1), row(stack.model, 2, max_tokens=-1)])
        visit.go(f"/batches/{done}")
        expect(page.locator("main").get_by_role("button").nth(2)).to_be_visible(timeout=SLOW_MS)  # its two files
        visit.look(picture("batch-done"))
        stays = start(stack.relay, key, [row(stack.model, n) for n in range(3)])
        stack.relay.client(key).batches.cancel(stays)
        visit.go("/batches")
        expect(page.locator("main li")).to_have_count(2)
        visit.look(picture("batches"))
        visit.go("/batches/new")
        page.get_by_role("radio").first.check()
        expect(page.locator("dl")).to_be_visible()
        visit.look(picture("batch-new"))
        page.screenshot(path=picture("batch-new-all"), full_page=True)
