"""Tuned models that come and go as the files of other tools: an import is a model like any other.

Of text as peft's, in a zip; of pictures as one safetensors file, diffusers' or kohya's.

Knows nothing of HTTP, and of a tensor's values only whether they are numbers.
"""

import asyncio
import secrets
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError
from sqlalchemy import insert

import archive
import wire
from adapter import DESCRIPTION, WEIGHTS, AdapterMeta, Description
from relay import errors, peft, peft_import, refs, sd_lora, tensor_file, zips
from relay.blobs import Blobs, Incoming
from relay.models import Model
from relay.peft_import import BaseTensors, CannotImport, Imported
from relay.room import Room
from relay.settings import Settings
from relay.store import Clock, Store
from relay.tables import models
from relay.tensor_file import NotTensors, Piece, Shaped, TensorFile

ID_HEX = 12  # as that of a model that a job made


@dataclass(frozen=True)
class Target:
    """What an imported adapter becomes."""

    base: Model
    tensors: BaseTensors
    suffix: str | None


@dataclass(frozen=True)
class Export:
    """A file to be sent; whoever closes it is rid of it. A zip of peft's two files, or a single safetensors file."""

    file: IO[bytes]
    media_type: str

    @property
    def ending(self) -> str:
        return ".zip" if self.media_type == "application/zip" else ".safetensors"


