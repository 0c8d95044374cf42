"""Score: what each candidate is worth, by the present versions of a round's scorers.

Belongs here: those versions, whether one was revoked, and which candidates are still to be judged. Not: how a
candidate is judged (scoring/), nor which are accepted (decide.py).
"""

import json
import time
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from rsft_pipeline import lineage, revocations, scoring
from rsft_pipeline.devices import Device
from rsft_pipeline.progress import Show
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.rounds import Round, RoundError
from rsft_pipeline.steps.rows import COMBINED, OF_SCORERS, of_scorers
from rsft_pipeline.store import Store, columns

BATCH = 1024  # candidates that a scorer is given at once
KEPT_AFTER = 2.0  # seconds of judging after which the scores are persisted; a commit takes a hundredth of that


def check_not_revoked(store: Store, round_: Round) -> None:
    """Raise RoundError if weights or a scorer of the round were revoked: nothing it drew could be accepted."""
    if why := revocations.of_round(store, [round_.policy, round_.drawn_from], versions(store, round_)):
        raise RoundError(f"{round_.recipe.name} {round_.key}: {why}. Change that, and run the round again")


def versions(store: Store, round_: Round, before: list[str] | None = None) -> dict[str, str]:
    """The version of each of a round's scorers, and of the combined score.

    Args:
        before: the result of `accepted_before`, if the caller has it already.
    """
    recipe = round_.recipe
    before = accepted_before(store, round_) if before is None else before
    found = {config.label: scoring.version(config, recipe, before) for config in recipe.scoring.scorers}
    how = recipe.scoring.model_dump(include={"combine"}) | {
        config.label: [config.weight, config.minimum] for config in recipe.scoring.scorers
    }
    return found | {COMBINED: lineage.digest([found, how])}


def accepted_before(store: Store, round_: Round) -> list[str]:
    """The distinct texts that the recipe's earlier rounds accepted; empty if no scorer needs them."""
    if not any(config.kind == "novelty" for config in round_.recipe.scoring.scorers):
        return []
    rows = store.arrow(
        """SELECT DISTINCT c.text FROM decisions d
           JOIN candidates c ON c.candidate_id = d.candidate_id AND c.recipe = $recipe
           WHERE d.recipe = $recipe AND d.accepted AND d.round < $round AND c.text IS NOT NULL ORDER BY c.text""",
        {"recipe": round_.recipe.name, "round": round_.key},
    )
    return rows["text"].to_pylist()


@dataclass(frozen=True)
class Scorers:
    """A round's scorers, loaded, and their versions."""

    judges: dict[str, scoring.Judge]
    version_of: dict[str, str]
    accepted_before: list[str]


def load(store: Store, round_: Round, device: Device) -> Scorers:
    """Load the scorers of a round. Raises RoundError if one of them changes meanwhile."""
    before = accepted_before(store, round_)
    version_of = versions(store, round_, before)
    scorers = Scorers(scoring.judges(round_.recipe, device, before), version_of, before)
    _check_unchanged(store, round_, scorers)
    return scorers


def _check_unchanged(store: Store, round_: Round, scorers: Scorers) -> None:
    now = versions(store, round_, scorers.accepted_before)
    if changed := [name for name, version in scorers.version_of.items() if now[name] != version]:
        raise RoundError(
            f"{round_.recipe.name} {round_.key}: the scorer `{changed[0]}` has changed since it was loaded, so what it "
            "says is not what its file says by now. Nothing is lost: run the round again, and it goes on from here"
        )


def unscored(store: Store, round_: Round, candidates: str, parameters: dict, version_of: dict[str, str]) -> int:
    """How many of the candidates, erased ones aside, have no combined score of these versions. See `score`."""
    to_judge = _to_judge(parameters, version_of)
    return store.value(f"SELECT count(*) AS n FROM ({_UNSCORED.format(candidates=candidates)})", to_judge)


