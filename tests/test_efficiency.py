"""What draws brought: each number by hand or by enumeration, and a whole round's as people see it."""

import itertools
import json
import math
from fractions import Fraction

import dagster as dg
import duckdb
import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter

import definitions
from assets.shared import rounds_of
from automation.jobs import job_name
from rsft_pipeline import acceptance, efficiency
from rsft_pipeline.recipe.acceptance import AnyRule
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.rounds import row_of
from rsft_pipeline.store import Store

COLUMNS = {
    "candidate_id": "VARCHAR",
    "prompt_id": "VARCHAR",
    "draw": "INTEGER",
    "same_text": "VARCHAR",  # equal where texts are
    "tokens": "INTEGER",
    "log_q": "DOUBLE",
    "log_p": "DOUBLE",
    "score": "DOUBLE",
    "passed": "BOOLEAN",
    "target": "DOUBLE",
    "grouped": "VARCHAR",
}
TYPED = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())


@pytest.fixture
def connection():
    with duckdb.connect() as connection:
        yield connection


def candidate(candidate_id, **columns):
    row = dict.fromkeys(COLUMNS) | {
        "prompt_id": "p",
        "draw": 0,
        "same_text": candidate_id,
        "passed": True,
        "tokens": 10,
    }
    return row | {"candidate_id": candidate_id} | columns


def decide(connection, rows, **rule):
    """Write the decided rows as the table `decided`. Returns the rule and its parameters."""
    connection.execute(f"CREATE OR REPLACE TABLE candidates ({TYPED})")
    for row in rows:
        connection.execute(f"INSERT INTO candidates VALUES ({', '.join('?' * len(COLUMNS))})", list(row.values()))
    rule = TypeAdapter(AnyRule).validate_python(rule)
    parameters = acceptance.parameters(connection, "candidates", rule, 0)
    connection.execute(
        f"""CREATE OR REPLACE TABLE decided AS SELECT c.* EXCLUDE (same_text), d.accepted, d.reason, d.log_a, d.weight
            FROM candidates c JOIN ({acceptance.decisions_sql("candidates", parameters, 0)}) d USING (candidate_id)"""
    )
    return rule, parameters


def measured(connection, rows, **rule):
    _, parameters = decide(connection, rows, **rule)
    return efficiency.measure(connection, "decided", parameters)


# --- the round, by hand ---------------------------------------------------------------------

# lineage.uniform with seed 0: a 0.19  d 0.32  c 0.740  b 0.87
REJECTION = [
    candidate("a", target=math.log(0.1), log_q=math.log(0.2)),  # A = 0.25, accepted
    candidate("b", target=math.log(0.5), log_q=math.log(0.2)),  # A = 1, accepted
    candidate("c", target=math.log(0.3), log_q=math.log(0.2)),  # A = 0.75, accepted
    candidate("d", target=math.log(0.1), log_q=math.log(0.2)),  # A = 0.25, not
    candidate("e", target=None, log_q=-1.0),
    candidate("f", target=-1.0, log_q=None),
    candidate("g", target=-1.0, log_q=-9.0, passed=False),
    candidate("h", target=-math.inf, log_q=-1.0, tokens=23),  # A = 0
]


