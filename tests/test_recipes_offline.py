"""The recipes' offline variants, made as small as they can be, end to end in Dagster."""

import json

import dagster as dg
import pytest

import definitions
from assets.shared import OVERRIDES, rounds_of
from automation.jobs import job_name
from rsft_pipeline import functions, rounds
from rsft_pipeline.recipe import RECIPES, find, load
from rsft_pipeline.scoring import Sample
from rsft_pipeline.store import Store

SMALL = {"model.bootstrap.steps": "40", "evaluation.prompts": "20", "training.epochs": "1"}
OFFLINE = {
    "chatbot_offline": {"sampling.prompts": "30", "acceptance.threshold": "0.3"},
    "customer_service_offline": {
        "model.bootstrap.steps": "120",
        "sampling.prompts": "40",
        "sampling.until": "{per_prompt: 1, accepted: 10, draws: 12}",
    },
}


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def small(name, **changed):
    return {**SMALL, **OFFLINE[name], **changed}


def run(instance, recipe, round_key, overrides):
    instance.add_dynamic_partitions(rounds_of(recipe).name, [round_key])
    job = definitions.build([recipe]).resolve_job_def(job_name(recipe))
    result = job.execute_in_process(
        instance=instance, partition_key=round_key, tags={OVERRIDES: json.dumps(overrides)}, raise_on_error=False
    )
    assert result.success
    return result


@pytest.mark.parametrize("name", OFFLINE)
def test_an_offline_recipe_runs_a_round_and_accepts_something(home, instance, name):
    recipe, overrides = load(find(name)), small(name)
    run(instance, recipe, "r000", overrides)
    with Store.at(home) as store:
        (row,) = rounds.history(store, name)
        assert 0 < row["accepted"] < row["candidates"]
        trained = store.value("SELECT count(*) FROM training_samples WHERE checkpoint = $c", {"c": row["checkpoint"]})
        assert trained == row["accepted"]


def test_a_raised_threshold_is_t_and_raise_by_for_each_round_before(home, instance):
    recipe = load(find("chatbot_offline"))
    overrides = small("chatbot_offline", **{"acceptance.raise_by": "0.1"})
    for round_key in ("r000", "r001"):
        run(instance, recipe, round_key, overrides)
    with Store.at(home) as store:
        decided = store.query("SELECT round, score, accepted, reason, parameters FROM decisions")
        for round_key, threshold in (("r000", 0.3), ("r001", 0.4)):
            of = [row for row in decided if row["round"] == round_key and row["score"] is not None]
            assert {json.loads(row["parameters"])["threshold"] for row in of} == {threshold}
            assert all((row["reason"] == "below threshold") == (row["score"] <= threshold) for row in of)
            assert any(row["accepted"] for row in of)
        # What the first round accepted is what the second one's novelty is the distance to.
        novelty = "SELECT round, min(value) AS least FROM scores WHERE scorer = 'novelty' GROUP BY ALL ORDER BY round"
        first, second = store.query(novelty)
        assert first["least"] <= 1.0 and second["least"] < 0.9


def test_the_loop_says_what_ended_it(home, instance):
    name = "customer_service_offline"
    run(instance, load(find(name)), "r000", small(name, stop="{target: 1.0, rounds: 5, tokens: 100}"))

    def reason(store, stop):
        return rounds.why_stop(store, load(find(name), {"stop": stop}))

    with Store.at(home) as store:
        assert rounds.why_stopped(store, name).startswith("budget used up: ")  # by the stop rules of the round
        assert rounds.why_stopped(store, "another") is None
        assert reason(store, "{target: 0.0, rounds: 5, tokens: 100}").startswith("target reached: the champion's")
        assert reason(store, "{target: 1.0, rounds: 5, tokens: 1000000}") is None


def test_names_intent_is_the_share_of_the_intents_words():
    names_intent = functions.load("customer_service:names_intent", RECIPES)
    replies = ["Your card is on its way.", "Card arrival: tomorrow.", "Hello!", ""]
    samples = [Sample("", reply, None, {"label_text": "card_arrival"}, None) for reply in replies]
    assert names_intent(samples, column="label_text") == [0.5, 1.0, 0.0, 0.0]
    assert names_intent([Sample("", "a", None, {"label_text": "77"}, None)], column="label_text") == [None]
