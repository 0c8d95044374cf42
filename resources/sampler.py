"""The sampler backend as a resource: what turns a policy into candidates.

Another backend (an OpenAI-compatible server, Ray, torchrun) is another resource with the same
`session`; no asset changes.
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
        """The policy loaded for drawing; its memory is given back at the end of the `with`."""
        return InProcess(policy, recipe, tasks.of(recipe), device)
