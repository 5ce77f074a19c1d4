"""Files that outlive a process: adapters as safetensors + JSON, and the cache of blobs by hash.

Whatever is written here is whole or absent. Nothing is unpickled. Knows no network: the cache is handed bytes.
"""

import asyncio
import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

import wire
from adapter import DESCRIPTION, FORMAT, MAGNITUDE, WEIGHTS, A, AdapterMeta, B, Description, lora_key
from gpu_service.errors import BadAdapter, BadBlob
from gpu_service.layers import TensorInfo
from gpu_service.lora import Lora

CHUNK_BYTES = 2**20
PART = ".part"  # suffix of a file that is being written


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write `path` so that it is whole or as it was before, whatever happens, a power cut included."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """A rename is durable once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def file_ref(path: Path) -> wire.FileRef:
    """A file by its content. Reads all of it, a chunk at a time."""
    digest, size = hashlib.sha256(), 0
    for chunk in read_chunks(path):
        digest.update(chunk)
        size += len(chunk)
    return wire.FileRef(name=path.name, sha256=digest.hexdigest(), bytes=size)


# --- adapters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """Only what was trained. Keys are names in the base model."""

    meta: AdapterMeta
    full: dict[str, Tensor]
    lora: dict[str, Lora]

    def served(self, device: torch.device, dtype: torch.dtype, weight: Callable[[str], Tensor]) -> "Adapter":
        """As it is served: beside the base model, whose tensors `weight` gives whole, and in its precision."""
        lora = {n: x.served(device, dtype, partial(weight, n)) for n, x in self.lora.items()}
        return Adapter(self.meta, {n: x.to(device, dtype) for n, x in self.full.items()}, lora)

    @property
    def n_bytes(self) -> int:
        lora = (t for x in self.lora.values() for t in (x.a, x.b, x.magnitude, x.stretch) if t is not None)
        return sum(t.nbytes for t in [*self.full.values(), *lora])


def save(folder: Path, adapter: Adapter) -> wire.AdapterManifest:
    """Write both files, the description last. https://huggingface.co/docs/safetensors"""
    assert {*adapter.full, *adapter.lora} == set(adapter.meta.tensors), "the description must name what was trained"
    assert adapter.lora.keys() == adapter.meta.lora.keys(), "the description must give every rank"
    tensors = dict(adapter.full)
    for name, lora in adapter.lora.items():
        tensors.update((lora_key(name, ending), tensor) for ending, tensor in lora.tensors.items())
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save({name: _own(tensor) for name, tensor in tensors.items()}))
    weights = file_ref(folder / WEIGHTS)
    with atomic_file(folder / DESCRIPTION) as file:
        file.write(Description(meta=adapter.meta, weights=weights).model_dump_json(indent=1).encode())
    return wire.AdapterManifest(
        base_model=adapter.meta.base_model,
        base_revision=adapter.meta.base_revision,
        files=[weights, file_ref(folder / DESCRIPTION)],
    )


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, in memory of its own: a view would drag the whole of its storage along."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def load(files: Mapping[str, Path], tensors: Sequence[TensorInfo]) -> Adapter:
    """Read an adapter for a model that has these tensors. `files` are keyed by the names in the manifest.

    Raises BadAdapter, naming what does not fit: a damaged file, a tensor that the model lacks, a shape, a NaN.
    """
    if missing := {WEIGHTS, DESCRIPTION} - files.keys():
        raise BadAdapter(f"The adapter lacks {', '.join(sorted(missing))}.", param="model")
    try:
        content = files[DESCRIPTION].read_bytes()
        _check_format(content)
        described = Description.model_validate_json(content)
    except ValidationError as exc:
        message, _ = wire.validation_message([dict(error) for error in exc.errors()])
        raise BadAdapter(f"{DESCRIPTION} can't be used: {message}", param="model") from exc
    meta = described.meta
    if file_ref(files[WEIGHTS]).sha256 != described.weights.sha256:
        raise BadAdapter(f"{WEIGHTS} is not the file that {DESCRIPTION} was written for.", param="model")
    try:
        stored = safetensors.torch.load_file(files[WEIGHTS])
    except (safetensors.SafetensorError, KeyError, ValueError) as exc:
        raise BadAdapter(f"{WEIGHTS} is no safetensors file: {exc}", param="model") from exc

    expected = _expected_shapes(meta, {t.name: t for t in tensors})
    if odd := stored.keys() ^ expected.keys():
        raise BadAdapter(f"{WEIGHTS} and {DESCRIPTION} disagree about {_some(odd)}.", param="model")
    for key, tensor in stored.items():
        if tuple(tensor.shape) != expected[key]:
            raise BadAdapter(f"{key} is {list(tensor.shape)}, not {list(expected[key])}.", param="model")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise BadAdapter(f"{key} has values that are no finite numbers.", param="model")
    lora = {}
    for name, how in meta.lora.items():
        magnitude = stored[lora_key(name, MAGNITUDE)] if how.dora else None
        a, b = (stored[lora_key(name, ending)] for ending in (A, B))
        lora[name] = Lora(a, b, how.scale, magnitude)
    return Adapter(meta, {name: stored[name] for name in meta.tensors if name not in lora}, lora)


