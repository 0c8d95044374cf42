"""Functions: the user's own functions, named `module:function` in a recipe.

Belongs here: finding such a function, and hashing its source. Not: what it is called with;
prompts, scoring and bootstrap each say what they expect of theirs.
"""

import functools
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rsft_pipeline.lineage import digest, file_digest

REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class FunctionError(ValueError):
    """A `module:function` that cannot be used: the message says what was looked for, and where."""


def load(reference: str, folder: Path) -> Callable:
    """The function that `module:function` names.

    A file `module.py` in the folder wins over an installed module, and is read anew on every call, so that the
    function is always the one whose source is hashed. The folder does not become importable: such a file cannot
    import its neighbours. An installed module is imported once per process, as usual.

    Raises:
        FunctionError: the name is not of that form, the module or function does not exist, or the module fails to
            import or was edited since it was imported.
    """
    return _found(reference, Path(folder))[1]


def rows(reference: str, folder: Path) -> Iterator[Any]:
    """What the function that `module:function` names yields when called without arguments.

    Raises:
        FunctionError: as for `load`, or the function failed or returned something that is not iterable.
    """
    function = load(reference, folder)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise FunctionError(f"{reference} is called with no arguments: {error}") from None
    except ValueError:  # a builtin without a signature
        pass
    try:
        returned = function()
        if isinstance(returned, Iterable):
            yield from returned
            return
    except (Exception, SystemExit) as error:
        raise FunctionError(f"{reference} failed: {told(error)}") from error
    raise FunctionError(f"{reference} has to yield rows, and returned something of the type {type(returned).__name__}")


def told(error: BaseException) -> str:
    """An error of a user's function and where it was raised, as text, so that no traceback keeps objects alive."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno}, in {place.name})"


def version(reference: str, folder: Path) -> str:
    """SHA-256 of the named module's file and, if the function is written in another file, of that one too.

    What these files import is not included. Raises FunctionError as `load` does, and if there is no source file.
    """
    path = _path(reference, Path(folder))
    files = _files(reference, Path(folder), path.read_bytes() if path.is_file() else b"")
    digests = sorted(file_digest(file) if file == path.resolve() else _imported_digest(file) for file in files)
    return digests[0] if len(digests) == 1 else digest(digests)


@functools.lru_cache(maxsize=64)
def _files(reference: str, folder: Path, source: bytes) -> set[Path]:
    """A function's source files; cached per `source`, since this is called often and running the module may be slow."""
    module, function = _found(reference, folder)
    files = _sources(module, function)
    if files is None or not all(file.is_file() for file in files):
        raise FunctionError(f"{function!r} has no source file, so its version cannot be told: wrap it in a function")
    return files


def _sources(module: ModuleType, function: Callable) -> set[Path] | None:
    """The module's file and the one that the function is written in; None if it has no source file."""
    try:
        written = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        written = None
    return written and {Path(file).resolve() for file in (getattr(module, "__file__", None), written) if file}


def _path(reference: str, folder: Path) -> Path:
    """The file in the folder that a reference would mean; it need not exist."""
    if not REFERENCE.fullmatch(reference):
        raise FunctionError(f"{reference!r} is not of the form `module:function`")
    return folder.joinpath(*reference.partition(":")[0].split(".")).with_suffix(".py")


def _found(reference: str, folder: Path) -> tuple[ModuleType, Callable]:
    path = _path(reference, folder)
    module_name, _, name = reference.partition(":")
    module = _from_file(path) if path.is_file() else _installed(module_name, reference, path)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise FunctionError(
            f"{module.__file__} has no function {name!r}. Functions there: {', '.join(sorted(there)) or 'none'}"
        )
    for file in (_sources(module, function) or set()) - {path.resolve()}:
        if file.is_file():
            _imported_digest(file)
    return module, function


def _from_file(path: Path) -> ModuleType:
    # A private name, unique to the path: the `scorers.py` of two recipes never clash, and neither hides a package.
    # It has to be in sys.modules, where dataclasses and pickle look up a class's module.
    name = f"_rsft_{path.stem}_{digest(str(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # Compiled here: after an edit within the same second, the import system would use the stale .pyc.
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise FunctionError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
    return module


_imported: dict[Path, str] = {}  # file of an installed module → its digest when this process first used it


def _imported_digest(file: Path) -> str:
    """The digest of an installed module's file. Raises FunctionError if it was edited since this process used it."""
    now = file_digest(file)
    if _imported.setdefault(file, now) != now:
        raise FunctionError(
            f"{file} was edited after this process imported it, so its old version would run: start again"
        )
    return now


def _installed(module_name: str, reference: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise FunctionError(
                f"{reference}: there is no file {path} and no installed module {module_name!r}"
            ) from None
        raise FunctionError(f"{module_name} could not be imported: {error}") from error
    except (Exception, SystemExit) as error:
        raise FunctionError(f"{module_name} could not be imported: {type(error).__name__}: {error}") from error
