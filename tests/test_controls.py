"""Controls: checkpoints trained on candidates that no score has chosen, and what they tell of a round."""

import itertools
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from cli.main import app
from rsft_pipeline import lineage, models, rounds, sampling, scoring, tasks
from rsft_pipeline.audit.diff import diff
from rsft_pipeline.audit.ids import thing
from rsft_pipeline.audit.replay import replay
from rsft_pipeline.audit.revoke import revoke
from rsft_pipeline.audit.verify import verify
from rsft_pipeline.audit.whatif import whatif
from rsft_pipeline.devices import Device
from rsft_pipeline.home import Home
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.steps import draw as drawing
from rsft_pipeline.steps import evaluate, score, until
from rsft_pipeline.steps.decide import accepted_so_far
from rsft_pipeline.store import Store
from tests.test_round import checks, failure_of, instance, run  # noqa: F401 (a fixture)


def test_a_round_is_measured_against_as_many_random_candidates_and_against_all(home, instance, write_recipe):  # noqa: F811
    recipe = load(write_recipe(controls=["random", "everything"], evaluation={"draws": 8, "k": 4}))
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        (row,) = rounds.history(store, recipe.name)
        controls = json.loads(row["controls"])
        made = {c["trained_on"]: c for c in store.query("SELECT * FROM checkpoints")}
        assert {name: made[name]["checkpoint"] for name in controls} == controls
        assert {c["parent"] for c in made.values()} == {row["policy"]}
        assert made["random"]["samples"] == made["accepted"]["samples"] == row["accepted"]
        assert row["accepted"] < made["everything"]["samples"] <= row["candidates"]

        # The random ones are those whose hash comes first, one of each text, whatever their score.
        scored = store.query(
            """SELECT t.candidate_id, s.value FROM training_samples t
               JOIN scores s ON s.candidate_id = t.candidate_id AND s.scorer = 'combined' WHERE t.checkpoint = ?""",
            [controls["random"]],
        )
        assert {one["value"] for one in scored} == {0.0, 1.0}
        texts = store.query(
            "SELECT candidate_id, prompt_id, text FROM candidates WHERE split = 'train' "
            f"ORDER BY md5('control:{recipe.seed}:' || candidate_id)"
        )
        first = {}
        for one in texts:
            first.setdefault((one["prompt_id"], lineage.normalise(one["text"])), one["candidate_id"])
        assert {one["candidate_id"] for one in scored} == set(list(first.values())[: row["accepted"]])

        measured = store.query("SELECT role, avg(passes / draws) AS value FROM evaluations GROUP BY ALL ORDER BY role")
        value = {one["role"]: one["value"] for one in measured}
        assert set(value) == {"policy", "checkpoint", "champion", "random", "everything"}
        assert value["checkpoint"] > value["random"]  # the scorer beats a coin
        assert row["checkpoint"] not in controls.values()
        assert rounds.history(store, recipe.name)[0]["champion"] == row["checkpoint"]

        over = evaluate.over_controls(store.query, row)
        assert {role: one.difference for role, one in over.items()} == {
            role: pytest.approx(value["checkpoint"] - value[role]) for role in ("random", "everything")
        }
        status = CliRunner().invoke(app, ["status", recipe.name])
        assert f"r000: pass@1 over the control `random`: {over['random'].difference:+.3f} [" in status.stdout
        status = CliRunner().invoke(app, ["status", recipe.name, "--json"])
        assert json.loads(status.stdout)["rounds"][0]["over"]["random"]["low"] == over["random"].low


def test_a_control_that_was_made_again_or_after_a_revocation_is_no_finding(home, instance, write_recipe):  # noqa: F811
    recipe = load(write_recipe(controls=["random", "everything"]))

    def verified(trained_on):
        return verify(store, [c for c in made() if c["trained_on"] == trained_on][-1], Home.here())

    def made():
        return store.query("SELECT * FROM checkpoints ORDER BY snapshot")

    for _ in range(2):  # the second attempt comes to the same weights, from another snapshot
        assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        for trained_on in ("accepted", "random", "everything"):
            assert verified(trained_on).findings == []
        alike = {check.name: check.note for check in verified("random").checks if check.differing is None}
        assert alike == {"its record, against meta.json": "that is of another training, which came to the same weights"}
        rejected = store.value("SELECT min(candidate_id) FROM decisions WHERE reason = 'below threshold'")
        revoke(store, thing(store, rejected), who="Ada", why="asked to")
        notes = [check.note for check in verified("everything").checks if check.differing is None]
        assert any(
            note.startswith("of its candidates 1 was revoked since, and a control learns others") for note in notes
        )
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        again = verified("everything")
        assert again.findings == [] and not [one for one in again.checks if "learns others" in one.note]


