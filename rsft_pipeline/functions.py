"""Functions of the user's own, named `module:function` in a recipe.

Belongs here: finding such a function, and hashing its source. Does not: what it is called with;
prompts, scoring and models each say what they expect of theirs.
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

    A file `module.py` in the folder wins over an installed module, and is read afresh on every call, so that
    the function is always the one whose source is hashed. The folder does not become importable: such a file
    cannot import its neighbours. An installed module is imported once by a process, as Python does.

    Raises:
        FunctionError: not of that form, no such module, a module that fails to import or was edited since it was
            imported, no such function.
    """
    return _found(reference, Path(folder))[1]


def rows(reference: str, folder: Path) -> Iterator[Any]:
    """What the function that `module:function` names yields, called with nothing.

    Raises:
        FunctionError: as `load` does, or the function failed, or it returned what has no rows.
    """
    function = load(reference, folder)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise FunctionError(f"{reference} is called with no arguments: {error}") from None
    except ValueError:  # a builtin that does not say what it takes
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
    """An error of a user's function and where it was raised, without what the traceback keeps alive."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno}, in {place.name})"


def version(reference: str, folder: Path) -> str:
    """SHA-256 of the file that has the function, and of the one that it is written in where that is another.

    What these files import is not part of it. Raises FunctionError as `load` does, and where there is no such file.
    """
    path = _path(reference, Path(folder))
    files = _files(reference, Path(folder), path.read_bytes() if path.is_file() else b"")
    digests = sorted(file_digest(file) if file == path.resolve() else _imported_digest(file) for file in files)
    return digests[0] if len(digests) == 1 else digest(digests)


@functools.lru_cache(maxsize=64)
def _files(reference: str, folder: Path, source: bytes) -> set[Path]:
    """Where a function is; of this source once, since it is asked for many times a round and may take long to run."""
    module, function = _found(reference, folder)
    files = _sources(module, function)
    if files is None or not all(file.is_file() for file in files):
        raise FunctionError(f"{function!r} has no source file, so its version cannot be told: wrap it in a function")
    return files


def _sources(module: ModuleType, function: Callable) -> set[Path] | None:
    """The file that has a function, and the one that it is written in; None where it is written in none."""
    try:
        written = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        written = None
    return written and {Path(file).resolve() for file in (getattr(module, "__file__", None), written) if file}


def _path(reference: str, folder: Path) -> Path:
    """The file in the folder that a reference means, if it is there."""
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
    # A private name, unique to the path: two recipes' `scorers.py` never meet, and neither hides a package.
    # It has to be in sys.modules, where dataclasses and pickle look their own module up.
    name = f"_rsft_{path.stem}_{digest(str(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # Compiled here: the import system would take a cached .pyc for an edit within the same second.
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise FunctionError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
    return module


_imported: dict[Path, str] = {}  # file of an installed module → its digest when this process first used it


def _imported_digest(file: Path) -> str:
    """The digest of an installed module's file. Raises FunctionError where that is not what runs here any more."""
    now = file_digest(file)
    if _imported.setdefault(file, now) != now:
        raise FunctionError(
            f"{file} was edited since this process imported it, and what runs is what it was: start again"
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
