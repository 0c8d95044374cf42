"""Trace: one candidate, from the source row of its prompt to the weights that learned from it.

Belongs here: the chain, link by link, from the store alone, and where a link is missing. Not: what else a prompt
or checkpoint reached (impact.py), nor what MLflow and Dagster know about the runs named here (assets/outside.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rsft_pipeline import sampling
from rsft_pipeline.audit import ids, words
from rsft_pipeline.audit.impact import MADE, descend, role
from rsft_pipeline.audit.reading import at_once, snapshots
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.section import RECORDED
from rsft_pipeline.revocations import ANY, OF, REASON, said
from rsft_pipeline.rounds import Round
from rsft_pipeline.steps.rows import COMBINED, ROUND_CANDIDATES, of_round
from rsft_pipeline.store import NEWEST_SNAPSHOT, Query, Store


@dataclass(frozen=True)
class Prompt:
    """What was asked, and where it came from."""

    prompt_id: str
    split: str
    source: str  # as last read, and so is the line
    line: int
    earlier: list[dict[str, Any]]  # source, line and dagster_run_id of earlier readings from other sources
    text: str | None  # None: erased
    reference: str | None
    fields: dict[str, Any] | None
    content: str | None  # digest of what scorers see of it
    active: bool  # it was there when the sources were last read, and is not revoked
    dagster_run_id: str | None
    snapshot: int | None  # of the store, in which it is as when the candidate was judged; None: it is shown as now


@dataclass(frozen=True)
class Weights:
    """Weights that a candidate came from."""

    digest: str
    recipe: str  # the recipe whose round made them, or whose rounds use them
    source: str  # the recipe and round that made them, or the model that the recipe names
    samples: int | None = None  # that they were trained on; None, as for what follows: no round made them
    parent: str | None = None
    policy: str | None = None
    path: str | None = None
    mlflow_run_id: str | None = None
    dagster_run_id: str | None = None


@dataclass(frozen=True)
class Draw:
    """How the completion was drawn."""

    origin: str | None
    draw: int
    wave: int
    seed: int
    text: str | None  # None: erased
    token_ids: list[int] | None
    tokens: int
    finish_reason: str
    log_q: float | None
    log_p: float | None
    sampling: dict[str, Any] | None  # the settings, from the round's record; None: no record has this draw's
    settings: str  # their hash
    dagster_run_id: str | None


@dataclass(frozen=True)
class Score:
    """What a scorer gave."""

    scorer: str
    version: str
    content: str | None  # of the prompt as it was when judged
    value: float | None
    passed: bool | None  # for `combined`: every gate was passed
    decided_by: bool  # the decision was made by this score, not by one of another version or content
    dagster_run_id: str | None


@dataclass(frozen=True)
class Decision:
    """Whether it is trained on, and why."""

    accepted: bool
    reason: str
    words: str
    score: float | None
    log_a: float | None
    u: float
    weight: float
    parameters: dict[str, Any]  # of the rule, including M
    dagster_run_id: str | None  # None: it follows from a revocation and is not recorded yet


@dataclass(frozen=True)
class Learned:
    """A checkpoint that learned from the candidate."""

    recipe: str
    round: str
    checkpoint: str
    role: str  # as in impact.py
    how: str
    weight: float | None  # of the sample; None: reached only through other weights
    champion: bool  # in use now
    revoked: bool
    mlflow_run_id: str | None
    dagster_run_id: str | None


@dataclass(frozen=True)
class Trace:
    """The chain of one candidate."""

    recipe: str
    round: str
    candidate_id: str
    snapshot: int  # of the store
    prompt: Prompt | None
    weights: list[Weights]  # those it was drawn from, then those they were trained from, back to the base
    draw: Draw
    of_round: bool  # it is among the draws of the round as it ran; else it is left from an earlier attempt
    scores: list[Score]
    decision: Decision | None  # the present one; None: it was not decided on, as held-out candidates never are
    decision_then: Decision | None  # the one by which it was trained on, if that is not the present one
    evaluated: list[tuple[str, str]]  # for a held-out candidate: recipe and round whose verdict counted it
    learned: list[Learned]  # directly, then through weights
    revoked: list[str]  # in words
    gaps: list[str]  # links that are missing, in words

    @property
    def complete(self) -> bool:
        """Whether no link that such a candidate should have is missing."""
        return not self.gaps


def trace(store: Store, candidate: str, recipe: str | None = None) -> Trace:
    """The chain of a candidate.

    Args:
        candidate: its id, or the beginning of it.

    Raises:
        AuditError: there is no such candidate, or more than one.
    """

    return at_once(store, lambda query: _trace(query, ids.candidate(query, candidate, recipe)))


def _trace(query: Query, drawn: dict[str, Any]) -> Trace:
    gaps: list[str] = []
    recipe, candidate_id = drawn["recipe"], drawn["candidate_id"]
    of = {"recipe": recipe, "round": drawn["round"], "candidate": candidate_id}
    of |= {"prompt": drawn["prompt_id"], "policy": drawn["policy"]}
    made, rounds = query(MADE), query(_ROUNDS)
    round_ = next((row for row in rounds if (row["recipe"], row["round"]) == (recipe, drawn["round"])), None)
    if round_ is None:
        gaps.append("its round is not recorded")
    later = any(row["recipe"] == recipe and row["data"] == "all_rounds" for row in made)
    last = max((row["round"] for row in rounds if later and row["recipe"] == recipe), default=drawn["round"])
    trained = query(_TRAINED, {**of, "last": last})
    decision = _decision(_first(query(_DECIDED.format(at=""), of)))
    settings = _settings(query, drawn, round_)
    its_own = decision is not None or _of_round(query, drawn, round_)
    expected = gaps if its_own or trained else []  # a left-over need not have these links
    prompt, scores = _first(query(_PROMPT.format(at=""), of)), query(_SCORES, of)
    named = "evaluation_scorers" if drawn["split"] == "eval" else "scorers"
    versions = set(json.loads((round_ and round_[named]) or "{}").values())
    content = _content(scores, versions, prompt)
    came_of = [candidate_id, drawn["prompt_id"], drawn["policy"], *(versions if decision else ())]
    revoked = _revoked(query, recipe, came_of)
    aside = any(row["kind"] != "scorer" for row in revoked)
    return Trace(
        recipe=recipe,
        round=drawn["round"],
        candidate_id=candidate_id,
        snapshot=query(NEWEST_SNAPSHOT)[0]["id"],
        prompt=_prompt(query, of, prompt, content, made, gaps),
        weights=_ancestry(drawn, made, rounds, gaps),
        draw=_draw(drawn, settings, expected),
        of_round=its_own,
        scores=_scores(scores, versions, content, decision, expected),
        decision=_set_aside(decision) if aside else decision,
        decision_then=_then(query, of, trained, made, decision, aside, gaps),
        evaluated=[(recipe, row["round"]) for row in query(_EVALUATED, of)] if drawn["split"] == "eval" else [],
        learned=_learned(query, trained, made, rounds, gaps),
        revoked=[said(row, spoken=True) for row in revoked],
        gaps=gaps,
    )


def _first(rows: list[dict]) -> dict | None:
    return rows[0] if rows else None


# --- backward ---------------------------------------------------------------------------------

_PROMPT = """SELECT prompt_id, split, source, line, text, reference, fields, content, active, dagster_run_id
    FROM prompts {at} WHERE recipe = $recipe AND prompt_id = $prompt"""
EARLIER = "SELECT source, line, dagster_run_id FROM earlier_sources WHERE recipe = $recipe AND prompt_id = $prompt"
_ROUNDS = """SELECT recipe, round, state, policy, policy_source, drawn_from, checkpoint, champion, scorers,
        coalesce(evaluation_scorers, scorers) AS evaluation_scorers, settings, answers,
        settings::JSON ->> '$.model.source' AS base, settings::JSON ->> '$.sampling.teacher.source' AS teacher
    FROM rounds ORDER BY recipe, round"""


def _prompt(
    query: Query, of: dict[str, Any], now: dict | None, content: str | None, made: list[dict], gaps: list[str]
) -> Prompt | None:
    """The prompt as it was when judged, from the present rows or from those that a checkpoint of the round had."""
    if now is None:
        gaps.append("its prompt is not in the store")
        return None
    row = {**now, "snapshot": None}
    if content not in (None, now["content"]) and now["text"] is not None:  # erased texts are not brought back
        trained = {one["snapshot"] for one in made if (one["recipe"], one["round"]) == (of["recipe"], of["round"])}
        judged_by = (
            {**then, "active": now["active"], "snapshot": snapshot}
            for snapshot in sorted(trained & snapshots(query))
            if (then := _first(query(_PROMPT.format(at=f"AT (VERSION => {int(snapshot)})"), of)))
            and then["content"] == content
        )
        row = next(judged_by, row)
        if row["snapshot"] is None:
            gaps.append("its prompt has changed since it was judged, and is shown as it is now")
    return Prompt(**{**row, "fields": row["fields"] and json.loads(row["fields"])}, earlier=query(EARLIER, of))


def _ancestry(drawn: Mapping, made: list[dict], rounds: list[dict], gaps: list[str]) -> list[Weights]:
    """The weights that were drawn from, and those each was trained from, back to weights that no round made."""
    by_digest = {row["checkpoint"]: row for row in reversed(made)}  # the first round that made them
    chain, digest, recipe = [], drawn["policy"], drawn["recipe"]
    while (row := by_digest.get(digest)) and digest not in {weights.digest for weights in chain}:
        recipe = row["recipe"]
        more = (row[name] for name in ("samples", "parent", "policy", "path", "mlflow_run_id", "dagster_run_id"))
        chain.append(Weights(digest, recipe, f"{recipe} {row['round']}", *more))
        digest = row["parent"]
    own = [row for row in rounds if row["recipe"] == recipe]  # of the recipe at the chain's end
    outside = {row["drawn_from"]: row["teacher"] for row in own if row["drawn_from"] != row["policy"]}
    outside |= {row["policy"]: row["base"] for row in own if row["policy_source"] == "base"}
    started = (row for row in made if row["recipe"] == recipe and row["parent"] not in {*outside, *by_digest})
    outside |= {row["parent"]: _base(row, own) for row in started}
    if outside.get(digest):
        chain.append(Weights(digest, recipe, outside[digest]))
    else:
        gaps.append(f"where the weights {digest} come from is not recorded")
    return chain


def _base(made: Mapping, rounds: list[dict]) -> str | None:
    """The model that a round's recipe names, which its checkpoint may have started from."""
    key = made["recipe"], made["round"]
    return next((row["base"] for row in rounds if (row["recipe"], row["round"]) == key), None)


