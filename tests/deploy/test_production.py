"""compose.production.yaml by the commands of docs/operations: started, its secrets changed, upgraded, restored."""

import asyncio
import shlex
import subprocess
from collections.abc import AsyncIterator

import asyncpg
import httpx2
import pytest

from tests.deploy.composed import RABBITMQ, Composed
from tests.deploy.test_files import composed as composed_file
from tests.deploy.test_operations import block, ids

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
LOOP = "127.0.0.1"


@pytest.fixture(scope="module")
async def composed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Composed]:
    composed = Composed(tmp_path_factory.mktemp("composed"))
    *make, up = block("install.md", "secrets.sh secrets/relay.env /data/relay production").splitlines()
    assert up == "docker compose up -d --build"
    try:
        await asyncio.to_thread(composed.start, secrets="\n".join(make), up=up)
        await asyncio.to_thread(composed.until_ready)
        async with composed.nginx.serving():
            yield composed
    finally:
        composed.close()


@pytest.fixture
async def caller(composed: Composed) -> AsyncIterator[httpx2.AsyncClient]:
    async with composed.nginx.client("") as client:
        yield client


def admin_key(composed: Composed) -> str:
    commands = block("install.md", "cat /data/relay/admin.key").splitlines()
    (shown,) = (line for line in commands if "admin.key" in line)
    return composed.sh(shown).strip()


def flower_password(composed: Composed) -> str:
    (shown,) = (line for line in block("install.md", "cat /data/relay/admin.key").splitlines() if "FLOWER" in line)
    return composed.sh(shown).strip()


