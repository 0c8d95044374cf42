"""Impact: what something has affected, and which rounds to run again to be rid of it.

Belongs here: following a candidate, prompt, source, text, scorer version or checkpoint forward. Not: taking it
out of use (revoke.py), nor the way back from a candidate (trace.py).

Impact follows what weights have learned from. A checkpoint is touched if it was trained on a touched candidate,
if its training started from touched weights, or if its round sampled from touched weights, because its samples
then come from them. A held-out prompt touches no weights; the verdicts that counted it are named. Not followed:
the effect of a rejected candidate on the parameters of a rule (an estimated M, a quantile's cut).

A round has to be run again if its checkpoint is touched, or the champion that it left in use is. Later rounds
that neither started nor sampled from touched weights can stay, so this is the smallest such set.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rsft_pipeline import revocations
from rsft_pipeline.audit.ids import Thing
from rsft_pipeline.audit.reading import at_once
from rsft_pipeline.store import NEWEST_SNAPSHOT, Query, Store


@dataclass(frozen=True)
class Touched:
    """A checkpoint that something has reached."""

    recipe: str
    round: str
    checkpoint: str
    role: str  # 'checkpoint' of its round, 'superseded' by a later attempt at the round, or a control's name
    samples: int  # how many samples of the thing it was trained on; 0: reached only through other weights
    how: str  # in words
    revoked: bool
    mlflow_run_id: str | None
    dagster_run_id: str | None


@dataclass(frozen=True)
class Again:
    """A round to run again."""

    recipe: str
    round: str
    why: str
    state: str  # `revoked`: `rsft run` will run it again


@dataclass(frozen=True)
class Impact:
    """Everything that a thing has affected."""

    thing: Thing
    snapshot: int  # of the store, from which all of this was read
    prompts: int  # the prompt itself, those from the source, or those with the text
    candidates: int  # training candidates drawn for it, drawn from it, or judged by it
    held_out: int  # the same for held-out candidates
    accepted: int  # of `candidates`, by the present decisions
    evaluated: list[tuple[str, str]]  # recipe and round whose verdict counted it
    checkpoints: list[Touched]  # in the order they were made
    later_candidates: int  # drawn from these checkpoints, in addition to those above
    later_accepted: int
    champions: list[tuple[str, str]]  # recipe and checkpoint: touched champions in use
    again: list[Again]  # in the order to run them


def impact(store: Store, thing: Thing) -> Impact:
    """What a thing has affected."""
    return at_once(store, lambda query: follow(query, thing))


def follow(query: Query, thing: Thing) -> Impact:
    """The same, inside an open transaction. Leaves the temporary tables `touched` and `touched_prompts`."""
    counts, samples = _touch(query, thing)
    made = query(MADE)
    reached = _direct(query, thing, samples, made)
    through = descend(made, reached)
    rounds = query(_ROUNDS)
    now = {(row["recipe"], row["round"]): row for row in rounds}
    revoked = {row["what"] for row in query("SELECT what FROM revocations WHERE kind = 'checkpoint'")}
    checkpoints = [
        Touched(
            row["recipe"],
            row["round"],
            row["checkpoint"],
            role(row, now.get((row["recipe"], row["round"]))),
            samples.get((row["recipe"], row["round"], row["checkpoint"]), 0),
            through[row["checkpoint"]],
            row["checkpoint"] in revoked,
            row["mlflow_run_id"],
            row["dagster_run_id"],
        )
        for row in made
        if row["checkpoint"] in through
    ]
    finished = {row["recipe"]: row for row in rounds if row["state"] == "finished"}  # the last of each
    champions = [(recipe, row["champion"]) for recipe, row in finished.items() if row["champion"] in through]
    return Impact(
        thing,
        query(NEWEST_SNAPSHOT)[0]["id"],
        **counts,
        checkpoints=checkpoints,
        **_later(query, thing, set(through)),
        champions=champions,
        again=[
            Again(row["recipe"], row["round"], why, row["state"])
            for row in rounds
            if row["state"] != "started" and (why := _why_again(row, through))
        ],
    )


# --- what is touched first ---------------------------------------------------------------------

_ASKED = "SELECT prompt_id FROM touched_prompts WHERE recipe = $recipe"
_CANDIDATES = {
    "candidate": "candidate_id = $what",
    "prompt": f"(prompt_id = $what OR prompt_id IN ({_ASKED}))",
    "source": f"prompt_id IN ({_ASKED})",
    "text": f"contains(text, $what) OR prompt_id IN ({_ASKED})",
    "checkpoint": "policy = $what",
    "scorer": "candidate_id IN (SELECT candidate_id FROM scores WHERE recipe = $recipe AND version = $what)",
}
_PROMPTS = {
    "prompt": "prompt_id = $what",
    "source": f"source = $what OR prompt_id IN ({revocations.READ_BEFORE} AND source = $what)",
    "text": """list_bool_or(list_transform($spellings,
        lambda words: contains(concat_ws(chr(10), text, reference, fields, messages), words)))""",
}


# Prompts that differ from those only in spaces. (Prompts from before exact spaces counted have this hash as their id.)
_OF_THE_SAME_TEXT = f"""SELECT recipe, prompt_id FROM prompts WHERE recipe = $recipe AND prompt_id NOT IN ({_ASKED})
    AND coalesce(same_text, prompt_id) IN (
        SELECT coalesce(same_text, prompt_id) FROM prompts WHERE recipe = $recipe AND prompt_id IN ({_ASKED}))"""


def _touch(query: Query, thing: Thing) -> tuple[dict[str, Any], dict[tuple[str, str], int]]:
    """Counts of touched candidates and prompts, and how many of the candidates each checkpoint was trained on.

    Makes the temporary tables `touched_prompts` and `touched`.
    """
    query("CREATE OR REPLACE TEMP TABLE touched_prompts (recipe VARCHAR, prompt_id VARCHAR)")
    query(
        """CREATE OR REPLACE TEMP TABLE touched
           (recipe VARCHAR, round VARCHAR, candidate_id VARCHAR, prompt_id VARCHAR, split VARCHAR, policy VARCHAR)"""
    )
    counts = {"prompts": 0, "candidates": 0, "held_out": 0, "accepted": 0, "evaluated": []}
    samples = {}
    for recipe in thing.recipes:
        of = {"recipe": recipe, "what": thing.what, "spellings": revocations.spellings(thing.what)}
        if thing.kind in _PROMPTS:
            prompts = f"SELECT recipe, prompt_id FROM prompts WHERE recipe = $recipe AND ({_PROMPTS[thing.kind]})"
            query(f"INSERT INTO touched_prompts {prompts}", of)
            query(f"INSERT INTO touched_prompts {_OF_THE_SAME_TEXT}", {"recipe": recipe})
        query(
            f"""INSERT INTO touched SELECT recipe, round, candidate_id, prompt_id, split, policy FROM candidates
                WHERE recipe = $recipe AND ({_CANDIDATES[thing.kind]})""",
            of,
        )
        (one,) = query(_COUNTS, of)
        decided = (
            f"SELECT count(*) AS accepted FROM decisions WHERE recipe = $recipe AND accepted AND {_DECIDED[thing.kind]}"
        )
        one |= query(f"{decided} AND {_ROUND_BY_ROUND}", of)[0]
        counts = {**counts, **{name: counts[name] + number for name, number in one.items()}}
        counts["evaluated"] += [(recipe, row["round"]) for row in query(_EVALUATED[thing.kind], of)]
        samples |= {(recipe, row["round"], row["checkpoint"]): row["samples"] for row in query(_TRAINED, of)}
    return counts, samples


_TOUCHED = "SELECT candidate_id FROM touched WHERE recipe = $recipe AND split = 'train'"
_COUNTS = """SELECT
    (SELECT count(*) FROM touched_prompts WHERE recipe = $recipe) AS prompts,
    (SELECT count(*) FROM touched WHERE recipe = $recipe AND split = 'train') AS candidates,
    (SELECT count(*) FROM touched WHERE recipe = $recipe AND split = 'eval') AS held_out"""
# Which decisions are about it, by other columns of `decisions` where possible: candidate ids are the widest column and
# in no order. For a scorer, those made by this version: another may have judged the same candidates since.
_DECIDED = {
    "candidate": "candidate_id = $what",
    "prompt": f"(prompt_id = $what OR prompt_id IN ({_ASKED}))",
    "source": f"prompt_id IN ({_ASKED})",
    "scorer": "round IN (SELECT round FROM rounds WHERE recipe = $recipe AND contains(scorers, $what))",
    **dict.fromkeys(("text", "checkpoint"), f"candidate_id IN ({_TOUCHED})"),
}
_ROUND_BY_ROUND = "round IN (SELECT DISTINCT round FROM touched WHERE recipe = $recipe)"
_TRAINED = f"""SELECT round, checkpoint, count(*) AS samples FROM training_samples
    WHERE recipe = $recipe AND candidate_id IN ({_TOUCHED}) GROUP BY round, checkpoint ORDER BY round"""
# The rounds whose verdict counted it: a prompt, whichever weights answered it, or an answer, by the weights that gave
# it. For a scorer, those whose verdict used this version.
_VERDICTS = f"""SELECT DISTINCT round FROM evaluations WHERE recipe = $recipe AND (
        prompt_id IN ({_ASKED})
        OR (checkpoint, prompt_id) IN (
            SELECT (policy, prompt_id) FROM touched WHERE recipe = $recipe AND split = 'eval')
    ) {{}} ORDER BY round"""
_EVALUATED = {
    **dict.fromkeys(_CANDIDATES, _VERDICTS.format("")),
    "scorer": _VERDICTS.format(
        """AND round IN (SELECT round FROM rounds
            WHERE recipe = $recipe AND contains(coalesce(evaluation_scorers, scorers), $what))"""
    ),
}


def _direct(query: Query, thing: Thing, samples: Mapping, made: Iterable[Mapping]) -> dict[str, str]:
    """The checkpoints reached directly, and how."""
    if thing.kind == "scorer":
        by = [row for row in made if thing.what in row["scorers"]]
        return {row["checkpoint"]: f"trained on {row['samples']:,} samples accepted by it" for row in by}
    reached = {
        checkpoint: f"trained on {count:,} {'sample' if count == 1 else 'samples'} of it"
        for (_, _, checkpoint), count in samples.items()
    }
    if thing.kind == "checkpoint":
        reached[thing.what] = "it is this one"
    return reached


# --- what is touched through other weights ------------------------------------------------------

# For a checkpoint from before `drawn_from` was recorded, take that of its round if it is known, else the policy.
MADE = """SELECT k.recipe, k.round, k.checkpoint, k.parent, k.policy, k.trained_on, k.samples, k.snapshot, k.path,
        k.accepted_digest,
        coalesce(k.drawn_from, r.drawn_from, k.policy) AS drawn_from,
        k.mlflow_run_id, k.dagster_run_id, k.meta::JSON ->> '$.training.data' AS data,
        json_extract_string(k.meta, '$.scorers[*]') AS scorers
    FROM checkpoints k LEFT JOIN rounds r ON r.recipe = k.recipe AND r.round = k.round AND r.policy = k.policy
    ORDER BY k.snapshot, k.round, k.checkpoint"""
_ROUNDS = """SELECT recipe, round, state, policy, drawn_from, checkpoint, champion, controls FROM rounds
    ORDER BY recipe, round"""


def descend(made: list[dict], reached: Mapping[str, str]) -> dict[str, str]:
    """All weights reached, and how: the given ones, and those that came from them.

    Args:
        made: rows of `MADE`.
        reached: digest → how, in words.
    """
    through = dict(reached)
    edges = [(row["checkpoint"], edge) for row in made for edge in _edges(row, made)]
    while found := [(to, how) for to, (weights, how) in edges if weights in through and to not in through]:
        for to, how in found:
            through.setdefault(to, how)
    return through


def _edges(row: Mapping[str, Any], made: list[dict]) -> list[tuple[str, str]]:
    """The weights that a checkpoint came from, and how."""
    if row["parent"] == row["drawn_from"]:
        edges = [(row["parent"], f"starts from {row['parent']} and learned from its draws")]
    else:
        edges = [(row["parent"], f"starts from {row['parent']}")]
        edges += [(row["drawn_from"], f"learned from draws of {row['drawn_from']}")]
    before = ((key, other["drawn_from"]) for key, other in earlier(row, made).items())
    return edges + [(weights, f"learned from draws of {weights} in {key}") for key, weights in before]


def earlier(row: Mapping[str, Any], made: list[dict]) -> dict[str, dict]:
    """Earlier rounds that a checkpoint also learned from (`data: all_rounds`): round → its last attempt at that time.

    Args:
        made: rows of `MADE`, which are in the order of snapshots.
    """
    return {
        other["round"]: other
        for other in made
        if row["data"] == "all_rounds"
        and other["recipe"] == row["recipe"]
        and other["trained_on"] in (None, "accepted")
        and other["round"] < row["round"]
        and other["snapshot"] <= row["snapshot"]
    }


def role(row: Mapping[str, Any], round_: Mapping[str, Any] | None) -> str:
    """The role of a checkpoint (a row of `checkpoints`) in its round (a row of `rounds`)."""
    if row["trained_on"] not in (None, "accepted"):
        return f"control {row['trained_on']}"
    return "checkpoint" if round_ and round_["checkpoint"] == row["checkpoint"] else "superseded"


def _later(query: Query, thing: Thing, through: set[str]) -> dict[str, int]:
    """Counts of what was drawn from the reached weights, without what is touched itself."""
    weights = sorted(through - {thing.what})
    (drawn,) = query(
        f"""SELECT count(*) AS n FROM candidates
            WHERE split = 'train' AND list_contains($weights, policy) AND {_MORE}""",
        {"weights": weights},
    )
    rounds = query("SELECT recipe, round FROM rounds WHERE list_contains($weights, drawn_from)", {"weights": weights})
    accepted = 0
    for recipe in dict.fromkeys(row["recipe"] for row in rounds):
        of = {"recipe": recipe, "rounds": [row["round"] for row in rounds if row["recipe"] == recipe]}
        sql = f"""SELECT count(*) AS n FROM decisions
            WHERE recipe = $recipe AND accepted AND list_contains($rounds, round) AND {_MORE}"""
        accepted += query(sql, of)[0]["n"]
    return {"later_candidates": drawn["n"], "later_accepted": accepted}


_MORE = "candidate_id NOT IN (SELECT candidate_id FROM touched)"


def _why_again(row: Mapping[str, Any], through: Mapping[str, str]) -> str | None:
    if row["checkpoint"] in through:
        return f"its checkpoint {row['checkpoint']}: {through[row['checkpoint']]}"
    if row["champion"] in through:
        return f"it left the champion {row['champion']} in use: {through[row['champion']]}"
    return None
