"""Tasks: one module for each kind of model, all with the same five functions.

draw(model, tokenizer, requests, sampling) -> list[Candidate]
completion_ids(model, tokenizer, texts) -> list[list[int]]
log_probabilities(model, samples, pad_id) -> list[float]
collate(samples, pad_id) -> dict[str, Tensor]
token_losses(model, batch) -> Tensor

What all models that write have in common is in writing.py.
"""

import importlib
from types import ModuleType

from rsft_pipeline.recipe.recipe import Recipe


def of(recipe: Recipe) -> ModuleType:
    """The module of the recipe's task."""
    return importlib.import_module(f"rsft_pipeline.tasks.{recipe.task}")
