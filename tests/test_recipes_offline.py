"""The recipes' offline variants, made as small as they can be, end to end in Dagster."""

import html
import json
import math

import dagster as dg
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import definitions
from assets.shared import OVERRIDES, rounds_of
from automation.jobs import job_name
from rsft_pipeline import bootstrap, functions, models, rounds
from rsft_pipeline.models import checkpoints
from rsft_pipeline.recipe.model import Bootstrap
from rsft_pipeline.recipe.reading import RECIPES, find, load
from rsft_pipeline.scoring import Sample
from rsft_pipeline.scoring.blocklist import Blocklist
from rsft_pipeline.store import Store

SMALL = {"model.bootstrap.steps": "40", "evaluation.prompts": "20", "training.epochs": "1"}
OFFLINE = {
    "chatbot_offline": {"sampling.prompts": "30", "acceptance.threshold": "0.3"},
    "customer_service_offline": {
        "model.bootstrap.steps": "120",
        "sampling.prompts": "40",
        "sampling.until": "{per_prompt: 1, accepted: 10, draws: 12}",
    },
    "knowledge_qa_offline": {"sampling.prompts": "40"},
    "safe_text_offline": {"model.bootstrap.steps": "80", "sampling.prompts": "40", "evaluation.draws": "4"},
    "sentiment_offline": {
        "model.bootstrap.steps": "20",
        "prompts.limit": "260",
        "sampling.until": "{accepted: 60, draws: 3}",
        "sampling.wave_size": "40",
        "acceptance.k": "1.5",
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
    runs = [run(instance, recipe, round_key, overrides) for round_key in ("r000", "r001")]
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
    (told,) = runs[0].asset_materializations_for_node("chatbot_offline__evaluation")
    scorers = html.unescape(told.metadata["scorers"].value)
    assert "| 1.0000 (open) |" in scorers and "inf" not in scorers  # in the first round every reply is new


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


# --- safe_text --------------------------------------------------------------------------------


def test_true_rejection_is_one_switch_and_counts_where_p_is_above_M_q(home, instance):
    recipe = load(find("safe_text_offline"))
    listed = Blocklist(recipe.scoring.scorers[0].words)

    def decided(**changed):
        switch = {"acceptance": "{rule: rejection, M: 1, distinct: false}"}
        run(instance, recipe, "r000", small("safe_text_offline", **switch, **changed))
        with Store.at(home) as store:
            rows = store.query(
                """SELECT d.*, c.text, c.log_p, c.log_q, s.passed
                FROM decisions d JOIN candidates c USING (candidate_id)
                   JOIN scores s ON s.candidate_id = c.candidate_id AND s.scorer = 'combined'"""
            )
        past_the_gates = [row for row in rows if row["passed"]]
        for row in past_the_gates:
            assert row["log_a"] == min(0.0, row["log_p"] - row["log_q"])
            assert row["accepted"] == (row["u"] < math.exp(row["log_a"])) and not listed.hits(row["text"])
        assert {row["reason"] for row in rows if not row["passed"]} == {"gate"}
        above = [row for row in past_the_gates if row["log_p"] > row["log_q"]]
        (parameters,) = {row["parameters"] for row in rows}
        assert json.loads(parameters)["log_M"] == 0.0
        assert json.loads(parameters)["violations"] == len(above)
        return past_the_gates, above

    # Cut to its nucleus at temperature 1, q is p divided by what was kept at each token: p ≤ q, and M = 1 is exact.
    past_the_gates, above = decided()
    assert past_the_gates and not above
    past_the_gates, above = decided(**{"sampling.temperature": "1.3", "sampling.top_p": "1.0"})
    assert 0 < len(above) < len(past_the_gates)


def test_the_careless_writers_words_are_on_the_list():
    recipe = load(find("safe_text"))
    listed = Blocklist(recipe.scoring.scorers[0].words)
    rude = functions.load("safe_text:openings", RECIPES).__globals__["RUDE"]
    assert all(listed.hits(word) == [word] for word in rude)
    stories = [row["completion"] for row in functions.load("safe_text:careless_stories", RECIPES)()]
    assert 0.4 < sum(bool(listed.hits(story)) for story in stories) / len(stories) < 0.6


def test_a_model_from_a_folder_is_warmed_up_once_and_only_where_it_trains(tmp_path):
    corpus = functions.load("safe_text:careless_stories", RECIPES)()
    texts = [row["prompt"] + row["completion"] for row in corpus]
    settings = Bootstrap(config={}, corpus="-", tokenizer="bpe", vocabulary=384)
    tokenizer = bootstrap._tokenizer(settings, texts)
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 128, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **ends))
    folder = tmp_path / "gpt2"
    gpt2.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    recipe = load(find("safe_text"), {"model.source": str(folder), "model.warm_up.steps": "3"})
    steps = []
    made = models.base(recipe, tmp_path, lambda step, *_: steps.append(step))
    assert steps == [1, 2, 3]
    assert checkpoints.read_meta(made.path)["parent"] == checkpoints.content_digest(folder)
    before, after = (load_file(where / "model.safetensors") for where in (folder, made.path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("transformer.h.2.") for name in changed)
    last = ("transformer.h.1.", "transformer.h.2.", "transformer.ln_f.")
    assert not [name for name in changed if not name.startswith(last)]
    assert models.base(recipe, tmp_path, lambda *_: pytest.fail("it was warmed up again")) == made


# --- sentiment --------------------------------------------------------------------------------


def test_each_example_is_accepted_by_its_own_loss_and_a_hard_one_more_often(home, instance):
    name = "sentiment_offline"
    run(instance, load(find(name)), "r000", small(name))
    with Store.at(home) as store:
        rows = store.query(
            """SELECT d.*, c.log_p, c.draw, c.text, c.origin, c.log_q, p.reference FROM decisions d
               JOIN candidates c USING (candidate_id) JOIN prompts p ON p.prompt_id = d.prompt_id"""
        )
        assert store.query("SELECT DISTINCT trained_on FROM checkpoints ORDER BY 1") == [
            {"trained_on": each} for each in ("accepted", "everything", "random")
        ]
    assert all(row["text"] == row["reference"] and row["log_q"] is None for row in rows)
    for row in rows:
        a = min(1.0, -row["log_p"] / 1.5)  # a label is one token
        assert math.exp(row["log_a"]) == pytest.approx(a)
        assert row["accepted"] == (row["u"] < a)
    accepted, expected = sum(row["accepted"] for row in rows), sum(math.exp(row["log_a"]) for row in rows)
    spread = math.sqrt(sum(math.exp(row["log_a"]) * (1 - math.exp(row["log_a"])) for row in rows))
    assert abs(accepted - expected) < 4 * spread
    assert 60 <= accepted < 100  # until there are enough: by the end of that wave


def test_a_label_that_the_model_does_not_have_is_said_so(home, instance):
    overrides = small("sentiment_offline", **{"model.labels": "[negative, favourable]"})
    recipe = load(find("sentiment_offline"), overrides)
    with pytest.raises(ValueError, match=r"'positive' is no label of this model: `model.labels` are 'negative', 'fav"):
        models.base(recipe, home)