def _settings(query: Query, drawn: Mapping, round_: Mapping | None) -> Recipe | None:
    """The recipe that the candidate was drawn by, as the round recorded it now or at an earlier attempt."""
    if round_ and (found := _shapes(round_, drawn)):
        return found
    (there,) = query("SELECT min(snapshot_id) AS first, max(snapshot_id) AS last FROM lake.snapshots()")
    earlier = query(
        f"""SELECT settings, answers FROM lake.table_changes('rounds', {there["first"]}, {there["last"]})
            WHERE recipe = $recipe AND round = $round ORDER BY snapshot_id DESC""",
        {"recipe": drawn["recipe"], "round": drawn["round"]},
    )
    return next((found for row in earlier if (found := _shapes(row, drawn))), None)


def _shapes(recorded: Mapping, drawn: Mapping) -> Recipe | None:
    """The recipe of a round's record, if the candidate's hash of settings and its draw number fit; else None."""
    recipe = _recipe(recorded["settings"], drawn["recipe"])
    if recipe is None:
        return None
    how = recipe.sampling if drawn["split"] == "train" else sampling.evaluation_sampling(recipe)
    hashed = sampling.settings(how, recipe.seed, recorded["answers"])
    return recipe if hashed == drawn["settings"] and drawn["draw"] < how.most_draws else None


