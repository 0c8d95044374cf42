"""A store as two rounds leave it, written row by row, with known numbers and with the nastiest texts of a model."""

import json
from pathlib import Path

import conftest
import yaml

from rsft_pipeline import lineage, sampling
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.store import Store

RECIPE = "letters"
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"
TURNED = "abc \u202edesrever\u202c \u200fعربي\u2069 end"
NUL = "before\x00after \x1b[31mred"
LONG = "long " * 20_000
NASTY = [SCRIPT, TURNED, NUL, LONG, "", "'; DROP TABLE rounds; --", "{{ 1337 * 1337 }} ${1337*1337}"]
PROMPTS = 20  # for training, and as many held out
DRAWS = 4
BASE = lineage.digest("base")
CHECKPOINTS = {"r000": lineage.digest("first"), "r001": lineage.digest("second")}
RECIPE_AS_RUN = Recipe.model_validate(yaml.safe_load(conftest.RECIPE))
SETTINGS = {
    "train": sampling.settings(RECIPE_AS_RUN.sampling, 0),
    "eval": sampling.settings(sampling.evaluation_sampling(RECIPE_AS_RUN), 0),
}
SCORERS = {"answer": "version-answer", "combined": "version-combined"}
PARAMETERS = {"rule": "threshold", "threshold": 0.5, "distinct": True, "cap": 1, "raise_by": 0.0, "pilot": 1}
ESTIMATE = {"value": 0.5, "low": 0.4, "high": 0.6}


def prompt_id(number: int, split: str = "train") -> str:
    return lineage.digest([split, number])


def candidate_id(round_key: str, prompt: int, draw: int, split: str = "train") -> str:
    return lineage.digest([round_key, split, prompt, draw])


def write(home: Path) -> Store:
    """Two finished rounds. Of each prompt's four draws the first is accepted, the second a duplicate, the third is
    below the threshold, and the fourth cannot be judged; of the first prompts of r000 the texts are NASTY."""
    store = Store.at(home)
    store.append("prompts", [_prompt(number, split) for split in ("train", "eval") for number in range(PROMPTS)])
    refused = {"recipe": RECIPE, "source": "letters.jsonl", "reason": "broken JSON", "detail": SCRIPT}
    run = {"dagster_run_id": "run-prompts"}
    store.append(
        "quarantine", [{**refused, **run, "line": 100 + i, "raw": b"\xff" + SCRIPT.encode()} for i in range(30)]
    )
    for key in CHECKPOINTS:
        _round(store, key)
    return store


def _prompt(number: int, split: str) -> dict:
    return {
        "recipe": RECIPE,
        "prompt_id": prompt_id(number, split),
        "text": f"What comes after {number}? {SCRIPT if number == 0 else ''}",
        "chat": False,
        "reference": str(number + 1),
        "fields": json.dumps({"n": number}),
        "split": split,
        "content": lineage.digest(["content", split, number]),
        "source": "letters.jsonl",
        "line": number + 1,
        "source_digest": "source",
        "active": True,
        "dagster_run_id": "run-prompts",
    }


def _round(store: Store, key: str) -> None:
    of = {"recipe": RECIPE, "round": key, "dagster_run_id": f"run-{key}"}
    policy = BASE if key == "r000" else CHECKPOINTS["r000"]
    candidates, scores, decisions = [], [], []
    for split, prompts in (("train", PROMPTS), ("eval", 2)):
        for prompt in range(prompts):
            for draw in range(DRAWS):
                one = {**of, "candidate_id": candidate_id(key, prompt, draw, split)}
                nasty = key == "r000" and split == "train" and draw == 0 and prompt < len(NASTY)
                candidates.append(
                    {
                        **one,
                        "prompt_id": prompt_id(prompt, split),
                        "split": split,
                        "origin": "policy",
                        "policy": policy,
                        "draw": draw,
                        "wave": 0,
                        "text": NASTY[prompt] if nasty else f"answer {prompt} {draw}",
                        "token_ids": list(range(3 + draw)),
                        "tokens": 3 + draw,
                        "finish_reason": "stop",
                        "log_q": -1.5,
                        "log_p": -1.25,
                        "seed": 7,
                        "settings": SETTINGS[split],
                    }
                )
                value = [1.0, 1.0, 0.25, None][draw]
                content = lineage.digest(["content", split, prompt])
                for scorer, version in SCORERS.items():
                    passed = value is not None if scorer == "combined" else None
                    judged = {"scorer": scorer, "version": version, "content": content, "value": value}
                    scores.append({**one, **judged, "passed": passed})
                if split == "train":
                    reason = ["accepted", "duplicate", "below threshold", "cannot judge"][draw]
                    decisions.append({**one, "prompt_id": prompt_id(prompt), "accepted": draw == 0, "reason": reason,
                                      "score": value, "log_a": None, "u": lineage.uniform(one["candidate_id"], 0),
                                      "weight": 1.0, "parameters": json.dumps(PARAMETERS)})  # fmt: skip
    accepted = [row["candidate_id"] for row in decisions if row["accepted"]]
    store.append("candidates", candidates)
    store.append("scores", scores)
    store.append("decisions", decisions)
    summary = json.dumps(dict.fromkeys(("pass_at_1", "pass_at_k", "mean_score"), ESTIMATE))
    row = {
        **of,
        "state": "finished",
        "policy": policy,
        "policy_source": "base" if key == "r000" else "r000",
        "drawn_from": policy,
        "checkpoint": CHECKPOINTS[key],
        "champion": CHECKPOINTS["r000"],
        "promoted": key == "r000",
        "verdict": "better: pass_at_1 +0.1" if key == "r000" else "not better",
        "candidates": PROMPTS * DRAWS,
        "accepted": len(accepted),
        "distinct_accepted": len(accepted),
        "tokens": sum(one["tokens"] for one in candidates),
        "policy_eval": summary,
        "checkpoint_eval": summary,
        "champion_eval": summary,
        "settings": RECIPE_AS_RUN.model_dump_json(),
        "scorers": json.dumps(SCORERS),
        "recipe_digest": RECIPE_AS_RUN.digest,
        "mlflow_run_id": f"mlflow-{key}",
    }
    store.append("rounds", [row])
    store.commit(
        lambda c: c.execute("UPDATE rounds SET started_at = now(), finished_at = now() WHERE round = ?", [key])
    )
    snapshot = store.snapshot()
    made = {**of, "checkpoint": CHECKPOINTS[key]}
    digest = lineage.set_digest(accepted)
    meta = {"accepted_digest": digest, "training": {"data": "round"}, "scorers": list(SCORERS.values())}
    store.append("training_samples", [{**made, "candidate_id": one, "weight": 1.0} for one in accepted])
    store.append(
        "checkpoints",
        [
            {
                **made,
                "parent": policy,
                "policy": policy,
                "trained_on": "accepted",
                "path": f"/nowhere/{CHECKPOINTS[key]}",
                "accepted_digest": digest,
                "samples": len(accepted),
                "steps": 10,
                "loss": 0.5,
                "snapshot": snapshot,
                "meta": json.dumps(meta),
                "mlflow_run_id": f"mlflow-{key}",
            }
        ],
    )