def test_a_stochastic_rule_by_hand(connection):
    found = measured(connection, REJECTION, rule="rejection", M=2)
    assert (found.candidates, found.seen, found.accepted, found.rate) == (8, 5, 3, 3 / 8)
    assert found.mean_a == pytest.approx(2.25 / 5, rel=1e-14)
    assert found.one_over_m == pytest.approx(0.5, rel=1e-15)
    assert found.effective_samples == 3
    assert found.effective_size == pytest.approx(2.25**2 / (1 + 0.75**2 + 2 * 0.25**2), rel=1e-14)
    mean_log_a = (2 * 0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / 2.25
    assert found.kl == pytest.approx(mean_log_a - math.log(2.25 / 8), rel=1e-14)
    assert found.tokens_per_accepted == 93 / 3
    logged = found.metrics()
    assert (logged["acceptance_rate_low"], logged["acceptance_rate_high"]) == efficiency.wilson(3, 8)
    assert (logged["one_over_M"], logged["effective_size_of_A"]) == (found.one_over_m, found.effective_size)


def test_weights_tilt_the_accepted_once_more(connection):
    found = measured(connection, REJECTION, rule="rejection", M=2, weight="A")
    assert found.mean_a == pytest.approx(2.25 / 5, rel=1e-14)
    squares = 1 + 0.75**2 + 2 * 0.25**2  # g = A²
    assert found.effective_samples == pytest.approx(2.0**2 / (1 + 0.75**2 + 0.25**2), rel=1e-14)  # of a, b and c
    mean_log_g = (2 * 0.25**2 * math.log(0.25**2) + 0.75**2 * math.log(0.75**2)) / squares
    assert found.kl == pytest.approx(mean_log_g - math.log(squares / 8), rel=1e-14)
    without_chance = measured(connection, REJECTION, rule="rejection", M=2, weight="A", threshold=0.5)
    assert (without_chance.accepted, without_chance.mean_a) == (2, 2 / 5)
    mean_log_g = 0.75 * math.log(0.75) / 1.75  # g = A where it is above 0.5
    assert without_chance.kl == pytest.approx(mean_log_g - math.log(1.75 / 8), rel=1e-14)


def test_the_pilot_that_is_set_aside_is_paid_for_and_no_part_of_the_divergence(connection):
    rows = [candidate(c, draw=draw, target=-1.0, log_q=-1.0) for draw, c in enumerate("abcd")]
    found = measured(connection, rows, rule="rejection", pilot=2)
    assert (found.candidates, found.seen, found.accepted, found.rate) == (4, 2, 2, 0.5)
    assert (found.mean_a, found.one_over_m, found.kl, found.tokens_per_accepted) == (1, 1, 0, 20)


def test_a_gate_is_no_way_into_the_pilot_or_out_of_it(connection):
    """Half of the draws pass the gate, in the pilot as after it, so a half is what is accepted of what is drawn."""
    rows = [
        candidate(f"{prompt} {draw}", prompt_id=str(prompt), draw=draw, target=-1.0, log_q=-1.0, passed=prompt % 2 == 0)
        | {"grouped": "g"}
        for prompt in range(8)
        for draw in range(3)
    ]
    rule, parameters = decide(connection, rows, rule="rejection", pilot=1)
    found = efficiency.measure(connection, "decided", parameters)
    assert (found.candidates, found.seen, found.accepted) == (24, 8, 8)
    assert found.kl == pytest.approx(math.log(2), rel=1e-14)
    (group,) = efficiency.coverage(connection, "decided", rule)
    assert group.draws_needed == 1 + 5  # (1/2)^5 < 0.05 < (1/2)^4, behind a pilot of one


def test_a_rule_without_chance_has_minus_log_of_its_share_before_distinct_and_cap(connection):
    rows = [
        candidate("a", score=0.9),
        candidate("b", score=0.5),
        candidate("c", score=0.6, same_text="x"),
        candidate("d", score=0.7, same_text="x"),
        candidate("e", score=None),
        candidate("f", score=0.9, passed=False),
        candidate("g", score=0.9),
        candidate("h", score=0.1),
    ]
    found = measured(connection, rows, rule="threshold", threshold=0.55, cap=2)
    assert (found.accepted, found.seen, found.mean_a) == (2, 6, 4 / 6)
    assert found.kl == pytest.approx(math.log(2), rel=1e-15)  # a, c, d, g of 8
    assert (found.effective_samples, found.effective_size) == (2, 4)
    assert (found.one_over_m, found.tokens_per_accepted) == (None, 40)
    best = measured(connection, rows, rule="top_k", k=2)
    assert (best.accepted, best.mean_a) == (2, 2 / 6)
    assert best.kl == pytest.approx(math.log(4), rel=1e-15)


def test_the_divergence_is_that_of_the_enumerated_distribution(connection):
    q, score, beta = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.0, 0.5, 0.8, 1.0]), 0.3
    picks = np.random.default_rng(0).choice(4, size=20_000, p=q)
    _, parameters = decide(connection, [], rule="boltzmann", beta=beta, r_max=1.0)
    connection.register(
        "drawn", pa.table({"candidate_id": [*map(str, range(20_000))], "score": score[picks], "n": range(20_000)})
    )
    connection.execute(
        f"""INSERT INTO candidates BY NAME
            SELECT * EXCLUDE (n), 'p' AS prompt_id, 0 AS draw, n::VARCHAR AS same_text, 1 AS tokens, true AS passed
            FROM drawn;
            CREATE OR REPLACE TABLE decided AS SELECT * FROM candidates
            JOIN ({acceptance.decisions_sql("candidates", parameters, 0)}) USING (candidate_id, prompt_id, score)"""
    )
    found = efficiency.measure(connection, "decided", parameters)
    a = np.exp((score - 1) / beta)
    pi = q * a / (q * a).sum()
    assert found.mean_a == pytest.approx((q * a).sum(), rel=0.03)
    assert found.kl == pytest.approx((pi * np.log(pi / q)).sum(), rel=0.03)
    assert found.effective_size == pytest.approx(20_000 * (q * a).sum() ** 2 / (q * a * a).sum(), rel=0.03)


