"""The `rsft` command."""

import importlib.metadata
import os
import sys
from typing import Annotated

import typer

from cli import audit, audit_ui, check, lineage, run, status, ui
from rsft_pipeline.audit.ids import AuditError
from rsft_pipeline.environment import settle_environment
from rsft_pipeline.models import ModelError
from rsft_pipeline.prompts import PromptError
from rsft_pipeline.recipe.section import RecipeError
from rsft_pipeline.rounds import RoundError
from rsft_pipeline.store import INTERRUPTED, StoreError

app = typer.Typer(
    help="Rejection-sampling fine-tuning: draw, score, accept, fine-tune, evaluate, promote, repeat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("status")(status.status)
app.command("check")(check.check)
app.command("schema")(check.schema)
app.command("ui")(ui.ui)
for command in (lineage.trace, lineage.impact, lineage.revoke, lineage.export, audit_ui.ui):
    audit.app.command()(command)
app.add_typer(audit.app, name="audit")


def _version(asked: bool) -> None:
    if asked:
        print(importlib.metadata.version("rsft-pipeline"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Print the version and exit.")] = False,
) -> None:
    """Options of `rsft` itself, given before a command."""


def main() -> None:
    """Entry point: an error that the user can fix is printed as one message, without a traceback."""
    settle_environment()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, and the next file to be opened would take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the process ends)
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a terminal may have no → or …
    try:
        _check_words(sys.argv)
        app()
    except (RecipeError, StoreError, AuditError, RoundError, PromptError, ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if INTERRUPTED not in str(error):
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _check_words(words: list[str]) -> None:
    """Raise OSError for an argument that is not UTF-8: Python keeps such bytes as lone surrogates."""
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise OSError(f"{os.fsencode(word)!r} is not UTF-8: type it in a terminal that is set to UTF-8") from None


if __name__ == "__main__":
    main()
