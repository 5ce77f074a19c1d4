"""What the environment may say, read once. The only place of the relay that reads it.

Also the secrets that are made on first start. Knows nothing of what the settings are for; what a relay refuses to start
with is in safety.py.
"""

import ipaddress
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import logs

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ROOT = Path(__file__).parent.parent
MIN_SECRET_CHARS = 16
MIN_SECRET_KINDS = 6  # different characters; of 16 hex digits by chance, one in millions has fewer
MAX_URL_CHARS = 400
TUNNEL_SUFFIXES = (
    ".ngrok-free.app",
    ".ngrok-free.dev",
    ".ngrok.app",
    ".ngrok.dev",
    ".ngrok.io",
    ".trycloudflare.com",
)
LOOPBACK = (ipaddress.ip_network("127.0.0.1"), ipaddress.ip_network("::1"))


class BadSetting(Exception):
    """One line for the person who started us."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    host: str = "127.0.0.1"
    port: int = 8000
    trusted_proxies: tuple[Network, ...] = LOOPBACK
    data_dir: Path = Path("data/relay")
    database_url: str = ""  # empty: SQLite in the data folder
    blobs_url: str = ""  # empty: a folder in the data folder
    s3_endpoint: str = ""  # empty: AWS
    s3_region: str = "us-east-1"
    s3_access_key_id: str = ""  # empty, and so the secret: what the machine is given, such as an instance's role
    s3_secret_access_key: str = ""
    s3_allow_http: bool = False
    s3_cache_bytes: int = 8 * 2**30
    internal_url: str = ""  # empty: no other relay process can ask this one
    broker_url: str = ""  # empty: the relay hands jobs out itself
    admin_key: str | None = None
    enrol_token: str | None = None
    flower_password: str | None = None
    metrics_token: str | None = None  # None: the admin's key alone reads /metrics
    log_level: logs.Level = "info"
    log_format: logs.Format = "auto"
    allow_loopback_gpus: bool = False
    gpu_host_suffixes: tuple[str, ...] = TUNNEL_SUFFIXES
    heartbeat_s: float = 10.0
    lease_s: float = 30.0
    max_body_bytes: int = 8 * 2**20
    max_upload_bytes: int = 512 * 2**20
    max_adapter_bytes: int = 16 * 2**30
    user_quota_bytes: int = 20 * 2**30  # files, models and what running jobs may store; 0: no end
    price_per_million_tokens: float = 0.0
    price_per_gpu_hour: float = 0.0
    min_free_bytes: int = 256 * 2**20  # of the disk, kept free for the database and the log
    page_dir: Path = ROOT / "web" / "dist"

    @property
    def alive_s(self) -> float:
        """A gpu silent for longer gets no new work."""
        return 3 * self.heartbeat_s

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite+aiosqlite:///{self.data_dir / 'relay.db'}"

    @property
    def admin_key_file(self) -> Path:
        return self.data_dir / "admin.key"

    @property
    def flower_password_file(self) -> Path:
        return self.data_dir / "flower.password"

    @property
    def enrol_token_file(self) -> Path:
        return self.data_dir / "enrol.token"


def _text(value: str) -> str:
    return value


def _port(value: str) -> int:
    number = int(value)
    if not 0 <= number <= 65535:
        raise ValueError("a port is 0 to 65535")
    return number


def _seconds(value: str) -> float:
    number = float(value)
    if not 0.1 <= number <= 3600:
        raise ValueError("use 0.1 to 3600 seconds")
    return number


def _price(value: str) -> float:
    number = float(value)
    if not 0 <= number <= 1e9:
        raise ValueError("use a number from 0 to a thousand million")
    return number


def _bytes(value: str) -> int:
    number = int(value)
    if number < 1:
        raise ValueError("use a whole number of bytes above 0")
    return number


def _bytes_or_none(value: str) -> int:
    number = int(value)
    if number < 0:
        raise ValueError("use a whole number of bytes, or 0")
    return number


def _switch(value: str) -> bool:
    if value.lower() not in ("1", "true", "on", "yes", "0", "false", "off", "no"):
        raise ValueError("use 1 or 0")
    return value.lower() in ("1", "true", "on", "yes")


def _secret(value: str) -> str:
    if len(value) < MIN_SECRET_CHARS or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError(f"use at least {MIN_SECRET_CHARS} ASCII characters without spaces")
    if len(set(value)) < MIN_SECRET_KINDS:
        raise ValueError("it repeats itself: make one by chance, such as by `openssl rand -hex 32`")
    return value


def _broker(value: str) -> str:
    if not value.startswith(("amqp://", "amqps://")):
        raise ValueError("use amqp://user:password@host/ or amqps://")
    return value


def _database(value: str) -> str:
    if not value.startswith(("sqlite+aiosqlite:///", "postgresql+asyncpg://")):
        raise ValueError("use postgresql+asyncpg://user:password@host/name, or sqlite+aiosqlite:///path/to/relay.db")
    return value


def _bucket(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "s3" or not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts.netloc):
        raise ValueError("use s3://bucket or s3://bucket/prefix")
    if parts.query or parts.fragment or not re.fullmatch(r"[\w./-]*", parts.path, re.ASCII) or "//" in parts.path:
        raise ValueError("a prefix has letters, digits, '.', '_', '-' and '/' only")
    return value.rstrip("/")


def _origin(shape: str, besides: str = "") -> Callable[[str], str]:
    def read(value: str) -> str:
        parts = urlsplit(value)
        port = parts.port  # raises ValueError for what is none
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or port == 0:
            raise ValueError(f"use {shape}")
        if parts.path not in ("", "/") or parts.query or parts.fragment or len(value) > MAX_URL_CHARS:
            raise ValueError(f"give scheme, host and port only{besides}")
        return value.rstrip("/")

    return read


_endpoint = _origin("https://host or http://host:port, without a bucket", "; the bucket is in RELAY_BLOBS_URL")
_internal = _origin("http://host:port, where other relay processes reach this one")


def _word(value: str) -> str:
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("use ASCII characters without spaces")
    return value


def _credential(value: str) -> str:
    return _word(value)


def _suffixes(value: str) -> tuple[str, ...]:
    suffixes = tuple(part.strip().lower() for part in value.split(",") if part.strip())
    if not suffixes or not all(s.startswith(".") and len(s) > 3 for s in suffixes):
        raise ValueError("use suffixes that start with a dot, such as .example.com, with commas between")
    return suffixes


def _networks(value: str) -> tuple[Network, ...]:
    if value.lower() == "none":
        return ()
    networks = tuple(ipaddress.ip_network(part.strip()) for part in value.split(","))
    if any(network.prefixlen == 0 for network in networks):
        raise ValueError("everybody is no proxy: whoever asks could say any address")
    return networks


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value.lower() not in choices:
            raise ValueError(f"use {', '.join(choices)}")
        return value.lower()

    return read


@dataclass(frozen=True)
class Setting:
    name: str
    field: str
    default: str  # as the docs have it
    meaning: str
    parse: Callable[[str], Any]

    @property
    def is_door(self) -> bool:
        """Whoever knows its value comes in by it."""
        return self.parse is _secret

    @property
    def is_secret(self) -> bool:
        """Or holds one: its value must not end up in a log."""
        return self.parse in (_secret, _broker, _database, _credential)


SETTINGS = (
    Setting("RELAY_HOST", "host", "127.0.0.1", "Address to listen on.", _text),
    Setting("RELAY_PORT", "port", "8000", "Port to listen on; 0 takes a free one.", _port),
    Setting(
        "RELAY_TRUSTED_PROXIES",
        "trusted_proxies",
        "127.0.0.1,::1",
        "Whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed: addresses and networks, or `none`.",
        _networks,
    ),
    Setting("RELAY_DATA_DIR", "data_dir", "data/relay", "Folder of the database, the blobs and the two secrets.", Path),
    Setting(
        "RELAY_DATABASE_URL",
        "database_url",
        "SQLite in the data folder",
        "PostgreSQL, as `postgresql+asyncpg://user:password@host/name`: for several relay processes.",
        _database,
    ),
    Setting(
        "RELAY_BLOBS_URL",
        "blobs_url",
        "a folder in the data folder",
        "A bucket that speaks S3, as `s3://bucket/prefix`, for files, models and checkpoints.",
        _bucket,
    ),
    Setting(
        "RELAY_S3_ENDPOINT",
        "s3_endpoint",
        "AWS, by the region",
        "Where the bucket is, if not at AWS: `https://host` or `https://host:port`.",
        _endpoint,
    ),
    Setting("RELAY_S3_REGION", "s3_region", "us-east-1", "The bucket's region.", _word),
    Setting(
        "RELAY_S3_ACCESS_KEY_ID",
        "s3_access_key_id",
        "the machine's own: an EC2 instance's or container's role",
        "Who asks for the bucket.",
        _credential,
    ),
    Setting("RELAY_S3_SECRET_ACCESS_KEY", "s3_secret_access_key", "the machine's own", "Its secret.", _credential),
    Setting(
        "RELAY_S3_ALLOW_HTTP",
        "s3_allow_http",
        "0",
        "Allow an `http://` endpoint by name or at a public address: what passes can be read on its way.",
        _switch,
    ),
    Setting(
        "RELAY_S3_CACHE_BYTES",
        "s3_cache_bytes",
        "8589934592",
        "Local disk for copies of what was sent to the bucket or read from it lately.",
        _bytes_or_none,
    ),
    Setting(
        "RELAY_INTERNAL_URL",
        "internal_url",
        "none: one process",
        "With several relay processes on PostgreSQL: where the others reach this one, as `http://host:port`.",
        _internal,
    ),
    Setting(
        "RELAY_BROKER_URL",
        "broker_url",
        "none: the relay hands jobs out itself",
        "RabbitMQ, as `amqp://user:password@host/`: Celery's workers hand them out.",
        _broker,
    ),
    Setting("RELAY_ADMIN_KEY", "admin_key", "made on first start, in admin.key", "API key of the user admin.", _secret),
    Setting(
        "RELAY_ENROL_TOKEN", "enrol_token", "made on first start, in enrol.token", "What a gpu enrols with.", _secret
    ),
    Setting(
        "RELAY_FLOWER_PASSWORD",
        "flower_password",
        "made on first start, in flower.password",
        "Of the user admin, for Flower.",
        _secret,
    ),
    Setting(
        "RELAY_METRICS_TOKEN",
        "metrics_token",
        "none: the admin's key alone",
        "Reads `/metrics`, and nothing else.",
        _secret,
    ),
    Setting(
        "RELAY_LOG_LEVEL",
        "log_level",
        "info",
        "`debug`, `info` (a line for each request), `warning` or `error`.",
        _one_of(logs.LEVELS),
    ),
    Setting(
        "RELAY_LOG_FORMAT",
        "log_format",
        "auto",
        "`json`: an object a line; `text`; `auto`: text on a terminal, else JSON.",
        _one_of(logs.FORMATS),
    ),
    Setting(
        "RELAY_ALLOW_LOOPBACK_GPUS",
        "allow_loopback_gpus",
        "0",
        "Also accept gpus at http://127.0.0.1; for development on one machine.",
        _switch,
    ),
    Setting(
        "RELAY_GPU_HOST_SUFFIXES",
        "gpu_host_suffixes",
        ",".join(TUNNEL_SUFFIXES),
        "Hosts that a gpu's URL may have.",
        _suffixes,
    ),
    Setting("RELAY_HEARTBEAT_S", "heartbeat_s", "10", "A heartbeat is held back this long at most.", _seconds),
    Setting("RELAY_LEASE_S", "lease_s", "30", "A gpu silent for this long loses its job to another.", _seconds),
    Setting("RELAY_MAX_BODY_BYTES", "max_body_bytes", "8388608", "Largest JSON body of a request.", _bytes),
    Setting("RELAY_MAX_UPLOAD_BYTES", "max_upload_bytes", "536870912", "Largest file that a user uploads.", _bytes),
    Setting(
        "RELAY_MAX_ADAPTER_BYTES", "max_adapter_bytes", "17179869184", "Largest blob that a gpu sends back.", _bytes
    ),
    Setting(
        "RELAY_USER_QUOTA_BYTES",
        "user_quota_bytes",
        "21474836480",
        "What one user's files, models and jobs may store; 0 for no end.",
        _bytes_or_none,
    ),
    Setting(
        "RELAY_PRICE_PER_MILLION_TOKENS",
        "price_per_million_tokens",
        "0",
        "Of prompts, answers and training alike, for `spend_per_month` of keys, in money of your choice.",
        _price,
    ),
    Setting(
        "RELAY_PRICE_PER_GPU_HOUR",
        "price_per_gpu_hour",
        "0",
        "Of the time that jobs hold a gpu, in the same money.",
        _price,
    ),
    Setting(
        "RELAY_MIN_FREE_BYTES",
        "min_free_bytes",
        "268435456",
        "Disk that stays free: past it, uploads are refused with `disk_full`.",
        _bytes_or_none,
    ),
    Setting(
        "RELAY_PAGE_DIR",
        "page_dir",
        "web/dist beside the relay",
        "The built page; without it `/` is a plain one.",
        Path,
    ),
)


def environment() -> dict[str, str]:
    """For who hands it to a process."""
    return dict(os.environ)


def from_env(environ: Mapping[str, str] = os.environ) -> Settings:
    """Raises BadSetting, naming the variable. An empty variable counts as unset."""
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        text = environ.get(setting.name, "").strip()
        if not text:
            continue
        try:
            values[setting.field] = setting.parse(text)
        except ValueError as exc:
            shown = "is set" if setting.is_secret or setting.parse is _endpoint else f"is {text!r}"
            raise BadSetting(f"{setting.name} {shown}: {exc}") from exc
    settings = Settings(**values)
    if settings.lease_s < 2 * settings.heartbeat_s:
        raise BadSetting("RELAY_LEASE_S must be at least twice RELAY_HEARTBEAT_S, or one late heartbeat loses a job")
    if settings.database.startswith("postgresql") and not find_spec("asyncpg"):
        raise BadSetting(
            "RELAY_DATABASE_URL names PostgreSQL and asyncpg is not installed: "
            "pip install -r relay/requirements-postgresql.txt"
        )
    _check_bucket(settings)
    return settings


def _check_bucket(settings: Settings) -> None:
    if not settings.blobs_url:
        given = (settings.s3_endpoint, settings.s3_access_key_id, settings.s3_secret_access_key)
        if any(given):
            raise BadSetting(
                "RELAY_S3_... is set and RELAY_BLOBS_URL is not: name the bucket, as s3://bucket/prefix, "
                "or unset the others"
            )
        return
    if bool(settings.s3_access_key_id) != bool(settings.s3_secret_access_key):
        raise BadSetting(
            "set both RELAY_S3_ACCESS_KEY_ID and RELAY_S3_SECRET_ACCESS_KEY, or neither where the machine has a role"
        )
    endpoint = urlsplit(settings.s3_endpoint)
    if endpoint.scheme == "http" and not settings.s3_allow_http and not _is_private(endpoint.hostname or ""):
        raise BadSetting(
            "RELAY_S3_ENDPOINT is http, so whoever is on the way reads and changes what passes: use https, or set "
            "RELAY_S3_ALLOW_HTTP=1 where the network between is yours alone"
        )
    if not find_spec("obstore"):
        raise BadSetting(
            "RELAY_BLOBS_URL names a bucket and obstore is not installed: pip install -r relay/requirements-s3.txt"
        )


def _is_private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost"


def secret(given: str | None, file: Path, prefix: str) -> str:
    """What the environment gave; else what the file holds; else a new one, written there for its owner only."""
    if given:
        return given
    try:
        return _secret(file.read_text().strip())
    except FileNotFoundError:
        pass
    except ValueError as exc:
        raise BadSetting(f"{file} holds no usable secret ({exc}): delete it and start again") from exc
    made = prefix + secrets.token_urlsafe(32)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(made + "\n")
        out.flush()
        os.fsync(out.fileno())
    try:
        os.link(temporary, file)  # unlike rename, loses to another process that was first
    except FileExistsError:
        return secret(given, file, prefix)
    finally:
        temporary.unlink()
    return made
