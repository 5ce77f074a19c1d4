"""Settings of the gpu service. The only file here that reads the environment; read once, at start."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import logs
import wire

TABLE: dict[str, str] = {
    "GPU_HOST": "Address to listen on.",
    "GPU_PORT": "Port to listen on.",
    "GPU_DATA_DIR": "Where this gpu keeps its key, its identity, fetched adapters and work in progress.",
    "GPU_MODELS": "Models to load at start, separated by commas: hub ids, folders, or `name=folder` to name a folder.",
    "GPU_KEY": "Bearer key for direct requests. Made on first start and written to `gpu.key` when not set.",
    "GPU_RELAY_URL": "The relay to enrol with. Without it the service stands alone.",
    "GPU_ENROL_TOKEN": "The relay's enrol token.",
    "GPU_NAME": "How the relay calls this gpu in lists; the device's name by default.",
    "GPU_TUNNEL": "How others reach this gpu: `ngrok`, `cloudflared`, `relay` or `none`; see docs/tunnels.md.",
    "GPU_PUBLIC_URL": "With the tunnel `none`: the URL at which the relay reaches this service.",
    "NGROK_AUTHTOKEN": "Token of an ngrok account, for the tunnel `ngrok`.",
    "GPU_NGROK_DOMAIN": "A domain reserved at ngrok, so that the public URL stays the same.",
    "GPU_RUNTIME_ENDS_AT": "When this runtime ends, in unix seconds, where it is known; shown, and told to the relay.",
    "GPU_CHECKPOINT_EVERY_S": "Seconds between a job's checkpoints; 0: by cost and the runtime's life; of a batch 10.",
    "GPU_DEVICE": "`cpu`, `cuda` or `mps`; chosen by what is there when not set.",
    "GPU_PRECISION": "`fp32`, `bf16` or `fp16`; chosen by the device when not set.",
    "GPU_QUANTIZE": "`8bit` or `4bit`: how models that serve hold their layers' matrices; `none` when not set.",
    "GPU_MAX_WAITING": "Generations under way or waiting; past it 429. One caller may have half of them.",
    "GPU_TRAIN_SHARE": "Of device time, for training and batches while others chat; more than 0, less than 1.",
    "GPU_BATCH_ROWS": "Rows of a batch that are answered at once, behind whoever chats.",
    "GPU_KV_SHARE": "Of the memory that is free at start, for keys and values of chats; more than 0, less than 1.",
    "GPU_ADAPTER_BYTES": "Memory for adapters that are served; past it the least recently used leave.",
    "GPU_BLOB_BYTES": "Disk for files fetched from the relay; past it the least recently used leave.",
    "GPU_PREFIX_BYTES": "Disk for what frozen layers put out, kept for jobs' epochs and for later jobs; 0: none.",
    "GPU_MODELS_DIR": "Where models from the hub are kept, such as a mounted drive; not set: in `HF_HOME`.",
    "GPU_LOG_LEVEL": "`debug`, `info` (a line for each request), `warning` or `error`.",
    "GPU_LOG_FORMAT": "`json`: an object a line; `text`; `auto`: text on a terminal, else JSON.",
    "HF_TOKEN": "Hugging Face token, for models that ask for one.",
}


Choice = TypeVar("Choice", bound=str)
QUANTIZE: tuple[wire.Quantize, ...] = ("none", "8bit", "4bit")
TUNNELS = ("none", "ngrok", "cloudflared", "relay")


class BadSetting(Exception):
    """One line, for the person who starts the service."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    host: str = "127.0.0.1"
    port: int = 8001
    data_dir: Path = Path("data/gpu")
    models: tuple[str, ...] = ()
    key: str | None = None
    relay_url: str | None = None
    enrol_token: str | None = None
    name: str | None = None
    tunnel: str = "none"
    public_url: str | None = None
    ngrok_token: str | None = None
    ngrok_domain: str | None = None
    runtime_ends_at: float | None = None
    checkpoint_every_s: float = 0.0  # 0: chosen
    device: str | None = None
    precision: str | None = None
    quantize: wire.Quantize = "none"
    hf_token: str | None = None
    models_dir: Path | None = None
    log_level: logs.Level = "info"
    log_format: logs.Format = "auto"

    max_body_bytes: int = 8 * 2**20
    max_waiting: int = 256
    train_share: float = 0.5
    batch_rows: int = 32
    kv_share: float = 0.3
    adapter_bytes: int = 2 * 2**30
    blob_bytes: int = 20 * 2**30
    prefix_bytes: int = 20 * 2**30


