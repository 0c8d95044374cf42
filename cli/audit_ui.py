"""`rsft audit ui`: the audit pages, on loopback, until interrupted."""

from collections.abc import Callable
from typing import Annotated

import typer

from cli import here
from resources.pages import HOST
from rsft_pipeline.audit import revoke as revoking
from rsft_pipeline.audit.ids import Thing
from rsft_pipeline.home import Home
from rsft_pipeline.store import Store


def _revoking(store: Store) -> Callable[..., None]:
    """What the pages revoke with: as `rsft audit revoke` does, in the store and then in MLflow and Dagster."""

    def revoke(thing: Thing, *, who: str, why: str, erase: bool) -> None:
        try:
            here.tracking().check()
        except OSError as error:
            raise ConnectionError(f"{error}. Nothing was revoked.") from None
        with here.instance() as instance:
            here.tell(instance, store, revoking.revoke(store, thing, who=who, why=why, erase=erase))

    return revoke


def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the pages.")] = 5001,
    allow_revoke: Annotated[bool, typer.Option("--allow-revoke", help="Allow revoking from the pages.")] = False,
) -> None:
    """Serve the audit pages on 127.0.0.1: rounds, candidates, prompts, checkpoints. Ctrl-C stops them."""
    import uvicorn

    from cli.audit import tracked_root
    from web.app import create

    with here.store() as store:
        revoke = _revoking(store) if allow_revoke else None
        app = create(store, Home.here(), witnesses=tracked_root, revoke=revoke)
        how = "revoking allowed" if allow_revoke else "read only"
        print(f"Audit pages, {how}: http://{HOST}:{port}\nCtrl-C stops them.", flush=True)
        uvicorn.run(app, host=HOST, port=port, log_level="warning", server_header=False)