def _check_format(content: bytes) -> None:
    """Raises BadAdapter for one that a later version wrote: it may have fields that change what it means."""
    with suppress(ValueError, LookupError, TypeError):
        found = json.loads(content)["meta"]["format"]
        if isinstance(found, int) and found > FORMAT:
            raise BadAdapter(
                f"The adapter is of format {found}, and this gpu reads up to {FORMAT}: update the gpu's code.",
                param="model",
            )


def _expected_shapes(meta: AdapterMeta, model: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Key in the safetensors file -> shape, for this description and this model."""
    if foreign := [name for name, shape in meta.tensors.items() if name not in model or model[name].shape != shape]:
        raise BadAdapter(
            f"The adapter was made for {meta.base_model}, and this model has no such {_some(foreign)}.", param="model"
        )
    if unfit := [name for name in meta.lora if name not in meta.tensors or not model[name].linear]:
        raise BadAdapter(f"The adapter has lora for {_some(unfit)}, which can't be adapted.", param="model")
    shapes = {name: shape for name, shape in meta.tensors.items() if name not in meta.lora}
    for name, how in meta.lora.items():
        shapes |= {lora_key(name, ending): shape for ending, shape in how.shapes(*model[name].matrix).items()}
    return shapes


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


# --- blobs -----------------------------------------------------------------------------------------------------------


class BlobCache:
    """Blobs on this disk, a file each, named by SHA-256. One process owns the folder.

    Past `budget_bytes` the least recently used go, but none that is kept. A blob that is larger than the budget is
    stored all the same: its job needs it.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(f"*{PART}"):  # of a process that was killed
            part.unlink()
        self._folder, self._budget_bytes = folder, budget_bytes
        self._kept: Counter[str] = Counter()
        self._checked: set[str] = set()  # hashes that this process has compared with the content

    @contextmanager
    def keep(self, *sha256s: str) -> Iterator[None]:
        """None of these is removed within."""
        self._kept.update(sha256s)
        try:
            yield
        finally:
            self._kept.subtract(sha256s)

    def path(self, sha256: str) -> Path | None:
        """The blob if it is here and whole, and then it counts as used.

        Reads it through when this process sees it for the first time; a damaged one is removed.
        """
        path = self._folder / sha256
        try:
            if sha256 not in self._checked and file_ref(path).sha256 != sha256:
                path.unlink()
                return None
            os.utime(path)
        except FileNotFoundError:
            return None
        self._checked.add(sha256)
        return path

    async def store(self, sha256: str, size_bytes: int, chunks: AsyncIterator[bytes]) -> Path:
        """Take in a blob. Raises BadBlob if it is not what hash and size promise; nothing half-written stays."""
        path, digest, received = self._folder / sha256, hashlib.sha256(), 0
        with atomic_file(path) as file:
            async for chunk in chunks:
                received += len(chunk)
                if received > size_bytes:
                    break
                digest.update(chunk)
                file.write(chunk)
            if received != size_bytes or digest.hexdigest() != sha256:
                raise BadBlob(
                    f"A blob came as {received:,} bytes, but not as the {size_bytes:,} that its hash promised."
                )
            # The slow part happens beside the event loop; what remains for the context to sync is little.
            await asyncio.to_thread(_to_disk, file)
        self._arrived(sha256)
        return path

    def add(self, file: Path) -> wire.FileRef:
        """Copy a file in."""
        ref = file_ref(file)
        if self.path(ref.sha256) is None:
            with atomic_file(self._folder / ref.sha256) as copy:
                copy.writelines(read_chunks(file))
            self._arrived(ref.sha256)
        return ref

    def put(self, content: bytes | memoryview) -> str:
        """Write a blob that is at hand. Returns its hash."""
        sha256 = hashlib.sha256(content).hexdigest()
        if self.path(sha256) is None:
            with atomic_file(self._folder / sha256) as file:
                file.write(content)
            self._arrived(sha256)
        return sha256

    def drop(self, sha256s: Iterable[str]) -> None:
        """What nobody will ask for again."""
        for sha256 in sha256s:
            if self._kept[sha256] <= 0:
                (self._folder / sha256).unlink(missing_ok=True)
                self._checked.discard(sha256)

    def _arrived(self, sha256: str) -> None:
        self._checked.add(sha256)
        blobs = sorted((p for p in self._folder.iterdir() if p.suffix != PART), key=lambda p: p.stat().st_mtime_ns)
        total = sum(p.stat().st_size for p in blobs)
        for blob in blobs:
            if total <= self._budget_bytes:
                break
            if blob.name != sha256 and self._kept[blob.name] <= 0:
                total -= blob.stat().st_size
                blob.unlink()
                self._checked.discard(blob.name)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