def one_tokenizing_thread() -> None:
    """The tokenizers' library reads this when it is first used; its threads would fight the model's."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def environment() -> dict[str, str]:
    """For who adds to it, or hands it to a process."""
    return dict(os.environ)


def from_env(env: Mapping[str, str] = os.environ) -> Settings:
    def text(name: str) -> str | None:
        return env.get(name, "").strip() or None

    def one_of(name: str, *allowed: Choice) -> Choice | None:
        value = text(name)
        if value and value not in allowed:
            raise BadSetting(f"{name} is '{value}': use {', '.join(allowed)}, or leave it unset")
        return next((choice for choice in allowed if choice == value), None)

    def count(name: str, default: int, least: int = 0) -> int:
        value = text(name) or str(default)
        if not value.isdigit() or not least <= int(value) <= wire.MAX_BYTES:
            raise BadSetting(f"{name} is '{value}': use a whole number, {least} or more")
        return int(value)

    def share(name: str, default: float) -> float:
        value = text(name) or str(default)
        if not value.replace(".", "", 1).isdigit() or not 0 < float(value) < 1:
            raise BadSetting(f"{name} is '{value}': use a number between 0 and 1, such as {default}")
        return float(value)

    port = text("GPU_PORT") or "8001"
    if not port.isdigit() or not 0 <= int(port) < 65536:
        raise BadSetting(f"GPU_PORT is '{port}': use a number from 0 to 65535")
    relay_url, token = text("GPU_RELAY_URL"), text("GPU_ENROL_TOKEN")
    if relay_url and not relay_url.startswith(("http://", "https://")):
        raise BadSetting(f"GPU_RELAY_URL is '{relay_url}': it must begin with https:// (or http:// on this machine)")
    if relay_url and not token:
        raise BadSetting("GPU_RELAY_URL is set and GPU_ENROL_TOKEN is not: the relay wrote it to enrol.token")
    public_url = text("GPU_PUBLIC_URL")
    tunnel = one_of("GPU_TUNNEL", *TUNNELS) or _tunnel(env)
    if public_url and tunnel != "none":
        raise BadSetting(f"GPU_PUBLIC_URL goes with GPU_TUNNEL=none; '{tunnel}' finds its own")
    if tunnel == "relay" and not relay_url:
        raise BadSetting("GPU_TUNNEL is 'relay' and GPU_RELAY_URL is not set: there is no relay to dial")
    if tunnel == "ngrok" and not text("NGROK_AUTHTOKEN"):
        raise BadSetting("GPU_TUNNEL is 'ngrok' and NGROK_AUTHTOKEN is not set: copy it from dashboard.ngrok.com")
    ends_at = text("GPU_RUNTIME_ENDS_AT")
    if ends_at and not ends_at.replace(".", "", 1).isdigit():
        raise BadSetting(f"GPU_RUNTIME_ENDS_AT is '{ends_at}': use unix seconds")
    every = text("GPU_CHECKPOINT_EVERY_S") or "0"
    if not every.replace(".", "", 1).isdigit():
        raise BadSetting(f"GPU_CHECKPOINT_EVERY_S is '{every}': use seconds, or 0 to have them chosen")
    default = Settings()
    return Settings(
        max_waiting=count("GPU_MAX_WAITING", default.max_waiting, 1),
        train_share=share("GPU_TRAIN_SHARE", default.train_share),
        batch_rows=count("GPU_BATCH_ROWS", default.batch_rows, 1),
        kv_share=share("GPU_KV_SHARE", default.kv_share),
        adapter_bytes=count("GPU_ADAPTER_BYTES", default.adapter_bytes),
        blob_bytes=count("GPU_BLOB_BYTES", default.blob_bytes),
        prefix_bytes=count("GPU_PREFIX_BYTES", default.prefix_bytes),
        host=text("GPU_HOST") or "127.0.0.1",
        port=int(port),
        data_dir=Path(text("GPU_DATA_DIR") or "data/gpu"),
        models=tuple(m.strip() for m in (text("GPU_MODELS") or "").split(",") if m.strip()),
        key=text("GPU_KEY"),
        relay_url=relay_url.rstrip("/") if relay_url else None,
        enrol_token=token,
        name=text("GPU_NAME"),
        tunnel=tunnel,
        ngrok_token=text("NGROK_AUTHTOKEN"),
        ngrok_domain=text("GPU_NGROK_DOMAIN"),
        runtime_ends_at=float(ends_at) if ends_at else None,
        public_url=public_url.rstrip("/") if public_url else None,
        checkpoint_every_s=float(every),
        device=one_of("GPU_DEVICE", "cpu", "cuda", "mps"),
        precision=one_of("GPU_PRECISION", "fp32", "bf16", "fp16"),
        quantize=one_of("GPU_QUANTIZE", *QUANTIZE) or "none",
        hf_token=text("HF_TOKEN"),
        log_level=one_of("GPU_LOG_LEVEL", *logs.LEVELS) or "info",
        log_format=one_of("GPU_LOG_FORMAT", *logs.FORMATS) or "auto",
        models_dir=Path(models_dir) if (models_dir := text("GPU_MODELS_DIR")) else None,
    )


def _tunnel(env: Mapping[str, str]) -> str:
    """What there is, the most settled first."""
    if env.get("GPU_PUBLIC_URL", "").strip():
        return "none"
    if env.get("NGROK_AUTHTOKEN", "").strip():
        return "ngrok"
    if env.get("GPU_RELAY_URL", "").strip():
        return "relay"
    return "cloudflared" if shutil.which("cloudflared", path=env.get("PATH")) else "none"
