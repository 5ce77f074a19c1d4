"""The whole relay as an ASGI application: puts the parts together, and renders every error once.

Importing it does nothing; the database, the blobs and the connections open with the application's lifespan.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

import logs
import wire
from relay import (
    api_adapters,
    api_admin,
    api_batches,
    api_data,
    api_gpu,
    api_openai,
    api_ops,
    api_peer,
    api_ui,
    api_webhooks,
    errors,
    folder,
)
from relay.accounts import KEY_PREFIX, Accounts
from relay.adapters import Adapters
from relay.audit import Audit
from relay.batches import Batches
from relay.broker import Broker
from relay.checkpoints import Checkpoints
from relay.dialout import DialOut
from relay.dispatcher import Dispatcher
from relay.enrol_tokens import PREFIX as ENROL_PREFIX
from relay.enrol_tokens import EnrolTokens
from relay.files import Files
from relay.generations import Generations
from relay.gpu_client import GpuClient
from relay.gpus import Gpus
from relay.health import Health
from relay.hop import Hop
from relay.jobs import Jobs
from relay.leases import Leases
from relay.limits import Limits
from relay.lines import Lines
from relay.metrics import Metrics
from relay.models import Models
from relay.openapi import truthful
from relay.outbox import Outbox
from relay.page import Page
from relay.passwords import Passwords
from relay.peers import Peers
from relay.people import People
from relay.placement import Placement
from relay.proxy import STOP_GRACE_S, Proxy
from relay.room import Room
from relay.sessions import Sessions
from relay.settings import Settings, secret
from relay.storage import blobs_of
from relay.store import Clock, Store
from relay.streams import Endings
from relay.sweep import keep_sweeping
from relay.transport import ByTunnel, TunnelTransport
from relay.uploads import Uploads
from relay.usage import Usage
from relay.vitals import Vitals
from relay.waiting import Waiting
from relay.webhooks import Webhooks

log = logging.getLogger("relay.app")

HEADERS = (  # of every answer that does not say otherwise
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)
BY_HTTPS = ((b"strict-transport-security", b"max-age=31536000"),)


def prepare(settings: Settings) -> tuple[str, str]:
    """The data folder, for its owner only, with the admin's key and the enrol token. Raises BadSetting, OSError."""
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return (
        secret(settings.admin_key, settings.admin_key_file, KEY_PREFIX),
        secret(settings.enrol_token, settings.enrol_token_file, ENROL_PREFIX),
    )


