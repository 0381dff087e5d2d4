"""The aiohttp application: session endpoint, HTTP API and the hosts' entry under one roof."""

from __future__ import annotations

from aiohttp import web

from src.orchestrator.auth import ApiKeys, presented_key
from src.orchestrator.http_api import (
    LLM_HOST,
    Handler,
    HttpApi,
    auth_middleware,
    error_middleware,
)
from src.orchestrator.metrics import Metrics
from src.orchestrator.ws_endpoint import WsEndpoint
from src.rpc.errors import NotFound

SESSION = "/v1/session"
NO_WEBSOCKET = "this server takes sessions in LiveKit rooms only; start it with --ws for this"


def make_app(
    *,
    api: HttpApi,
    sessions: WsEndpoint | None,
    keys: ApiKeys,
    metrics: Metrics,
    allowed_origins: tuple[str, ...] = (),
    llm_host: Handler | None = None,
) -> web.Application:
    """Errors outermost, then who may come in, then the routes. `sessions` None: rooms only."""
    app = web.Application(
        middlewares=[error_middleware(metrics), auth_middleware(keys, allowed_origins)]
    )
    api.add_to(app)

    async def session(request: web.Request) -> web.StreamResponse:
        if sessions is None:
            raise NotFound(NO_WEBSOCKET)
        return await sessions.handle(request, keys.check(presented_key(request.headers)))

    app.router.add_get(SESSION, session)
    if llm_host is not None:
        app.router.add_get(LLM_HOST, llm_host)
    return app
