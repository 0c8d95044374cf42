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

from rsft_pipeline import acceptance, lineage, models, prompts, rounds, sampling, scoring, tasks
from rsft_pipeline.card import card
from rsft_pipeline.devices import Device
from rsft_pipeline.evaluation import Comparison, PromptResult, Summary, compare, promoted, summarise
from rsft_pipeline.home import Home
from rsft_pipeline.progress import Show
from rsft_pipeline.recipe import Recipe, RejectionRule, Sampling
from rsft_pipeline.rounds import Round, RoundError, Weights, starting_weights
from rsft_pipeline.sampling import EVALUATION, Session
from rsft_pipeline.store import NEWEST_SNAPSHOT, Store, insert
from rsft_pipeline.store import replace as store_replace
from rsft_pipeline.training import History, Sample, fit

COMBINED = "combined"  # the scorer name of the combined score
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
        "policy": round_.policy,
        "settings": sampling.settings(recipe.sampling, recipe.seed),
        "draws": recipe.sampling.draws,
    }


def of_evaluation(round_: Round, policy: str) -> dict:
    """Parameters of EVALUATION_CANDIDATES."""
    drawn = evaluation_sampling(round_.recipe)
    settings = sampling.settings(drawn, round_.recipe.seed)
    return {**of_round(round_), "policy": policy, "settings": settings, "draws": drawn.draws}


def evaluation_sampling(recipe: Recipe) -> Sampling:
    """How held-out candidates are drawn: as the round's, but for temperature and number."""
    changed = {"temperature": recipe.evaluation.temperature, "draws": recipe.evaluation.draws}
    return recipe.sampling.model_copy(update=changed)


# --- prompts ---------------------------------------------------------------------------------


def ingest(store: Store, recipe: Recipe, home: Home, run_id: str, show: Show) -> prompts.Ingest:
    """Read the recipe's prompts into `prompts` and `quarantine`.

    A prompt that is in the sources no more is kept, for what was drawn from it, but not drawn from again. One
    that is known keeps its split for ever, whatever `eval_fraction` has become.
    """
    prompts.check(recipe)  # before a model is made or fetched for them
    base = models.base(recipe, home.path, lambda step, steps, loss, _: show(step, f"loss {loss:.3f}", steps))
    tokenizer = models.tokenizer(base.path)
    read = prompts.read(recipe, tokenizer, models.context_length(base.path))
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