def test_a_round_without_accepted_or_without_candidates_has_no_numbers_and_no_error(connection):
    nothing = measured(connection, [candidate("a", score=0.0)], rule="threshold", threshold=0.5)
    assert (nothing.rate, nothing.mean_a, nothing.kl, nothing.tokens_per_accepted) == (0, 0, None, None)
    assert [one.value for one in nothing.suggestions] == [None, None, None]
    empty = measured(connection, [], rule="loss", k=1)
    assert (empty.candidates, empty.rate, empty.mean_a, empty.kl, empty.effective_samples) == (
        0,
        None,
        None,
        None,
        None,
    )


# --- what to ask for ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{"rule": "threshold", "threshold": 0}, {"rule": "top_k", "k": 1}], ids=str)
def test_a_threshold_is_suggested_from_the_scores_that_the_rule_saw(connection, rule):
    rows = [candidate(str(i), score=i) for i in range(10)] + [candidate("f", score=99, passed=False)]
    found = measured(connection, rows, **rule).suggestions
    assert [(s.wanted, s.name, s.value, s.share) for s in found] == [
        (0.1, "threshold", 8, 0.1),
        (0.3, "threshold", 6, 0.3),
        (0.5, "threshold", 4, 0.5),
    ]


def test_each_stochastic_rule_is_told_the_number_that_gives_the_share(connection):
    rows = [
        candidate(c, log_p=-10.0 * loss, target=math.log(loss), log_q=0.0, score=-loss)
        for c, loss in zip("abcd", [1, 2, 3, 4], strict=True)
    ]
    found = {
        rule["rule"]: measured(connection, rows, **rule).suggestions[2]  # half
        for rule in (
            {"rule": "loss", "k": 9},
            {"rule": "rejection", "M": 9},
            {"rule": "boltzmann", "beta": 9, "r_max": 0.0},
        )
    }
    assert (found["loss"].name, found["loss"].value) == ("k", pytest.approx(5, rel=1e-15))  # 10 / k / 4 = 1/2
    assert (found["rejection"].name, found["rejection"].value) == ("log_M", pytest.approx(math.log(5), rel=1e-15))
    beta = found["boltzmann"].value
    assert found["boltzmann"].name == "beta"
    assert sum(math.exp(-loss / beta) for loss in (1, 2, 3, 4)) / 4 == pytest.approx(0.5, rel=1e-15)
    on_a = measured(connection, rows, rule="rejection", M=4, threshold=0.9).suggestions[2]
    assert (on_a.name, on_a.value, on_a.share) == ("threshold", pytest.approx(0.5, rel=1e-15), 0.5)


def test_wilsons_bounds_solve_its_equation_and_cover_the_ends():
    z = 1.959963984540054
    for successes, n in [(3, 10), (1, 7), (240, 480), (999, 1000)]:
        share = successes / n
        for bound in efficiency.wilson(successes, n):
            assert (share - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, rel=1e-9)
    assert efficiency.wilson(0, 10) == (0.0, pytest.approx(0.27753279986288915))
    assert efficiency.wilson(10, 10) == (pytest.approx(0.7224672001371109), 1.0)


@pytest.mark.parametrize("rate", [Fraction(1, 20), Fraction(1, 2), Fraction(3, 4), Fraction(95, 100)], ids=str)
def test_draws_needed_are_the_fewest_that_suffice(rate):
    fewest = next(n for n in itertools.count(1) if 1 - (1 - rate) ** n >= Fraction(95, 100))
    assert efficiency.draws_needed(float(rate)) == fewest


def test_draws_needed_at_the_ends():
    assert efficiency.draws_needed(0.0) is None
    assert efficiency.draws_needed(1.0) == 1
    assert efficiency.draws_needed(1e-9) == math.ceil(math.log(0.05) / math.log1p(-1e-9))


# --- groups of prompts ----------------------------------------------------------------------


def test_coverage_by_hand(connection):
    rows = [
        *(candidate(f"x{i}", prompt_id="1", grouped="easy", draw=i, score=1) for i in range(4)),
        *(candidate(f"y{i}", prompt_id="2", grouped="hard", draw=i, score=i == 0) for i in range(4)),
        *(candidate(f"z{i}", prompt_id="3", grouped="hard", draw=i, score=0, same_text="z") for i in range(4)),
        *(candidate(f"w{i}", prompt_id="4", draw=i, score=1, same_text="w") for i in range(2)),
        candidate("v", prompt_id="5", grouped="never", score=0),
    ]
    rule, _ = decide(connection, rows, rule="threshold", threshold=0.5)
    found = {group.group: group for group in efficiency.coverage(connection, "decided", rule)}
    assert list(found) == ["never", "hard", None, "easy"]  # by rate
    hard = found["hard"]
    assert (hard.prompts, hard.candidates, hard.accepted, hard.prompts_with_accepted) == (2, 8, 1, 1)
    assert (hard.rate, hard.low, hard.high) == (1 / 8, *efficiency.wilson(1, 8))
    assert hard.draws_needed == 23  # (7/8)^23 < 0.05 < (7/8)^22
    assert (found["easy"].rate, found["easy"].draws_needed) == (1, 1)
    # The second w repeats the first: that costs an accepted sample, but not the first of a prompt.
    assert (found[None].rate, found[None].accepted, found[None].draws_needed) == (0.5, 1, 1)
    assert (found["never"].draws_needed, found["never"].prompts_with_accepted) == (None, 0)
    best, _ = decide(connection, rows, rule="top_k", k=1)  # each prompt has its best, however few are drawn
    assert {group.draws_needed for group in efficiency.coverage(connection, "decided", best)} == {None}


