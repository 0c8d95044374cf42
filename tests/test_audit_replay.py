"""Replay, verify, what-if and diff, on two rounds that really ran, and on what somebody then changed in them."""

import hashlib
import json
import sqlite3
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import RECIPE, run_round, run_rounds
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from cli.main import app
from rsft_pipeline import lineage, merkle, rounds
from rsft_pipeline.audit.diff import diff
from rsft_pipeline.audit.ids import AuditError, thing
from rsft_pipeline.audit.replay import replay
from rsft_pipeline.audit.revoke import revoke
from rsft_pipeline.audit.trace import trace
from rsft_pipeline.audit.verify import find, verify
from rsft_pipeline.audit.whatif import whatif
from rsft_pipeline.devices import Device
from rsft_pipeline.home import Home
from rsft_pipeline.models import checkpoints
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.section import RecipeError
from rsft_pipeline.rounds import RoundError
from rsft_pipeline.steps import evaluate
from rsft_pipeline.steps.decide import decide
from rsft_pipeline.steps.rows import training_rows
from rsft_pipeline.steps.train import train
from rsft_pipeline.store import Store
from web.app import create

NAME = "letters_loop"
CPU = Device("cpu", "float32")


@pytest.fixture(scope="module")
def ran(tmp_path_factory, tracking_database):
    """The folder of a home in which two rounds have run with a control, and the recipe beside it."""
    return run_rounds(tmp_path_factory.mktemp("ran"), tracking_database, RECIPE + "controls: [random]\n")


@pytest.fixture
def recipe(ran):
    return load(ran / f"{NAME}.yaml")


def replayed(store, recipe, round_key="r000", forced=0, **more):
    return replay(store, recipe, round_key, Home.here(), nullcontext(CPU), forced=forced, **more)


def verified(store, round_key="r000", **more):
    return verify(store, find(store, NAME, round_key), Home.here(), **more)


def checks(answer):
    return {check.name: (check.compared, check.differing) for check in answer.checks}


def change(store, sql, *values):
    store.commit(lambda connection: connection.execute(sql, values))


def some(store, where="d.accepted"):
    """A candidate of r000."""
    return store.query(
        f"""SELECT d.*, c.text, c.token_ids, s.value FROM decisions d
            JOIN candidates c ON c.candidate_id = d.candidate_id
            JOIN scores s ON s.candidate_id = d.candidate_id AND s.scorer = 'combined'
            WHERE d.round = 'r000' AND {where} ORDER BY d.candidate_id LIMIT 1"""
    )[0]


# --- rounds as they were ----------------------------------------------------------------------


def test_every_decision_replays_and_every_row_is_what_was_trained_on(mine, recipe):
    before = mine.snapshot()
    for key in ("r000", "r001"):
        answer = replayed(mine, recipe, key, forced=64)
        decided = mine.value("SELECT count(*) FROM decisions WHERE round = ?", [key])
        assert (answer.findings, answer.ok) == ([], True)
        assert answer.replayed == answer.decisions == decided > 300
        prompts = mine.value("SELECT count(DISTINCT prompt_id) FROM decisions WHERE round = ?", [key])
        of_eval = "FROM evaluations WHERE round = ?"
        evaluated = mine.value(f"SELECT count(*) {of_eval}", [key])
        asked = mine.value(f"SELECT count(DISTINCT prompt_id) {of_eval}", [key])
        answers = mine.value(f"SELECT count(DISTINCT checkpoint) * {asked} * 8 {of_eval}", [key])
        assert checks(answer) == {
            "candidates, each there once": (decided, 0),
            "ids, computed again": (decided, 0),
            "seeds, computed again": (decided, 0),
            "the rule's numbers": (len(answer.parameters), 0),
            "decisions replayed, to the bit": (decided, 0),
            "combined scores, from single ones": (decided, 0),
            "prompts, hashed again": (prompts, 0),
            "scorer answer": (decided, 0),
            "ids of held-out candidates, computed again": (answers, 0),
            "seeds of held-out candidates, computed again": (answers, 0),
            "held-out results, counted again": (evaluated, 0),
            "the verdict of the gate": (1, 0),
            "what the round came to": (10, 0),
            "lengths": (decided, 0),
            "origins": (decided, 0),
            "lengths of held-out candidates": (answers, 0),
            "origins of held-out candidates": (answers, 0),
            "prompts of held-out candidates, hashed again": (asked, 0),
            "scorer answer of held-out candidates": (answers, 0),
            "texts of held-out candidates, decoded again": (answers, 0),
            "weights, hashed again": (1, 0),
            "texts, decoded again": (decided, 0),
            "log_p, by teacher forcing": (64, 0),
            "log_q, by teacher forcing": (64, 0),
        }
        found = verified(mine, key)
        assert (found.findings, found.ok) == ([], True)
        assert found.root == found.recorded_root
        control = find(mine, json.loads(rounds.row_of(mine, NAME, key)["controls"])["random"])
        assert control["trained_on"] == "random"
        assert verify(mine, control, Home.here()).findings == []
    assert mine.snapshot() == before  # nothing was written


def leaf(row):
    """A leaf as the documentation has it, without SQL."""
    prompt = "\n".join([row["prompt_id"], str(row["chat"]).lower(), row["prompt"]])
    score = "NULL" if row["score"] is None else f"{row['score']:.17e}"
    lines = [row["candidate_id"], row["round"], f"{row['weight']:.17e}", score]
    lines += [",".join(map(str, row["token_ids"])), hashlib.sha256(prompt.encode()).hexdigest(), row["text"]]
    return hashlib.sha256(b"\0" + "\n".join(lines).encode()).digest()


def tree(leaves):
    """MTH of RFC 6962, section 2.1, on hashes of leaves."""
    if len(leaves) < 2:
        return leaves[0] if leaves else hashlib.sha256().digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + tree(leaves[:k]) + tree(leaves[k:])).digest()


def test_the_root_is_that_of_rfc_6962():
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    leaves = [hashlib.sha256(b"\0" + bytes.fromhex(data)).hexdigest() for data in inputs]
    # The reference vector of Certificate Transparency's own tests.
    known = "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
    assert merkle.root(pa.chunked_array([leaves[:3], [], leaves[3:]])) == known
    for n in range(40):
        leaves = [hashlib.sha256(bytes([n, i])).digest() for i in range(n)]
        assert merkle.root(pa.chunked_array([[one.hex() for one in leaves]], pa.string())) == tree(leaves).hex()


