"""Settings: the table, the documentation and the environment say the same."""

import re
import stat
from dataclasses import fields
from pathlib import Path

import pytest

from relay.settings import SETTINGS, BadSetting, Settings, from_env, secret

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_documentation_has_every_setting_as_it_is() -> None:
    section = DOCS.read_text(encoding="utf-8").split("\n## relay\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    assert [(n, d.strip("`"), m) for n, d, m in rows] == [(s.name, s.default, s.meaning) for s in SETTINGS]


def test_the_table_covers_every_field_and_its_defaults_are_true() -> None:
    assert {s.field for s in SETTINGS} == {f.name for f in fields(Settings)}
    for setting in SETTINGS:
        if " " not in setting.default:
            assert setting.parse(setting.default) == getattr(Settings(), setting.field), setting.name


def test_an_empty_environment_gives_the_defaults() -> None:
    assert from_env({"RELAY_PORT": " "}) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RELAY_PORT", "http"),
        ("RELAY_PORT", "70000"),
        ("RELAY_ALLOW_LOOPBACK_GPUS", "maybe"),
        ("RELAY_HEARTBEAT_S", "nan"),
        ("RELAY_LEASE_S", "5"),
        ("RELAY_MAX_BODY_BYTES", "-1"),
        ("RELAY_GPU_HOST_SUFFIXES", "com"),
        ("RELAY_DATABASE_URL", "sqlite:///relay.db"),
        ("RELAY_ADMIN_KEY", "short"),
        ("RELAY_ADMIN_KEY", "xxxxxxxxxxxxxxxxxxxx"),
        ("RELAY_TRUSTED_PROXIES", "nginx"),
        ("RELAY_TRUSTED_PROXIES", "0.0.0.0/0"),
        ("RELAY_TRUSTED_PROXIES", "10.0.0.1/8"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(BadSetting, match=name) as caught:
        from_env({name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("RELAY_ENROL_TOKEN", "tell-nobody"), ("RELAY_DATABASE_URL", "postgresql://relay:tell-nobody@host/relay")],
)
def test_a_bad_secret_is_not_repeated(name: str, value: str) -> None:
    with pytest.raises(BadSetting, match=name) as caught:
        from_env({name: value})
    assert "tell-nobody" not in str(caught.value)


def test_a_secret_is_made_once_for_its_owner_only_and_the_environment_wins(tmp_path: Path) -> None:
    file = tmp_path / "admin.key"
    made = secret(None, file, "sk-fine-")
    assert made.startswith("sk-fine-")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret(None, file, "sk-fine-") == made
    assert secret("another-one-from-outside", file, "sk-fine-") == "another-one-from-outside"
    assert file.read_text().strip() == made
    assert list(tmp_path.iterdir()) == [file]
    file.write_text("")
    with pytest.raises(BadSetting, match="delete it"):
        secret(None, file, "sk-fine-")
