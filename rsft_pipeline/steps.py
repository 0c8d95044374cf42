"""Steps: what a round does with the store, one function for each step of the loop.

Belongs here: reading a step's input, calling the method, writing its output whole or not at all.
Not: the method itself (prompts, sampling, scoring, acceptance, training, evaluation), nor who calls
the steps and shows their outcome (the assets).

Every step can be repeated: what is there already is kept, and what is replaced is replaced whole.
"""

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from rsft_pipeline import acceptance, lineage, merkle, models, prompts, revocations, rounds, sampling, scoring, tasks
from rsft_pipeline.card import card
from rsft_pipeline.devices import Device
from rsft_pipeline.evaluation import Comparison, PromptResult, Summary, compare, promoted, summarise
from rsft_pipeline.home import Home
from rsft_pipeline.progress import Show
from rsft_pipeline.recipe import Recipe, RejectionRule, Sampling
from rsft_pipeline.rounds import Round, RoundError, Weights, starting_weights
from rsft_pipeline.sampling import EVALUATION, Asked, Session
from rsft_pipeline.store import NEWEST_SNAPSHOT, Store, columns, insert
from rsft_pipeline.store import replace as store_replace
from rsft_pipeline.training import History, Sample, fit

COMBINED = "combined"  # the scorer name of the combined score
TrainedOn = Literal["accepted", "random", "everything"]  # the last two are controls
SCORING_BATCH = 4096  # candidates scored and persisted together

# Joins are on ids alone and every table is filtered by the recipe itself: with `a.recipe = b.recipe` as a
# join condition the planner may take it for one worth joining by, and builds the cross product.

# The candidates that a round drew to be trained on. A candidate of older settings, of a policy that has been
# superseded, or of a prompt that the round no longer asks stays in the table but is not the round's.
ROUND_CANDIDATES = """
    SELECT * FROM candidates
    WHERE recipe = $recipe AND round = $round AND split = 'train'
      AND policy = $policy AND settings = $settings AND draw < $draws AND prompt_id IN (
        SELECT prompt_id FROM round_prompts WHERE recipe = $recipe AND round = $round AND split = 'train')
"""
# What one policy answered to the round's held-out prompts, in whichever round it was drawn.
EVALUATION_CANDIDATES = """
    SELECT * FROM candidates
    WHERE recipe = $recipe AND split = 'eval' AND policy = $policy AND settings = $settings AND draw < $draws
      AND prompt_id IN (
        SELECT prompt_id FROM round_prompts WHERE recipe = $recipe AND round = $round AND split = 'eval')
"""


def of_round(round_: Round) -> dict:
    """Parameters of ROUND_CANDIDATES."""
    recipe = round_.recipe
    return {
        "recipe": recipe.name,
        "round": round_.key,
        "policy": round_.drawn_from,
        "settings": sampling.settings(recipe.sampling, recipe.seed),
        "draws": recipe.sampling.most_draws,
    }


def of_evaluation(round_: Round, policy: str) -> dict:
    """Parameters of EVALUATION_CANDIDATES."""
    drawn = evaluation_sampling(round_.recipe)
    settings = sampling.settings(drawn, round_.recipe.seed)
    return {**of_round(round_), "policy": policy, "settings": settings, "draws": drawn.draws}


def evaluation_sampling(recipe: Recipe) -> Sampling:
    """How held-out candidates are drawn: as the round's, but from the weights evaluated, and as `evaluation` says."""
    how = recipe.evaluation
    changed = {"source": "policy", "teacher": None, "until": None, "temperature": how.temperature, "draws": how.draws}
    return recipe.sampling.model_copy(update=changed | ({"top_k": 1} if how.greedy else {}))


# --- prompts ---------------------------------------------------------------------------------


