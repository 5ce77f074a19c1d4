"""/api: what the page needs beyond /v1, and the page itself. A key as bearer works here too."""

import asyncio
import html
import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from relay import errors, shapes
from relay.accounts import ADMIN_KEY_ID, SCOPES, Accounts, Key, Rules, Scope, User
from relay.audit import Audit, By
from relay.bodies import parse, parse_object, read_body, string_field
from relay.dispatcher import Dispatcher
from relay.enrol_tokens import EnrolTokens
from relay.generations import Generation, Generations
from relay.gpus import Gpus
from relay.hop import Hop
from relay.jobs import Jobs
from relay.limits import Limits
from relay.meter import NOTHING, Used
from relay.models import Models
from relay.page import Page
from relay.passwords import MAX_CHARS, Passwords, network
from relay.people import People
from relay.placement import Placement
from relay.proxy import Ask
from relay.room import Room
from relay.sessions import SESSION_S, Sessions, check_same_site, cookie_name
from relay.settings import Settings
from relay.store import Clock
from relay.streams import DONE, EventStream
from relay.usage import Usage

PLAIN_PAGE = Path(__file__).with_name("page.html")
NOTEBOOK = Path(__file__).parent.parent / "colab_server.ipynb"
PLAIN_CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
LOOK_EVERY_S = 0.5  # at a job that somebody watches
EVENTS_AT_ONCE = 500
REFUSALS_NOTED = 30  # a minute and address
MOST_KEY_S = 10 * 365 * 24 * 3600.0
TARGETS = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "image": "/v1/images/generations",
}


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SignIn(_Asked):
    key: str = Field(min_length=1, max_length=500)


class SignInByPassword(_Asked):
    name: str = Field(min_length=1, max_length=100)
    password: str = Field(min_length=1, max_length=MAX_CHARS)


class NewPassword(_Asked):
    password: str = Field(max_length=MAX_CHARS)
    current: str | None = Field(default=None, max_length=MAX_CHARS)


class NewKey(_Asked):
    name: str | None = Field(default=None, max_length=100)
    user: str | None = Field(default=None, max_length=100)  # the admin may make keys for others
    scopes: tuple[Scope, ...] = Field(default=SCOPES, min_length=1, max_length=len(SCOPES))
    expires_in_s: float | None = Field(default=None, gt=0, le=MOST_KEY_S)
    requests_per_minute: int | None = Field(default=None, ge=1, le=1_000_000)
    tokens_per_month: int | None = Field(default=None, ge=1, le=10**15)
    spend_per_month: float | None = Field(default=None, gt=0, le=1e12)


class Confirm(_Asked):
    password: str | None = Field(default=None, max_length=MAX_CHARS)
    key: str | None = Field(default=None, max_length=500)


class NewGeneration(_Asked):
    kind: Literal["chat", "completion", "image"]
    body: dict[str, Any]


