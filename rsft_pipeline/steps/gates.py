"""Gates: what must hold before a checkpoint is trained, and what a person should be told.

Each asks the store a yes-or-no question and gives the reason. Dagster shows them as asset checks;
training evaluates the blocking ones again itself, since a failed check stops only the run it ran in.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from rsft_pipeline import revocations, rounds
from rsft_pipeline.evaluation import compare
from rsft_pipeline.home import Home
from rsft_pipeline.rounds import Round
from rsft_pipeline.steps.evaluate import recorded_results
from rsft_pipeline.steps.rows import ACCEPTED, of_training
from rsft_pipeline.store import Store


@dataclass(frozen=True)
class Finding:
    """The answer of a gate."""

    passed: bool
    reason: str
    facts: dict[str, Any] = field(default_factory=dict)


def something_accepted(store: Store, round_: Round) -> Finding:
    """There is something to train on."""
    samples = store.value(f"SELECT count(*) FROM ({ACCEPTED})", of_training(round_))
    reason = f"{samples} accepted samples to train on" if samples else _nothing(store, round_)
    return Finding(samples > 0, reason, {"samples": samples})


def _nothing(store: Store, round_: Round) -> str:
    rows = store.query(
        """SELECT reason, count(*) AS n, min(score) AS low, max(score) AS high, any_value(parameters) AS rule
           FROM decisions WHERE recipe = ? AND round = ? GROUP BY reason ORDER BY n DESC""",
        [round_.recipe.name, round_.key],
    )
    if not rows:
        return "nothing was accepted: no candidate was decided on"
    why = ", ".join(f"{row['reason']}: {row['n']}" for row in rows)
    rule = json.loads(rows[0]["rule"])
    if {row["reason"] for row in rows} == {"cannot judge"}:
        return (
            f"nothing was accepted ({why}): what the rule {rule['rule']} looks at is missing of every candidate. "
            "Look at what the scorers say in the step `scores`"
        )
    of_rule = {name: value for name, value in rule.items() if name != "pilot" and type(value) in (int, float)}
    numbers = ", ".join(f"{name} {value:g}" for name, value in of_rule.items())
    scores = [row[end] for row in rows for end in ("low", "high") if row[end] is not None]
    reached = f"Combined scores are from {min(scores):.4g} to {max(scores):.4g}" if scores else "Nothing has a score"
    return (
        f"nothing was accepted ({why}). {reached}, the rule is {rule['rule']} ({numbers}): loosen `acceptance`, raise "
        "`sampling.draws`, or look at the scores"
    )


def no_eval_prompt(store: Store, round_: Round) -> Finding:
    """No held-out prompt is trained on, in this round or any earlier one, however the question is worded.

    Earlier attempts at a round that was begun again do not count: nothing is built on their checkpoints.
    """
    rows = store.query(
        f"""SELECT candidate_id FROM ({ACCEPTED}) WHERE split <> 'train'
            UNION SELECT t.candidate_id FROM training_samples t
            JOIN candidates c ON c.candidate_id = t.candidate_id AND c.recipe = $recipe
            JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
            JOIN rounds r ON r.recipe = $recipe AND r.round = t.round AND r.checkpoint = t.checkpoint
            WHERE t.recipe = $recipe AND t.round < $last AND (p.split = 'eval' OR p.question IN (
                SELECT question FROM prompts WHERE recipe = $recipe AND split = 'eval' AND active))""",
        of_training(round_),
    )
    named = ", ".join(row["candidate_id"] for row in rows[:5])
    reason = f"{len(rows)} accepted candidates answer held-out prompts: {named}" if rows else "no held-out prompt"
    return Finding(not rows, reason, {"overlap": len(rows)})


BLOCKING = (something_accepted, no_eval_prompt)


def nothing_revoked(store: Store, round_: Round) -> Finding:
    """Nothing that the checkpoint has learned, itself or through the weights it came from, was revoked since."""
    made = rounds.row_of(store, round_.recipe.name, round_.key)["checkpoint"]
    why = made and revocations.of_checkpoint(store, round_.recipe.name, made)
    return Finding(not why, why or "nothing that it has learned was revoked")


def acceptance_rate(store: Store, round_: Round) -> Finding:
    """The share of accepted candidates is inside the recipe's bounds."""
    rate = store.value(
        "SELECT coalesce(avg(accepted::INTEGER), 0) FROM decisions WHERE recipe = ? AND round = ?",
        [round_.recipe.name, round_.key],
    )
    low, high = round_.recipe.acceptance_rate
    reason = f"{rate:.1%} accepted; expected {low:.1%} to {high:.1%}"
    return Finding(low <= rate <= high, reason, {"acceptance_rate": rate})


def prompt_share(store: Store, round_: Round) -> Finding:
    """No prompt has more than `largest_share` of the accepted set."""
    rows = store.query(
        f"""SELECT prompt_id, count(*) / sum(count(*)) OVER () AS share
            FROM ({ACCEPTED}) GROUP BY prompt_id ORDER BY share DESC, prompt_id LIMIT 1""",
        of_training(round_),
    )
    share, most = (rows[0]["share"] if rows else 0.0), round_.recipe.largest_share
    reason = f"the largest share is {share:.1%}; expected at most {most:.1%}"
    return Finding(
        share <= most, reason, {"largest_share": share, **({"prompt": rows[0]["prompt_id"]} if rows else {})}
    )


def source_is_latest(store: Store, round_: Round, home: Home) -> Finding:
    """The weights that the round samples from are still those that it would start from now."""
    now = rounds.starting_weights(store, round_.recipe, home, round_.key, round_.recipe.policy)
    if now.digest == round_.policy:
        return Finding(True, f"{round_.policy} ({round_.policy_source}) is the {round_.recipe.policy}")
    reason = f"sampled from {round_.policy}, but the {round_.recipe.policy} is now {now.digest}: run the round again"
    return Finding(False, reason, {"latest": now.digest})


def not_worse(store: Store, round_: Round) -> Finding:
    """The checkpoint did not lose against the champion."""
    row = rounds.row_of(store, round_.recipe.name, round_.key)
    if row["state"] != "finished":
        return Finding(False, "the round was not evaluated")
    better = row["promoted"] or not _lost(store, round_)
    return Finding(better, row["verdict"])


def _lost(store: Store, round_: Round) -> bool:
    recipe, how = round_.recipe, round_.recipe.evaluation
    roles = ("champion", "checkpoint")
    before, after = (recorded_results(store.query, recipe.name, round_.key, role) for role in roles)
    compared = compare(before, after, recipe.promotion.metric, k=how.k, confidence=how.confidence)
    return compared.high < 0
