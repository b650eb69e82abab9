"""The command that serves the local page."""

import os
from functools import partial
from typing import Annotated

import typer

from rapidindex.cli import options as opt
from rapidindex.cli.app import command
from rapidindex.cli.printing import say
from rapidindex.config import ModelConfig
from rapidindex.errors import ResourceError, UsageError

in_page = partial(typer.Option, rich_help_panel="Page")


@command(
    "Ask",
    "rapidindex serve index --open",
    "rapidindex serve index --port 9000 --device cpu",
)
def serve(
    path: opt.IndexPath,
    port: Annotated[int, in_page(min=1, max=65535, help="Port to listen on.")] = 8642,
    browse: Annotated[bool, in_page("--open", help="Open the page in the browser.")] = False,
    host: Annotated[
        str | None, in_page(help="Listen for other machines, too; needs --token.", show_default="this machine")
    ] = None,
    token: Annotated[
        str | None, in_page(help="What opens the page, 16 characters or more.", show_default="drawn anew")
    ] = None,
    model: opt.MovedModel = None,
    adapter: opt.MovedAdapter = None,
    device: opt.Device = ModelConfig.device,
    ray: opt.SearchRay = None,
) -> None:
    """Serve a page over an index: ask, click a word of the answer, see the training examples behind it."""
    if host is not None and token is None:
        raise UsageError(f"--host {host} lets others in, and no token is given.", hint="Add --token SECRET.")
    if token is not None and (len(token) < 16 or not (token.isascii() and token.isprintable() and " " not in token)):
        raise UsageError("--token has fewer than 16 characters, or some that fit no address.", hint="Take a longer.")
    try:
        from rapidindex.serve.app import serve as run
    except ImportError as error:
        raise UsageError(f"The page needs the package {error.name}.", hint="pip install 'rapidindex[serve]'") from error
    from rapidindex.cluster import connect
    from rapidindex.query.index import Index

    if ray is not None:
        connect(ray)

    def opened() -> Index:
        index = Index.open(path, model=model, adapter=adapter, device=device)
        index.ray = ray
        return index

    try:
        run(
            opened,
            host=host or "127.0.0.1",
            port=port,
            token=token,
            browse=browse,
            say=say,
        )
    except OSError as error:
        raise ResourceError(
            f"Port {port} cannot be used: {error.strerror or error}.", hint="Choose another with --port."
        ) from error
    except KeyboardInterrupt:
        say("Ended.")
    os._exit(130)  # a thread that still computes would hold the process until its heat-map is ready