def plan(
    store: Store, round_: Round, policy: str, tokenizer, *, split: str, run_id: str
) -> list[tuple[int, list[sampling.Request]]]:
    """The waves that are still to be drawn: for the round (split `train`) or to evaluate a policy (`eval`).

    Writes which prompts they are, to `round_prompts`.
    """
    recipe = round_.recipe
    chosen = prompts_of(store, recipe, split)
    if split == "train":
        scope, how, there = round_.key, recipe.sampling, (ROUND_CANDIDATES, of_round(round_))
        chosen = sampling.choose(chosen, recipe.sampling.prompts, f"{recipe.seed} {round_.key}")
    else:
        scope, how = EVALUATION, evaluation_sampling(recipe)
        there = EVALUATION_CANDIDATES, of_evaluation(round_, policy)
        chosen = sampling.choose(chosen, recipe.evaluation.prompts, f"{recipe.seed} {EVALUATION}")
    of = {"recipe": recipe.name, "round": round_.key, "split": split}
    asked = [{**of, "prompt_id": row["prompt_id"], "dagster_run_id": run_id} for row in chosen]
    store.replace("round_prompts", asked, **of)
    encoded = [(row["prompt_id"], tuple(prompts.encode(tokenizer, row["text"], row["chat"]))) for row in chosen]
    waves = sampling.waves(recipe, scope, policy, encoded, how)
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
            [
                {
                    "recipe": recipe.name,
                    "round": round_.key,
                    "candidate_id": one.request.candidate_id,
                    "prompt_id": one.request.prompt_id,
                    "split": split,
                    "policy": policy,
                    "draw": one.request.draw,
                    "wave": number,
                    "text": one.text,
                    "token_ids": one.token_ids,
                    "tokens": len(one.token_ids),
                    "finish_reason": one.finish_reason,
                    "log_q": one.log_q,
                    "log_p": one.log_p,
                    "seed": one.request.seed,
                    "settings": hashed,
                    "dagster_run_id": run_id,
                }
                for one in drawn
            ],
        )
        tokens += sum(len(one.token_ids) for one in drawn)
        done += len(drawn)
        show(done, f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
    return tokens


# --- scores ----------------------------------------------------------------------------------


def versions(recipe: Recipe) -> dict[str, str]:
    """The version of each scorer, and of the combined score."""
    found = {config.label: scoring.version(config, recipe) for config in recipe.scoring.scorers}
    how = recipe.scoring.model_dump(include={"combine"}) | {
        config.label: [config.weight, config.minimum] for config in recipe.scoring.scorers
    }
    return found | {COMBINED: lineage.digest([found, how])}


def score(
    store: Store, round_: Round, candidates: str, parameters: dict, *, device: Device, run_id: str, show: Show
) -> int:
    """Score those candidates that have no combined score of the present version. Returns how many.

    Args:
        candidates: ROUND_CANDIDATES or EVALUATION_CANDIDATES.
        parameters: what it takes.
    """
    recipe = round_.recipe
    version_of = versions(recipe)
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
    judges, done = scoring.judges(recipe, device), 0
    for batch in unscored.to_batches(max_chunksize=SCORING_BATCH):
        rows = batch.to_pylist()
        new = []
        for scorer, judge in judges.items():
            missing = [row for row in rows if (row["candidate_id"], scorer) not in value_of]
            values = scoring.score({scorer: judge}, [_sample(row) for row in missing])[scorer]
            value_of |= {(row["candidate_id"], scorer): value for row, value in zip(missing, values, strict=True)}
            new += [{**_of(row), "scorer": scorer, "value": value} for row, value in zip(missing, values, strict=True)]
        columns = {scorer: [value_of[row["candidate_id"], scorer] for row in rows] for scorer in judges}
        new += [
            {**_of(row), "scorer": COMBINED, "value": value, "passed": passed}
            for row, value, passed in zip(rows, *scoring.combine(recipe.scoring, columns), strict=True)
        ]
        written = {"recipe": recipe.name, "dagster_run_id": run_id}
        store.append(
            "scores", [{"passed": None, **row, **written, "version": version_of[row["scorer"]]} for row in new]
        )
        done += len(rows)
        show(done)
    return unscored.num_rows


_UNSCORED = f"""
    SELECT c.candidate_id, c.round, c.text, c.log_p, p.text AS prompt, p.reference, p.fields, p.content
    FROM ({{candidates}}) c JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
    ANTI JOIN (SELECT candidate_id, content FROM scores WHERE recipe = $recipe AND scorer = '{COMBINED}'
               AND version = $version) s ON s.candidate_id = c.candidate_id AND s.content = p.content
"""


def _sample(row: dict) -> scoring.Sample:
    return scoring.Sample(row["prompt"], row["text"], row["reference"], json.loads(row["fields"]), row["log_p"])


def _of(row: dict) -> dict:
    return {"round": row["round"], "candidate_id": row["candidate_id"], "content": row["content"]}


# --- decisions -------------------------------------------------------------------------------


def scored(recipe: Recipe) -> str:
    """SQL of a round's candidates with their scores: the columns that acceptance.decisions_sql reads."""
    version_of = versions(recipe)
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
    recipe = round_.recipe

    def work(connection):
        connection.execute(f"CREATE OR REPLACE TEMP TABLE scored AS {scored(recipe)}", of_round(round_))
        (twice,) = connection.execute("SELECT count(*) - count(DISTINCT candidate_id) FROM scored").fetchone()
        if twice:
            raise RoundError(
                f"{recipe.name} {round_.key}: {twice} candidates are in the store twice; nothing was decided"
            )
        parameters = acceptance.parameters(connection, "scored", recipe.acceptance)
        connection.execute("DELETE FROM decisions WHERE recipe = ? AND round = ?", [recipe.name, round_.key])
        connection.execute(
            f"""INSERT INTO decisions BY NAME
                SELECT ? AS recipe, ? AS round, *, ? AS parameters, ? AS dagster_run_id
                FROM ({acceptance.decisions_sql("scored", parameters, recipe.seed)})""",
            [recipe.name, round_.key, json.dumps(parameters), run_id],
        )
        connection.execute("DROP TABLE scored")
        return parameters

    return store.commit(work)


# --- training set ----------------------------------------------------------------------------

# The accepted candidates that a checkpoint is trained on: one round's, or all up to it.
ACCEPTED = """
    SELECT c.candidate_id, c.token_ids, p.text AS prompt, p.chat, d.weight, d.round, d.prompt_id, p.split
    FROM decisions d
    JOIN candidates c ON c.candidate_id = d.candidate_id AND c.recipe = $recipe
    JOIN prompts p ON p.prompt_id = d.prompt_id AND p.recipe = $recipe
    WHERE d.recipe = $recipe AND d.accepted AND d.round BETWEEN $first AND $last
"""


def of_training(round_: Round) -> dict:
    """Parameters of ACCEPTED."""
    first = round_.key if round_.recipe.training.data == "round" else "r000"
    return {"recipe": round_.recipe.name, "first": first, "last": round_.key}


def training_set(store: Store, round_: Round, tokenizer) -> tuple[list[Sample], int]:
    """What the round's checkpoint is trained on, in the order of the ids, and the snapshot that it was read from."""

    def work(connection):
        read = connection.execute(f"SELECT * FROM ({ACCEPTED}) ORDER BY candidate_id", of_training(round_))
        rows = read.to_arrow_table().to_pylist()
        return rows, connection.execute(NEWEST_SNAPSHOT).fetchone()[0]

    rows, snapshot = store.commit(work)
    encoded = {(row["prompt"], row["chat"]): None for row in rows}
    for text, chat in encoded:
        encoded[text, chat] = prompts.encode(tokenizer, text, chat)
    samples = [
        Sample(row["candidate_id"], encoded[row["prompt"], row["chat"]], row["token_ids"], row["weight"])
        for row in rows
    ]
    return samples, snapshot


@dataclass(frozen=True)
class Trained:
    """A checkpoint and how it came to be."""

    checkpoint: models.Checkpoint
    parent: str
    accepted_digest: str
    samples: int
    trainable: int
    total: int
    history: History


def train(store: Store, round_: Round, start: Weights, home: Home, device: Device, run_id: str, show: Show) -> Trained:
    """Fine-tune the starting weights on the accepted set, save the checkpoint, and write its rows.

    Writes `checkpoints` and `training_samples`. Killed, it goes on from its last saved step.
    """
    recipe = round_.recipe
    tokenizer = models.tokenizer(start.path)
    samples, snapshot = training_set(store, round_, tokenizer)
    model = models.load(start.path, device, train=True, task=recipe.task)
    model, trainable, total = models.select_trainable(model, recipe.model, recipe.seed)
    scratch = home.scratch / recipe.name / round_.key
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
        "accepted_digest": accepted,
        "samples": len(samples),
        "store_snapshot": snapshot,
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
    trained_on = [
        {
            "recipe": recipe.name,
            "round": round_.key,
            "checkpoint": checkpoint.digest,
            "candidate_id": sample.candidate_id,
            "weight": sample.weight,
            "dagster_run_id": run_id,
        }
        for sample in samples
    ]

    def work(connection):
        made = {"recipe": recipe.name, "round": round_.key, "checkpoint": checkpoint.digest}
        store_replace(connection, "checkpoints", [row], **made)
        store_replace(connection, "training_samples", trained_on, **made)
        connection.execute(
            "UPDATE rounds SET checkpoint = ? WHERE recipe = ? AND round = ?",
            [checkpoint.digest, recipe.name, round_.key],
        )

    store.commit(work)
    shutil.rmtree(scratch, ignore_errors=True)
    return Trained(checkpoint, start.digest, accepted, len(samples), trainable, total, history)


# --- evaluation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """The weights that a round evaluates: digests, by role."""

    policy: str
    checkpoint: str
    champion: str  # before the round

    @property
    def weights(self) -> list[str]:
        """Each of them once."""
        return list(dict.fromkeys([self.policy, self.checkpoint, self.champion]))


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found."""

    summaries: dict[str, Summary]  # by role
    comparison: Comparison  # of the checkpoint with the champion
    promoted: bool
    verdict: str


def contest(store: Store, round_: Round, home: Home) -> Contest:
    """Who is evaluated in a round. Raises RoundError where it has no checkpoint."""
    made = rounds.raw(store, round_.recipe.name, round_.key)["checkpoint"]
    if made is None:
        raise RoundError(f"{round_.recipe.name} {round_.key} has no checkpoint: materialise it first")
    champion = starting_weights(store, round_.recipe, home, round_.key, "champion")
    return Contest(round_.policy, made, champion.digest)


def judge(store: Store, round_: Round, contest: Contest, run_id: str) -> Outcome:
    """Compare the contest's weights on the held-out prompts. Writes `evaluations`."""
    recipe, how = round_.recipe, round_.recipe.evaluation
    found = {role: results(store, round_, digest) for role, digest in vars(contest).items()}
    rows = [
        {
            "recipe": recipe.name,
            "round": round_.key,
            "role": role,
            "checkpoint": getattr(contest, role),
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
    comparison = compare(
        found["champion"], found["checkpoint"], recipe.promotion.metric, k=how.k, confidence=how.confidence
    )
    won, verdict = promoted(comparison, recipe.promotion)
    return Outcome(summaries, comparison, won, verdict)


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
            "version": versions(recipe)[COMBINED],
        },
    )
    return [PromptResult(**row) for row in rows]


def recorded_results(store: Store, round_: Round, role: str) -> list[PromptResult]:
    """What `judge` recorded of a role: `policy`, `checkpoint` or `champion`."""
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
