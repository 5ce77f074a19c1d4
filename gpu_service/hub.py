"""Models from the hub: what is missing is measured, the disk is asked, then it is fetched, and said how far it is.

Only safetensors, JSON and a tokenizer's files are fetched, at one commit. A broken connection goes on where it stopped
while the service runs; a later start keeps the files that are whole, and begins the others again, as the hub's client
does. What is there needs no network. Raises BadSetting: whoever starts the service named the model in GPU_MODELS.
"""

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import httpx2
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
)

from gpu_service.settings import BadSetting

log = logging.getLogger(__name__)

# Of a Stable Diffusion, whose repositories hold the same weights several times over, in other formats and precisions.
PIPELINE = "model_index.json"
PIPELINE_FILES = [
    PIPELINE,
    "scheduler/*.json",
    "tokenizer/*.json",
    "tokenizer/merges.txt",
    *(f"{part}/{name}" for part in ("unet", "vae") for name in ("config.json", "diffusion_pytorch_model.safetensors")),
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
]
FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
SPARE_BYTES = 200 * 2**20  # that a download leaves free: logs, checkpoints and the relay may share the disk
LOOK_S = 0.5  # between two looks at how far it is
SAY_S = 5.0  # between two lines in the log


@dataclass(frozen=True)
class Download:
    model: str
    done_bytes: int
    total_bytes: int  # of what was missing

    def __str__(self) -> str:
        share = 100 * self.done_bytes // max(1, self.total_bytes)
        return f"{self.model}: {self.done_bytes / 1e6:,.0f} of {self.total_bytes / 1e6:,.0f} MB ({share} %)"


def fetch(name: str, token: str | None, folder: Path | None, tell: Callable[[Download], None]) -> Path:
    """The model's files, in a folder named by their commit. `folder`: where models are kept; None: the hub's own."""
    if folder is not None:
        _usable(folder)
    wanted: dict[str, Any] = {"allow_patterns": FILES, "token": token, "cache_dir": folder}
    try:
        files = snapshot_download(name, dry_run=True, **wanted)
        if any(f.filename == PIPELINE for f in files):
            wanted["allow_patterns"] = PIPELINE_FILES
            files = snapshot_download(name, dry_run=True, **wanted)
        missing = [f for f in files if f.will_download]
        if missing:
            kept = folder or Path(constants.HF_HUB_CACHE)
            _download(name, missing, kept, wanted, tell)
        revision = {"revision": missing[0].commit_hash} if missing else {}
        return Path(snapshot_download(name, local_files_only=bool(missing), **revision, **wanted))
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as exc:
        why = exc.__cause__ if isinstance(exc, DryRunError) and exc.__cause__ else exc
        if isinstance(why, HfHubHTTPError) and not isinstance(why, EntryNotFoundError):
            raise BadSetting(_refused(name, why)) from exc
        return _from_disk(name, wanted, why)


def _download(
    name: str, missing: list[Any], kept: Path, wanted: dict[str, Any], tell: Callable[[Download], None]
) -> None:
    blobs = kept / f"models--{name.replace('/', '--')}" / "blobs"
    total, before = sum(f.file_size for f in missing), _size(blobs)
    kept.mkdir(parents=True, exist_ok=True)
    needs, free = total + SPARE_BYTES, shutil.disk_usage(kept).free
    if needs > free:
        raise BadSetting(
            f"GPU_MODELS names '{name}': {total / 1e6:,.0f} MB are to be fetched, {SPARE_BYTES / 1e6:,.0f} MB must "
            f"stay free, and {free / 1e6:,.0f} MB are free in {kept}: make room, or set GPU_MODELS_DIR to a larger disk"
        )
    said = -SAY_S
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub") as pool:
        running = pool.submit(snapshot_download, name, revision=missing[0].commit_hash, **wanted)
        while not wait([running], timeout=LOOK_S).done:
            now = Download(name, min(total, max(0, _size(blobs) - before)), total)
            tell(now)
            if time.monotonic() - said >= SAY_S:
                said = time.monotonic()
                log.info("downloading %s", now)
        running.result()
    tell(Download(name, total, total))
    log.info("downloaded %s", Download(name, total, total))


def _from_disk(name: str, wanted: dict[str, Any], why: BaseException) -> Path:
    """Without the hub: the last commit that is whole here."""
    unreachable = (
        f"GPU_MODELS names '{name}': it is no folder here, and the hub did not give it, or not all of it "
        f"({type(why).__name__}). Check the name and the network and start again: files that are whole are kept."
    )
    try:
        found = Path(snapshot_download(name, local_files_only=True, **wanted))
    except (OSError, ValueError) as exc:
        raise BadSetting(unreachable) from exc
    if not list(found.rglob("*.safetensors")):
        raise BadSetting(unreachable) from why
    log.warning("the hub can't be reached: %s is served as it is on disk", name)
    return found


def _refused(name: str, exc: HfHubHTTPError) -> str:
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    status = exc.response.status_code
    if isinstance(exc, GatedRepoError):
        return (
            f"GPU_MODELS names '{name}', and its owner asks you to accept a licence first: open "
            f"{constants.ENDPOINT}/{name}, accept it there, and set HF_TOKEN to a token of that account ({tokens})"
        )
    if isinstance(exc, RepositoryNotFoundError):
        return (
            f"GPU_MODELS names '{name}': the hub has no such model, or it is private; check the name, or set HF_TOKEN "
            f"to a token that may read it ({tokens})"
        )
    if status in (401, 403):
        return (
            f"GPU_MODELS names '{name}': the hub refuses it ({status}). Set HF_TOKEN to a token that may read it "
            f"({tokens}); if it has a licence, accept it at {constants.ENDPOINT}/{name}"
        )
    return f"GPU_MODELS names '{name}': the hub answered {status}. Start again later: files that are whole are kept."


def _usable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as exc:
        raise BadSetting(
            f"GPU_MODELS_DIR is '{folder}', and nothing can be written there ({exc.strerror}): is the drive mounted?"
        ) from exc


def _size(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total
