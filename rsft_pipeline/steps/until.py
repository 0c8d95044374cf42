"""Until: drawing until enough candidates are accepted, if the recipe has `sampling.until`.

Belongs here: which prompts are drawn for again, and when the round stops drawing. Not: drawing,
scoring and deciding themselves (draw.py, score.py, decide.py).

Prompts are drawn for in passes. Each wave is scored once it is drawn, and a pass leaves out the prompts that have
enough accepted by then. No decision is written here: whether a candidate is accepted by the rule never depends on
later draws (recipe/recipe.py refuses rules for which it does), so the decision made at the end is the same. A run
that was killed goes on with exactly the waves that it would have drawn.
"""

import math
from collections.abc import Sequence

from rsft_pipeline import sampling
from rsft_pipeline.devices import Device
from rsft_pipeline.progress import Show
from rsft_pipeline.rounds import Round
from rsft_pipeline.sampling import Asked, Session
from rsft_pipeline.steps import draw as drawing
from rsft_pipeline.steps.decide import accepted_so_far
from rsft_pipeline.steps.rows import ROUND_CANDIDATES, of_round
from rsft_pipeline.steps.score import load, score
from rsft_pipeline.store import Store


def draw(
    store: Store, round_: Round, session: Session, asked: Sequence[Asked], *, device: Device, run_id: str, show: Show
) -> tuple[int, int]:
    """Draw and score candidates until enough are accepted, or each prompt has had the most draws allowed.

    Returns:
        How many candidates this call drew, and how many tokens.
    """
    candidates = tokens = 0
    scorers = load(store, round_, device)

    def score_drawn() -> None:
        of = of_round(round_)
        by = {"scorers": scorers, "device": device, "run_id": run_id}
        score(store, round_, ROUND_CANDIDATES, of, **by, show=lambda *_: None)

    score_drawn()  # what a killed run had drawn last
    for draws in sampling.passes(round_.recipe.sampling):
        if not (wanted := _unsatisfied(store, round_, asked, draws)):
            break  # nor would any later pass: a prompt that has enough keeps it
        for wave in drawing.plan(store, round_, round_.drawn_from, wanted, split="train", draws=draws):
            if _enough(store, round_, draws):
                return candidates, tokens
            tokens += drawing.draw(
                store, round_, round_.drawn_from, session, [wave], split="train", run_id=run_id, show=lambda *_: None
            )
            score_drawn()
            candidates += len(wave[1])
            show(candidates, f"{draws.stop} draws per prompt at most, {len(wanted)} prompts still drawn for")
    return candidates, tokens


def _unsatisfied(store: Store, round_: Round, asked: Sequence[Asked], draws: range) -> list[Asked]:
    """The prompts that have too few accepted among their draws before these."""
    enough = round_.recipe.sampling.until.per_prompt or math.inf
    accepted = accepted_so_far(store, round_, draws.start)
    return [prompt for prompt in asked if accepted.get(prompt.prompt_id, 0) < enough]


def _enough(store: Store, round_: Round, draws: range) -> bool:
    """Whether the round has as many accepted as it asks for, up to the end of these draws.

    If a pilot decides what is accepted, nothing is known before the first pass is complete.
    """
    wanted = round_.recipe.sampling.until.accepted
    if wanted is None or (draws.start == 0 and round_.recipe.acceptance.pilot_draws):
        return False
    return sum(accepted_so_far(store, round_, draws.stop).values()) >= wanted