class Adapters:
    def __init__(self, store: Store, blobs: Blobs, room: Room, settings: Settings, clock: Clock) -> None:
        self._store = store
        self._blobs = blobs
        self._room = room
        self._settings = settings
        self._clock = clock

    async def add(self, owner: str, archive: Incoming, target: Target) -> str:
        """The id of the new model. Raises CannotImport, QuotaExceeded, DiskFull; then nothing stays."""
        await archive.finish()
        bound = await self._room.for_file(owner, self._settings.max_upload_bytes)
        async with self._blobs.incoming(bound) as weights, self._blobs.incoming(bound) as description:
            found = await asyncio.to_thread(self._convert, archive, weights, target.tensors)
            await weights.finish()
            files = [wire.FileRef(name=WEIGHTS, sha256=weights.sha256, bytes=weights.bytes)]
            meta = self._described(found, target)
            await description.write(Description(meta=meta, weights=files[0]).model_dump_json(indent=1).encode())
            await description.finish()
            files.append(wire.FileRef(name=DESCRIPTION, sha256=description.sha256, bytes=description.bytes))
            manifest = wire.AdapterManifest(base_model=target.base.id, base_revision="imported", files=files)
            for incoming in (weights, description):
                await self._blobs.send(incoming)
            model_id = f"ft:{target.base.id}:{target.suffix or 'imported'}:{secrets.token_hex(ID_HEX // 2)}"
            async with self._store.write() as db:
                await self._room.check(db, owner, sum(ref.bytes for ref in files), "the adapter")
                for incoming in (weights, description):
                    await self._blobs.keep(incoming)
                row = {"id": model_id, "owner": owner, "base_model": target.base.id, "created_at": self._clock()}
                await db.execute(insert(models).values(**row, adapter=manifest.model_dump()))
                await refs.name(db, "model", model_id, owner, refs.sizes(files))
        return model_id

    def _convert(self, incoming: Incoming, to: Incoming, base: BaseTensors) -> Imported:
        if base.family == "sd":
            return self._convert_lora(incoming, to, base)
        with zips.opened(incoming.path) as opened, self._blobs.scratch() as file:
            found = zips.find(opened)
            config = peft_import.read_config(zips.config_of(opened, found))
            self._blobs.check_room(2 * found.weights.file_size)
            zips.copy(opened, found.weights, file, self._settings.max_upload_bytes)
            try:
                result = peft_import.imported(config, TensorFile(file), base)
            except NotTensors as exc:
                raise CannotImport(f"{peft.WEIGHTS} is no safetensors file: {exc}") from exc
            tensor_file.write(to.put, {key: _of_numbers(key, piece) for key, piece in result.pieces.items()})
            return result

    def _convert_lora(self, incoming: Incoming, to: Incoming, base: BaseTensors) -> Imported:
        """One safetensors file, by itself or in a zip."""
        with ExitStack() as stack:
            if archive.is_zip(incoming.path):
                opened = stack.enter_context(zips.opened(incoming.path))
                file: IO[bytes] = stack.enter_context(self._blobs.scratch())
                entry = zips.find_tensors(opened)
                self._blobs.check_room(2 * entry.file_size)
                zips.copy(opened, entry, file, self._settings.max_upload_bytes)
            else:
                file = stack.enter_context(incoming.path.open("rb"))
            try:
                result = sd_lora.imported(TensorFile(file), base)
            except NotTensors as exc:
                raise CannotImport(f"the file is no safetensors file: {exc}") from exc
            tensor_file.write(to.put, {key: _of_numbers(key, piece) for key, piece in result.pieces.items()})
            return result

    def _described(self, found: Imported, target: Target) -> AdapterMeta:
        return AdapterMeta(
            family=target.tensors.family,
            base_model=target.base.id,
            base_revision="",
            tied=target.tensors.tied,
            layers=[],
            lora=found.lora,
            tensors=found.tensors,
            hyperparameters=wire.Hyperparameters(),
            created_at=self._clock(),
            trained_tokens=0,
        )

    async def export(self, model: wire.TunedModel, form: sd_lora.Format | None) -> Export:
        """Raises CannotExport, NotFound, DiskFull, InvalidRequest for a form that the model does not have."""
        blobs = {ref.name: ref for ref in model.adapter.files}
        if missing := {WEIGHTS, DESCRIPTION} - blobs.keys():
            raise errors.NotFound(f"the model lacks {', '.join(sorted(missing))}", param="model")
        self._blobs.check_room(2 * blobs[WEIGHTS].bytes)
        local = self._blobs.local
        try:
            async with local(blobs[WEIGHTS].sha256) as weights, local(blobs[DESCRIPTION].sha256) as description:
                return await asyncio.to_thread(self._packed, weights, description, form)
        except (FileNotFoundError, ValidationError, NotTensors, KeyError, zipfile.LargeZipFile) as exc:
            raise errors.NotFound(
                "the model's files are not whole on this relay: train it again", param="model"
            ) from exc

    def _packed(self, weights: Path, description: Path, form: sd_lora.Format | None) -> Export:
        out = self._blobs.scratch()
        try:
            with weights.open("rb") as file:
                meta = Description.model_validate_json(description.read_bytes()).meta
                if meta.family == "sd":
                    tensors, told = sd_lora.exported(meta, TensorFile(file), form or "diffusers")
                    tensor_file.write(out.write, tensors, told)
                elif form:
                    raise errors.InvalidRequest("format: is of models that make pictures: leave it out", param="format")
                else:
                    zips.write(out, *peft.exported(meta, TensorFile(file)))
        except BaseException:
            out.close()
            raise
        return Export(out, "application/octet-stream" if meta.family == "sd" else "application/zip")


def _of_numbers(key: str, tensor: Shaped) -> Shaped:
    def read() -> Piece:
        piece = tensor.read()
        if not piece.finite:
            raise CannotImport(f"{key[:200]} has values that are no finite numbers: the training that made it diverged")
        return piece

    return Shaped(tensor.dtype, tensor.shape, read)


def base_tensors(answers: Sequence[dict[str, Any]]) -> BaseTensors:
    """From what a gpu answers to GET /v1/models/{id}/layers, once for each component of the model.

    Raises GpuUnreachable for what is no such answer.
    """
    try:
        tensors = [
            tensor
            for told in answers
            for tensor in [*told["outside"], *(tensor for layer in told["layers"] for tensor in layer["tensors"])]
        ]
        return BaseTensors(
            family=answers[0]["family"],
            tied=answers[0]["tied"],
            shapes={tensor["name"]: tuple(tensor["shape"]) for tensor in tensors},
            linear=frozenset(tensor["name"] for tensor in tensors if tensor["linear"]),
        )
    except (KeyError, TypeError) as exc:
        raise errors.GpuUnreachable("the gpu that has this model runs an older version: update it") from exc
