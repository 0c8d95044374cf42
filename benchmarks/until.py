"""Draw until accepted: the same prompts solved with fewer tokens than with a fixed number of draws.

    python -m benchmarks.until

The recipe `arithmetic`, its base model, and two ways to spend draws on the same prompts: N for each, or in passes
until a prompt has one accepted, at most N. A candidate is the same in both (its id fixes its draw), so both solve
exactly the same prompts, and only the cost differs: tokens drawn, tokens computed, and seconds of drawing, scoring
and deciding (medians over runs that alternate). Results go to docs/benchmarks: JSON and a Markdown table.

The spread over prompts is that of the accepted candidates without `distinct`, so with equal texts counted each time.
A Gini coefficient of 0 means that every solved prompt has the same number.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.results import FOLDER, bars, publish, table
from rsft_pipeline import models, rounds, tasks
from rsft_pipeline.devices import Device
from rsft_pipeline.home import Home
from rsft_pipeline.lineage import set_digest
from rsft_pipeline.recipe.reading import find, load
from rsft_pipeline.sampling import InProcess
from rsft_pipeline.steps import until
from rsft_pipeline.steps.decide import decide
from rsft_pipeline.steps.draw import ask, draw_all
from rsft_pipeline.steps.ingest import ingest
from rsft_pipeline.steps.rows import ROUND_CANDIDATES, of_round
from rsft_pipeline.steps.score import score
from rsft_pipeline.store import Store

CPU = Device("cpu", "float32")


def measure(home: Home, overrides: dict[str, str]) -> dict:
    """One round's drawing, scoring and deciding, in a store of its own."""
    made = load(find("arithmetic"), {"acceptance.cap": "null", "acceptance.distinct": "false", **overrides})
    with tempfile.TemporaryDirectory() as folder, Store.at(Path(folder)) as store:
        ingest(store, made, home, "benchmark", lambda *_: None)
        policy = rounds.starting_weights(store, made, home, "r000", "base")
        round_ = rounds.Round(made, "r000", policy.digest, policy.source, policy.digest, "none")
        rounds.begin(store, round_, "benchmark")
        began = time.perf_counter()
        asked = ask(store, round_, models.tokenizer(policy.path), split="train", run_id="benchmark")
        with InProcess(policy.path, made, tasks.of(made), CPU) as session:
            told = {"run_id": "benchmark", "show": lambda *_, **__: None}
            if made.sampling.until:
                drawn, tokens = until.draw(store, round_, session, asked, device=CPU, **told)
            else:
                drawn, tokens = draw_all(store, round_, session, asked, **told)
        score(store, round_, ROUND_CANDIDATES, of_round(round_), device=CPU, **told)
        decide(store, round_, "benchmark")
        seconds = time.perf_counter() - began
        rows = store.query("SELECT prompt_id, count(*) AS n FROM decisions WHERE accepted GROUP BY ALL ORDER BY 1")
        computed = store.value(_COMPUTED)
    accepted = np.array([row["n"] for row in rows])
    return {
        "draws": drawn,
        "tokens": tokens,
        "computed": computed,
        "seconds": round(seconds, 2),
        "prompts": len(asked),
        "solved": len(rows),
        "solved_digest": set_digest(row["prompt_id"] for row in rows),
        "accepted": int(accepted.sum()),
        "most_of_one_prompt": int(accepted.max()),
        "gini": round(gini(accepted), 3),
    }


# Draws of a prompt in one wave share the computation of a common beginning: count tokens by what is before them.
_COMPUTED = """SELECT count(DISTINCT (wave, prompt_id, token_ids[:before])) AS n
    FROM (SELECT *, unnest(range(len(token_ids))) AS before FROM candidates WHERE split = 'train')"""


def gini(counts: np.ndarray) -> float:
    """Σ|xᵢ − xⱼ| / (2·n²·mean): 0 when all are equal."""
    return float(np.abs(counts[:, None] - counts[None]).sum() / (2 * len(counts) ** 2 * counts.mean()))


def _median(runs: Sequence[dict]) -> dict:
    """One run of a way, whose runs differ only in their seconds, with the median of these and all of them."""
    seconds = [run["seconds"] for run in runs]
    return {**runs[0], "seconds": statistics.median(seconds), "turns": seconds}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--prompts", type=int, default=500)
    options.add_argument("--most", type=int, nargs="+", default=[8, 16, 32])
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "rsft-benchmark")
    options.add_argument("--out", type=Path, default=FOLDER, help="folder for the results")
    arguments = options.parse_args()
    logging.basicConfig(level=logging.WARNING)
    home, rows = Home(arguments.home), []
    for most in arguments.most:
        shared = {"sampling.prompts": str(arguments.prompts), "sampling.wave_size": "2048"}
        until_one = {"sampling.draws": "1", "sampling.until": f"{{per_prompt: 1, draws: {most}}}"}
        ways = {**shared, "sampling.draws": str(most)}, {**shared, **until_one}
        turns = [[measure(home, way) for way in ways] for _ in range(arguments.turns)]
        fixed, again = (_median(runs) for runs in zip(*turns, strict=True))
        if fixed["solved_digest"] != again["solved_digest"]:
            raise SystemExit("the two ways solved other prompts: one of them is wrong")
        rows.append({"most": most, "fixed": fixed, "until": again, "tokens": again["tokens"] / fixed["tokens"]})
    head = ["draws at most", "prompts solved", "tokens, fixed", "tokens, until", "ratio", "computed, fixed"]
    head += ["computed, until", "s, fixed", "s, until", "Gini, fixed", "Gini, until"]
    lines = (
        [
            str(row["most"]),
            f"{row['fixed']['solved']} of {row['fixed']['prompts']}",
            f"{row['fixed']['tokens']:,}",
            f"{row['until']['tokens']:,}",
            f"{row['tokens']:.2f}",
            *(f"{row[way]['computed']:,}" for way in ("fixed", "until")),
            *(f"{row[way]['seconds']:.1f}" for way in ("fixed", "until")),
            *(str(row[way]["gini"]) for way in ("fixed", "until")),
        ]
        for row in rows
    )
    panels = {f"{row['most']} draws at most": {way: [row[way]["tokens"]] for way in ("fixed", "until")} for row in rows}
    publish(arguments.out, "until_cpu", {"results": rows}, table(head, lines), bars(panels, "tokens drawn", "{:,.0f}"))


if __name__ == "__main__":
    main()
