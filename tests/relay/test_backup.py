"""A backup of a relay that runs, and what a restore takes and refuses."""

import fcntl
import hashlib
import io
import json
import os
import signal
import sqlite3
import stat
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from relay.backup import MANIFEST
from tests.postgres import Postgres
from tests.relay.conftest import CHAT_ROW
from tests.relay.processes import RelayProcess, run


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[RelayProcess]:
    process = RelayProcess(tmp_path / "data")
    await process.start()
    yield process
    await process.stop()


def client(process: RelayProcess) -> httpx2.AsyncClient:
    key = {"authorization": f"Bearer {process.secret('admin.key')}"}
    return httpx2.AsyncClient(base_url=process.url, headers=key, trust_env=False, verify=False)


async def upload(process: RelayProcess, content: str = CHAT_ROW) -> str:
    async with client(process) as http:
        file = ("a.jsonl", content.encode())
        response = await http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": file})
        return str(response.raise_for_status().json()["id"])


async def content(process: RelayProcess, file: str) -> str:
    async with client(process) as http:
        return (await http.get(f"/v1/files/{file}/content")).raise_for_status().text


async def backup(process: RelayProcess, target: Path) -> tuple[int, str, str]:
    return await run(process.folder, "-m", "relay", "backup", str(target))


async def restore(folder: Path, source: Path, *more: str, **changes: str) -> tuple[int, str, str]:
    return await run(folder, "-m", "relay", "restore", str(source), *more, **changes)


async def test_a_running_relay_is_backed_up_and_lives_on_elsewhere_with_the_same_key_and_file(
    process: RelayProcess, tmp_path: Path
) -> None:
    file, saved = await upload(process), tmp_path / "saved.tar"
    left, under_way = tmp_path / ".older.tar.part-0a1b2c3d", tmp_path / ".another.tar.part-0a1b2c3d"
    left.touch()
    with under_way.open("w") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        status, out, err = await backup(process, saved)
    assert (status, err, left.exists(), under_way.exists()) == (0, "", False, True)
    under_way.unlink()
    assert "admin.key and enrol.token too" in out
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    later = await upload(process, CHAT_ROW * 2)
    status, _, err = await backup(process, saved)
    assert (status, "is there already" in err) == (2, True)
    assert not (process.folder / ".backup").exists()
    assert sorted(os.listdir(tmp_path)) == ["data", "saved.tar"]

    moved = RelayProcess(tmp_path / "elsewhere")
    status, _, err = await restore(moved.folder, saved)
    assert (status, err) == (0, "")
    assert moved.secret("admin.key") == process.secret("admin.key")
    assert stat.S_IMODE(moved.folder.stat().st_mode) == 0o700
    await moved.start()
    try:
        assert await content(moved, file) == CHAT_ROW
        async with client(moved) as http:
            assert (await http.get(f"/v1/files/{later}")).status_code == 404
    finally:
        await moved.stop()
    assert await content(process, later) == CHAT_ROW * 2


async def test_a_restore_replaces_only_what_it_is_told_to_and_no_running_relay(
    process: RelayProcess, tmp_path: Path
) -> None:
    file, saved = await upload(process), tmp_path / "saved.tar"
    assert (await backup(process, saved))[0] == 0
    later = await upload(process, CHAT_ROW * 2)
    status, _, err = await restore(process.folder, saved)
    assert (status, "--replace" in err) == (2, True)
    status, _, err = await restore(process.folder, saved, "--replace")
    assert (status, "stop it first" in err) == (2, True)
    await process.stop()

    status, out, err = await restore(process.folder, saved, "--replace")
    assert (status, err) == (0, "")
    (before,) = (tmp_path / name for name in os.listdir(tmp_path) if name.startswith("data.before-restore-"))
    assert str(before) in out
    await process.start()
    assert await content(process, file) == CHAT_ROW
    async with client(process) as http:
        assert (await http.get(f"/v1/files/{later}")).status_code == 404
    with closing(sqlite3.connect(before / "relay.db")) as db:
        assert db.execute("SELECT count(*) FROM files").fetchone() == (2,)


async def test_a_damaged_blob_is_told_and_the_rest_is_saved(process: RelayProcess, tmp_path: Path) -> None:
    file, damaged = await upload(process), await upload(process, CHAT_ROW * 2)
    with closing(sqlite3.connect(process.folder / "relay.db")) as db:
        (sha256,) = db.execute("SELECT sha256 FROM files WHERE id = ?", (damaged,)).fetchone()
    (process.folder / "blobs" / sha256[:2] / sha256).write_bytes(b"rotten")
    status, _, err = await backup(process, tmp_path / "saved.tar")
    assert (status, sha256 in err) == (1, True)
    moved = RelayProcess(tmp_path / "elsewhere")
    assert (await restore(moved.folder, tmp_path / "saved.tar"))[0] == 0
    await moved.start()
    assert await content(moved, file) == CHAT_ROW
    await moved.stop()


