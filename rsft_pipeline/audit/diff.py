"""Diff: what changed between two rounds of a recipe.

Belongs here: comparing the rounds prompt by prompt, on the prompts that both asked, with intervals. Not: whether a
checkpoint beats its champion, which each round's own evaluation decides (evaluation.py).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rsft_pipeline import acceptance, efficiency, rounds
from rsft_pipeline.audit import ids, recorded
from rsft_pipeline.audit.findings import NAMED
from rsft_pipeline.evaluation import PromptResult, interval
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.rounds import Round
from rsft_pipeline.steps.evaluate import recorded_results
from rsft_pipeline.steps.rows import ROUND_CANDIDATES, of_round
from rsft_pipeline.store import Store


@dataclass(frozen=True)
class Change:
    """A prompt and its share of successes in each round."""

    prompt_id: str
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Shift:
    """A mean over prompts minus the earlier round's, paired per prompt, with its interval."""

    what: str
    before: float
    after: float
    difference: float
    low: float | None  # None: unbounded, if all prompts moved by the same amount and the value has no bounds
    high: float | None
    prompts: int


@dataclass(frozen=True)
class Compared:
    """The prompts that both rounds asked."""

    shared: int
    only_before: int  # prompts that only the earlier round asked
    only_after: int
    solved: int  # no success before, some after
    lost: int  # some before, none after
    solved_first: tuple[Change, ...]  # the largest changes among the solved
    lost_first: tuple[Change, ...]
    most_changed: tuple[Change, ...]
    shifts: tuple[Shift, ...]


@dataclass(frozen=True)
class Diff:
    """Two rounds. `drawn`: training candidates; a success is one that the rule accepts, before `distinct` and `cap`.
    `held_out`: the checkpoints' evaluations; a success is a passing draw; None if a round was not evaluated."""

    recipe: str
    before: str
    after: str
    drawn: Compared
    held_out: Compared | None
    notes: tuple[str, ...]  # why numbers of the two may not be comparable


def diff(store: Store, recipe: Recipe, before: str, after: str) -> Diff:
    """Compare two rounds of a recipe.

    Raises:
        AuditError: there is no such round.
        RoundError: one ran with settings that are now refused.
    """
    for key in (before, after):
        ids.check_round(store, recipe.name, key)
    rounds_ = [rounds.record(store, recipe, key) for key in (before, after)]
    level = rounds_[1].recipe.evaluation.confidence
    decided = [_drawn(store, round_) for round_ in rounds_]
    drawn = _compared(store, recipe, decided, level, "share that the rule accepts")
    evaluated = [recorded_results(store.query, round_.recipe.name, round_.key, "checkpoint") for round_ in rounds_]
    held_out = _compared(store, recipe, evaluated, level, "share that passes") if all(evaluated) else None
    notes = _notes(store, *rounds_)
    notes += [f"{round_.key} has decided nothing yet" for round_, one in zip(rounds_, decided, strict=True) if not one]
    if drawn.only_before and drawn.only_after and not drawn.shared:
        notes.append(
            "no prompt is in both rounds: `sampling.prompts` chose others, or the sources or the template gave others"
        )
    return Diff(recipe.name, before, after, drawn, held_out, tuple(notes))


def _notes(store: Store, before: Round, after: Round) -> list[str]:
    def versions(round_: Round) -> list[dict[str, str]]:
        return store.commit(lambda c: [recorded.versions(c, round_, held_out=held_out) for held_out in (False, True)])

    notes = []
    pairs = [pair for pair in zip(versions(before), versions(after), strict=True) if all(pair)]  # else one has none yet
    for label in sorted(set().union(*itertools.chain(*pairs))):
        if any(was.get(label) != now.get(label) for was, now in pairs):
            notes.append(f"scorer {label} is not of the same version in both: its scores may not compare")
    for path, (was, now) in before.recipe.differing(after.recipe).items():
        if path.partition(".")[0] in ("sampling", "acceptance", "prompts", "evaluation"):
            notes.append(f"`{path}` is {was} in {before.key}, {now} in {after.key}")
    if before.recipe.sampling.until or after.recipe.sampling.until:
        notes.append(
            "draws of a prompt ended with enough accepted (`sampling.until`): the share that the rule accepts "
            "overstates its chance, most where few draws were needed"
        )
    return notes