def _recipe(recorded: str, name: str) -> Recipe | None:
    try:
        return Recipe.of_file(Path(name), json.loads(recorded), RECORDED)
    except (TypeError, ValueError):  # from another version of this program, or no longer JSON
        return None


def _of_round(query: Query, drawn: Mapping, round_: Mapping | None) -> bool:
    """Whether a candidate is among the draws of its round as it ran; True if the record cannot be read."""
    recipe = round_ and _recipe(round_["settings"], drawn["recipe"])
    if recipe is None or drawn["split"] == "eval":  # held-out draws belong to all rounds that evaluate their policy
        return True
    policy = round_["policy"]
    drawn_from = round_["drawn_from"] or policy
    ran = Round(recipe, round_["round"], policy, round_["policy_source"], drawn_from, "", round_["answers"])
    sql = f"SELECT 1 FROM ({ROUND_CANDIDATES}) WHERE candidate_id = $candidate"
    return bool(query(sql, {**of_round(ran), "candidate": drawn["candidate_id"]}))


def _draw(drawn: Mapping, settings: Recipe | None, gaps: list[str]) -> Draw:
    how = None
    if settings is None:
        gaps.append(f"the settings that hash to {drawn['settings']} are not recorded: it was drawn by another recipe")
    else:
        how = settings.sampling if drawn["split"] == "train" else sampling.evaluation_sampling(settings)
        how = {**how.model_dump(mode="json", exclude={"wave_size", "batch_size", "prompts"}), "seed": settings.seed}
    columns = Draw.__annotations__.keys() - {"sampling"}
    return Draw(**{name: drawn[name] for name in columns}, sampling=how)


# --- judged and decided -------------------------------------------------------------------------

_SCORES = """SELECT scorer, version, content, value, passed, dagster_run_id FROM scores
    WHERE recipe = $recipe AND round = $round AND candidate_id = $candidate
    ORDER BY scorer = 'combined', scorer, rowid"""
_DECIDED = """SELECT accepted, reason, score, log_a, u, weight, parameters, dagster_run_id FROM decisions {at}
    WHERE recipe = $recipe AND round = $round AND candidate_id = $candidate"""