def test_with_all_rounds_a_control_has_as_many_samples_as_the_accepted_set(home, instance, write_recipe):  # noqa: F811
    controls = {"controls": ["random"], "training": {"data": "all_rounds", "start": "base"}}
    recipe = load(write_recipe(**controls))
    for key in ("r000", "r001"):
        assert run(instance, recipe, key).success
    with Store.at(home) as store:
        samples = store.query("SELECT round, trained_on, samples FROM checkpoints")
        accepted = [row["accepted"] for row in rounds.history(store, recipe.name)]
    of = {(row["round"], row["trained_on"]): row["samples"] for row in samples}
    assert of["r001", "random"] == of["r001", "accepted"] == sum(accepted)


def test_draws_go_on_until_enough_is_accepted_and_only_for_the_prompts_that_lack_it(home, instance, write_recipe):  # noqa: F811
    until = {"per_prompt": 1, "draws": 12}
    recipe = load(write_recipe(sampling={"draws": 2, "max_tokens": 2, "until": until, "wave_size": 60}))
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        rows = store.query(
            """SELECT c.prompt_id, max(c.draw) AS last, count(*) AS draws, min(c.draw) FILTER (d.accepted) AS first
               FROM candidates c JOIN decisions d USING (candidate_id) WHERE c.split = 'train' GROUP BY ALL"""
        )
        for row in rows:
            last_pass = 5 if row["first"] is None else row["first"] // 2
            assert row["last"] == row["draws"] - 1 == 2 * last_pass + 1
        assert {row["draws"] for row in rows} > {2, 4}
        # Another rule can be asked about, one that could not be drawn until: on all that was drawn.
        other = whatif(store, recipe, "r000", {"acceptance.rule": "top_k", "acceptance.k": "1"})
        assert (other.candidates, other.would.accepted) == (sum(row["draws"] for row in rows), len(rows))
        (note,) = other.notes
        assert "enough accepted by the recorded rule" in note
        (note,) = diff(store, recipe, "r000", "r000").notes
        assert "ended with enough accepted" in note
        before = store.query("SELECT candidate_id FROM candidates ORDER BY 1")
        decisions = store.query("SELECT candidate_id, accepted FROM decisions ORDER BY 1")
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        assert store.query("SELECT candidate_id FROM candidates ORDER BY 1") == before
        assert store.query("SELECT candidate_id, accepted FROM decisions ORDER BY 1") == decisions


CPU = Device("cpu", "float32")
SCORER = """
def exact(samples):
    return [float(sample.completion == sample.reference) for sample in samples]
"""


def edited(step, file, calls=1):
    """A step before which, from the given call on, somebody edits the scorer's file."""
    count = itertools.count(1)

    def edit_first(*rest, **named):
        if next(count) >= calls:
            file.write_text(f"{SCORER}# edited\n")
        return step(*rest, **named)

    return edit_first


@pytest.fixture
def by_function(write_recipe, tmp_path):
    """A recipe whose scorer is a function in a file, and that file."""

    def write(**sections):
        scorers = [{"kind": "function", "name": "exact", "function": "judging:exact"}]
        recipe = load(write_recipe(scoring={"scorers": scorers}, **sections))
        file = recipe.folder / "judging.py"
        file.write_text(SCORER)
        return recipe, file

    return write