@dataclass(frozen=True)
class UiApi:
    """The routes' parts."""

    sessions: Sessions
    limits: Limits
    accounts: Accounts
    passwords: Passwords
    enrol_tokens: EnrolTokens
    audit: Audit
    people: People
    dispatcher: Dispatcher
    placement: Placement
    gpus: Gpus
    jobs: Jobs
    models: Models
    room: Room
    usage: Usage
    generations: Generations
    hop: Hop
    page: Page
    settings: Settings
    stopping: asyncio.Event
    clock: Clock

    async def user(self, request: Request, scope: Scope | None = None) -> User:
        """Raises InvalidKey, Forbidden, MissingScope."""
        user = await self.sessions.caller(request.headers, secure=request.scope["scheme"] == "https")
        request.state.user_id = user.id
        if scope:
            user.need(scope)
        return user

    async def admin(self, request: Request, does: str) -> User:
        """Raises InvalidKey, Forbidden, MissingScope."""
        user = await self.user(request, "admin")
        if not user.is_admin:
            raise errors.Forbidden(f"only the admin {does}")
        return user

    async def object(self, request: Request) -> dict[str, Any]:
        return parse_object(await read_body(request, self.settings.max_body_bytes))

    def address(self, request: Request) -> str:
        return request.client.host if request.client else ""

    def by(self, request: Request, user: User) -> By:
        return By(user.name, self.address(request))

    async def refused(self, request: Request, name: str | None = None) -> None:
        """A few a minute from one address are noted: nobody fills the disk by not being let in."""
        address = self.address(request)
        if self.limits.kept.take(f"refused {network(address)}", REFUSALS_NOTED)[0]:
            await self.audit.refused(name, address, "by key" if name is None else "by password")

    async def check_again(self, request: Request, user: User, given: Confirm) -> None:
        """Raises Forbidden, RateLimited, TooMany."""
        try:
            if given.key is not None:
                again = await self.accounts.user_of(f"Bearer {given.key}")
            else:
                key_sha256 = await self.passwords.check(user.name, given.password or "", self.address(request))
                again = await self.accounts.user_of_hash(key_sha256)
        except errors.InvalidKey:
            again = None
        if again is None or again.id != user.id or again.rules.limited:
            await self.refused(request, user.name)
            raise errors.Forbidden("give your password in 'password', or a key of yours without limits in 'key'")

    async def delete(self, name: str, by: By) -> None:
        """Raises NotFound, InvalidRequest."""
        for gpu_id in await self.people.delete(name, by):
            self.dispatcher.ring(gpu_id)

    def stream(self, generation: Generation, after: int) -> EventStream:
        return EventStream(self.generations.frames(generation, after), self.stopping)


def router(api: UiApi) -> APIRouter:
    routes = APIRouter()
    for add in (_session, _keys, _usage, _gpus, _jobs, _generations):
        part = APIRouter(prefix="/api", tags=["page"])
        add(part, api)
        routes.include_router(part)
    _pages(routes, api)
    return routes


def _session(routes: APIRouter, api: UiApi) -> None:
    @routes.post("/session")
    async def sign_in(request: Request) -> JSONResponse:
        """A key for a cookie, so that the key need not lie in the browser."""
        check_same_site(request.headers)  # or another site could sign its visitors in as somebody else
        body = await api.object(request)
        by = parse(SignIn, body) if "key" in body else parse(SignInByPassword, body)
        address = api.address(request)
        try:
            if isinstance(by, SignIn):
                token, user = await api.sessions.open(by.key, address)
            else:
                key_sha256 = await api.passwords.check(by.name, by.password, address)
                token, user = await api.sessions.open_by_hash(key_sha256, address)
        except errors.InvalidKey:
            await api.refused(request, None if isinstance(by, SignIn) else by.name)
            raise
        response = JSONResponse(_me(user))
        secure = request.scope["scheme"] == "https"
        name = cookie_name(request.headers, secure)
        response.set_cookie(name, token, int(SESSION_S), httponly=True, samesite="strict", secure=secure)
        return response

    @routes.delete("/session")
    async def sign_out(request: Request) -> JSONResponse:
        check_same_site(request.headers)
        secure = request.scope["scheme"] == "https"
        await api.sessions.close(request.headers, secure=secure)
        response = JSONResponse({"deleted": True})
        name = cookie_name(request.headers, secure)
        response.delete_cookie(name, httponly=True, samesite="strict", secure=secure)
        return response

    @routes.get("/me")
    async def me(request: Request) -> JSONResponse:
        user = await api.user(request)
        usage = await api.room.usage(user.id)
        storage = {
            "quota_bytes": api.settings.user_quota_bytes or None,
            "used_bytes": usage.total,
            "files_bytes": usage.files,
            "models_bytes": usage.models,
            "jobs_bytes": usage.jobs,
        }
        more = {"has_password": await api.passwords.has(user.id), "storage": storage}
        return JSONResponse(_me(user) | more)

    @routes.delete("/me")
    async def delete_me(request: Request) -> JSONResponse:
        """The account and all that is its own. A session says again who it is, by `password` or `key`."""
        user = await api.user(request, "admin")
        if user.rules.limited:
            raise errors.Forbidden("a key with limits deletes no account: sign in with one that has none")
        if "authorization" not in request.headers:
            await api.check_again(request, user, parse(Confirm, await api.object(request)))
        await api.delete(user.name, api.by(request, user))
        return JSONResponse({"id": user.id, "deleted": True})

    @routes.put("/me/password")
    async def set_password(request: Request) -> JSONResponse:
        """Ends every session that was opened by password, this one too."""
        user = await api.user(request, "admin")
        if user.rules.limited:
            raise errors.Forbidden("a key with limits sets no password: sign in with one that has none")
        asked = parse(NewPassword, await api.object(request))
        if await api.passwords.has(user.id):
            if asked.current is None:
                raise errors.InvalidRequest("current: give the password that holds now", param="current")
            try:
                await api.passwords.check(user.name, asked.current, api.address(request))
            except errors.InvalidKey as exc:
                await api.refused(request, user.name)
                raise errors.Forbidden("current: this is not the password", param="current") from exc
        await api.passwords.set(user.name, asked.password, api.by(request, user))
        return JSONResponse({"changed": True})


