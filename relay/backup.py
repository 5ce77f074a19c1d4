"""The whole relay as one tar: a view of the database at one moment, the blobs that it names, and the two secrets.

Made while the relay runs, which waits only for as long as the blobs are linked; what is removed later stays in the
links. Restored beside what is there, checked, and then put in its place. SQLite only; PostgreSQL has tools of its own.
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
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sqlalchemy import make_url

from relay import errors, migrate
from relay.blobs import Blobs
from relay.refs import all_named
from relay.settings import Settings
from relay.store import Store

FORMAT = 1
MANIFEST = "manifest.json"
DATABASE = "relay.db"
BLOB = re.compile(r"blobs/([0-9a-f]{64})")
MAX_MANIFEST_BYTES = 2**28
AT_ONCE_BYTES = 2**20


class BadBackup(errors.RelayError):
    """Met by whoever runs the command, never by a caller."""


@dataclass(frozen=True)
class Made:
    blobs: int
    bytes: int
    secrets: list[str]
    left_out: list[str]  # blobs that are lost or damaged in the relay itself


def make(settings: Settings, target: Path) -> Made:
    """The target is there whole or not at all, for its owner only. Raises BadBackup, OSError."""
    source = _sqlite_file(settings)
    if not source.is_file():
        raise BadBackup(f"there is no database at {source}: nothing to back up")
    if target.exists():
        raise BadBackup(f"{target} is there already: name another file, or remove it")
    with _staging(settings.data_dir) as staging, closing(sqlite3.connect(source)) as view:
        _check_revision(view, must_be_last=True)
        left_out = asyncio.run(_freeze(settings, view, staging))
        copy = staging / DATABASE
        with closing(sqlite3.connect(copy)) as new:
            view.backup(new)
        found = {DATABASE: copy}
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
        manifest = {"format": FORMAT, "made_at": time.time(), "files": listed, "left_out": sorted(left_out)}
        size_bytes = _write_tar(target, json.dumps(manifest).encode(), found)
    kept = [name for name in found if "/" not in name and name != DATABASE]
    return Made(len(found) - len(kept) - 1, size_bytes, kept, sorted(left_out))


async def _freeze(settings: Settings, view: sqlite3.Connection, staging: Path) -> list[str]:
    """Begins the view and links its blobs, with writers kept out: blobs go only inside a write. Those not there."""
    blobs, store = Blobs(settings.data_dir / "blobs"), Store(settings.database)
    missing: list[str] = []
    try:
        async with store.write() as db:
            view.isolation_level = None
            view.execute("BEGIN")
            view.execute("SELECT count(*) FROM alembic_version").fetchone()  # from here on it sees no change
            for sha256 in await all_named(db):
                try:
                    os.link(blobs.path(sha256), staging / "blobs" / sha256)
                except FileNotFoundError:
                    missing.append(sha256)
    finally:
        await store.close()
    return missing


def restore(settings: Settings, source: Path, replace: bool) -> Path | None:
    """Where what was there before lies now, if anything was. Raises BadBackup, NewerDatabase, OSError."""
    folder = settings.data_dir.absolute()
    if settings.database_url:
        raise BadBackup("a backup is restored as SQLite in the data folder: unset RELAY_DATABASE_URL first")
    if folder.is_symlink() or folder.is_mount():
        raise BadBackup(f"{folder} is a link or a mount: set RELAY_DATA_DIR to a folder of its own, perhaps inside it")
    taken = folder.exists() and any(folder.iterdir())
    if taken and not replace:
        raise BadBackup(f"{folder} is not empty: --replace moves what is there aside")
    if _is_running(folder):
        raise BadBackup(f"a relay is running in {folder}: stop it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.restoring-{secrets.token_hex(4)}")
    staging.mkdir(mode=0o700)
    try:
        _unpack(source, staging)
        with closing(sqlite3.connect(staging / DATABASE)) as db:
            _check_database(db)
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        before = None
        if taken:
            before = folder.with_name(f"{folder.name}.before-restore-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
            if before.exists():
                raise BadBackup(f"{before} is there already: try again in a second")
            folder.rename(before)
        staging.rename(folder)  # over nothing, or over an empty folder
        _sync(folder.parent)
        return before
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unpack(source: Path, folder: Path) -> None:
    """Only names that we know, each once, each with the content that the manifest tells."""
    try:
        with tarfile.open(source, "r:") as tar:
            listed = _manifest(tar)
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
    except (tarfile.TarError, EOFError) as exc:
        raise BadBackup(f"{source} is no whole backup of a relay ({exc}); nothing was changed") from exc


def _manifest(tar: tarfile.TarFile) -> dict[str, Any]:
    first = tar.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > MAX_MANIFEST_BYTES:
        raise BadBackup("this is no backup of a relay: it does not begin with its manifest")
    content = tar.extractfile(first)
    assert content
    try:
        manifest = json.load(content)
        if manifest["format"] != FORMAT:
            raise BadBackup(f"this backup has format {manifest['format']!r}, and this relay reads {FORMAT}: update it")
        files: dict[str, Any] = manifest["files"]
        for name, file in files.items():
            blob = BLOB.fullmatch(name)
            if not blob and name not in (DATABASE, "admin.key", "enrol.token"):
                raise BadBackup(f"the backup's manifest names {name!r}, which no relay has; nothing was changed")
            if not (isinstance(file["bytes"], int) and file["bytes"] >= 0 and isinstance(file["sha256"], str)):
                raise ValueError(name)
            if blob and blob[1] != file["sha256"]:
                raise ValueError(name)
        files[DATABASE]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadBackup("the backup's manifest can't be read; nothing was changed") from exc
    return files


def _place(folder: Path, name: str) -> Path:
    blob = BLOB.fullmatch(name)
    path = Blobs(folder / "blobs").path(blob[1]) if blob else folder / name
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _check_database(db: sqlite3.Connection) -> None:
    try:
        _check_revision(db)
        found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as exc:
        raise BadBackup(f"the backup's database can't be read ({exc}); nothing was changed") from exc
    if found != "ok":
        raise BadBackup(f"the backup's database is damaged ({found}); nothing was changed")


def _check_revision(db: sqlite3.Connection, must_be_last: bool = False) -> None:
    """Raises NewerDatabase, BadBackup."""
    known = migrate.revisions()
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
        raise BadBackup("the database is of a relay from before revisions: start this version on it once")
    at = db.execute("SELECT version_num FROM alembic_version").fetchone()[0]
    if at not in known:
        raise errors.NewerDatabase(
            f"the database is at revision {at}, and this version of the relay knows none after {known[-1]}: "
            "use the later version"
        )
    if must_be_last and at != known[-1]:
        raise BadBackup(f"the database is at revision {at}, of an earlier version: back it up with that one")


def _sqlite_file(settings: Settings) -> Path:
    url = make_url(settings.database)
    if url.get_backend_name() != "sqlite" or not url.database:
        raise BadBackup("only SQLite is backed up here: use pg_dump first, and copy the folder blobs after it")
    return Path(url.database)


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


def _write_tar(target: Path, manifest: bytes, files: dict[str, Path]) -> int:
    part = target.with_name(f".{target.name}.part-{secrets.token_hex(4)}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
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