def test_a_scorer_that_is_edited_while_the_round_draws_stops_it_and_nothing_is_lost(
    home,
    instance,  # noqa: F811
    by_function,
    monkeypatch,
):
    until = {"per_prompt": 1, "draws": 6}
    recipe, file = by_function(sampling={"draws": 2, "max_tokens": 2, "until": until, "wave_size": 60})
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "draw", edited(drawing.draw, file, calls=2))
        failed = failure_of(run(instance, recipe, "r000"), f"{recipe.name}__candidates")
    assert "the scorer `exact` has changed since it was loaded" in failed
    with Store.at(home) as store:
        drawn = store.value("SELECT count(*) FROM candidates WHERE split = 'train'")
        (before,) = {row["version"] for row in store.query("SELECT version FROM scores WHERE scorer = 'exact'")}
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        decided = json.loads(rounds.row_of(store, recipe.name, "r000")["scorers"])["exact"]
        assert decided != before
        assert store.value("SELECT count(*) FROM candidates WHERE split = 'train'") > drawn
        judged = store.value("SELECT count(*) FROM scores WHERE scorer = 'exact' AND version = ?", [decided])
        assert judged == store.value("SELECT count(*) FROM candidates")


def test_a_scorer_that_is_edited_while_it_is_loaded_is_not_gone_by(home, by_function, monkeypatch):
    recipe, file = by_function()
    round_ = rounds.Round(recipe, "r000", "policy", "base", "policy", "none")
    monkeypatch.setattr(scoring, "judges", edited(scoring.judges, file))
    with Store.at(home) as store, pytest.raises(rounds.RoundError, match="`exact` has changed since it was loaded"):
        score.load(store, round_, CPU)


def test_a_verdict_is_replayed_by_the_scorers_that_it_went_by(home, instance, by_function, monkeypatch):  # noqa: F811
    recipe, file = by_function()
    monkeypatch.setattr(evaluate, "contest", edited(evaluate.contest, file))
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        row = rounds.row_of(store, recipe.name, "r000")
        assert json.loads(row["evaluation_scorers"]).keys() == json.loads(row["scorers"]).keys()
        assert row["evaluation_scorers"] != row["scorers"]
        answer = replay(store, recipe, "r000", Home.here(), nullcontext(Device("cpu", "float32")), forced=0)
        assert answer.findings == []
        asked = {check.name: check.compared for check in answer.checks}
        assert asked["scorer exact of held-out candidates"] > 0 == asked["scorer exact"]


def test_a_scorer_that_is_edited_between_two_sides_of_a_comparison_gives_no_verdict(
    home,
    instance,  # noqa: F811
    by_function,
    monkeypatch,
):
    recipe, file = by_function()
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "judge", edited(evaluate.judge, file))
        failed = failure_of(run(instance, recipe, "r000"), f"{recipe.name}__evaluation")
    assert "answers to held-out prompts have no score by the present scorers and references" in failed
    assert run(instance, recipe, "r000").success


@pytest.mark.parametrize("wanted", [10, 40])
def test_a_round_ends_with_the_wave_that_makes_its_accepted_enough(home, instance, write_recipe, wanted):  # noqa: F811
    until = {"accepted": wanted, "draws": 12}
    recipe = load(write_recipe(sampling={"draws": 2, "max_tokens": 2, "until": until, "wave_size": 20}))
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        accepted = store.value("SELECT count(*) FROM decisions WHERE accepted")
        drawn = store.value("SELECT count(*) FROM candidates WHERE split = 'train'")
        assert wanted <= accepted < wanted + 20
        assert drawn % 2 == 0 and drawn < 12 * 67


@pytest.fixture
def about_to_draw(mine, ran):
    """Make r002 as it is about to draw, by other settings: not from its policy, as if that had a teacher."""

    def make(**sections):
        recipe = load(ran / "letters_loop.yaml", {name: json.dumps(section) for name, section in sections.items()})
        first = rounds.record(mine, recipe, "r000")
        drawn_from = rounds.record(mine, recipe, "r001").policy
        return replace(first, recipe=recipe, key="r002", drawn_from=drawn_from)

    return make


@pytest.fixture
def draw_until(mine, about_to_draw):
    """Draw for that round. Returns the round, and how many candidates and tokens were drawn."""

    def draw(show=lambda *_: None, **sections):
        round_ = about_to_draw(**sections)
        weights = Home.here().checkpoints / round_.drawn_from
        asked = drawing.ask(mine, round_, models.tokenizer(weights), split="train", run_id="run")
        with sampling.InProcess(weights, round_.recipe, tasks.of(round_.recipe), CPU) as session:
            return round_, until.draw(mine, round_, session, asked, device=CPU, run_id="run", show=show)

    return draw


