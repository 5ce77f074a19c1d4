"""What the documents say is there."""

import ast
import re
from pathlib import Path

import pytest

from gpu_service.errors import GpuError
from relay.app import create_app
from relay.errors import RelayError
from relay.settings import Settings

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_links_between_documents_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text(name)):
        target = link.partition("#")[0]
        if target and "://" not in target:
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {link}"


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_that_a_document_names_exists(name: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", text("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)\s*make ([a-z][a-z-]*)", text(name), re.MULTILINE))
    assert named <= targets


def test_the_help_names_every_target_for_users() -> None:
    makefile = text("Makefile")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    shown = set(re.findall(r'echo "make ([a-z-]+)', makefile))
    assert set(phony[1].split()) - shown <= {"help", "test-long", "web-check"}  # the last two are parts of others


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_both_readmes_have_the_same_commands(name: str) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", text(name), re.DOTALL)
    assert blocks == re.findall(r"```sh\n(.*?)```", text("README.md"), re.DOTALL)
    assert [block.strip() for block in blocks[:2]] == ["make demo", "make test"]


def test_the_readme_gives_a_reason_for_each_dependency() -> None:
    files = [
        "requirements.txt",
        "relay/requirements.txt",
        "relay/requirements-pictures.txt",
        "gpu_service/requirements.txt",
        "demo/requirements.txt",
    ]
    lines = "\n".join(text(name) for name in files)
    for package in set(re.findall(r"^([A-Za-z0-9_-]+)[=<>]", lines, re.MULTILINE)):
        for readme in ("README.md", "README.ko.md"):
            assert re.search(rf"^\|[^|]*\b{package}\b[^|]*\|", text(readme), re.MULTILINE), f"{package} in {readme}"


def test_every_version_is_exact() -> None:
    names = ["requirements.txt", "requirements-dev.txt"]
    for name in [*names, "relay/requirements.txt", "gpu_service/requirements.txt", "demo/requirements.txt"]:
        for line in text(name).splitlines():
            wanted = line.partition("#")[0].strip()
            assert not wanted or wanted.startswith("-r ") or re.fullmatch(r"[A-Za-z0-9_\[\]-]+==[0-9][\w.]*", wanted), (
                line
            )


def test_the_api_page_names_every_public_route() -> None:
    relay = create_app(Settings()).openapi()["paths"]
    app = ast.parse(text("gpu_service/app.py"))
    gpu = [
        str(n.args[0].value)
        for n in ast.walk(app)
        if isinstance(n, ast.Call)
        and ast.unparse(n.func) == "app.add_api_route"
        and isinstance(n.args[0], ast.Constant)
    ]
    assert gpu
    page = re.sub(r"\{[^}]*\}", "{id}", text("docs/api.md"))
    for path in [*relay, *gpu]:
        if not path.startswith(("/gpu/", "/api/", "/challenge")):
            assert f"{re.sub(r'{[^}]*}', '{id}', path)}`" in page, path


def codes(error: type[RelayError] | type[GpuError]) -> set[str]:
    return {error.code}.union(*map(codes, error.__subclasses__()))


def test_the_api_page_names_every_error_code() -> None:
    page = text("docs/api.md")
    between_the_two = {"bad_gpu_url", "invalid_enrol_token", "bad_signature", "unknown_gpu", "lease_lost"}
    for code in (codes(RelayError) | codes(GpuError)) - between_the_two:
        assert f"`{code}`" in page, code


def test_the_chaos_page_names_every_chaos_test() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests/chaos").glob("test_*.py"))
    written = set(re.findall(r"^async def (test_\w+)", sources, re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", text("docs/chaos.md"))) == written
