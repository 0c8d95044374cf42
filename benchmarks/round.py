"""A round's overhead: `rsft run` against a bare script that does the same drawing and training.

    python -m benchmarks.round                    # the recipe's 2,000 prompts of 8 draws
    python -m benchmarks.round --prompts 20000    # a longer round, to see what grows with it
    python -m benchmarks.round --set model.bootstrap.config.num_hidden_layers=4    # another model, or any other change

Both are whole processes, timed from the interpreter's start to its end, in turns. The bare script has no Dagster, no
store, no MLflow, no lineage: it draws with the same sampler, compares answers, trains with the same loop, and draws
again to evaluate. What is made once per home exists beforehand: the base model, and the empty databases of MLflow,
Dagster and the store. Where a round spends its time is read from Dagster's own events, and compared with the bare
script's own times.
Results go to docs/benchmarks: JSON and Markdown tables.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import FOLDER, figure, publish, table

ROOT = Path(__file__).parent.parent
PARTS = {  # part of the plot → the measured parts that it sums
    "imports, start, model, prompts": (
        "imports and model",
        "imports, start and end of the process",
        "policy",
        "prompts",
    ),
    "drawing, scoring": ("candidates and scores", "candidates", "scores"),
    "deciding": ("accepted",),
    "training": ("checkpoint",),
    "evaluation": ("evaluation",),
}


def bare(home: Path, overrides: dict[str, str], began: float) -> None:
    """The same round with nothing around it. Prints the seconds of each part as the last line, in JSON.

    Args:
        began: when the process was started, in seconds since the epoch, as from time.time().
    """
    parts, at = {}, began

    def done(part: str) -> None:
        nonlocal at
        parts[part] = parts.get(part, 0.0) + time.time() - at
        at = time.time()

    import random

    from rsft_pipeline import models, tasks, training
    from rsft_pipeline.devices import Device
    from rsft_pipeline.lineage import in_eval_split, question
    from rsft_pipeline.models.trainable import select_trainable
    from rsft_pipeline.prompts import encode
    from rsft_pipeline.recipe.reading import find, load
    from rsft_pipeline.sampling import Asked, Request
    from rsft_pipeline.scoring import answer

    made, device = load(find("arithmetic"), overrides), Device("cpu", "float32")
    task, how = tasks.of(made), made.sampling
    base = models.base(made, home)
    tokenizer, model = models.tokenizer(base.path), models.load(base.path, device)
    done("imports and model")
    rows = [json.loads(line) for line in Path(made.prompts.source).read_text("utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    sides: dict[bool, list[dict]] = {True: [], False: []}  # as a round splits them
    for row in rows:
        sides[in_eval_split(question([row["question"]]), made.prompts.eval_fraction)].append(row)
    held_out, train = sides[True][: made.evaluation.prompts], sides[False][: how.prompts]

    def draw(model, rows: list[dict], draws: int) -> list[tuple]:
        asked = [Asked(row["answer"], tuple(encode(tokenizer, row["question"], False)), row["answer"]) for row in rows]
        asked.sort(key=lambda prompt: len(prompt.prompt_ids))  # as a round does, for less padding
        requests = [Request(f"{i} {n}", one, n, i * 1000 + n) for i, one in enumerate(asked) for n in range(draws)]
        drawn = []
        for i in range(0, len(requests), how.wave_size):
            drawn += task.draw(model, tokenizer, requests[i : i + how.wave_size], how)
        return [(one, answer.exact(one.text, one.request.asked.reference)) for one in drawn]

    right = {(one.request.prompt_ids, one.text): one for one, score in draw(model, train, how.draws) if score}
    done("candidates and scores")
    before = draw(model, held_out, made.evaluation.draws)
    done("evaluation")
    model = models.load(base.path, device, train=True)
    model, _, _ = select_trainable(model, made.model, made.seed)
    samples = [
        training.Sample(one.request.candidate_id, list(one.request.prompt_ids), one.token_ids) for one in right.values()
    ]
    training.fit(
        model,
        samples,
        made.training,
        task=task,
        start="bare",
        seed=0,
        device=device,
        pad_id=tokenizer.pad_token_id,
        scratch=home / "scratch-bare",
    )
    model.save_pretrained(home / "bare")
    done("checkpoint")
    after = draw(model.eval(), held_out, made.evaluation.draws)
    done("evaluation")
    print(sum(score for _, score in before) / len(before), sum(score for _, score in after) / len(after))
    print(json.dumps(parts))


def questions(prompts: int, file: Path) -> dict[str, str]:
    """Write as many sums as a round of `prompts` prompts needs. Returns the overrides, the same for both sides.

    They begin with the recipe's own; the model has not seen larger numbers, but answers nevertheless.
    """
    largest = next(n for n in itertools.count(49) if (n + 1) ** 2 * 0.88 >= prompts)  # a tenth is held out
    pairs = itertools.product(range(largest + 1), repeat=2)
    rows = (json.dumps({"question": f"{a}+{b}=", "answer": str(a + b)}) for a, b in pairs)
    file.write_text("".join(f"{row}\n" for row in rows), "utf-8")
    return {"sampling.prompts": str(prompts), "prompts.source": str(file)}


def _prepare(home: Path) -> None:
    """Create the databases of a home, each of which runs its migrations when it is first opened."""
    import dagster as dg

    from resources.tracking import Tracking
    from rsft_pipeline.store import Store

    for folder in ("mlflow", "dagster"):
        (home / folder).mkdir()
    Tracking(uri=f"sqlite:///{home / 'mlflow' / 'mlflow.db'}").client().search_experiments()
    shutil.copy(ROOT / "dagster.yaml", home / "dagster")
    os.environ["DAGSTER_HOME"] = str(home / "dagster")
    with dg.DagsterInstance.get() as instance:
        instance.get_runs(limit=1)
    Store.at(home).close()


def pipeline(home: Path, overrides: dict[str, str]) -> dict[str, float]:
    """Wall seconds of `rsft run` and, by Dagster's events, of each step of the round."""
    settings = [f"--set={name}={value}" for name, value in overrides.items()]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "cli.main", "run", "arithmetic", "--rounds", "1", *settings],
        cwd=ROOT,
        env={**os.environ, "RSFT_HOME": str(home)},
        check=True,
        capture_output=True,
    )
    seconds = {"whole": time.perf_counter() - began}
    os.environ["DAGSTER_HOME"] = str(home / "dagster")
    import dagster as dg

    with dg.DagsterInstance.get() as instance:
        run = instance.get_runs(limit=1)[0]
        stats = instance.get_run_step_stats(run.run_id)
        facts = instance.get_run_stats(run.run_id)
    steps = {one.step_key.removeprefix("arithmetic__"): one.end_time - one.start_time for one in stats}
    seconds |= steps
    seconds["checks and between steps"] = facts.end_time - facts.start_time - sum(steps.values())
    seconds["imports, start and end of the process"] = seconds["whole"] - (facts.end_time - facts.start_time)
    return seconds


