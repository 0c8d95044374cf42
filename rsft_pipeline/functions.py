"""Functions of the user's own, named `module:function` in a recipe.

Belongs here: finding such a function, and hashing its source. Does not: what it is called with;
prompts, scoring and models each say what they expect of theirs.
"""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from rsft_pipeline.lineage import digest, file_digest

REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class FunctionError(ValueError):
    """A `module:function` that cannot be used: the message says what was looked for, and where."""


def load(reference: str, folder: Path) -> Callable:
    """The function that `module:function` names.

    A file `module.py` in the folder wins over an installed module, and is read afresh on every call, so that
    the function is always the one whose source is hashed. The folder does not become importable: such a file
    cannot import its neighbours.

    Raises:
        FunctionError: not of that form, no such module, a module that fails to import, no such function.
    """
    if not REFERENCE.fullmatch(reference):
        raise FunctionError(f"{reference!r} is not of the form `module:function`")
    module_name, name = reference.split(":")
    path = Path(folder).joinpath(*module_name.split(".")).with_suffix(".py")
    module = _from_file(path) if path.is_file() else _installed(module_name, reference, path)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise FunctionError(
            f"{module.__file__} has no function {name!r}. Functions there: {', '.join(sorted(there)) or 'none'}"
        )
    return function


def source_digest(function: Callable) -> str:
    """SHA-256 of the file that the function is written in. What that file imports is not part of it."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        path = None
    if path is None or not Path(path).is_file():
        raise FunctionError(f"{function!r} has no source file, so its version cannot be told: wrap it in a function")
    return file_digest(Path(path))


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
    except Exception as error:
        del sys.modules[name]
        raise FunctionError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
    return module


def _installed(module_name: str, reference: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise FunctionError(
                f"{reference}: there is no file {path} and no installed module {module_name!r}"
            ) from None
        raise FunctionError(f"{module_name} could not be imported: {error}") from error
    except Exception as error:
        raise FunctionError(f"{module_name} could not be imported: {type(error).__name__}: {error}") from error