def test_a_pilot_that_is_set_aside_is_drawn_on_top(connection):
    rows = [candidate(str(i), grouped="g", draw=i, target=-1.0, log_q=-1.0) for i in range(4)]
    rows.append(candidate("a", prompt_id="another", grouped="only the pilot", draw=0, target=-1.0, log_q=-1.0))
    rule, _ = decide(connection, rows, rule="rejection", pilot=2)
    pilot, group = efficiency.coverage(connection, "decided", rule)
    assert (group.accepted, group.draws_needed) == (2, 3)
    assert (pilot.group, pilot.accepted, pilot.draws_needed) == ("only the pilot", 0, None)


# --- a round ---------------------------------------------------------------------------------


def test_a_round_shows_its_numbers_in_dagster_and_mlflow(home, write_recipe):
    from mlflow import MlflowClient

    scorers = [{"kind": "answer", "match": "exact"}, {"kind": "length", "at_most": 1, "unit": "characters"}]
    rule = {"rule": "boltzmann", "beta": "calibrate", "share": 0.7, "pilot": 3, "r_max": 1.0, "weight": "A"}
    prompts = {
        "source": "letters:letters",
        "columns": {"last / $letter": "answer"},
        "template": "{question}",
        "reference": "last / $letter",
        "eval_fraction": 0.3,
    }
    recipe = load(
        write_recipe(acceptance=rule, prompts=prompts, scoring={"scorers": scorers}, group_by="last / $letter")
    )
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(rounds_of(recipe).name, ["r000"])
        job = definitions.build([recipe]).resolve_job_def(job_name(recipe))
        result = job.execute_in_process(instance=instance, partition_key="r000")
    (event,) = result.asset_materializations_for_node(f"{recipe.name}__accepted")
    shown = {name: value.value for name, value in event.metadata.items()}

    with Store.at(home) as store:
        rows = store.query(
            """SELECT d.*, c.tokens, p.reference FROM decisions d JOIN candidates c USING (candidate_id)
               JOIN prompts p ON p.prompt_id = d.prompt_id"""
        )
        run = row_of(store, recipe.name, "r000")["mlflow_run_id"]
        trained = store.query("SELECT candidate_id, weight FROM training_samples")
    accepted = [row for row in rows if row["accepted"]]
    assert {row["candidate_id"]: row["weight"] for row in trained} == {
        row["candidate_id"]: math.exp(row["log_a"]) for row in accepted
    }
    a = np.exp([row["log_a"] for row in rows if row["log_a"] is not None])
    weights = np.array([row["weight"] for row in accepted])
    assert shown["mean_A"] == pytest.approx(a.mean(), rel=1e-12)
    assert shown["mean_A"] == pytest.approx(0.7, abs=0.1)
    assert shown["effective_samples"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-12)
    assert len(set(weights)) > 1
    kl = (a**2 * np.log(a**2)).sum() / (a**2).sum() - math.log((a**2).mean())
    assert shown["kl_of_accepted"] == pytest.approx(kl, rel=1e-9)
    assert shown["tokens_per_accepted"] == sum(row["tokens"] for row in rows) / len(accepted)
    assert json.loads(rows[0]["parameters"])["beta"] == shown["rule"]["beta"]

    logged = MlflowClient(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}").get_run(run).data.metrics
    assert logged["accepted/kl_of_accepted"] == shown["kl_of_accepted"]
    assert logged["accepted/acceptance_rate"] == len(accepted) / len(rows)

    table = [line.split(" | ") for line in shown["coverage"].removeprefix("| ").splitlines()]
    assert len(table) == 2 + len({row["reference"] for row in rows}) == 12
    assert sum(int(line[3]) for line in table[2:]) == len(rows)
    assert sum(int(line[4].split()[0]) for line in table[2:]) == len(accepted)
    assert "beta" in shown["efficiency"] and "KL" in shown["efficiency"]