_EVALUATED = """SELECT DISTINCT round FROM evaluations
    WHERE recipe = $recipe AND checkpoint = $policy AND prompt_id = $prompt ORDER BY round"""


def _content(rows: list[dict], versions: set[str], prompt: Mapping | None) -> str | None:
    """The content that the prompt had when it was judged for the decision; None if that is not recorded.

    If it was judged twice, before and after its reference was changed, the later judgement decided.
    """
    by = [row["content"] for row in rows if row["scorer"] == COMBINED and row["version"] in versions]
    return prompt["content"] if prompt and prompt["content"] in by else by[-1] if by else None


def _scores(
    rows: list[dict], versions: set[str], content: str | None, decision: Decision | None, gaps: list[str]
) -> list[Score]:
    if not any(row["scorer"] == COMBINED for row in rows):
        gaps.append("it has no combined score")
    elif decision and not any(row["version"] in versions for row in rows):
        gaps.append("no score is of the versions that the round was decided by")
    return [Score(**row, decided_by=row["version"] in versions and row["content"] == content) for row in rows]


def _decision(row: Mapping | None) -> Decision | None:
    if row is None:
        return None
    return Decision(**{**row, "parameters": json.loads(row["parameters"])}, words=words.decision(row))


def _set_aside(made: Decision | None) -> Decision | None:
    """The present decision on a candidate that was revoked, or came from what was: it is no longer trained on."""
    if made is None or not made.accepted:
        return made
    words = "it was revoked, or what it came of was; the round was not decided again since"
    return replace(made, accepted=False, reason=REASON, words=words, log_a=None, weight=1.0, dagster_run_id=None)


def _then(
    query: Query,
    of: dict[str, Any],
    trained: list[dict],
    made: list[dict],
    decision: Decision | None,
    aside: bool,
    gaps: list[str],
) -> Decision | None:
    """The decision by which it was first trained on, if the present one rejects it or is missing.

    Controls also learn rejected candidates, regardless of the decision.
    """
    samples = {row["checkpoint"] for row in trained}
    by_decision = [row for row in made if row["checkpoint"] in samples and row["trained_on"] in (None, "accepted")]
    if not by_decision:
        return None
    if decision and decision.accepted:
        return decision if aside else None
    there = snapshots(query)
    for row in by_decision:
        if row["snapshot"] in there:
            at = f"AT (VERSION => {int(row['snapshot'])})"
            return _decision(_first(query(_DECIDED.format(at=at), of)))
    gaps.append("the decision by which it was trained on is in no snapshot any more")
    return None


# --- forward ----------------------------------------------------------------------------------

_TRAINED = """SELECT recipe, round, checkpoint, weight FROM training_samples
    WHERE recipe = $recipe AND round BETWEEN $round AND $last AND candidate_id = $candidate"""


def _learned(query: Query, trained: list[dict], made: list[dict], rounds: list[dict], gaps: list[str]) -> list[Learned]:
    weight = {(row["recipe"], row["round"], row["checkpoint"]): row["weight"] for row in trained}
    known = {(row["recipe"], row["round"], row["checkpoint"]) for row in made}
    gaps += [f"the checkpoint {key[2]} that was trained on it is not in the store" for key in weight.keys() - known]
    through = descend(made, {checkpoint: "trained on it" for _, _, checkpoint in weight})
    now = {(row["recipe"], row["round"]): row for row in rounds}
    champions = {row["recipe"]: row["champion"] for row in rounds if row["state"] == "finished"}
    revoked = {row["what"] for row in query("SELECT what FROM revocations WHERE kind = 'checkpoint'")}
    found = [
        Learned(
            row["recipe"],
            row["round"],
            row["checkpoint"],
            role(row, now.get((row["recipe"], row["round"]))),
            through[row["checkpoint"]],
            weight.get((row["recipe"], row["round"], row["checkpoint"])),
            champions.get(row["recipe"]) == row["checkpoint"],
            row["checkpoint"] in revoked,
            row["mlflow_run_id"],
            row["dagster_run_id"],
        )
        for row in made
        if row["checkpoint"] in through
    ]
    return sorted(found, key=lambda one: one.weight is None)


# Revocations of things with these ids. A prompt has the same id in every recipe that asks it, but may be revoked in
# only one of them.
REVOKED = f"""SELECT DISTINCT kind, what, cause, who, why FROM revocations
    WHERE list_contains($ids, what) AND (kind <> 'prompt' OR {OF}) ORDER BY ALL"""


def _revoked(query: Query, recipe: str, ids: list[str]) -> list[dict]:
    return query(REVOKED, {"recipe": recipe, "ids": ids}) if query(ANY) else []
