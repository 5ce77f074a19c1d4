"""Tuned models that come and go as peft's files: an import is a model like any other, an export a zip.

Knows nothing of HTTP, and no tensor's values.
"""

import asyncio
import secrets
import zipfile
from dataclasses import dataclass
from typing import IO, Any

from pydantic import ValidationError
from sqlalchemy import insert

import wire
from adapter import DESCRIPTION, WEIGHTS, AdapterMeta, Description
from relay import errors, peft, peft_import, refs, tensor_file, zips
from relay.blobs import Blobs, Incoming
from relay.models import Model
from relay.peft_import import BaseTensors, CannotImport, Imported
from relay.room import Room
from relay.settings import Settings
from relay.store import Clock, Store
from relay.tables import models
from relay.tensor_file import NotTensors, TensorFile

ID_HEX = 12  # as that of a model that a job made


@dataclass(frozen=True)
class Target:
    """What an imported adapter becomes."""

    base: Model
    tensors: BaseTensors
    suffix: str | None


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
            model_id = f"ft:{target.base.id}:{target.suffix or 'imported'}:{secrets.token_hex(ID_HEX // 2)}"
            async with self._store.write() as db:
                await refs.hold(db)
                await self._room.check(db, owner, sum(ref.bytes for ref in files), "the adapter")
                for incoming in (weights, description):
                    await self._blobs.keep(incoming)
                row = {"id": model_id, "owner": owner, "base_model": target.base.id, "created_at": self._clock()}
                await db.execute(insert(models).values(**row, adapter=manifest.model_dump()))
                await refs.name(db, "model", model_id, owner, refs.sizes(files))
        return model_id

    def _convert(self, archive: Incoming, to: Incoming, base: BaseTensors) -> Imported:
        with zips.opened(archive.path) as opened, self._blobs.scratch() as file:
            found = zips.find(opened)
            config = peft_import.read_config(zips.config_of(opened, found))
            self._blobs.check_room(2 * found.weights.file_size)
            zips.copy(opened, found.weights, file, self._settings.max_upload_bytes)
            try:
                result = peft_import.imported(config, TensorFile(file), base)
            except NotTensors as exc:
                raise CannotImport(f"{peft.WEIGHTS} is no safetensors file: {exc}") from exc
            tensor_file.write(to.put, result.pieces)
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

    async def export(self, model: wire.TunedModel) -> IO[bytes]:
        """A zip of peft's two files; whoever closes it is rid of it. Raises CannotExport, NotFound, DiskFull."""
        blobs = {ref.name: ref for ref in model.adapter.files}
        if missing := {WEIGHTS, DESCRIPTION} - blobs.keys():
            raise errors.NotFound(f"the model lacks {', '.join(sorted(missing))}", param="model")
        self._blobs.check_room(2 * blobs[WEIGHTS].bytes)
        return await asyncio.to_thread(self._packed, blobs[WEIGHTS].sha256, blobs[DESCRIPTION].sha256)

    def _packed(self, weights: str, description: str) -> IO[bytes]:
        out = self._blobs.scratch()
        try:
            with self._blobs.path(weights).open("rb") as file:
                meta = Description.model_validate_json(self._blobs.path(description).read_bytes()).meta
                zips.write(out, *peft.exported(meta, TensorFile(file)))
            out.seek(0)
        except (FileNotFoundError, ValidationError, NotTensors, KeyError, zipfile.LargeZipFile) as exc:
            out.close()
            raise errors.NotFound(
                "the model's files are not whole on this relay: train it again", param="model"
            ) from exc
        except BaseException:
            out.close()
            raise
        return out


def base_tensors(told: dict[str, Any]) -> BaseTensors:
    """From what a gpu answers to GET /v1/models/{id}/layers. Raises GpuUnreachable for what is no such answer."""
    if told.get("family") not in ("llama", "gpt2", None):
        raise CannotImport(f"adapters of the family '{told['family']}' can't be imported yet")
    try:
        tensors = [*told["outside"], *(tensor for layer in told["layers"] for tensor in layer["tensors"])]
        return BaseTensors(
            family=told["family"],
            tied=told["tied"],
            shapes={tensor["name"]: tuple(tensor["shape"]) for tensor in tensors},
            linear=frozenset(tensor["name"] for tensor in tensors if tensor["linear"]),
        )
    except (KeyError, TypeError) as exc:
        raise errors.GpuUnreachable("the gpu that has this model runs an older version: update it") from exc
