"""The HTTP API: health, readiness, metrics, the fleet's models, the protocol's schema."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web

from src.orchestrator import metrics as metrics_module
from src.orchestrator.auth import ApiKeys, check_fetch_site, check_origin, presented_key
from src.orchestrator.metrics import Metrics
from src.orchestrator.web_page import WEB, WebPage
from src.rpc.errors import DuplexError, Internal, InvalidArgument, NotFound
from src.rpc.ws_events import json_schema

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HEALTH, READY, LLM_HOST = "/healthz", "/readyz", "/v1/llm"
TRANSPORTS, TOKEN = "/v1/transports", "/v1/livekit/token"
_OPEN = ("/", HEALTH, READY, TRANSPORTS, LLM_HOST)
_WHY_DOWN = "the LiveKit server does not answer, or refuses this one; /readyz and the log say more"
_PLACES = (
    ("/v1/session", "a spoken session (WebSocket; docs/protocol.md)"),
    (TOKEN, "a spoken session in a LiveKit room: a token for it (docs/livekit.md)"),
    (TRANSPORTS, "which of the two there are"),
    ("/v1/protocol.json", "its events as a JSON schema"),
    ("/v1/models", "models of the fleet; POST /v1/models/ID/load and /unload"),
    (LLM_HOST, "language-model hosts connect here (WebSocket)"),
    (HEALTH, "the process is alive"),
    (READY, "it can hold a conversation, or what is missing"),
    ("/metrics", "Prometheus"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """`text` is for a person: what is there, or what is missing and how to get it."""

    ok: bool
    text: str
    needed: bool = True
    """False: without it the server is ready all the same."""


Checks = Mapping[str, Callable[[], Check]]


class ModelAdmin(Protocol):
    """The fleet's models."""

    async def models(self) -> list[dict[str, Any]]: ...

    def workers(self) -> list[dict[str, Any]]: ...

    async def load(self, model_id: str) -> dict[str, Any]:
        """Raises UnknownName, Unavailable, Exhausted, CorruptModel."""
        ...

    async def unload(self, model_id: str) -> dict[str, Any]:
        """Raises UnknownName, InUse."""
        ...


class TokenDesk(Protocol):
    """`Rooms`, where there are rooms."""

    def check(self) -> Check: ...

    async def token(self, request: web.Request, who: str) -> web.Response:
        """Raises DuplexError."""
        ...


class HttpApi:
    def __init__(
        self,
        *,
        keys: ApiKeys,
        checks: Checks,
        metrics: Metrics,
        models: ModelAdmin,
        page: WebPage | None = None,
        rooms: TokenDesk | None = None,
        no_rooms: str = "",
        websocket: bool = True,
    ) -> None:
        """`no_rooms`: why there are none, and how to get them."""
        self._keys = keys
        self._checks = checks
        self._metrics = metrics
        self._models = models
        self._page = page if page and page.exists else None
        self._rooms = rooms
        self._no_rooms = no_rooms or "this server takes part in no LiveKit rooms"
        self._websocket = websocket
        self._schema = json.dumps(json_schema())

    def add_to(self, app: web.Application) -> None:
        router = app.router
        router.add_get(HEALTH, self.healthz)
        router.add_get(READY, self.readyz)
        router.add_get("/metrics", self.metrics)
        router.add_get("/v1/protocol.json", self.protocol)
        router.add_get("/v1/models", self.list_models)
        router.add_post("/v1/models/{model_id}/load", self.load_model)
        router.add_post("/v1/models/{model_id}/unload", self.unload_model)
        router.add_get(TRANSPORTS, self.transports)
        router.add_get(TOKEN, self.token)
        router.add_post(TOKEN, self.token)
        if self._page:
            self._page.add_to(app)
        else:
            router.add_get("/", self.index)

    async def index(self, request: web.Request) -> web.StreamResponse:
        """Where there is no page: what is here."""
        width = max(len(place) for place, _ in _PLACES)
        lines = [f"{place:<{width}}  {what}" for place, what in _PLACES]
        return web.Response(text="\n".join(["Realtime duplex voice", "", *lines, ""]))

    async def healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def readyz(self, request: web.Request) -> web.Response:
        """Open to probes; what is behind it is told only to those with a key."""
        found = {name: check() for name, check in self._checks.items()}
        ready = all(check.ok or not check.needed for check in found.values())
        body: dict[str, Any] = {"ready": ready}
        if self._keys.accepts(presented_key(request.headers)):
            body["checks"] = {
                name: {"ok": check.ok, "text": check.text} for name, check in found.items()
            }
        return web.json_response(body, status=200 if ready else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        headers = {"Content-Type": metrics_module.CONTENT_TYPE}
        return web.Response(body=self._metrics.expose(), headers=headers)

    async def protocol(self, request: web.Request) -> web.Response:
        return web.Response(text=self._schema, content_type="application/schema+json")

    async def list_models(self, request: web.Request) -> web.Response:
        body = {"models": await self._models.models(), "workers": self._models.workers()}
        return web.json_response(body)

    async def load_model(self, request: web.Request) -> web.Response:
        return web.json_response(await self._models.load(request.match_info["model_id"]))

    async def unload_model(self, request: web.Request) -> web.Response:
        return web.json_response(await self._models.unload(request.match_info["model_id"]))

    async def transports(self, request: web.Request) -> web.Response:
        """Open, as the page is: it asks before it has a key. `why` names no address."""
        livekit = self._rooms is not None and self._rooms.check().ok
        why = "" if livekit else _WHY_DOWN if self._rooms else self._no_rooms
        body = {"ws": self._websocket, "livekit": livekit, "why": why, "key": self._keys.required}
        return web.json_response(body, headers={"Cache-Control": "no-store"})

    async def token(self, request: web.Request) -> web.Response:
        who = self._keys.check(presented_key(request.headers))
        if self._rooms is None:
            raise NotFound(self._no_rooms)
        return await self._rooms.token(request, who)


def error_response(error: DuplexError, status: int | None = None) -> web.Response:
    """{error: {code, message, retry_after_ms}}, and Retry-After in whole seconds."""
    body = {"code": error.code, "message": error.message, "retry_after_ms": error.retry_after_ms}
    headers = {}
    if error.retry_after_ms is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_ms / 1000))
    if error.http == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response({"error": body}, status=status or error.http, headers=headers)


def error_middleware(metrics: Metrics) -> Any:
    """Every failure leaves as JSON, whoever raised it."""

    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except DuplexError as error:
            metrics.refused.labels(error.code).inc()
            return error_response(error)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            kind = NotFound if error.status == 404 else InvalidArgument
            text = f"{request.method} {request.path}: {error.text or error.reason}"
            return error_response(kind(text), status=error.status)
        except Exception:  # the edge: nothing above could answer any more
            log.exception("request failed", extra={"path": request.path})
            return error_response(Internal("the request failed; see the server's log"))

    return handle


def auth_middleware(keys: ApiKeys, allowed_origins: tuple[str, ...]) -> Any:
    """A key for everything but the probes and the page itself; a fitting Origin for everything.

    A language-model host may bring its key in its first message, so /v1/llm checks for itself.
    """

    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin", "")
        check_origin(origin, allowed_origins, key_required=keys.required)
        path = request.path
        if path not in _OPEN and not path.startswith(WEB):
            check_fetch_site(request.headers, key_required=keys.required)
            keys.check(presented_key(request.headers))
        return await handler(request)

    return handle
