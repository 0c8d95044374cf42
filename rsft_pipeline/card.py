"""The model card of a checkpoint: what a person who finds the folder should know."""

from collections.abc import Mapping
from typing import Any

from rsft_pipeline.markdown import table

_TRAINED_ON = {
    "accepted": "accepted",
    "random": "chosen at random, as a control",
    "everything": "all there were, as a control",
}


def card(meta: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None, verdict: str | None = None) -> str:
    """The model card of a checkpoint; with metrics once it was evaluated."""
    measured = "Not evaluated yet."
    if evaluation is not None:
        rows = [
            {"metric": name, "value": e["value"], "interval": f"[{e['low']:.4g}, {e['high']:.4g}]", "prompts": e["n"]}
            for name in ("pass_at_1", "pass_at_k", "mean_score")
            if (e := evaluation[name])
        ]
        measured = f"{table(rows)}\n\nVerdict: {verdict}"
    return f"""---
library_name: transformers
tags: [rejection-sampling-fine-tuning]
---

# {meta["recipe"]} {meta["round"]}

Samples: {meta["samples"]:,} ({_TRAINED_ON[meta["trained_on"]]}). Optimiser steps: {meta["steps"]:,}
({meta["trainable_parameters"]:,} of {meta["parameters"]:,} parameters trained).

| | |
| --- | --- |
| round | {meta["round"]} |
| parent (weights that training started from) | `{meta["parent"]}` |
| weights that drew the candidates | `{meta.get("drawn_from", meta["policy"])}` |
| accepted set | `{meta["accepted_digest"]}` |
| its Merkle root | `{meta["merkle_root"]}` |
| snapshot of the store | {meta["store_snapshot"]} |
| recipe | `{meta["recipe_digest"]}` |

## Held-out metrics

{measured}
"""
