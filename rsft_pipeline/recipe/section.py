"""Section: the base class of every part of a recipe, and the error for a recipe that cannot run."""

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo

RECORDED = {"recorded": True}  # validation context for settings that a round recorded


class RecipeError(ValueError):
    """A recipe that cannot run: the message says where it is wrong and what was expected."""


class Section(BaseModel):
    """A part of the recipe: immutable; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def is_recorded(info: ValidationInfo) -> bool:
    """Whether the settings are those of a past round, which may predate a check that would refuse them now."""
    return info.context == RECORDED


def refusals(error: ValidationError) -> str:
    """Why each field was refused, with its path, in one line."""
    found = [(*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")) for each in error.errors()]
    return "; ".join(f"{'.'.join(path)}: {why}" if path else why for *path, why in found)
