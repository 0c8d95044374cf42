"""Evaluate: a checkpoint against the weights that it has to beat, and the end of a round.

Belongs here: which weights are compared, their results per prompt, what is recorded of the comparison, and finishing
the round's record. Not: drawing and scoring held-out candidates (draw.py, score.py), nor statistics (evaluation.py).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from rsft_pipeline import acceptance, revocations, rounds
from rsft_pipeline.classes import Answers
from rsft_pipeline.evaluation import Comparison, PromptResult, Summary, compare, promoted, summarise
from rsft_pipeline.home import Home
from rsft_pipeline.rounds import Round, RoundError, starting_weights
from rsft_pipeline.steps.rows import COMBINED, EVALUATION_CANDIDATES, ROUND_CANDIDATES, of_evaluation, of_round
from rsft_pipeline.steps.score import unscored, versions
from rsft_pipeline.store import Query, Store

T = TypeVar("T")


@dataclass(frozen=True)
class Contest:
    """The weights that a round evaluates: digests, by role."""

    policy: str
    checkpoint: str
    champion: str  # as of before the round
    controls: dict[str, str]  # `random`, `everything`: those that the recipe lists

    @property
    def roles(self) -> dict[str, str]:
        """All of them by role."""
        return {"policy": self.policy, "checkpoint": self.checkpoint, "champion": self.champion, **self.controls}

    @property
    def weights(self) -> list[str]:
        """Each of them once."""
        return list(dict.fromkeys(self.roles.values()))

    def by_role(self, ask: Callable[[str], T]) -> dict[str, T]:
        """The answer for each role. Weights with several roles are asked about once."""
        answers = {weights: ask(weights) for weights in self.weights}
        return {role: answers[weights] for role, weights in self.roles.items()}


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found."""

    summaries: dict[str, Summary]  # by role
    comparison: Comparison  # of the checkpoint with the champion
    controls: dict[str, Comparison]  # of the checkpoint with each control
    promoted: bool
    verdict: str
    scorers: dict[str, str]  # the versions that it used


def contest(store: Store, round_: Round, home: Home) -> Contest:
    """Which weights a round evaluates. Raises RoundError if some are missing, or the checkpoint was revoked."""
    row = rounds.row_of(store, round_.recipe.name, round_.key)
    made, controls = row["checkpoint"], json.loads(row["controls"] or "{}")
    if made is None:
        raise RoundError(f"{round_.recipe.name} {round_.key} has no checkpoint: materialise it first")
    if missing := set(round_.recipe.controls) - set(controls):
        raise RoundError(
            f"{round_.recipe.name} {round_.key} has no {missing.pop()} control: materialise `controls` first"
        )
    _check_not_revoked(store, round_, made)
    champion = starting_weights(store, round_.recipe, home, round_.key, "champion")
    return Contest(round_.policy, made, champion.digest, {name: controls[name] for name in round_.recipe.controls})


def _check_not_revoked(store: Store, round_: Round, checkpoint: str) -> None:
    if why := revocations.of_checkpoint(store, round_.recipe.name, checkpoint):
        raise RoundError(
            f"{round_.recipe.name} {round_.key}: {why}. Run the round again from its "
            "beginning; where that gives the same weights, change the recipe, or revoke what they learned"
        )


def judge(store: Store, round_: Round, between: Contest, run_id: str) -> Outcome:
    """Compare the weights on the held-out prompts. Writes `evaluations`.

    Raises:
        RoundError: the checkpoint was revoked, or the scorers or references changed, since the prompts were answered.
    """
    _check_not_revoked(store, round_, between.checkpoint)
    recipe, how = round_.recipe, round_.recipe.evaluation
    scorers = versions(store, round_)
    for weights in between.weights:
        if left := unscored(store, round_, EVALUATION_CANDIDATES, of_evaluation(round_, weights), scorers):
            raise RoundError(
                f"{recipe.name} {round_.key}: {left} answers to held-out prompts have no score by the present "
                "scorers and references, which have changed since: materialise `evaluation` again"
            )
    version = scorers[COMBINED]
    found = between.by_role(lambda weights: results(store.query, round_, weights, version))
    rows = [
        {
            "recipe": recipe.name,
            "round": round_.key,
            "role": role,
            "checkpoint": between.roles[role],
            "prompt_id": result.prompt_id,
            "draws": result.draws,
            "passes": result.passes,
            "score": result.score,
            "distinct_texts": result.distinct,
            "tokens": result.tokens,
            "eligible": result.eligible,
            "dagster_run_id": run_id,
        }
        for role, each in found.items()
        for result in each
    ]
    store.replace("evaluations", rows, recipe=recipe.name, round=round_.key)
    summaries = {role: summarise(each, k=how.k, confidence=how.confidence) for role, each in found.items()}
    compared = {
        role: compare(found[role], found["checkpoint"], recipe.promotion.metric, k=how.k, confidence=how.confidence)
        for role in ("champion", *between.controls)
    }
    comparison = compared.pop("champion")
    won, verdict = promoted(comparison, recipe.promotion)
    return Outcome(summaries, comparison, compared, won, verdict, scorers)


# Held-out candidates, the same ones whoever asks: two rounds that evaluate the same weights at once, in two homes on
# one catalog, may both have drawn them.
_EACH_ONCE = f"SELECT DISTINCT ON (candidate_id) * FROM ({EVALUATION_CANDIDATES}) ORDER BY candidate_id, text"


