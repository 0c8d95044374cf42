"""Progress: a bar if a person watches a terminal, otherwise a line every ten seconds.

After the command line has called `watch()`, both go to standard error; in Dagster's own processes, lines go to the
step's log.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds
Show = Callable[..., None]
_console: Console | None = None


def watch() -> None:
    """Show progress on this process's standard error from now on."""
    global _console
    _console = Console(stderr=True)


@contextmanager
def track(what: str, total: int | None, log: logging.Logger) -> Iterator[Show]:
    """Report the progress of a piece of work: yields `show(done, note="", total=None)`.

    After `watch()` on a terminal, a bar with the note after it; otherwise a line at most every ten seconds, on standard
    error after `watch()`, else in the log.
    """
    if _console is None or not _console.is_terminal:
        yield _lines(what, total, _print if _console else log.info)
        return
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=_console) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda done, note="", total=None: bar.update(
            task, completed=done, note=note, **({} if total is None else {"total": total})
        )


def warn(line: str, log: logging.Logger) -> None:
    """A warning in the log and, after `watch()`, on standard error."""
    log.warning(line)
    if _console:
        _print(line)


def _print(line: str) -> None:
    with suppress(OSError):  # a closed standard error must not end a round
        print(line, file=_console.file, flush=True)


def _lines(what: str, total: int | None, say: Callable[[str], None]) -> Show:
    of, last = total, time.monotonic()

    def show(done: int, note: str = "", total: int | None = None) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY:
            last = time.monotonic()
            say(f"{what}: {done} of {total or of or '?'} {note}".rstrip())

    return show
