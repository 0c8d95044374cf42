"""Gates: each of them fails when it should, and says why."""

import json
from pathlib import Path

import letters_store as letters
import pytest

from rsft_pipeline import rounds
from rsft_pipeline.audit import ids
from rsft_pipeline.audit.revoke import revoke
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.steps import gates

RECIPE = Recipe.of_file(Path(f"{letters.RECIPE}.yaml"), letters.RECIPE_AS_RUN.model_dump(mode="json"), {})


@pytest.fixture
def store(tmp_path):
    with letters.write(tmp_path) as written:
        yield written


def round_(store, **settings):
    """The second round, its settings changed."""
    recorded = json.dumps({**letters.RECIPE_AS_RUN.model_dump(mode="json"), **settings})
    store.commit(lambda c: c.execute("UPDATE rounds SET settings = ? WHERE round = 'r001'", [recorded]))
    return rounds.record(store, RECIPE, "r001")


@pytest.mark.parametrize(
    ("passes", "not_worse"),
    [((8, 6), False), ((6, 8), True), ((6, 6), True)],
    ids=["lost", "gained, and not promoted for another reason", "alike"],
)
def test_a_checkpoint_that_lost_to_the_champion_is_worse(store, passes, not_worse):
    of = {"recipe": letters.RECIPE, "round": "r001", "draws": 8, "distinct_texts": 2, "tokens": 3.0, "eligible": 8}
    results = [
        {**of, "role": role, "prompt_id": letters.prompt_id(i, "eval"), "passes": n - i % 2, "score": n / 8}
        for role, n in zip(("champion", "checkpoint"), passes, strict=True)
        for i in range(letters.PROMPTS)
    ]
    store.replace("evaluations", results, recipe=letters.RECIPE, round="r001")
    found = gates.not_worse(store, round_(store))
    assert (found.passed, found.reason) == (not_worse, "not better")
    assert gates.not_worse(store, rounds.record(store, RECIPE, "r000")).passed  # promoted
    store.commit(lambda c: c.execute("UPDATE rounds SET state = 'trained' WHERE round = 'r001'"))
    assert gates.not_worse(store, round_(store)) == gates.Finding(False, "the round was not evaluated")


def test_a_prompt_with_more_than_its_share_is_named(store):
    alike = gates.prompt_share(store, round_(store, largest_share=0.05))
    assert (alike.passed, alike.facts["largest_share"]) == (True, 1 / letters.PROMPTS)
    most = letters.prompt_id(3)
    store.commit(
        lambda c: c.execute("UPDATE decisions SET accepted = true WHERE round = 'r001' AND prompt_id = ?", [most])
    )
    found = gates.prompt_share(store, round_(store, largest_share=0.1))
    assert (found.passed, found.facts) == (False, {"largest_share": 4 / 23, "prompt": most})
    assert found.reason == "the largest share is 17.4%; expected at most 10.0%"


def test_a_rate_outside_its_bounds_is_told(store):
    for bounds in ([0.25, 0.3], [0.2, 0.25]):
        assert gates.acceptance_rate(store, round_(store, acceptance_rate=bounds)).passed
    for low, high in ((0.0, 0.24), (0.26, 1.0)):
        found = gates.acceptance_rate(store, round_(store, acceptance_rate=[low, high]))
        assert (found.passed, found.reason) == (False, f"25.0% accepted; expected {low:.1%} to {high:.1%}")
    store.commit(lambda c: c.execute("DELETE FROM decisions WHERE round = 'r001'"))
    assert gates.acceptance_rate(store, round_(store)).facts == {"acceptance_rate": 0}


def test_the_samples_to_train_on_are_counted(store):
    found = gates.something_accepted(store, round_(store))
    assert found == gates.Finding(True, "20 accepted samples to train on", {"samples": 20})
    one = letters.candidate_id("r001", 3, 0)
    store.commit(lambda c: c.execute("UPDATE decisions SET accepted = false WHERE candidate_id <> ?", [one]))
    assert gates.something_accepted(store, round_(store)).passed
    store.commit(lambda c: c.execute("DELETE FROM decisions WHERE round = 'r001'"))
    found = gates.something_accepted(store, round_(store))
    assert found == gates.Finding(False, "nothing was accepted: no candidate was decided on", {"samples": 0})


def test_where_nothing_could_be_judged_no_looser_rule_is_suggested(store):
    none = "UPDATE decisions SET accepted = false, reason = 'cannot judge', score = NULL WHERE round = 'r001'"
    store.commit(lambda c: c.execute(none))
    found = gates.something_accepted(store, round_(store))
    assert not found.passed and "is missing of every candidate" in found.reason and "loosen" not in found.reason
    judged = "UPDATE decisions SET reason = ?, score = ? WHERE round = 'r001' AND prompt_id = ?"
    for number, (reason, score) in enumerate([("below threshold", 0.25), ("rank", 0.5), ("rank", 0.75)]):
        values = [reason, score, letters.prompt_id(number)]
        store.commit(lambda c, values=values: c.execute(judged, values))
    assert gates.something_accepted(store, round_(store)).reason == (
        "nothing was accepted (cannot judge: 68, rank: 8, below threshold: 4). Combined scores are from 0.25 to 0.75, "
        "the rule is threshold (threshold 0.5, cap 1, raise_by 0): "
        "loosen `acceptance`, raise `sampling.draws`, or look at the scores"
    )


def test_what_answers_a_held_out_prompt_is_named_in_whichever_round_it_was_learned(store):
    def asked(sql, *values):
        store.commit(lambda c: c.execute(f"UPDATE prompts SET {sql} WHERE prompt_id = ?", list(values)))
        found = gates.no_eval_prompt(store, round_(store))
        named = {} if found.passed else set(found.reason.partition(": ")[2].split(", "))
        assert found.facts == {"overlap": len(named)}
        return named

    attempt = {"recipe": letters.RECIPE, "round": "r000", "checkpoint": "begun again", "weight": 1.0}
    store.append("training_samples", [{**attempt, "candidate_id": letters.candidate_id("r000", 2, 1)}])
    other = "SELECT * REPLACE ('another' AS recipe, 'eval' AS split) FROM prompts WHERE prompt_id = ?"
    store.commit(lambda c: c.execute(f"INSERT INTO prompts {other}", [letters.prompt_id(7)]))  # is held out there
    assert gates.no_eval_prompt(store, round_(store)) == gates.Finding(True, "no held-out prompt", {"overlap": 0})
    both = {letters.candidate_id(key, 2, 0) for key in ("r000", "r001")}
    assert asked("split = 'eval'", letters.prompt_id(2)) == both
    assert asked("question = 'q'", letters.prompt_id(5)) == both
    assert asked("question = 'q'", letters.prompt_id(0, "eval")) == both | {letters.candidate_id("r000", 5, 0)}
    assert asked("active = false", letters.prompt_id(0, "eval")) == both  # that is asked no more


def test_a_checkpoint_that_learned_what_was_revoked_is_told_with_who_and_why(store):
    made = round_(store)
    assert gates.nothing_revoked(store, made) == gates.Finding(True, "nothing that it has learned was revoked")
    one = letters.candidate_id("r001", 3, 0)
    revoke(store, ids.thing(store, one), who="Ada", why="asked to")
    found = gates.nothing_revoked(store, made)
    what = f"checkpoint {letters.CHECKPOINTS['r001']} was revoked with candidate {one} by Ada: asked to"
    assert found == gates.Finding(False, what)