def results(query: Query, round_: Round, policy: str, version: str) -> list[PromptResult]:
    """A policy's results on each of the round's held-out prompts, by the combined score of this version."""
    recipe = round_.recipe
    rows = query(
        f"""WITH judged AS (
                SELECT DISTINCT ON (c.candidate_id) c.prompt_id, c.text, c.tokens, s.value, s.passed
                FROM ({_EACH_ONCE}) c JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
                JOIN scores s ON s.candidate_id = c.candidate_id AND s.recipe = $recipe AND s.content = p.content
                    AND s.scorer = '{COMBINED}' AND s.version = $version
                ORDER BY c.candidate_id, s.value
            )
            SELECT prompt_id, count(*) AS draws,
                count(*) FILTER (value > $above AND passed) AS passes, avg(value) AS score,
                count(DISTINCT {acceptance.normalised("text")}) AS "distinct", avg(tokens) AS tokens,
                count(*) FILTER (value IS NOT NULL AND passed) AS eligible
            FROM judged GROUP BY prompt_id ORDER BY prompt_id""",
        {
            **of_evaluation(round_, policy),
            "above": recipe.evaluation.pass_above,
            "version": version,
        },
    )
    return [PromptResult(**row) for row in rows]


def answers(store: Store, round_: Round, policy: str) -> Answers:
    """A policy's answers to the round's held-out prompts."""
    rows = store.query(
        f"""SELECT c.prompt_id, p.reference, c.text, count(*) AS n FROM ({_EACH_ONCE}) c
            JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe GROUP BY ALL""",
        of_evaluation(round_, policy),
    )
    answered: dict[str, tuple[str, dict[str, int]]] = {}
    for row in rows:
        answered.setdefault(row["prompt_id"], (row["reference"], {}))[1][row["text"]] = row["n"]
    return Answers.of(answered.values(), round_.recipe.model.labels)


def recorded_results(query: Query, recipe: str, round_key: str, role: str) -> list[PromptResult]:
    """What `judge` recorded for a role: `policy`, `checkpoint`, `champion` or a control."""
    rows = query(
        """SELECT prompt_id, draws, passes, score, distinct_texts AS "distinct", tokens, eligible
           FROM evaluations WHERE recipe = $recipe AND round = $round AND role = $role ORDER BY prompt_id""",
        {"recipe": recipe, "round": round_key, "role": role},
    )
    return [PromptResult(**row) for row in rows]


def over_controls(query: Query, row: Mapping[str, Any]) -> dict[str, Comparison]:
    """A finished round's checkpoint against each of its controls, by its promotion metric, as `judge` found it.

    Args:
        row: the round's row of the table `rounds`.
    """
    if row["state"] == "started" or not (settings := json.loads(row["settings"] or "{}")).get("controls"):
        return {}
    how, metric = settings["evaluation"], settings["promotion"]["metric"]
    roles = ("checkpoint", *settings["controls"])
    of = {role: recorded_results(query, row["recipe"], row["round"], role) for role in roles}
    made = of.pop("checkpoint")
    as_then = {"k": how["k"], "confidence": how["confidence"]}
    return {role: compare(own, made, metric, **as_then) for role, own in of.items() if own}


def conclude(store: Store, round_: Round, between: Contest, outcome: Outcome) -> None:
    """Finish the round's record: from then on the round counts as done.

    Raises:
        RoundError: the checkpoint was revoked while it was evaluated.
    """
    counted = counts(store.query, round_)
    as_json = {role: json.dumps(finite(asdict(summary))) for role, summary in outcome.summaries.items()}
    _check_not_revoked(store, round_, between.checkpoint)
    rounds.finish(
        store,
        round_,
        checkpoint=between.checkpoint,
        champion=between.checkpoint if outcome.promoted else between.champion,
        promoted=outcome.promoted,
        verdict=outcome.verdict,
        policy_eval=as_json["policy"],
        checkpoint_eval=as_json["checkpoint"],
        champion_eval=as_json["checkpoint" if outcome.promoted else "champion"],
        evaluation_scorers=json.dumps(outcome.scorers),
        **counted,
    )
    try:
        _check_not_revoked(store, round_, between.checkpoint)
    except RoundError:  # just before the round was finished, so that the revocation did not mark it
        store.commit(lambda connection: rounds.mark_revoked(connection, round_.recipe.name, round_.key))
        raise


def counts(query: Query, round_: Round) -> dict[str, int]:
    """How many candidates and tokens a round drew, and how many it accepted: columns of `rounds`."""
    (counted,) = query(
        f"""SELECT count(*) AS candidates, coalesce(sum(c.tokens), 0)::BIGINT AS tokens,
                count(*) FILTER (d.accepted) AS accepted,
                count(DISTINCT CASE WHEN d.accepted THEN c.prompt_id || {acceptance.normalised("c.text")} END)
                    AS distinct_accepted
            FROM ({ROUND_CANDIDATES}) c LEFT JOIN decisions d
                ON d.candidate_id = c.candidate_id AND d.recipe = $recipe AND d.round = $round""",
        of_round(round_),
    )
    return counted


def finite(value):
    """The same value with None for infinities and NaN, which JSON lacks: the open ends of intervals."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
