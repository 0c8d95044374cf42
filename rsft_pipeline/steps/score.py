"""Score: what each candidate is worth, by the versions that a round's scorers have.

Belongs here: those versions, what was revoked of them, and which candidates are still to be judged. Not: how a
candidate is judged (scoring/), nor which are accepted (decide.py).
"""

import json

from rsft_pipeline import lineage, revocations, scoring
from rsft_pipeline.devices import Device
from rsft_pipeline.progress import Show
from rsft_pipeline.rounds import Round, RoundError
from rsft_pipeline.steps.rows import COMBINED
from rsft_pipeline.store import Store, columns

SCORING_BATCH = 4096  # candidates scored and persisted together


def check_not_revoked(store: Store, round_: Round) -> None:
    """Raise RoundError when the weights or a scorer of a round were revoked: nothing it drew could be accepted."""
    if why := revocations.of_round(store, [round_.policy, round_.drawn_from], versions(store, round_)):
        raise RoundError(f"{round_.recipe.name} {round_.key}: {why}. Change that, and run the round again")


def versions(store: Store, round_: Round) -> dict[str, str]:
    """The version that each scorer has in a round, and that of the combined score."""
    recipe, before = round_.recipe, accepted_before(store, round_)
    found = {config.label: scoring.version(config, recipe, before) for config in recipe.scoring.scorers}
    how = recipe.scoring.model_dump(include={"combine"}) | {
        config.label: [config.weight, config.minimum] for config in recipe.scoring.scorers
    }
    return found | {COMBINED: lineage.digest([found, how])}


def accepted_before(store: Store, round_: Round) -> list[str]:
    """The different texts that the recipe's earlier rounds accepted; empty where no scorer asks for them."""
    if not any(config.kind == "novelty" for config in round_.recipe.scoring.scorers):
        return []
    rows = store.arrow(
        """SELECT DISTINCT c.text FROM decisions d
           JOIN candidates c ON c.candidate_id = d.candidate_id AND c.recipe = $recipe
           WHERE d.recipe = $recipe AND d.accepted AND d.round < $round AND c.text IS NOT NULL ORDER BY c.text""",
        {"recipe": round_.recipe.name, "round": round_.key},
    )
    return rows["text"].to_pylist()


def score(
    store: Store,
    round_: Round,
    candidates: str,
    parameters: dict,
    *,
    device: Device,
    run_id: str,
    show: Show,
    judges: dict[str, scoring.Judge] | None = None,
) -> int:
    """Score those candidates that have no combined score of the present version. Returns how many.

    Args:
        candidates: ROUND_CANDIDATES or EVALUATION_CANDIDATES.
        parameters: what it takes.
        judges: the recipe's scorers, where they are loaded already.
    """
    recipe = round_.recipe
    version_of = versions(store, round_)
    to_judge = {**parameters, "version": version_of[COMBINED]}
    unscored = store.arrow(f"SELECT * FROM ({_UNSCORED.format(candidates=candidates)})", to_judge)
    if not unscored.num_rows:
        return 0
    # With only weights or minima changed, the scorers themselves have nothing to do.
    known = store.query(
        f"""SELECT s.candidate_id, s.scorer, s.value FROM ({_UNSCORED.format(candidates=candidates)}) u
            JOIN scores s ON s.candidate_id = u.candidate_id AND s.content = u.content
            WHERE s.recipe = $recipe AND list_contains($versions, s.version)""",
        {**to_judge, "versions": list(version_of.values())},
    )
    value_of = {(row["candidate_id"], row["scorer"]): row["value"] for row in known}
    judges, done = judges or scoring.judges(recipe, device, accepted_before(store, round_)), 0
    for batch in unscored.to_batches(max_chunksize=SCORING_BATCH):
        rows = batch.to_pylist()
        new: list[tuple[dict, str, float | None, bool | None]] = []
        for scorer, judge in judges.items():
            missing = [row for row in rows if (row["candidate_id"], scorer) not in value_of]
            values = scoring.score({scorer: judge}, [judged_sample(row) for row in missing])[scorer]
            value_of |= {(row["candidate_id"], scorer): value for row, value in zip(missing, values, strict=True)}
            new += [(row, scorer, value, None) for row, value in zip(missing, values, strict=True)]
        judged = {scorer: [value_of[row["candidate_id"], scorer] for row in rows] for scorer in judges}
        new += [
            (row, COMBINED, value, passed)
            for row, value, passed in zip(rows, *scoring.combine(recipe.scoring, judged), strict=True)
        ]
        store.append(
            "scores",
            columns(
                len(new),
                recipe=recipe.name,
                round=[row["round"] for row, *_ in new],
                candidate_id=[row["candidate_id"] for row, *_ in new],
                scorer=[scorer for _, scorer, *_ in new],
                version=[version_of[scorer] for _, scorer, *_ in new],
                content=[row["content"] for row, *_ in new],
                value=[value for *_, value, _ in new],
                passed=[passed for *_, passed in new],
                dagster_run_id=run_id,
            ),
        )
        done += len(rows)
        show(done)
    return unscored.num_rows


_UNSCORED = f"""
    SELECT c.candidate_id, c.round, c.text, c.log_p, c.finish_reason,
           p.text AS prompt, p.messages, p.reference, p.fields, p.content
    FROM ({{candidates}}) c JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
    ANTI JOIN (SELECT candidate_id, content FROM scores WHERE recipe = $recipe AND scorer = '{COMBINED}'
               AND version = $version) s ON s.candidate_id = c.candidate_id AND s.content = p.content
    WHERE c.text IS NOT NULL AND p.text IS NOT NULL  -- an erased text is judged no more
"""


def judged_sample(row: dict) -> scoring.Sample:
    """A candidate as scorers see it, from a row of it and of its prompt (whose text is called `prompt`)."""
    return scoring.Sample(
        prompt=row["prompt"],
        completion=row["text"],
        reference=row["reference"],
        fields=json.loads(row["fields"]),
        log_p=row["log_p"],
        messages=None if row["messages"] is None else json.loads(row["messages"]),
        ended=row["finish_reason"] == "stop",
    )
