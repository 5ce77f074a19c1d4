"""/api for the admin: people, enrol tokens and the audit log. A key as bearer works here too."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from relay import errors, shapes
from relay.accounts import User
from relay.api_ui import MOST_KEY_S, UiApi
from relay.audit import Action
from relay.bodies import parse
from relay.passwords import MAX_CHARS


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NewUser(_Asked):
    name: str = Field(min_length=1, max_length=100)
    password: str | None = Field(default=None, max_length=MAX_CHARS)


class OthersPassword(_Asked):
    password: str = Field(max_length=MAX_CHARS)


class NewEnrolToken(_Asked):
    name: str | None = Field(default=None, max_length=100)
    reusable: bool = False
    expires_in_s: float | None = Field(default=None, gt=0, le=MOST_KEY_S)


def router(api: UiApi) -> APIRouter:
    routes = APIRouter(prefix="/api", tags=["admin"])
    for add in (_enrol_tokens, _users, _audit):
        add(routes, api)
    return routes


def _enrol_tokens(routes: APIRouter, api: UiApi) -> None:
    @routes.get("/enrol-tokens")
    async def list_tokens(request: Request) -> JSONResponse:
        await api.admin(request, "sees enrol tokens")
        data = [asdict(token) for token in await api.enrol_tokens.known()]
        return JSONResponse({"object": "list", "data": data, "has_more": False})

    @routes.post("/enrol-tokens")
    async def create_token(request: Request) -> JSONResponse:
        """The token is in this answer and nowhere else."""
        user = await api.admin(request, "makes enrol tokens")
        if user.rules.limited:  # or what it makes would outlast it
            raise errors.Forbidden("a key with limits makes no enrol tokens: sign in with one that has none")
        asked = parse(NewEnrolToken, await api.object(request))
        expires_at = api.clock() + asked.expires_in_s if asked.expires_in_s else None
        token_id, token = await api.enrol_tokens.create(
            asked.name, reusable=asked.reusable, expires_at=expires_at, by=api.by(request, user)
        )
        return JSONResponse({"id": token_id, "token": token})

    @routes.delete("/enrol-tokens/{token_id}")
    async def revoke_token(token_id: str, request: Request) -> JSONResponse:
        user = await api.admin(request, "revokes enrol tokens")
        await api.enrol_tokens.revoke(token_id, api.by(request, user))
        return JSONResponse({"id": token_id, "deleted": True})


def _users(routes: APIRouter, api: UiApi) -> None:
    async def admin(request: Request, does: str) -> User:
        """Who may end or let in others for longer than a key with limits lasts. Raises Forbidden."""
        user = await api.admin(request, does)
        if user.rules.limited:
            raise errors.Forbidden(f"a key with limits changes no users: sign in with one that has none, which {does}")
        return user

    async def name_of(user_id: str) -> str:
        """Raises NotFound."""
        names: dict[str, str] = {row.id: row.name for row in await api.people.known()}
        if user_id not in names:
            raise errors.NotFound(f"no user '{user_id[:50]}': GET /api/users lists them")
        return names[user_id]

    @routes.get("/users")
    async def list_users(request: Request) -> JSONResponse:
        await api.admin(request, "sees users")
        shown = ("id", "name", "created_at", "disabled_at", "deleting_at", "has_password")
        data = [{field: getattr(row, field) for field in shown} for row in await api.people.known()]
        return JSONResponse({"object": "list", "data": data, "has_more": False})

    @routes.post("/users")
    async def create_user(request: Request) -> JSONResponse:
        """Without a password they come in by a key that is made for them."""
        user = await admin(request, "makes users")
        asked = parse(NewUser, await api.object(request))
        if asked.name in {row.name for row in await api.people.known()}:
            raise errors.InvalidRequest(f"name: there is a user '{asked.name}' already", param="name")
        by = api.by(request, user)
        if asked.password is not None:
            await api.passwords.set(asked.name, asked.password, by)
        return JSONResponse({"id": await api.accounts.make_user(asked.name, by), "name": asked.name})

    @routes.put("/users/{user_id}/password")
    async def set_password(user_id: str, request: Request) -> JSONResponse:
        """Ends the sessions that they opened by password."""
        user = await admin(request, "sets others' passwords")
        if user_id == user.id:  # who holds the session only must not get to keep the account
            raise errors.InvalidRequest("change your own password by PUT /api/me/password")
        asked = parse(OthersPassword, await api.object(request))
        await api.passwords.set(await name_of(user_id), asked.password, api.by(request, user))
        return JSONResponse({"id": user_id, "changed": True})

    @routes.post("/users/{user_id}/disable")
    async def disable(user_id: str, request: Request) -> JSONResponse:
        """None of their keys, passwords and sessions is let in; jobs go on. DELETE takes it back."""
        user = await admin(request, "disables users")
        await api.people.disable(await name_of(user_id), api.by(request, user))
        return JSONResponse({"id": user_id, "disabled": True})

    @routes.delete("/users/{user_id}/disable")
    async def enable(user_id: str, request: Request) -> JSONResponse:
        user = await admin(request, "enables users")
        await api.people.disable(await name_of(user_id), api.by(request, user), on=False)
        return JSONResponse({"id": user_id, "disabled": False})

    @routes.delete("/users/{user_id}")
    async def delete_user(user_id: str, request: Request) -> JSONResponse:
        """Ends what they have going at once; the rest goes within moments, after a restart too."""
        user = await admin(request, "deletes users")
        await api.delete(await name_of(user_id), api.by(request, user))
        return JSONResponse({"id": user_id, "deleted": True})


def _audit(routes: APIRouter, api: UiApi) -> None:
    @routes.get("/audit")
    async def entries(
        request: Request,
        after: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 50,
        who: Annotated[str | None, Query(max_length=100)] = None,
        action: Annotated[Action | None, Query()] = None,
    ) -> JSONResponse:
        """The newest first; `after` is the last id of the page before."""
        await api.admin(request, "reads the audit log")
        rows, more = await api.audit.page(after, limit, who=who, action=action)
        return JSONResponse(shapes.page(lambda row: dict(row._mapping), rows, more))
