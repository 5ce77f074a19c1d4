"""What tells people and programs that a job has ended: the browser's notifications, and webhooks."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Stack
from tests.browser.visit import visiting

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

WATCH = """
window.told = []
const Real = Notification
window.Notification = class extends Real {
  constructor(title, options) { super(title, options); window.told.push([title, options.tag, document.hidden]) }
}
"""


def test_the_browser_tells_in_a_tab_behind_another_that_a_job_or_a_batch_has_ended(
    chromium: Browser, stack: Stack
) -> None:
    http = stack.relay.http()
    upload = {"file": ("rows.jsonl", b'{"prompt": "Ahoy?", "completion": " Arr, matey!"}\n' * 64)}
    file = http.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()
    asked = {"model": stack.model, "training_file": file["id"], "suffix": "told"}
    with visiting(chromium, stack.relay) as visit:
        page = visit.page
        page.add_init_script(WATCH)
        visit.sign_in()
        job = http.post("/v1/fine_tuning/jobs", json=asked).json()
        visit.go(f"/training/{job['id']}")
        offer = visit.button("Tell me when it ends")
        expect(offer).to_be_visible()
        page.context.grant_permissions(["notifications", "clipboard-read", "clipboard-write"])
        offer.click()
        expect(page.get_by_text("The browser tells you when it ends.")).to_be_visible()
        with page.expect_response(lambda r: "fine_tuning/jobs?limit=20" in r.url):
            visit.go("/account")  # the wish outlives the screen
        expect(page.get_by_label("Tell me when a training or a batch ends")).to_be_checked()
        page.context.new_page().goto("about:blank")  # in front of it
        http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").raise_for_status()
        assert next_told(page, 0) == ["“told” was cancelled", job["id"]]
        batch = a_batch(http, stack.model, "questions.jsonl")
        assert next_told(page, 1) == ["“questions.jsonl” is answered", batch]
        page.get_by_label("Tell me when a training or a batch ends").uncheck()
        page.reload()
        expect(page.get_by_label("Tell me when a training or a batch ends")).not_to_be_checked()
        assert not visit.faults


def next_told(page: Page, number: int) -> Any:
    """Title and id of this notification, once it is there."""
    deadline = time.monotonic() + 90  # timers of the hidden page itself are slow
    while page.evaluate("window.told.length") <= number and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    return page.evaluate("number => window.told[number].slice(0, 2)", number)


def a_batch(http: httpx2.Client, model: str, name: str) -> str:
    body = {"model": model, "prompt": "Ahoy?", "max_tokens": 2}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    upload = {"file": (name, json.dumps(row).encode())}
    file = http.post("/v1/files", files=upload, data={"purpose": "batch"}).raise_for_status().json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    made = http.post("/v1/batches", json={**asked, "metadata": {"description": name}}).raise_for_status()
    return str(made.json()["id"])


@contextmanager
def receiver() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and what it has been sent."""
    told: list[dict[str, Any]] = []

    class Receive(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receive)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_webhook_is_made_shows_its_secret_once_is_told_and_goes(
    chromium: Browser, stack: Stack, pictures: Path
) -> None:
    http = stack.relay.http()
    upload = {"file": ("rows.jsonl", b'{"prompt": "Ahoy?", "completion": " Arr!"}\n' * 8)}
    file = http.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()
    with receiver() as (url, told), visiting(chromium, stack.relay) as visit:
        page = visit.page
        visit.sign_in()
        visit.account()
        visit.button("New webhook").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Address").fill("https://10.0.0.1/hook")
        visit.button("Create the webhook").click()
        expect(dialog.get_by_role("alert")).to_contain_text("can’t be taken")
        dialog.get_by_label("Address").fill(url)
        dialog.get_by_label("What is it for?").fill("chat room")
        visit.button("Create the webhook").click()
        secret = dialog.locator("pre").inner_text()
        visit.look(pictures / "webhook-created.png")
        visit.button("I have copied it").click()
        expect(page.get_by_text(secret)).to_have_count(0)

        job = http.post("/v1/fine_tuning/jobs", json={"model": stack.model, "training_file": file["id"]}).json()
        http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").raise_for_status()
        visit.button("Deliveries").click()
        expect(dialog.get_by_text("Delivered")).to_be_visible(timeout=60_000)
        assert [event["data"]["id"] for event in told] == [job["id"]]
        visit.look(pictures / "webhook-deliveries.png")
        visit.button("Close").click()
        visit.button("Delete chat room").click()
        visit.button("Delete it").click()
        expect(page.get_by_text("None yet.")).to_be_visible()
        assert not visit.faults
