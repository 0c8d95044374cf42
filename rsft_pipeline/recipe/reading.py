"""Reading: from a name to a checked recipe, or to an error that tells a person what to fix.

Belongs here: finding the YAML file, what it `extends`, overrides, explaining what is wrong, and the JSON Schema. Not:
what a recipe may say (the section modules beside this file).
"""

import copy
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.section import RecipeError, Section

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe's file. With `extends` no field is required: the other recipe may have it."""
    made = copy.deepcopy(Recipe.model_json_schema())  # pydantic caches what it returns
    made["properties"]["extends"] = {"type": "string", "description": "Name of the recipe beside it to start from."}
    made["if"], made["then"] = {"not": {"required": ["extends"]}}, {"required": made.pop("required")}
    return made


def find(name: str | Path, folders: Iterable[Path] = (RECIPES,)) -> Path:
    """The YAML file of a recipe given by name or path. Raises RecipeError, with the nearest name if there is one."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~user, of a user without a home directory here
        raise RecipeError(f"{name}: {error}") from None
    if path.suffix == ".yml":  # everything else looks only for .yaml, and a name must stand for one recipe
        raise RecipeError(f"{path}: a recipe's file ends in .yaml; rename it")
    if path.suffix == ".yaml":
        if not path.is_file():
            raise RecipeError(f"{path}: there is no such file")
        return path.resolve()
    known = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if str(name) not in known:
        file = Path(f"{path}.yaml")
        meant = f" Did you mean the file {file}?" if file.is_file() else nearest(str(name), known)
        raise RecipeError(f"no recipe is called {str(name)!r}.{meant} Known: {', '.join(sorted(known))}")
    return known[str(name)].resolve()


def load(path: Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file; its stem is the recipe's name.
        overrides: `a.b` → value as YAML text, applied over the file.

    Raises:
        RecipeError: with the file, the field's path, what was expected and the nearest valid name.
    """
    path = Path(path).resolve()
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,59}", path.stem):
        raise RecipeError(
            f"{path}: a recipe's file name is its name: lower-case letters, digits and _, starting with a letter, 60 "
            "of them at most"
        )
    tree = _read(path)
    if "extends" in tree:
        tree = _extended(tree, path)
    for key, text in (overrides or {}).items():
        _assign(tree, key, text, path)
    try:
        return Recipe.of_file(path, tree)
    except ValidationError as error:
        raise RecipeError(explain(error, path)) from None


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated field is an error; PyYAML would silently take the last one."""

    def construct_mapping(self, node, deep=False):
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # not a field's name: refused below
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict:
    try:
        tree = _apart(yaml.load(path.read_text(encoding="utf-8"), _Loader))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: an invalid date
        raise RecipeError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: expected a mapping of fields at the top level")
    return tree


def _apart(tree: Any) -> Any:
    """A deep copy without sharing: YAML aliases are one object, and `--set` on one would change them all."""
    if isinstance(tree, dict):
        return {key: _apart(value) for key, value in tree.items()}
    return [_apart(value) for value in tree] if isinstance(tree, list) else tree


def _extended(tree: dict, path: Path) -> dict:
    """The fields of the recipe that this one `extends`, replaced as a whole by those that this one gives."""
    other = path.parent / f"{tree['extends']}.yaml"
    if not other.is_file():
        near = nearest(str(tree["extends"]), [file.stem for file in path.parent.glob("*.yaml")])
        raise RecipeError(f"{path}: extends: there is no recipe {other}.{near}")
    beneath = _read(other)
    if "extends" in beneath:
        raise RecipeError(f"{path}: extends: {other} extends another recipe itself; extend that one")
    return {**beneath, **{name: value for name, value in tree.items() if name != "extends"}}


def _assign(tree: dict, key: str, text: str, path: Path) -> None:
    *parents, last = key.split(".")
    node: Any = tree
    for i, part in enumerate(parents):
        node = node[_index(node, part, key, path)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise RecipeError(f"{path}: cannot set {key}: {'.'.join(parents[: i + 1])} is a value, not a section")
    try:
        value = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot set {key}: {text!r} is not YAML: {error}") from None
    node[_index(node, last, key, path) if isinstance(node, list) else last] = value


def _index(node: list, part: str, key: str, path: Path) -> int:
    if not node:
        raise RecipeError(f"{path}: cannot set {key}: that list is empty")
    if not part.isdecimal() or int(part) >= len(node):
        raise RecipeError(f"{path}: cannot set {key}: expected a list position from 0 to {len(node) - 1}, got {part!r}")
    return int(part)


_MEMBER = re.compile(r"(constrained-)?(float|int|str)|(literal|list)\[.*\]")  # a union's member in pydantic's paths


def explain(error: ValidationError, path: Path) -> str:
    """One line that names the file, and one for each field: what is wrong with it and what was expected."""
    messages: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        where, message = _explained(problem)
        messages.setdefault(where, []).append(message)
    # A field that takes a number or a word has a problem with either: the one with the words comes last.
    lines = (f"  {where}: {'; or: '.join(reversed(several))}" for where, several in messages.items())
    return "\n".join([f"{path}: this recipe cannot run:", *lines])


def _explained(problem: Mapping[str, Any]) -> tuple[str, str]:
    """The path of a field that pydantic refuses, and why."""
    names = [name for name, _ in _walked(problem["loc"])]
    where = ".".join(name for name in names if name and not _MEMBER.fullmatch(name)) or "recipe"
    message = problem["msg"].removeprefix("Value error, ")
    match problem["type"]:
        case "extra_forbidden":
            fields = _fields_at(problem["loc"][:-1])
            near = nearest(str(problem["loc"][-1]), fields)
            message = f"unknown field.{near} Expected one of: {', '.join(fields)}"
        case "model_type" | "model_attributes_type":
            fields = ", ".join(_fields_at(problem["loc"]))
            message = f"got {problem['input']!r}. Expected a section, whose fields are among: {fields}"
        case "missing":
            message = "this field is required"
        case "union_tag_not_found":
            tag = problem["ctx"]["discriminator"].strip("'")
            where += f".{tag}"
            message = f"this field is required. Expected one of: {', '.join(_tags_at(problem['loc'], tag))}"
        case "literal_error" | "union_tag_invalid":
            expected = problem["ctx"].get("expected") or problem["ctx"].get("expected_tags", "")
            options = re.findall(r"'([^']+)'", expected)
            given = problem["ctx"].get("tag", problem["input"])
            if tag := problem["ctx"].get("discriminator"):
                where += "." + tag.strip("'")
            message = f"got {given!r}.{nearest(str(given), options)} Expected one of: {', '.join(options)}"
        case kind if kind.endswith("_type") or not isinstance(problem["input"], dict):  # a dict is a whole section
            message = f"{message} (got {problem['input']!r})"
    return where, message


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean …?` if a known word is similar, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section that an error's location points into."""
    _, sections = [("", [Recipe]), *_walked(location)][-1]
    return sorted({name for section in sections for name in section.model_fields})


def _tags_at(location: tuple[int | str, ...], tag: str) -> list[str]:
    """The values allowed in a discriminator field, such as `kind` or `rule`."""
    _, sections = list(_walked(location))[-1]
    return [typing.get_args(section.model_fields[tag].annotation)[0] for section in sections]


def _walked(location: tuple[int | str, ...]) -> Iterator[tuple[str, list[type[Section]]]]:
    """The parts of an error's location, each with the sections that it may point into.

    For a tagged union, such as the rules, pydantic inserts the tag into the location: it is yielded as "".
    """
    sections: list[type[Section]] = [Recipe]
    for part in location:
        tagged = [section for section in sections if part in _tags(section)] if len(sections) > 1 else []
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = tagged or [found for field in fields for found in _sections_in(field.annotation)] or sections
        yield "" if tagged else str(part), sections


def _tags(section: type[Section]) -> set[str]:
    annotations = [field.annotation for field in section.model_fields.values()]
    return {typing.get_args(one)[0] for one in annotations if typing.get_origin(one) is typing.Literal}


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in _sections_in(argument)]