Files = dict[str, bytes]


def climbs_out(files: Files, manifest: dict[str, Any]) -> None:
    files["../outside"] = files["admin.key"]
    manifest["files"]["../outside"] = manifest["files"]["admin.key"]


def adds_what_is_not_listed(files: Files, _: dict[str, Any]) -> None:
    files["blobs/../../outside"] = b"x"


def damages_a_blob(files: Files, _: dict[str, Any]) -> None:
    name = next(name for name in files if name.startswith("blobs/"))
    files[name] = files[name][:-1] + b"x"


def loses_a_blob(files: Files, _: dict[str, Any]) -> None:
    del files[next(name for name in files if name.startswith("blobs/"))]


def is_of_a_later_format(_: Files, manifest: dict[str, Any]) -> None:
    manifest["format"] = 2


def is_no_manifest(_: Files, manifest: dict[str, Any]) -> None:
    del manifest["files"]["relay.db"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (climbs_out, "which no relay has"),
        (adds_what_is_not_listed, "not what its manifest tells"),
        (damages_a_blob, "is damaged"),
        (loses_a_blob, "lacks"),
        (is_of_a_later_format, "has format 2"),
        (is_no_manifest, "can't be read"),
        (None, "no whole backup"),
    ],
)
async def test_a_backup_that_is_not_right_changes_nothing(
    tmp_path: Path, saved: bytes, change: Callable[[Files, dict[str, Any]], None] | None, told: str
) -> None:
    source, folder = tmp_path / "saved.tar", tmp_path / "place" / "data"
    source.write_bytes(changed(saved, change) if change else saved[: len(saved) // 3])
    folder.mkdir(parents=True)
    (folder / "mine").write_text("stays")
    status, _, err = await restore(folder, source, "--replace")
    assert (status, err.count("\n")) == (2, 1)
    assert told in err
    assert os.listdir(folder.parent) == ["data"]
    assert (folder / "mine").read_text() == "stays"
    assert not (folder.parent / "outside").exists()
    assert not (tmp_path / "outside").exists()


async def test_a_link_in_a_backup_is_refused(tmp_path: Path, saved: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(saved)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old.getmembers():
            if member.name == "admin.key":
                link = tarfile.TarInfo("admin.key")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                new.addfile(link)
            else:
                new.addfile(member, old.extractfile(member))
    (tmp_path / "saved.tar").write_bytes(out.getvalue())
    status, _, err = await restore(tmp_path / "place", tmp_path / "saved.tar")
    assert (status, "not what its manifest tells" in err) == (2, True)
    assert not (tmp_path / "place").exists()


async def test_a_backup_of_a_later_schema_is_refused(process: RelayProcess, tmp_path: Path) -> None:
    await process.stop()
    with closing(sqlite3.connect(process.folder / "relay.db")) as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
        db.commit()
    status, _, err = await backup(process, tmp_path / "saved.tar")
    assert (status, "revision 9999" in err) == (2, True)
    assert not (tmp_path / "saved.tar").exists()


@pytest.fixture
async def saved(process: RelayProcess, tmp_path: Path) -> bytes:
    await upload(process)
    assert (await backup(process, tmp_path / "good.tar"))[0] == 0
    return (tmp_path / "good.tar").read_bytes()


def changed(saved: bytes, change: Callable[[Files, dict[str, Any]], None]) -> bytes:
    files: Files = {}
    with tarfile.open(fileobj=io.BytesIO(saved)) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content
            files[member.name] = content.read()
    manifest = json.loads(files.pop(MANIFEST))
    change(files, manifest)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in {MANIFEST: json.dumps(manifest).encode(), **files}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


# --- with PostgreSQL ---


@pytest.fixture
async def served(tmp_path: Path, postgres: Postgres) -> AsyncIterator[RelayProcess]:
    name = postgres.new()
    process = RelayProcess(tmp_path / "served", RELAY_DATABASE_URL=postgres.url(name))
    await process.start()
    yield process
    await process.stop()
    postgres.drop(name)


async def saved_from(process: RelayProcess, target: Path, **changes: str) -> tuple[int, str, str]:
    return await run(process.folder, "-m", "relay", "backup", str(target), **(process.changes | changes))


async def test_a_relay_on_postgresql_is_backed_up_while_it_runs_and_lives_on_elsewhere(
    served: RelayProcess, tmp_path: Path, postgres: Postgres
) -> None:
    file, saved = await upload(served), tmp_path / "saved.tar"
    status, out, err = await saved_from(served, saved)
    assert (status, err) == (0, "")
    assert "1 blobs" in out
    later = await upload(served, CHAT_ROW * 2)
    with tarfile.open(saved) as tar:
        assert {"manifest.json", "relay.pgdump", "admin.key", "enrol.token"} <= set(tar.getnames())

    name = postgres.new(empty=True)
    moved = RelayProcess(tmp_path / "elsewhere", RELAY_DATABASE_URL=postgres.url(name))
    status, _, err = await restore(moved.folder, saved, **moved.changes)
    assert (status, err) == (0, "")
    await moved.start()
    try:
        assert await content(moved, file) == CHAT_ROW
        async with client(moved) as http:
            assert (await http.get(f"/v1/files/{later}")).status_code == 404
        assert await upload(moved, CHAT_ROW * 3)
    finally:
        await moved.stop()
        postgres.drop(name)
    assert await content(served, later) == CHAT_ROW * 2


async def test_a_restore_into_postgresql_moves_aside_what_is_there_and_touches_no_running_relay(
    served: RelayProcess, tmp_path: Path, postgres: Postgres
) -> None:
    file, saved = await upload(served), tmp_path / "saved.tar"
    assert (await saved_from(served, saved))[0] == 0
    later = await upload(served, CHAT_ROW * 2)
    url = served.changes["RELAY_DATABASE_URL"]
    elsewhere = tmp_path / "elsewhere"
    status, _, err = await restore(elsewhere, saved, RELAY_DATABASE_URL=url)
    assert (status, "not empty" in err) == (2, True)
    status, _, err = await restore(elsewhere, saved, "--replace", RELAY_DATABASE_URL=url)
    assert (status, "stop it first" in err) == (2, True)
    await served.stop(signal.SIGTERM)

    status, out, err = await restore(served.folder, saved, "--replace", RELAY_DATABASE_URL=url)
    assert (status, err) == (0, "")
    assert "the schema before_restore_" in out
    await served.start()
    assert await content(served, file) == CHAT_ROW
    async with client(served) as http:
        assert (await http.get(f"/v1/files/{later}")).status_code == 404
    again = tmp_path / "again.tar"
    assert (await saved_from(served, again))[0] == 0  # and what lies aside is not in it
    name = postgres.new(empty=True)
    assert (await restore(elsewhere, again, RELAY_DATABASE_URL=postgres.url(name)))[0] == 0
    schemas = postgres.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'before%'", database=name)
    assert schemas == []
    postgres.drop(name)


async def test_a_restore_into_postgresql_that_fails_leaves_what_was_there(
    served: RelayProcess, tmp_path: Path, postgres: Postgres
) -> None:
    file, saved = await upload(served), tmp_path / "saved.tar"
    assert (await saved_from(served, saved))[0] == 0
    await served.stop(signal.SIGTERM)
    spoiled = rewritten(saved, tmp_path / "spoiled.tar", "relay.pgdump", lambda dump: dump[: len(dump) // 2])
    status, _, err = await restore(served.folder, spoiled, "--replace", **served.changes)
    assert (status, "pg_restore failed" in err) == (2, True)
    await served.start()
    assert await content(served, file) == CHAT_ROW


def rewritten(source: Path, target: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """With another content of one file, and a manifest that says so."""
    with tarfile.open(source) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    files[name] = change(files[name])
    manifest = json.loads(files.pop(MANIFEST))
    manifest["files"][name] = {"sha256": hashlib.sha256(files[name]).hexdigest(), "bytes": len(files[name])}
    with tarfile.open(target, "w") as tar:
        for of, content in {MANIFEST: json.dumps(manifest).encode(), **files}.items():
            entry = tarfile.TarInfo(of)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return target


async def test_a_backup_goes_to_the_kind_of_database_that_it_came_from(
    process: RelayProcess, served: RelayProcess, tmp_path: Path, postgres: Postgres
) -> None:
    assert (await backup(process, tmp_path / "lite.tar"))[0] == 0
    assert (await saved_from(served, tmp_path / "server.tar"))[0] == 0
    name = postgres.new(empty=True)
    status, _, err = await restore(tmp_path / "new", tmp_path / "lite.tar", RELAY_DATABASE_URL=postgres.url(name))
    assert (status, "of a relay on SQLite" in err) == (2, True)
    status, _, err = await restore(tmp_path / "new", tmp_path / "server.tar")
    assert (status, "of a relay on PostgreSQL" in err) == (2, True)
    assert not (tmp_path / "new").exists()
    postgres.drop(name)


async def test_without_postgresqls_programs_a_backup_says_what_to_install(served: RelayProcess, tmp_path: Path) -> None:
    status, _, err = await saved_from(served, tmp_path / "saved.tar", PATH=str(tmp_path))
    assert status == 2
    assert "pg_dump is not on the PATH" in err
    assert len(err.splitlines()) == 1
