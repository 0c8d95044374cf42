"""Training benchmark: training on the same samples with this project's loop and with what people would use instead.

    OMP_NUM_THREADS=1 python -m benchmarks.training --peers /path/to/peers/bin/python

Each way is a process of its own (benchmarks/peers/train.py), the peers' with their own interpreter
(benchmarks/peers/README.md), so that their dependencies never get into this project. They take turns; a
ratio is the median of the ratios within a turn, with its quartiles: absolute times do not carry over to
other machines, and other load affects all ways of a turn alike. All have the same model, samples, samples
per step, optimiser, learning rate and threads. For `ours` everything from the samples to the last step is
timed, for a Trainer only its steps.

First it is checked that all train alike: with only as many samples as a step takes, every way's steps are
the same whatever its order, so the losses after some of them must agree.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.results import FOLDER, bars, publish, table

CONTENDER = Path(__file__).parent / "peers" / "train.py"
BATCH, RATE = 32, 1e-3


@dataclass(frozen=True)
class Case:
    """What is trained on. Lengths are log-normal, given by median and σ, and clipped to a range."""

    steps: int
    of_prompt: int  # accepted samples of each prompt
    prompt: tuple[float, float, int, int]  # median, σ, least, most: tokens
    completion: tuple[float, float, int, int]
    template: int = 0  # tokens that all prompts begin with
    vocabulary: int = 4096


CASES = {
    "one-of-a-prompt": Case(2, 1, (60, 0.7, 20, 200), (40, 0.9, 10, 200)),
    "four-of-a-prompt": Case(2, 4, (140, 0.3, 100, 200), (40, 0.9, 10, 200)),
    "large-vocabulary": Case(2, 1, (60, 0.7, 20, 200), (40, 0.9, 10, 200), vocabulary=32000),
}


def prepare(case: Case, folder: Path) -> dict:
    """Write the case's model, with random weights, and its samples. Returns facts about them to report."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=case.vocabulary,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    generator = np.random.default_rng(0)

    def length(median: float, sigma: float, least: int, most: int) -> int:
        return int(np.clip(generator.lognormal(np.log(median), sigma), least, most))

    def ids(count: int) -> list[int]:
        return generator.integers(3, case.vocabulary, count).tolist()

    template, samples = ids(case.template), []
    for _ in range(case.steps * BATCH // case.of_prompt):
        prompt = template + ids(length(*case.prompt))
        samples += [{"prompt": prompt, "completion": ids(length(*case.completion))} for _ in range(case.of_prompt)]
    (folder / "samples.json").write_text(json.dumps(samples), "utf-8")
    lengths = [len(sample["prompt"]) + len(sample["completion"]) for sample in samples]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "samples": len(samples),
        "of_prompt": case.of_prompt,
        "vocabulary": case.vocabulary,
        "target_tokens": sum(len(sample["completion"]) for sample in samples),
        "tokens": sum(lengths),
        "distinct_prompt_tokens": sum({tuple(s["prompt"]): len(s["prompt"]) for s in samples}.values()),
        "longest": max(lengths),
    }


