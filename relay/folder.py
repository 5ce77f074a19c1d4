"""A data folder and a database belong together: blobs that the database does not name are swept away.

So both hold the id of the pair, and a relay that finds two that differ does not start. Knows nothing of what they hold.
"""

import fcntl
import os
import secrets
import time
from pathlib import Path
from typing import IO

from sqlalchemy import insert, select

from relay import errors
from relay.blobs import Blobs
from relay.settings import BadSetting
from relay.store import Store
from relay.tables import blob_refs, folders, users

FILE, LOCK = "database.id", "relay.lock"
ENDS_WITHIN_S = 3.0  # a relay that has been told to stop
NOT_MOUNTED = "lacks the blobs that the database names: is it mounted"
ANOTHERS = "holds blobs, and the database is new: is RELAY_DATA_DIR that of another relay"


async def check(store: Store, blobs: Blobs, data_dir: Path) -> None:
    """Ties the two together at the first start. Raises WrongFolder."""
    file = data_dir / FILE
    here = file.read_text().strip() if file.exists() else None
    async with store.write() as db:
        there: str | None = (await db.execute(select(folders.c.id))).scalar_one_or_none()
        is_new = (await db.execute(select(users.c.id).limit(1))).first() is None
        names = (await db.execute(select(blob_refs.c.sha256).limit(1))).first() is not None
        older = there is None and not is_new and not store.is_shared  # a copy from before there were pairs, put back
        if here and here != there and not older:
            raise errors.WrongFolder(
                f"{data_dir} belongs to another database than RELAY_DATABASE_URL names: set it back, or name another "
                f"RELAY_DATA_DIR. Where that database is gone for good, remove {file} and {data_dir / 'blobs'}"
            )
        could_differ = not here and store.is_shared and blobs.on_this_disk  # SQLite's lies in the folder
        if could_differ and names != await blobs.has_any():
            raise errors.WrongFolder(f"{data_dir} {NOT_MOUNTED if names else ANOTHERS}?")
        if there is None:
            there = here or f"pair-{secrets.token_hex(12)}"
            await db.execute(insert(folders).values(id=there))
        await blobs.claim(there, named=names)
    if not here:
        tie(data_dir, there)


def tie(data_dir: Path, pair: str) -> None:
    """The folder is that pair's from here on."""
    file = data_dir / FILE
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(pair + "\n")
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)  # by whichever process: it is the same


def hold(data_dir: Path, *, shared: bool) -> IO[bytes]:
    """While this file is open, no process may use the folder otherwise: alone, or side by side. Raises BadSetting."""
    lock, until = (data_dir / LOCK).open("wb"), time.monotonic() + ENDS_WITHIN_S
    while True:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.1)
                continue
            lock.close()
            raise BadSetting(
                f"another relay runs in {data_dir}, and on SQLite there can be one: stop it, or name another "
                "RELAY_DATA_DIR; several side by side take PostgreSQL (docs/operations/postgresql.md)"
            ) from None
        return lock
