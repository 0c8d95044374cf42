"""Policies: what it costs to draw from policies that rounds have trained, with this project's sampler and `generate`.

    python -m benchmarks.policies

Runs three rounds of two recipes, and draws 16 candidates for each of 256 of their prompts from each round's policy and
from the last champion. The surer a policy is of its answers, the more of its draws begin alike: these are computed once
until they differ, whereas `generate` computes each. The floor of benchmarks/sampling.py does not account for that.

Ratios are the median over turns in which both run one after the other in one process. Results go to docs/benchmarks:
JSON, a Markdown table and a plot.
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import FOLDER, bars, publish, table
from benchmarks.sampling import Work
from rsft_pipeline import models, prompts, rounds
from rsft_pipeline.decoding import Draw, Drawn, Shape, decode
from rsft_pipeline.devices import Device
from rsft_pipeline.home import Home
from rsft_pipeline.models import configuration
from rsft_pipeline.recipe.reading import find, load
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.store import Store

RECIPES = ("arithmetic", "customer_service_offline")
PROMPTS, DRAWS = 256, 16
WAYS = ("shared_prefix", "generate", "generate_each")


def policies(name: str, home: Home) -> tuple[Recipe, list[dict], dict[str, Path]]:
    """Run the recipe's rounds. Returns the recipe, its prompts, and the weights that each round drew from, by name."""
    command = [sys.executable, "-m", "cli.main", "run", name, "--rounds", "3"]
    subprocess.run(command, env={**os.environ, "RSFT_HOME": str(home.path)}, check=True)
    recipe = load(find(name))
    with Store.at(home.path) as store:
        finished = rounds.history(store, name)
        digests = {f"policy of {row['round']}": row["policy"] for row in finished} | {
            "last champion": rounds.champion(store, name)
        }
        paths = {label: rounds.locate(store, recipe, home, digest).path for label, digest in digests.items()}
        asked = store.query(
            "SELECT text, chat FROM prompts WHERE recipe = ? AND split = 'train' ORDER BY prompt_id LIMIT ?",
            [name, PROMPTS],
        )
    return recipe, asked, paths


def work_of(recipe: Recipe, asked: list[dict], policy: Path) -> Work:
    """The recipe's draws from this policy, at temperature 1, which all ways support."""
    model, tokenizer = models.load(policy, Device("cpu", "float32"), task=recipe.task).eval(), models.tokenizer(policy)
    shape = Shape(1.0, 1.0, None, recipe.sampling.max_tokens, frozenset(configuration.stop_ids(model, tokenizer)))
    ids = [list(prompts.encode(tokenizer, row["text"], row["chat"], recipe.task)) for row in asked]
    return Work(model, sorted(ids, key=len), DRAWS, shape)


def alike(draws: list[Draw], made: list[Drawn]) -> float:
    """Tokens drawn per token computed, if the common beginning of several draws is computed only once."""
    paths = [(draw.prompt_ids, *drawn.token_ids) for draw, drawn in zip(draws, made, strict=True)]
    ways = {path[:end] for path in paths for end in range(1, len(path))}  # a token depends on what is before it
    return sum(len(path) - 1 for path in paths) / len(ways)


def measure(work: Work, turns: int) -> dict:
    """Seconds per token of each way in each turn, after a warm-up turn, with ratios and how much draws share."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(turns + 1):
        for way in WAYS:
            began = time.perf_counter()
            tokens = getattr(work, way)()
            if turn:
                found[way].append((time.perf_counter() - began) / tokens)
    made = decode(work.model, work.asked, work.shape, 0)
    over = {
        way: statistics.median(other / own for other, own in zip(found[way], found["shared_prefix"], strict=True))
        for way in WAYS[1:]
    }
    tokens = sum(len(drawn.token_ids) for drawn in made)
    return {"tokens": tokens / len(made), "alike": alike(work.asked, made), "over": over, "seconds_a_token": found}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--turns", type=int, default=5, help="measured turns, after one that warms up")
    options.add_argument("--out", type=Path, default=FOLDER, help="folder for the results")
    arguments = options.parse_args()
    logging.basicConfig(level=logging.WARNING)
    results = []
    for name in RECIPES:
        with tempfile.TemporaryDirectory() as home:
            recipe, asked, paths = policies(name, Home(Path(home)))
            for label, path in paths.items():
                found = measure(work_of(recipe, asked, path), arguments.turns)
                results.append({"recipe": name, "policy": label, **found})
                print(name, label, found["over"], flush=True)
    head = [
        "recipe",
        "policy",
        "tokens a draw",
        "drawn for each computed",
        "× `generate`",
        "× `generate`, one call a prompt",
    ]
    lines = (
        [
            row["recipe"],
            row["policy"],
            f"{row['tokens']:.1f}",
            f"{row['alike']:.1f}",
            f"{row['over']['generate']:.1f}",
            f"{row['over']['generate_each']:.1f}",
        ]
        for row in results
    )
    panels = {
        name: {row["policy"]: [row["over"]["generate"]] for row in results if row["recipe"] == name} for name in RECIPES
    }
    publish(
        arguments.out,
        "policies_cpu",
        {"results": results},
        table(head, lines),
        bars(panels, "speed over generate", "{:.1f}×"),
    )


if __name__ == "__main__":
    main()
