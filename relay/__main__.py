"""The command line: `python -m relay serve`, and a look at keys, gpus and jobs."""

import argparse
import asyncio
import contextlib
import errno
import gc
import getpass
import logging
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

import frames
import logs
from relay import backup, errors, folder, processes, safety, settings, tables
from relay.accounts import SCOPES, Accounts, Rules
from relay.app import create_app, prepare
from relay.audit import Audit
from relay.enrol_tokens import EnrolTokens
from relay.passwords import Passwords
from relay.people import People
from relay.settings import Settings
from relay.storage import blobs_of, copy_to_bucket
from relay.store import Store

KEEPALIVE_S = 75  # longer than nginx and most clients keep theirs, so that they are the first to let go
STOP_S = 1  # what is still going on after this long is cut off
BACKLOG = 2048
COLLECT_AFTER = (5_000, 5, 1_000)  # new objects; collections of the generation before
JOBS_SHOWN = 50
ENTRIES_SHOWN = 100

log = logging.getLogger("relay")


class _Server(uvicorn.Server):
    """Stops what would last as soon as the signal comes, not when its connections happen to close."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # A full collection stops every stream: for 100 ms with all modules in it, for 30 ms with what 200 streams hold.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECT_AFTER)
        log.info(self._greeting)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.force_exit = self.should_exit  # the second time, at once
        self.should_exit = True
        self.config.app.state.dispatcher.stop()  # type: ignore[union-attr]
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # cut-off requests are meant


def serve(config: Settings) -> int:
    logs.configure(
        config.log_level, config.log_format, ("relay",), told=(sqlite3.OperationalError, sqlite3.DatabaseError)
    )
    safety.check_safe(config)
    try:
        listener = _listen(config)
    except OSError as exc:
        taken = exc.errno == errno.EADDRINUSE
        reason = "is taken: stop what uses it or set RELAY_PORT" if taken else f"can't be used: {exc.strerror}"
        return _complain(f"port {config.port} on {config.host} {reason}")
    prepare(config)
    with listener, folder.hold(config.data_dir, shared=config.database.startswith("postgresql")):
        return _serve(config, listener)


def _serve(config: Settings, listener: socket.socket) -> int:
    status = asyncio.run(_with_database(config, _look, argparse.Namespace(settings=config)))
    if status:
        return status
    app = create_app(config)
    options = uvicorn.Config(
        app,
        lifespan="on",
        loop="auto",
        http="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=[str(network) for network in config.trusted_proxies],
        timeout_keep_alive=KEEPALIVE_S,
        ws_max_size=frames.MOST_BYTES,
        ws_per_message_deflate=False,
        ws_ping_interval=frames.PING_S,
        ws_ping_timeout=frames.PONG_S,
        timeout_graceful_shutdown=STOP_S,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    key = "RELAY_ADMIN_KEY" if config.admin_key else str(config.admin_key_file)
    _Server(options, f"the relay is at http://{shown}:{port}, the admin's key in {key}").run(sockets=[listener])
    return 0


def _listen(config: Settings) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a restart would wait for old connections
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


# --- the other commands: they read and write the same database, with or without a relay running ---


async def _look(_: Accounts, store: Store, args: argparse.Namespace) -> None:
    """What is wrong with database or folder is said in one line, not in a traceback."""
    blobs = blobs_of(args.settings)
    await blobs.probe()
    await folder.check(store, blobs, args.settings.data_dir)


async def _create_key(accounts: Accounts, _: Store, args: argparse.Namespace) -> None:
    expires_at = time.time() + args.expires_days * 24 * 3600 if args.expires_days else None
    scopes = tuple(scope for scope in SCOPES if scope in args.scopes)
    rules = Rules(scopes, expires_at, args.requests_per_minute, args.tokens_per_month, args.spend_per_month)
    key_id, key = await accounts.create_key(args.user, args.name, rules)
    print(f"{key_id} for user '{args.user}', shown this once:\n{key}")


async def _set_password(accounts: Accounts, store: Store, args: argparse.Namespace) -> None:
    ask = getpass.getpass if sys.stdin.isatty() else lambda _: sys.stdin.readline().rstrip("\n")
    await Passwords(store, accounts, time.time).set(args.name, ask(f"new password of '{args.name}': "))
    print(f"the password of '{args.name}' is set; sessions that were opened with an old one are over")


async def _list_keys(accounts: Accounts, _: Store, __: argparse.Namespace) -> None:
    rows = [
        (
            k.id,
            k.user,
            k.prefix + "...",
            ",".join(k.rules.scopes),
            k.rules.requests_per_minute or "-",
            _when(k.created_at),
            _when(k.last_used_at),
            _when(k.rules.expires_at),
            _when(k.revoked_at),
        )
        for k in await accounts.list_keys()
    ]
    _table(("id", "user", "key", "scopes", "a minute", "made", "last used", "expires", "revoked"), rows)


async def _revoke_key(accounts: Accounts, _: Store, args: argparse.Namespace) -> None:
    await accounts.revoke(args.id)
    print(f"{args.id} is revoked")


async def _create_token(_: Accounts, store: Store, args: argparse.Namespace) -> None:
    ends = time.time() + args.expires_days * 86400 if args.expires_days else None
    token_id, token = await EnrolTokens(store, time.time).create(args.name, reusable=args.reusable, expires_at=ends)
    print(f"{token_id}, shown this once; a gpu reads it from GPU_ENROL_TOKEN:\n{token}")


async def _list_tokens(_: Accounts, store: Store, __: argparse.Namespace) -> None:
    _table(
        ("id", "name", "token", "kind", "made", "ends", "last used", "gpus", "revoked"),
        [
            (
                t.id,
                t.name or "-",
                t.prefix + "...",
                "reusable" if t.reusable else "one-time",
                _when(t.created_at),
                _when(t.expires_at),
                _when(t.used_at),
                t.gpus,
                _when(t.revoked_at),
            )
            for t in await EnrolTokens(store, time.time).known()
        ],
    )


async def _revoke_token(_: Accounts, store: Store, args: argparse.Namespace) -> None:
    await EnrolTokens(store, time.time).revoke(args.id)
    print(f"{args.id} is revoked, and gpus that came with it are refused")


async def _show_gpus(_: Accounts, store: Store, args: argparse.Namespace) -> None:
    since = time.time() - args.settings.alive_s
    async with store.read() as db:
        rows = (await db.execute(select(tables.gpus).order_by(tables.gpus.c.last_seen_at.desc()))).all()
    _table(
        ("id", "name", "alive", "last seen", "epoch", "device", "url"),
        [
            (r.id, r.name, r.last_seen_at >= since, _when(r.last_seen_at), r.epoch, r.device["name"], r.url or "-")
            for r in rows
        ],
    )


async def _show_jobs(_: Accounts, store: Store, __: argparse.Namespace) -> None:
    t = tables.jobs
    query = select(t, tables.users.c.name).join(tables.users, tables.users.c.id == t.c.owner)
    async with store.read() as db:
        rows = (await db.execute(query.order_by(t.c.created_at.desc()).limit(JOBS_SHOWN))).all()
    _table(
        ("id", "kind", "user", "status", "model", "gpu", "attempts", "made"),
        [
            (
                r.id,
                r.kind,
                r.name,
                r.status,
                r.fine_tuned_model or r.base_model,
                r.gpu_id or "-",
                r.attempts,
                _when(r.created_at),
            )
            for r in rows
        ],
    )


def _people(accounts: Accounts, store: Store, args: argparse.Namespace) -> People:
    return People(store, blobs_of(args.settings), accounts, time.time)


async def _list_users(accounts: Accounts, store: Store, args: argparse.Namespace) -> None:
    rows = await _people(accounts, store, args).known()
    _table(
        ("id", "name", "made", "disabled", "being deleted"),
        [(r.id, r.name, _when(r.created_at), _when(r.disabled_at), _when(r.deleting_at)) for r in rows],
    )


async def _disable_user(accounts: Accounts, store: Store, args: argparse.Namespace) -> None:
    await _people(accounts, store, args).disable(args.name, on=args.disabled)
    print(f"{args.name} is {'disabled: no key, password or session is let in' if args.disabled else 'enabled'}")


async def _delete_user(accounts: Accounts, store: Store, args: argparse.Namespace) -> None:
    people = _people(accounts, store, args)
    await people.delete(args.name)
    await people.finish()
    print(f"{args.name} is deleted, with files, models, jobs and keys")


async def _show_audit(_: Accounts, store: Store, __: argparse.Namespace) -> None:
    rows, _more = await Audit(store, time.time).page(None, ENTRIES_SHOWN)
    _table(
        ("at", "who", "action", "on what", "address"),
        [(_when(r.at), r.who, r.action, r.target or "-", r.address or "-") for r in rows],
    )


def _copy_blobs(args: argparse.Namespace) -> int:
    config: Settings = args.settings
    if not config.blobs_url:
        return _complain("RELAY_BLOBS_URL names the bucket to copy to: set it first")
    prepare(config)
    with folder.hold(config.data_dir, shared=False):
        copied = asyncio.run(copy_to_bucket(config))
    print(f"{config.blobs_url} has {copied.blobs} blobs of the folder, {copied.bytes:,} bytes; they stay there too")
    if not copied.damaged:
        return 0
    print(f"these are damaged in the folder, and were not copied: {', '.join(copied.damaged)}", file=sys.stderr)
    return 1


def _backup(args: argparse.Namespace) -> int:
    made = backup.make(args.settings, args.to)
    held = f"; {' and '.join(made.secrets)} too: keep it as secret as those" if made.secrets else ""
    listed = f"the list of {made.in_bucket} blobs, which are in the bucket alone" if args.settings.blobs_url else ""
    print(f"{args.to} holds the database and {listed or f'{made.blobs} blobs'}, {made.bytes:,} bytes{held}")
    if not made.left_out:
        return 0
    print(
        f"these blobs are lost or damaged in the relay, and are not in it: {', '.join(made.left_out)}", file=sys.stderr
    )
    return 1


def _restore(args: argparse.Namespace) -> int:
    before, missing = backup.restore(args.settings, args.source, args.replace)
    print(f"{args.settings.data_dir} is as it was when {args.source} was made: start the relay")
    if before:
        print(f"what was there lies in {' and in '.join(before)}: remove it when it is no longer needed")
    if missing:
        print(f"the bucket lacks what this database names: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def _when(at: float | None) -> str:
    return "-" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    lines = [heads, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


N = TypeVar("N", int, float)
Command = Callable[[Accounts, Store, argparse.Namespace], Coroutine[Any, Any, None]]


async def _with_database(config: Settings, command: Command, args: argparse.Namespace) -> int:
    prepare(config)
    store = Store(config.database)
    try:
        await store.open()
        await command(Accounts(store, time.time), store, args)
    except (errors.RelayError, SQLAlchemyError) as exc:
        return _complain(str(exc).splitlines()[0])
    finally:
        await store.close()
    return 0


def _complain(line: str) -> int:
    print(line, file=sys.stderr)
    return 2


def _positive(number: type[N], most: float = 1_000_000) -> Callable[[str], N]:
    def read(text: str) -> N:
        try:
            value = number(text)
        except ValueError:
            value = number(0)
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"'{text}' is no number above 0 and up to {most:,.0f}")
        return value

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m relay", description="The relay of I'm Fine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("serve", help="run the relay").set_defaults(apart=lambda args: serve(args.settings))
    work = commands.add_parser("worker", help="a Celery worker, which hands jobs out; with RELAY_BROKER_URL")
    work.add_argument("--concurrency", type=_positive(int, 64), default=2)
    work.add_argument("--name", help="by which Celery asks for it, before the @ and the machine")
    work.set_defaults(apart=lambda args: processes.worker(args.settings, args.concurrency, args.name))
    beat = commands.add_parser("beat", help="Celery's clock, one for all; with RELAY_BROKER_URL")
    beat.set_defaults(apart=lambda args: processes.beat(args.settings))
    flower = commands.add_parser("flower", help="shows Celery's work, on loopback; with RELAY_BROKER_URL")
    flower.add_argument("--port", type=_positive(int, 65535), default=5555)
    flower.set_defaults(apart=lambda args: processes.flower(args.settings, args.port))
    keys = commands.add_parser("keys", help="API keys").add_subparsers(required=True, metavar="WHAT")
    create = keys.add_parser("create", help="make a key, and the user if there is none")
    create.add_argument("--user", required=True)
    create.add_argument("--name", help="what it is for")
    create.add_argument("--scopes", nargs="+", choices=SCOPES, default=SCOPES, help="what it may do; all by default")
    create.add_argument("--expires-days", type=_positive(float))
    create.add_argument("--requests-per-minute", type=_positive(int))
    create.add_argument("--tokens-per-month", type=_positive(int, 10**15))
    create.add_argument("--spend-per-month", type=_positive(float, 1e12), help="in the money of RELAY_PRICE_...")
    create.set_defaults(command=_create_key)
    keys.add_parser("list", help="every key").set_defaults(command=_list_keys)
    revoke = keys.add_parser("revoke", help="a key stops working within a second")
    revoke.add_argument("id")
    revoke.set_defaults(command=_revoke_key)
    tokens = commands.add_parser("tokens", help="tokens that gpus enrol with").add_subparsers(
        required=True, metavar="WHAT"
    )
    make = tokens.add_parser("create", help="make one; it is for one gpu, unless it is reusable")
    make.add_argument("--name", help="what it is for")
    make.add_argument("--reusable", action="store_true")
    make.add_argument("--expires-days", type=_positive(float))
    make.set_defaults(command=_create_token)
    tokens.add_parser("list", help="every one that was made").set_defaults(command=_list_tokens)
    take_back = tokens.add_parser("revoke", help="nothing enrols with it, and gpus that did are refused")
    take_back.add_argument("id")
    take_back.set_defaults(command=_revoke_token)
    people = commands.add_parser("users", help="people").add_subparsers(required=True, metavar="WHAT")
    people.add_parser("list", help="everybody").set_defaults(command=_list_users)
    for what, disabled in (("disable", True), ("enable", False)):
        change = people.add_parser(what, help=f"{'no' if disabled else 'again a'} key, password or session is let in")
        change.add_argument("name")
        change.set_defaults(command=_disable_user, disabled=disabled)
    remove = people.add_parser("delete", help="a user and all that is theirs, for good")
    remove.add_argument("name")
    remove.set_defaults(command=_delete_user)
    password = people.add_parser("password", help="set a password, read from the terminal or one line of input")
    password.add_argument("name", help="the user, made if there is none")
    password.set_defaults(command=_set_password)
    commands.add_parser("gpus", help="every gpu that enrolled").set_defaults(command=_show_gpus)
    commands.add_parser("jobs", help=f"the last {JOBS_SHOWN} jobs").set_defaults(command=_show_jobs)
    shown = f"the last {ENTRIES_SHOWN} entries of the audit log"
    commands.add_parser("audit", help=shown).set_defaults(command=_show_audit)
    stored = commands.add_parser("blobs", help="files, models and checkpoints").add_subparsers(
        required=True, metavar="WHAT"
    )
    copy = stored.add_parser("copy", help="from the folder to the bucket of RELAY_BLOBS_URL; no relay may run")
    copy.set_defaults(apart=_copy_blobs)
    save = commands.add_parser("backup", help="all that the relay holds, its secrets too, as one tar; it may run")
    save.add_argument("to", type=Path, metavar="TO.tar")
    save.set_defaults(apart=_backup)
    load = commands.add_parser("restore", help="the data folder as it was in a backup; no relay may run in it")
    load.add_argument("source", type=Path, metavar="FROM.tar")
    load.add_argument("--replace", action="store_true", help="move what is in the data folder aside")
    load.set_defaults(apart=_restore)
    return parser


def main() -> int:
    args = _parser().parse_args()
    try:
        args.settings = settings.from_env()
        if "apart" in args:
            return int(args.apart(args))
        return asyncio.run(_with_database(args.settings, args.command, args))
    except (errors.RelayError, SQLAlchemyError, sqlite3.Error) as exc:
        return _complain(str(exc).splitlines()[0])
    except settings.BadSetting as exc:
        return _complain(str(exc))
    except OSError as exc:
        return _complain(f"{exc.filename or args.settings.data_dir}: {exc.strerror}")


if __name__ == "__main__":
    sys.exit(main())