def _drawn(store: Store, round_: Round) -> list[PromptResult]:
    """The round's candidates per prompt, in the form of evaluation results; `passes` counts those the rule accepted.

    Counts after `distinct` would say little about the policy: for a prompt with a single right answer that is 1,
    however often it is drawn.
    """
    ruled = efficiency.ruled(round_.recipe.acceptance.model_dump(mode="json"))
    rows = store.query(
        f"""SELECT c.prompt_id, count(*) AS draws, count(*) FILTER ({ruled}) AS passes, avg(d.score) AS score,
                count(DISTINCT {acceptance.normalised("c.text")}) AS "distinct", avg(c.tokens) AS tokens
            FROM ({ROUND_CANDIDATES}) c
            JOIN decisions d ON d.candidate_id = c.candidate_id AND d.recipe = $recipe AND d.round = $round
            GROUP BY c.prompt_id ORDER BY c.prompt_id""",
        of_round(round_),
    )
    return [PromptResult(**row) for row in rows]


def _compared(
    store: Store, recipe: Recipe, results: Sequence[Sequence[PromptResult]], level: float, success: str
) -> Compared:
    before, after = ({r.prompt_id: r for r in each} for each in results)
    shared = sorted(before.keys() & after.keys())
    rates = {p: (before[p].passes / before[p].draws, after[p].passes / after[p].draws) for p in shared}
    solved = [p for p in shared if rates[p][0] == 0 < rates[p][1]]
    lost = [p for p in shared if rates[p][1] == 0 < rates[p][0]]

    def largest(ids: Sequence[str]) -> list[str]:
        moved = [p for p in ids if rates[p][0] != rates[p][1]]
        return sorted(moved, key=lambda p: (-abs(rates[p][1] - rates[p][0]), p))[:NAMED]

    shown = [largest(solved), largest(lost), largest(shared)]
    texts = _texts(store, recipe, [p for ids in shown for p in ids])
    changes = [tuple(Change(p, texts.get(p, ""), *rates[p]) for p in ids) for ids in shown]
    return Compared(
        len(shared),
        len(before) - len(shared),
        len(after) - len(shared),
        len(solved),
        len(lost),
        *changes,
        shifts=tuple(_shifts([before[p] for p in shared], [after[p] for p in shared], level, success)),
    )


def _shifts(before: Sequence[PromptResult], after: Sequence[PromptResult], level: float, success: str) -> list[Shift]:
    """How success, distinct texts, score and length moved."""
    shares = {
        success: lambda r: r.passes / r.draws,
        "distinct texts per draw": lambda r: r.distinct / r.draws,
    }
    means = {"score": lambda r: r.score, "tokens": lambda r: r.tokens}
    shifts = []
    for what, value in {**shares, **means}.items():
        sides = [{r.prompt_id: value(r) for r in each if value(r) is not None} for each in (before, after)]
        common = sorted(sides[0].keys() & sides[1].keys())
        if not common:
            continue
        first, second = (np.array([side[prompt] for prompt in common]) for side in sides)
        low, high = interval(second - first, level, (-1.0, 1.0) if what in shares else None)
        ends = (end if math.isfinite(end) else None for end in (low, high))
        shifts.append(
            Shift(what, *map(float, (first.mean(), second.mean(), (second - first).mean())), *ends, len(common))
        )
    return shifts


def _texts(store: Store, recipe: Recipe, prompt_ids: Sequence[str]) -> dict[str, str]:
    rows = store.query(
        "SELECT prompt_id, text FROM prompts WHERE recipe = ? AND prompt_id IN (SELECT unnest(?::VARCHAR[]))",
        [recipe.name, list(prompt_ids)],
    )
    return {row["prompt_id"]: row["text"] for row in rows}
