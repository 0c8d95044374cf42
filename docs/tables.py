"""The field tables of docs/recipes.md and docs/scorers.md, made from the descriptions in rsft_pipeline/recipe/.

    python -m docs.tables            # writes them
    python -m docs.tables --check    # exits with 1 where a page is behind the code

A table stands between `<!-- fields: Section -->` and `<!-- end -->`; everything else of a page is
left as it is. Fields that a class shares with its base are in the base's table only.
"""

import re
import sys
import types
import typing
from pathlib import Path

from pydantic.fields import FieldInfo

from rsft_pipeline.recipe import acceptance, evaluation, model, prompts, recipe, sampling, scoring, training
from rsft_pipeline.recipe.section import Section

PAGES = [Path(__file__).with_name(name) for name in ("recipes.md", "scorers.md")]
MARKED = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
FILES = (model, prompts, sampling, scoring, acceptance, training, evaluation, recipe)
SECTIONS = {name: section for file in FILES for name, section in vars(file).items()}
WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", dict: "mapping"}


def table(section: type[Section]) -> str:
    """One row for each field that the section itself adds."""
    inherited = {name for base in section.__mro__[1:] for name in getattr(base, "model_fields", {})}
    rows = [
        f"| `{name}` | {kind(field)} | {default(field)} | {field.description} |\n"
        for name, field in section.model_fields.items()
        if name not in inherited and field.description  # `kind` and `rule` are told by the heading
    ]
    return "| field | type | default | meaning |\n| --- | --- | --- | --- |\n" + "".join(rows)


def kind(field: FieldInfo) -> str:
    """The type in words, with its bounds."""
    bounds = [
        f"{sign} {getattr(m, name):g}" for m in field.metadata for name, sign in BOUNDS.items() if hasattr(m, name)
    ]
    return ", ".join([words(field.annotation), *bounds])


def words(annotation: typing.Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    if origin is typing.Annotated:
        return words(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(part) for part in arguments if part is not type(None)))
    if origin is list:
        return f"list of {words(arguments[0])}{'s' if words(arguments[0]) == 'section' else ''}"
    if origin is tuple:
        return f"two {words(arguments[0])}s"
    return WORDS[origin or annotation]


def default(field: FieldInfo) -> str:
    """The default as YAML has it; nothing where a section's own defaults apply."""
    if field.is_required():
        return "required"
    match field.default:
        case None:
            return "none"
        case Section():
            return "its own"
        case tuple():
            return f"`{list(field.default)}`"
    return f"`{field.default}`"


def main() -> None:
    for page in PAGES:
        there = page.read_text(encoding="utf-8")
        made = MARKED.sub(lambda found: found[1] + table(SECTIONS[found[2]]) + found[3], there)
        if "--check" not in sys.argv:
            page.write_text(made, encoding="utf-8")
        elif made != there:
            sys.exit(f"{page} is behind rsft_pipeline/recipe/: python -m docs.tables")


if __name__ == "__main__":
    main()
