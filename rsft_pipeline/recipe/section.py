"""Section: what every part of a recipe is, and the error of a recipe that cannot run."""

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo

RECORDED = {"recorded": True}  # context in which the settings of a round that ran are read again


class RecipeError(ValueError):
    """A recipe that cannot run: the message says where it is wrong and what was expected."""


class Section(BaseModel):
    """A part of the recipe: immutable, and every key must be a known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def is_recorded(info: ValidationInfo) -> bool:
    """Whether settings are those of a round that ran, perhaps before some of them were refused."""
    return info.context == RECORDED


def refusals(error: ValidationError) -> str:
    """What fields were refused for, each with its path, in one line."""
    found = [(*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")) for each in error.errors()]
    return "; ".join(f"{'.'.join(path)}: {why}" if path else why for *path, why in found)
