"""`rsft audit ui`: the audit pages, on loopback, until interrupted."""

from typing import Annotated

import typer

from cli.run import _store
from rsft_pipeline.home import Home

HOST = "127.0.0.1"


def ui(
    port: Annotated[int, typer.Option(help="Port of the pages.")] = 5001,
    allow_revoke: Annotated[bool, typer.Option("--allow-revoke", help="Let the pages revoke, too.")] = False,
) -> None:
    """Serve pages to look at rounds, candidates and checkpoints, on 127.0.0.1; Ctrl-C stops them."""
    import uvicorn

    from web.app import create

    with _store() as store:
        app = create(store, Home.here(), allow_revoke=allow_revoke)
        how = "revoking allowed" if allow_revoke else "read only"
        print(f"Audit pages, {how}: http://{HOST}:{port}\nCtrl-C stops them.", flush=True)
        uvicorn.run(app, host=HOST, port=port, log_level="warning", server_header=False)