def test_the_root_stands_in_meta_card_store_and_mlflow_and_follows_from_the_rows(mine, recipe):
    from mlflow import MlflowClient

    made = find(mine, NAME, "r000")
    sql, given = training_rows(NAME, "r000", recipe)
    rows = mine.query(f"SELECT * FROM ({sql}) ORDER BY candidate_id", given)
    root = tree([leaf(row) for row in rows]).hex()
    folder = Home.here().checkpoints / made["checkpoint"]
    assert json.loads((folder / "meta.json").read_text())["merkle_root"] == root
    assert f"`{root}`" in (folder / "README.md").read_text()
    assert json.loads(made["meta"])["merkle_root"] == root
    client = MlflowClient(f"sqlite:///{Home.here().mlflow / 'mlflow.db'}")
    assert client.get_run(made["mlflow_run_id"]).data.tags["rsft.merkle_root"] == root
    stored = mine.query(
        "SELECT candidate_id, leaf FROM training_samples WHERE checkpoint = ? ORDER BY 1", [made["checkpoint"]]
    )
    assert [one["leaf"] for one in stored] == [leaf(row).hex() for row in rows]


RULES = [
    {"rule": "threshold", "threshold": 0.5, "cap": 1},
    {"rule": "top_k", "k": 1},
    {"rule": "quantile", "share": 0.25},
    {"rule": "rejection", "M": "estimate", "safety": 1.5, "distinct": False},
    {"rule": "boltzmann", "beta": 0.5, "r_max": 1.0},
    {"rule": "loss", "k": 2.0},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["rule"])
def test_whatif_is_what_the_rule_then_decides_and_that_replays(mine, recipe, rule):
    rule = {"cap": None, **rule}  # otherwise the recipe's own `cap` would stay
    told = {f"acceptance.{name}": json.dumps(value) for name, value in rule.items()}
    was = mine.query("SELECT candidate_id, accepted FROM decisions WHERE round = 'r000'")
    snapshot = mine.snapshot()
    answer = whatif(mine, recipe, "r000", told)
    assert mine.snapshot() == snapshot and answer.notes == ()

    settings = {**recipe.model_dump(mode="json"), "acceptance": rule}
    written = "UPDATE rounds SET settings = ?, recipe_digest = ? WHERE round = 'r000'"
    change(mine, written, json.dumps(settings), lineage.digest(settings))
    decide(mine, rounds.record(mine, recipe, "r000"), "again")
    then = {row["candidate_id"]: row for row in mine.query("SELECT * FROM decisions WHERE round = 'r000'")}
    pairs = [(row["accepted"], then[row["candidate_id"]]["accepted"]) for row in was]
    assert vars(answer.agreement) | {"only_was_ids": (), "only_would_ids": ()} == {
        "both": pairs.count((True, True)),
        "only_was": pairs.count((True, False)),
        "only_would": pairs.count((False, True)),
        "neither": pairs.count((False, False)),
        "only_was_ids": (),
        "only_would_ids": (),
    }
    kept = [row for row in then.values() if row["accepted"]]
    per_prompt = [sum(r["prompt_id"] == p for r in kept) for p in {r["prompt_id"] for r in then.values()}]
    assert answer.would.per_prompt == {n: per_prompt.count(n) for n in sorted(set(per_prompt))}
    assert (answer.would.accepted, answer.would.rate) == (len(kept), len(kept) / len(then))
    assert answer.would.score == pytest.approx(np.mean([row["score"] for row in kept]))
    assert answer.would.parameters == json.loads(kept[0]["parameters"])

    drawn = mine.query("SELECT candidate_id, text FROM candidates WHERE round = 'r000'")
    text = {row["candidate_id"]: lineage.normalise(row["text"]) for row in drawn}
    texts = {(row["prompt_id"], text[row["candidate_id"]]) for row in kept}
    ended = "UPDATE rounds SET accepted = ?, distinct_accepted = ? WHERE round = 'r000'"  # as the round's end writes it
    change(mine, ended, len(kept), len(texts))
    if rule.get("M") == "estimate":  # as recorded when M was estimated from the whole pilot, whatever its gates
        was = "UPDATE decisions SET parameters = json_merge_patch(parameters, ?) WHERE round = 'r000'"
        numbers = {"pilot_candidates": None, "violations": 99}
        change(mine, was, json.dumps(numbers))
        assert replayed(mine, recipe, judged=0).findings == []
        change(mine, was, json.dumps({name: answer.would.parameters[name] for name in numbers}))
    again = replayed(mine, recipe, judged=0)
    assert (again.findings, again.replayed) == ([], len(then))

    # After an erasure, decisions on the same prompt are not compared; those on other prompts are.
    one, other = mine.query("SELECT min(candidate_id) AS id FROM decisions WHERE round = 'r000' GROUP BY prompt_id")[:2]
    change(mine, "UPDATE candidates SET text = NULL, token_ids = NULL WHERE candidate_id = ?", one["id"])
    assert replayed(mine, recipe, judged=0).findings == []
    flip = "UPDATE decisions SET accepted = NOT accepted WHERE candidate_id = ?"
    change(mine, flip, other["id"])
    assert not replayed(mine, recipe, judged=0).ok
    change(mine, flip, other["id"])

    number = {"rejection": "log_M", "quantile": "cut"}.get(rule["rule"])
    if number:
        wrong = {**again.parameters, number: again.parameters[number] + 1}
        change(mine, "UPDATE decisions SET parameters = ? WHERE round = 'r000'", json.dumps(wrong))
        assert any(f.kind == "rule" and f"{number} was" in f.what for f in replayed(mine, recipe, judged=0).findings)


def test_whatif_sets_aside_what_is_revoked_by_now(mine, recipe):
    told = {"acceptance.threshold": "-1", "acceptance.cap": "null", "acceptance.distinct": "false"}
    before = whatif(mine, recipe, "r000", told)
    at_once = whatif(mine, recipe, "r000", {"acceptance": "{threshold: -1, cap: null, distinct: false}"})
    assert at_once.would == before.would
    prompt = some(mine)["prompt_id"]
    draws = mine.value("SELECT count(*) FROM decisions WHERE round = 'r000' AND prompt_id = ?", [prompt])
    revoke(mine, thing(mine, prompt), who="ann", why="asked to")
    after = whatif(mine, recipe, "r000", told)
    assert before.would.accepted == before.candidates == after.candidates
    assert after.would.accepted == after.candidates - draws
    assert after.would.reasons == {"accepted": after.would.accepted, "revoked": draws}
    assert after.was == before.was


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"acceptance.treshold": "1"}, "unknown field. Did you mean 'threshold'?"),
        (
            {"acceptance.rule": "treshold"},
            r"acceptance.rule: got 'treshold'. Did you mean 'threshold'\? Expected one of: thr",
        ),
        ({"acceptance.rule": "boltzmann"}, r"acceptance.beta: this field is required"),
        ({"sampling.draws": "2"}, "only the rule can be asked about"),
        ({"acceptance": "2"}, "only the rule can be asked about"),
        ({"acceptance.threshold": "["}, r"--set acceptance.threshold: '\[' is not YAML"),
        ({"acceptance": "{rule: rejection, target: answer}"}, "whose scores are no log-probabilities"),
        ({"acceptance.rule": "rejection", "acceptance.pilot": "9"}, "pilot is 9, which is every draw"),
    ],
)
def test_a_rule_that_is_none_is_refused_by_name(mine, recipe, told, said):
    with pytest.raises(AuditError, match=said):
        whatif(mine, recipe, "r000", told)


