"""Audit benchmark: how long questions take on a store of millions of candidates.

    python -m benchmarks.audit                         # 5,000,000 candidates; the folders are kept
    python -m benchmarks.audit --candidates 200000 --home /tmp/small

Two stores: one with 20 rounds, for questions about single things, and one whose single round has all the candidates,
to replay and verify. `store` makes the lineage of a recipe's rounds in SQL: ids, seeds, scores, decisions and leaves
are those that the steps would have written for such texts, so that every question can be answered; there are only no
weights. An existing store is used as it is. Each question is asked about several things, several times; the median
counts, and the first time, when nothing is cached yet, is reported separately. Results go to docs/benchmarks.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import duckdb

from benchmarks.results import FOLDER, bars, publish, table
from rsft_pipeline import lineage, merkle, rounds, sampling
from rsft_pipeline.audit import ids, verify
from rsft_pipeline.audit.impact import impact
from rsft_pipeline.audit.replay import replay
from rsft_pipeline.audit.trace import trace
from rsft_pipeline.devices import Device
from rsft_pipeline.home import Home
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.rounds import Round
from rsft_pipeline.steps import score
from rsft_pipeline.steps.decide import decide
from rsft_pipeline.steps.rows import ACCEPTED, COMBINED
from rsft_pipeline.store import Store

ROUNDS, DRAWS = 20, 8
RECIPE = """
description: Made for the audit benchmark.
model: {source: /nowhere}
prompts: {source: questions.jsonl, template: "{question}"}
sampling: {draws: 8, max_tokens: 32}
scoring:
  scorers:
    - {kind: regex, name: fluent, pattern: "[aeiou]{2}"}
    - {kind: regex, name: safe, pattern: "^[a-z]", weight: 0, minimum: 1.0}
