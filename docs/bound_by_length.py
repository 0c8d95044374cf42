"""What M comes to by temperature and length: the table of docs/recipes/customer_service.md.

    python -m docs.bound_by_length MODEL TEXTS.jsonl     # a local causal model; {"text": …} a line

The openings of 200 texts, one draw of each: the first hundred are the pilot that M is estimated from, the others are
counted. p is the model itself, q the model at temperature T.
"""

import json
import math
import sys
from itertools import islice
from pathlib import Path

import numpy as np

from rsft_pipeline import lineage, models
from rsft_pipeline.decoding import Draw, Shape, decode
from rsft_pipeline.devices import Device
from rsft_pipeline.models import configuration

PILOT, WORDS = 100, 8


def main(model_path: str, texts: str) -> None:
    for path in (model_path, texts):
        if not Path(path).exists():
            sys.exit(f"{path} is not there: docs/real-input.md says where such a model and texts are from")
    tokenizer, model = models.tokenizer(Path(model_path)), models.load(Path(model_path), Device("cpu", "float32"))
    stop_ids = frozenset(configuration.stop_ids(model, tokenizer))
    with open(texts, encoding="utf-8") as lines:
        openings = [" ".join(json.loads(line)["text"].split()[:WORDS]) for line in islice(lines, 2 * PILOT)]
    draws = [Draw(tuple(tokenizer(one)["input_ids"]), int(lineage.digest(one)[:15], 16)) for one in openings]
    print("| T | tokens | log M | 1/M | mean A | violations of 100 |\n| ---: | ---: | ---: | ---: | ---: | ---: |")
    for temperature in (1.05, 1.1, 1.3):
        for tokens in (8, 24, 64):
            drawn = decode(model, draws, Shape(temperature, 1.0, None, tokens, stop_ids), tokenizer.pad_token_id)
            ratio = np.array([one.log_p - one.log_q for one in drawn])
            log_m, rest = ratio[:PILOT].max(), ratio[PILOT:]
            mean_a, violations = np.exp(np.minimum(rest - log_m, 0)).mean(), int((rest > log_m).sum())
            numbers = f"{log_m:.2f} | {math.exp(-log_m):.3f} | {mean_a:.3f} | {violations}"
            print(f"| {temperature} | {tokens} | {numbers} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