def ingest(store: Store, recipe: Recipe, home: Home, run_id: str, show: Show) -> prompts.Ingest:
    """Read the recipe's prompts into `prompts` and `quarantine`.

    A prompt that is in the sources no more is kept, for what was drawn from it, but not drawn from again. One
    that is known keeps its split for ever, whatever `eval_fraction` has become.
    """
    prompts.check(recipe)  # before a model is made or fetched for them
    base = models.base(recipe, home.path, lambda step, steps, loss, _: show(step, f"loss {loss:.3f}", steps))
    tokenizer = models.tokenizer(base.path)
    read = revocations.without(store, recipe.name, prompts.read(recipe, tokenizer, models.context_length(base.path)))
    sides = {row["prompt_id"]: row["split"] for row in store.query(_SIDES, [recipe.name])}
    read = replace(read, prompts=[replace(p, split=sides.get(p.prompt_id, p.split)) for p in read.prompts])
    if empty := {"train", "eval"} - {prompt.split for prompt in read.prompts}:
        raise prompts.PromptError(
            f"{recipe.name}: none of {len(read.prompts)} prompts is in the {empty.pop()} split: give more prompts, "
            "or change prompts.eval_fraction"
        )
    known = store.query("SELECT DISTINCT source_digest FROM prompts WHERE recipe = ? AND active", [recipe.name])
    kept = store.query("SELECT source, line, raw, reason, detail FROM quarantine WHERE recipe = ?", [recipe.name])
    if known == [{"source_digest": read.digest}] and Counter(map(_values, kept)) == Counter(
        map(_values, map(vars, read.refused))
    ):
        return read
    usable = [
        {
            "recipe": recipe.name,
            "prompt_id": prompt.prompt_id,
            "text": prompt.text,
            "chat": prompt.messages is not None and tokenizer.chat_template is not None,
            "messages": json.dumps(prompt.messages) if prompt.messages else None,
            "reference": prompt.reference,
            "fields": json.dumps(prompt.fields, ensure_ascii=False),
            "split": prompt.split,
            "source": prompt.source,
            "line": prompt.line,
            "content": lineage.digest([prompt.text, prompt.reference, prompt.fields]),
            "source_digest": read.digest,
            "active": True,
            "dagster_run_id": run_id,
        }
        for prompt in read.prompts
    ]
    refused = [{"recipe": recipe.name, **vars(row), "dagster_run_id": run_id} for row in read.refused]

    def work(connection):
        ids = [row["prompt_id"] for row in usable]
        connection.execute("UPDATE prompts SET active = false WHERE recipe = ? AND active", [recipe.name])
        connection.execute(
            "DELETE FROM prompts WHERE recipe = ? AND prompt_id IN (SELECT unnest(?))", [recipe.name, ids]
        )
        insert(connection, "prompts", usable)
        store_replace(connection, "quarantine", refused, recipe=recipe.name)

    store.commit(work)
    return read


_SIDES = "SELECT prompt_id, split FROM prompts WHERE recipe = ?"


def _values(row: dict) -> tuple:
    return tuple(row[name] for name in ("source", "line", "raw", "reason", "detail"))


def prompts_of(store: Store, recipe: Recipe, split: str) -> list[dict]:
    """The prompts of a split that are in the sources now."""
    return store.query("SELECT * FROM prompts WHERE recipe = ? AND split = ? AND active", [recipe.name, split])


# --- candidates ------------------------------------------------------------------------------


def ask(store: Store, round_: Round, tokenizer, *, split: str, run_id: str) -> list[Asked]:
    """The prompts that a round draws for (split `train`) or is evaluated on (`eval`). Writes `round_prompts`."""
    check_not_revoked(store, round_)  # before anything is drawn in vain
    recipe = round_.recipe
    scope = round_.key if split == "train" else EVALUATION
    number = recipe.sampling.prompts if split == "train" else recipe.evaluation.prompts
    chosen = sampling.choose(prompts_of(store, recipe, split), number, f"{recipe.seed} {scope}")
    of = {"recipe": recipe.name, "round": round_.key, "split": split}
    rows = [{**of, "prompt_id": row["prompt_id"], "dagster_run_id": run_id} for row in chosen]
    store.replace("round_prompts", rows, **of)
    return [
        Asked(row["prompt_id"], tuple(ids), row["reference"])
        for row in chosen
        for ids in [prompts.encode(tokenizer, row["text"], row["chat"], recipe.task)]
    ]


