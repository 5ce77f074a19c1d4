"""Training on pictures through the page: from files that somebody picks to drawing with what was learned."""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, FilePayload, expect

from demo import diffusion, gpt2
from tests.browser.visit import LANGUAGES, SLOW_MS, WIDTHS, Visit, visiting
from tests.end_to_end.stack import Gpu, Relay, running

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

PHRASE, KIND = "a zorb", "a ball"


@pytest.fixture(scope="module")
def learning(page_built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    folder = tmp_path_factory.mktemp("learning")
    relay = Relay(folder / "relay")
    models = {gpt2.NAME: gpt2.FOLDER, diffusion.NAME: diffusion.FOLDER}
    with running(relay), running(Gpu(folder / "gpu", models, relay)):
        relay.serves(diffusion.NAME)
        yield relay


def zorb(number: int, side: int = 80) -> bytes:
    """A blue ring around an orange one, which no model knows by this name."""
    picture = Image.new("RGB", (side, side), (250, 250, 250 - number))
    draw = ImageDraw.Draw(picture)
    middle = side // 2 + number % 5 - 2
    for radius, colour in ((30, "navy"), (20, "orange"), (8, "navy")):
        draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=colour)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def some(count: int) -> list[FilePayload]:
    return [{"name": f"zorb-{n}.png", "mimeType": "image/png", "buffer": zorb(n)} for n in range(count)]


def a_zip(entries: dict[str, bytes | str]) -> FilePayload:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return {"name": "zorbs.zip", "mimeType": "application/zip", "buffer": file.getvalue()}


def begin(visit: Visit) -> None:
    """A new fine-tune of the model that draws; the page offers one of text first."""
    visit.go("/training/new")
    visit.page.locator("main form").get_by_role("combobox").first.click()
    visit.page.get_by_role("option", name=diffusion.NAME).click()
    expect(visit.page.locator("aside")).to_contain_text("546", timeout=SLOW_MS)  # the preview has come


def upload(visit: Visit, zipped: FilePayload) -> None:
    with visit.page.expect_file_chooser() as chooser:
        visit.button("a zip").click()
    chooser.value.set_files([zipped])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_form_for_pictures_in_both_languages(
    chromium: Browser, learning: Relay, pictures: Path, language: str, width: str
) -> None:
    with visiting(chromium, learning, language, width) as visit:
        page = visit.page
        visit.sign_in()
        begin(visit)
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="pictures" if language == "en" else "그림 고르기", exact=True).click()
        chooser.value.set_files(some(12))
        expect(page.get_by_role("img", name="zorb-11.png")).to_be_visible()
        visit.look(pictures / f"learn-gathered-{language}-{width}.png")
        page.get_by_role("button", name="Zip and upload" if language == "en" else "묶어서 올리기").click()
        expect(page.get_by_placeholder("a photo of sks dog")).to_be_visible(timeout=SLOW_MS)
        page.get_by_placeholder("a photo of sks dog").fill(PHRASE)
        page.get_by_placeholder("a photo of a dog").fill(KIND)
        for fold in page.locator("details").all():
            fold.evaluate("fold => { fold.open = true }")
        expect(page.get_by_role("img", name="zorb-0.png")).to_be_visible()  # of the report: the relay made it small
        page.set_viewport_size({"width": WIDTHS[width][0], "height": 3600})
        visit.look(pictures / f"learn-form-{language}-{width}.png")


def test_a_dozen_pictures_become_a_model_that_draws(chromium: Browser, learning: Relay, pictures: Path) -> None:
    with visiting(chromium, learning) as visit:
        page = visit.page
        visit.sign_in()
        begin(visit)
        expect(page.get_by_text("Packing")).to_have_count(0)  # of text alone
        with page.expect_file_chooser() as chooser:
            visit.button("pictures").click()
        chooser.value.set_files(some(12))
        page.get_by_label("Name of the data set").fill("zorbs")
        visit.button("Zip and upload").click()
        expect(page.get_by_role("radio", name="zorbs.zip")).to_be_checked(timeout=SLOW_MS)
        report = page.get_by_role("region", name="What is in it")
        expect(report).to_contain_text("12 pictures · without captions · 12 PNG · none is there twice")
        expect(report).to_contain_text("All sides have 80 pixels.")
        expect(page.get_by_text("Say what the pictures show first.")).to_be_visible()
        expect(visit.button("Start training")).to_be_disabled()
        page.get_by_label("What do the pictures show?").fill(PHRASE)
        page.get_by_label("What kind of thing is it?").fill(KIND)
        page.get_by_label("Pictures of its kind").fill("2")

        page.get_by_text("Cross-attention", exact=True).click()
        page.get_by_role("button", name="Block down.0").click()
        expect(page.get_by_label("Blocks").first).to_have_value("down.1-2,mid,up")
        visit.button("Up").click()
        expect(page.locator("aside")).to_contain_text("of 546 tensors", timeout=SLOW_MS)
        page.get_by_text("Training settings").click()
        page.get_by_label("Epochs").fill("2")
        page.get_by_label("Pictures a step").fill("6")
        page.get_by_text("Sample prompts", exact=True).click()
        visit.button(f"Add “{PHRASE}”").click()
        page.get_by_label("Name of the tuned model").fill("zorb")
        visit.button("Start training").click()

        expect(page.get_by_role("heading", name="Error of the noise prediction")).to_be_visible(timeout=SLOW_MS)
        shown = page.get_by_role("img", name=f"“{PHRASE}” at step")
        expect(shown.first).to_be_visible(timeout=SLOW_MS)
        expect(page.get_by_text("Your model is ready")).to_be_visible(timeout=SLOW_MS)
        assert shown.count() >= 2
        assert shown.first.evaluate("picture => picture.naturalWidth") == 64, "it is a picture, and whole"
        facts = page.locator("main")
        expect(facts).to_contain_text("Pictures seen")
        expect(facts).to_contain_text(f"and 2 of “{KIND}”, weight 1")
        expect(facts).not_to_contain_text("erplexity")
        page.set_viewport_size({"width": 1440, "height": 2200})
        visit.look(pictures / "learn-job-en.png")
        job = page.url

        visit.button("Train again with changes").click()
        expect(page.get_by_label("What do the pictures show?")).to_have_value(PHRASE)
        expect(page.get_by_label("Pictures of its kind")).to_have_value("2")
        expect(page.get_by_label("Blocks").first).to_have_value("up")
        expect(page.get_by_label("Prompt 1", exact=True)).to_have_value(PHRASE)
        expect(page.get_by_role("checkbox", name="Cross-attention")).not_to_be_checked()

        page.goto(job)
        page.get_by_role("link", name="Try it").click()
        expect(page.get_by_label("Picture to draw")).to_have_value(PHRASE)
        expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value(re.compile("^zorb · "))
        page.get_by_label("Picture to draw").press("Enter")
        expect(page.locator("figure[data-done=true]")).to_be_visible(timeout=SLOW_MS)
        visit.look(pictures / "learn-drawn-en.png")


