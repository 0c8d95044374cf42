"""App: the server of the audit pages, and what keeps it safe.

Belongs here: which requests are served, the headers of every answer, and how errors are shown. Not: what is on a
page (pages.py).

Only requests to 127.0.0.1 or localhost are served, and a change only if a page of this server sent it. Other sites
cannot make one: a host name of theirs is refused even if it points here, and what they post has another origin and
lacks the token, which only this server's pages have. Every account of this machine can use the pages, as with
Dagster's and MLflow's.
"""

import hmac
import logging
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import duckdb
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles

from rsft_pipeline.audit.ids import AuditError
from rsft_pipeline.home import Home
from rsft_pipeline.store import Store
from web import pages
from web.show import render

LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with `no-referrer`, browsers would send `Origin: null`
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
}
STATIC = Path(__file__).parent / "static"
LARGEST_FORM = 40_000  # bytes; a reason of 2,000 characters, each 3 bytes that are escaped as 9, takes 18,000

log = logging.getLogger(__name__)


class Refused(Exception):
    """A request that this server does not serve; the message says why."""


def create(
    store: Store,
    home: Home,
    *,
    witnesses: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda made: {},
    revoke: Callable[..., object] | None = None,
) -> FastAPI:
    """The audit pages of a store.

    Args:
        witnesses: gives the Merkle root of a checkpoint (a row of `checkpoints`) as other places have it: place → root.
        revoke: called for a confirmed revocation with the thing (audit/ids.py), `who`, `why` and `erase`. None: the
            pages are read only.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.store, app.state.home = store, home
    app.state.witnesses, app.state.revoke = witnesses, revoke
    app.state.token = secrets.token_urlsafe(32) if revoke else None
    app.include_router(pages.router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.get("/favicon.ico")(lambda: FileResponse(STATIC / "icon.svg"))  # browsers ask for it on pages of plain text
    for route in (*pages.router.routes, *app.routes):
        if "GET" in (methods := getattr(route, "methods", None) or set()):
            methods.add("HEAD")

    @app.middleware("http")
    async def guard(request: Request, call_next) -> Response:
        try:
            await _check(request)
            response = await call_next(request)
        except Refused as refusal:
            response = _error(request, 403, str(refusal))
        except Exception:
            log.exception("%s %s", request.method, request.url.path)
            response = _error(request, 500, "This page failed. The server's log says why.")
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(AuditError)
    def unanswerable(request: Request, error: AuditError) -> Response:
        return _error(request, 404, str(error))

    @app.exception_handler(duckdb.Error)
    def broken(request: Request, error: duckdb.Error) -> Response:
        log.error("%s %s: %s", request.method, request.url.path, error)
        return _error(request, 500, f"The store of {home.path} failed: {error}")

    @app.exception_handler(ConnectionError)
    def unreachable(request: Request, error: ConnectionError) -> Response:
        return _error(request, 503, str(error))

    @app.exception_handler(404)
    def absent(request: Request, error: Exception) -> Response:
        return _error(request, 404, "There is no such page.")

    @app.exception_handler(405)
    def wrong_method(request: Request, error: Exception) -> Response:
        return _error(request, 405, "Nothing can be changed at this address.")

    return app


async def _check(request: Request) -> None:
    """Raise Refused for a request to another host, an address with a NUL, or a change that is not allowed."""
    host = request.headers.get("host", "")
    if not LOOPBACK.fullmatch(host):
        raise Refused(f"These pages answer to 127.0.0.1 and localhost, not to {host!r}.")
    if "\0" in unquote(str(request.url)):
        raise Refused("An address cannot contain a NUL.")
    if request.method in ("GET", "HEAD"):
        return
    if request.app.state.token is None:
        raise Refused("These pages are read only: start them with `rsft audit ui --allow-revoke` to revoke.")
    if request.headers.get("origin") != f"http://{host}":
        raise Refused("This request was not sent by a page of this server.")
    if int(request.headers.get("content-length") or LARGEST_FORM + 1) > LARGEST_FORM:
        raise Refused("This form is too large.")
    form = parse_qs((await request.body()).decode("utf-8", "replace"), keep_blank_values=True)
    request.state.form = {name: values[0] for name, values in form.items()}
    if not hmac.compare_digest(request.state.form.get("token", "").encode(), request.app.state.token.encode()):
        raise Refused("This form was not made by the server that is running now: load the page again.")


def _error(request: Request, status: int, message: str) -> Response:
    page = render("error.html", message=message, status=status, **pages.around(request))
    return HTMLResponse(page, status_code=status)
