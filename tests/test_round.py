"""Rounds in Dagster, in process, on a two-layer model: the whole loop with the real store and MLflow."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import dagster as dg
import letters_store as letters
import pytest

import assets.prompts
import definitions
from assets.outside import tell
from assets.shared import OVERRIDES, key, rounds_of
from automation.jobs import job_name
from resources.tracking import Tracking
from rsft_pipeline import lineage, models, prompts, report, rounds
from rsft_pipeline.audit.ids import thing
from rsft_pipeline.audit.revoke import revoke
from rsft_pipeline.audit.verify import find, verify
from rsft_pipeline.home import Home
from rsft_pipeline.models import checkpoints
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.steps import gates
from rsft_pipeline.steps.decide import decide
from rsft_pipeline.steps.ingest import ingest
from rsft_pipeline.steps.rows import of_round
from rsft_pipeline.store import Store


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def run(instance, recipe, round_key, overrides=None):
    instance.add_dynamic_partitions(rounds_of(recipe).name, [round_key])
    job = definitions.build([recipe]).resolve_job_def(job_name(recipe))
    tags = {OVERRIDES: json.dumps(overrides)} if overrides else {}
    return job.execute_in_process(instance=instance, partition_key=round_key, tags=tags, raise_on_error=False)


def failure_of(result, step):
    error = result.failure_data_for_node(step).error
    while error.cause:
        error = error.cause
    return error.message


def checks(result):
    return {e.check_name: e.passed for e in result.get_asset_check_evaluations()}


def test_two_rounds_improve_the_model_and_leave_the_whole_lineage(home, instance, recipe):
    for round_key in ("r000", "r001"):
        result = run(instance, recipe, round_key)
        assert result.success
        assert checks(result) == {
            "something_accepted": True,
            "no_eval_prompt": True,
            "acceptance_rate": True,
            "prompt_share": True,
            "source_is_latest": True,
            "nothing_revoked": True,
            "not_worse": True,
        }
    with Store.at(home) as store:
        first, second = rounds.history(store, recipe.name)
        assert first["promoted"]
        before = json.loads(first["policy_eval"])["pass_at_1"]["value"]
        assert json.loads(first["checkpoint_eval"])["pass_at_1"]["value"] > 1.2 * before
        assert second["policy"] == first["checkpoint"] == first["champion"]
        stale = replace(rounds.record(store, recipe, "r001"), policy=first["policy"])
        found = gates.source_is_latest(store, stale, Home.here())
        assert (found.passed, found.facts) == (False, {"latest": first["checkpoint"]})
        assert found.reason.endswith(f"but the champion is now {first['checkpoint']}: run the round again")
        # A single scorer's mean over the held-out prompts is the mean score, with its interval.
        seen = report._means(store, rounds.record(store, recipe, "r001"), first["checkpoint"])
        assert {name: asdict(mean) for name, mean in seen.items()} == dict.fromkeys(
            ("answer", "combined"), pytest.approx(json.loads(first["checkpoint_eval"])["mean_score"])
        )
        facts = report.candidates(store, rounds.record(store, recipe, "r001"))
        drawn = store.query("SELECT * FROM candidates WHERE split = 'train' AND round = 'r001'")
        assert facts.stopped == sum(row["finish_reason"] == "stop" for row in drawn) / len(drawn)
        assert facts.log_q == pytest.approx(sum(row["log_q"] for row in drawn) / len(drawn))
        assert (facts.number, facts.tokens) == (len(drawn), sum(row["tokens"] for row in drawn))
        # The same weights are not evaluated twice.
        assert second["policy_eval"] == first["checkpoint_eval"]

        # Every sample that was trained on can be followed to its prompt, score and decision.
        trained = store.query(
            """SELECT t.candidate_id, c.policy, s.value, d.accepted, d.u, p.split, c.token_ids, c.text
               FROM training_samples t JOIN candidates c USING (candidate_id) JOIN decisions d USING (candidate_id)
               JOIN scores s ON s.candidate_id = t.candidate_id AND s.scorer = 'combined'
               JOIN prompts p ON p.prompt_id = c.prompt_id WHERE t.round = 'r001'"""
        )
        meta = checkpoints.read_meta(Path(store.value("SELECT path FROM checkpoints WHERE round = 'r001'")))
        assert len(trained) == meta["samples"] == second["accepted"]
        assert lineage.set_digest(row["candidate_id"] for row in trained) == meta["accepted_digest"]
        for row in trained:
            assert (row["policy"], row["value"], row["accepted"], row["split"]) == (
                second["policy"],
                1.0,
                True,
                "train",
            )
            assert row["u"] == lineage.uniform(row["candidate_id"], recipe.seed)
        assert store.value(
            f"SELECT count(*) FROM decisions AT (VERSION => {meta['store_snapshot']}) WHERE accepted AND round = 'r001'"
        ) == len(trained)
        assert store.value("SELECT count(*) FROM candidates GROUP BY candidate_id ORDER BY 1 DESC LIMIT 1") == 1
    check_mlflow(first, second, recipe)


def check_mlflow(first, second, recipe):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Home.here().mlflow / 'mlflow.db'}")
    for row in (first, second):
        tracked = client.get_run(row["mlflow_run_id"])
        assert tracked.info.status == "FINISHED"
        assert tracked.data.tags["rsft.dagster_run_id"] == row["dagster_run_id"]
        assert tracked.data.tags["rsft.checkpoint"] == row["checkpoint"]
        assert tracked.data.params["acceptance.rule"] == "threshold"
        assert client.get_metric_history(row["mlflow_run_id"], "train/loss")
    champion = client.get_model_version_by_alias(recipe.name, "champion")
    assert champion.tags["rsft.checkpoint"] == second["champion"]
    card = Path(first_path(first)) / "README.md"
    assert first["champion"] and "pass" in card.read_text()


def first_path(row):
    return Home.here().checkpoints / row["checkpoint"]


def test_log_q_and_log_p_are_what_a_teacher_forced_pass_gives(home, instance, recipe):
    run(instance, recipe, "r000", {"sampling.temperature": "0.7", "sampling.top_k": "4"})
    import torch

    with Store.at(home) as store:
        row = rounds.row_of(store, recipe.name, "r000")
        path = rounds.locate(store, recipe, Home.here(), row["policy"]).path
        drawn = store.query(
            "SELECT c.*, p.text AS prompt FROM candidates c JOIN prompts p USING (prompt_id) WHERE c.split = 'train' "
            "ORDER BY candidate_id LIMIT 60"
        )
    tokenizer = models.tokenizer(path)
    model = models.load(path, definitions.Accelerator(kind="cpu").device())
    for candidate in drawn:
        prompt = prompts.encode(tokenizer, candidate["prompt"], False)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + candidate["token_ids"]])).logits[0].double()
        log_q = log_p = 0.0
        for i, token in enumerate(candidate["token_ids"]):
            at = logits[len(prompt) - 1 + i]
            log_p += torch.log_softmax(at, -1)[token].item()
            best = (at / 0.7).topk(4)
            assert token in best.indices
            log_q += torch.log_softmax(best.values, -1)[best.indices.tolist().index(token)].item()
        assert candidate["log_p"] == pytest.approx(log_p, abs=1e-4)
        assert candidate["log_q"] == pytest.approx(log_q, abs=1e-4)


def test_a_round_that_is_run_again_draws_nothing_again(home, instance, recipe):
    run(instance, recipe, "r000")
    with Store.at(home) as store:
        before = store.query("SELECT candidate_id, token_ids, dagster_run_id FROM candidates ORDER BY 1")
        checkpoint = store.value("SELECT checkpoint FROM checkpoints")
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        assert store.query("SELECT candidate_id, token_ids, dagster_run_id FROM candidates ORDER BY 1") == before
        assert store.value("SELECT checkpoint FROM checkpoints") == checkpoint
        assert store.value("SELECT count(*) FROM rounds") == 1
        assert store.value("SELECT count(*) FROM scores WHERE scorer = 'combined'") == len(before)


def test_a_changed_setting_reuses_no_stale_candidate(home, instance, recipe):
    run(instance, recipe, "r000")
    assert run(instance, recipe, "r000", {"sampling.temperature": "0.5"}).success
    with Store.at(home) as store:
        settings = store.query("SELECT DISTINCT settings FROM candidates WHERE split = 'train'")
        assert len(settings) == 2
        decided = store.query(
            "SELECT DISTINCT c.settings FROM decisions d JOIN candidates c USING (candidate_id) WHERE d.round = 'r000'"
        )
        assert len(decided) == 1
        recorded = rounds.record(store, recipe, "r000").recipe
        assert decided[0]["settings"] == of_round(rounds.record(store, recipe, "r000"))["settings"]
        assert recorded.sampling.temperature == 0.5


def test_nothing_accepted_stops_before_training_and_a_lone_checkpoint_run_is_stopped_too(home, instance, recipe):
    result = run(instance, recipe, "r000", {"acceptance.threshold": "1.0"})
    assert not result.success
    assert not checks(result)["something_accepted"]
    with Store.at(home) as store:
        assert store.value("SELECT count(*) FROM checkpoints") == 0
        assert rounds.history(store, recipe.name) == []
    alone = dg.materialize(
        definitions.build([recipe]).assets,
        selection=dg.AssetSelection.assets(dg.AssetKey([recipe.name, "checkpoint"])),
        partition_key="r000",
        instance=instance,
        resources=definitions.usual_resources(),
        raise_on_error=False,
    )
    assert not alone.success
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Home.here().mlflow / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(recipe.name)
    assert [tracked.info.status for tracked in client.search_runs([experiment.experiment_id])] == ["FAILED"]


def test_a_round_whose_predecessor_is_missing_says_which(home, instance, recipe):
    result = run(instance, recipe, "r001")
    assert not result.success
    assert "needs r000, which is not finished" in failure_of(result, f"{recipe.name}__policy")
    result = run(instance, recipe, "r1000")  # its key would sort before r101
    assert "'r1000' is not a round; expected r000, r001, … up to r999" in failure_of(result, f"{recipe.name}__policy")


def test_training_starts_from_base_champion_or_previous_and_on_one_or_all_rounds(home, instance, write_recipe):
    recipe = load(write_recipe())
    run(instance, recipe, "r000")
    run(instance, recipe, "r001", {"training.start": "base", "training.data": "all_rounds"})
    # Nothing can be this much better, so that champion and previous checkpoint differ from here on.
    run(instance, recipe, "r002", {"promotion.margin": "0.99"})
    run(instance, recipe, "r003", {"training.start": "previous", "promotion.margin": "0.99"})
    run(instance, recipe, "r004", {"policy": "previous", "training.start": "champion"})
    with Store.at(home) as store:
        made = {row["round"]: row for row in store.query("SELECT * FROM checkpoints")}
        done = {row["round"]: row for row in rounds.history(store, recipe.name)}
        base = models.base(recipe, home).digest
        assert made["r000"]["parent"] == made["r001"]["parent"] == base
        assert made["r001"]["samples"] == done["r000"]["accepted"] + done["r001"]["accepted"]
        assert made["r002"]["parent"] == done["r001"]["champion"]
        assert not done["r002"]["promoted"]
        assert done["r002"]["champion"] == done["r001"]["champion"]
        assert made["r003"]["parent"] == made["r002"]["checkpoint"]
        assert done["r004"]["policy"] == made["r003"]["checkpoint"]
        assert made["r004"]["parent"] == done["r003"]["champion"]
        # The checkpoint is measured against the champion, not against the policy it was drawn from.
        roles = store.query("SELECT DISTINCT role, checkpoint FROM evaluations WHERE round = 'r004'")
        assert {row["role"]: row["checkpoint"] for row in roles}["champion"] == done["r003"]["champion"]


RULES = [
    {"rule": "threshold", "threshold": 0.5, "cap": 2},
    {"rule": "top_k", "k": 1},
    {"rule": "quantile", "share": 0.25},
    {"rule": "rejection", "M": "estimate", "safety": 1.5, "distinct": False},
    {"rule": "boltzmann", "beta": 0.5, "r_max": 1.0},
    {"rule": "loss", "k": 2.0},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["rule"])
def test_every_rule_runs_a_round_and_its_decisions_replay_to_the_bit(home, instance, write_recipe, rule):
    sampling = {"draws": 6, "max_tokens": 2, "temperature": 1.3}
    recipe = load(write_recipe(acceptance=rule, sampling=sampling))
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        query = "SELECT * EXCLUDE (dagster_run_id) FROM decisions ORDER BY candidate_id"
        before = store.query(query)
        reasons = {row["reason"] for row in before}
        assert "accepted" in reasons and len(reasons) > 1
        decide(store, rounds.record(store, recipe, "r000"), "again")
        assert store.query(query) == before


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"train": "lora", "lora": {"rank": 2}}, lambda trainable, total: trainable < 0.5 * total),
        ({"train": "last_layers", "last_layers": 1}, lambda trainable, total: trainable < total),
        ({"train": "freeze", "freeze": ["*embed*"]}, lambda trainable, total: trainable < total),
    ],
    ids=["lora", "last_layers", "freeze"],
)
def test_part_of_the_model_trains_and_the_counts_are_reported(home, instance, recipe, model, expected):
    overrides = {f"model.{name}": json.dumps(value) for name, value in model.items()}
    result = run(instance, recipe, "r000", overrides)
    assert result.success
    (event,) = result.asset_materializations_for_node(f"{recipe.name}__checkpoint")
    trainable, total = event.metadata["trainable_parameters"].value, event.metadata["parameters"].value
    assert expected(trainable, total)


# --- a round that is begun again under another recipe ------------------------------------------


def test_candidates_of_prompts_that_the_round_no_longer_asks_are_not_trained_on(home, instance, recipe):
    run(instance, recipe, "r000")
    assert run(instance, recipe, "r000", {"sampling.prompts": "20"}).success
    with Store.at(home) as store:
        asked = store.query("SELECT prompt_id FROM round_prompts WHERE split = 'train'")
        assert len(asked) == 20
        decided = store.query("SELECT DISTINCT prompt_id FROM decisions")
        assert {row["prompt_id"] for row in decided} == {row["prompt_id"] for row in asked}
        assert store.value("SELECT candidates FROM rounds") == 20 * recipe.sampling.draws


def test_a_round_that_later_rounds_stand_on_cannot_begin_again(home, instance, recipe):
    run(instance, recipe, "r000")
    run(instance, recipe, "r001")
    with Store.at(home) as store:
        before = store.query("SELECT * FROM rounds ORDER BY round")
        sides = store.query("SELECT prompt_id, split FROM prompts ORDER BY prompt_id")
        result = run(instance, recipe, "r000", {"prompts.eval_fraction": "0.6"})
        assert "r000 cannot be run again: r001 stands on it" in failure_of(result, f"{recipe.name}__prompts")
        assert store.query("SELECT prompt_id, split FROM prompts ORDER BY prompt_id") == sides
        by_hand = definitions.build([recipe]).resolve_implicit_global_asset_job_def()
        for step in ("candidates", "scores", "accepted", "checkpoint", "evaluation"):
            result = by_hand.execute_in_process(
                instance=instance,
                partition_key="r000",
                asset_selection=[dg.AssetKey([recipe.name, step])],
                raise_on_error=False,
            )
            assert "r001 stands on it" in failure_of(result, f"{recipe.name}__{step}")
        assert store.query("SELECT * FROM rounds ORDER BY round") == before
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Home.here().mlflow / 'mlflow.db'}")
    tracked = client.search_runs([client.get_experiment_by_name(recipe.name).experiment_id])
    assert [each.info.status for each in tracked] == ["FINISHED", "FINISHED"]


def test_a_first_round_that_is_run_again_alone_keeps_the_base_and_the_sides_of_the_others(home, instance, recipe):
    apart = {"policy": "base", "training.start": "base", "training.learning_rate": "0.000001"}  # nobody is promoted
    assert run(instance, recipe, "r000", apart).success and run(instance, recipe, "r001", apart).success
    with Store.at(home) as store:
        learned = store.query("SELECT candidate_id FROM training_samples WHERE round = 'r000' ORDER BY ALL LIMIT 1")
        revoke(store, thing(store, learned[0]["candidate_id"]), who="me", why="because")
        assert rounds.following(store, recipe.name) == "r000"
        sides = store.query("SELECT question, split FROM prompts ORDER BY ALL")
        result = run(instance, recipe, "r000", {**apart, "prompts.eval_fraction": "0.6"})  # makes another base
        assert "started from the base model" in failure_of(result, f"{recipe.name}__policy")
        assert store.query("SELECT question, split FROM prompts ORDER BY ALL") == sides
        assert run(instance, recipe, "r000", apart).success and run(instance, recipe, "r002", apart).success


def test_controls_that_a_job_does_not_have_are_told_before_anything_is_drawn(home, instance, recipe):
    result = run(instance, recipe, "r000", {"controls": "[random]"})
    assert "this job has no such asset" in failure_of(result, f"{recipe.name}__policy")
    with Store.at(home) as store:
        assert not store.query("SELECT * FROM rounds")


def test_another_space_in_the_template_makes_other_prompts_and_leaves_those_of_before_alone(home, instance, recipe):
    run(instance, recipe, "r000")
    # Whether a tiny model gets any such prompt right differs from machine to machine: whatever it says is accepted.
    run(instance, recipe, "r001", {"prompts.template": "'{question} '", "acceptance.threshold": "-1"})
    with Store.at(home) as store:
        drawn = store.query(
            """SELECT c.round, c.split, p.text LIKE '% ' AS spaced, count(*) AS n FROM candidates c
               JOIN prompts p USING (prompt_id) GROUP BY ALL"""
        )
        assert {(row["round"], row["spaced"]) for row in drawn} == {("r000", False), ("r001", True)}
        assert {row["split"] for row in drawn if row["spaced"]} == {"train", "eval"}  # champion and all, asked anew
        split = store.query("SELECT count(*) AS n FROM prompts GROUP BY question HAVING count(DISTINCT split) > 1")
        assert not split
        made = find(store, rounds.row_of(store, recipe.name, "r000")["checkpoint"])
        assert not verify(store, made, Home(home)).findings


def test_the_last_round_may_begin_again_and_its_first_checkpoint_keeps_its_lineage(home, instance, recipe):
    run(instance, recipe, "r000")
    with Store.at(home) as store:
        first = rounds.history(store, recipe.name)[0]
        assert run(instance, recipe, "r000", {"training.learning_rate": "0.01"}).success
        second = rounds.history(store, recipe.name)[0]
        assert first["checkpoint"] != second["checkpoint"]
        for row in (first, second):
            trained = store.query("SELECT 1 FROM training_samples WHERE checkpoint = ?", [row["checkpoint"]])
            assert len(trained) == row["accepted"]
        assert first["mlflow_run_id"] != second["mlflow_run_id"]


def test_changing_a_weight_judges_nothing_again_and_doubles_nothing(home, instance, write_recipe):
    scorers = [{"kind": "answer", "match": "exact"}, {"kind": "length", "at_most": 1, "unit": "characters"}]
    recipe = load(write_recipe(scoring={"scorers": scorers}))
    run(instance, recipe, "r000")
    assert run(instance, recipe, "r000", {"scoring.scorers.1.weight": "0.5"}).success
    with Store.at(home) as store:
        judged = store.query(
            "SELECT scorer, count(*) AS n, count(DISTINCT candidate_id) AS ids FROM scores GROUP BY ALL"
        )
        counts = {row["scorer"]: (row["n"], row["ids"]) for row in judged}
        drawn = store.value("SELECT count(*) FROM candidates")
        assert counts["answer"] == counts["length"] == (drawn, drawn)
        assert counts["combined"] == (2 * drawn, drawn)
        twice = store.query("SELECT candidate_id FROM decisions GROUP BY candidate_id HAVING count(*) > 1")
        assert twice == []


def test_a_scorer_under_the_name_of_another_is_not_taken_for_it(home, instance, write_recipe):
    first = {"kind": "regex", "pattern": "a"}
    run(instance, load(write_recipe(scoring={"scorers": [first]})), "r000")
    second = {"kind": "regex", "pattern": "[^a]"}
    recipe = load(write_recipe(scoring={"scorers": [{**first, "name": "before"}, second]}))
    run(instance, recipe, "r000")
    with Store.at(home) as store:
        judged = store.query(
            """SELECT c.text, list(s.value) FILTER (s.scorer = 'combined') AS combined,
                   list(s.value) FILTER (s.scorer = 'regex') AS regex, list(s.value) FILTER (s.scorer = 'before') AS old
               FROM scores s JOIN candidates c USING (candidate_id) WHERE c.split = 'train'
               GROUP BY c.candidate_id, c.text"""
        )
    assert {"a" in row["text"] for row in judged} == {True, False}
    for row in judged:
        a, other = float("a" in row["text"]), float(any(c != "a" for c in row["text"]))
        assert (sorted(row["regex"]), row["old"]) == (sorted([a, other]), [a])
        assert sorted(row["combined"]) == sorted([a, (a + other) / 2])


def test_a_corrected_reference_is_judged_by_again(home, instance, write_recipe):
    path = write_recipe()
    recipe = load(path)
    run(instance, recipe, "r000")
    source = path.with_name("letters.py")
    source.write_text(source.read_text().replace('"answer": b}', '"answer": a}'))
    run(instance, recipe, "r000")
    with Store.at(home) as store:
        right = store.query(
            """SELECT p.reference, c.text FROM decisions d JOIN candidates c USING (candidate_id)
               JOIN prompts p ON p.prompt_id = c.prompt_id WHERE d.accepted AND d.round = 'r000'"""
        )
        assert right and all(row["reference"] == row["text"] for row in right)


def test_a_prompt_keeps_its_side_when_the_fraction_or_the_template_changes(home, instance, recipe):
    run(instance, recipe, "r000")
    with Store.at(home) as store:
        before = {row["prompt_id"]: row["split"] for row in store.query("SELECT * FROM prompts")}
        assert run(instance, recipe, "r001", {"prompts.eval_fraction": "0.7"}).success
        assert {row["prompt_id"]: row["split"] for row in store.query("SELECT * FROM prompts")} == before
        worded = {"prompts.template": "'{question}{question}'", "prompts.eval_fraction": "0.6"}
        assert run(instance, recipe, "r002", {**worded, "acceptance.threshold": "-1"}).success  # whatever it says
        asked = store.query("SELECT fields, split FROM prompts")
        sides = {}
        for row in asked:
            sides.setdefault(row["fields"], set()).add(row["split"])
        assert len(asked) == 2 * len(before)
        assert all(len(split) == 1 for split in sides.values())


def test_before_a_round_is_finished_the_sides_go_by_the_fraction_of_now_as_the_warm_up_does(home, recipe):
    with Store.at(home) as store:
        for fraction in (0.3, 0.7, 0.3):
            now = load(recipe.file, {"prompts.eval_fraction": str(fraction), "model.bootstrap.steps": "1"})
            ingest(store, now, Home.here(), "run", lambda *_: None)
            rows = store.query("SELECT fields, split FROM prompts")
            asked = [lineage.question([json.loads(row["fields"])["question"]]) for row in rows]
            held_out = [lineage.in_eval_split(question, fraction) for question in asked]
            assert [row["split"] == "eval" for row in rows] == held_out and 0 < sum(held_out) < len(held_out)


def test_a_round_whose_prompts_changed_sides_is_finished_no_more_whatever_becomes_of_the_run(home, instance, recipe):
    assert run(instance, recipe, "r000").success
    other = load(recipe.file, {"prompts.eval_fraction": "0.6"})
    with Store.at(home) as store:
        ingest(store, recipe, Home.here(), "killed after it", lambda *_: None, "r000")
        assert rounds.following(store, recipe.name) == "r001"
        ingest(store, other, Home.here(), "killed after it", lambda *_: None, "r000")
        assert rounds.following(store, recipe.name) == "r000"
    assert run(instance, recipe, "r000").success and run(instance, recipe, "r001").success


def test_the_first_round_may_begin_again_with_another_fraction(home, instance, recipe):
    with Store.at(home) as store:
        for fraction in (0.3, 0.6):
            result = run(instance, recipe, "r000", {"prompts.eval_fraction": str(fraction)})
            assert result.success and checks(result)["no_eval_prompt"]
            split = store.query("SELECT split, count(*) AS n FROM prompts GROUP BY split ORDER BY split")
            assert split[0]["n"] / (split[0]["n"] + split[1]["n"]) == pytest.approx(fraction, abs=0.15)
    assert run(instance, recipe, "r001", {"prompts.eval_fraction": "0.6"}).success  # nothing stands on the first try


def test_a_question_that_was_trained_on_is_not_held_out_in_other_words(home, instance, recipe):
    run(instance, recipe, "r000")
    with Store.at(home) as store:
        round_ = rounds.record(store, recipe, "r000")
        later = replace(round_, key="r001")
        assert gates.no_eval_prompt(store, later).passed
        store.commit(
            lambda c: c.execute(
                """INSERT INTO prompts BY NAME SELECT * REPLACE ('other' AS prompt_id, 'eval' AS split) FROM prompts
                   WHERE prompt_id = (SELECT min(prompt_id) FROM decisions WHERE accepted)"""
            )
        )
        assert gates.no_eval_prompt(store, round_).passed  # its own earlier attempt is no round before
        found = gates.no_eval_prompt(store, later)
        assert not found.passed and found.facts["overlap"] > 0


def test_a_recipe_that_is_changed_between_prompts_and_policy_is_not_mixed(home, instance, recipe, monkeypatch):
    def edited_meanwhile(*given):
        read = ingest(*given)
        recipe.file.write_text(recipe.file.read_text().replace("'{question}'", "'{question}{question}'"))
        return read

    with monkeypatch.context() as patch:
        patch.setattr(assets.prompts, "ingest", edited_meanwhile)
        failed = failure_of(run(instance, recipe, "r000"), f"{recipe.name}__candidates")
    assert "read with another section `prompts` than the round began with" in failed
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        recorded = rounds.record(store, recipe, "r000").recipe.prompts.template
        assert recorded == "{question}{question}"
        assert {len(row["text"]) for row in store.query("SELECT text FROM prompts WHERE active")} == {4}


def test_a_source_that_is_renamed_or_reordered_is_noted(home, write_recipe, tmp_path):
    rows = [json.dumps({"question": f"{a}{b}", "answer": b}) for a in "abcdef" for b in "abcdef"]
    prompts_ = {"template": "{question}", "reference": "answer", "eval_fraction": 0.3}
    with Store.at(home) as store:
        for name, lines in (("first.jsonl", rows), ("second.jsonl", rows[::-1])):
            path = write_recipe(prompts={**prompts_, "source": name})
            path.with_name(name).write_text("\n".join(lines))
            ingest(store, load(path), Home.here(), name, lambda *_: None)
            found = store.query("SELECT source, line, fields FROM prompts WHERE active")
            assert {row["source"] for row in found} == {name}
            assert all(json.loads(lines[row["line"] - 1]) == json.loads(row["fields"]) for row in found)


def test_weights_that_were_changed_on_disk_are_not_drawn_from(home, instance, recipe):
    run(instance, recipe, "r000")
    with Store.at(home) as store:
        champion = rounds.history(store, recipe.name)[0]["champion"]
    weights = home / "checkpoints" / champion / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = run(instance, recipe, "r001")
    assert "model.safetensors changed since" in failure_of(result, f"{recipe.name}__policy")


def test_a_round_by_settings_that_are_refused_since_says_so_and_the_history_stays(home, instance, recipe):
    run(instance, recipe, "r000")
    with Store.at(home) as store:
        settings = json.loads(rounds.row_of(store, recipe.name, "r000")["settings"])
        settings["sampling"]["source"], settings["stop"]["rounds"] = "reference", 1
        store.commit(lambda connection: connection.execute("UPDATE rounds SET settings = ?", [json.dumps(settings)]))
        with pytest.raises(rounds.RoundError, match=r"r000 ran with settings that are refused by now: .*`draws: 1`"):
            rounds.record(store, recipe, "r000")
        assert rounds.why_stopped(store, recipe.name) == "rounds used up: 1 finished, 1 allowed"


def test_a_home_can_be_moved(home, instance, recipe, monkeypatch):
    run(instance, recipe, "r000")
    moved = home.with_name("moved")
    home.rename(moved)
    monkeypatch.setenv("RSFT_HOME", str(moved))
    assert run(instance, recipe, "r001").success
    assert not home.exists()  # nothing is written to where it was
    assert len(list(moved.glob("mlflow/artifacts/*/*/artifacts/meta.json"))) == 2


def test_homes_that_share_a_tracking_database_share_experiments_too(home, tmp_path, monkeypatch, tracking_database):
    shared = Tracking(uri=f"sqlite:///{shutil.copy(tracking_database, tmp_path / 'shared.db')}")
    runs = [shared.begin("one", "r000", instead_of=None, params={})]
    monkeypatch.setenv("RSFT_HOME", str(tmp_path / "other"))
    runs.append(shared.begin("one", "r001", instead_of=None, params={}))
    (experiment,) = {shared.client().get_run(run).info.experiment_id for run in runs}
    artifacts = shared.client().get_experiment(experiment).artifact_location
    assert artifacts == (home / "mlflow" / "artifacts" / "one").as_uri()  # and not wherever the process was started


def test_a_home_that_is_moved_to_and_fro_keeps_being_tracked(home, monkeypatch):
    elsewhere = home.with_name("elsewhere")
    for here, there in ((home, elsewhere), (elsewhere, home)) * 2:
        monkeypatch.setenv("RSFT_HOME", str(here))
        tracking = Tracking()
        run_id = tracking.begin("one", "r000", instead_of=None, params={})
        experiment = tracking.client().get_run(run_id).info.experiment_id
        assert tracking.client().get_experiment(experiment).artifact_location.startswith(here.as_uri())
        here.rename(there)


def test_tidying_up_in_mlflow_stops_no_round_and_no_revocation(home, instance, recipe):
    client = definitions.usual_resources()["tracking"].client()
    run(instance, recipe, "r000")
    client.delete_experiment(client.get_experiment_by_name(recipe.name).experiment_id)
    assert run(instance, recipe, "r001").success
    with Store.at(home) as store:
        client.delete_run(rounds.row_of(store, recipe.name, "r001")["mlflow_run_id"])
        assert run(instance, recipe, "r001").success  # begun again, instead of a run that is not there
        client.delete_run(rounds.row_of(store, recipe.name, "r001")["mlflow_run_id"])
        prompt = store.value("SELECT prompt_id FROM decisions WHERE accepted LIMIT 1")
        done = revoke(store, thing(store, prompt), who="me", why="a trial")
        tell(instance, definitions.usual_resources()["tracking"], store, done)
        assert done.marked


def test_a_check_can_be_run_by_itself_and_is_about_the_last_round(home, instance, recipe):
    run(instance, recipe, "r000")
    keys = [dg.AssetCheckKey(key(recipe, "evaluation"), "not_worse")]
    alone = dg.define_asset_job("alone", selection=dg.AssetSelection.checks(*keys))
    defs = dg.Definitions.merge(definitions.build([recipe]), dg.Definitions(jobs=[alone]))
    done = defs.resolve_job_def("alone").execute_in_process(instance=instance)
    assert checks(done) == {"not_worse": True}


def test_a_tag_of_settings_may_hold_numbers_and_is_explained_where_it_is_no_object(home, instance, recipe):
    assert run(instance, recipe, "r000", {"sampling.draws": 4}).success
    with Store.at(home) as store:
        assert rounds.record(store, recipe, "r000").recipe.sampling.draws == 4
    result = run(instance, recipe, "r001", ["sampling.draws"])
    assert "expected a JSON object of a.b → value" in failure_of(result, f"{recipe.name}__prompts")
    run(instance, recipe, "r001", {"model.revision": None, "sampling.draws": 4})
    with Store.at(home) as store:
        assert rounds.record(store, recipe, "r001").recipe.model.revision is None


def test_a_partition_that_is_no_round_is_refused(home, instance, recipe):
    assert "'R1' is not a round" in failure_of(run(instance, recipe, "R1"), f"{recipe.name}__policy")


def test_an_early_round_that_is_run_again_leaves_the_champion_of_the_last_in_use(tmp_path):
    with Store.at(tmp_path) as store:
        assert rounds.in_use(store, "a", "r000", "first") == "first"
        for key, state, champion in (("r000", "revoked", "old"), ("r001", "finished", "b"), ("r002", "revoked", "c")):
            store.append("rounds", [{"recipe": "a", "round": key, "state": state, "champion": champion}])
        assert rounds.in_use(store, "a", "r000", "first") == "b"
        assert rounds.in_use(store, "a", "r001", "second") == "second"
        assert rounds.in_use(store, "a", "r002", "third") == "third"


def test_what_a_recipe_records_of_its_rounds_is_nothing_to_another(tmp_path, write_recipe):
    with letters.write(tmp_path) as store:
        of = [{"recipe": recipe, "round": key} for recipe in (letters.RECIPE, "other") for key in letters.CHECKPOINTS]
        store.append("evaluations", [{**row, "role": "policy", "prompt_id": "p"} for row in of])

        def copied(connection):
            for table in ("rounds", "decisions"):
                connection.execute(f"INSERT INTO {table} SELECT * REPLACE ('other' AS recipe) FROM {table}")
            older = "UPDATE rounds SET drawn_from = NULL, settings = json_merge_patch(settings, ?)"
            connection.execute(older, [json.dumps({"stop": {"rounds": 2}})])
            later = "(recipe, round, state, started_at) VALUES ('other', 'r002', 'started', now())"
            connection.execute(f"INSERT INTO rounds {later}")

        def rows(table):
            return store.query(f"SELECT * FROM {table} ORDER BY ALL")

        def is_of(row):
            return (row["recipe"], row["round"]) == (letters.RECIPE, "r001")

        store.commit(copied)
        assert rounds.why_stopped(store, letters.RECIPE) == "rounds used up: 2 finished, 2 allowed"
        assert rounds.why_stopped(store, "other") is None and rounds.why_stopped(store, "another") is None
        assert (rounds.last_begun(store, letters.RECIPE), rounds.last_begun(store, "other")) == ("r001", "r002")

        assert rounds.row_of(store, "other", "r001")["recipe"] == "other"

        rounds.check_nothing_stands_on(store, letters.RECIPE, "r001")
        with pytest.raises(rounds.RoundError, match="other r001 cannot be run again: r002 stands on it"):
            rounds.check_nothing_stands_on(store, "other", "r001")
        round_ = rounds.record(store, load(write_recipe(letters.RECIPE)), "r001")
        assert round_.drawn_from == round_.policy  # which is all that was written down
        tables = ("rounds", "decisions", "evaluations")
        kept = {table: [row for row in rows(table) if not is_of(row)] for table in tables}
        rounds.begin(store, round_, "again")
        assert {table: [row for row in rows(table) if not is_of(row)] for table in tables} == kept
        assert [[is_of(row) for row in rows(table)].count(True) for table in tables] == [1, 0, 0]
        assert rounds.why_stopped(store, letters.RECIPE) is None
        rounds.finish(store, round_, champion="new")
        assert [row for row in rows("rounds") if not is_of(row)] == kept["rounds"]
        assert rounds.champion(store, letters.RECIPE) == "new" != rounds.champion(store, "other")


def test_a_text_that_was_drawn_for_in_other_tokens_is_no_prompt_of_the_same_name(home, recipe):
    with Store.at(home) as store:
        ingest(store, recipe, Home.here(), "run", lambda *_: None)
        store.commit(lambda c: c.execute("UPDATE prompts SET chat = true"))  # as if by a template that says the same
        ingest(store, recipe, Home.here(), "run", lambda *_: None)  # nothing was drawn for it yet
        (one, *_) = store.query("SELECT prompt_id FROM prompts")
        store.append("candidates", [{"recipe": recipe.name, "prompt_id": one["prompt_id"]}])
        store.commit(lambda c: c.execute("UPDATE prompts SET chat = true"))
        with pytest.raises(
            prompts.PromptError, match="are now plain text, but some have the same text as earlier ones"
        ):
            ingest(store, recipe, Home.here(), "run", lambda *_: None)
