"""Each screen in Chromium, in both languages, at the width of a phone and of a desk; and what people do there.

axe finds nothing, nothing leaves for another host, nothing is refused by the page's policy, nothing is cut off.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from demo.model import NAME
from tests.browser.conftest import QUESTION, Stack
from tests.browser.visit import ANSWERED, LANGUAGES, SLOW_MS, WIDTHS, visiting
from tests.end_to_end.stack import Gpu, Relay, running

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

ROW = {"messages": [{"role": "user", "content": "Ahoy?"}, {"role": "assistant", "content": "Arr, matey!"}]}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_screen(chromium: Browser, stack: Stack, pictures: Path, language: str, width: str, theme: str) -> None:
    def picture(name: str) -> Path:
        return pictures / f"{name}-{language}-{width}-{theme}.png"

    with visiting(chromium, stack.relay, language, width, theme == "dark") as visit:
        page = visit.page
        visit.go("/")
        expect(page.locator("input[type=password]")).to_be_visible()
        assert page.locator("html").get_attribute("lang") == language
        visit.look(picture("sign-in"))
        visit.sign_in()
        expect(page.locator("form textarea").first).to_be_enabled()
        visit.look(picture("generate"))
        if width == "phone":
            page.get_by_role("button", name=NAME).click()
            expect(page.get_by_role("slider").first).to_be_visible()
            visit.look(picture("dials"))
            page.keyboard.press("Escape")
            expect(page.get_by_role("slider")).to_have_count(0)
        visit.ask(QUESTION)
        expect(page.locator(ANSWERED).first).not_to_be_empty(timeout=SLOW_MS)
        visit.look(picture("writing"))
        visit.stop()
        visit.look(picture("stopped"))
        page.locator('nav a[href="/training"]').click()
        expect(page.locator("h1")).to_be_visible()
        visit.look(picture("training"))
        visit.go("/training/new")
        expect(page.locator("aside svg").first).to_be_visible()  # the preview has come
        visit.look(picture("training-new"))
        page.locator('nav a[href="/gpus"]').click()
        expect(page.locator("main article")).to_be_visible()
        visit.look(picture("gpus"))
        page.locator("main button").first.click()
        expect(page.locator("main ol")).to_be_visible()
        visit.look(picture("gpus-connect"))
        page.locator('nav a[href="/keys"]').click()
        expect(page.locator("main li").first).to_be_visible()
        visit.look(picture("keys"))
        page.locator("main button").first.click()
        expect(page.get_by_role("dialog")).to_be_visible()
        visit.look(picture("keys-new"))
        visit.go("/no/such/screen")
        expect(page.locator("h1")).to_be_visible()
        visit.look(picture("not-found"))


def test_from_a_refused_file_to_a_tuned_models_answer(
    chromium: Browser, stack: Stack, pictures: Path, tmp_path: Path
) -> None:
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_text(json.dumps(ROW) + "\n{broken\n" + json.dumps({"text": ""}) + "\n")
    good.write_text((json.dumps(ROW) + "\n") * 24)
    with visiting(chromium, stack.relay) as visit:
        page = visit.page
        visit.sign_in()
        visit.go("/training/new")
        page.locator("input[type=file]").set_input_files(bad)
        report = page.get_by_role("alert")
        expect(report).to_contain_text("bad.jsonl was not accepted")
        expect(report).to_contain_text("Line 2")
        expect(report).to_contain_text("Line 3")
        visit.look(pictures / "training-refused.png")
        page.locator("input[type=file]").set_input_files(good)
        expect(page.get_by_role("radio", name="good.jsonl")).to_be_checked()

        page.get_by_label("Layers", exact=True).first.fill("99")
        expect(page.get_by_text("goes beyond the model")).to_be_visible()
        page.get_by_role("button", name="Last 8", exact=True).click()
        page.get_by_role("button", name="Layer 22", exact=True).click()
        expect(page.locator("input").get_by_text("last:8")).to_have_count(0)
        expect(page.get_by_text("49 of 272 tensors")).to_be_visible()
        expect(page.get_by_text(re.compile("^About .* (s|min)"))).to_be_visible()
        expect(page.get_by_text(re.compile("^Chat pauses for "))).to_be_visible()
        page.get_by_text("Training settings").click()
        page.get_by_label("Epochs").fill("2")
        page.get_by_label("Name of the tuned model").fill("matey")
        visit.button("Start training").click()

        page.wait_for_url(re.compile(r"/training/ftjob-"))
        expect(page.get_by_text(re.compile(r"Step \d+ of 16$")).first).to_be_visible(timeout=SLOW_MS)
        expect(page.get_by_role("img", name=re.compile("Training loss from"))).to_be_visible()
        page.reload()  # the view is the address's, not the tab's
        expect(page.get_by_role("img", name=re.compile("Training loss from"))).to_be_visible(timeout=SLOW_MS)
        visit.look(pictures / "job-running.png")
        expect(page.get_by_text("Your model is ready")).to_be_visible(timeout=2 * SLOW_MS)
        visit.look(pictures / "job-done.png")
        page.get_by_role("link", name="Chat with it").click()
        visit.ask("Ahoy?")
        expect(page.locator("article").get_by_text(re.compile(r"^matey · "))).to_be_visible()
        expect(page.locator(ANSWERED).first).not_to_be_empty(timeout=SLOW_MS)
        visit.look(pictures / "tuned.png")
        page.locator('nav a[href="/training"]').click()
        expect(page.get_by_role("link", name=re.compile("matey"))).to_be_visible()
        visit.look(pictures / "training-jobs.png")


def test_a_job_is_cancelled_after_a_question(chromium: Browser, stack: Stack, pictures: Path) -> None:
    http = stack.relay.http()
    rows = (json.dumps(ROW) + "\n").encode() * 64
    file = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows)}).json()
    job = http.post("/v1/fine_tuning/jobs", json={"model": stack.model, "training_file": file["id"]}).json()
    with visiting(chromium, stack.relay, width="phone") as visit:
        visit.sign_in()
        visit.go(f"/training/{job['id']}")
        visit.button("Cancel training").click()
        expect(visit.page.get_by_role("dialog")).to_be_visible()
        visit.look(pictures / "job-cancel.png")
        visit.button("Yes, cancel it").click()
        expect(visit.page.get_by_text("Cancelled", exact=True)).to_be_visible()
        visit.look(pictures / "job-cancelled.png")


def test_layers_written_as_json_are_kept_when_a_job_is_tried_again(
    chromium: Browser, stack: Stack, pictures: Path
) -> None:
    http = stack.relay.http()
    file = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", json.dumps(ROW))}).json()
    specs = [
        {"method": "lora", "parts": ["attn.q"], "layers": "last:4", "rank": 4},
        {"method": "full", "parts": ["norm"], "layers": "last:4"},
    ]
    asked = {"model": stack.model, "training_file": file["id"], "layers": specs}
    job = http.post("/v1/fine_tuning/jobs", json=asked).json()
    http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    with visiting(chromium, stack.relay) as visit:
        page = visit.page
        visit.sign_in()
        visit.go(f"/training/{job['id']}")
        visit.button("Train again with changes").click()
        written = page.get_by_label("Layer specs")
        expect(written).to_have_value(re.compile(r"attn\.q"))
        expect(page.get_by_text("12 of 272 tensors")).to_be_visible()
        visit.look(pictures / "training-json.png")
        written.fill("{")
        expect(page.get_by_text("This is no JSON object")).to_be_visible()
        expect(visit.button("Start training")).to_be_disabled()
        written.fill("")
        expect(page.get_by_role("button", name="Last 8", exact=True)).to_be_visible()


def test_a_job_is_paused_keeps_its_checkpoint_and_goes_on(chromium: Browser, stack: Stack, pictures: Path) -> None:
    http = stack.relay.http()
    upload = {"file": ("rows.jsonl", "\n".join([json.dumps(ROW)] * 200).encode())}
    file = http.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()
    job = http.post("/v1/fine_tuning/jobs", json={"model": stack.model, "training_file": file["id"]}).json()
    with visiting(chromium, stack.relay) as visit:
        visit.sign_in()
        visit.go(f"/training/{job['id']}")
        page = visit.page
        expect(page.get_by_text(re.compile(r"^Step \d+ of \d+$")).first).to_be_visible(timeout=SLOW_MS)
        visit.button("Pause").click()
        expect(page.get_by_text("Paused", exact=True)).to_be_visible(timeout=SLOW_MS)
        expect(page.get_by_text(re.compile(r"^\d+ checkpoints?, .*at step \d+$"))).to_be_visible(timeout=SLOW_MS)
        visit.look(pictures / "job-paused.png")
        visit.button("Resume").click()
        expect(page.get_by_text(re.compile(r"^Goes on at step \d+ of \d+ from the checkpoint of"))).to_be_visible(
            timeout=SLOW_MS
        )
    http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").raise_for_status()


def test_dials_by_keyboard_reach_the_gpu_and_stand_beside_the_answer(chromium: Browser, stack: Stack) -> None:
    with visiting(chromium, stack.relay) as visit:
        page = visit.page
        visit.sign_in()
        sent: list[Any] = []
        page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/api/generations") else None)
        slider = page.get_by_role("slider", name=re.compile("^ATTN"))
        slider.focus()
        for _ in range(10):
            page.keyboard.press("ArrowRight")
        expect(slider).to_have_attribute("aria-valuetext", "1.10×")
        eps = page.get_by_role("slider", name=re.compile("^EPS"))
        eps.focus()
        page.keyboard.press("End")
        expect(eps).to_have_attribute("aria-valuetext", "10,000×")
        visit.ask(QUESTION)
        expect(page.locator("article").get_by_text("ATTN 1.10×")).to_be_visible()
        expect(page.locator(ANSWERED).first).not_to_be_empty(timeout=SLOW_MS)
        visit.stop()
        assert sent[0]["body"]["dials"] == {"eps": 10_000, "attn": 1.1}
        visit.button("Reset all").click()
        visit.button("Retry").click()
        expect(page.locator("article").get_by_text("ATTN 1.10×")).to_have_count(0)
        visit.stop()
        assert "dials" not in sent[1]["body"]


def test_a_question_waits_for_a_gpu_through_a_reload_and_is_answered(
    chromium: Browser, page_built: None, smol_dir: Path, tmp_path: Path, pictures: Path
) -> None:
    relay = Relay(tmp_path / "relay")
    with running(relay), visiting(chromium, relay) as visit:
        page = visit.page
        visit.sign_in()
        expect(page.get_by_text("No model yet")).to_be_visible()
        visit.look(pictures / "generate-empty.png")
        page.get_by_role("link", name="Connect a GPU").click()
        expect(page.get_by_text("No GPU is connected")).to_be_visible()
        visit.look(pictures / "gpus-empty.png")
        visit.button("Connect a GPU").click()
        expect(page.get_by_text("Waiting for a GPU to enrol")).to_be_visible()
        expect(page.get_by_text(relay.enrol_token)).to_have_count(0)
        page.get_by_role("button", name="Show the token").click()
        expect(page.get_by_text(relay.enrol_token).first).to_be_visible()
        gpu = Gpu(tmp_path / "gpu", {NAME: smol_dir}, relay)
        with running(gpu):
            expect(page.get_by_text(re.compile(" is here$"))).to_be_visible(timeout=SLOW_MS)
            visit.look(pictures / "gpus-arrived.png")
            relay.serves(NAME)
        page.get_by_role("link", name="Ask it something").click()
        visit.ask(QUESTION)
        expect(page.get_by_text("Waiting for a GPU · place 1")).to_be_visible(timeout=SLOW_MS)
        visit.look(pictures / "waiting.png")
        page.reload()
        expect(page.get_by_text("Waiting for a GPU · place 1")).to_be_visible(timeout=SLOW_MS)
        with running(gpu):
            expect(page.locator(ANSWERED).first).not_to_be_empty(timeout=2 * SLOW_MS)
            visit.stop()
            expect(page.get_by_text(re.compile("^Stopped"))).to_be_visible()
        visit.faults.clear()  # a request that the reload cut off may be named


def test_a_key_is_shown_once_works_and_ends_its_sessions_when_revoked(
    chromium: Browser, stack: Stack, pictures: Path
) -> None:
    with visiting(chromium, stack.relay) as admin, visiting(chromium, stack.relay) as other:
        page = admin.page
        admin.sign_in()
        page.locator('nav a[href="/keys"]').click()
        admin.button("New key").click()
        page.get_by_label("What is it for?").fill("laptop")
        page.get_by_label("For whom?").fill("bora")
        admin.button("Create the key").click()
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_text("Copy it now")).to_be_visible()
        admin.look(pictures / "keys-created.png")
        key = dialog.locator("pre").inner_text()
        admin.button("I have copied it").click()
        expect(page.get_by_text(key)).to_have_count(0)

        other.sign_in(key)
        other.page.locator('nav a[href="/keys"]').click()
        expect(other.page.get_by_text("laptop")).to_be_visible()
        expect(other.page.get_by_text("admin.key")).to_have_count(0)
        assert not other.page.evaluate("document.cookie")
        assert key not in other.page.evaluate("JSON.stringify({...localStorage}) + JSON.stringify({...sessionStorage})")

        admin.button("Revoke laptop").click()
        admin.button("Revoke it").click()
        expect(page.get_by_text("laptop")).to_have_count(0)
        other.page.reload()
        expect(other.page.locator("input[type=password]")).to_be_visible()


def test_a_wrong_key_says_what_to_do_and_a_deep_link_survives_the_sign_in(chromium: Browser, stack: Stack) -> None:
    with visiting(chromium, stack.relay, "ko") as visit:
        visit.go("/gpus")
        visit.page.locator("input[type=password]").fill("sk-fine-wrong")
        visit.page.locator("button[type=submit]").click()
        expect(visit.page.get_by_role("alert")).to_contain_text("유효하지 않은 키입니다")
        visit.page.locator("input[type=password]").fill(stack.relay.admin_key)
        visit.page.locator("button[type=submit]").click()
        visit.page.wait_for_url("**/gpus")


def test_language_and_theme_are_chosen_once(chromium: Browser, stack: Stack) -> None:
    with visiting(chromium, stack.relay) as visit:
        page = visit.page
        visit.sign_in()
        for item in ("한국어", "Dark"):
            page.get_by_role("button", name=re.compile("admin")).click()
            page.get_by_role("menuitemradio", name={"Dark": "어둡게"}.get(item, item)).click()
        expect(page.get_by_role("link", name="학습")).to_be_visible()
        page.reload()
        expect(page.get_by_role("link", name="학습")).to_be_visible()
        assert page.locator("html").get_attribute("data-mantine-color-scheme") == "dark"
        page.get_by_role("button", name=re.compile("admin")).click()
        page.get_by_role("menuitem", name="로그아웃").click()
        expect(page.locator("input[type=password]")).to_be_visible()
        visit.go("/keys")
        expect(page.locator("input[type=password]")).to_be_visible()