class Contender:
    """A way to train, in its own process."""

    def __init__(self, way: str, python: str, cases: Path):
        self.way = way
        self.errors = open(cases / f"{way}.log", "w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, str(CONTENDER), way, str(cases)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "PYTHONPATH": str(CONTENDER.parents[2]) if way == "ours" else ""},
        )

    def train(self, case: str, samples: int, epochs: int, seed: int, evaluate: bool = False) -> dict:
        request = {"case": case, "samples": samples, "epochs": epochs, "seed": seed, "evaluate": evaluate}
        print(json.dumps({**request, "batch_size": BATCH, "learning_rate": RATE}), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            self.errors.seek(0)
            raise RuntimeError(f"{self.way} ended: {self.errors.read()[-2000:]}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def measure(name: str, facts: dict, contenders: list[Contender], turns: int) -> dict:
    """Each way's loss after the same steps, then its times in each turn."""
    result = {"case": name, **facts, "ways": {}}
    for contender in contenders:
        same = contender.train(name, BATCH, 2, seed=0, evaluate=True)  # this also warms up
        result["ways"][contender.way] = {"loss_after_the_same_steps": same["loss_after"], "runs": []}
        print(f"  {contender.way:18} loss after the same steps {same['loss_after']:.6f}", flush=True)
    for turn in range(turns):
        for contender in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            found = contender.train(name, facts["samples"], 1, seed=turn)
            result["ways"][contender.way]["runs"].append(found)
            print(
                f"  turn {turn} {contender.way:18} {found['seconds']:7.2f} s, {found['processor_seconds']:7.2f} s "
                f"of processor, {facts['target_tokens'] / found['seconds']:6.0f} target tokens/s",
                flush=True,
            )
    return result


def summary(result: dict) -> list[dict]:
    """A line for each way: medians, and quartiles over the turns of its speed relative to `trainer`."""
    lines = []
    for way, found in result["ways"].items():
        line = {"way": way}
        for clock in ("seconds", "processor_seconds"):
            mine, base = ([run[clock] for run in result["ways"][each]["runs"]] for each in (way, "trainer"))
            line[clock] = statistics.median(mine)
            ratios = [b / m for b, m in zip(base, mine, strict=True)]
            line[f"{clock}_over_trainer"] = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
        line["peak_gib"] = max(run["peak_gib"] for run in found["runs"])
        line["target_tokens_per_second"] = result["target_tokens"] / line["seconds"]
        same = found["loss_after_the_same_steps"]
        line["loss_difference"] = same - result["ways"]["trainer"]["loss_after_the_same_steps"]
        lines.append(line)
    return lines


def report(result: dict) -> str:
    """A case as Markdown."""
    head = ["way", "target tokens/s", "× `trainer` (quartiles)", "the same by processor time"]
    head += ["loss after the same steps, less `trainer`'s", "most memory of the process, GiB"]
    rows = []
    for line in summary(result):
        wall, processor = (
            f"{middle:.2f} ({low:.2f} to {high:.2f})"
            for low, middle, high in (line["seconds_over_trainer"], line["processor_seconds_over_trainer"])
        )
        speed, loss = f"{line['target_tokens_per_second']:,.0f}", f"{line['loss_difference']:+.1e}"
        rows.append([line["way"], speed, wall, processor, loss, f"{line['peak_gib']:.1f}"])
    return "\n".join(
        [
            f"### {result['case']}",
            "",
            f"{result['parameters'] / 1e6:.1f} M parameters, {result['vocabulary']:,} token ids; {result['samples']} "
            f"samples, {result['of_prompt']} of each prompt, {BATCH} a step; {result['tokens']:,} tokens, the longest "
            f"sample {result['longest']}; {result['target_tokens']:,} of them targets; "
            f"{len(next(iter(result['ways'].values()))['runs'])} turns.",
            "",
            table(head, rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("cases", nargs="*", metavar="case", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--peers", default=sys.executable, help="interpreter of the peers' environment")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=["ours", "trainer", "trainer_by_length", "trl"])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the results")
    told = parser.parse_args()
    if unknown := sorted(set(told.cases) - set(CASES)):
        parser.error(f"unknown case {', '.join(unknown)}; there are {', '.join(CASES)}")
    if "trainer" not in told.ways:
        parser.error("--ways needs trainer, which the others are compared with")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    names = told.cases or list(CASES)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        facts = {name: prepare(CASES[name], folder / name) for name in names}
        contenders = [Contender(way, sys.executable if way == "ours" else told.peers, folder) for way in told.ways]
        try:
            for name in names:
                print(name, flush=True)
                results.append(measure(name, facts[name], contenders, told.turns))
        finally:
            for contender in contenders:
                contender.close()
    publish(
        told.out,
        "training_cpu",
        {"results": results, "summary": {result["case"]: summary(result) for result in results}},
        "\n\n".join(map(report, results)),
        bars(
            {
                result["case"]: {line["way"]: line["seconds_over_trainer"] for line in summary(result)}
                for result in results
            },
            "speed over transformers' Trainer",
            "{:.1f}×",
        ),
    )


if __name__ == "__main__":
    main()
