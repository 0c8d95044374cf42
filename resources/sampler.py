"""The sampler backend as a resource: what draws candidates from a policy.

Another backend (an OpenAI-compatible server, Ray, torchrun) would be another resource with the same
`session`, without changing any asset.
"""

from contextlib import AbstractContextManager
from pathlib import Path

import dagster as dg

from rsft_pipeline import tasks
from rsft_pipeline.devices import Device
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.sampling import InProcess, Session


class TransformersSampler(dg.ConfigurableResource):
    """Draws in this process with Transformers."""

    def session(self, policy: Path, recipe: Recipe, device: Device) -> AbstractContextManager[Session]:
        """The policy, loaded for drawing; its memory is released at the end of the `with`."""
        return InProcess(policy, recipe, tasks.of(recipe), device)
