"""The whole relay as one tar: a view of the database at one moment, the blobs that it names, and the two secrets.

With a bucket, the blobs stay there, and the tar has the list of them. Made while the relay runs, which waits only for
as long as the blobs are linked; what is removed later stays in the links. Restored beside what is there, checked, and
then put in its place. dump.py does PostgreSQL's part.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sqlalchemy import make_url

from relay import dump
from relay.blobs import FolderBlobs
from relay.bucket import BucketBlobs
from relay.dump import BadBackup, check_revision
from relay.folder import tie
from relay.refs import all_named
from relay.settings import Settings
from relay.storage import blobs_of, folder_of
from relay.store import Store

FORMAT = 1
MANIFEST = "manifest.json"
DATABASE, DUMP = "relay.db", "relay.pgdump"  # one of the two
BLOB = re.compile(r"blobs/([0-9a-f]{64})")
MAX_MANIFEST_BYTES = 2**28
OF_POSTGRESQL = "this backup is of a relay on PostgreSQL: name an empty database in RELAY_DATABASE_URL"
OF_SQLITE = "this backup is of a relay on SQLite: unset RELAY_DATABASE_URL first"
AT_ONCE_BYTES = 2**20


@dataclass(frozen=True)
class Made:
    blobs: int
    bytes: int
    secrets: list[str]
    left_out: list[str]  # blobs that are lost or damaged in the relay itself
    in_bucket: int  # blobs that are listed, not held


def make(settings: Settings, target: Path) -> Made:
    """The target is there whole or not at all, for its owner only. Raises BadBackup, OSError."""
    if target.exists():
        raise BadBackup(f"{target} is there already: name another file, or remove it")
    with _staging(settings.data_dir) as staging:
        copy, revision, left_out, in_bucket = _copied(settings, staging)
        found = {copy.name: copy}
        for file in (settings.admin_key_file, settings.enrol_token_file):
            if file.is_file():
                found[file.name] = file
        listed = {name: _described(path) for name, path in found.items()}
        for link in sorted(staging.glob("blobs/*")):
            described = _described(link)
            if described["sha256"] == link.name:
                found[f"blobs/{link.name}"], listed[f"blobs/{link.name}"] = link, described
            else:
                left_out.append(link.name)
        said = {"format": FORMAT, "made_at": time.time(), "revision": revision, "left_out": sorted(left_out)}
        manifest = {**said, "files": listed} | ({"in_bucket": in_bucket} if settings.blobs_url else {})
        size_bytes = _write_tar(target, json.dumps(manifest).encode(), found)
    kept = [name for name in found if "/" not in name and name != copy.name]
    return Made(len(found) - len(kept) - 1, size_bytes, kept, sorted(left_out), len(in_bucket))


def _copied(settings: Settings, staging: Path) -> tuple[Path, str, list[str], list[str]]:
    """The database in a file, its revision, and the blobs that it names and lacks; the others are linked, or those in
    the bucket."""
    named: list[str] = []
    blobs = FolderBlobs(folder_of(settings))

    def link(shas: Collection[str]) -> list[str]:
        missing: list[str] = []
        if settings.blobs_url:
            named.extend(shas)
            return missing
        for sha256 in shas:
            try:
                os.link(blobs.path(sha256), staging / "blobs" / sha256)
            except FileNotFoundError:
                missing.append(sha256)
        return missing

    if settings.database.startswith("postgresql"):
        revision, missing = asyncio.run(dump.save(settings, staging / DUMP, link))
        return staging / DUMP, revision, *_found(settings, named, missing)
    source = make_url(settings.database).database
    if not source or not Path(source).is_file():
        raise BadBackup(f"there is no database at {source}: nothing to back up")
    with closing(sqlite3.connect(source)) as view:
        revision = check_revision(_revision(view), must_be_last=True)
        missing = asyncio.run(_freeze(settings, view, link))
        with closing(sqlite3.connect(staging / DATABASE)) as new:
            view.backup(new)
    return staging / DATABASE, revision, *_found(settings, named, missing)


def _found(settings: Settings, named: Collection[str], missing: list[str]) -> tuple[list[str], list[str]]:
    """Of what is in a bucket: the blobs that are not there, and those that are."""
    if not settings.blobs_url:
        return missing, []
    blobs = blobs_of(settings)
    assert isinstance(blobs, BucketBlobs), "a bucket is named"
    there = asyncio.run(blobs.there())
    return sorted(set(named) - there), sorted(set(named) & there)


async def _freeze(
    settings: Settings, view: sqlite3.Connection, link: Callable[[Collection[str]], list[str]]
) -> list[str]:
    """Begins the view and links its blobs, with writers kept out: blobs go only inside a write. Those not there."""
    store = Store(settings.database)
    try:
        async with store.write() as db:
            view.isolation_level = None
            view.execute("BEGIN")
            view.execute("SELECT count(*) FROM alembic_version").fetchone()  # from here on it sees no change
            return link(await all_named(db))
    finally:
        await store.close()


def restore(settings: Settings, source: Path, replace: bool) -> tuple[list[str], list[str]]:
    """Where what was there before lies now, if anything was; and what the bucket lacks.

    Raises BadBackup, NewerDatabase, OSError.
    """
    home, on_server = settings.data_dir.absolute(), settings.database.startswith("postgresql")
    if settings.database_url and not on_server:
        raise BadBackup("a backup is restored as SQLite in the data folder: unset RELAY_DATABASE_URL first")
    if home.is_symlink() or home.is_mount():
        raise BadBackup(f"{home} is a link or a mount: set RELAY_DATA_DIR to a folder of its own, perhaps inside it")
    taken = home.exists() and any(home.iterdir())
    if taken and not replace:
        raise BadBackup(f"{home} is not empty: --replace moves what is there aside")
    if _is_running(home):
        raise BadBackup(f"a relay is running in {home}: stop it first")
    if on_server:
        asyncio.run(dump.check_room(settings, replace=replace))
    home.parent.mkdir(parents=True, exist_ok=True)
    staging = home.with_name(f".{home.name}.restoring-{secrets.token_hex(4)}")
    staging.mkdir(mode=0o700)
    try:
        manifest = _unpack(source, staging, DUMP if on_server else DATABASE)
        missing = _missing(settings, manifest)
        before: list[str] = []
        if on_server:
            check_revision(manifest.get("revision"))
            before += _load(settings, staging, replace)
        else:
            _check_database(staging / DATABASE)
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        if taken:
            aside = home.with_name(f"{home.name}.before-restore-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
            if aside.exists():
                raise BadBackup(f"{aside} is there already: try again in a second")
            home.rename(aside)
            before.append(str(aside))
        staging.rename(home)  # over nothing, or over an empty folder
        _sync(home.parent)
        return before, missing
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _missing(settings: Settings, manifest: dict[str, Any]) -> list[str]:
    """Of the blobs that the backup has in a bucket. Raises BadBackup, StorageUnavailable."""
    listed = manifest.get("in_bucket")
    if listed is not None and not settings.blobs_url:
        raise BadBackup("the blobs of this backup are in a bucket: name it in RELAY_BLOBS_URL; nothing was changed")
    if listed is None and settings.blobs_url:
        raise BadBackup(
            "this backup holds its blobs: unset RELAY_BLOBS_URL, restore it, and then `python -m relay blobs copy`; "
            "nothing was changed"
        )
    return _found(settings, listed, [])[0] if listed is not None else []


def _load(settings: Settings, staging: Path, replace: bool) -> list[str]:
    schema, pair = asyncio.run(dump.load(settings, staging / DUMP, replace=replace))
    (staging / DUMP).unlink()
    if pair:
        tie(staging, pair)
    return [f"the schema {schema} of the database"] if schema else []


def _unpack(source: Path, folder: Path, database: str) -> dict[str, Any]:
    """Only names that we know, each once, each with the content that the manifest tells, which it returns."""
    try:
        with tarfile.open(source, "r:") as tar:
            manifest = _manifest(tar)
            listed = dict(manifest["files"])
            if database not in listed:
                raise BadBackup(OF_POSTGRESQL if DUMP in listed else OF_SQLITE)
            needed_bytes = sum(file["bytes"] for file in listed.values())
            if needed_bytes > shutil.disk_usage(folder).free:
                raise BadBackup(f"the backup needs {needed_bytes:,} bytes, which the disk does not have free")
            for member in tar:
                if member.name == MANIFEST:
                    continue
                wanted = listed.pop(member.name, None)
                if wanted is None or not member.isreg() or member.size != wanted["bytes"]:
                    raise BadBackup(
                        f"{member.name!r} in the backup is not what its manifest tells; nothing was changed"
                    )
                content = tar.extractfile(member)
                assert content
                if _copy(content, _place(folder, member.name)) != wanted["sha256"]:
                    raise BadBackup(f"{member.name!r} in the backup is damaged; nothing was changed")
            if listed:
                raise BadBackup(f"the backup lacks {min(listed)!r}: it is not whole; nothing was changed")
            return manifest
    except (tarfile.TarError, EOFError) as exc:
        raise BadBackup(f"{source} is no whole backup of a relay ({exc}); nothing was changed") from exc


def _manifest(tar: tarfile.TarFile) -> dict[str, Any]:
    first = tar.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > MAX_MANIFEST_BYTES:
        raise BadBackup("this is no backup of a relay: it does not begin with its manifest")
    content = tar.extractfile(first)
    assert content
    try:
        manifest: dict[str, Any] = json.load(content)
        if manifest["format"] != FORMAT:
            raise BadBackup(f"this backup has format {manifest['format']!r}, and this relay reads {FORMAT}: update it")
        files: dict[str, Any] = manifest["files"]
        for name, file in files.items():
            blob = BLOB.fullmatch(name)
            if not blob and name not in (DATABASE, DUMP, "admin.key", "enrol.token"):
                raise BadBackup(f"the backup's manifest names {name!r}, which no relay has; nothing was changed")
            if not (isinstance(file["bytes"], int) and file["bytes"] >= 0 and isinstance(file["sha256"], str)):
                raise ValueError(name)
            if blob and blob[1] != file["sha256"]:
                raise ValueError(name)
        if DATABASE not in files and DUMP not in files:
            raise ValueError(DATABASE)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadBackup("the backup's manifest can't be read; nothing was changed") from exc
    return manifest


def _place(folder: Path, name: str) -> Path:
    blob = BLOB.fullmatch(name)
    path = FolderBlobs(folder / "blobs").path(blob[1]) if blob else folder / name
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _check_database(path: Path) -> None:
    """Raises NewerDatabase, BadBackup."""
    with closing(sqlite3.connect(path)) as db:
        try:
            check_revision(_revision(db))
            found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        except sqlite3.DatabaseError as exc:
            raise BadBackup(f"the backup's database can't be read ({exc}); nothing was changed") from exc
    if found != "ok":
        raise BadBackup(f"the backup's database is damaged ({found}); nothing was changed")


def _revision(db: sqlite3.Connection) -> str | None:
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
        return None
    return str(db.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def _is_running(folder: Path) -> bool:
    """A living relay holds the lock of its folder of half-written blobs."""
    for path in (folder / "blobs" / "incoming").glob("*/lock"):
        try:
            with path.open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            continue
    return False


@contextlib.contextmanager
def _staging(data_dir: Path) -> Iterator[Path]:
    """A folder on the blobs' disk. One backup at a time; what a killed one left goes."""
    with (data_dir / "backup.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadBackup("another backup is being made now: wait for it") from None
        staging = data_dir / ".backup"
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "blobs").mkdir(mode=0o700, parents=True)
        staging.chmod(0o700)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _remove_parts(folder: Path) -> None:
    """What killed backups left there, as large as a backup. One that is being written now is locked; where that is not
    possible, all stay.
    """
    for part in folder.glob(".*.part-????????"):
        with contextlib.suppress(OSError), part.open("rb") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _write_tar(target: Path, manifest: bytes, files: dict[str, Path]) -> int:
    _remove_parts(target.parent)
    part = target.with_name(f".{target.name}.part-{secrets.token_hex(4)}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            with contextlib.suppress(OSError):
                fcntl.flock(out, fcntl.LOCK_EX)
            with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
                _add(tar, MANIFEST, len(manifest), io.BytesIO(manifest))
                for name, path in files.items():
                    with path.open("rb") as content:
                        _add(tar, name, path.stat().st_size, content)
            out.flush()
            os.fsync(out.fileno())
            size_bytes = out.tell()
        part.rename(target)
        _sync(target.absolute().parent)
        return size_bytes
    finally:
        part.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, size_bytes: int, content: IO[bytes]) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size_bytes, 0o600, int(time.time())
    tar.addfile(entry, content)


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _copy(content: IO[bytes], path: Path) -> str:
    """The SHA-256 of what was written."""
    seen = hashlib.sha256()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        while chunk := content.read(AT_ONCE_BYTES):
            seen.update(chunk)
            out.write(chunk)
    return seen.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
