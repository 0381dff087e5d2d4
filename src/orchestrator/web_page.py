"""The browser page: files of one directory, with the headers that keep other scripts out of it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

WEB = "/web/"
# Told, not guessed: what a machine has in its MIME tables differs, and a module script with the
# wrong type is not run.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".wasm": "application/wasm",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".wav": "audio/wav",
    ".mp3": "audio/mpeg",
    ".woff2": "font/woff2",
    ".md": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}


class WebPage:
    def __init__(self, root: Path, livekit_url: str = "") -> None:
        """`livekit_url`: what clients are told, "" without rooms."""
        self._root = root.resolve()
        self._headers = {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": _policy(livekit_url),
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    @property
    def exists(self) -> bool:
        return (self._root / "index.html").is_file()

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/", self.index)
        app.router.add_get(WEB + "{path:.*}", self.file)

    async def index(self, request: web.Request) -> web.StreamResponse:
        return self._serve("index.html")

    async def file(self, request: web.Request) -> web.StreamResponse:
        return self._serve(request.match_info["path"])

    def _serve(self, path: str) -> web.StreamResponse:
        """Raises HTTPNotFound, also for what lies outside, is hidden or is of no known kind."""
        try:
            found = self._find(path)
        except (OSError, ValueError, RuntimeError):  # no name of a file, or a circle of links
            found = None
        if found is None:
            raise web.HTTPNotFound
        headers = {**self._headers, "Content-Type": _TYPES[found.suffix]}
        return web.FileResponse(found, headers=headers)

    def _find(self, path: str) -> Path | None:
        found = (self._root / path).resolve()
        hidden = any(part.startswith(".") for part in Path(path).parts)
        if hidden or not found.is_relative_to(self._root) or found.suffix not in _TYPES:
            return None
        return found if found.is_file() else None


def _policy(livekit_url: str) -> str:
    connect = ["'self'", "ws:", "wss:"]
    if livekit_url:
        # The client first asks by HTTP why a socket was refused, at the same address.
        where = urlsplit(livekit_url).netloc.rpartition("@")[2]
        connect += [f"{scheme}://{where}" for scheme in ("http", "https", "ws", "wss")]
    return "; ".join(
        (
            "default-src 'self'",
            "script-src 'self'",
            "style-src 'self'",
            "worker-src 'self' blob:",
            f"connect-src {' '.join(connect)}",
            "media-src 'self' blob:",
            "img-src 'self' data:",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