async def models(caller: httpx2.AsyncClient, key: str) -> int:
    return (await caller.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code


async def opens_database(composed: Composed, password: str) -> bool:
    where = {"host": LOOP, "port": composed.postgres.port, "database": "imfine"}
    try:
        db = await asyncpg.connect(**where, user="imfine", password=password)
    except asyncpg.InvalidPasswordError:
        return False
    await db.close()
    return True


def rabbitmqctl(composed: Composed, *command: str, given: str = "") -> subprocess.CompletedProcess[str]:
    run = [f"{RABBITMQ}/rabbitmqctl", "-q", *command]
    return subprocess.run(run, input=given, text=True, env=composed.env, capture_output=True)


def opens_broker(composed: Composed, password: str) -> bool:
    return rabbitmqctl(composed, "authenticate_user", "imfine", given=password).returncode == 0


async def test_both_relays_answer_through_nginx_and_hold_the_same(
    composed: Composed, caller: httpx2.AsyncClient
) -> None:
    key = admin_key(composed)
    for _ in range(4):
        assert await models(caller, key) == 200
    said = composed.sh(
        block("install.md", "exec -T relay-1 python -m relay keys create").splitlines()[0].replace("NAME", "dana")
    )
    for name in ("relay-1", "relay-2"):
        url = f"http://{LOOP}:{composed.ports[name]}/v1/models"
        headers = {"authorization": f"Bearer {said.split()[-1]}"}
        assert httpx2.get(url, headers=headers, trust_env=False).status_code == 200
    assert ids(said) in composed.sh("docker compose exec -T relay-2 python -m relay keys list")


@pytest.mark.parametrize("name", ["relay-1", "relay-2", "worker", "beat", "flower", "rabbitmq"])
async def test_what_looks_whether_a_service_is_well_finds_it_so(composed: Composed, name: str) -> None:
    await asyncio.to_thread(composed.until_answers, "flower", "/flower/")
    kind, *test = composed_file("compose.production.yaml")["services"][name]["healthcheck"]["test"]
    command = shlex.join(test) if kind == "CMD" else f"sh -c {shlex.quote(test[0].replace('$$', '$'))}"
    await asyncio.to_thread(composed.sh, f"HOSTNAME=$(hostname) docker compose exec -T {name} {command}")
    code = composed.root / "code"  # read-only in a container
    assert all(path.is_symlink() for path in code.iterdir()), "nothing is written beside the code"


async def test_the_relays_may_do_nothing_but_with_their_own_database(composed: Composed) -> None:
    (role,) = composed.postgres.execute(
        "SELECT rolsuper, rolcreaterole, rolcreatedb FROM pg_roles WHERE rolname = 'imfine'", user="postgres"
    )
    assert tuple(role) == (False, False, False)
    (admin,) = composed.postgres.execute(
        "SELECT rolpassword FROM pg_authid WHERE rolname = 'postgres'", user="postgres"
    )
    assert admin["rolpassword"] is None
    listed = rabbitmqctl(composed, "list_users")
    assert "imfine" in listed.stdout
    assert "guest" not in listed.stdout


async def test_flower_is_for_who_has_its_password(composed: Composed, caller: httpx2.AsyncClient) -> None:
    await asyncio.to_thread(composed.until_answers, "flower", "/flower/")
    assert (await caller.get("/flower/")).status_code == 401
    wrong = await caller.get("/flower/", auth=("admin", "a wrong one"))
    assert (wrong.status_code, wrong.headers["www-authenticate"]) == (401, 'Basic realm="flower"')
    right = ("admin", flower_password(composed))
    shown = await caller.get("/flower/", auth=right)
    assert shown.status_code == 200
    assert shown.headers["x-frame-options"] == "DENY"
    assert "relay@" in (await until_text(caller, "/flower/api/workers?refresh=1", right, "relay@"))
    for path in ("/flower/metrics", "/flower/healthcheck"):
        assert (await caller.get(path)).status_code == 404
    led = await caller.get("/flower")
    assert (led.status_code, led.headers["location"]) == (308, f"{composed.nginx.url}/flower/")


async def until_text(caller: httpx2.AsyncClient, path: str, auth: tuple[str, str], text: str) -> str:
    shown = ""
    for _ in range(60):
        if text in (shown := (await caller.get(path, auth=auth)).text):
            break
        await asyncio.sleep(1.5)  # nginx lets a minute's sixty through
    return shown


async def test_who_guesses_flowers_password_is_held_back_and_nobody_else(composed: Composed) -> None:
    async with composed.nginx.client("", source="127.0.0.7") as guesser, composed.nginx.client("") as other:
        asked = [guesser.get("/flower/", auth=("admin", f"guess {i}")) for i in range(60)]
        statuses = [(await answer).status_code for answer in asked]
        assert set(statuses) == {401, 429}
        assert statuses.count(401) < 50
        assert (await guesser.get("/readyz")).status_code == 200
        assert (await other.get("/flower/")).status_code == 401


async def test_every_secret_of_production_is_changed(composed: Composed, caller: httpx2.AsyncClient) -> None:
    names = [("database", "POSTGRES_PASSWORD"), ("broker", "RABBITMQ_DEFAULT_PASS")]
    names += [("flower", "RELAY_FLOWER_PASSWORD"), ("relay", "RELAY_METRICS_TOKEN")]
    old = {name: composed.secret(file, name) for file, name in names}
    assert await opens_database(composed, old["POSTGRES_PASSWORD"])
    assert opens_broker(composed, old["RABBITMQ_DEFAULT_PASS"])
    await asyncio.to_thread(composed.sh, block("secrets.md", "database-password"))
    await asyncio.to_thread(composed.until_ready)
    new = {name: composed.secret(file, name) for file, name in names}
    assert all(old[name] != new[name] for name in new)
    assert await opens_database(composed, new["POSTGRES_PASSWORD"])
    assert opens_broker(composed, new["RABBITMQ_DEFAULT_PASS"])
    assert not await opens_database(composed, old["POSTGRES_PASSWORD"])
    assert not opens_broker(composed, old["RABBITMQ_DEFAULT_PASS"])
    await asyncio.to_thread(composed.until_answers, "flower", "/flower/")
    assert (await caller.get("/flower/", auth=("admin", old["RELAY_FLOWER_PASSWORD"]))).status_code == 401
    right = ("admin", new["RELAY_FLOWER_PASSWORD"])
    assert "relay@" in await until_text(caller, "/flower/api/workers?refresh=1", right, "relay@")
    assert await models(caller, admin_key(composed)) == 200


async def test_a_server_that_is_away_keeps_its_password_and_so_do_the_files(composed: Composed) -> None:
    files = {file: file.read_text() for file in (composed.deploy / "secrets").iterdir()}
    for what, away in (("database-password", "PGPORT=1"), ("broker-password", "RABBITMQ_NODENAME=nobody@localhost")):
        command = f"env {away} sh secrets.sh secrets/relay.env /data/relay {what}"
        with pytest.raises(AssertionError, match="the old password stays"):
            await asyncio.to_thread(composed.sh, command)
        assert {file: file.read_text() for file in (composed.deploy / "secrets").iterdir()} == files


async def test_what_the_relays_make_is_made_anew(composed: Composed, caller: httpx2.AsyncClient) -> None:
    old = admin_key(composed)
    await asyncio.to_thread(composed.sh, block("secrets.md", "exec -T relay-1 rm"))
    await asyncio.to_thread(composed.until_ready)
    new = admin_key(composed)
    assert (await models(caller, old), await models(caller, new)) == (401, 200)


async def test_the_commands_for_ones_own_servers_change_them(composed: Composed) -> None:
    said = await asyncio.to_thread(composed.sh, block("secrets.md", "sudo rabbitmqctl"))
    database, broker = said.split()
    assert await opens_database(composed, database)
    assert opens_broker(composed, broker)
    await asyncio.to_thread(composed.sh, block("secrets.md", "database-password"))  # and back to what the files say
    await asyncio.to_thread(composed.until_ready)


async def test_a_backup_of_the_night_is_fetched_and_restored(composed: Composed, caller: httpx2.AsyncClient) -> None:
    await asyncio.to_thread(composed.sh, "docker compose exec -T backup sh deploy/backup.sh /backups")
    await asyncio.to_thread(composed.sh, block("install.md", "ls /backups/nightly"))
    (fetched,) = composed.deploy.glob("nightly-*.tar")
    made = composed.sh(
        block("install.md", "exec -T relay-1 python -m relay keys create").splitlines()[0].replace("NAME", "later")
    )
    assert await models(caller, made.split()[-1]) == 200
    commands = block("install.md", "relay restore /backups/NAME.tar").replace("NAME.tar", fetched.name)
    (composed.root / "backups" / fetched.name).unlink()
    await asyncio.to_thread(composed.sh, commands)
    await asyncio.to_thread(composed.until_ready)
    assert await models(caller, made.split()[-1]) == 401, "it is as it was before"
    assert await models(caller, admin_key(composed)) == 200


async def test_an_upgrade_comes_after_a_backup(composed: Composed, caller: httpx2.AsyncClient) -> None:
    await asyncio.to_thread(composed.sh, block("install.md", "docker compose build"))
    await asyncio.to_thread(composed.until_ready)
    assert len(list((composed.root / "backups").glob("before-*.tar"))) == 1
    assert await models(caller, admin_key(composed)) == 200
