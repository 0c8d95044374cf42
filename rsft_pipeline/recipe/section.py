"""Section: what every part of a recipe is, and the error of a recipe that cannot run."""

from pydantic import BaseModel, ConfigDict


class RecipeError(ValueError):
    """A recipe that cannot run: the message says where it is wrong and what was expected."""


class Section(BaseModel):
    """A part of the recipe: immutable, and every key must be a known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
