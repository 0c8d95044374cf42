"""The section `training`: how a checkpoint is fine-tuned on the accepted set.

Not: the training itself (rsft_pipeline/training.py).
"""

from typing import Literal

from pydantic import Field

from rsft_pipeline.recipe.section import Section


class Training(Section):
    """How a checkpoint is fine-tuned on the accepted set."""

    start: Literal["base", "champion", "previous"] = Field("champion", description="Weights that training starts from.")
    data: Literal["round", "all_rounds"] = Field("round", description="This round's accepted set, or every round's.")
    epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    batch_size: int = Field(32, ge=1, description="Samples per optimiser step.")
    accumulation: int = Field(
        1, ge=1, description="Parts that a step is computed in at least, to save memory; the result is the same."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Decay after the warm-up.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps during which the rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    clip: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    save_every: int = Field(200, ge=1, description="Steps between saved states; a kill loses no more than that.")