def test_diff_is_what_the_rows_say(mine, recipe):
    answer = diff(mine, recipe, "r000", "r001")
    assert answer.notes == ()
    rates = []
    for key in ("r000", "r001"):
        rows = mine.query(
            """SELECT prompt_id, avg((accepted OR reason IN ('duplicate', 'cap'))::INTEGER) AS rate
               FROM decisions WHERE round = ? GROUP BY ALL""",
            [key],
        )
        rates.append({row["prompt_id"]: row["rate"] for row in rows})
    shared = rates[0].keys() & rates[1].keys()
    drawn = answer.drawn
    assert (drawn.shared, drawn.only_before, drawn.only_after) == (len(shared), 0, 0)
    assert drawn.solved == sum(rates[0][p] == 0 < rates[1][p] for p in shared)
    assert drawn.lost == sum(rates[1][p] == 0 < rates[0][p] for p in shared)
    moved = {change.prompt_id: change.after - change.before for change in drawn.most_changed}
    assert moved == {p: rates[1][p] - rates[0][p] for p in moved}
    assert min(map(abs, moved.values())) >= max(
        (abs(rates[1][p] - rates[0][p]) for p in shared - moved.keys()), default=0
    )
    shift = {one.what: one for one in drawn.shifts}["share that the rule accepts"]
    assert shift.difference == pytest.approx(np.mean([rates[1][p] - rates[0][p] for p in shared]))
    assert shift.low <= shift.difference <= shift.high
    # The checkpoints' own held-out results, paired: the same numbers as the rounds recorded.
    recorded = [json.loads(row["checkpoint_eval"]) for row in rounds.history(mine, NAME)]
    held_out = {one.what: one for one in answer.held_out.shifts}
    assert held_out["share that passes"].before == pytest.approx(recorded[0]["pass_at_1"]["value"])
    assert held_out["share that passes"].after == pytest.approx(recorded[1]["pass_at_1"]["value"])
    assert held_out["score"].after == pytest.approx(recorded[1]["mean_score"]["value"])
    stricter = json.dumps({"evaluation": {"pass_above": 0.9}})
    change(mine, "UPDATE rounds SET settings = json_merge_patch(settings, ?) WHERE round = 'r001'", stricter)
    assert diff(mine, recipe, "r000", "r001").notes == ("`evaluation.pass_above` is 0.5 in r000, 0.9 in r001",)


def test_diff_says_why_rounds_have_no_prompt_in_common(mine, recipe):
    for table in ("candidates", "round_prompts"):
        change(mine, f"UPDATE {table} SET prompt_id = reverse(prompt_id) WHERE round = 'r001' AND split = 'train'")
    answer = diff(mine, recipe, "r000", "r001")
    assert answer.drawn.shared == 0 < answer.drawn.only_after and "no prompt is in both" in answer.notes[0]


# --- rows that somebody changed ---------------------------------------------------------------

