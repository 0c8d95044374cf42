"""A round's overhead: `rsft run` against a bare script that does the same drawing and training.

    python -m benchmarks.round

Both are whole processes, from the interpreter's start to its end, in turns. The bare script has no Dagster, no
store, no MLflow, no lineage: it draws with the same sampler, compares answers, trains with the same loop, and draws
again to evaluate. The base model is made before, and MLflow's empty database is there. What a round
spends where is read from Dagster's own events.
Results go to docs/benchmarks: JSON and a Markdown table.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks"
ROOT = Path(__file__).parent.parent


def bare(home: Path, overrides: dict[str, str]) -> None:
    """The same round with nothing around it."""
    import random

    from rsft_pipeline import models, tasks, training
    from rsft_pipeline.devices import Device
    from rsft_pipeline.prompts import encode
    from rsft_pipeline.recipe.reading import find, load
    from rsft_pipeline.sampling import Asked, Request
    from rsft_pipeline.scoring import answer

    made, device = load(find("arithmetic"), overrides), Device("cpu", "float32")
    task, how = tasks.of(made), made.sampling
    base = models.base(made, home)
    tokenizer, model = models.tokenizer(base.path), models.load(base.path, device)
    sys.path.insert(0, str(ROOT / "recipes"))
    import arithmetic

    rows = list(arithmetic.sums())
    random.Random(0).shuffle(rows)
    held_out, train = rows[: made.evaluation.prompts], rows[made.evaluation.prompts :][: how.prompts]

    def draw(model, rows: list[dict], draws: int) -> list[tuple]:
        asked = [Asked(row["answer"], tuple(encode(tokenizer, row["question"], False)), row["answer"]) for row in rows]
        requests = [Request(f"{i} {n}", one, n, i * 1000 + n) for i, one in enumerate(asked) for n in range(draws)]
        drawn = []
        for i in range(0, len(requests), how.wave_size):
            drawn += task.draw(model, tokenizer, requests[i : i + how.wave_size], how)
        return [(one, answer.exact(one.text, one.request.asked.reference)) for one in drawn]

    right = {(one.request.prompt_ids, one.text): one for one, score in draw(model, train, how.draws) if score}
    before = draw(model, held_out, made.evaluation.draws)
    model = models.load(base.path, device, train=True)
    model, _, _ = models.select_trainable(model, made.model, made.seed)
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
    after = draw(model.eval(), held_out, made.evaluation.draws)
    print(sum(score for _, score in before) / len(before), sum(score for _, score in after) / len(after))


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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--prompts", type=int, default=2000)
    options.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "rsft-benchmark")
    options.add_argument("--out", type=Path, default=RESULTS / "round_cpu")
    options.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    overrides = {"sampling.prompts": str(arguments.prompts)}
    if arguments.bare:
        bare(arguments.home, overrides)
        return
    from resources.tracking import Tracking
    from rsft_pipeline import models
    from rsft_pipeline.recipe.reading import find, load

    models.base(load(find("arithmetic"), overrides), arguments.home)  # made, or there already
    turns = []
    for _ in range(arguments.turns):
        began = time.perf_counter()
        same = ["--bare", "--prompts", str(arguments.prompts), "--home", str(arguments.home)]
        subprocess.run([sys.executable, "-m", "benchmarks.round", *same], cwd=ROOT, check=True, capture_output=True)
        alone = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder) / "home"
            shutil.copytree(arguments.home / "models", home / "models")
            (home / "mlflow").mkdir()
            Tracking(uri=f"sqlite:///{home / 'mlflow' / 'mlflow.db'}").client().search_experiments()  # migrated once
            turns.append({"bare": alone, **pipeline(home, overrides)})
    rows = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    overhead = statistics.median(turn["whole"] - turn["bare"] for turn in turns)
    share = statistics.median(turn["whole"] / turn["bare"] - 1 for turn in turns)
    lines = [
        f"overhead: {overhead:.1f} s, {share:.0%} (median of {len(turns)} turns)",
        "",
        "| where | seconds |",
        "| --- | --- |",
        *(f"| {name} | {value:.1f} |" for name, value in rows.items()),
    ]
    arguments.out.with_suffix(".json").write_text(json.dumps(turns, indent=2) + "\n", "utf-8")
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