def test_a_round_that_draws_as_many_for_each_prompt_draws_what_is_missing_and_says_how_much(mine, about_to_draw):
    round_, told = about_to_draw(sampling={"prompts": 12, "draws": 2, "max_tokens": 2, "wave_size": 10}), []
    weights = Home.here().checkpoints / round_.drawn_from
    asked = drawing.ask(mine, round_, models.tokenizer(weights), split="train", run_id="run")

    def draw_all():
        def show(done, words, total):
            assert "tokens/s" in words
            told.append((done, total))

        with sampling.InProcess(weights, round_.recipe, tasks.of(round_.recipe), CPU) as session:
            return drawing.draw_all(mine, round_, session, asked, run_id="run", show=show)

    made = draw_all()
    whole = drawn(mine)
    assert made == (24, sum(row["tokens"] for row in whole)) and told == [(10, 24), (20, 24), (24, 24)]
    mine.commit(lambda c: c.execute("DELETE FROM candidates WHERE round = 'r002' AND wave <> 1"))
    again = draw_all()
    assert again == (14, sum(row["tokens"] for row in whole if row["wave"] != 1)) and told[3:] == [(10, 14), (14, 14)]
    assert drawn(mine) == whole and draw_all() == (0, 0)


def drawn(store):
    return store.query("SELECT candidate_id, wave, tokens, token_ids FROM candidates WHERE round = 'r002' ORDER BY ALL")


def undraw(store):
    for table in ("candidates", "scores"):
        store.commit(lambda connection, table=table: connection.execute(f"DELETE FROM {table} WHERE round = 'r002'"))


THREE_OF_EACH = {
    "sampling": {
        "prompts": 12,
        "draws": 2,
        "max_tokens": 2,
        "until": {"per_prompt": 3, "accepted": 99, "draws": 6},
        "wave_size": 12,
    },
    "acceptance": {"rule": "threshold", "threshold": 0.5, "distinct": False},
}


def test_a_round_that_is_killed_after_each_wave_draws_the_waves_of_one_that_was_not(mine, draw_until, monkeypatch):
    told = []
    round_, made = draw_until(lambda *words: told.append(words), **THREE_OF_EACH)
    whole = drawn(mine)
    assert made == (len(whole), sum(row["tokens"] for row in whole))
    assert told[0] == (12, "2 draws per prompt at most, 12 prompts still drawn for") and told[-1][0] == len(whole)
    settings = sampling.settings(round_.recipe.sampling, round_.recipe.seed)
    asked = mine.query("SELECT prompt_id FROM round_prompts WHERE round = 'r002'")
    assert {row["candidate_id"] for row in whole} < {
        lineage.candidate_id(round_.recipe.name, "r002", round_.drawn_from, row["prompt_id"], draw, settings)
        for row in asked
        for draw in range(6)
    }

    undraw(mine)
    then, calls = until.score, itertools.count(1)

    def killed(*given, **named):
        if next(calls) % 2 == 0:  # before what was just drawn is scored
            raise InterruptedError
        return then(*given, **named)

    monkeypatch.setattr(until, "score", killed)
    for _ in told:
        with pytest.raises(InterruptedError):
            draw_until(**THREE_OF_EACH)
    assert draw_until(**THREE_OF_EACH)[1] == (0, 0)
    assert drawn(mine) == whole


def test_exactly_enough_accepted_is_enough(mine, draw_until):
    def until_accepted(number):
        undraw(mine)
        limits = {"accepted": number, "draws": 6}
        round_, _ = draw_until(sampling={"draws": 2, "max_tokens": 2, "until": limits, "wave_size": 20})
        return drawn(mine), sum(accepted_so_far(mine, round_, 6).values())

    before, accepted = until_accepted(10)
    assert until_accepted(accepted) == (before, accepted)


def test_what_a_pilot_decides_is_not_asked_before_the_first_pass_is_complete(mine, draw_until):
    limits = {"accepted": 1, "draws": 3}
    calibrated = {"rule": "loss", "k": "calibrate", "share": 0.5}
    draws = {"prompts": 20, "draws": 1, "max_tokens": 2, "until": limits, "wave_size": 5}
    assert draw_until(sampling=draws, acceptance=calibrated)[1][0] == len(drawn(mine)) == 20