def _me(user: User) -> dict[str, Any]:
    return {"user": {"id": user.id, "name": user.name}, "admin": user.is_admin}


def _keys(routes: APIRouter, api: UiApi) -> None:
    async def visible(user: User) -> list[Key]:
        keys = [key for key in await api.accounts.list_keys() if key.revoked_at is None]
        return [key for key in keys if user.is_admin or key.user == user.name]

    @routes.get("/keys")
    async def list_keys(request: Request) -> JSONResponse:
        """One's own; the admin sees everybody's."""
        user = await api.user(request, "admin")
        data = [
            {
                "id": key.id,
                "name": key.name,
                "user": key.user,
                "prefix": key.prefix,
                "created_at": key.created_at,
                "last_used_at": key.last_used_at,
                "current": key.id == user.key_id,
                "fixed": key.id == ADMIN_KEY_ID,
                "scopes": list(key.rules.scopes),
                "expires_at": key.rules.expires_at,
                "requests_per_minute": key.rules.requests_per_minute,
                "tokens_per_month": key.rules.tokens_per_month,
                "spend_per_month": key.rules.spend_per_month,
            }
            for key in await visible(user)
        ]
        return JSONResponse({"object": "list", "data": data, "has_more": False})

    @routes.post("/keys")
    async def create_key(request: Request) -> JSONResponse:
        """The key is in this answer and nowhere else."""
        user = await api.user(request, "admin")
        if user.rules.limited:  # or it could make itself one without
            raise errors.Forbidden("a key with limits makes no other keys: sign in with one that has none")
        asked = parse(NewKey, await api.object(request))
        if asked.user not in (None, user.name) and not user.is_admin:
            raise errors.Forbidden("only the admin makes keys for others", param="user")
        expires_at = api.clock() + asked.expires_in_s if asked.expires_in_s else None
        scopes = tuple(scope for scope in SCOPES if scope in asked.scopes)
        limits = asked.requests_per_minute, asked.tokens_per_month, asked.spend_per_month
        rules = Rules(scopes, expires_at, *limits)
        owner = asked.user or user.name
        key_id, key = await api.accounts.create_key(owner, asked.name or None, rules, api.by(request, user))
        return JSONResponse({"id": key_id, "key": key})

    @routes.delete("/keys/{key_id}")
    async def revoke_key(key_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "admin")
        if key_id not in {key.id for key in await visible(user)}:
            raise errors.NotFound(f"no key '{key_id[:50]}'")
        await api.accounts.revoke(key_id, api.by(request, user))
        return JSONResponse({"id": key_id, "deleted": True})


