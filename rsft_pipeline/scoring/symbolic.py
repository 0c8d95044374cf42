"""Symbolic answers: whether two mathematical expressions are equal, by math-verify.

Belongs here: finding the final expression of a text, and comparing it in a child process. The child is there
to be killed: an expression such as 9^{9^{9^{9}}} keeps SymPy busy for ever, and math-verify's own limit is
a SIGALRM, which works in a main thread only and takes the alarm of whoever else uses it.
"""

import importlib.metadata
import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack

SECONDS = 10.0  # for one pair
START_SECONDS = 120.0  # for the child to import SymPy
MEMORY = 4 * 2**30  # bytes of address space that the child may take


def require() -> str:
    """The release of math-verify. Raises ImportError, with the remedy, when it is not installed."""
    try:
        return importlib.metadata.version("math-verify")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("`match: math` needs math-verify: pip install 'rsft-pipeline[math]'") from None


def equal(pairs: Sequence[tuple[str, str | None]]) -> list[float | None]:
    """1.0 where completion and reference end in equal expressions, else 0.0.

    None without a reference, with one that is not an expression, or when comparing takes too long.

    Args:
        pairs: (completion, reference).
    """
    scores: list[float | None] = []
    with ExitStack() as children:
        child = None
        for completion, reference in pairs:
            if reference is None or not (expected := final_expression(reference)):
                scores.append(None)
                continue
            if child is None or child.poll() is not None:
                child = children.enter_context(_start())
                children.callback(child.kill)
            scores.append(_ask(child, [expected, final_expression(completion)]))
    return scores


# A single dollar opens and closes mathematics as in Pandoc, so that $5 and $10 are money. No \( or \[ stands inside
# another of its kind, or a text of openings alone would be searched to its end from each of them.
_INLINE = re.compile(
    r"""
    \$\$ (.+?) \$\$
    | (?<![\\$]) \$ (?!\s) ([^$\n]*? [^$\s\\]) \$ (?!\d)
    | \\\( ( (?: (?!\\\() . )+? ) \\\)
    | \\\[ ( (?: (?!\\\[) . )+? ) \\\]
    """,
    re.DOTALL | re.VERBOSE,
)


def final_expression(text: str) -> str:
    r"""The expression that a text gives as its answer, or "".

    The content of its last \boxed{}, else what follows its last `####`, else its last $…$, \(…\) or \[…\], else
    its last line, behind «is» or `:`. Never the whole text: among all its numbers one is right by chance.
    """
    if (boxed := _boxed(text)) is not None:
        return boxed
    if marked := re.findall(r"####([^\n]*)", text):
        return marked[-1].strip()
    if inline := _INLINE.findall(text):
        return "".join(inline[-1]).strip()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return re.sub(r"^.*(?:\bis|:)\s", "", lines[-1]).strip().removesuffix(".") if lines else ""


def _boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} whose braces close."""
    found = (-1, -1)
    open_: list[tuple[bool, int]] = []  # whether it is a box's brace, and where its content begins
    for brace in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):
        if brace[0] == "{" or brace[0].startswith(r"\boxed"):
            open_.append((brace[0] != "{", brace.end()))
        elif brace[0] == "}" and open_:
            boxed, begin = open_.pop()
            found = max(found, (begin, brace.start())) if boxed else found
    begin, end = found
    return text[begin:end].strip() if begin >= 0 else None


def _start() -> subprocess.Popen:
    # -P: this folder is not to be searched for modules.
    child = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    if _answer(child, START_SECONDS) != "ready":
        raise RuntimeError("the process that runs math-verify did not start; its reason is on standard error")
    return child


def _ask(child: subprocess.Popen, expressions: list[str]) -> float | None:
    print(json.dumps(expressions), file=child.stdin, flush=True)
    return _answer(child, SECONDS)


def _answer(child: subprocess.Popen, seconds: float):
    """The next line that the child writes, as JSON; None when it is killed for taking longer, or dies."""
    late = threading.Event()

    def stop() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        line = child.stdout.readline()
    finally:
        timer.cancel()
        timer.join()
    if late.is_set() or not line:
        child.wait()  # so that the next question finds it ended, even if this answer came just in time
    return json.loads(line) if line.endswith("\n") else None


def _child() -> None:
    """Reads [expected, given] a line, and writes 1.0, 0.0 or null a line, until its input ends."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # what cannot be parsed is an answer, not an event
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to standard error

    # Only what is boxed is looked at, and it is boxed here: nothing is found in the middle of a text.
    only_boxed = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def expression(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", only_boxed, parsing_timeout=None)

    print('"ready"', file=replies, flush=True)
    for line in sys.stdin:
        expected, given = json.loads(line)
        reply = None
        if wanted := expression(expected):
            try:
                reply = float(verify(wanted, expression(given), timeout_seconds=None, raise_on_error=True))
            except (MemoryError, RecursionError):
                reply = None
            except Exception:
                reply = 0.0
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _child()
