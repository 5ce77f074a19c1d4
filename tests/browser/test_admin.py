"""Accounts on the page: sign-in by password, the admin's screens, enrol tokens, keys with limits, drained gpus."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.conftest import Stack
from tests.browser.visit import visiting

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

WORD, OTHER_WORD = "ten letters or more", "eleven letters or more"


@pytest.mark.parametrize(("language", "width", "dark"), [("en", "desk", False), ("ko", "phone", True)])
def test_the_screens_of_accounts(
    chromium: Browser, stack: Stack, pictures: Path, language: str, width: str, dark: bool
) -> None:
    with visiting(chromium, stack.relay, language, width, dark) as visit:
        visit.sign_in()
        for path in ("/people", "/people/audit", "/gpus/tokens", "/account"):
            visit.go(path)
            expect(visit.page.locator("h1")).to_be_visible()
            visit.page.wait_for_load_state("networkidle")
            visit.look(pictures / f"{path.strip('/').replace('/', '-')}-{language}-{width}.png")


def test_a_person_that_the_admin_made_signs_in_by_password_changes_it_and_leaves_with_everything(
    chromium: Browser, stack: Stack, pictures: Path
) -> None:
    with visiting(chromium, stack.relay) as admin, visiting(chromium, stack.relay) as other:
        admin.sign_in()
        admin.page.get_by_role("link", name="People").click()
        admin.button("New person").click()
        dialog = admin.page.get_by_role("dialog")
        dialog.get_by_label("Name").fill("dana")
        dialog.get_by_label(re.compile("^Password")).fill("short")
        expect(dialog.get_by_text("10 characters at least.", exact=True)).to_be_visible()
        expect(admin.button("Create")).to_be_disabled()
        dialog.get_by_label(re.compile("^Password")).fill(WORD)
        admin.look(pictures / "people-new.png")
        admin.button("Create").click()
        expect(admin.page.get_by_text("dana", exact=True)).to_be_visible()

        page = other.page
        other.sign_in_by_password("dana", "not the password")
        expect(page.get_by_role("alert")).to_contain_text("do not go together")
        other.sign_in_by_password("dana", WORD)
        other.is_in()
        expect(page.get_by_role("link", name="People")).to_have_count(0)
        page.get_by_role("button", name=re.compile("dana")).click()
        page.get_by_role("menuitem", name="Your account").click()
        page.get_by_label("The password as it is").fill("not the password")
        page.get_by_label("The new password").fill(OTHER_WORD)
        other.button("Change the password").click()
        expect(page.get_by_text("This is not the password.")).to_be_visible()
        page.get_by_label("The password as it is").fill(WORD)
        other.button("Change the password").click()
        expect(other.button("Sign in")).to_be_visible()  # that session was opened by the old one
        other.sign_in_by_password("dana", OTHER_WORD)
        other.is_in()

        other.account()
        other.button("Delete my account …").click()
        expect(page.get_by_role("dialog")).to_contain_text("jobs, those under way too")
        page.get_by_role("dialog").get_by_label("Password", exact=True).last.fill(WORD)
        other.button("Delete everything of mine").click()
        expect(page.get_by_text("This is not your password")).to_be_visible()
        other.look(pictures / "account-delete.png")
        page.get_by_role("dialog").get_by_label("Password", exact=True).last.fill(OTHER_WORD)
        other.button("Delete everything of mine").click()
        expect(other.button("Sign in")).to_be_visible()
        admin.page.reload()
        expect(admin.page.get_by_text("admin", exact=True).first).to_be_visible()
        expect(admin.page.get_by_text("dana", exact=True)).to_have_count(0)


def test_the_admin_shuts_a_person_out_lets_them_in_again_and_deletes_them(chromium: Browser, stack: Stack) -> None:
    http = stack.relay.http()
    key = http.post("/api/keys", json={"user": "finn"}).json()["key"]
    theirs = {"authorization": f"Bearer {key}"}
    with visiting(chromium, stack.relay) as visit:
        page = visit.page

        def choose(item: str) -> None:
            page.get_by_role("button", name="What to do with finn").click()
            page.get_by_role("menuitem", name=item).click()

        visit.sign_in()
        visit.go("/people")
        choose("Shut out")
        expect(page.get_by_role("dialog")).to_contain_text("Jobs that run go on")
        visit.button("Shut out").click()
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(page.get_by_text("Shut out", exact=True)).to_be_visible()
        assert http.get("/api/me", headers=theirs).status_code == 401
        choose("Let in again")
        expect(page.get_by_text("Shut out", exact=True)).to_have_count(0)
        assert http.get("/api/me", headers=theirs).status_code == 200
        choose("Set a password")
        page.get_by_role("dialog").get_by_label("Password", exact=True).fill(WORD)
        visit.button("Save").click()
        expect(page.get_by_text("has a password")).to_be_visible()
        choose("Delete")
        expect(page.get_by_role("dialog")).to_contain_text("tuned models, which answer no more")
        visit.button("Delete finn").click()
        expect(page.get_by_text("finn", exact=True)).to_have_count(0, timeout=30_000)

        page.get_by_text("Audit log", exact=True).click()
        page.get_by_role("combobox", name="Action").click()
        page.get_by_role("option", name="shut a user out").click()
        expect(page.locator("tbody tr")).to_have_count(1)
        expect(page.locator("tbody tr")).to_contain_text("finn")
        page.reload()  # what was looked for is in the address
        expect(page.locator("tbody tr")).to_have_count(1)
        assert not visit.faults


def test_an_enrol_token_is_shown_once_and_revoked(chromium: Browser, stack: Stack, pictures: Path) -> None:
    with visiting(chromium, stack.relay, width="phone") as visit:
        page = visit.page
        visit.sign_in()
        visit.go("/gpus")
        page.get_by_role("link", name="Enrol tokens").click()
        visit.button("New enrol token").click()
        page.get_by_label("What is it for?").fill("kaggle")
        page.get_by_label("By any number").check()
        visit.button("Create the token").click()
        secret = page.get_by_role("dialog").locator("pre")
        expect(secret).to_have_text(re.compile("^enrol-|.{20,}"))
        token = secret.inner_text()
        visit.look(pictures / "tokens-created.png")
        visit.button("I have copied it").click()
        expect(page.get_by_text(token)).to_have_count(0)
        expect(page.get_by_text("kaggle", exact=True)).to_be_visible()
        expect(page.get_by_text("ends in 24 hours")).to_be_visible()
        visit.button("Revoke kaggle").click()
        visit.button("Revoke it").click()
        page.get_by_text("Revoked tokens (1)").click()
        expect(page.get_by_text(re.compile("^revoked "))).to_be_visible()
        assert not visit.faults


def test_a_gpu_is_drained_and_taken_back(chromium: Browser, stack: Stack, pictures: Path) -> None:
    with visiting(chromium, stack.relay) as visit:
        visit.sign_in()
        visit.go("/gpus")
        drain = visit.page.get_by_role("button", name=re.compile("^Drain "))
        drain.click()
        expect(visit.page.get_by_text("Takes nothing new")).to_be_visible()
        visit.look(pictures / "gpus-drained.png")
        visit.page.get_by_role("button", name=re.compile("^Use again")).click()
        expect(drain).to_be_visible()
        expect(visit.page.get_by_text("Takes nothing new")).to_have_count(0)


def test_a_key_is_made_with_scopes_an_end_and_a_limit(chromium: Browser, stack: Stack, pictures: Path) -> None:
    with visiting(chromium, stack.relay) as visit:
        page = visit.page
        visit.sign_in()
        visit.go("/keys")
        visit.button("New key").click()
        page.get_by_label("What is it for?").fill("script")
        page.get_by_text("Limits", exact=True).click()
        for scope in ("Generate", "Train", "Administer"):
            page.get_by_label(scope, exact=True).uncheck()
        expect(page.get_by_text("Choose at least one.")).to_be_visible()
        page.get_by_label("Generate", exact=True).check()
        page.get_by_role("combobox", name="Until when is it good?").click()
        page.get_by_role("option", name="in a week").click()
        page.get_by_label("Requests a minute").fill("20")
        visit.look(pictures / "keys-limits.png")
        visit.button("Create the key").click()
        key = page.get_by_role("dialog").locator("pre").inner_text()
        visit.button("I have copied it").click()
        expect(page.get_by_text("only: Generate")).to_be_visible()
        expect(page.get_by_text("20 requests a minute")).to_be_visible()
        expect(page.get_by_text("ends in 7 days")).to_be_visible()
    http = stack.relay.http()
    answer = http.get("/v1/files", headers={"authorization": f"Bearer {key}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")