def _usage(routes: APIRouter, api: UiApi) -> None:
    @routes.get("/usage")
    async def usage(request: Request) -> JSONResponse:
        """This month's, of one's own; by key too. A key that does not manage keys sees itself alone."""
        user = await api.user(request)
        month, ends_at, used = await api.usage.of_user(user.id)
        alone = "admin" not in user.rules.scopes
        used = {key_id: found for key_id, found in used.items() if not alone or key_id == user.key_id}
        prices = api.usage.prices

        def shown(found: Used) -> dict[str, Any]:
            return {**asdict(found), "tokens": found.tokens, "spend": round(prices.of(found), 6)}

        known = [key for key in await api.accounts.list_keys() if key.user == user.name]
        own = {key.id: key for key in known if not alone or key.id == user.key_id}
        keys = [
            {
                "id": key.id,
                "name": key.name,
                "prefix": key.prefix,
                "revoked": key.revoked_at is not None,
                **shown(used.get(key.id, NOTHING)),
                "tokens_per_month": key.rules.tokens_per_month,
                "spend_per_month": key.rules.spend_per_month,
            }
            for key in own.values()
            if key.revoked_at is None or key.id in used
        ]
        return JSONResponse(
            {
                "month": month,
                "ends_at": ends_at,
                **shown(sum(used.values(), NOTHING)),
                "prices": asdict(prices),
                "keys": keys,
            }
        )


def _gpus(routes: APIRouter, api: UiApi) -> None:
    @routes.get("/gpus")
    async def list_gpus(request: Request) -> JSONResponse:
        user = await api.user(request)
        held = await api.jobs.on_gpus()
        data = []
        for row, offers in await api.gpus.known():
            job = held.get(row.id)
            alive = api.gpus.is_alive(row)
            own = job is not None and job.owner == user.id
            data.append(
                {
                    "id": row.id,
                    "name": row.name,
                    "alive": alive,
                    "reachable": alive and api.gpus.reachable(row.id, row.epoch),
                    "breaker": api.gpus.breaker_state(row.id, row.epoch),
                    "draining": row.draining,
                    "tunnel": row.tunnel,
                    "device": row.device,
                    "free_bytes": row.free_bytes,
                    "models": [{"id": o.model_id, "family": o.family, "loaded": o.loaded} for o in offers],
                    "active_requests": row.active_requests,
                    "job": {"id": job.id if own else None, "status": job.status} if job is not None else None,
                    "enrolled_at": row.enrolled_at,
                    "last_seen_at": row.last_seen_at,
                    "runtime_ends_at": row.runtime_ends_at,
                }
            )
        return JSONResponse({"object": "list", "data": data, "has_more": False})

    @routes.post("/gpus/{gpu_id}/drain")
    async def drain(gpu_id: str, request: Request) -> JSONResponse:
        """Nothing new for it; live requests go on to their end, jobs are given back. DELETE takes it back."""
        user = await api.admin(request, "drains gpus")
        await api.gpus.drain(gpu_id)
        api.dispatcher.ring(gpu_id)
        await api.audit.write(api.by(request, user), "gpu.drain", gpu_id)
        return JSONResponse({"id": gpu_id, "draining": True})

    @routes.delete("/gpus/{gpu_id}/drain")
    async def undrain(gpu_id: str, request: Request) -> JSONResponse:
        user = await api.admin(request, "drains gpus")
        await api.gpus.drain(gpu_id, on=False)
        api.dispatcher.ring(gpu_id)
        await api.audit.write(api.by(request, user), "gpu.undrain", gpu_id)
        return JSONResponse({"id": gpu_id, "draining": False})

    @routes.get("/enrol-token")
    async def enrol_token(request: Request) -> JSONResponse:
        """What a notebook needs to join; it lets a gpu in, so it is the admin's alone."""
        if not (await api.user(request)).is_admin:
            raise errors.Forbidden("only the admin sees the enrol token")
        return JSONResponse({"relay_url": _here(request), "token": api.enrol_tokens.fixed})


def _jobs(routes: APIRouter, api: UiApi) -> None:
    @routes.get("/jobs/{job_id}/stream")
    async def stream(job_id: str, request: Request) -> Response:
        """`event: job` whenever the job has changed; its events with their numbers as ids. Ends with [DONE]."""
        user = await api.user(request, "train")
        after = _last_event_id(request)
        await api.jobs.get(user.id, job_id)
        return EventStream(_watch(api, user.id, job_id, after), api.stopping)


