"""The recipe `knowledge_qa`: A and the weights from stored log-probabilities, its metrics, and its data."""

import json
import math

import pytest

from rsft_pipeline import functions, rounds
from rsft_pipeline.recipe.reading import RECIPES, find, load
from rsft_pipeline.store import Store
from tests.test_round import instance, run  # noqa: F401 (a fixture)

OFFLINE = find("knowledge_qa_offline")
DATA = ("web_questions", "common_web_questions", "careless_web_answers")

PAIRS = '''
def questions():
    """Two letters; either of them is an answer."""
    for a in "bcdefghi":
        for b in "bcdefghi":
            yield {"question": a + b, "answers": [b, a]}


def babble():
    """Warm-up: mostly the second letter, sometimes any."""
    import random

    chance = random.Random(0)
    for _ in range(8):
        for row in questions():
            said = row["answers"][0] if chance.random() < 0.6 else chance.choice("bcdefghi")
            yield {"prompt": row["question"], "completion": said}
'''


@pytest.fixture
def pairs(write_recipe):
    """The recipe with an acceptance section of its own, on a two-layer T5 and questions of two letters."""

    def make(**acceptance):
        told = load(OFFLINE).model_dump(mode="json")
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2}
        corpus = {"corpus": "pairs:babble", "tokenizer": "characters", "steps": 60, "learning_rate": 0.01}
        bootstrap = told["model"]["bootstrap"]
        path = write_recipe(
            name="pairs_loop",
            task=told["task"],
            model={
                "source": "bootstrap",
                "bootstrap": bootstrap | corpus | {"config": bootstrap["config"] | sizes},
            },
            prompts=told["prompts"] | {"source": "pairs:questions", "eval_fraction": 0.3},
            sampling=told["sampling"] | {"draws": 8, "max_tokens": 3},
            scoring=told["scoring"],
            acceptance=told["acceptance"] | acceptance,
            evaluation=told["evaluation"],
        )
        (path.parent / "pairs.py").write_text(PAIRS)
        return load(path)

    return make


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_is_p_over_m_and_weighs_what_is_trained_on(home, instance, pairs, threshold):  # noqa: F811
    recipe = pairs(threshold=threshold, distinct=False)
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        rows = store.query(
            """SELECT d.*, c.text, c.log_q, c.log_p, p.fields, t.weight AS trained
               FROM decisions d JOIN candidates c USING (candidate_id) JOIN prompts p ON p.prompt_id = c.prompt_id
               LEFT JOIN training_samples t ON t.candidate_id = d.candidate_id"""
        )
        (round_,) = rounds.history(store, recipe.name)
        scored = store.query(
            """SELECT s.scorer, avg(s.value) AS mean FROM scores s JOIN candidates c USING (candidate_id)
               WHERE c.split = 'eval' AND c.policy = ? GROUP BY ALL""",
            [round_["checkpoint"]],
        )
    means = {row["scorer"]: row["mean"] for row in scored}
    right = 0
    for row in rows:
        answers = json.loads(row["fields"])["answers"]
        matching = answers.count(row["text"])
        M = math.exp(row["log_q"])  # at temperature 1 what is sampled from is the policy itself
        assert row["log_p"] == pytest.approx(row["log_q"], abs=1e-6)
        P = 0.9 * matching / 2 + 0.1 * M
        A = min(1.0, P / M)
        assert math.exp(row["log_a"]) == pytest.approx(A, rel=1e-9)
        assert row["accepted"] == (row["u"] < A if threshold is None else threshold < A)
        assert (row["trained"] is not None) == row["accepted"]
        if row["accepted"]:
            assert row["weight"] == row["trained"] == pytest.approx(A, rel=1e-9)
            right += matching > 0
    weights = [row["trained"] for row in rows if row["accepted"]]
    assert len({round(weight, 3) for weight in weights}) > 3  # neither all 1 nor all alike
    assert (right < len(weights)) == (threshold is None)  # chance lets some of what ε leaves possible through

    # pass@1 is the exact match, and both means of the held-out answers are told.
    evaluated = json.loads(round_["checkpoint_eval"])
    assert evaluated["pass_at_1"]["value"] == pytest.approx(means["exact"])
    assert evaluated["mean_score"]["value"] == pytest.approx((means["exact"] + means["f1"]) / 2)
    from mlflow import MlflowClient

    metrics = MlflowClient(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}").get_run(round_["mlflow_run_id"]).data.metrics
    assert metrics["checkpoint/scorers/exact"] == pytest.approx(means["exact"])
    assert metrics["checkpoint/scorers/f1"] == pytest.approx(means["f1"])


def test_web_questions_are_read_from_arrays_and_the_common_ones_picked(tmp_path, monkeypatch):
    rows = [{"qText": f"what is spoken in land {i}?", "answers": ["Welsh", f"Dialect {i}"]} for i in range(8)]
    (tmp_path / "train.json").write_text(json.dumps([*rows, {"qText": "who was it?", "answers": ["Nobody"]}]))
    (tmp_path / "test.json").write_text(json.dumps([{"qText": "é?", "answers": ["Welsh"]}]))
    of = {name: functions.load(f"knowledge_qa:{name}", RECIPES) for name in DATA}
    for function in of.values():
        monkeypatch.setitem(function.__globals__, "WEB_QUESTIONS", tmp_path)
    every = list(of["web_questions"]())
    assert len(every) == 10 and every[0] == {"question": "é?", "answers": ["Welsh"]}
    common = list(of["common_web_questions"]())
    assert common == [row for row in every if row["question"] != "who was it?"]
    told = list(of["careless_web_answers"]())
    assert [row["prompt"] for row in told] == [row["question"] for row in common]
    assert {row["completion"] for row in told} <= {answer for row in common for answer in row["answers"]}
    assert any(row["completion"] not in asked["answers"] for row, asked in zip(told, common, strict=True))
    monkeypatch.setitem(of["web_questions"].__globals__, "WEB_QUESTIONS", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="says where they are from"):
        next(of["web_questions"]())