def create_app(settings: Settings, clock: Clock = time.time) -> FastAPI:
    """`app.state.dispatcher.stop()` ends what would last: held heartbeats and streams."""
    stopping, metrics = asyncio.Event(), Metrics()
    store = Store(settings.database)
    blobs = blobs_of(settings)
    transport = TunnelTransport(allow_loopback=settings.allow_loopback_gpus)
    dialout, peers = DialOut(), Peers(store, settings, clock)
    hop = Hop(peers)
    client = GpuClient(ByTunnel(transport, dialout, hop, peers.name), clock)
    accounts = Accounts(store, clock)
    enrol_tokens = EnrolTokens(store, clock)
    audit = Audit(store, clock)
    people = People(store, blobs, accounts, clock)
    gpus = Gpus(store, client, settings, clock, peers.name)
    jobs = Jobs(store, blobs, clock)
    leases = Leases(store, blobs, settings, clock)
    placement = Placement(store, settings, clock)
    room = Room(store, blobs, settings)
    checkpoints = Checkpoints(store, blobs, leases, room, clock)
    uploads = Uploads(store, blobs, leases, room)
    files = Files(store, blobs, room, clock)
    models = Models(store, blobs, settings, clock, gpus.reachable_ids)
    broker = Broker(settings.broker_url) if settings.broker_url else None
    dispatcher = Dispatcher(leases, gpus, stopping, metrics, peers.is_watching, broker)
    usage = Usage(store, settings, clock)
    batches = Batches(store, blobs, leases, usage.prices, clock)
    proxy = Proxy(gpus, client, stopping, metrics, usage)
    passwords = Passwords(store, accounts, clock)
    sessions, limits = Sessions(store, accounts, clock), Limits(clock)
    lines = Lines()
    generations = Generations(proxy, gpus, lines, metrics, peers.name)
    waiting = Waiting(proxy, gpus, lines, metrics)
    waiting_by: dict[str, Callable[[], int]] = {
        "api": lambda: lines.waiting("api"),
        "page": lambda: lines.waiting("page"),
    }
    vitals = Vitals(metrics, store, blobs, gpus, settings, waiting_by)
    outbox = Outbox(store, clock, metrics, allow_loopback=settings.allow_loopback_gpus)
    webhooks = Webhooks(store, clock, allow_loopback=settings.allow_loopback_gpus)
    page = Page(settings.page_dir)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(logs.loop_failed)
        admin_key, enrol_token = prepare(settings)
        async with contextlib.AsyncExitStack() as closing:
            await store.open()
            closing.push_async_callback(store.close)
            await folder.check(store, blobs, settings.data_dir)
            blobs.open()
            closing.callback(blobs.close)
            await accounts.open(admin_key)
            closing.push_async_callback(accounts.fold)
            closing.push_async_callback(usage.fold)
            counting = asyncio.create_task(usage.keep_folding())
            closing.push_async_callback(lambda: asyncio.wait({counting}))
            closing.callback(counting.cancel)
            folding = asyncio.create_task(accounts.keep_folding())
            closing.push_async_callback(lambda: asyncio.wait({folding}))
            closing.callback(folding.cancel)
            enrol_tokens.open(enrol_token)
            await peers.join()
            closing.push_async_callback(peers.leave)
            beating = asyncio.create_task(peers.keep_beating())
            closing.push_async_callback(lambda: asyncio.wait({beating}))
            closing.callback(beating.cancel)
            await hop.open()
            closing.push_async_callback(hop.close)
            await transport.open()
            closing.push_async_callback(transport.close)
            closing.push_async_callback(gpus.close)
            closing.push_async_callback(generations.close)
            sweeping = asyncio.create_task(keep_sweeping(store, blobs, clock))
            closing.push_async_callback(lambda: asyncio.wait({sweeping}))
            closing.callback(sweeping.cancel)
            finishing = asyncio.create_task(people.keep_finishing())
            closing.push_async_callback(lambda: asyncio.wait({finishing}))
            closing.callback(finishing.cancel)
            ending = asyncio.create_task(batches.keep_ending())
            closing.push_async_callback(lambda: asyncio.wait({ending}))
            closing.callback(ending.cancel)
            forgetting = asyncio.create_task(audit.keep_sweeping())
            closing.push_async_callback(lambda: asyncio.wait({forgetting}))
            closing.callback(forgetting.cancel)
            delivering = asyncio.create_task(outbox.keep_delivering())
            closing.push_async_callback(lambda: asyncio.wait({delivering}))
            closing.callback(delivering.cancel)
            lagging = asyncio.create_task(metrics.watch_loop())
            closing.push_async_callback(lambda: asyncio.wait({lagging}))
            closing.callback(lagging.cancel)
            loop = asyncio.create_task(dispatcher.run())
            closing.push_async_callback(lambda: loop)
            closing.callback(dispatcher.stop)
            yield

    app = FastAPI(title="I'm Fine relay", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.dispatcher = dispatcher
    app.state.page = page
    app.state.metrics = metrics
    openai = api_openai.OpenAIApi(
        sessions,
        limits,
        gpus,
        jobs,
        files,
        models,
        blobs,
        room,
        client,
        proxy,
        waiting,
        usage,
        dispatcher,
        placement,
        settings,
    )
    adapters = Adapters(store, blobs, room, settings, clock)
    app.include_router(api_adapters.router(api_adapters.AdapterApi(openai, adapters)))
    app.include_router(api_openai.router(openai))
    app.include_router(api_batches.router(api_batches.BatchesApi(openai, batches)))
    app.include_router(api_data.router(api_data.DataApi(openai)))
    app.include_router(api_webhooks.router(api_webhooks.WebhooksApi(openai, webhooks)))
    app.include_router(
        api_gpu.router(
            api_gpu.GpuApi(
                enrol_tokens,
                gpus,
                leases,
                checkpoints,
                batches,
                uploads,
                models,
                blobs,
                dispatcher,
                settings,
                clock,
                dialout,
                metrics,
            )
        )
    )
    ui = api_ui.UiApi(
        sessions,
        limits,
        accounts,
        passwords,
        enrol_tokens,
        audit,
        people,
        dispatcher,
        placement,
        gpus,
        jobs,
        models,
        room,
        usage,
        generations,
        hop,
        page,
        settings,
        stopping,
        clock,
    )
    app.include_router(api_ui.router(ui))
    app.include_router(api_admin.router(ui))
    passed_on = api_peer.PeerApi(peers, dialout, generations, settings, stopping, Endings(stopping, STOP_GRACE_S))
    app.include_router(api_peer.router(passed_on))
    app.include_router(
        api_ops.router(api_ops.OpsApi(Health(store, blobs, settings, stopping), vitals, sessions, settings))
    )
    truthful(app)
    app.add_exception_handler(errors.RelayError, _render)
    app.add_exception_handler(RequestValidationError, _render_validation)
    app.add_exception_handler(HTTPException, _render_http)
    app.add_middleware(
        logs.RequestLine,
        log=log,
        watch=metrics,
        fault=_fault,
        left=(ClientDisconnect,),
        headers=HEADERS,
        by_https=BY_HTTPS,
    )
    return app


def _render(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, errors.RelayError)
    request.app.state.metrics.refused(exc.code)
    return JSONResponse(exc.body(), exc.status, headers=dict(exc.headers))


def _render_validation(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, RequestValidationError)
    # The first part of a location says query, path or body; the field's name is what a caller knows.
    found = [{**error, "loc": error["loc"][1:]} for error in exc.errors()]
    message, param = wire.validation_message(found)
    return _render(request, errors.InvalidRequest(message, param=param))


def _render_http(request: Request, exc: Exception) -> Response:
    """What the framework refuses by itself: unknown routes and methods."""
    assert isinstance(exc, HTTPException)
    if exc.status_code == 404 and (shown := request.app.state.page.unknown(request)):
        return shown  # type: ignore[no-any-return]
    route = f"{request.method} {request.url.path[:200]}"
    known = {
        404: (f"no route {route}: the page at / names those that exist", "no_such_route"),
        405: (f"no route {route}: the path exists, with another method", "method_not_allowed"),
    }
    message, code = known.get(exc.status_code, (str(exc.detail), "bad_request"))
    body = wire.error_body(message, type="invalid_request_error", code=code)
    return JSONResponse(body, exc.status_code, headers=dict(exc.headers or {}))


def _fault(request_id: str) -> Response:
    fault = errors.RelayError(f"the relay has a fault; its log says more about {request_id}")
    return JSONResponse(fault.body(), fault.status)