TAMPERED = {
    "a single score": ("UPDATE scores SET value = 1 - value WHERE scorer = 'answer' AND candidate_id = ?", "scorer"),
    "a combined score": ("UPDATE scores SET value = value / 2 WHERE scorer = 'combined' AND candidate_id = ?", "data"),
    "a score as decided": ("UPDATE decisions SET score = 0.99 WHERE candidate_id = ?", "data"),
    "a decision": ("UPDATE decisions SET accepted = false, reason = 'cap' WHERE candidate_id = ?", "rule"),
    "a weight": ("UPDATE decisions SET weight = 2 WHERE candidate_id = ?", "rule"),
    "u": ("UPDATE decisions SET u = u / 2 WHERE candidate_id = ?", "data"),
    "a text": ("UPDATE candidates SET text = text || ' ' WHERE candidate_id = ?", "data"),
    "a token": (
        "UPDATE candidates SET token_ids = list_concat([token_ids[1] % 9 + 1], token_ids[2:]) WHERE candidate_id = ?",
        "data",
    ),
    "a seed": ("UPDATE candidates SET seed = seed + 1 WHERE candidate_id = ?", "data"),
    "a length": ("UPDATE candidates SET tokens = tokens + 1 WHERE candidate_id = ?", "data"),
    "an origin": ("UPDATE candidates SET origin = 'reference' WHERE candidate_id = ?", "data"),
    "a draw": ("UPDATE candidates SET draw = (draw + 1) % 6 WHERE candidate_id = ?", "data"),
    "a log-probability": ("UPDATE candidates SET log_p = log_p - 0.1 WHERE candidate_id = ?", "weights"),
    "a candidate gone": ("DELETE FROM candidates WHERE candidate_id = ?", "data"),
    "a decision gone": ("DELETE FROM decisions WHERE candidate_id = ?", "data"),
    "a candidate twice": ("INSERT INTO candidates SELECT * FROM candidates WHERE candidate_id = ?", "data"),
}
# What training does not take: the others are of rows that were trained on, and `verify` names them too.
NOT_TRAINED_ON = {
    "a single score", "a combined score", "u", "a seed", "a length", "an origin", "a draw", "a log-probability"
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_a_changed_row_is_named(mine, recipe, what):
    sql, kind = TAMPERED[what]
    candidate = mine.value("SELECT min(candidate_id) FROM decisions WHERE accepted AND round = 'r000'")
    change(mine, sql, candidate)
    of_all = mine.value("SELECT count(*) FROM candidates WHERE round = 'r000'")
    answer = replayed(mine, recipe, forced=of_all if kind == "weights" else 0)
    assert not answer.ok
    assert any(finding.kind == kind and candidate in finding.ids for finding in answer.findings), answer.findings
    found = verified(mine)
    if what in NOT_TRAINED_ON:
        assert found.ok
    else:
        assert [finding.ids for finding in found.findings] == [(candidate,)]
        assert "since the snapshot" in found.findings[0].what


HELD_OUT = {
    "a text": ("UPDATE candidates SET text = text || 'b' WHERE candidate_id = ?", "stored tokens spell"),
    "a score": ("UPDATE scores SET value = 1 - value WHERE candidate_id = ?", "recorded results"),
    "a seed": ("UPDATE candidates SET seed = seed + 1 WHERE candidate_id = ?", "seeds"),
    "a candidate gone": ("DELETE FROM candidates WHERE candidate_id = ?", "recorded results"),
    "a result": ("UPDATE evaluations SET passes = 8 - passes WHERE prompt_id = ?", "recorded results"),
    "a verdict": ("UPDATE rounds SET promoted = NOT promoted WHERE recipe || ? IS NOT NULL", "verdict"),
}


@pytest.mark.parametrize("what", HELD_OUT)
def test_a_changed_row_of_the_evaluation_is_named(mine, recipe, what):
    sql, said = HELD_OUT[what]
    one = mine.query(
        """SELECT c.candidate_id, c.prompt_id FROM candidates c JOIN evaluations e ON e.prompt_id = c.prompt_id
           AND e.checkpoint = c.policy AND e.round = 'r000' AND e.role = 'checkpoint' AND e.passes <> 4
           ORDER BY c.candidate_id LIMIT 1"""
    )[0]
    change(mine, sql, one["prompt_id" if what == "a result" else "candidate_id"])
    findings = [finding for finding in replayed(mine, recipe).findings if said in finding.what]
    assert findings
    if what != "a verdict":
        assert any(set(one.values()) & set(finding.ids) for finding in findings)


def test_a_prompt_that_was_changed_is_named_and_one_with_a_new_reference_is_only_noted(mine, recipe):
    prompt = some(mine)["prompt_id"]
    change(mine, "UPDATE prompts SET reference = 'z' WHERE prompt_id = ?", prompt)
    findings = replayed(mine, recipe).findings
    assert {(f.kind, f.ids) for f in findings if "prompts (by prompt id)" in f.what} == {("data", (prompt,))}
    # As `prompts` would write it when the source has another reference.
    row = mine.query("SELECT * FROM prompts WHERE prompt_id = ?", [prompt])[0]
    content = lineage.digest([row["text"], "z", json.loads(row["fields"])])
    change(mine, "UPDATE prompts SET content = ? WHERE prompt_id = ?", content, prompt)
    answer = replayed(mine, recipe)
    assert answer.ok
    assert any("have another reference" in check.note for check in answer.checks)


def test_a_scorer_that_changed_is_told_and_no_difference(mine, recipe):
    versions = json.loads(rounds.row_of(mine, NAME, "r000")["scorers"])
    change(mine, "UPDATE scores SET version = 'older' WHERE scorer = 'answer' AND round = 'r000'")
    older = json.dumps({**versions, "answer": "older"})
    change(mine, "UPDATE rounds SET scorers = ? WHERE round = 'r000'", older)
    answer = replayed(mine, recipe)
    assert answer.ok
    (check,) = [check for check in answer.checks if check.name == "scorer answer"]
    assert check.differing is None
    assert check.note == f"the scorer has changed: its version was older, is {versions['answer']}"


def test_one_byte_of_the_weights_is_named_by_both(mine, recipe):
    made = find(mine, NAME, "r000")
    file = Home.here().checkpoints / made["checkpoint"] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for answer in (replayed(mine, recipe, "r001", judged=0), verified(mine)):
        (finding,) = answer.findings
        assert (finding.kind, "model.safetensors" in finding.what) == ("weights", True)


def test_a_root_that_was_changed_in_one_place_is_named_with_that_place(mine):
    made = find(mine, NAME, "r000")
    file = Home.here().checkpoints / made["checkpoint"] / "meta.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({**meta, "merkle_root": "0" * 64}))
    (finding,) = verified(mine).findings
    assert f"{file} says {'0' * 64}" in finding.what
    file.write_text(json.dumps(meta))
    (finding,) = verified(mine, witnesses={"MLflow": "1" * 64}).findings
    assert f"MLflow says {'1' * 64}" in finding.what


def test_a_page_asks_for_the_root_elsewhere_too(mine):
    checkpoint = find(mine, NAME, "r000")["checkpoint"]
    app = create(mine, Home.here(), witnesses=lambda made: {"MLflow": f"the root of {made['round']}"})
    with TestClient(app, base_url="http://127.0.0.1") as client:
        page = client.get(f"/recipes/{NAME}/checkpoints/{checkpoint}?verify=1").text
    assert "MLflow says the root of r000" in page


def test_leaves_that_were_changed_with_or_without_their_rows_do_not_pass(mine):
    candidate = some(mine)["candidate_id"]
    change(mine, "UPDATE training_samples SET leaf = sha256('x') WHERE candidate_id = ?", candidate)
    (finding,) = verified(mine).findings
    assert "the rows at the snapshot still have the root" in finding.what and finding.ids == (candidate,)
    change(mine, "DELETE FROM training_samples WHERE candidate_id = ?", candidate)
    counted, finding = verified(mine).findings
    assert "by `training_samples`" in counted.what
    assert "rows of `training_samples` are gone" in finding.what and finding.ids == (candidate,)


def test_rows_of_now_that_were_changed_with_their_leaves_or_are_there_twice_are_told_by_the_root(mine, recipe):
    mine.forget()
    candidate, (sql, given) = some(mine)["candidate_id"], training_rows(NAME, "r000", recipe)
    change(mine, "INSERT INTO candidates SELECT * FROM candidates WHERE candidate_id = ?", candidate)
    (finding,) = verified(mine).findings
    assert "are there more than once" in finding.what and finding.ids == (candidate,)
    change(mine, "DELETE FROM candidates WHERE candidate_id = ?", candidate)
    (finding,) = verified(mine).findings
    assert "rows of now are gone" in finding.what and finding.ids == (candidate,)
    left = min(mine.query(sql, given), key=lambda row: row["candidate_id"])["candidate_id"]
    change(mine, "DELETE FROM training_samples WHERE candidate_id = ?", candidate)
    change(mine, "UPDATE candidates SET text = text || ' ' WHERE candidate_id = ?", left)
    (row,) = [row for row in mine.query(sql, given) if row["candidate_id"] == left]
    change(mine, "UPDATE training_samples SET leaf = ? WHERE candidate_id = ?", leaf(row).hex(), left)
    counted, finding = verified(mine).findings
    assert "by `training_samples`" in counted.what
    assert "the recorded leaves were changed along with the rows" in finding.what


def test_a_round_that_was_begun_again_and_what_was_revoked_are_no_findings(mine):
    made = find(mine, NAME, "r001")
    candidate = mine.value("SELECT min(candidate_id) FROM decisions WHERE accepted AND round = 'r001'")
    from rsft_pipeline.audit import ids

    revoke(mine, ids.thing(mine, candidate), who="me", why="because")
    answer, at_snapshot = verified(mine, "r001"), "rows at the snapshot, leaf by leaf and by the root"
    assert answer.ok and answer.checks[-1].note == "1 was revoked since"
    assert checks(answer)[at_snapshot] == (made["samples"], 0)
    assert checks(answer)["rows of now, against those at the snapshot"] == (made["samples"] - 1, 0)
    change(mine, "UPDATE rounds SET checkpoint = 'another' WHERE round = 'r001'")
    answer = verify(mine, made, Home.here())
    assert answer.ok and answer.checks[-1].differing is None and "begun again" in answer.checks[-1].note
    assert checks(answer)[at_snapshot] == (made["samples"], 0)
    mine.forget()
    answer = verify(mine, made, Home.here())
    assert answer.ok and "the snapshot was forgotten" in answer.checks[-1].note


def test_what_is_left_after_a_revocation_is_compared_where_the_snapshot_is_gone(mine):
    candidate = mine.value("SELECT min(candidate_id) FROM decisions WHERE accepted AND round = 'r001'")
    revoke(mine, thing(mine, candidate), who="me", why="because")
    mine.forget()
    answer = verified(mine, "r001")
    assert answer.ok and answer.root == answer.recorded_root
    assert checks(answer)["rows of now, leaf by leaf and by the root"] == (answer.samples - 1, 0)
    left = "SELECT min(candidate_id) FROM decisions WHERE accepted AND round = 'r001' AND candidate_id <> ?"
    other = mine.value(left, [candidate])
    change(mine, "UPDATE candidates SET text = text || ' ' WHERE candidate_id = ?", other)
    assert [finding.ids for finding in verified(mine, "r001").findings] == [(other,)]


def test_rows_that_were_all_revoked_are_not_said_to_have_been_compared(mine):
    revoke(mine, thing(mine, some(mine)["prompt_id"]), who="me", why="because")  # r001 drew from what learned it
    change(mine, "UPDATE candidates SET text = text || ' changed' WHERE round = 'r001'")
    answer = verified(mine, "r001")
    assert answer.checks[-1].differing is None and f"all {answer.samples} were revoked since" == answer.checks[-1].note
    mine.forget()
    answer = verified(mine, "r001")
    assert checks(answer)["recorded leaves, by the root"] == (answer.samples, 0) and answer.root == answer.recorded_root
    assert answer.checks[-1].differing is None and "all" in answer.checks[-1].note


def test_a_round_under_way_again_has_decided_nothing_yet(mine, recipe):
    candidate = some(mine)["candidate_id"]
    for key in ("r001", "r000"):  # the last first: nothing may stand on a round that is begun again
        rounds.begin(mine, rounds.record(mine, recipe, key), "again")
    answer = replayed(mine, recipe, judged=0)
    assert answer.findings == [] and answer.decisions == 0
    assert [check.note for check in answer.checks if check.name == "decisions replayed"] == [
        "nothing was decided in this round"
    ]
    with pytest.raises(AuditError, match="nothing was decided in this round"):
        whatif(mine, recipe, "r000", {"acceptance.cap": "1"})
    compared = diff(mine, recipe, "r000", "r001")
    assert compared.held_out is None
    assert compared.notes == ("r000 has decided nothing yet", "r001 has decided nothing yet")
    found = trace(mine, candidate)
    assert found.complete and found.decision is None and found.decision_then.accepted


def test_an_earlier_round_that_was_begun_again_explains_other_rows_where_all_rounds_are_learned_from(mine):
    everything = json.dumps({"training": {"data": "all_rounds"}})
    change(mine, "UPDATE rounds SET started_at = now() WHERE round = 'r000'")
    assert verified(mine, "r001").checks[-1].note == ""
    change(mine, "UPDATE rounds SET settings = json_merge_patch(settings, ?) WHERE round = 'r001'", everything)
    assert verified(mine, "r001").checks[-1].note == "r000, which it learned from too, was begun again since"


R000 = "round = 'r000' AND ? <> ''"
ITS_PROMPT = "prompt_id = (SELECT prompt_id FROM decisions WHERE candidate_id = ?)"
SINCE, LEAVES = "were changed since the snapshot", "rows of `training_samples` were changed, while"
BROKEN = {
    "a leaf that is no hash": ("UPDATE training_samples SET leaf = 'xyz' WHERE candidate_id = ?", LEAVES),
    "a weight that was trained with": ("UPDATE training_samples SET weight = 5 WHERE candidate_id = ?", LEAVES),
    "the record of a checkpoint": ("UPDATE checkpoints SET meta = '[' WHERE ? <> ''", "cannot be read or is empty"),
    "the snapshot of a checkpoint": ("UPDATE checkpoints SET snapshot = 3 WHERE ? <> ''", "snapshot 3, and its record"),
    "the samples of a checkpoint": ("UPDATE checkpoints SET samples = 7 WHERE ? <> ''", "samples 7, and its record"),
    "a round without a record": ("DELETE FROM rounds WHERE ? <> ''", "has no record of r000 any more"),
    "a parent, in its record too": (
        """UPDATE checkpoints SET parent = 'fee', meta = json_merge_patch(meta, '{"parent": "fee"}') WHERE ? <> ''""",
        "in `checkpoints` has another parent than its folder's",
    ),
    "its samples, in its record too": (
        """UPDATE checkpoints SET samples = 7, meta = json_merge_patch(meta, '{"samples": 7}') WHERE ? <> ''""",
        "the samples 7, and by `training_samples`",
    ),
    "the digest of its samples, in its record too": (
        """UPDATE checkpoints SET accepted_digest = 'fee', meta = json_merge_patch(meta, '{"accepted_digest": "fee"}')
        WHERE ? <> ''""",
        "the accepted_digest 'fee', and by `training_samples`",
    ),
    "what it was trained by": (
        """UPDATE checkpoints SET meta = json_merge_patch(meta, '{"training": {"epochs": 9}}') WHERE ? <> ''""",
        "in `checkpoints` has another training than its folder's",
    ),
    "the side of a prompt": (f"UPDATE prompts SET split = 'eval' WHERE {ITS_PROMPT}", SINCE),
    "the text of a prompt": (f"UPDATE prompts SET text = 'zz' WHERE {ITS_PROMPT}", SINCE),
    "the form of a prompt": (f"UPDATE prompts SET chat = true WHERE {ITS_PROMPT}", SINCE),
    "the score of a sample": ("UPDATE decisions SET score = 0.75 WHERE candidate_id = ?", SINCE),
    "a record of nothing": ("UPDATE checkpoints SET meta = '[]' WHERE ? <> ''", "cannot be read or is empty"),
    "a record without its root": (
        """UPDATE checkpoints SET meta = json_merge_patch(meta, '{"merkle_root": null}') WHERE ? <> ''""",
        "has the root (none), but",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_read_or_was_recorded_otherwise_is_a_finding_of_verify(mine, what):
    made = find(mine, NAME, "r000")["checkpoint"]
    sql, said = BROKEN[what]
    change(mine, sql, some(mine)["candidate_id"])
    answer = verify(mine, find(mine, made), Home.here())
    assert {finding.kind for finding in answer.findings} == {"data"}
    assert any(said in finding.what for finding in answer.findings), answer.findings


def test_a_record_of_another_form_is_a_finding_where_the_snapshot_is_gone(mine):
    change(mine, "UPDATE rounds SET settings = '[]' WHERE round = 'r000'")
    mine.forget()
    (finding,) = verified(mine).findings
    assert "`rounds` has no record of r000 at the snapshot" in finding.what


UNREADABLE = {
    "the fields of a prompt": f"UPDATE prompts SET fields = '{{' WHERE {ITS_PROMPT}",
    "the text that a prompt is the same as": f"UPDATE prompts SET same_text = 'x' WHERE {ITS_PROMPT}",
    "a token that the model does not have": "UPDATE candidates SET token_ids = [999999] WHERE candidate_id = ?",
    "a token below 0": "UPDATE candidates SET token_ids = [-1] WHERE candidate_id = ?",
    "a token that is none": "UPDATE candidates SET token_ids = [NULL] WHERE candidate_id = ?",
    "a summary of nothing": f"UPDATE rounds SET policy_eval = '{{}}' WHERE {R000}",
    "a rule": f"UPDATE decisions SET parameters = '{{}}' WHERE {R000}",
    "the champion": f"UPDATE rounds SET champion = policy WHERE {R000}",
    "the checkpoint": f"UPDATE rounds SET checkpoint = policy WHERE {R000}",
    "a summary": f"UPDATE rounds SET checkpoint_eval = replace(checkpoint_eval, '0.', '1.') WHERE {R000}",
    "a count": f"UPDATE rounds SET candidates = 1 WHERE {R000}",
    "a count of texts": f"UPDATE rounds SET distinct_accepted = 1 WHERE {R000}",
    "a setting": f"""UPDATE rounds SET settings = json_merge_patch(settings, '{{"training": {{"learning_rate": 9}}}}')
        WHERE {R000}""",
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_or_was_recorded_otherwise_is_a_finding_of_replay(mine, recipe, what):
    first = "SELECT min(candidate_id) FROM candidates WHERE round = 'r000' AND split = 'train'"  # is teacher-forced
    change(mine, UNREADABLE[what], mine.value(first))
    answer = replayed(mine, recipe, forced=2)
    assert {finding.kind for finding in answer.findings} == {"rule" if what == "a rule" else "data"}


@pytest.mark.parametrize("column", ["settings", "controls"])
def test_a_record_of_now_that_cannot_be_read_is_no_reason_not_to_verify(mine, column):
    change(mine, f"UPDATE rounds SET {column} = '{{' WHERE round = 'r001'")
    assert verified(mine, "r001").findings == []


def test_samples_from_before_there_were_leaves_are_compared_without(mine):
    change(mine, "UPDATE training_samples SET leaf = NULL")
    assert not verified(mine).ok
    for row in mine.query("SELECT DISTINCT checkpoint, meta FROM checkpoints"):
        meta = json.loads(row["meta"])
        del meta["merkle_root"]
        change(mine, "UPDATE checkpoints SET meta = ? WHERE checkpoint = ?", json.dumps(meta), row["checkpoint"])
        folder = Home.here().checkpoints / row["checkpoint"]
        saved = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({k: v for k, v in saved.items() if k != "merkle_root"}))
        (folder / "README.md").unlink()
    change(mine, "UPDATE checkpoints SET drawn_from = NULL, accepted_digest = NULL")  # columns that were added later
    assert verified(mine).findings == []
    change(mine, "UPDATE training_samples SET weight = 3 WHERE candidate_id = ?", some(mine)["candidate_id"])
    assert not verified(mine).ok


@pytest.mark.parametrize("gone", ["role = 'policy'", "role = 'checkpoint'", "true"])
def test_results_that_are_gone_are_a_finding_of_a_finished_round(mine, recipe, gone):
    change(mine, f"DELETE FROM evaluations WHERE round = 'r000' AND {gone}")
    assert any("the recorded results give no verdict" in one.what for one in replayed(mine, recipe, judged=0).findings)


@pytest.mark.parametrize("column", ["settings", "scorers"])
def test_a_record_that_cannot_be_read_is_named(mine, recipe, column):
    change(mine, f"UPDATE rounds SET {column} = '[' WHERE round = 'r000'")
    with pytest.raises((AuditError, rounds.RoundError), match="in `rounds` cannot be read"):
        replayed(mine, recipe)


@pytest.mark.parametrize("meta", [[], {"files": []}, {"files": {}, "digest": None}])
def test_a_folder_whose_record_is_none_is_a_finding(mine, meta):
    made = find(mine, NAME, "r000")["checkpoint"]
    (Home.here().checkpoints / made / "meta.json").write_text(json.dumps(meta))
    assert "weights" in {finding.kind for finding in verified(mine).findings}


@pytest.mark.parametrize("table", ["prompts", "training_samples"])
def test_commands_that_name_a_broken_file_are_not_stopped_by_it(mine, table):
    for file in (Home.here().path / "store").rglob(f"{table}/*.parquet"):
        file.write_bytes(file.read_bytes()[:-20])
    done = CliRunner().invoke(app, ["audit", "verify", NAME, "r001"])
    assert done.exit_code == 1 and f"of the table {table} cannot be read" in done.stdout


def test_a_recipe_whose_file_is_gone_is_asked_about_as_it_was_recorded(mine, recipe):
    assert not (Home.here().recipes / f"{NAME}.yaml").exists()
    for words in (["diff", NAME, "r000", "r001"], ["whatif", NAME, "r000", "--set", "acceptance.cap=1"]):
        done = CliRunner().invoke(app, ["audit", *words, "--json"])
        assert done.exit_code == 0 and json.loads(done.stdout)["recipe"] == NAME
        assert f"using {NAME} as r00{int(words[0] == 'diff')} recorded it" in done.stderr
    assert rounds.recorded(mine, recipe.file, "r000") == recipe
    done = CliRunner().invoke(app, ["audit", "replay", NAME, "r000"])
    assert isinstance(done.exception, RecipeError)  # without the file, there is no folder to look for its model in


def test_a_checkpoint_whose_round_was_run_again_after_a_text_was_erased_still_has_its_root(mine, recipe):
    made = find(mine, NAME, "r001")
    candidate = mine.value("SELECT min(candidate_id) FROM decisions WHERE accepted AND round = 'r001'")
    revoke(mine, thing(mine, candidate), who="me", why="the law", erase=True)
    mine.forget()
    with dg.DagsterInstance.ephemeral() as instance:
        assert run_round(instance, recipe, "r001").success
    assert find(mine, NAME, "r001")["checkpoint"] != made["checkpoint"]
    answer = verify(mine, made, Home.here())
    assert answer.ok and checks(answer)["recorded leaves, by the root"] == (made["samples"], 0)
    change(mine, "UPDATE training_samples SET leaf = sha256('x') WHERE checkpoint = ? AND candidate_id = ?",
           made["checkpoint"], candidate)  # fmt: skip
    assert not verify(mine, made, Home.here()).ok


def test_after_a_duplicate_was_erased_the_round_still_replays(mine, recipe):
    duplicate = some(mine, "d.reason = 'duplicate'")
    revoke(mine, thing(mine, duplicate["candidate_id"]), who="me", why="the law", erase=True)
    answer = replayed(mine, recipe)
    assert answer.findings == []
    (check,) = (check for check in answer.checks if check.name == "decisions replayed, to the bit")
    assert check.note == "of 6 only scores and chances: erased texts are among theirs, or were their duplicates"
    change(mine, "UPDATE decisions SET u = 0.5 WHERE candidate_id = ?", duplicate["candidate_id"])
    assert not replayed(mine, recipe).ok


def trained_again(store, recipe, trained_on="accepted"):
    round_, home = rounds.record(store, recipe, "r001"), Home.here()
    start = rounds.starting_weights(store, recipe, home, "r001", recipe.training.start)
    return train(store, round_, start, home, CPU, "again", lambda *_: None, trained_on)


def test_the_same_weights_trained_on_other_scores_are_described_anew(mine, recipe):
    before = find(mine, NAME, "r001")["checkpoint"]
    change(mine, "UPDATE decisions SET score = 0.9 WHERE accepted")
    made = trained_again(mine, recipe)
    assert made.checkpoint.digest == before
    assert checkpoints.read_meta(made.checkpoint.path)["merkle_root"] == made.merkle_root
    answer = verified(mine, "r001")
    assert answer.ok and answer.root == made.merkle_root


def test_a_control_that_comes_out_as_the_checkpoint_does_not_take_its_place(mine, recipe):
    sql, given = training_rows(NAME, "r001", recipe, "everything")
    ids = mine.arrow(f"SELECT candidate_id FROM ({sql})", given)["candidate_id"].to_pylist()
    change(mine, "UPDATE decisions SET accepted = list_contains(?, candidate_id) WHERE round = 'r001'", ids)
    made, control = trained_again(mine, recipe), trained_again(mine, recipe, "everything")
    assert control.checkpoint == made.checkpoint
    row = find(mine, made.checkpoint.digest)
    assert (row["trained_on"], checkpoints.read_meta(made.checkpoint.path)["trained_on"]) == ("accepted", "accepted")
    assert json.loads(rounds.row_of(mine, NAME, "r001")["controls"])["everything"] == made.checkpoint.digest
    assert verified(mine, "r001").ok


def test_a_round_that_ran_before_its_settings_were_refused_can_still_be_asked_about(mine, recipe):
    refused = json.dumps({"promotion": {"require": "not_worse"}})
    change(mine, "UPDATE rounds SET settings = json_merge_patch(settings, ?)", refused)
    assert rounds.record(mine, recipe, "r000").recipe.promotion.require == "not_worse"
    assert trace(mine, some(mine)["candidate_id"]).complete


def test_a_candidate_without_a_score_of_now_is_not_decided_on(mine, recipe):
    change(mine, "DELETE FROM scores WHERE candidate_id = ?", some(mine)["candidate_id"])
    with pytest.raises(RoundError, match=r"1 candidates have no score .* materialise `scores` again"):
        decide(mine, rounds.record(mine, recipe, "r000"), "again")


def test_candidates_that_are_there_twice_are_not_decided_on(mine, recipe):
    before = mine.query("SELECT * FROM decisions ORDER BY candidate_id")
    change(mine, "INSERT INTO candidates SELECT * FROM candidates WHERE candidate_id = ?", some(mine)["candidate_id"])
    with pytest.raises(RoundError, match="1 candidates are in the store twice; nothing was decided"):
        decide(mine, rounds.record(mine, recipe, "r000"), "again")
    assert mine.query("SELECT * FROM decisions ORDER BY candidate_id") == before


def test_settings_that_are_refused_by_now_are_no_reason_not_to_verify(mine):
    refused = json.dumps({"sampling": {"draws": 0}, "renamed_since": True})
    change(mine, "UPDATE rounds SET settings = json_merge_patch(settings, ?)", refused)
    mine.forget()  # otherwise the settings would be read from an older snapshot
    assert verified(mine).ok
    control = json.loads(rounds.row_of(mine, NAME, "r000")["controls"])["random"]
    assert verify(mine, find(mine, control), Home.here()).ok


# --- files that somebody changed ---------------------------------------------------------------


def file_of(store, table, candidate):
    """The Parquet file that holds a candidate's row of a table."""
    for row in store.query("SELECT data_file FROM ducklake_list_files('lake', ?)", [table]):
        held = pq.read_table(row["data_file"], columns=["candidate_id"])["candidate_id"].to_pylist()
        if candidate in held:
            return Path(row["data_file"])
    raise AssertionError(f"{candidate} is in no file of {table}")


def known_as(file):
    """Let the catalog know a file as it is now."""
    with sqlite3.connect(Home.here().path / "store" / "catalog.sqlite") as catalog:
        catalog.execute(
            "UPDATE ducklake_data_file SET file_size_bytes = ?, footer_size = ? WHERE path LIKE ?",
            [file.stat().st_size, pq.ParquetFile(file).metadata.serialized_size, f"%{file.name}"],
        )


@pytest.mark.parametrize("catalog_too", [False, True], ids=["file alone", "file and catalog"])
@pytest.mark.parametrize("accepted", [True, False], ids=["accepted", "rejected"])
def test_one_character_in_a_parquet_file_written_anew_is_named(mine, recipe, accepted, catalog_too):
    candidate = some(mine, f"d.accepted = {accepted} AND length(c.text) > 0")["candidate_id"]
    file = file_of(mine, "candidates", candidate)
    table = pq.read_table(file)
    rows = table.to_pylist()
    (row,) = [row for row in rows if row["candidate_id"] == candidate]
    row["text"] = ("a" if row["text"][0] != "a" else "b") + row["text"][1:]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    if catalog_too:
        known_as(file)
    with Store.at(Home.here().path) as store:
        answer, found = replayed(store, recipe), verified(store)
    spelt = [finding.ids for finding in answer.findings if "stored tokens spell" in finding.what]
    assert spelt == [(candidate,)]
    rows = [finding.ids for finding in found.findings if "rows at the snapshot" in finding.what]
    assert rows == ([(candidate,)] if accepted else [])
    for each in (answer, found):
        files = [finding for finding in each.findings if finding.kind == "file"]
        assert len(files) == (not catalog_too)
        assert all(str(file) in finding.what and "written anew" in finding.what for finding in files)


@pytest.mark.parametrize("catalog_too", [False, True], ids=["file alone", "file and catalog"])
def test_a_parquet_file_written_anew_by_a_program_that_drops_field_ids_is_named(mine, recipe, catalog_too):
    file = file_of(mine, "candidates", some(mine)["candidate_id"])
    rows = pq.read_table(file)
    bare = pa.schema([pa.field(one.name, one.type) for one in rows.schema])
    pq.write_table(pa.Table.from_pylist(rows.to_pylist(), bare), file)
    if catalog_too:
        known_as(file)
    with Store.at(Home.here().path) as store:
        for answer in (verified(store),) if catalog_too else (replayed(store, recipe), verified(store)):
            (finding,) = answer.findings
            assert finding.kind == "file" and str(file) in finding.what and "field ids" in finding.what
            assert finding.count == len(rows)


@pytest.mark.parametrize("column", ["token_ids", "score"])  # without the first the store cannot even be opened
def test_a_store_that_gives_no_answer_is_one_message(mine, ran, column):
    with sqlite3.connect(Home.here().path / "store" / "catalog.sqlite") as catalog:
        catalog.execute("DELETE FROM ducklake_column WHERE column_name = ?", [column])
    for words in (("verify", NAME, "r000"), ("replay", str(ran / f"{NAME}.yaml"), "r000", "--sample", "0")):
        error = CliRunner().invoke(app, ["audit", *words]).exception
        assert isinstance(error, AuditError) and "/home failed: " in str(error)


def test_a_parquet_file_whose_bytes_are_broken_is_named_and_stops_nothing_else(mine, recipe):
    candidate = some(mine)["candidate_id"]
    file = file_of(mine, "candidates", candidate)
    column = pq.ParquetFile(file).metadata.row_group(0)
    texts = next(column.column(i) for i in range(column.num_columns) if column.column(i).path_in_schema == "text")
    content = bytearray(file.read_bytes())
    start = texts.dictionary_page_offset or texts.data_page_offset
    content[start : start + texts.total_compressed_size] = b"\xff" * texts.total_compressed_size
    file.write_bytes(content)
    with Store.at(Home.here().path) as store:
        for answer in (replayed(store, recipe), verified(store)):
            (finding,) = answer.findings
            assert finding.kind == "file" and str(file) in finding.what and "cannot be read" in finding.what
            assert finding.count == len(pq.read_table(file, columns=["candidate_id"]))
            assert checks(answer)["weights, hashed again"][1] == 0
    file.unlink()
    with Store.at(Home.here().path) as store:
        for answer in (replayed(store, recipe), verified(store)):
            assert [(f.kind, str(file) in f.what) for f in answer.findings] == [("file", True)]


# --- the command line --------------------------------------------------------------------------


def test_the_command_line_tells_and_exits_by_what_it_found(mine, ran):
    def audit(*words):
        return CliRunner().invoke(app, ["audit", *map(str, words)])

    path = ran / f"{NAME}.yaml"
    made = find(mine, NAME, "r001")
    done = audit("verify", made["checkpoint"][:6], "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["ok"], told["root"]) == (0, True, json.loads(made["meta"])["merkle_root"])
    # Four places: the store, meta.json, the card, MLflow.
    assert {check["name"]: check["compared"] for check in told["checks"]}["the root, wherever it was written"] == 4
    assert audit("verify", NAME, "r001").exit_code == 0
    told = json.loads(audit("replay", path, "r000", "--sample", 2, "--json").stdout)
    assert told["ok"] and told["replayed"] == told["decisions"]
    told = json.loads(audit("whatif", path, "r000", "--set", "acceptance.threshold=-1", "--json").stdout)
    assert told["was"]["accepted"] < told["would"]["accepted"] <= 2 * told["prompts"]
    assert json.loads(audit("diff", path, "r000", "r001", "--json").stdout)["drawn"]["shared"] == told["prompts"]
    for words in (("whatif", path, "r000", "--set", "acceptance.cap=1"), ("diff", path, "r000", "r001")):
        assert audit(*words).exit_code == 0

    candidate = some(mine)["candidate_id"]
    change(mine, "UPDATE decisions SET weight = 2 WHERE candidate_id = ?", candidate)
    for words in (("verify", NAME, "r000"), ("replay", path, "r000", "--sample", 0)):
        done = audit(*words)
        assert done.exit_code == 1
        assert candidate in done.stdout
    assert isinstance(audit("verify", "ffffffff").exception, AuditError)


def test_a_replay_that_loads_a_model_waits_for_the_accelerator_as_a_round_does(mine, ran):
    def audit(sample):
        command = ["-m", "cli.main", "audit", "replay", ran / f"{NAME}.yaml", "r000", "--read", "0", "--sample", sample]
        return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with Home.here().lock("accelerator", wait=True):
        waiting = audit("2")
        assert "waiting for the accelerator" in waiting.stderr.readline()
        assert audit("0").wait(60) == 0
        assert waiting.poll() is None
    assert waiting.wait(60) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("diff", "{recipe}", "r000", "r010"), "letters_loop has no round 'r010'; there is r000, r001"),
        (("replay", "{recipe}", "r1"), "letters_loop has no round 'r1'; there is r000, r001"),
        (("whatif", "{recipe}", "zz"), "letters_loop has no round 'zz'; there is r000, r001"),
        (("verify", NAME, "r010"), "letters_loop has no round 'r010'; there is r000, r001"),
        (("verify", NAME), "letters_loop is a recipe: give a round, too; there is r000, r001"),
        (("export", NAME, "--to", "{nowhere}"), "letters_loop is a recipe: give a round, too; there is r000, r001"),
        (("verify", "ffff"), "no checkpoint begins with 'ffff', and no recipe here is called so"),
        (("trace", "--accepted", NAME, "r010", "1"), "letters_loop has no round 'r010'; there is r000, r001"),
        (("impact", "abc", "--recipe", "other"), "no recipe here is called 'other'; there is letters_loop."),
        *(
            ((command, "leters_loop", *("r000", "r001")[: 1 + (command == "diff")]),
             "no recipe here is called 'leters_loop'; there is letters_loop. Did you mean 'letters_loop'?")
            for command in ("diff", "replay", "whatif", "verify")
        ),
    ],
)  # fmt: skip
def test_who_asks_about_a_round_that_is_not_there_is_told_which_are(ran, monkeypatch, words, said):
    monkeypatch.setenv("RSFT_HOME", str(ran / "home"))
    words = [word.format(recipe=ran / f"{NAME}.yaml", nowhere=ran / "nowhere") for word in words]
    error = CliRunner().invoke(app, ["audit", *words]).exception
    assert isinstance(error, AuditError) and str(error) == said


def test_answers_that_two_rounds_drew_at_once_count_once(mine, recipe):
    round_ = rounds.record(mine, recipe, "r001")
    between = evaluate.contest(mine, round_, Home.here())
    before = evaluate.judge(mine, round_, between, "again")
    change(mine, "INSERT INTO candidates SELECT * FROM candidates WHERE split = 'eval'")
    change(mine, "INSERT INTO scores SELECT * FROM scores")
    assert evaluate.judge(mine, round_, between, "again") == before
