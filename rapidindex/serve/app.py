"""The routes of the page, and the server that listens for it."""

import asyncio
import json
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.resources import files
from typing import Any

import uvicorn
from anyio import CancelScope
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rapidindex.errors import RapidIndexError, UsageError
from rapidindex.gradients.losses import is_out_of_memory
from rapidindex.query.index import Index
from rapidindex.serve.desk import Desk, Piece, started_thread
from rapidindex.serve.guard import MOST_STREAMS, Guard
from rapidindex.views import html

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_STATIC = ("page.css", "page.js", "dom.js", "matches.js", "sift.js")


def make_app(desk: Desk, *, token: str, host: str, port: int) -> Guard:
    """Return the application that answers a page's questions."""
    routes = [Route("/", _page), Route("/static/{name}", _static), Route("/api/state", _once(lambda d, _: d.state()))]
    once = {"words": Desk.words, "verify": Desk.verify, "reload": lambda d, _: d.reload()}
    routes += [Route(f"/api/{name}", _once(work), methods=["POST"]) for name, work in once.items()]
    streams = {"answer": Desk.answer, "ask": Desk.ask, "word": Desk.word}
    routes += [Route(f"/api/{name}", _stream(work), methods=["POST"]) for name, work in streams.items()]
    routes += [Route("/api/report", _report, methods=["POST"]), Route("/api/json", _json, methods=["POST"])]
    app = Starlette(routes=routes)
    app.state.desk, app.state.crew = desk, _Crew()
    guard = Guard(app, token=token, host=host, port=port)
    app.state.cookie = guard.cookie, token
    return guard


async def _page(request: Request) -> Response:
    response = Response(_file("page.html"), media_type="text/html")
    response.set_cookie(*request.app.state.cookie, httponly=True, samesite="strict", path="/")
    return response


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        return Response(status_code=404)
    text = _file(name) + (html.ramp() if name == "page.css" else "")
    return Response(text, media_type=_TYPES[name.rpartition(".")[2]])


def _file(name: str) -> str:
    return (files("rapidindex.serve") / "static" / name).read_text(encoding="utf-8")


def _once(work: Callable[[Desk, Piece], Any]) -> Callable:
    async def answer(request: Request) -> Response:
        desk = request.app.state.desk
        try:
            asked = await _asked(request) if request.method == "POST" else {}
            return JSONResponse(await request.app.state.crew(work, desk, asked))
        except Exception as error:
            return JSONResponse(_said(desk, error), 400)

    return answer


def _stream(work: Callable[[Desk, Piece], Iterator[Piece]]) -> Callable:
    """Return a route that sends one line of JSON for each piece of work, and stops it when nobody listens."""

    def lines(desk: Desk, asked: Piece) -> Iterator[str]:
        try:
            for piece in work(desk, asked):
                yield json.dumps(piece, ensure_ascii=True, allow_nan=False) + "\n"
        except Exception as error:
            yield json.dumps(_said(desk, error)) + "\n"

    async def pieces(crew: _Crew, lines: Iterator[str]) -> AsyncIterator[str]:
        while (line := await crew(next, lines, None)) is not None:
            yield line

    async def answer(request: Request) -> Response:
        desk = request.app.state.desk
        try:
            asked = await _asked(request)
        except RapidIndexError as error:
            return JSONResponse(_said(desk, error), 400)
        return StreamingResponse(pieces(request.app.state.crew, lines(desk, asked)), media_type="application/x-ndjson")

    return answer


async def _report(request: Request) -> Response:
    return await _download(request, Desk.report, "text/html", "report.html")


async def _json(request: Request) -> Response:
    def work(desk: Desk, asked: Piece) -> str:
        return desk.result(str(asked.get("key")), str(asked.get("direction"))).to_json(indent=2)

    return await _download(request, work, "application/json", "result.json")


async def _download(request: Request, work: Callable[[Desk, Piece], str], kind: str, name: str) -> Response:
    desk = request.app.state.desk
    try:
        text = await request.app.state.crew(work, desk, await _asked(request))
    except RapidIndexError as error:
        return JSONResponse(_said(desk, error), 400)
    return Response(text, media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})


async def _asked(request: Request) -> Piece:
    """Return the JSON object of a request's body. UsageError for anything else."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise UsageError("A question is sent as application/json.")
    try:
        asked = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise UsageError("A question is one object of JSON.") from error
    if not isinstance(asked, dict):
        raise UsageError("A question is one object of JSON.")
    return asked


def _said(desk: Desk, error: Exception) -> Piece:
    """Return an error for the page: an expected one in its words, another by its kind alone."""
    if isinstance(error, RapidIndexError):
        message, hint = desk.public(error.message), desk.public(error.hint)
    elif is_out_of_memory(error):
        message, hint = "Memory does not suffice for this question.", "Shorten it, or close what else uses the memory."
    else:
        message, hint = f"The server met an unexpected {type(error).__name__}.", "Ask again, or start it anew."
    return {"kind": "error", "error": type(error).__name__, "message": message, "hint": hint}


class _Crew:
    """Threads in which requests are answered, so that the server goes on listening. They run from the start.

    The one that was idle last works next: memory that the C library keeps for a thread is used again.
    """

    def __init__(self) -> None:
        self.idle = [started_thread() for _ in range(MOST_STREAMS + 4)]

    async def __call__(self, work: Callable[..., Any], *given: Any) -> Any:
        """Do some work in a thread, and return what it returns."""
        await checkpoint()  # where nobody listens any more, this ends here
        while not self.idle:
            await asyncio.sleep(0.01)
        thread = self.idle.pop()
        try:
            with CancelScope(shield=True):  # what is under way keeps its thread until it is done
                return await asyncio.wrap_future(thread.submit(work, *given))
        finally:
            self.idle.append(thread)


class _Server(uvicorn.Server):
    """Ends within two seconds of a signal, whatever heat-map is under way: a thread of Python cannot be stopped."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        limit = threading.Timer(1.5, os._exit, [130])
        limit.daemon = True
        limit.start()
        super().handle_exit(sig, frame)


def serve(
    open_index: Callable[[], Index],
    *,
    host: str = "127.0.0.1",
    port: int = 8642,
    token: str | None = None,
    browse: bool = False,
    say: Callable[[str], None],
) -> None:
    """Serve the page until Ctrl-C. `say` gets its address. OSError where the port is taken."""
    desk, token = Desk(open_index), token or secrets.token_urlsafe(24)
    config = uvicorn.Config(
        make_app(desk, token=token, host=host, port=port),
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=1,
        ws="none",
        lifespan="off",
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family)
    name = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
    url = f"http://{name}:{port}/?token={token}"
    threading.Thread(target=desk.load, daemon=True).start()
    say(f"Open {url}")
    say("Ctrl-C ends it.")
    if browse:
        threading.Timer(0.5, webbrowser.open, [url]).start()
    _Server(config).run(sockets=[listening])
