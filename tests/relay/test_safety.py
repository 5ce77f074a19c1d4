"""What a relay refuses to start with, and what it takes."""

from pathlib import Path

import pytest

from relay.safety import check_safe
from relay.settings import BadSetting, from_env, secret

PUBLIC = {"RELAY_HOST": "0.0.0.0"}
PROXY = {"RELAY_TRUSTED_PROXIES": "172.28.5.0/24"}
POSTGRESQL = "postgresql+asyncpg://"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_on_loopback_anything_may_run(host: str, tmp_path: Path) -> None:
    check_safe(from_env({"RELAY_HOST": host, "RELAY_ALLOW_LOOPBACK_GPUS": "1", "RELAY_DATA_DIR": str(tmp_path)}))


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        (PUBLIC, "no TLS.*RELAY_TRUSTED_PROXIES"),
        ({"RELAY_HOST": "::"}, "no TLS"),
        ({"RELAY_HOST": "relay.example"}, "no TLS"),
        ({**PUBLIC, "RELAY_TRUSTED_PROXIES": "none"}, "no TLS"),
        ({**PUBLIC, **PROXY, "RELAY_ALLOW_LOOPBACK_GPUS": "1"}, "RELAY_ALLOW_LOOPBACK_GPUS"),
        ({"RELAY_BROKER_URL": "amqp://guest:guest@10.0.0.5:5672/"}, "RELAY_BROKER_URL.*everybody knows"),
        ({"RELAY_BROKER_URL": "amqp://10.0.0.5/"}, "RELAY_BROKER_URL has no password"),
        ({"RELAY_BROKER_URL": "amqp://imfine:own@1.1.1.1/"}, "RELAY_BROKER_URL.*use amqps"),
        ({"RELAY_DATABASE_URL": f"{POSTGRESQL}imfine@10.0.0.5/imfine"}, "RELAY_DATABASE_URL has no password"),
        ({"RELAY_DATABASE_URL": f"{POSTGRESQL}imfine@/imfine?host=10.0.0.5"}, "RELAY_DATABASE_URL has no password"),
        ({"RELAY_DATABASE_URL": f"{POSTGRESQL}postgres:postgres@10.0.0.5/imfine"}, "everybody knows"),
        ({"RELAY_DATABASE_URL": f"{POSTGRESQL}imfine:changeme@10.0.0.5/imfine"}, "everybody knows"),
        ({"RELAY_DATABASE_URL": f"{POSTGRESQL}imfine:own@[2606:4700::1111]/imfine"}, "ssl=require"),
        ({"RELAY_DATABASE_URL": f"{POSTGRESQL}imfine:own@1.1.1.1/imfine?ssl=prefer"}, "ssl=require"),
        ({"RELAY_INTERNAL_URL": "http://1.1.1.1:8000"}, "RELAY_INTERNAL_URL.*use https"),
        (
            {"RELAY_METRICS_TOKEN": "one-for-everything", "RELAY_ADMIN_KEY": "one-for-everything"},
            "RELAY_ADMIN_KEY and RELAY_METRICS_TOKEN are the same",
        ),
    ],
)
def test_an_unsafe_relay_does_not_start(environ: dict[str, str], why: str, tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=why) as caught:
        check_safe(from_env({**environ, "RELAY_DATA_DIR": str(tmp_path)}))
    assert "own@" not in str(caught.value)
    assert "one-for-everything" not in str(caught.value)


@pytest.mark.parametrize(
    "environ",
    [
        {"RELAY_BROKER_URL": "amqp://guest:guest@127.0.0.1//"},
        {"RELAY_BROKER_URL": "amqp://imfine:own@10.0.0.5/imfine"},
        {"RELAY_BROKER_URL": "amqps://imfine:own@1.1.1.1/"},
        {"RELAY_DATABASE_URL": f"{POSTGRESQL}imfine@/imfine?host=/run/postgresql"},
        {"RELAY_DATABASE_URL": f"{POSTGRESQL}imfine@localhost/imfine"},
        {"RELAY_DATABASE_URL": f"{POSTGRESQL}imfine:own@192.168.0.5/imfine"},
        {"RELAY_DATABASE_URL": f"{POSTGRESQL}imfine:own@1.1.1.1/imfine?ssl=require"},
        {"RELAY_INTERNAL_URL": "http://10.0.0.6:8000"},
        {"RELAY_INTERNAL_URL": "https://1.1.1.1"},
    ],
)
def test_servers_on_this_machine_in_a_private_network_or_by_tls_are_taken(
    environ: dict[str, str], tmp_path: Path
) -> None:
    check_safe(from_env({**environ, "RELAY_DATA_DIR": str(tmp_path)}))


def test_other_machines_may_reach_it_through_a_proxy_that_is_named(tmp_path: Path) -> None:
    check_safe(from_env({**PUBLIC, **PROXY, "RELAY_DATA_DIR": str(tmp_path)}))


def test_a_secret_that_everybody_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "enrol.token"
    secret(None, file, "")
    check_safe(from_env({"RELAY_DATA_DIR": str(tmp_path)}))
    file.chmod(0o644)
    with pytest.raises(BadSetting, match=r"enrol.token is open.*chmod 600"):
        check_safe(from_env({"RELAY_DATA_DIR": str(tmp_path)}))
    check_safe(from_env({"RELAY_DATA_DIR": str(tmp_path), "RELAY_ENROL_TOKEN": "another-one-from-outside"}))
