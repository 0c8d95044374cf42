"""Trace, impact, revocation and export, on two rounds that really ran and on chains of rounds made by hand."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import dagster as dg
import pytest
from conftest import run_round
from fastapi.testclient import TestClient
from typer.testing import CliRunner

import definitions
from assets import outside
from cli.lineage import _wrote
from cli.main import app
from resources import pages
from rsft_pipeline import lineage, merkle, revocations, rounds
from rsft_pipeline.audit import browse, ids
from rsft_pipeline.audit.export import COLUMNS, PARTIAL, export
from rsft_pipeline.audit.ids import AuditError
from rsft_pipeline.audit.impact import earlier, impact
from rsft_pipeline.audit.revoke import revoke
from rsft_pipeline.audit.trace import trace
from rsft_pipeline.home import Home
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.rounds import RoundError
from rsft_pipeline.steps import evaluate, gates
from rsft_pipeline.steps.decide import decide, efficiency_of
from rsft_pipeline.steps.ingest import ingest
from rsft_pipeline.steps.rows import ACCEPTED, of_training
from rsft_pipeline.store import Store, StoreError
from web.app import create

NAME = "letters_loop"
DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture
def recipe(ran):
    return load(ran / f"{NAME}.yaml")


@pytest.fixture
def there(ran):
    """The store of that home, to read."""
    with Store.at(ran / "home") as store:
        yield store


def accepted(store, round_key):
    rows = store.query(
        "SELECT candidate_id FROM decisions WHERE round = ? AND accepted ORDER BY candidate_id", [round_key]
    )
    return [row["candidate_id"] for row in rows]


# --- trace -------------------------------------------------------------------------------------


def test_every_accepted_sample_is_followed_from_its_line_to_the_checkpoints_that_learned_it(there, recipe):
    first, second = rounds.history(there, NAME)
    for candidate in accepted(there, "r001")[::9]:
        found = trace(there, candidate)
        assert found.complete, found.gaps
        asked = found.prompt
        a, b = asked.text
        assert (asked.source, asked.reference, asked.split) == ("letters:letters", b, "train")
        assert asked.line == 10 * "abcdefghij".index(a) + "abcdefghij".index(b) + 1
        assert [one.digest for one in found.weights] == [second["policy"], first["policy"]]
        assert [one.source for one in found.weights] == [f"{NAME} r000", "bootstrap"]
        assert found.draw.sampling["temperature"] == 1.0 and found.draw.sampling["seed"] == recipe.seed
        assert found.draw.seed == lineage.seed_of(candidate, recipe.seed)
        assert [(one.scorer, one.value, one.decided_by) for one in found.scores] == [
            ("answer", 1.0, True),
            ("combined", 1.0, True),
        ]
        assert found.decision.accepted and found.decision.words == "score 1 is above the threshold 0.5"
        assert found.decision.u == lineage.uniform(candidate, recipe.seed)
        (learned,) = found.learned
        assert (learned.checkpoint, learned.round, learned.weight) == (second["checkpoint"], "r001", 1.0)
        assert learned.champion == (second["champion"] == second["checkpoint"])


def test_a_sample_of_the_first_round_leads_to_the_checkpoint_that_learned_from_its_checkpoint(there):
    first, second = rounds.history(there, NAME)
    found = trace(there, accepted(there, "r000")[0][:12])
    assert [(one.checkpoint, one.weight) for one in found.learned] == [
        (first["checkpoint"], 1.0),
        (second["checkpoint"], None),
    ]
    assert found.learned[1].how == f"starts from {first['checkpoint']} and learned from its draws"


def test_rejected_and_held_out_candidates_have_a_chain_too(there):
    rejected = there.value("SELECT min(candidate_id) FROM decisions WHERE reason = 'below threshold'")
    found = trace(there, rejected)
    assert found.complete and not found.learned and found.decision.words == "score 0 is not above the threshold 0.5"
    policy = rounds.history(there, NAME)[0]["checkpoint"]
    held_out = there.value("SELECT min(candidate_id) FROM candidates WHERE split = 'eval' AND policy = ?", [policy])
    found = trace(there, held_out)
    assert found.complete and found.decision is None
    assert found.evaluated == [(NAME, "r000"), (NAME, "r001")]


def test_a_missing_link_is_named(mine):
    candidate = accepted(mine, "r001")[0]
    for sql in ("DELETE FROM prompts", "DELETE FROM scores", "UPDATE rounds SET settings = '{}' WHERE round = 'r001'"):
        mine.commit(lambda connection, sql=sql: connection.execute(sql))
    gaps = trace(mine, candidate).gaps
    # The settings are read from an older snapshot.
    assert gaps == ["its prompt is not in the store", "it has no combined score"]


def test_what_an_earlier_attempt_with_more_draws_left_is_said_to_be_left_and_no_gap(mine, recipe):
    row, more = rounds.row_of(mine, NAME, "r001"), load(recipe.file, {"sampling.draws": "9"})
    (one,) = mine.query("SELECT * FROM candidates WHERE candidate_id = ?", [accepted(mine, "r001")[0]])
    rounds.begin(mine, replace(rounds.record(mine, recipe, "r001"), recipe=more), "with more draws")
    left = {**one, "candidate_id": "1ef7" * 8, "draw": 8}
    mine.append("candidates", [left])
    mine.replace("rounds", [row], recipe=NAME, round="r001")
    assert trace(mine, one["candidate_id"]).of_round and trace(mine, one["candidate_id"]).draw.sampling["draws"] == 6
    for draws in (9, None):
        found = trace(mine, left["candidate_id"])
        assert not found.of_round and found.complete and (found.draw.sampling or {}).get("draws") == draws
        done = CliRunner().invoke(app, ["audit", "trace", left["candidate_id"], "--quick"], catch_exceptions=False)
        assert f"not among the draws of {NAME} r001 as it ran: left by an earlier attempt at the round" in done.stdout
        mine.forget()
    with TestClient(create(mine, Home.here()), base_url="http://127.0.0.1") as client:
        page = client.get(f"/recipes/{NAME}/candidates/{left['candidate_id']}").text
    assert "not among the draws of r001 as it ran" in page


def test_a_prompt_that_has_changed_is_shown_as_the_candidate_was_judged_by_it(mine):
    candidate = accepted(mine, "r000")[0]
    was = trace(mine, candidate)
    changed = "UPDATE prompts SET reference = 'z', content = 'another' WHERE prompt_id = ?"
    mine.commit(lambda connection: connection.execute(changed, [was.prompt.prompt_id]))
    (again,) = mine.query("SELECT * FROM scores WHERE candidate_id = ? AND scorer = 'answer'", [candidate])
    mine.append("scores", [{**again, "content": "another", "value": 0.0}])  # and judged by it, too
    found = trace(mine, candidate)
    then = mine.value("SELECT snapshot FROM checkpoints WHERE round = 'r000'")
    assert found.complete and found.prompt == replace(was.prompt, snapshot=then)
    assert {(one.scorer, one.value): one.decided_by for one in found.scores} == {
        ("answer", 1.0): True,
        ("answer", 0.0): False,
        ("combined", 1.0): True,
    }
    done = CliRunner().invoke(app, ["audit", "trace", candidate, "--quick"], catch_exceptions=False)
    assert f"as it was when judged, in snapshot {then}; it has changed since" in done.stdout

    mine.forget()
    found = trace(mine, candidate)
    assert found.prompt.reference == "z" and found.prompt.snapshot is None
    assert found.gaps == ["its prompt has changed since it was judged, and is shown as it is now"]
    revoke(mine, ids.thing(mine, found.prompt.prompt_id), who="me", why="the law", erase=True)
    found = trace(mine, candidate)
    assert found.prompt.reference is None and found.complete


def test_what_a_control_learned_of_the_rejected_rests_on_no_decision(mine):
    candidate = everything(mine)["candidate_id"]
    found = trace(mine, candidate)
    assert found.complete and not found.decision.accepted and found.decision_then is None
    assert [one.role for one in found.learned] == ["control everything"]


def everything(store):
    """Write a control of r000 that learned from a candidate that the rule gave no chance. Returns its decision."""
    rejected = "SELECT * FROM decisions WHERE reason = 'below threshold' AND round = 'r000' ORDER BY candidate_id"
    one = store.query(rejected)[0]
    chance = "UPDATE decisions SET log_a = '-infinity' WHERE candidate_id = ?"
    store.commit(lambda connection: connection.execute(chance, [one["candidate_id"]]))
    made = {"recipe": NAME, "round": "r000", "checkpoint": "a11a"}
    base = rounds.row_of(store, NAME, "r000")["policy"]
    more = {"parent": base, "policy": base, "trained_on": "everything", "samples": 1, "snapshot": store.snapshot()}
    meta = json.dumps({"training": {"data": "round"}, "scorers": []})
    store.append("checkpoints", [{**made, **more, "accepted_digest": "of a control", "meta": meta}])
    store.append("training_samples", [{**made, "candidate_id": one["candidate_id"], "weight": 1.0, "leaf": ""}])
    return one


def test_a_candidate_is_found_by_its_place_a_text_or_not_at_all(there, monkeypatch):
    assert ids.accepted(there, NAME, "r001", 2) == accepted(there, "r001")[1]
    for place in (0, 10_000, 10**20):
        with pytest.raises(AuditError, match=f"has {len(accepted(there, 'r001'))} accepted candidates"):
            ids.accepted(there, NAME, "r001", place)
    matches, count = ids.containing(there, "a")
    assert len(matches) == ids.MATCHES and all("a" in one.text for one in matches) and matches[0].accepted
    assert count == there.value("SELECT count(*) FROM candidates WHERE contains(text, 'a')") > ids.MATCHES
    monkeypatch.setattr(ids, "MATCHES", count)
    (every, _) = ids.containing(there, "a")
    assert len(every) == count and {one.split for one in every if one.accepted is None} == {"eval"}
    with pytest.raises(AuditError, match="no candidate's id begins with ffff"):
        trace(there, "f" * 32)
    with pytest.raises(AuditError, match="nothing here is called 'nobody'"):
        ids.thing(there, "nobody")


def test_the_command_line_gives_the_chain_as_json(mine):
    candidate = accepted(mine, "r001")[0]
    done = CliRunner().invoke(app, ["audit", "trace", candidate, "--quick", "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert told["candidate_id"] == candidate and told["complete"]
    assert told["weights"][-1]["source"] == "bootstrap"
    done = CliRunner().invoke(app, ["audit", "trace", candidate], catch_exceptions=False)
    assert "registered as version 2" in done.stdout.replace("\n", "")


def test_json_has_no_number_that_is_none_of_its(mine):
    candidate = everything(mine)["candidate_id"]
    done = CliRunner().invoke(app, ["audit", "trace", candidate, "--quick", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout, parse_constant=pytest.fail)["decision"]["log_a"] == "-inf"


def test_links_to_mlflow_lead_where_it_is_seen(mine, monkeypatch):
    monkeypatch.setenv("RSFT_MLFLOW_UI", "https://mlflow.example/")
    run = rounds.row_of(mine, NAME, "r000")["mlflow_run_id"]
    assert pages.mlflow_run(run) == f"https://mlflow.example/#/runs/{run}"


# --- impact, on rounds made by hand -----------------------------------------------------------


def test_the_verdicts_are_those_that_counted_it(mine):
    first, second = (row["checkpoint"] for row in rounds.history(mine, NAME))
    of_policy = "SELECT min(candidate_id) FROM candidates WHERE split = 'eval' AND policy = ?"
    held_out = mine.value(of_policy, [second])
    assert impact(mine, ids.thing(mine, held_out)).evaluated == trace(mine, held_out).evaluated == [(NAME, "r001")]
    both = [(NAME, "r000"), (NAME, "r001")]
    assert impact(mine, ids.thing(mine, second)).evaluated == [(NAME, "r001")]
    assert impact(mine, ids.thing(mine, first)).evaluated == both
    assert impact(mine, ids.thing(mine, trace(mine, held_out).prompt.prompt_id)).evaluated == both
    assert impact(mine, ids.thing(mine, "answer")).evaluated == both
    other = "UPDATE rounds SET evaluation_scorers = '{}' WHERE round = 'r001'"
    mine.commit(lambda connection: connection.execute(other))
    assert impact(mine, ids.thing(mine, "answer")).evaluated == both[:1]


def chain(store, *made):
    """Rounds of the recipe `a`: (checkpoint, parent, policy, champion after, candidate → checkpoints it trained)."""
    for n, (checkpoint, parent, policy, champion) in enumerate(made):
        of = {"recipe": "a", "round": f"r{n:03d}", "policy": policy}
        store.append("rounds", [{**of, "state": "finished", "drawn_from": policy, "checkpoint": checkpoint,
                                 "champion": champion, "policy_source": "base"}])  # fmt: skip
        meta = json.dumps({"training": {"data": "round"}, "scorers": [f"version {n}"]})
        store.append("checkpoints", [{**of, "checkpoint": checkpoint, "parent": parent, "trained_on": "accepted",
                                      "samples": 1, "snapshot": n, "meta": meta}])  # fmt: skip
        sample = {"recipe": "a", "round": f"r{n:03d}", "candidate_id": f"c{n}"}
        store.append("candidates", [{**sample, "prompt_id": f"p{n}", "policy": policy, "split": "train", "text": "x"}])
        store.append("decisions", [{**sample, "prompt_id": f"p{n}", "accepted": True}])
        store.append("training_samples", [{**sample, "checkpoint": checkpoint, "weight": 1.0}])


def test_a_round_on_all_rounds_is_not_held_to_attempts_that_were_run_again_before_it(tmp_path):
    with Store.at(tmp_path) as store:
        chain(store, ("k0", "b", "b", "k0"), ("k1", "b", "k0", "k1"))
        again = {"recipe": "a", "round": "r001", "checkpoint": "k1 again", "parent": "b", "policy": "b"}
        last = {"recipe": "a", "round": "r002", "checkpoint": "k2", "parent": "b", "policy": "b"}
        for snapshot, row, data in ((8, again, "round"), (9, last, "all_rounds")):
            meta = json.dumps({"training": {"data": data}, "scorers": []})
            store.append("checkpoints", [{**row, "trained_on": "accepted", "snapshot": snapshot, "meta": meta}])
        assert of_prompt(store, "p0")[0] == ["k0", "k1"]


def test_a_checkpoint_on_all_rounds_has_learned_from_its_recipes_last_attempts_at_earlier_rounds():
    def row(checkpoint, round_key, snapshot, recipe="a", trained_on="accepted", data="all_rounds"):
        of = {"recipe": recipe, "round": round_key, "checkpoint": checkpoint}
        return {**of, "snapshot": snapshot, "trained_on": trained_on, "data": data}

    last = row("last", "r002", 6)
    made = [row("first", "r000", 1), row("again", "r000", 2, trained_on=None), row("other's", "r000", 3, recipe="z")]
    made += [row("second", "r001", 4), row("control", "r001", 5, trained_on="random"), last]
    made += [row("last again", "r002", 7), row("since", "r001", 8)]
    found = {key: one["checkpoint"] for key, one in earlier(last, made).items()}
    assert found == {"r000": "again", "r001": "second"}
    assert earlier({**last, "data": "round"}, made) == {}


def of_prompt(store, prompt):
    found = impact(store, ids.Thing("prompt", prompt, ("a",)))
    return [one.checkpoint for one in found.checkpoints], [one.round for one in found.again], found


def test_all_that_starts_or_samples_from_touched_weights_is_touched_and_has_to_be_run_again(tmp_path):
    with Store.at(tmp_path) as store:
        chain(store, ("k0", "b", "b", "k0"), ("k1", "k0", "k0", "k1"), ("k2", "k1", "k1", "k2"))
        assert of_prompt(store, "p1")[:2] == (["k1", "k2"], ["r001", "r002"])
        checkpoints, again, found = of_prompt(store, "p2")
        assert (checkpoints, again, found.champions) == (["k2"], ["r002"], [("a", "k2")])
        assert (found.candidates, found.accepted, found.later_candidates) == (1, 1, 0)
        found = impact(store, ids.Thing("checkpoint", "k0", ("a",)))
        assert [one.how for one in found.checkpoints] == [
            "it is this one",
            "trained on 1 sample of it",
            "starts from k1 and learned from its draws",
        ]
        assert (found.candidates, found.later_candidates, found.later_accepted) == (1, 1, 1)
        assert [one.round for one in impact(store, ids.Thing("scorer", "version 1", ("a",))).again] == ["r001", "r002"]


def test_a_round_that_nobody_built_on_is_run_again_alone(tmp_path):
    with Store.at(tmp_path) as store:
        # r001 lost against k0, so r002 started and sampled from k0 too.
        chain(store, ("k0", "b", "b", "k0"), ("k1", "k0", "k0", "k0"), ("k2", "k0", "k0", "k2"))
        assert of_prompt(store, "p1")[:2] == (["k1"], ["r001"])
        revoke(store, ids.Thing("prompt", "p1", ("a",)), who="me", why="because")
        assert rounds.following(store, "a") == "r001"
        rounds.check_nothing_stands_on(store, "a", "r001")
        with pytest.raises(RoundError, match="r002 stands on it"):
            rounds.check_nothing_stands_on(store, "a", "r000")


def test_weights_that_came_by_data_alone_are_touched_and_a_champion_left_in_use_counts(tmp_path):
    with Store.at(tmp_path) as store:
        # Every round trains the base on its own draws of it; k0 stays champion while k1 and k2 lose.
        chain(store, ("k0", "b", "b", "k0"), ("k1", "b", "b", "k0"), ("k2", "b", "k1", "k2"))
        checkpoints, again, found = of_prompt(store, "p0")
        assert (checkpoints, again) == (["k0"], ["r000", "r001"])
        assert found.again[1].why == "it left the champion k0 in use: trained on 1 sample of it"
        assert of_prompt(store, "p1")[:2] == (["k1", "k2"], ["r001", "r002"])  # k2 learned from draws of k1


@pytest.mark.parametrize("written", ["k0", None])  # None: from before it was written down with the checkpoint
def test_what_learned_from_a_teacher_is_touched_with_it(tmp_path, written):
    with Store.at(tmp_path) as store:
        chain(store, ("k0", "b", "b", "k0"))
        of = {"recipe": "z", "round": "r000", "policy": "other", "checkpoint": "z0"}
        store.append("rounds", [{**of, "state": "finished", "drawn_from": "k0", "champion": "z0"}])
        meta = json.dumps({"training": {"data": "round"}, "scorers": []})
        made = {**of, "parent": "other", "drawn_from": written, "trained_on": "accepted", "snapshot": 1, "meta": meta}
        store.append("checkpoints", [made])
        checkpoints, _, found = of_prompt(store, "p0")
        assert checkpoints == ["k0", "z0"] and found.checkpoints[1].how == "learned from draws of k0"
        assert [(one.recipe, one.round) for one in found.again] == [("a", "r000"), ("z", "r000")]
        revoke(store, ids.Thing("prompt", "p0", ("a",)), who="me", why="because")
        assert revocations.of_weights(store, "z0") == "checkpoint z0 was revoked with prompt p0 by me: because"


def test_a_control_is_named_but_no_round_is_run_again_for_it(tmp_path):
    with Store.at(tmp_path) as store:
        chain(store, ("k0", "b", "b", "k0"))
        control = {"recipe": "a", "round": "r000", "checkpoint": "all", "parent": "b", "policy": "b"}
        meta = json.dumps({"scorers": []})
        store.append(
            "checkpoints", [{**control, "trained_on": "everything", "samples": 2, "snapshot": 0, "meta": meta}]
        )
        extra = {"recipe": "a", "round": "r000", "candidate_id": "rejected"}
        store.append("candidates", [{**extra, "prompt_id": "q", "policy": "b", "split": "train", "text": "x"}])
        store.append("training_samples", [{**extra, "checkpoint": "all"}])
        found = of_prompt(store, "q")[2]
        assert [(one.checkpoint, one.role) for one in found.checkpoints] == [("all", "control everything")]
        assert found.again == [] and found.accepted == 0


# --- revoke ------------------------------------------------------------------------------------


def test_a_revocation_is_said_of_what_it_reaches_and_of_nothing_else(mine):
    found = trace(mine, accepted(mine, "r000")[0])
    prompt, version = found.prompt.prompt_id, found.scores[0].version

    def listed():
        return {row["revoked"] for row in browse.candidates(mine, NAME, "r000", browse.Asked(prompt=prompt)).rows}

    elsewhere = {"recipe": "another", "kind": "prompt", "what": prompt, "who": "me", "why": "because"}
    mine.append("revocations", [elsewhere])  # the same text, of another recipe
    assert trace(mine, found.candidate_id).revoked == [] and listed() == {False}
    revoke(mine, ids.thing(mine, version), who="me", why="it was wrong")
    told = f"scorer {version} was revoked by me: it was wrong"
    assert trace(mine, found.candidate_id).revoked == [told] and listed() == {True}


def test_what_is_revoked_is_made_again_without_it(mine, recipe):
    before = {row["round"]: row for row in rounds.history(mine, NAME)}
    candidate, other = accepted(mine, "r000")[:2]
    prompt = trace(mine, other).prompt.prompt_id
    for thing in (candidate, prompt):
        done = revoke(mine, ids.thing(mine, thing), who="an auditor", why="asked to")
    assert done.marked == [(NAME, "r000"), (NAME, "r001")]
    assert rounds.history(mine, NAME) == [] and rounds.following(mine, NAME) == "r000"
    found, made = trace(mine, candidate), trace(mine, accepted(mine, "r000")[2])
    assert found.revoked == [f"candidate {candidate} was revoked by an auditor: asked to"]
    assert (found.decision.reason, found.decision_then.reason, found.complete) == ("revoked", "accepted", True)
    assert made.decision.accepted and made.decision_then is None  # what it was trained with is revoked, it is not
    reached = impact(mine, ids.thing(mine, candidate)).checkpoints
    assert {one.checkpoint: (one.role, one.revoked) for one in found.learned} == {
        one.checkpoint: (one.role, True) for one in reached
    }
    with pytest.raises(RoundError, match="needs r000"):
        rounds.starting_weights(mine, recipe, Home.here(), "r002", "champion")
    old = rounds.record(mine, recipe, "r001")
    assert not gates.nothing_revoked(mine, old).passed
    of_old = of_training(rounds.record(mine, recipe, "r000"))
    left = {row["candidate_id"] for row in mine.query(ACCEPTED, of_old)}
    assert left and not left & {candidate, other}  # though the decisions are still those of before

    with dg.DagsterInstance.ephemeral() as instance:
        outside.tell(instance, definitions.usual_resources()["tracking"], mine, done)
        check = dg.AssetCheckKey(dg.AssetKey([NAME, "checkpoint"]), "nothing_revoked")
        assert not evaluated(instance, check)
        assert aliases(before["r001"]["checkpoint"]) == []
        for round_key in ("r000", "r001"):
            assert run_round(instance, recipe, round_key).success
            assert evaluated(instance, check)
        again = trace(mine, accepted(mine, "r001")[0])
        first, second = outside.runs(instance, _wrote(again)).values()
        assert [event["asset"] for event in first["events"]] == [f"{NAME}/prompts", f"{NAME}/checkpoint"]
        wrote = [f"{NAME}/{asset}" for asset in ("candidates", "scores", "accepted", "checkpoint")]
        assert [event["asset"] for event in second["events"]] == wrote
    after = {row["round"]: row for row in rounds.history(mine, NAME)}
    assert {row["checkpoint"] for row in after.values()}.isdisjoint(row["checkpoint"] for row in before.values())
    assert aliases(after["r001"]["champion"]) == ["champion"]
    reasons = mine.query("SELECT candidate_id FROM decisions WHERE reason = 'revoked'")
    assert [row["candidate_id"] for row in reasons] == [candidate]
    asked = mine.query("SELECT count(*) AS n FROM round_prompts WHERE prompt_id = ?", [prompt])
    assert asked == [{"n": 0}]
    found = trace(mine, candidate)
    assert found.decision.reason == "revoked" and found.decision_then.reason == "accepted"
    assert {(one.role, one.revoked) for one in found.learned} == {("superseded", True)}
    found = trace(mine, other)  # of a prompt that is asked no more
    assert found.complete and not found.of_round
    assert found.decision is None and found.decision_then.reason == "accepted"
    assert impact(mine, ids.thing(mine, candidate)).again == []


@pytest.mark.parametrize(("module", "moment"), [(evaluate, "judge"), (evaluate, "conclude"), (rounds, "finish")])
def test_what_is_revoked_while_it_is_evaluated_is_not_promoted(mine, recipe, monkeypatch, module, moment):
    champion, then = rounds.champion(mine, NAME), getattr(module, moment)

    def revoked_meanwhile(store, round_, *rest, **named):
        revoke(store, ids.thing(store, accepted(store, "r002")[0]), who="me", why="just now")
        return then(store, round_, *rest, **named)

    with dg.DagsterInstance.ephemeral() as instance:
        with monkeypatch.context() as patch:
            patch.setattr(module, moment, revoked_meanwhile)
            assert not run_round(instance, recipe, "r002").success
        assert [row["round"] for row in rounds.history(mine, NAME)] == ["r000", "r001"]
        assert aliases(champion) == ["champion"]
        assert run_round(instance, recipe, "r002").success
    assert rounds.following(mine, NAME) == "r003"


def test_rounds_do_not_go_back_to_another_base_model(mine, recipe):
    base = rounds.history(mine, NAME)[0]["policy"]
    assert rounds.starting_weights(mine, recipe, Home.here(), "r002", "base").digest == base
    other = load(recipe.file, {"model.bootstrap.steps": "20"})
    with pytest.raises(RoundError, match=f"started from the base model {base}, .* put it back"):
        rounds.starting_weights(mine, other, Home.here(), "r002", "base")
    assert rounds.locate(mine, other, Home.here(), base) == rounds.locate(mine, recipe, Home.here(), base)


def test_a_round_starts_from_the_weights_of_its_choice_unless_they_were_revoked(mine, recipe):
    def start(round_key, choice):
        found = rounds.starting_weights(mine, recipe, Home.here(), round_key, choice)
        return found.digest, found.source

    first, second = rounds.history(mine, NAME)
    mine.commit(lambda c: c.execute("UPDATE rounds SET champion = ? WHERE round = 'r001'", [first["checkpoint"]]))
    assert start("r002", "champion") == start("r001", "previous") == (first["checkpoint"], "r000")
    assert start("r002", "previous") == (second["checkpoint"], "r001")
    for choice in ("champion", "previous", "base"):
        assert start("r000", choice) == (first["policy"], "base")
    revoked = {"recipe": NAME, "kind": "checkpoint", "what": second["checkpoint"], "who": "me", "why": "because"}
    mine.append("revocations", [revoked])
    with pytest.raises(RoundError, match=f"r002 would start from r001: checkpoint {second['checkpoint']} was revoked"):
        start("r002", "previous")
    assert start("r002", "champion") == (first["checkpoint"], "r000")


def test_while_a_round_is_revoked_no_stop_rule_holds(mine, recipe):
    enough = recipe.model_copy(update={"stop": recipe.stop.model_copy(update={"target": 0.0})})
    assert "target" in rounds.why_stop(mine, enough)
    mine.commit(lambda c: c.execute("UPDATE rounds SET state = 'revoked' WHERE round = 'r001'"))
    assert rounds.why_stop(mine, enough) is None and rounds.following(mine, NAME) == "r001"


def evaluated(instance, check):
    record = instance.event_log_storage.get_latest_asset_check_execution_by_key([check])[check]
    return record.event.dagster_event.asset_check_evaluation_data.passed


def aliases(checkpoint):
    tracking = definitions.usual_resources()["tracking"]
    return outside.registered(tracking, NAME, [checkpoint])[checkpoint]["aliases"]


def test_a_revoked_text_is_recognised_in_what_is_drawn_later_and_a_revoked_scorer_stops_a_round(mine, recipe):
    revoke(mine, ids.text(mine, "c"), who="me", why="because")
    round_ = rounds.record(mine, recipe, "r001")
    late = mine.query("SELECT * FROM candidates WHERE round = 'r001' AND text = 'd' AND split = 'train' LIMIT 1")[0]
    mine.commit(lambda c: c.execute("UPDATE candidates SET text = 'cd' WHERE candidate_id = ?", [late["candidate_id"]]))
    mine.commit(lambda c: c.execute("DELETE FROM revocations WHERE kind = 'checkpoint'"))
    decide(mine, round_, "again")
    rows = mine.query(
        """SELECT c.text, p.text AS prompt, d.reason FROM decisions d JOIN candidates c USING (candidate_id)
           JOIN prompts p ON p.prompt_id = d.prompt_id WHERE d.round = 'r001'"""
    )
    assert {"c" in row["text"] + row["prompt"] for row in rows if row["reason"] == "revoked"} == {True}
    assert {"c" in row["text"] + row["prompt"] for row in rows if row["reason"] != "revoked"} == {False}
    seen = efficiency_of(mine, round_)  # the rule has seen nothing of the others
    assert seen.candidates == sum(row["reason"] != "revoked" for row in rows) < len(rows)

    revoke(mine, ids.thing(mine, "answer"), who="me", why="it was wrong")
    with pytest.raises(RoundError, match=r"scorer `answer`, version [0-9a-f]+, was revoked by me: it was wrong"):
        decide(mine, round_, "again")


def test_weights_that_come_out_the_same_without_what_was_revoked_may_be_used(mine, recipe, monkeypatch):
    """A scorer is revoked and mended, and nothing about the accepted set changes."""
    made = rounds.history(mine, NAME)[0]["checkpoint"]
    done = revoke(mine, ids.thing(mine, "answer"), who="me", why="it was wrong")
    mine.commit(lambda c: c.execute("DELETE FROM revocations WHERE kind = 'scorer'"))  # as if it had another version
    assert not gates.nothing_revoked(mine, rounds.record(mine, recipe, "r000")).passed
    tracking = definitions.usual_resources()["tracking"]
    client, run = tracking.client(), rounds.row_of(mine, NAME, "r000")["mlflow_run_id"]
    with dg.DagsterInstance.ephemeral() as instance:
        outside.tell(instance, tracking, mine, done)
        with monkeypatch.context() as patch:
            patch.setattr(rounds, "check_nothing_stands_on", lambda *_: 1 / 0)
            assert not run_round(instance, recipe, "r000").success
        assert client.get_run(run).info.status == "FINISHED"  # which that attempt was not
        assert run_round(instance, recipe, "r000").success
    (version,) = (v for v in client.search_model_versions(f"name = '{NAME}'") if v.tags["rsft.checkpoint"] == made)
    assert "rsft.revoked" not in version.tags
    assert rounds.history(mine, NAME)[0]["checkpoint"] == made
    assert gates.nothing_revoked(mine, rounds.record(mine, recipe, "r000")).passed


def test_an_erased_text_is_in_no_table_and_after_forgetting_in_no_file(tmp_path):
    secret, shared = "the secret of somebody", {"recipe": "a", "active": True, "source": "s"}
    with Store.at(tmp_path) as store:
        texts = [f"prompt {n}" for n in range(50)] + [secret]
        store.append("prompts", [{**shared, "prompt_id": str(n), "text": text, "line": n, "fields": "{}"}
                                 for n, text in enumerate(texts)])  # fmt: skip
        store.append("candidates", [{"recipe": "a", "round": "r000", "candidate_id": str(n), "prompt_id": str(n),
                                     "text": f"{text}!", "token_ids": [n], "tokens": 1, "split": "train"}
                                    for n, text in enumerate(texts)])  # fmt: skip
        copy = {"recipe": "a", "source": "s", "line": 99, "raw": secret.encode(), "reason": "duplicate"}
        store.append("quarantine", [{**copy, "detail": "the same text as line 50 of s"}])
        store.compact()
        then = store.snapshot()
        done = revoke(store, ids.Thing("prompt", "50", ("a",)), who="me", why="the law", erase=True)
        assert done.erased == {"prompts": 1, "candidates": 1, "quarantine": 1}
        assert then in done.keeping
        assert store.query("SELECT prompt_id, text, fields, active FROM prompts WHERE prompt_id = '50'") == [
            {"prompt_id": "50", "text": None, "fields": None, "active": False}
        ]
        assert (
            store.value("SELECT count(*) FROM candidates WHERE text IS NULL AND token_ids IS NULL AND tokens = 1") == 1
        )
        assert secret in store.value(f"SELECT text FROM prompts AT (VERSION => {then}) WHERE prompt_id = '50'")
        assert files_with(tmp_path, secret)
        assert store.forget() == []
        assert store.value("SELECT count(text) FROM prompts") == 50
    assert files_with(tmp_path, secret) == []


def test_words_are_found_where_they_are_written_as_json_and_among_bytes_that_are_no_text(tmp_path):
    words, shared = 'José said "hi"', {"recipe": "a", "active": True, "source": "s"}
    with Store.at(tmp_path) as store:
        rows = [{"who": words}, {"who": "nobody"}]
        store.append("prompts", [{**shared, "prompt_id": str(n), "text": f"p{n}", "line": n, "fields": json.dumps(row)}
                                 for n, row in enumerate(rows)])  # fmt: skip
        refused = [b"caf\xe9", json.dumps(rows[0]).encode(), json.dumps(rows[0], ensure_ascii=False).encode(),
                   json.dumps(rows[0]).replace("u00e9", "u00E9").encode()]  # fmt: skip
        store.append("quarantine", [{"recipe": "a", "source": "s", "line": n, "raw": raw, "reason": "empty"}
                                    for n, raw in enumerate(refused)])  # fmt: skip
        done = revoke(store, ids.text(store, words), who="me", why="the law", erase=True)
        assert done.erased == {"prompts": 1, "candidates": 0, "quarantine": 3}
        assert store.query("SELECT raw FROM quarantine WHERE octet_length(raw) > 0") == [{"raw": b"caf\xe9"}]


def test_a_text_that_is_revoked_first_and_erased_later_is_nowhere_afterwards(tmp_path):
    words = "what somebody said"
    with Store.at(tmp_path) as store:
        chain(store, ("k0", "b", "b", "k0"))
        prompt = {"recipe": "a", "prompt_id": "p0", "text": f"{words}?", "fields": "{}", "active": True}
        store.append("prompts", [prompt])
        revoke(store, ids.text(store, words), who="me", why="asked to")
        reached = "SELECT kind, cause, erased FROM revocations WHERE kind <> 'text' AND recipe = 'a' ORDER BY kind"
        assert {row["cause"] for row in store.query(reached)} == {f"text {words}"}
        name = f"text {ids.text(store, words).unspoken}"
        revoke(store, ids.text(store, words), who="me", why="the law", erase=True)
        kinds = ("candidate", "checkpoint", "prompt")
        assert store.query(reached) == [{"kind": kind, "cause": name, "erased": True} for kind in kinds]
        named = store.query("SELECT what FROM revocations WHERE kind = 'text'")  # by both, here and everywhere
        assert named == [{"what": name.split(" ", 1)[1]}] * 4
        store.forget()
    assert files_with(tmp_path, words) == []


def test_outside_the_store_a_revoked_text_is_named_by_its_hash(mine):
    said = ids.text(mine, "ab")
    done = revoke(mine, said, who="me", why="because")
    tracking, check = definitions.usual_resources()["tracking"], dg.AssetKey([NAME, "checkpoint"])
    with dg.DagsterInstance.ephemeral() as instance:
        outside.tell(instance, tracking, mine, done)
        key = dg.AssetCheckKey(check, "nothing_revoked")
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
    told = f"text sha256 {hashlib.sha256(b'ab').hexdigest()} was revoked by me: because"
    assert record.event.dagster_event.asset_check_evaluation_data.description == told
    versions = tracking.client().search_model_versions(f"name = '{NAME}'")
    assert told in {version.tags.get("rsft.revoked") for version in versions}


def files_with(home, secret):
    import duckdb

    found = []
    for file in (home / "store").rglob("*"):
        if file.suffix == ".parquet":
            sql = "SELECT count(*) FROM read_parquet(?) f WHERE contains(f::VARCHAR, ?)"
            there = duckdb.execute(sql, [str(file), secret]).fetchone()[0]
        else:
            there = file.is_file() and secret.encode() in file.read_bytes()
        if there:
            found.append(file.name)
    return found


def test_an_erased_prompt_does_not_come_back_with_its_source(mine, recipe):
    prompt = trace(mine, accepted(mine, "r000")[0]).prompt
    revoke(mine, ids.thing(mine, prompt.prompt_id), who="me", why="the law", erase=True)
    rows = "SELECT count(*) FROM prompts WHERE active"
    assert mine.value(rows) == 99
    ingest(mine, recipe, Home.here(), "again", lambda *_: None)
    assert mine.value(rows) == 99
    assert mine.query("SELECT text, active FROM prompts WHERE prompt_id = ?", [prompt.prompt_id]) == [
        {"text": None, "active": False}
    ]
    assert mine.query("SELECT line, raw, reason FROM quarantine") == [
        {"line": prompt.line, "raw": b"", "reason": "revoked"}
    ]
    found = trace(mine, accepted(mine, "r000")[0])
    assert found.prompt.text is None and found.draw.text is None and found.draw.tokens


def test_a_prompt_that_is_erased_while_its_source_is_read_does_not_come_back(mine, recipe, monkeypatch):
    prompt, without = trace(mine, accepted(mine, "r000")[0]).prompt.prompt_id, revocations.without
    mine.commit(lambda connection: connection.execute("UPDATE prompts SET source_digest = 'of before'"))

    def erased_meanwhile(*given):
        read = without(*given)
        if not mine.query(revocations.ANY):
            revoke(mine, ids.thing(mine, prompt), who="me", why="the law", erase=True)
        return read

    monkeypatch.setattr(revocations, "without", erased_meanwhile)
    ingest(mine, recipe, Home.here(), "again", lambda *_: None)
    rows = mine.query("SELECT text, active, source_digest FROM prompts WHERE prompt_id = ?", [prompt])
    assert rows == [{"text": None, "active": False, "source_digest": "of before"}]
    assert mine.value("SELECT count(*) FROM prompts WHERE active AND source_digest <> 'of before'") == 99


def test_a_revocation_needs_a_name_and_a_reason(mine):
    with pytest.raises(AuditError, match="somebody who is responsible"):
        revoke(mine, ids.thing(mine, "answer"), who=" ", why="because")
    with pytest.raises(AuditError, match="a scorer has no text to erase"):
        revoke(mine, ids.thing(mine, "answer"), who="me", why="because", erase=True)


def test_what_was_revoked_is_told_where_the_past_could_not_be_forgotten(mine, monkeypatch):
    def busy(store):
        raise StoreError("somebody was reading")

    monkeypatch.setattr(Store, "forget", busy)
    words = ["audit", "revoke", accepted(mine, "r001")[0], "--by", "me", "--why", "asked to", "--erase", "--forget"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, StoreError) and done.stdout.startswith("revoked: candidate")
    assert "older snapshots still have them" in done.stdout


# --- export ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_an_export_is_the_training_set_to_the_byte_and_others_can_read_it(there, tmp_path, form):
    mlc = pytest.importorskip("mlcroissant")
    pytest.importorskip("openlineage.client")
    made = there.query("SELECT * FROM checkpoints WHERE round = 'r001'")[0]
    killed = tmp_path / "out" / PARTIAL
    killed.mkdir(parents=True)
    (killed / "croissant.json").write_text('{"name')
    done = export(there, made["checkpoint"][:10], tmp_path / "out", form)
    assert done.notes == [] and len(done.files) == 3
    assert {*map(str, (tmp_path / "out").iterdir())} == {*done.files}
    read = "read_parquet" if form == "parquet" else "read_json"
    rows = there.query(f"SELECT * FROM {read}(?)", [done.files[0]])
    assert list(rows[0]) == list(COLUMNS)
    assert [row["candidate_id"] for row in rows] == accepted(there, "r001")
    leaves = there.arrow(f"SELECT leaf FROM {read}(?) ORDER BY candidate_id", [done.files[0]])["leaf"]
    assert merkle.root(leaves) == json.loads(made["meta"])["merkle_root"]
    if form == "parquet":  # and by those who have nothing but the file and the page
        (shown,) = re.findall(r"```python\n(import hashlib.*?)```", (DOCS / "audit.md").read_text("utf-8"), re.DOTALL)
        computed = subprocess.run([sys.executable, "-c", shown, done.files[0]], capture_output=True, text=True)
        assert computed.stdout.strip() == json.loads(made["meta"])["merkle_root"], computed.stderr
    assert {json.loads(row["scores"])["answer"]["value"] for row in rows} == {1.0}

    described = mlc.Dataset(jsonld=tmp_path / "out" / "croissant.json")
    assert not described.metadata.ctx.issues.errors
    assert described.metadata.ctx.is_v1_1()  # the first with arrays
    records = list(described.records("samples"))
    assert [one["samples/candidate_id"].decode() for one in records] == [row["candidate_id"] for row in rows]
    assert list(records[0]["samples/token_ids"]) == rows[0]["token_ids"]

    events = [json.loads(line) for line in (tmp_path / "out" / "openlineage.jsonl").read_text().splitlines()]
    assert len(events) == 2 * 4 * 2 + 1  # a start and an end of four steps of two rounds, and the export
    trained = [event for event in events if event["job"]["name"] == f"{NAME}.checkpoint"][-1]
    assert trained["outputs"][0]["name"] == f"weights/{made['checkpoint']}"
    assert {one["name"] for one in trained["inputs"]} == {f"{NAME}/r001/accepted", f"weights/{made['parent']}"}
    assert events[-1]["outputs"][0]["name"] == done.files[0]
    with pytest.raises(AuditError, match="is not an empty folder"):
        export(there, made["checkpoint"], Path(tmp_path / "out"), form)


def test_an_export_calls_a_scorer_that_was_renamed_as_its_round_did(mine, tmp_path):
    made = rounds.history(mine, NAME)[1]
    renamed = "INSERT INTO scores SELECT * REPLACE ('judge' AS scorer) FROM scores WHERE scorer = 'answer'"
    mine.commit(lambda connection: connection.execute(renamed))
    for folder in ("there", "forgotten"):
        file = export(mine, made["checkpoint"], tmp_path / folder).files[0]
        rows = mine.query("SELECT scores FROM read_parquet(?)", [file])
        assert {frozenset(json.loads(row["scores"])) for row in rows} == {frozenset({"answer", "combined"})}
        mine.forget()


def test_an_export_takes_a_recipe_and_a_round_for_the_checkpoint_that_it_made(there, ran, tmp_path, monkeypatch):
    monkeypatch.setenv("RSFT_HOME", str(ran / "home"))
    words = ["audit", "export", NAME, "r001", "--to", str(tmp_path / "out"), "--json"]
    told = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).stdout)
    assert told["checkpoint"] == rounds.history(there, NAME)[1]["checkpoint"]


def test_what_is_exported_is_a_checkpoint_whatever_else_begins_so(mine, tmp_path):
    made = rounds.history(mine, NAME)[1]["checkpoint"]
    mine.append("candidates", [{"recipe": NAME, "round": "r000", "candidate_id": f"{made[:8]}{'f' * 24}"}])
    assert export(mine, made[:8], tmp_path / "out").checkpoint == made
    with pytest.raises(AuditError, match="is a candidate, not a checkpoint"):
        export(mine, accepted(mine, "r001")[0], tmp_path / "other")


def test_where_two_rounds_gave_the_same_weights_each_has_its_own_samples(mine, tmp_path):
    first, second = (row["checkpoint"] for row in rounds.history(mine, NAME))
    for table in ("checkpoints", "training_samples", "rounds"):
        same = f"UPDATE {table} SET checkpoint = ? WHERE checkpoint = ? AND round = 'r001'"
        mine.commit(lambda connection, same=same: connection.execute(same, [first, second]))
    for key in ("r000", "r001"):
        words = ["audit", "export", NAME, key, "--to", str(tmp_path / key), "--json"]
        told = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).stdout)
        rows = mine.query("SELECT candidate_id FROM read_parquet(?)", [told["files"][0]])
        assert (told["round"], [row["candidate_id"] for row in rows]) == (key, accepted(mine, key))
    found = impact(mine, ids.thing(mine, accepted(mine, "r000")[0]))
    assert [(one.round, one.samples) for one in found.checkpoints] == [("r000", 1), ("r001", 0)]


def test_the_sources_of_a_round_are_those_of_the_prompts_that_it_asked(mine, recipe, tmp_path):
    made = rounds.history(mine, NAME)[1]["checkpoint"]
    before = read_by(events(mine, made, tmp_path / "before")["r000/candidates"][0])
    later = {"recipe": NAME, "prompt_id": "later", "source": "added_since.jsonl", "split": "train", "active": True}
    mine.append("prompts", [later])
    mine.commit(lambda connection: connection.execute("UPDATE prompts SET source = 'renamed.jsonl' WHERE line > 9"))
    assert read_by(events(mine, made, tmp_path / "after")["r000/candidates"][0]) == before


def events(store, checkpoint, folder):
    """The events of an export, but for its own, by what is written: table or weights."""
    pytest.importorskip("openlineage.client")
    export(store, checkpoint, folder)
    found = {}
    for line in (folder / "openlineage.jsonl").read_text().splitlines()[:-1]:
        event = json.loads(line)
        found.setdefault(event["outputs"][0]["name"].removeprefix(f"{NAME}/"), []).append(event)
    return found


def read_by(event):
    return {one["name"].removeprefix(f"{NAME}/") for one in event["inputs"]}


def test_the_events_of_an_attempt_that_was_begun_again_are_that_attempts(mine, recipe, tmp_path):
    then = rounds.history(mine, NAME)[1]
    rounds.begin(mine, replace(rounds.record(mine, recipe, "r001"), policy="other", drawn_from="other"), "again")
    found = events(mine, then["checkpoint"], tmp_path / "superseded")
    (start,) = found["r001/candidates"]  # when it ended is not known any more
    began = then["started_at"].replace(microsecond=then["started_at"].microsecond // 1000 * 1000)
    assert (start["eventType"], datetime.fromisoformat(start["eventTime"])) == ("START", began)
    assert f"weights/{then['policy']}" in read_by(start) and "weights/other" not in read_by(start)
    assert [event["eventType"] for event in found["r000/candidates"]] == ["START", "COMPLETE"]
    mine.forget()
    found = events(mine, then["checkpoint"], tmp_path / "forgotten")
    assert [event["eventType"] for event in found["r001/candidates"]] == ["OTHER"]


def test_the_events_of_a_checkpoint_that_learned_from_all_rounds_are_those_of_all_rounds(mine, tmp_path):
    first, second = rounds.history(mine, NAME)
    base, made = first["policy"], second["checkpoint"]
    alone = "UPDATE checkpoints SET parent = ?, policy = ?, drawn_from = ? WHERE checkpoint = ?"
    mine.commit(lambda connection: connection.execute(alone, [base, base, base, made]))
    assert "r000/accepted" not in events(mine, made, tmp_path / "round")
    every = "UPDATE checkpoints SET meta = json_merge_patch(meta, ?) WHERE checkpoint = ?"
    mine.commit(lambda connection: connection.execute(every, [json.dumps({"training": {"data": "all_rounds"}}), made]))
    found = events(mine, made, tmp_path / "all_rounds")
    assert {"r000/candidates", "r000/scores", "r000/accepted"} < found.keys()
    assert read_by(found[f"weights/{made}"][0]) == {"r000/accepted", "r001/accepted", f"weights/{base}"}


def test_the_export_of_a_control_calls_nothing_accepted(mine, tmp_path):
    pytest.importorskip("mlcroissant")
    everything(mine)
    found = events(mine, "a11a", tmp_path / "parquet")
    assert "r000/candidates" in read_by(found["weights/a11a"][0])
    assert "of a control" not in json.dumps(found["r000/accepted"])
    export(mine, "a11a", tmp_path / "jsonl", "jsonl")
    (line,) = (tmp_path / "jsonl" / "training_set.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row["log_a"] is None and row["reason"] == "below threshold"
    description = json.loads((tmp_path / "jsonl" / "croissant.json").read_text())["description"]
    assert "1 candidates (a control: everything)" in description
