"""What a relay refuses to start with: doors that nobody meant to open. Before it listens, and nothing after.

Each refusal says what to change. Knows nothing of where settings come from.
"""

import ipaddress
import socket
from importlib.util import find_spec
from urllib.parse import SplitResult, parse_qs, urlsplit

from relay.settings import SETTINGS, BadSetting, Settings

FOR_OTHERS = 0o007  # bits of a file's mode
KNOWN_PASSWORDS = ("password", "changeme", "secret")  # and one that is the user's name: guest, postgres
ENCRYPTED = ("require", "verify-ca", "verify-full", "true")  # what asyncpg's `ssl` may say


def check_safe(settings: Settings) -> None:
    """Before it listens. Raises BadSetting for what would open a door that nobody meant to open."""
    if settings.broker_url and not find_spec("celery"):
        raise BadSetting(
            "RELAY_BROKER_URL is set and Celery is not installed: pip install -r relay/requirements-celery.txt"
        )
    _check_host(settings)
    _check_servers(settings)
    _check_secrets(settings)


def _check_host(settings: Settings) -> None:
    if _is_loopback(settings.host):
        return
    where = f"RELAY_HOST={settings.host} can be reached from other machines"
    if settings.allow_loopback_gpus:
        raise BadSetting(
            f"{where}, and RELAY_ALLOW_LOOPBACK_GPUS is for one machine and its developer: unset one of the two"
        )
    if all(network.is_loopback for network in settings.trusted_proxies):
        raise BadSetting(
            f"{where}, and the relay speaks no TLS: leave 127.0.0.1 with nginx in front (docs/operations), "
            "or name the addresses of the proxy that does in RELAY_TRUSTED_PROXIES"
        )


def _check_servers(settings: Settings) -> None:
    """Other machines are spoken to with a password of one's own, and by TLS where anybody may listen."""
    database, broker = urlsplit(settings.database_url), urlsplit(settings.broker_url)
    asked = parse_qs(database.query)
    host = asked.get("host", [database.hostname or "localhost"])[0]
    if database.scheme.startswith("postgresql") and not host.startswith("/"):  # a socket's folder
        tls = asked.get("ssl", [""])[0].lower() in ENCRYPTED
        _check_server("RELAY_DATABASE_URL", database, host, tls, "add ?ssl=require to it")
    if settings.broker_url:
        tls = broker.scheme == "amqps"
        _check_server("RELAY_BROKER_URL", broker, broker.hostname or "localhost", tls, "use amqps://")
    peer = urlsplit(settings.internal_url)
    if peer.scheme == "http" and _is_public(peer.hostname):
        raise BadSetting(
            f"RELAY_INTERNAL_URL leads through the open internet ({peer.hostname}) and is not encrypted: "
            "use https://, or an address of a private network"
        )


def _check_server(name: str, url: SplitResult, host: str, tls: bool, remedy: str) -> None:
    if _is_loopback(host):
        return
    if not url.password:
        raise BadSetting(f"{name} has no password and leads to another machine ({host}): give its user one")
    if url.password == url.username or url.password.lower() in KNOWN_PASSWORDS:
        raise BadSetting(f"{name} has a password that everybody knows and leads to another machine ({host}): change it")
    if not tls and _is_public(host):
        raise BadSetting(f"{name} leads through the open internet ({host}) and is not encrypted: {remedy}")


def _check_secrets(settings: Settings) -> None:
    given = {
        setting.name: getattr(settings, setting.field)
        for setting in SETTINGS
        if setting.is_door and getattr(settings, setting.field)
    }
    for name, value in given.items():
        same = [other for other in given if other != name and given[other] == value]
        if same:
            raise BadSetting(f"{name} and {same[0]} are the same, and open different doors: give each its own")
    for value, file in (
        (settings.admin_key, settings.admin_key_file),
        (settings.enrol_token, settings.enrol_token_file),
        (settings.flower_password, settings.flower_password_file),
    ):
        if not value and file.exists() and file.stat().st_mode & FOR_OTHERS:
            raise BadSetting(
                f"{file} is open to every user of this machine: chmod 600 it, and make a new one if others were here"
            )


def _is_public(host: str | None) -> bool:
    """Whether the way there is the open internet. Of a name that leads nowhere yet, nothing is said."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global for *_, address in found)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
