"""Pictures on the page: they sharpen as they come, and are kept, drawn again and begun with."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from demo import diffusion
from tests.browser.visit import LANGUAGES, SLOW_MS, WIDTHS, visiting
from tests.end_to_end.stack import Gpu, Relay, running

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def drawing(page_built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    folder = tmp_path_factory.mktemp("drawing")
    relay = Relay(folder / "relay")
    with running(relay), running(Gpu(folder / "gpu", {diffusion.NAME: diffusion.FOLDER}, relay)):
        relay.serves(diffusion.NAME)
        yield relay


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_picture_is_asked_for_in_both_languages(
    chromium: Browser, drawing: Relay, pictures: Path, language: str, width: str
) -> None:
    with visiting(chromium, drawing, language, width) as visit:
        visit.sign_in()
        expect(visit.page.locator("form textarea").first).to_be_enabled()
        visit.look(pictures / f"pictures-{language}-{width}.png")
        visit.ask("cat face")
        expect(visit.page.locator("figure[data-done=true]")).to_be_visible(timeout=SLOW_MS)
        visit.look(pictures / f"pictures-drawn-{language}-{width}.png")


def test_it_sharpens_and_its_seed_draws_it_again(chromium: Browser, drawing: Relay, pictures: Path) -> None:
    with visiting(chromium, drawing) as visit:
        page = visit.page
        visit.sign_in()
        page.get_by_text("Picture settings").click()
        page.get_by_label("How many pictures").fill("2")
        page.get_by_label("Steps", exact=True).fill("60")
        visit.ask("red heart")
        shown = page.locator("figure img")
        expect(shown).to_have_count(2, timeout=SLOW_MS)
        expect(page.locator("figure[data-done=true]")).to_have_count(0)
        early = shown.first.get_attribute("src")
        expect(page.locator("figure[data-done=true]")).to_have_count(2, timeout=SLOW_MS)
        final = shown.first.get_attribute("src")
        assert early != final
        expect(page.locator("figcaption").first).to_contain_text("60 steps")
        page.reload()  # the pictures are the tab's
        expect(shown.first).to_have_attribute("src", str(final), timeout=SLOW_MS)

        with page.expect_download() as saved:
            page.get_by_role("link", name="Save").first.click()
        seed = re.search(r"seed (\d+)", page.locator("figcaption").first.inner_text())
        assert seed
        assert saved.value.suggested_filename == f"red-heart-{seed[1]}.png"
        told = Image.open(saved.value.path()).text["im-fine"]  # type: ignore[attr-defined]
        assert f'"seed": {seed[1]}' in told

        page.get_by_role("button", name="Keep seed").first.click()
        expect(page.get_by_label("Seed", exact=True)).to_have_value(seed[1])
        page.get_by_text("Picture settings").click()
        page.get_by_label("How many pictures").fill("1")
        visit.ask("red heart")
        again = page.locator("article").nth(1).locator("figure[data-done=true] img")
        expect(again).to_be_visible(timeout=SLOW_MS)
        assert _pixels(str(again.get_attribute("src"))) == _pixels(str(final)), "alone and in a batch, to the eye"

        page.get_by_role("button", name="Begin with it").last.click()
        expect(page.get_by_role("img", name="Picture to begin with")).to_be_visible()
        visit.ask("yellow heart")
        expect(page.locator("figcaption").last).to_contain_text("strength 0.8", timeout=SLOW_MS)
        expect(page.locator("article").last.locator("figure[data-done=true]")).to_be_visible(timeout=SLOW_MS)
        visit.look(pictures / "pictures-all.png")


def test_stopping_ends_it_within_a_step(chromium: Browser, drawing: Relay) -> None:
    with visiting(chromium, drawing) as visit:
        visit.sign_in()
        visit.page.get_by_text("Picture settings").click()
        visit.page.get_by_label("Steps", exact=True).fill("200")
        visit.ask("red heart")
        expect(visit.page.locator("figure").first).to_be_visible(timeout=SLOW_MS)
        visit.stop()
        expect(visit.page.get_by_text("Unfinished")).to_be_visible()
        drawing.wait(lambda: drawing.http().get("/api/gpus").json()["data"][0]["active_requests"] == 0)


def _pixels(src: str) -> bytes:
    """At 8 x 8: in a batch the last bits are rounded otherwise."""
    picture = Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).convert("L").resize((8, 8))
    return bytes(value // 16 for value in picture.tobytes())