def plot(bare: dict[str, float], pipeline: dict[str, float]):
    """A figure of where the seconds of each side go."""
    sides = {"bare script": bare, "`rsft run`": pipeline}
    drawn = figure(9, 2.6)
    axis, left = drawn.subplots(), [0.0] * len(sides)
    parts = {
        part: [sum(side.get(name, 0.0) for name in names) for side in sides.values()] for part, names in PARTS.items()
    }
    told = [sum(each) for each in zip(*parts.values(), strict=True)]
    parts["the rest"] = [side["whole"] - known for side, known in zip(sides.values(), told, strict=True)]
    for part, seconds in parts.items():
        axis.barh(list(sides), seconds, left=left, label=part)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axis.set_xlabel("seconds")
    axis.invert_yaxis()
    drawn.legend(loc="outside upper center", ncols=3, frameon=False)
    return drawn


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--prompts", type=int, default=2000)
    options.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "rsft-benchmark")
    options.add_argument("--set", metavar="a.b=value", nargs="+", default=[], help="of the recipe, for both sides")
    options.add_argument("--out", type=Path, default=FOLDER, help="folder for the results")
    options.add_argument("--bare", type=float, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    arguments.home.mkdir(parents=True, exist_ok=True)
    overrides = questions(arguments.prompts, arguments.home / "sums.jsonl")
    overrides |= dict(each.split("=", 1) for each in arguments.set)
    if arguments.bare:
        bare(arguments.home, overrides, arguments.bare)
        return
    from rsft_pipeline import models
    from rsft_pipeline.recipe.reading import find, load

    models.base(load(find("arithmetic"), overrides), arguments.home)  # made if it is missing
    turns = []
    for _ in range(arguments.turns):
        began = time.time()
        same = ["--bare", str(began), "--prompts", str(arguments.prompts), "--home", str(arguments.home)]
        same += ["--set", *arguments.set] if arguments.set else []
        told = subprocess.run(
            [sys.executable, "-m", "benchmarks.round", *same], cwd=ROOT, check=True, capture_output=True, text=True
        )
        alone = time.time() - began
        parts = json.loads(told.stdout.splitlines()[-1])
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder) / "home"
            shutil.copytree(arguments.home / "models", home / "models")
            _prepare(home)
            turns.append({"bare": {"whole": alone, **parts}, "pipeline": pipeline(home, overrides)})
    wholes = [(turn["pipeline"]["whole"], turn["bare"]["whole"]) for turn in turns]
    overhead = statistics.median(whole - alone for whole, alone in wholes)
    share = statistics.median(whole / alone - 1 for whole, alone in wholes)
    told = f"overhead: {overhead:.1f} s, {share:.0%} (median of {len(turns)} turns, {arguments.prompts:,} prompts)"
    sides = {
        side: {name: statistics.median(turn[side][name] for turn in turns) for name in turns[0][side]}
        for side in ("bare", "pipeline")
    }
    tables = [
        table([head, "seconds"], ([name, f"{value:.1f}"] for name, value in sides[side].items()))
        for side, head in (("bare", "bare script"), ("pipeline", "`rsft run`"))
    ]
    results = {"set": arguments.set, "prompts": arguments.prompts, "turns": turns}
    publish(arguments.out, "round_cpu", results, "\n\n".join([told, *tables]), plot(**sides))


if __name__ == "__main__":
    main()