acceptance: {rule: top_k, k: 2}
"""


# --- the store ---------------------------------------------------------------------------------


def store(home: Path, candidates: int, number: int) -> tuple[Store, Recipe]:
    """A store with `candidates` training candidates in `number` rounds, and their recipe."""
    home.mkdir(parents=True, exist_ok=True)
    file = home / "benchmark.yaml"
    file.write_text(RECIPE)
    recipe, made = load(file), Store.at(home)
    if made.value("SELECT count(*) FROM rounds WHERE state = 'finished'") == number:
        return made, recipe
    made.close()
    shutil.rmtree(home / "store")
    made = Store.at(home)
    prompts = candidates // number // DRAWS
    made.commit(lambda connection: connection.execute(_PROMPTS, {"recipe": recipe.name, "prompts": prompts}))
    policy = base = lineage.digest("base")
    for i in range(number):
        policy = _round(made, recipe, i, policy, base)
    made.compact()
    return made, recipe


def _round(made: Store, recipe: Recipe, number: int, policy: str, base: str) -> str:
    """Write one round. Returns its checkpoint, which the next one samples and starts from."""
    source = "base" if policy == base else f"r{number - 1:03d}"
    round_ = Round(recipe, f"r{number:03d}", policy, source, policy, f"mlflow-{number}")
    versions = score.versions(made, round_)
    checkpoint = lineage.digest(["checkpoint", number])
    run = f"00000000-0000-4000-8000-{number:012d}"
    of = {
        "recipe": recipe.name,
        "round": round_.key,
        "policy": policy,
        "settings": sampling.settings(recipe.sampling, recipe.seed),
        "seed": recipe.seed,
        "run": run,
        "checkpoint": checkpoint,
    }

    def execute(connection: duckdb.DuckDBPyConnection, sql: str, **more: Any) -> None:
        given = {**of, **more}
        connection.execute(sql, {name: value for name, value in given.items() if f"${name}" in sql} or None)

    def drawn(connection):
        execute(connection, _ROUND_PROMPTS)
        execute(connection, _CANDIDATES, draws=DRAWS)

    def judged(connection):
        for config in recipe.scoring.scorers:
            execute(connection, _SCORES, scorer=config.name, version=versions[config.name], pattern=config.pattern)
        execute(connection, _COMBINED, version=versions[COMBINED])

    def trained(connection) -> int:
        accepted = {"first": round_.key, "last": round_.key, "recipe": recipe.name}
        rows = f"SELECT candidate_id, weight, {merkle.LEAF} AS leaf FROM ({ACCEPTED}) ORDER BY candidate_id"
        connection.execute(f"CREATE OR REPLACE TEMP TABLE chosen AS {rows}", accepted)
        execute(connection, _TRAINING_SAMPLES)
        chosen = connection.execute("SELECT candidate_id, leaf FROM chosen").to_arrow_table()
        meta = {
            "recipe": recipe.name,
            "round": round_.key,
            "merkle_root": merkle.root(chosen["leaf"]),
            "accepted_digest": lineage.set_digest(chosen["candidate_id"].to_pylist()),
            "trained_on": "accepted",
            "training": recipe.training.model_dump(mode="json"),
            "scorers": sorted(versions.values()),
        }
        execute(
            connection,
            _CHECKPOINTS,
            digest=meta["accepted_digest"],
            samples=chosen.num_rows,
            snapshot=snapshot,
            meta=json.dumps(meta),
            mlflow=round_.mlflow_run_id,
        )
        return chosen.num_rows

    rounds.begin(made, round_, run)
    made.commit(drawn)
    made.commit(judged)
    decide(made, round_, run)
    snapshot = made.snapshot()
    accepted = made.commit(trained)
    drawn_of = "SELECT count(*) AS n, sum(tokens)::BIGINT AS tokens FROM candidates WHERE recipe = ? AND round = ?"
    (counted,) = made.query(drawn_of, [recipe.name, round_.key])
    summary = json.dumps({"pass_at_1": {"value": number / 100, "low": 0.0, "high": 1.0, "n": 100}})
    rounds.finish(
        made,
        round_,
        checkpoint=checkpoint,
        champion=checkpoint,
        promoted=True,
        verdict="made",
        candidates=counted["n"],
        accepted=accepted,
        distinct_accepted=accepted,
        tokens=counted["tokens"],
        **dict.fromkeys(("policy_eval", "checkpoint_eval", "champion_eval"), summary),
    )
    return checkpoint


def _digest(*values: str, digits: int = 32) -> str:
    """SQL of the lineage.digest of a list of these values."""
    written = ", ".join(f"to_json({value})::VARCHAR" for value in values)
    return f"substr(sha256(concat('[', concat_ws(',', {written}), ']')), 1, {digits})"


_CONTENT = "substr(sha256(concat('[', to_json(text), ',null,', json_object('question', text), ']')), 1, 32)"
_PROMPTS = f"""INSERT INTO prompts BY NAME
    SELECT $recipe AS recipe, {_digest("'prompt'", "text")} AS prompt_id, text, false AS chat,
        json_object('question', text) AS fields, 'train' AS split, {_CONTENT} AS content,
        'questions.jsonl' AS source, n + 1 AS line, 'made' AS source_digest, true AS active, 'made' AS dagster_run_id
    FROM (SELECT n, concat('what comes of number ', n, ' when it is ', md5(n::VARCHAR), '?') AS text
          FROM range($prompts) t(n)) ORDER BY n"""
_ROUND_PROMPTS = """INSERT INTO round_prompts
    SELECT recipe, $round, prompt_id, 'train', $run FROM prompts WHERE recipe = $recipe ORDER BY line"""
_ID = _digest("$recipe", "$round", "$policy", "prompt_id", "draw", "$settings")
_SEED = _digest("'seed'", "candidate_id", "$seed", digits=15)
_CANDIDATES = f"""INSERT INTO candidates BY NAME
    SELECT $recipe AS recipe, $round AS round, candidate_id, prompt_id, 'train' AS split, 'policy' AS origin,
        $policy AS policy, draw, (line // 256)::INTEGER AS wave, text,
        list_transform(range(24), lambda i: (hash(candidate_id, i) % 32000)::INTEGER) AS token_ids, 24 AS tokens,
        'stop' AS finish_reason, -20.0 * (hash(text) % 1000) / 1000 AS log_q, log_q AS log_p,
        ('0x' || {_SEED})::BIGINT AS seed, $settings AS settings, $run AS dagster_run_id
    FROM (SELECT *, translate(concat(md5(candidate_id), sha256(candidate_id)), '0123456789', ' olaeiuins') AS text
          FROM (SELECT prompt_id, line, draw::INTEGER AS draw, {_ID} AS candidate_id
                FROM prompts, range($draws) t(draw) WHERE recipe = $recipe))
    ORDER BY line, draw"""
_SCORES = """INSERT INTO scores BY NAME
    SELECT c.recipe, c.round, c.candidate_id, $scorer AS scorer, $version AS version, p.content,
        regexp_matches(c.text, $pattern)::DOUBLE AS value, $run AS dagster_run_id
    FROM candidates c JOIN prompts p ON p.prompt_id = c.prompt_id WHERE c.recipe = $recipe AND c.round = $round"""
_COMBINED = """INSERT INTO scores BY NAME
    SELECT f.recipe, f.round, f.candidate_id, 'combined' AS scorer, $version AS version, f.content, f.value,
        s.value >= 1 AS passed, $run AS dagster_run_id
    FROM scores f JOIN scores s ON s.candidate_id = f.candidate_id AND s.round = $round AND s.scorer = 'safe'
    WHERE f.recipe = $recipe AND f.round = $round AND f.scorer = 'fluent'"""
_TRAINING_SAMPLES = """INSERT INTO training_samples
    SELECT $recipe, $round, $checkpoint, candidate_id, weight, leaf, $run FROM chosen"""
_CHECKPOINTS = """INSERT INTO checkpoints BY NAME
    SELECT $recipe AS recipe, $round AS round, $checkpoint AS checkpoint, $policy AS parent, $policy AS policy,
        'accepted' AS trained_on, '/nowhere' AS path, $digest AS accepted_digest, $samples AS samples, 1 AS steps,
        1.0 AS loss, $snapshot AS snapshot, $meta AS meta, $mlflow AS mlflow_run_id, $run AS dagster_run_id"""


# --- questions ---------------------------------------------------------------------------------


def questions(made: Store, recipe: Recipe) -> dict[str, list[Callable[[], Any]]]:
    """Each question, as calls that ask it about different things."""
    some = made.query(
        "SELECT round, candidate_id, prompt_id FROM decisions WHERE accepted ORDER BY hash(candidate_id) LIMIT 5"
    )
    checkpoint = made.value("SELECT checkpoint FROM checkpoints WHERE round = 'r010'")
    scorer = score.versions(made, Round(recipe, "r000", "", "", "", ""))["fluent"]

    def reach(typed: str) -> Callable[[], Any]:
        return lambda: impact(made, ids.thing(made, typed))

    return {
        "trace of a candidate, by its id": [lambda one=one: trace(made, one["candidate_id"]) for one in some],
        "trace of a candidate, by 10 digits": [lambda one=one: trace(made, one["candidate_id"][:10]) for one in some],
        "impact of a candidate": [reach(one["candidate_id"]) for one in some],
        "impact of a prompt": [reach(one["prompt_id"]) for one in some],
        "impact of a checkpoint": [reach(checkpoint)],
        "impact of a source (all of it)": [reach("questions.jsonl")],
        "impact of a scorer version (all of it)": [reach(scorer)],
        "search of a text": [lambda: ids.containing(made, "aeioaeio")],
    }


def whole_round(made: Store, recipe: Recipe) -> dict[str, list[Callable[[], Any]]]:
    """What is asked about the single round that has all the candidates."""
    home, device = Home(Path(made.data).parent.parent), Device("cpu", "float32")
    checkpoint = verify.find(made, recipe.name, "r000")
    return {
        "replay of a round of all candidates": [lambda: replay(made, recipe, "r000", home, nullcontext(device))],
        "verification of its checkpoint": [lambda: verify.verify(made, checkpoint, home)],
    }


def measure(asked: dict[str, list[Callable[[], Any]]], repeats: int) -> list[dict[str, Any]]:
    """Seconds of the first call, median and minimum of the others, and median processor time over all cores.

    On a machine in use by others, processor time and minimum say more than the median.
    """
    rows = []
    for name, calls in asked.items():
        seconds, busy = [], []
        for call in [call for _ in range(repeats) for call in calls]:
            began, worked = time.perf_counter(), time.process_time()
            call()
            seconds.append(time.perf_counter() - began)
            busy.append(time.process_time() - worked)
        later = seconds[1:] or seconds
        rows.append(
            {
                "question": name,
                "first": seconds[0],
                "median": statistics.median(later),
                "least": min(later),
                "processor": statistics.median(busy[1:] or busy),
            }
        )
        print(" ".join(f"{value:8.3f}" for value in list(rows[-1].values())[1:]), name, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=5_000_000)
    parser.add_argument("--home", type=Path, default=None, help="default: a folder in the temporary directory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the results")
    given = parser.parse_args()
    home = given.home or Path(os.environ.get("TMPDIR", "/tmp")) / f"rsft-audit-{given.candidates}"
    rows = []
    for number, ask in ((ROUNDS, questions), (1, whole_round)):
        began = time.perf_counter()
        made, recipe = store(home / f"{number}", given.candidates, number)
        counted = made.value("SELECT count(*) FROM candidates")
        print(f"{counted:,} candidates, rounds: {number}, {time.perf_counter() - began:.0f} s", flush=True)
        print("   first   median    least processor  seconds", flush=True)
        rows += measure(ask(made, recipe), given.repeats)
        made.close()
    lake = home / f"{ROUNDS}" / "store"
    size = sum(file.stat().st_size for file in lake.rglob("*") if file.is_file())
    clocks = ("first", "median", "least", "processor")
    publish(
        given.out,
        "audit",
        {"candidates": given.candidates, "bytes": size, "seconds": rows},
        table(["seconds", *clocks], ([row["question"], *(f"{row[clock]:.3f}" for clock in clocks)] for row in rows)),
        bars({f"{counted:,} candidates": {row["question"]: [row["median"]] for row in rows}}, "seconds", "{:.2f}"),
    )


if __name__ == "__main__":
    main()
