"""Knowledge: how probable a completion is under a source that knows the reference answers.

A mixture of the references and of the policy π itself, which keeps every text possible:

    P(y | x) = (1 − ε) · Σ_refs 1[y = ref] / n + ε · π(y | x)

«=» is equality under SQuAD's normalisation, so each spelling of a reference gets the whole mass of that reference.
If a reference has several spellings, the first term therefore sums to more than 1 − ε over all texts.
"""

import math
from collections.abc import Sequence

from rsft_pipeline.scoring import squad


def log_probability(
    completion: str, references: Sequence[str], log_policy: float | None, smoothing: float
) -> float | None:
    """log P(y | x) in nats; None without references or without the policy's log-probability.

    Args:
        log_policy: log π(y | x), in nats.
        smoothing: ε, in (0, 1].
    """
    if not references or log_policy is None:
        return None
    from_policy = math.log(smoothing) + log_policy
    given = squad.normalise(completion)
    matching = sum(squad.normalise(reference) == given for reference in references)
    if matching == 0 or smoothing == 1:
        return from_policy
    from_references = math.log1p(-smoothing) + math.log(matching / len(references))
    # log(eᵃ + eᵇ), where eᵃ and eᵇ themselves may be too small for a float.
    larger, smaller = max(from_references, from_policy), min(from_references, from_policy)
    return larger + math.log1p(math.exp(smaller - larger))
