"""Judge labelled replies with the dialogue scorers, and gold answers with `squad`: the tables of dialogue-scorers.md.

python -m docs.dialogue_scorers [MODEL]     # reads data/, see dialogue-scorers.md; MODEL is a folder or hub id
"""

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from html import unescape
from pathlib import Path

import numpy as np
import yaml

from rsft_pipeline import scoring
from rsft_pipeline.devices import Device
from rsft_pipeline.markdown import table
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.scoring import Sample

DATA = Path(__file__).resolve().parent.parent / "data"
CPU = Device("cpu", "float32")
RESAMPLES = 10_000


if not DATA.is_dir():
    raise SystemExit(f"{DATA} is not there: docs/dialogue-scorers.md says where its files are from")


def recipe_for(*scorers: dict) -> Recipe:
    """A recipe with these scorers."""
    fields = {
        "description": "Judges texts that are there.",
        "model": {"source": "unused"},
        "prompts": {"source": "unused.jsonl", "template": "{question}"},
        "scoring": {"scorers": list(scorers)},
        "acceptance": {"rule": "threshold", "threshold": 0.5},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "judge.yaml"
        path.write_text(yaml.safe_dump(fields))
        return load(path)


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- dialogue ---------------------------------------------------------------------------------


def dialogue_scorers(model: str) -> list[dict]:
    """Every dialogue scorer; the combined score is the mean of `relevance` and `consistency`."""
    turns, embedded = {"turns": "context"}, {"model": model}
    return [
        {"name": "relevance", "kind": "relevance", **turns, **embedded},
        {"name": "relevance_hashing", "kind": "relevance", "model": "hashing", "weight": 0, **turns},
        {"name": "consistency", "kind": "consistency", **turns},
        {"name": "consistency_words", "kind": "consistency", "words": 1, "weight": 0, **turns},
        {"name": "novelty", "kind": "novelty", "weight": 0, **embedded},
        {"name": "novelty_hashing", "kind": "novelty", "model": "hashing", "weight": 0},
    ]


def scores(recipe: Recipe, judges: dict[str, scoring.Judge], rows: list[dict], replies: str) -> dict[str, np.ndarray]:
    """The scores of each row's replies of a kind: [rows, replies], by scorer, with `combined` and `length`."""
    samples = [Sample("", reply, None, row, None) for row in rows for reply in row[replies]]
    judged = scoring.score(judges, samples)
    judged["combined"] = scoring.combine(recipe.scoring, judged)[0]
    judged["length"] = [float(len(sample.completion.split())) for sample in samples]
    return {name: np.array(values, float).reshape(len(rows), -1) for name, values in judged.items()}


def auc(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """For each row, the share of its (good, bad) pairs in which the good one is above; a tie counts a half."""
    difference = good[:, :, None] - bad[:, None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(1, 2))


def interval(values: np.ndarray) -> str:
    """The mean over contexts, with a 95 % percentile interval from resampled contexts."""
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)), dtype=np.int32)
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def dialogue(model: str) -> str:
    rows = jsonl(DATA / "dailydialog" / "plusplus_test.jsonl")
    before = [r for row in jsonl(DATA / "dailydialog" / "plusplus_dev.jsonl") for r in row["positive_responses"]]
    recipe = recipe_for(*dialogue_scorers(model))
    judges = scoring.judges(recipe, CPU, before)
    good, adversarial, other = (
        scores(recipe, judges, rows, f"{kind}_responses")
        for kind in ("positive", "adversarial_negative", "random_negative")
    )
    return table(
        {
            "scorer": name,
            "good above adversarial": interval(auc(good[name], adversarial[name])),
            "tied": f"{(good[name][:, :, None] == adversarial[name][:, None, :]).mean():.1%}",
            "good above random": interval(auc(good[name], other[name])),
            "mean good": f"{good[name].mean():.3f}",
            "mean adversarial": f"{adversarial[name].mean():.3f}",
            "mean random": f"{other[name].mean():.3f}",
        }
        for name in good
    )


# --- question answering -----------------------------------------------------------------------


def squad() -> list[tuple[str, list[str]]]:
    """(gold answer, all gold answers) of each question."""
    articles = json.loads((DATA / "squad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    questions = [q for article in articles for paragraph in article["paragraphs"] for q in paragraph["qas"]]
    return [(answer["text"], q["answers"]) for q in questions for answer in q["answers"]]


def webquestions() -> list[tuple[str, list[str]]]:
    questions = json.loads((DATA / "webquestions" / "test.json").read_text(encoding="utf-8"))
    return [(answer, q["answers"]) for q in questions for answer in q["answers"]]


def answers(name: str, pairs: list[tuple[str, list[str]]]) -> dict:
    """The scorer on every gold answer, and on the gold answer of another question."""
    recipe = recipe_for(*({"name": m, "kind": "squad", "metric": m, "answers": "answers"} for m in ("exact", "f1")))
    judges = scoring.judges(recipe, CPU)
    shuffled = random.Random(0).sample([given for given, _ in pairs], len(pairs))

    def mean(given: Sequence[str]) -> dict[str, float]:
        samples = [
            Sample("", g, None, {"answers": expected}, None) for g, (_, expected) in zip(given, pairs, strict=True)
        ]
        return {name: sum(values) / len(values) for name, values in scoring.score(judges, samples).items()}

    gold, other = mean([given for given, _ in pairs]), mean(shuffled)
    return {
        "gold answers": name,
        "count": len(pairs),
        "exact": gold["exact"],
        "F1": gold["f1"],
        "another's, exact": f"{other['exact']:.4f}",
        "another's, F1": f"{other['f1']:.4f}",
    }


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "sentence-transformers/all-MiniLM-L6-v2"
    judged = table([answers("XQuAD English", squad()), answers("WebQuestions test", webquestions())])
    for each in (judged, dialogue(str(Path(model).resolve()) if Path(model).is_dir() else model)):
        print(unescape(each), end="\n\n")  # nothing of it is a model's


if __name__ == "__main__":
    main()