def test_a_job_on_pictures_in_korean_on_a_phone(chromium: Browser, learning: Relay, pictures: Path) -> None:
    """The one that the test before has left."""
    with visiting(chromium, learning, "ko", "phone") as visit:
        visit.sign_in()
        jobs = learning.http().get("/v1/fine_tuning/jobs").json()["data"]
        visit.go(f"/training/{jobs[0]['id']}")
        expect(visit.page.get_by_role("img", name=f"“{PHRASE}”").first).to_be_visible()
        visit.page.set_viewport_size({"width": 390, "height": 2600})
        visit.look(pictures / "learn-job-ko-phone.png")


def test_a_bad_zip_is_refused_by_file_names_and_a_good_one_shows_its_captions(
    chromium: Browser, learning: Relay, pictures: Path
) -> None:
    with visiting(chromium, learning) as visit:
        page = visit.page
        visit.sign_in()
        begin(visit)
        upload(visit, a_zip({"1.png": zorb(1), "2.png": b"no picture", "1.txt": "one ring", "3.png": zorb(3)}))
        refused = page.get_by_role("alert")
        expect(refused).to_contain_text("3.png")
        expect(refused).to_contain_text("has no caption, and others have one")
        visit.look(pictures / "learn-refused-en.png")
        told = "\n".join(json.dumps({"file_name": f"{n}.png", "text": f"ring {n}"}) for n in range(3))
        upload(visit, a_zip({f"{n}.png": zorb(n) for n in range(3)} | {"metadata.jsonl": told, "notes.md": "mine"}))
        report = page.get_by_role("region", name="What is in it")
        expect(report).to_contain_text("3 pictures · each with a caption")
        expect(report).to_contain_text("1 other file is left aside: notes.md")
        expect(report.get_by_text("ring 2")).to_be_visible()
        expect(page.get_by_label("What do the pictures show?")).to_have_count(0)
        expect(visit.button("Start training")).to_be_enabled()
        visit.look(pictures / "learn-captions-en.png")


def test_a_folder_brings_its_captions_along(chromium: Browser, learning: Relay, tmp_path: Path) -> None:
    folder = tmp_path / "rings"
    folder.mkdir()
    for n in range(2):
        (folder / f"{n}.png").write_bytes(zorb(n))
        (folder / f"{n}.txt").write_text(f"링 {n}", encoding="utf-8")
    (folder / "plan.pdf").write_bytes(b"mine")
    with visiting(chromium, learning) as visit:
        page = visit.page
        visit.sign_in()
        begin(visit)
        with page.expect_file_chooser() as chooser:
            visit.button("a folder").click()
        chooser.value.set_files(folder)
        gathered = page.get_by_role("region", name="Pictures to upload")
        expect(gathered).to_contain_text("2 pictures")
        expect(gathered).to_contain_text("with 2 files of captions")
        expect(gathered).to_contain_text("1 other file stays behind.")
        expect(page.get_by_label("One caption for all")).to_have_count(0)
        expect(page.get_by_label("Name of the data set")).to_have_value("rings")
        visit.button("Zip and upload").click()
        report = page.get_by_role("region", name="What is in it")
        expect(report).to_contain_text("2 pictures · each with a caption", timeout=SLOW_MS)
        expect(report.get_by_text("링 1")).to_be_visible()
        assert not visit.faults, visit.faults


def test_a_zip_for_a_model_of_text_is_kept_for_one_that_draws(chromium: Browser, learning: Relay) -> None:
    with visiting(chromium, learning) as visit:
        page = visit.page
        visit.sign_in()
        visit.go("/training/new")
        with page.expect_file_chooser() as chooser:
            visit.button("choose one").click()
        astray = a_zip({"1.png": zorb(7)})
        astray["name"] = "astray.zip"
        chooser.value.set_files([astray])
        expect(page.get_by_text("astray.zip holds pictures")).to_be_visible()
        expect(page.get_by_role("radio", name="astray.zip")).to_have_count(0)
        begin(visit)
        expect(page.get_by_role("radio", name="astray.zip")).to_be_visible()
        page.get_by_text("Text encoder", exact=True).click()
        expect(page.get_by_role("button", name="Layer 0", exact=True)).to_be_visible()
        expect(page.locator("aside")).to_contain_text("of 546 tensors")
        assert not visit.faults, visit.faults