def plan(
    store: Store, round_: Round, policy: str, asked: Sequence[Asked], *, split: str, draws: range
) -> list[tuple[int, list[sampling.Request]]]:
    """The waves of these draws that are missing: of the round (split `train`), or of evaluating a policy (`eval`)."""
    recipe = round_.recipe
    if split == "train":
        scope, how, there = round_.key, recipe.sampling, (ROUND_CANDIDATES, of_round(round_))
    else:
        scope, how = EVALUATION, evaluation_sampling(recipe)
        there = EVALUATION_CANDIDATES, of_evaluation(round_, policy)
    waves = sampling.waves(recipe, scope, policy, asked, how, draws)
    sql, parameters = there
    drawn = set(store.arrow(f"SELECT candidate_id FROM ({sql})", parameters)["candidate_id"].to_pylist())
    return list(sampling.pending(waves, drawn))


def draw(
    store: Store,
    round_: Round,
    policy: str,
    session: Session,
    waves: Sequence[tuple[int, list[sampling.Request]]],
    *,
    split: str,
    run_id: str,
    show: Show,
) -> int:
    """Draw the waves and persist each, whole, as soon as it is drawn. Returns the tokens drawn."""
    recipe = round_.recipe
    how = recipe.sampling if split == "train" else evaluation_sampling(recipe)
    hashed, tokens, done, began = sampling.settings(how, recipe.seed), 0, 0, time.monotonic()
    for number, requests in waves:
        drawn = session.draw(requests, how)
        store.append(
            "candidates",
            columns(
                len(drawn),
                recipe=recipe.name,
                round=round_.key,
                candidate_id=[one.request.candidate_id for one in drawn],
                prompt_id=[one.request.asked.prompt_id for one in drawn],
                split=split,
                origin=how.source,
                policy=policy,
                draw=[one.request.draw for one in drawn],
                wave=number,
                text=[one.text for one in drawn],
                token_ids=[one.token_ids for one in drawn],
                tokens=[len(one.token_ids) for one in drawn],
                finish_reason=[one.finish_reason for one in drawn],
                log_q=[one.log_q for one in drawn],
                log_p=[one.log_p for one in drawn],
                seed=[one.request.seed for one in drawn],
                settings=hashed,
                dagster_run_id=run_id,
            ),
        )
        tokens += sum(len(one.token_ids) for one in drawn)
        done += len(drawn)
        show(done, f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
    return tokens


def draw_all(
    store: Store, round_: Round, session: Session, asked: Sequence[Asked], *, run_id: str, show: Show
) -> tuple[int, int]:
    """Draw the same number for each of the round's prompts. Returns how many candidates this call drew, and tokens."""
    (draws,) = sampling.passes(round_.recipe.sampling)
    waves = plan(store, round_, round_.drawn_from, asked, split="train", draws=draws)
    missing = sum(len(requests) for _, requests in waves)
    show = partial(show, total=missing)
    return missing, draw(store, round_, round_.drawn_from, session, waves, split="train", run_id=run_id, show=show)


# --- scores ----------------------------------------------------------------------------------


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


# --- decisions -------------------------------------------------------------------------------


def scored(store: Store, round_: Round) -> str:
    """SQL of a round's candidates with their scores: the columns that acceptance.decisions_sql reads."""
    recipe, version_of = round_.recipe, versions(store, round_)
    target, joined = "c.log_p", ""
    if isinstance(recipe.acceptance, RejectionRule) and recipe.acceptance.target != "policy":
        target = "t.value"
        joined = f"""LEFT JOIN scores t
            ON t.candidate_id = c.candidate_id AND t.recipe = $recipe AND t.content = p.content
            AND t.scorer = '{recipe.acceptance.target}' AND t.version = '{version_of[recipe.acceptance.target]}'"""
    return f"""
        SELECT c.candidate_id, c.prompt_id, c.draw, c.text, c.tokens, c.log_q, c.log_p,
               s.value AS score, s.passed, {target} AS target
        FROM ({ROUND_CANDIDATES}) c JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
        LEFT JOIN scores s ON s.candidate_id = c.candidate_id AND s.recipe = $recipe AND s.content = p.content
            AND s.scorer = '{COMBINED}' AND s.version = '{version_of[COMBINED]}'
        {joined}"""


def decide(store: Store, round_: Round, run_id: str) -> dict:
    """Decide on each of the round's candidates, in place of earlier decisions. Returns the rule's parameters."""
    check_not_revoked(store, round_)
    recipe, candidates, version_of = round_.recipe, scored(store, round_), versions(store, round_)

    def work(connection):
        parameters, decisions = _decisions(connection, round_, candidates, recipe.sampling.most_draws)
        connection.execute("DELETE FROM decisions WHERE recipe = ? AND round = ?", [recipe.name, round_.key])
        connection.execute(
            f"""INSERT INTO decisions BY NAME
                SELECT ? AS recipe, ? AS round, *, ? AS parameters, ? AS dagster_run_id FROM ({decisions})""",
            [recipe.name, round_.key, json.dumps(parameters), run_id],
        )
        connection.execute(
            "UPDATE rounds SET scorers = ? WHERE recipe = ? AND round = ?",
            [json.dumps(version_of), recipe.name, round_.key],
        )
        connection.execute("DROP TABLE scored")
        return parameters

    return store.commit(work)


def accepted_so_far(store: Store, round_: Round, draws: int) -> dict[str, int]:
    """How many of each prompt's first draws would be accepted, were it decided on them alone. Writes nothing."""
    candidates = scored(store, round_)

    def work(connection):
        _, decisions = _decisions(connection, round_, candidates, draws)
        counted = connection.execute(f"SELECT prompt_id, count(*) FROM ({decisions}) WHERE accepted GROUP BY ALL")
        found = dict(counted.fetchall())
        connection.execute("DROP TABLE scored")
        return found

    return store.commit(work)


def _decisions(connection, round_: Round, candidates: str, draws: int) -> tuple[dict, str]:
    """The rule's parameters, and a SELECT of the decisions on the temporary table `scored`, which is made for it."""
    recipe = round_.recipe
    connection.execute(f"CREATE OR REPLACE TEMP TABLE scored AS {candidates}", {**of_round(round_), "draws": draws})
    (twice,) = connection.execute("SELECT count(*) - count(DISTINCT candidate_id) FROM scored").fetchone()
    if twice:
        raise RoundError(f"{recipe.name} {round_.key}: {twice} candidates are in the store twice; nothing was decided")
    revoked = revocations.set_aside(connection, recipe.name, recipe.seed)
    parameters = acceptance.parameters(connection, "scored", recipe.acceptance, rounds.number(round_.key))
    return parameters, f"({acceptance.decisions_sql('scored', parameters, recipe.seed)}) UNION ALL BY NAME ({revoked})"


# --- training set ----------------------------------------------------------------------------

# The candidates that were decided on and may be trained on, of one round or of all up to it.
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
# Those that a control is trained on: no score has a say, only the rule's distinctness.
_EVERYTHING = f"""
    SELECT * REPLACE (1::DOUBLE AS weight) FROM ({_DECIDED} AND d.reason <> 'revoked')
    QUALIFY NOT $distinct OR row_number() OVER (
        PARTITION BY prompt_id, md5_number({acceptance.normalised("text")}) ORDER BY md5($salt || candidate_id)) = 1
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
        name: the recipe's.
        settings: its fields as the round recorded them.
    """
    first = round_key if settings.training.data == "round" else "r000"
    parameters = {"recipe": name, "first": first, "last": round_key}
    if trained_on == "accepted":
        return ACCEPTED, parameters
    chance = {"distinct": settings.acceptance.distinct, "salt": f"control:{settings.seed}:"}
    return {"everything": _EVERYTHING, "random": _RANDOM}[trained_on], {**parameters, **chance}


def training_set(
    store: Store, round_: Round, tokenizer, trained_on: TrainedOn = "accepted"
) -> tuple[list[Sample], pa.ChunkedArray, int]:
    """What a checkpoint of the round is trained on, in the order of the ids, the leaf of each sample (merkle.py),
    and the snapshot that they were read from."""
    chosen, parameters = training_rows(round_.recipe.name, round_.key, round_.recipe, trained_on)

    def work(connection):
        sql = f"SELECT *, {merkle.LEAF} AS leaf FROM ({chosen}) ORDER BY candidate_id"
        read = connection.execute(sql, parameters).to_arrow_table()
        return read, connection.execute(NEWEST_SNAPSHOT).fetchone()[0]

    read, snapshot = store.commit(work)
    rows = read.to_pylist()
    encoded = {(row["prompt"], row["chat"]): None for row in rows}
    for text, chat in encoded:
        encoded[text, chat] = prompts.encode(tokenizer, text, chat, round_.recipe.task)
    samples = [
        Sample(row["candidate_id"], encoded[row["prompt"], row["chat"]], row["token_ids"], row["weight"])
        for row in rows
    ]
    return samples, read["leaf"], snapshot


def _scorers(store: Store, round_: Round) -> list[str]:
    """The scorer versions that the decisions on a training set rest on."""
    rows = store.query(
        "SELECT scorers FROM rounds WHERE recipe = $recipe AND round BETWEEN $first AND $last", of_training(round_)
    )
    return sorted({version for row in rows for version in json.loads(row["scorers"] or "{}").values()})


@dataclass(frozen=True)
class Trained:
    """A checkpoint and how it came to be."""

    checkpoint: models.Checkpoint
    parent: str
    accepted_digest: str
    merkle_root: str
    samples: int
    trainable: int
    total: int
    history: History


def train(
    store: Store,
    round_: Round,
    start: Weights,
    home: Home,
    device: Device,
    run_id: str,
    show: Show,
    trained_on: TrainedOn = "accepted",
) -> Trained:
    """Fine-tune the starting weights on the accepted set, or as a control, save the checkpoint, and write its rows.

    Writes `checkpoints` and `training_samples`. Killed, it goes on from its last saved step.
    """
    recipe = round_.recipe
    tokenizer = models.tokenizer(start.path)
    samples, leaves, snapshot = training_set(store, round_, tokenizer, trained_on)
    model = models.load(start.path, device, train=True, task=recipe.task)
    model, trainable, total = models.select_trainable(model, recipe.model, recipe.seed)
    scratch = home.scratch / recipe.name / round_.key / trained_on
    history = fit(
        model,
        samples,
        recipe.training,
        task=tasks.of(recipe),
        start=lineage.digest([start.digest, recipe.model.model_dump(mode="json")]),
        seed=recipe.seed,
        device=device,
        pad_id=tokenizer.pad_token_id,
        scratch=scratch,
        on_step=lambda step, steps, loss, tokens: show(step, f"loss {loss:.3f}", steps),
    )
    accepted = lineage.set_digest(sample.candidate_id for sample in samples)
    meta = {
        "kind": "checkpoint",
        "recipe": recipe.name,
        "round": round_.key,
        "parent": start.digest,
        "policy": round_.policy,
        "trained_on": trained_on,
        "accepted_digest": accepted,
        "merkle_root": merkle.root(leaves),
        "samples": len(samples),
        "store_snapshot": snapshot,
        "scorers": _scorers(store, round_),
        "training": recipe.training.model_dump(mode="json"),
        "recipe_digest": recipe.digest,
        "steps": len(history.steps),
        "tokens": history.tokens,
        "loss": history.steps[-1].loss,
        "trainable_parameters": trainable,
        "parameters": total,
    }
    checkpoint = models.save(model, tokenizer, home.checkpoints, meta, card(meta))
    row = {
        "recipe": recipe.name,
        "round": round_.key,
        "checkpoint": checkpoint.digest,
        "parent": start.digest,
        "policy": round_.policy,
        "trained_on": trained_on,
        "path": str(checkpoint.path),
        "accepted_digest": accepted,
        "samples": len(samples),
        "steps": len(history.steps),
        "loss": history.steps[-1].loss,
        "snapshot": snapshot,
        "meta": json.dumps(meta),
        "mlflow_run_id": round_.mlflow_run_id,
        "dagster_run_id": run_id,
    }
    members = columns(
        len(samples),
        recipe=recipe.name,
        round=round_.key,
        checkpoint=checkpoint.digest,
        candidate_id=[sample.candidate_id for sample in samples],
        weight=[sample.weight for sample in samples],
        leaf=leaves,
        dagster_run_id=run_id,
    )

    def work(connection):
        made = {"recipe": recipe.name, "round": round_.key, "checkpoint": checkpoint.digest}
        store_replace(connection, "checkpoints", [row], **made)
        store_replace(connection, "training_samples", members, **made)
        revocations.lift(connection, checkpoint.digest)
        told = "checkpoint = ?", checkpoint.digest
        if trained_on != "accepted":
            control = json.dumps({trained_on: checkpoint.digest})
            told = "controls = json_merge_patch(coalesce(controls, '{}'), ?)", control
        connection.execute(
            f"UPDATE rounds SET {told[0]} WHERE recipe = ? AND round = ?", [told[1], recipe.name, round_.key]
        )

    store.commit(work)
    shutil.rmtree(scratch, ignore_errors=True)
    return Trained(checkpoint, start.digest, accepted, meta["merkle_root"], len(samples), trainable, total, history)


# --- evaluation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """The weights that a round evaluates: digests, by role."""

    policy: str
    checkpoint: str
    champion: str  # before the round
    controls: dict[str, str]  # `random`, `everything`: those that the recipe asks for

    @property
    def roles(self) -> dict[str, str]:
        """All of them by role."""
        return {"policy": self.policy, "checkpoint": self.checkpoint, "champion": self.champion, **self.controls}

    @property
    def weights(self) -> list[str]:
        """Each of them once."""
        return list(dict.fromkeys(self.roles.values()))


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found."""

    summaries: dict[str, Summary]  # by role
    comparison: Comparison  # of the checkpoint with the champion
    controls: dict[str, Comparison]  # of the checkpoint with each control
    promoted: bool
    verdict: str


def contest(store: Store, round_: Round, home: Home) -> Contest:
    """Who is evaluated in a round. Raises RoundError where it has no checkpoint."""
    row = rounds.raw(store, round_.recipe.name, round_.key)
    made, controls = row["checkpoint"], json.loads(row["controls"] or "{}")
    if made is None:
        raise RoundError(f"{round_.recipe.name} {round_.key} has no checkpoint: materialise it first")
    if missing := set(round_.recipe.controls) - set(controls):
        raise RoundError(
            f"{round_.recipe.name} {round_.key} has no {missing.pop()} control: materialise `controls` first"
        )
    if why := revocations.of_checkpoint(store, round_.recipe.name, made):
        raise RoundError(f"{round_.recipe.name} {round_.key}: {why}. Run the round again from its beginning")
    champion = starting_weights(store, round_.recipe, home, round_.key, "champion")
    return Contest(round_.policy, made, champion.digest, {name: controls[name] for name in round_.recipe.controls})


def judge(store: Store, round_: Round, contest: Contest, run_id: str) -> Outcome:
    """Compare the contest's weights on the held-out prompts. Writes `evaluations`."""
    recipe, how = round_.recipe, round_.recipe.evaluation
    found = {role: results(store, round_, digest) for role, digest in contest.roles.items()}
    rows = [
        {
            "recipe": recipe.name,
            "round": round_.key,
            "role": role,
            "checkpoint": contest.roles[role],
            "prompt_id": result.prompt_id,
            "draws": result.draws,
            "passes": result.passes,
            "score": result.score,
            "distinct_texts": result.distinct,
            "tokens": result.tokens,
            "dagster_run_id": run_id,
        }
        for role, each in found.items()
        for result in each
    ]
    store.replace("evaluations", rows, recipe=recipe.name, round=round_.key)
    summaries = {role: summarise(each, k=how.k, confidence=how.confidence) for role, each in found.items()}
    compared = {
        role: compare(found[role], found["checkpoint"], recipe.promotion.metric, k=how.k, confidence=how.confidence)
        for role in ("champion", *contest.controls)
    }
    comparison = compared.pop("champion")
    won, verdict = promoted(comparison, recipe.promotion)
    return Outcome(summaries, comparison, compared, won, verdict)


def results(store: Store, round_: Round, policy: str) -> list[PromptResult]:
    """How a policy did on each of the round's held-out prompts."""
    recipe = round_.recipe
    rows = store.query(
        f"""SELECT c.prompt_id, count(*) AS draws,
                count(*) FILTER (s.value > $above AND s.passed) AS passes, avg(s.value) AS score,
                count(DISTINCT {acceptance.normalised("c.text")}) AS "distinct", avg(c.tokens) AS tokens
            FROM ({EVALUATION_CANDIDATES}) c JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
            JOIN scores s ON s.candidate_id = c.candidate_id AND s.recipe = $recipe AND s.content = p.content
                AND s.scorer = '{COMBINED}' AND s.version = $version
            GROUP BY c.prompt_id ORDER BY c.prompt_id""",
        {
            **of_evaluation(round_, policy),
            "above": recipe.evaluation.pass_above,
            "version": versions(store, round_)[COMBINED],
        },
    )
    return [PromptResult(**row) for row in rows]


def recorded_results(store: Store, round_: Round, role: str) -> list[PromptResult]:
    """What `judge` recorded of a role: `policy`, `checkpoint`, `champion` or a control."""
    rows = store.query(
        """SELECT prompt_id, draws, passes, score, distinct_texts AS "distinct", tokens FROM evaluations
           WHERE recipe = ? AND round = ? AND role = ? ORDER BY prompt_id""",
        [round_.recipe.name, round_.key, role],
    )
    return [PromptResult(**row) for row in rows]


def conclude(store: Store, round_: Round, contest: Contest, outcome: Outcome) -> None:
    """Finish the round's record: the point from which the round counts as done."""
    counts = store.query(
        f"""SELECT count(*) AS candidates, coalesce(sum(c.tokens), 0)::BIGINT AS tokens,
                count(*) FILTER (d.accepted) AS accepted,
                count(DISTINCT CASE WHEN d.accepted THEN c.prompt_id || {acceptance.normalised("c.text")} END)
                    AS distinct_accepted
            FROM ({ROUND_CANDIDATES}) c LEFT JOIN decisions d
                ON d.candidate_id = c.candidate_id AND d.recipe = $recipe AND d.round = $round""",
        of_round(round_),
    )[0]
    as_json = {role: json.dumps(_finite(asdict(summary))) for role, summary in outcome.summaries.items()}
    rounds.finish(
        store,
        round_,
        checkpoint=contest.checkpoint,
        champion=contest.checkpoint if outcome.promoted else contest.champion,
        promoted=outcome.promoted,
        verdict=outcome.verdict,
        policy_eval=as_json["policy"],
        checkpoint_eval=as_json["checkpoint"],
        champion_eval=as_json["checkpoint" if outcome.promoted else "champion"],
        **counts,
    )


def _finite(value):
    """The same with None for what JSON has no number for: the open end of an interval."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
