"""A tab of Chromium on the page: what a person does there, and what the page must not do meanwhile."""

import contextlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, ViewportSize, expect
from playwright.sync_api import TimeoutError as TooLate

from tests.conftest import ROOT
from tests.end_to_end.stack import Relay

# What fades, and what is dimmed until something newer has come, has another contrast.
SETTLED = """() => !document.querySelector('[data-stale="true"]') && document.getAnimations().every(
    each => each.playState !== 'running' || each.effect.getComputedTiming().iterations === Infinity)"""
NO_WEBHOOKS = re.compile(r"^(None yet\.|아직 없습니다\.)$")
AXE = ROOT / "web/node_modules/axe-core/axe.min.js"
WIDTHS = {"phone": (390, 844), "desk": (1440, 900)}
LANGUAGES = {"ko": "ko-KR", "en": "en-US"}
SLOW_MS = 120_000  # a small machine writes a few words a second
ANSWERED = "article :is(p, li)"  # a paragraph or a list: the model is free to choose


class Visit:
    """A tab, and what it did that it should not."""

    def __init__(self, page: Page, relay: Relay) -> None:
        self.page, self.relay = page, relay
        self.faults: list[str] = []
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda message: self._said(message.type, message.text))
        page.on("request", lambda request: self._asked(request.url))

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and "Failed to load resource" not in text:
            self.faults.append(text)

    def _asked(self, url: str) -> None:
        if not url.startswith((self.relay.url, "blob:", "data:")):
            self.faults.append(f"asked another host: {url}")

    def go(self, path: str) -> None:
        self.page.goto(self.relay.url + path)

    def account(self) -> None:
        """Once all is there: what comes later moves the buttons below, and a click that has begun would miss."""
        self.go("/account")
        expect(self.page.locator("dt").first).to_be_visible()  # what was used
        webhooks = self.page.get_by_text(NO_WEBHOOKS).or_(self.button("Deliveries").first)
        expect(webhooks.first).to_be_visible()

    def sign_in(self, key: str | None = None) -> None:
        self.go("/")
        self.page.locator("input[type=password]").fill(key or self.relay.admin_key)
        self.page.locator("button[type=submit]").click()
        self.is_in()

    def sign_in_by_password(self, name: str, password: str) -> None:
        self.go("/sign-in")
        self.page.get_by_text(re.compile("^(Name and password|이름과 비밀번호)$")).click()
        self.page.locator("input[autocomplete=username]").fill(name)
        self.page.locator("input[type=password]").fill(password)
        self.page.locator("button[type=submit]").click()

    def is_in(self) -> None:
        expect(self.page.locator("nav a").first).to_be_visible()

    def ask(self, question: str) -> None:
        self.page.locator("form textarea").first.fill(question)
        self.page.keyboard.press("Enter")

    def stop(self) -> None:
        """Unless the model has come to its own end before."""
        with contextlib.suppress(TooLate):
            self.page.get_by_role("button", name=re.compile("^(Stop|멈추기)$")).click(timeout=2_000)
        expect(self.page.locator("article [aria-busy=false]")).to_be_visible()

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def look(self, picture: Path) -> None:
        """A picture for people, and what a machine can judge."""
        self.page.wait_for_timeout(350)  # transitions
        self.page.wait_for_function(SETTLED)
        self.page.screenshot(path=picture)
        found = self.page.evaluate(AXE.read_text() + "; axe.run()")
        faults = [
            f"{v['id']}: {v['help']}: {[n['html'][:200] + str(n.get('failureSummary')) for n in v['nodes'][:3]]}"
            for v in found["violations"]
        ]
        assert not faults, f"{picture.name}: " + "\n".join(faults)
        too_wide = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert too_wide <= 0, f"{picture.name} is {too_wide} px too wide"
        assert not self.faults, self.faults


@contextmanager
def visiting(
    browser: Browser, relay: Relay, language: str = "en", width: str = "desk", dark: bool = False
) -> Iterator[Visit]:
    x, y = WIDTHS[width]
    context = browser.new_context(
        viewport=ViewportSize(width=x, height=y),
        locale=LANGUAGES[language],
        color_scheme="dark" if dark else "light",
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    try:
        yield Visit(context.new_page(), relay)
    finally:
        context.close()
