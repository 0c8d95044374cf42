"""Read GSM8K and rt_polarity as prompts, and judge GSM8K's own answers: the tables of real-input.md.

python docs/real_input.py        # reads data/, see real-input.md
"""

import json
import tempfile
from collections import Counter
from html import unescape
from pathlib import Path

import yaml

from rsft_pipeline import models, prompts, scoring
from rsft_pipeline.devices import Device
from rsft_pipeline.markdown import table
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.recipe import Recipe

DATA = Path(__file__).resolve().parent.parent / "data"


if not DATA.is_dir():
    raise SystemExit(f"{DATA} is not there: docs/real-input.md says where its files are from")


def recipe_for(**source) -> Recipe:
    """A recipe that reads one source."""
    fields = {
        "description": "Reads a source.",
        "model": {"source": str(DATA / "stories260K")},
        "prompts": source,
        "scoring": {"scorers": [{"kind": "answer", "match": "numeric"}]},
        "acceptance": {"rule": "threshold", "threshold": 0.5},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reader.yaml"
        path.write_text(yaml.safe_dump(fields))
        return load(path)


def ingested(name: str, tokenizer, **source) -> dict:
    read = prompts.read(recipe_for(**source), tokenizer, 10_000)
    assert read.rows == len(read.prompts) + len(read.refused)
    refused = Counter(row.reason for row in read.refused)
    return {
        "source": name,
        "rows": read.rows,
        "prompts": len(read.prompts),
        "quarantine": ", ".join(f"{count} {reason}" for reason, count in refused.items()) or "none",
    }


def answers(name: str) -> dict:
    """The scorer on every gold answer, and on the same answer with a wrong number."""
    rows = [json.loads(line) for line in (DATA / "gsm8k" / name).read_text(encoding="utf-8").splitlines()]
    judges = scoring.judges(recipe_for(source="unused.jsonl", template="{question}"), Device("cpu", "float32"))

    def ones(completion) -> int:
        samples = [scoring.Sample(row["question"], completion(row["answer"]), row["answer"], {}, None) for row in rows]
        return sum(scoring.score(judges, samples)["answer"])

    def wrong(answer: str) -> str:
        text, _, number = answer.rpartition("#### ")
        return f"{text}#### {int(number.replace(',', '')) + 1}"

    return {"answers": name, "rows": len(rows), "gold scored 1.0": ones(str), "wrong number scored 1.0": ones(wrong)}


def main() -> None:
    tokenizer = models.tokenizer(DATA / "stories260K")
    gsm8k = {"template": "{question}\n", "reference": "answer"}
    rows = [
        ingested(f"gsm8k/{name}", tokenizer, source=str(DATA / "gsm8k" / name), **gsm8k)
        for name in ("train.jsonl", "test.jsonl")
    ]
    for encoding in ("utf-8", "cp1252"):
        for name in ("rt-polarity.pos", "rt-polarity.neg"):
            source = {"source": str(DATA / "rt_polarity" / name), "format": "text", "template": "{text}"}
            rows.append(ingested(f"rt_polarity/{name} as {encoding}", tokenizer, encoding=encoding, **source))
    for each in (rows, [answers("train.jsonl"), answers("test.jsonl")]):
        print(unescape(table(each)), end="\n\n")  # nothing of it is a model's


if __name__ == "__main__":
    main()