async def _watch(api: UiApi, owner: str, job_id: str, after: int) -> AsyncIterator[bytes]:
    said = ""
    while True:
        job, events = await api.jobs.events_after(owner, job_id, after, EVENTS_AT_ONCE)
        frames = [f"id: {event.id}\ndata: {json.dumps(shapes.event(event))}\n\n" for event in events]
        if (state := json.dumps(shapes.job(job, await api.placement.waiting_for([job])))) != said:
            frames.insert(0, f"event: job\ndata: {state}\n\n")
            said = state
        if frames:
            yield "".join(frames).encode()
        if events:
            after = events[-1].id
        if len(events) < EVENTS_AT_ONCE:
            if job.finished_at is not None:
                yield DONE
                return
            await asyncio.sleep(LOOK_EVERY_S)


def _generations(routes: APIRouter, api: UiApi) -> None:
    @routes.post("/generations")
    async def start(request: Request) -> Response:
        """Waits for a gpu as long as it takes; tells the place in the line, then passes the gpu's own frames on."""
        user = await api.user(request, "generate")
        api.limits.take(user)
        await api.usage.check(user)
        asked = parse(NewGeneration, await api.object(request))
        model = await api.models.resolve(user.id, string_field(asked.body, "model"))
        headers = {"content-type": "application/json", "x-request-id": request.state.request_id}
        body = json.dumps({**asked.body, "stream": True}).encode()
        generation = api.generations.start(
            user.id, Ask(user.id, model.base, "POST", TARGETS[asked.kind], body, headers, user.key_id)
        )
        return api.stream(generation, 0)

    @routes.get("/generations/{generation_id}")
    async def again(generation_id: str, request: Request) -> Response:
        """After a cut: everything past Last-Event-ID."""
        user, after = await api.user(request, "generate"), _last_event_id(request)
        if home := api.generations.elsewhere(generation_id):
            frames = await api.hop.frames(home, generation_id, user.id, after)
            if frames:
                return EventStream(frames, api.stopping)
        return api.stream(api.generations.get(user.id, generation_id), after)

    @routes.delete("/generations/{generation_id}")
    async def stop(generation_id: str, request: Request) -> JSONResponse:
        user = await api.user(request, "generate")
        home = api.generations.elsewhere(generation_id)
        if not home or not await api.hop.stop(home, generation_id, user.id):
            api.generations.stop(api.generations.get(user.id, generation_id))
        return JSONResponse({"id": generation_id, "deleted": True})


def _pages(routes: APIRouter, api: UiApi) -> None:
    plain = PLAIN_PAGE.read_text(encoding="utf-8")

    @routes.get("/", include_in_schema=False)
    async def index(request: Request) -> HTMLResponse:
        if api.page.built:
            return api.page.index()
        # The address as the reader has it, which behind nginx is not ours.
        shown = plain.replace("{{here}}", html.escape(_here(request), quote=True))
        return HTMLResponse(shown, headers={"content-security-policy": PLAIN_CSP})

    @routes.get(f"/{NOTEBOOK.name}", include_in_schema=False)
    async def notebook() -> Response:
        """What "Connect a GPU" hands out; it holds no secret, so nobody has to sign in for it."""
        if not NOTEBOOK.is_file():
            raise errors.NotFound("this relay was installed without the notebook: take it from the project")
        return FileResponse(NOTEBOOK, media_type="application/x-ipynb+json", filename=NOTEBOOK.name)

    @routes.get("/assets/{name}", include_in_schema=False)
    async def asset(name: str, request: Request) -> Response:
        if found := api.page.asset(name, request):
            return found
        raise HTTPException(404)


def _here(request: Request) -> str:
    return f"{request.url.scheme}://{request.headers.get('host', '')}"


def _last_event_id(request: Request) -> int:
    given = request.headers.get("last-event-id", "")
    return int(given) if given.isascii() and given.isdecimal() and len(given) <= 18 else 0
