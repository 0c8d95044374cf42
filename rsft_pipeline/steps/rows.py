"""Rows: which rows of the store belong to a round.

Belongs here: SQL for the candidates that a round drew, was evaluated on or is trained on, and the parameters of that
SQL. Not: reading or writing any of them (the steps beside this file, and whatever looks at what they wrote).
"""

from collections.abc import Mapping
from typing import Any, Literal

from rsft_pipeline import acceptance, merkle, revocations, sampling
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.rounds import Round

COMBINED = "combined"  # the scorer name of the combined score
TrainedOn = Literal["accepted", "random", "everything"]  # the last two are controls
# Joins are on ids alone, and every table is filtered by the recipe separately: given the condition
# `a.recipe = b.recipe`, the planner may choose to join by it and build the cross product.

# The candidates that a round drew to train on. A candidate of older settings, of a superseded policy, or of a
# prompt that the round no longer asks stays in the table but does not belong to the round.
ROUND_CANDIDATES = """
    SELECT * FROM candidates
    WHERE recipe = $recipe AND round = $round AND split = 'train'
      AND policy = $policy AND settings = $settings AND draw < $draws AND prompt_id IN (
        SELECT prompt_id FROM round_prompts WHERE recipe = $recipe AND round = $round AND split = 'train')
"""
# One policy's answers to the round's held-out prompts, in whichever round they were drawn.
EVALUATION_CANDIDATES = """
    SELECT * FROM candidates
    WHERE recipe = $recipe AND split = 'eval' AND policy = $policy AND settings = $settings AND draw < $draws
      AND prompt_id IN (
        SELECT prompt_id FROM round_prompts WHERE recipe = $recipe AND round = $round AND split = 'eval')
"""


# Which scores `s` count; $scorers comes from `of_scorers`. Neither name nor version is enough alone: a name may have
# meant another scorer before, and a version may have had another name.
OF_SCORERS = "list_contains($scorers, s.scorer || ' ' || s.version)"


def of_scorers(version_of: Mapping[str, str]) -> list[str]:
    """The parameter $scorers of OF_SCORERS, from the version of each scorer."""
    return [f"{scorer} {version}" for scorer, version in version_of.items()]


def of_round(round_: Round) -> dict:
    """Parameters of ROUND_CANDIDATES."""
    recipe = round_.recipe
    return {
        "recipe": recipe.name,
        "round": round_.key,
        "policy": round_.drawn_from,
        "settings": sampling.settings(recipe.sampling, recipe.seed, round_.answers),
        "draws": recipe.sampling.most_draws,
    }


def of_evaluation(round_: Round, policy: str) -> dict:
    """Parameters of EVALUATION_CANDIDATES."""
    drawn = sampling.evaluation_sampling(round_.recipe)
    settings = sampling.settings(drawn, round_.recipe.seed)
    return {**of_round(round_), "policy": policy, "settings": settings, "draws": drawn.draws}


# --- training sets ---------------------------------------------------------------------------

# The candidates that were decided on and may be trained on, of one round or of all rounds up to it.
_DECIDED = f"""
    WITH {revocations.NAMED}
    SELECT c.candidate_id, c.token_ids, c.text, p.text AS prompt, p.chat, p.prompt_hash, d.weight, d.score, d.round,
        d.prompt_id, p.split
    FROM decisions d
    JOIN candidates c ON c.candidate_id = d.candidate_id AND c.recipe = $recipe
    JOIN (SELECT *, {merkle.PROMPT} AS prompt_hash FROM prompts WHERE recipe = $recipe) p ON p.prompt_id = d.prompt_id
    WHERE d.recipe = $recipe AND d.round BETWEEN $first AND $last AND {revocations.ALLOWED}
"""
# Those of them that a checkpoint is trained on.
ACCEPTED = f"{_DECIDED} AND d.accepted"
# Those that a control is trained on: scores play no part, only the rule's `distinct` does.
_EVERYTHING = f"""
    SELECT * REPLACE (1::DOUBLE AS weight) FROM ({_DECIDED} AND d.reason <> 'revoked')
    QUALIFY NOT $distinct OR row_number() OVER (
        PARTITION BY round, prompt_id, {acceptance.same_text("text")} ORDER BY md5($salt || candidate_id)) = 1
"""
_RANDOM = f"""
    SELECT * FROM ({_EVERYTHING}) ORDER BY md5($salt || candidate_id), candidate_id
    LIMIT (SELECT count(*) FROM ({ACCEPTED}))
"""


def of_training(round_: Round) -> dict:
    """Parameters of ACCEPTED."""
    return training_rows(round_.recipe.name, round_.key, round_.recipe)[1]


def training_rows(
    name: str, round_key: str, settings: Recipe, trained_on: TrainedOn = "accepted"
) -> tuple[str, dict[str, Any]]:
    """SQL of the rows that a checkpoint of a round is trained on, and its parameters.

    Args:
        name: the recipe's name.
        settings: the recipe as the round recorded it.
    """
    first = round_key if settings.training.data == "round" else "r000"
    parameters = {"recipe": name, "first": first, "last": round_key}
    if trained_on == "accepted":
        return ACCEPTED, parameters
    chance = {"distinct": settings.acceptance.distinct, "salt": f"control:{settings.seed}:"}
    return {"everything": _EVERYTHING, "random": _RANDOM}[trained_on], {**parameters, **chance}
