"""Store benchmark: a round of millions of candidates in the lake, and the same SQL in a bare DuckDB file.

    python -m benchmarks.store                               # 1, 5 and 20 million candidates of 256 characters
    python -m benchmarks.store --candidates 1000000

Each size and way runs in a process of its own with DuckDB's memory limited, so that its peak memory is known: that
of the whole process, not only DuckDB's. «Bare» is one DuckDB file with the tables of schema.sql, used by the same
functions that the steps run: what the lake costs in addition is snapshots, Parquet and its catalog. Results go to
docs/benchmarks: JSON and a Markdown table. With `--rounds 100` it counts the files of a store that is compacted at
the end of each round, as rounds do.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
from pydantic import TypeAdapter

from benchmarks.results import FOLDER, figure, publish, table
from rsft_pipeline import lineage, sampling
from rsft_pipeline.recipe.acceptance import AnyRule
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.rounds import Round
from rsft_pipeline.steps.decide import decide, scored
from rsft_pipeline.steps.rows import ACCEPTED, COMBINED, of_round, of_training
from rsft_pipeline.steps.score import versions
from rsft_pipeline.steps.train import samples_sql
from rsft_pipeline.store import SCHEMA, Store

RECIPE = """
description: Made for the store benchmark.
model: {source: /nowhere}
prompts: {source: questions.jsonl, template: "{question}"}
scoring: {scorers: [{kind: regex, pattern: "x"}]}
acceptance: {rule: threshold, threshold: 0.7}
"""
RULES = {
    "threshold": {"rule": "threshold", "threshold": 0.7, "cap": 2},
    "top_k": {"rule": "top_k", "k": 2},
    "quantile": {"rule": "quantile", "share": 0.3},
    "rejection": {"rule": "rejection", "M": "estimate"},
    "boltzmann": {"rule": "boltzmann", "beta": 0.2},
    "loss": {"rule": "loss", "k": 2.0},
}
DRAWS, WAVE = 8, 1_000_000  # per prompt; rows that one commit of the benchmark writes

_PROMPTS = """INSERT INTO prompts BY NAME
    SELECT $recipe AS recipe, md5('p' || n) AS prompt_id, 'question ' || n AS text, false AS chat, '{}' AS fields,
        'train' AS split, md5(n::VARCHAR) AS content, true AS active FROM range($prompts) t(n)"""
_ROUND_PROMPTS = """INSERT INTO round_prompts BY NAME
    SELECT recipe, 'r000' AS round, prompt_id, 'train' AS split FROM prompts WHERE recipe = $recipe"""
_CANDIDATES = f"""INSERT INTO candidates BY NAME
    SELECT $recipe AS recipe, 'r000' AS round, md5('c' || n) AS candidate_id, md5('p' || n // {DRAWS}) AS prompt_id,
        'train' AS split, 'policy' AS origin, $policy AS policy, (n % {DRAWS})::INTEGER AS draw, 0 AS wave,
        repeat(sha256(n::VARCHAR), 4) AS text, 16 AS tokens, 'stop' AS finish_reason,
        list_transform(range(16), lambda i: (hash(n, i) % 32000)::INTEGER) AS token_ids,
        -20.0 * (hash(n) % 1000) / 1000 AS log_q, log_q - (hash(n, 1) % 1000) / 1000 AS log_p,
        n AS seed, $settings AS settings FROM range($first, $last) t(n)"""
_SCORES = f"""INSERT INTO scores BY NAME
    SELECT $recipe AS recipe, 'r000' AS round, md5('c' || n) AS candidate_id, 'combined' AS scorer,
        $version AS version, md5((n // {DRAWS})::VARCHAR) AS content, (hash(n, 2) % 1000) / 1000 AS value,
        true AS passed FROM range($first, $last) t(n)"""


def measure(folder: Path, way: str, candidates: int, memory: str) -> dict[str, float]:
    """Seconds of each step, and the process's peak memory in GiB."""
    file = folder / "benchmark.yaml"
    file.write_text(RECIPE)
    recipe, policy = load(file), lineage.digest("policy")
    round_ = Round(recipe, "r000", policy, "base", policy, "none")
    lake = Store.at(folder / "home", memory=memory)  # the bare way needs only its SQL
    store = lake if way == "lake" else Bare(folder / "bare.duckdb", memory)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began

    told = {"recipe": recipe.name}
    store.commit(lambda connection: connection.execute(_PROMPTS, {**told, "prompts": candidates // DRAWS}))
    store.commit(lambda connection: connection.execute(_ROUND_PROMPTS, told))
    drawn = {"policy": policy, "settings": sampling.settings(recipe.sampling, recipe.seed)}
    version = versions(lake, round_)[COMBINED]
    for first in range(0, candidates, WAVE):
        part = {**told, "first": first, "last": min(first + WAVE, candidates)}
        with timed("write candidates"):
            store.commit(lambda connection, part=part: connection.execute(_CANDIDATES, {**part, **drawn}))
        with timed("write scores"):
            values = {**part, "version": version}
            store.commit(lambda connection, values=values: connection.execute(_SCORES, values))
    with timed("join candidates and scores"), store.connection() as connection:
        connection.execute(f"CREATE TEMP TABLE joined AS {scored(lake, round_)}", of_round(round_))
    for name, fields in RULES.items():
        rule = TypeAdapter(AnyRule).validate_python(fields)
        asked = replace(round_, recipe=recipe.model_copy(update={"acceptance": rule}))
        with timed(f"join and decide: {name}"):
            decide(store, asked, "run")
    with timed("accepted set"), store.connection() as connection:
        connection.execute(f"CREATE TEMP TABLE chosen AS {samples_sql(ACCEPTED)}", of_training(round_))
    if way == "lake":
        began = time.perf_counter()
        lake.compact()
        seconds["compact"] = time.perf_counter() - began
    return {**seconds, "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


class Bare:
    """One DuckDB file with the tables of the store."""

    def __init__(self, file: Path, memory: str):
        self._connection = duckdb.connect(file, config={"memory_limit": memory})
        self._connection.execute(SCHEMA.read_text("utf-8"))

    def connection(self) -> duckdb.DuckDBPyConnection:
        return self._connection.cursor()

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
        return self._connection.execute(sql, parameters or None).to_arrow_table().to_pylist()

    def commit(self, work: Callable, connection: duckdb.DuckDBPyConnection | None = None) -> None:
        connection = connection or self._connection
        connection.execute("BEGIN")
        work(connection)
        connection.execute("COMMIT")


def files(rounds: int) -> list[int]:
    """How many Parquet files a store has after each round of ten waves, which ends with compaction."""
    found = []
    with tempfile.TemporaryDirectory() as folder, Store.at(Path(folder)) as lake:
        for number in range(rounds):
            for wave in range(10):
                rows = [{"recipe": "one", "round": f"r{number:03d}", "candidate_id": f"{wave} {i}"} for i in range(50)]
                lake.append("candidates", rows)
            lake.compact()
            listed = "SELECT count(*) FROM ducklake_list_files('lake', 'candidates')"
            found.append(lake.value(listed))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--candidates", type=int, nargs="+", default=[1_000_000, 5_000_000, 20_000_000])
    options.add_argument("--memory", default="2500MB", help="DuckDB's limit; the process takes about 1 GiB more")
    options.add_argument("--rounds", type=int, help="count the files over so many rounds instead")
    options.add_argument("--out", type=Path, default=FOLDER, help="folder for the results")
    options.add_argument("--way", choices=["lake", "bare"], help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.rounds:
        print(f"files after each round: {files(arguments.rounds)}")
        return
    if arguments.way:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Path(folder), arguments.way, arguments.candidates[0], arguments.memory)))
        return
    results = []
    for candidates in arguments.candidates:
        for way in ("lake", "bare"):
            told = ["--way", way, "--candidates", str(candidates), "--memory", arguments.memory]
            made = subprocess.run(
                [sys.executable, "-m", "benchmarks.store", *told], stdout=subprocess.PIPE, text=True, check=True
            )
            results.append({"candidates": candidates, "way": way, **json.loads(made.stdout.splitlines()[-1])})
    pairs = list(zip(results[::2], results[1::2], strict=True))
    rows = [
        [f"{lake['candidates']:,}", name, f"{lake[name]:.2f}", *_beside(lake[name], bare.get(name))]
        for lake, bare in pairs
        for name in lake
        if name not in ("candidates", "way")
    ]
    publish(
        arguments.out,
        "store_cpu",
        {"memory": arguments.memory, "results": results},
        table(["candidates", "step", "lake, s", "bare, s", "ratio"], rows),
        plot(pairs),
    )


def _beside(lake: float, bare: float | None) -> list[str]:
    return ["", ""] if bare is None else [f"{bare:.2f}", f"{lake / bare:.2f}"]


def plot(pairs: list[tuple[dict, dict]]):
    """A figure: seconds per million candidates by size (level means linear), and the lake relative to the bare file."""
    drawn = figure(11, 3.6)
    growth, ratio = drawn.subplots(1, 2)
    millions = [lake["candidates"] / 1e6 for lake, _ in pairs]
    for name in pairs[0][1]:
        if name in ("candidates", "way", "peak GiB"):
            continue
        each = [lake[name] / million for (lake, _), million in zip(pairs, millions, strict=True)]
        growth.plot(millions, each, marker="o", label=name)
        ratio.plot(millions, [lake[name] / bare[name] for lake, bare in pairs], marker="o")
    growth.set(title="the lake's growth", ylabel="seconds a million", ylim=(0, None))
    ratio.axhline(2, color="grey", linestyle="dashed", label="the aim: at most 2")
    ratio.set(title="the lake over a bare DuckDB file", ylabel="times as long", ylim=(0, 2.2))
    for axis in (growth, ratio):
        axis.set(xlabel="candidates, millions", xscale="log", xticks=millions, xticklabels=[f"{m:g}" for m in millions])
        axis.minorticks_off()
    drawn.legend(loc="outside right center", frameon=False, fontsize="small")
    return drawn


if __name__ == "__main__":
    main()