def score(
    store: Store,
    round_: Round,
    candidates: str,
    parameters: dict,
    *,
    device: Device,
    run_id: str,
    show: Show,
    scorers: Scorers | None = None,
) -> int:
    """Score those candidates that have no combined score of the present version. Returns how many.

    Args:
        candidates: ROUND_CANDIDATES or EVALUATION_CANDIDATES.
        parameters: the parameters of that SQL.
        scorers: the round's scorers, if they are loaded already.

    Raises:
        RoundError: a scorer has changed since it was loaded.
    """
    recipe = round_.recipe
    if scorers:
        _check_unchanged(store, round_, scorers)
    version_of = scorers.version_of if scorers else versions(store, round_)
    with store.connection() as connection:
        to_judge = _to_judge(parameters, version_of)
        connection.execute(f"CREATE TEMP TABLE unscored AS {_UNSCORED.format(candidates=candidates)}", to_judge)
        (number,) = connection.execute("SELECT count(*) FROM unscored").fetchone()
        if not number:
            return 0
        scorers = scorers or load(store, round_, device)
        if scorers.version_of != version_of:  # the table `unscored` was made by the versions before
            raise RoundError(f"{recipe.name} {round_.key}: a scorer changed just now: run the round again")
        done, judged, since = 0, [], time.monotonic()
        for batch in connection.execute("FROM unscored").to_arrow_reader(BATCH):
            judged += _judge(recipe, scorers.judges, batch.to_pylist())
            done += batch.num_rows
            if done == number or time.monotonic() - since > KEPT_AFTER:
                store.append("scores", _rows(recipe, judged, version_of, run_id))
                show(done, "", number)
                judged, since = [], time.monotonic()
    return number


class _Judged(NamedTuple):
    """A new score of a candidate."""

    row: dict  # of the candidate
    scorer: str
    value: float | None
    passed: bool | None = None  # for the combined score: whether all gates were passed


def _rows(recipe: Recipe, judged: list[_Judged], version_of: dict[str, str], run_id: str) -> pa.Table:
    return columns(
        len(judged),
        recipe=recipe.name,
        round=[one.row["round"] for one in judged],
        candidate_id=[one.row["candidate_id"] for one in judged],
        scorer=[one.scorer for one in judged],
        version=[version_of[one.scorer] for one in judged],
        content=[one.row["content"] for one in judged],
        value=[one.value for one in judged],
        passed=[one.passed for one in judged],
        dagster_run_id=run_id,
    )


def _to_judge(parameters: dict, version_of: dict[str, str]) -> dict:
    return {**parameters, "version": version_of[COMBINED], "scorers": of_scorers(version_of)}


# If only weights or minima changed, no scorer has to judge again: its stored scores are in `known`.
_UNSCORED = f"""
    WITH unscored AS MATERIALIZED (
        SELECT c.candidate_id, c.round, c.text, c.log_p, c.finish_reason,
               p.text AS prompt, p.messages, p.reference, p.fields, p.content
        FROM ({{candidates}}) c JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
        ANTI JOIN (SELECT candidate_id, content FROM scores WHERE recipe = $recipe AND scorer = '{COMBINED}'
                   AND version = $version) s ON s.candidate_id = c.candidate_id AND s.content = p.content
        WHERE c.text IS NOT NULL AND p.text IS NOT NULL  -- an erased text is judged no more
    ), said AS (
        SELECT s.candidate_id, list(struct_pack(s.scorer, s.value)) AS known
        FROM scores s JOIN unscored u ON u.candidate_id = s.candidate_id AND u.content = s.content
        WHERE s.recipe = $recipe AND {OF_SCORERS} GROUP BY s.candidate_id
    )
    SELECT u.*, said.known FROM unscored u LEFT JOIN said ON said.candidate_id = u.candidate_id
"""


def _judge(recipe: Recipe, judges: dict[str, scoring.Judge], rows: list[dict]) -> list[_Judged]:
    """The new scores of these candidates."""
    samples = [judged_sample(row) for row in rows]
    score_of = [{one["scorer"]: one["value"] for one in row["known"] or ()} for row in rows]
    new: list[_Judged] = []
    for scorer, judge in judges.items():
        missing = [i for i, known in enumerate(score_of) if scorer not in known]
        values = scoring.score({scorer: judge}, [samples[i] for i in missing])[scorer]
        for i, value in zip(missing, values, strict=True):
            score_of[i][scorer] = value
            new.append(_Judged(rows[i], scorer, value))
    judged = {scorer: [known[scorer] for known in score_of] for scorer in judges}
    combined = zip(rows, *scoring.combine(recipe.scoring, judged), strict=True)
    return new + [_Judged(row, COMBINED, value, passed) for row, value, passed in combined]


def judged_sample(row: dict) -> scoring.Sample:
    """A candidate as scorers see it, from a row with its columns and its prompt's (whose text is called `prompt`)."""
    return scoring.Sample(
        prompt=row["prompt"],
        completion=row["text"],
        reference=row["reference"],
        fields=json.loads(row["fields"]),
        log_p=row["log_p"],
        messages=None if row["messages"] is None else json.loads(row["messages"]),
        ended=row["finish_reason"] == "stop",
    )
