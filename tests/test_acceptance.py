"""What is accepted and why: hand-computed tables, known distributions, replay."""

import itertools
import json
import math
import re
import sys
from collections import Counter

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter
from scipy import stats

from rsft_pipeline import acceptance, lineage
from rsft_pipeline.recipe.acceptance import AnyRule

# lineage.uniform of these candidate ids with seed 0, from smallest to largest:
# a 0.19  d 0.32  f 0.38  e 0.45  c 0.74  b 0.87  h 0.95;  and g 0.29 between a and d.

SCHEMA = pa.schema(
    [
        ("candidate_id", pa.string()),
        ("prompt_id", pa.string()),
        ("draw", pa.int32()),
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("log_q", pa.float64()),
        ("log_p", pa.float64()),
        ("score", pa.float64()),
        ("passed", pa.bool_()),
        ("target", pa.float64()),
    ]
)


@pytest.fixture
def connection():
    with duckdb.connect() as connection:
        yield connection


def candidate(candidate_id, **columns):
    """A row; unless told otherwise, its text is its own, it passed, and nothing else is known of it."""
    row = dict.fromkeys(SCHEMA.names) | {"prompt_id": "p", "draw": 0, "text": candidate_id, "passed": True}
    return row | {"candidate_id": candidate_id} | columns


def decide(connection, rows, seed=0, round_number=0, **rule):
    """(candidate id → decision, parameters)"""
    table = pa.Table.from_pylist(rows, SCHEMA) if isinstance(rows, list) else rows
    connection.register("given", table)
    hashed = acceptance.same_text("text")
    connection.execute(f"CREATE OR REPLACE TEMP TABLE candidates AS SELECT *, {hashed} AS same_text FROM given")
    rule = TypeAdapter(AnyRule).validate_python(rule)
    parameters = acceptance.parameters(connection, "candidates", rule, round_number)
    decisions = connection.sql(acceptance.decisions_sql("candidates", parameters, seed)).to_arrow_table().to_pylist()
    assert len(decisions) == table.num_rows
    return {d["candidate_id"]: d for d in decisions}, parameters


def reasons(connection, rows, **rule):
    decisions, _ = decide(connection, rows, **rule)
    assert all(d["accepted"] == (d["reason"] == "accepted") for d in decisions.values())
    return {c: decisions[c]["reason"] for c in sorted(decisions)}


def drawn(rng, outcomes, log_q, size, **columns):
    """A table of `size` draws from q over the outcomes; columns are arrays over the outcomes."""
    picks = rng.choice(len(outcomes), size=size, p=np.exp(log_q))
    table = {
        "candidate_id": [f"{size}-{i}" for i in range(size)],
        "prompt_id": ["p"] * size,
        "draw": np.arange(size),
        "text": [outcomes[i] for i in picks],
        "log_q": log_q[picks],
        "passed": np.ones(size, bool),
    }
    table |= {name: np.asarray(values)[picks] for name, values in columns.items()}
    absent = {name: pa.nulls(size, SCHEMA.field(name).type) for name in SCHEMA.names if name not in table}
    return picks, pa.table({name: (table | absent)[name] for name in SCHEMA.names}).cast(SCHEMA)


def kept(decisions, picks, outcomes):
    """How often each outcome was accepted; decisions come back by candidate id."""
    accepted = [decisions[f"{len(picks)}-{i}"]["accepted"] for i in range(len(picks))]
    return np.bincount(picks[accepted], minlength=outcomes)


# --- the same numbers in SQL as in Python ---------------------------------------------------


def test_u_in_sql_is_lineage_uniform_to_the_bit(connection):
    ids = [lineage.digest(i) for i in range(20_000)] + ["", "é", "a:b"]
    connection.register("ids", pa.table({"candidate_id": ids}))
    for seed in (0, 12345678901234567890):
        sql = f"SELECT {acceptance.UNIFORM_SQL.format(seed=seed)} FROM ids"
        assert [u for (u,) in connection.execute(sql).fetchall()] == [lineage.uniform(i, seed) for i in ids]


def test_normalised_text_in_sql_is_lineage_normalise(connection):
    spaces = [chr(c) for c in range(sys.maxunicode + 1) if re.match(r"\s", chr(c))]
    assert len(spaces) == 29
    odd = [f"{c}a{c}{c}b{c}" for c in [*spaces, "\0", "\u200b", "\ufeff", "\u180e"]]
    odd += ["", "   ", "e\u0301 \u00e9", "\u1112\u1161\u11ab", "a\0b \0", "\u212b\u2126", "q\u0307\u0323", "😀\ufe0f"]
    pieces = [" ", " ", "\n", "\t", "\x1c", "\0", "\u00a0", "a", "b", "é", "e\u0301", "\u0301"]
    chosen = (np.random.default_rng(i).integers(len(pieces), size=i % 9) for i in range(5_000))
    odd += ["".join(pieces[one] for one in each) for each in chosen]  # an array of texts would lose each "\0"
    assert any("\0" in text and not text.isascii() for text in odd)
    connection.register("texts", pa.table({"text": odd}))
    found = [t for (t,) in connection.execute(f"SELECT {acceptance.normalised('text')} FROM texts").fetchall()]
    expected = [lineage.normalise(t) for t in odd]
    assert [t.replace("\U000f0000", "\0") for t in found] == expected
    same = [h for (h,) in connection.execute(f"SELECT {acceptance.same_text('text')} FROM texts").fetchall()]
    assert len(set(same)) == len(set(expected)) == len(set(zip(same, expected, strict=True)))


# --- every rule, by hand --------------------------------------------------------------------


def test_threshold_accepts_what_scores_above_it(connection):
    rows = [
        candidate("a", score=0.6),
        candidate("b", score=0.5),  # not above
        candidate("c", score=0.8, text=" same\n text"),  # the better one of the two, though its u is larger
        candidate("d", score=0.7, text="same text"),
        candidate("e", score=None),
        candidate("f", score=0.9, passed=False),
        candidate("g", score=0.9, text="same text", prompt_id="another"),
        candidate("h", score=float("nan"), passed=False),
    ]
    expected = {
        "a": "accepted",
        "b": "below threshold",
        "c": "accepted",
        "d": "duplicate",
        "e": "cannot judge",
        "f": "gate",
        "g": "accepted",
        "h": "cannot judge",
    }
    assert reasons(connection, rows, rule="threshold", threshold=0.5) == expected
    assert reasons(connection, rows, rule="threshold", threshold=0.5, cap=1) == expected | {"a": "cap"}


def test_top_k_keeps_the_k_best_different_texts_of_each_prompt(connection):
    rows = [
        candidate("a", score=0.9, text="x"),
        candidate("b", score=0.9, text="x"),  # u is larger than that of a
        candidate("c", score=0.5),  # ties with d and e, and has the largest u
        candidate("d", score=0.5),
        candidate("e", score=0.5),
        candidate("f", score=1.0, passed=False),
        candidate("g", score=None),
        candidate("h", score=-3.0, prompt_id="another"),
    ]
    expected = {
        "a": "accepted",
        "b": "duplicate",
        "c": "rank",
        "d": "accepted",
        "e": "accepted",
        "f": "gate",
        "g": "cannot judge",
        "h": "accepted",
    }
    assert reasons(connection, rows, rule="top_k", k=3) == expected
    assert reasons(connection, rows, rule="top_k", k=3, cap=2) == expected | {"e": "cap"}
    assert reasons(connection, rows, rule="top_k", k=3, distinct=False) == expected | {"b": "accepted", "e": "rank"}


def test_quantile_accepts_exactly_the_rounded_up_share_of_the_judged(connection):
    rows = [
        candidate("a", score=0.2, prompt_id="one"),
        candidate("b", score=0.9, prompt_id="one", text="x"),
        candidate("c", score=0.8, prompt_id="one", text="x"),
        candidate("d", score=0.5, prompt_id="two"),
        candidate("e", score=0.5, prompt_id="two"),  # ties with d, whose u is smaller
        candidate("f", score=0.1, prompt_id="two"),
        candidate("g", score=None, prompt_id="two"),
        candidate("h", score=1.0, prompt_id="two", passed=False),
    ]
    expected = {  # ⌈0.4 · 6⌉ = 3: b, c, d; then c is found to repeat b
        "a": "rank",
        "b": "accepted",
        "c": "duplicate",
        "d": "accepted",
        "e": "rank",
        "f": "rank",
        "g": "cannot judge",
        "h": "gate",
    }
    assert reasons(connection, rows, rule="quantile", share=0.4) == expected
    assert reasons(connection, rows, rule="quantile", share=0.5) == expected  # of all 8, or of 7, it would be 4
    assert reasons(connection, rows, rule="quantile", share=0.4, distinct=False, cap=1) == expected | {"c": "cap"}


def test_a_share_is_taken_in_decimal(connection):
    rows = [candidate(str(i), score=i) for i in range(100)]
    _, parameters = decide(connection, rows, rule="quantile", share=0.07)
    assert 0.07 * 100 > 7
    assert parameters["cut"] == 7


def test_rejection_accepts_when_u_is_below_p_over_M_q(connection):
    rows = [
        candidate("a", target=math.log(0.1), log_q=math.log(0.2)),  # A = 0.25, u = 0.19
        candidate("b", target=math.log(0.5), log_q=math.log(0.2)),  # p > 2·q: A = 1, and a violation
        candidate("c", target=math.log(0.3), log_q=math.log(0.2)),  # A = 0.75, u = 0.740
        candidate("d", target=math.log(0.1), log_q=math.log(0.2)),  # A = 0.25, u = 0.32
        candidate("e", target=None, log_q=-1.0),
        candidate("f", target=-1.0, log_q=None),
        candidate("g", target=-1.0, log_q=-9.0, passed=False),  # a violation, were it decided on
        candidate("h", target=-math.inf, log_q=-1.0),  # p = 0
        candidate("i", target=math.inf, log_q=-1.0),
        candidate("j", target=math.nan, log_q=-1.0),
        candidate("k", target=-1.0, log_q=-math.inf),
    ]
    decisions, parameters = decide(connection, rows, rule="rejection", M=2)
    assert {c: decisions[c]["reason"] for c in "abcdefghijk"} == {
        "a": "accepted",
        "b": "accepted",
        "c": "accepted",
        "d": "u >= A",
        "e": "cannot judge",
        "f": "cannot judge",
        "g": "gate",
        "h": "u >= A",
        "i": "cannot judge",
        "j": "cannot judge",
        "k": "cannot judge",
    }
    assert parameters["log_M"] == math.log(2)
    assert parameters["violations"] == 1
    assert parameters["log_M_needed"] == pytest.approx(math.log(2.5), abs=1e-15)
    assert decide(connection, rows[7:8], rule="rejection", M=2)[1]["log_M_needed"] is None  # any would do
    log_a = {c: decisions[c]["log_a"] for c in "abcdefgh"}
    assert log_a["a"] == pytest.approx(math.log(0.25), abs=1e-15)
    assert (log_a["b"], log_a["e"], log_a["g"], log_a["h"]) == (0, None, None, -math.inf)


def test_M_is_the_pilots_largest_ratio_times_safety_and_the_pilot_is_set_aside(connection):
    rows = [
        candidate("a", draw=0, target=math.log(0.4), log_q=math.log(0.2)),  # 2, the pilot's largest
        candidate("b", draw=0, target=math.log(0.2), log_q=math.log(0.2), prompt_id="another"),
        candidate("c", draw=0, target=None, log_q=-1.0),
        candidate("d", draw=1, target=math.log(0.8), log_q=math.log(0.1)),  # 8 > 3: a violation
        candidate("e", draw=1, target=math.log(0.3), log_q=math.log(0.2)),  # A = 1.5 / 3, u = 0.45
        candidate("f", draw=1, target=math.log(0.2), log_q=math.log(0.2)),  # A = 1 / 3, u = 0.38
        candidate("g", draw=2, target=-1.0, log_q=-9.0, passed=False),
        candidate("h", draw=2, target=None, log_q=-1.0),
    ]
    decisions, parameters = decide(connection, rows, rule="rejection", pilot=1, safety=1.5)
    assert parameters["log_M"] == pytest.approx(math.log(3), abs=1e-15)
    assert parameters["violations"] == 1
    assert parameters["log_M_needed"] == pytest.approx(math.log(8), abs=1e-15)
    assert {c: decisions[c]["reason"] for c in "abcdefgh"} == {
        "a": "pilot",
        "b": "pilot",
        "c": "cannot judge",
        "d": "accepted",
        "e": "accepted",
        "f": "u >= A",
        "g": "gate",
        "h": "cannot judge",
    }
    # Without d, no candidate that is decided on needs as large an M as the pilot does.
    _, without = decide(connection, [*rows[:3], *rows[4:]], rule="rejection", pilot=1, safety=1.5)
    assert (without["violations"], without["log_M_needed"]) == (0, pytest.approx(math.log(1.5), abs=1e-15))
    # A candidate that failed a gate counts neither for the rule nor for M.
    gated = candidate("z", draw=0, target=9.0, log_q=0.0, passed=False)
    assert decide(connection, [*rows, gated], rule="rejection", pilot=1, safety=1.5)[1]["log_M"] == parameters["log_M"]


def test_M_that_cannot_be_estimated_is_an_error_that_says_so(connection):
    rows = [candidate("a", draw=0, target=-1.0, log_q=-1.0), candidate("b", draw=1, target=-1.0, log_q=-1.0)]
    with pytest.raises(ValueError, match="pilot is 2, which is every draw"):
        decide(connection, rows, rule="rejection", pilot=2)
    rows[0]["target"] = -math.inf
    with pytest.raises(ValueError, match="M cannot be estimated"):
        decide(connection, rows, rule="rejection")


def test_boltzmann_accepts_when_u_is_below_exp_of_the_scaled_shortfall(connection):
    half = math.log(2)  # a score this much below the largest has A = 1/2 with beta 1
    rows = [
        candidate("a", score=1.0 - half),  # u = 0.19
        candidate("b", score=1.0),  # A = 1
        candidate("c", score=1.0 - half),  # u = 0.74
        candidate("d", score=None),
        candidate("e", score=9.0, passed=False),  # no r_max
        candidate("f", score=-5.0, prompt_id="another"),  # the largest of its prompt
        candidate("g", score=-5.0 - 2 * half, prompt_id="another"),  # A = 1/4, u = 0.29
        candidate("h", score=1.0, text="b"),
        candidate("i", score=2.0, passed=False, prompt_id="a third"),  # of which nothing is past the gates
    ]
    expected = {
        "a": "accepted",
        "b": "accepted",
        "c": "u >= A",
        "d": "cannot judge",
        "e": "gate",
        "f": "accepted",
        "g": "u >= A",
        "h": "duplicate",
        "i": "gate",
    }
    assert reasons(connection, rows, rule="boltzmann", beta=1) == expected
    # With A = 1 everywhere u decides: a < b.
    assert reasons(connection, rows, rule="boltzmann", beta=1e9, cap=1) == {
        "a": "accepted",
        "b": "cap",
        "c": "cap",
        "d": "cannot judge",
        "e": "gate",
        "f": "cap",
        "g": "accepted",
        "h": "duplicate",
        "i": "gate",
    }


def test_a_given_r_max_counts_the_scores_above_it(connection):
    rows = [candidate("a", score=3.0), candidate("b", score=1.0), candidate("c", score=9.0, passed=False)]
    decisions, parameters = decide(connection, rows, rule="boltzmann", beta=2, r_max=2)
    assert parameters["violations"] == 1
    assert [decisions[c]["log_a"] for c in "abc"] == [0.0, -0.5, None]


def test_loss_accepts_when_u_is_below_nats_per_token_over_k(connection):
    rows = [
        candidate("a", log_p=-4.0, tokens=10),  # 0.4 nats per token: A = 0.2, u = 0.19
        candidate("b", log_p=-30.0, tokens=10),  # A = 1
        candidate("c", log_p=-4.0, tokens=10),  # u = 0.74
        candidate("d", log_p=0.0, tokens=10),  # nothing to learn: A = 0
        candidate("e", log_p=None, tokens=10),
        candidate("f", log_p=-4.0, tokens=0),
        candidate("g", log_p=-30.0, tokens=10, passed=False),
        candidate("h", log_p=-20.0, tokens=10, text="b"),  # A = 1; u / A decides, and that of b is smaller
    ]
    decisions, _ = decide(connection, rows, rule="loss", k=2)
    assert {c: decisions[c]["reason"] for c in "abcdefgh"} == {
        "a": "accepted",
        "b": "accepted",
        "c": "u >= A",
        "d": "u >= A",
        "e": "cannot judge",
        "f": "cannot judge",
        "g": "gate",
        "h": "duplicate",
    }
    assert decisions["a"]["log_a"] == pytest.approx(math.log(0.2), abs=1e-15)
    assert [decisions[c]["log_a"] for c in "bdefgh"] == [0.0, -math.inf, None, None, None, 0.0]


# --- weights and thresholds on A ------------------------------------------------------------


def test_a_threshold_on_A_accepts_without_chance_and_weighs_by_A(connection):
    # A = P(y|x) / M(y|x) where M is 1: L = −Σ A·log M over what is accepted.
    rows = [
        candidate("a", target=math.log(0.06), log_q=math.log(0.2)),  # A = 0.3
        candidate("b", target=math.log(0.1), log_q=math.log(0.2), text="x"),  # 0.5: of one text the larger A
        candidate("c", target=math.log(0.08), log_q=math.log(0.2), text="x"),  # 0.4, though its u is smaller
        candidate("d", target=math.log(0.05), log_q=math.log(0.2)),  # 0.25, not above; its u of 0.32 does not matter
        candidate("e", target=math.log(0.5), log_q=math.log(0.2)),  # 1, and a violation
        candidate("f", target=None, log_q=-1.0),
        candidate("g", target=-1.0, log_q=-1.0, passed=False),
        candidate("h", target=-math.inf, log_q=-1.0),  # 0
    ]
    rule = {"rule": "rejection", "M": 1, "threshold": 0.2500001, "weight": "A"}
    decisions, parameters = decide(connection, rows, **rule)
    expected = {
        "a": "accepted",
        "b": "accepted",
        "c": "duplicate",
        "d": "below threshold",
        "e": "accepted",
        "f": "cannot judge",
        "g": "gate",
        "h": "below threshold",
    }
    assert {c: decisions[c]["reason"] for c in "abcdefgh"} == expected
    assert parameters["violations"] == 1
    weights = {c: d["weight"] for c, d in decisions.items() if d["accepted"]}
    assert weights == pytest.approx({"a": 0.3, "b": 0.5, "e": 1.0}, rel=1e-14)
    assert reasons(connection, rows, **rule, cap=2) == expected | {"a": "cap"}


@pytest.mark.parametrize(("weight", "power"), [("one", 1), ("A", 2)])
def test_samples_accepted_by_chance_and_weighed_by_A_count_A_twice(connection, weight, power):
    q = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    p = np.array([0.1, 0.3, 0.2, 0.2, 0.2])
    n = 40_000
    picks, table = drawn(np.random.default_rng(9), list("vwxyz"), np.log(q), n, target=np.log(p))
    decisions, _ = decide(connection, table, rule="rejection", M=4 * (1 + 1e-12), distinct=False, weight=weight)
    a = p / (4 * q)
    total = np.zeros(5)
    for i, pick in enumerate(picks):
        decision = decisions[f"{n}-{i}"]
        total[pick] += decision["weight"] if decision["accepted"] else 0
    per_sample = np.ones(5) if weight == "one" else a
    counts = total / per_sample
    assert counts == pytest.approx(counts.round(), abs=1e-8)  # each accepted sample has its weight, exactly
    assert stats.chisquare(counts.round(), p * counts.round().sum()).pvalue > 0.01
    expected = n * q * a**power
    spread = np.sqrt(n * q * a * (1 - q * a)) * per_sample
    assert np.all(abs(total - expected) < 4 * spread)


def test_without_a_threshold_above_0_weights_alone_give_the_target(connection):
    q, p = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    picks, table = drawn(np.random.default_rng(10), list("xyz"), np.log(q), 20_000, target=np.log(p))
    rule = {"rule": "rejection", "M": 2.5 * (1 + 1e-12), "threshold": 0, "weight": "A", "distinct": False}
    decisions, _ = decide(connection, table, **rule)
    assert all(d["accepted"] for d in decisions.values())
    weights = np.array([decisions[f"20000-{i}"]["weight"] for i in range(20_000)])
    shares = np.bincount(picks, weights) / weights.sum()
    assert shares == pytest.approx(p, abs=0.02)  # 4 standard errors of the largest
    assert weights == pytest.approx((p / (2.5 * q))[picks], rel=1e-11)


# --- numbers that follow from rounds and pilots ---------------------------------------------


def test_a_threshold_rises_from_round_to_round_in_decimal(connection):
    rows = [candidate(c, score=score) for c, score in zip("abc", [0.2, 0.3, 0.4], strict=True)]
    assert 0.1 + 2 * 0.1 > 0.3
    for number, t, accepted in [(0, 0.1, "abc"), (1, 0.2, "bc"), (2, 0.3, "c"), (3, 0.4, "")]:
        rule = {"rule": "threshold", "threshold": 0.1, "raise_by": 0.1}
        decisions, parameters = decide(connection, rows, round_number=number, **rule)
        assert parameters["threshold"] == t
        assert "".join(sorted(c for c, d in decisions.items() if d["accepted"])) == accepted
    _, parameters = decide(connection, rows, round_number=1, rule="threshold", threshold=0.7, raise_by=0.1)
    assert parameters["threshold"] == 0.8 > 0.7 + 0.1  # the double of 0.7 is less than 0.7


CALIBRATED = {
    "threshold": {"rule": "threshold", "threshold": "calibrate"},
    "M": {"rule": "rejection", "M": "calibrate"},
    "beta": {"rule": "boltzmann", "beta": "calibrate"},
    "beta, r_max given": {"rule": "boltzmann", "beta": "calibrate", "r_max": 6.0},
    "k": {"rule": "loss", "k": "calibrate"},
}
calibrated = pytest.mark.parametrize("rule", CALIBRATED.values(), ids=CALIBRATED)


@calibrated
def test_a_calibrated_rule_accepts_its_share_of_the_judged_past_the_gates(connection, rule):
    rng, n = np.random.default_rng(11), 40_000
    table = pa.table(
        {
            "candidate_id": [lineage.digest(i) for i in range(n)],
            "prompt_id": [str(i // 8) for i in range(n)],
            "draw": np.arange(n) % 8,
            "text": [str(i) for i in range(n)],
            "tokens": rng.integers(1, 20, n),
            "log_q": rng.normal(-20, 5, n),
            "log_p": -rng.exponential(9, n),
            "score": pa.array([None if x < -1.5 else min(x, 6.0) for x in rng.normal(size=n)]),
            "passed": rng.random(n) < 0.8,
            "target": rng.normal(-20, 5, n),
        }
    ).cast(SCHEMA)
    decisions, parameters = decide(connection, table, **rule, share=0.3, pilot=2)
    open_ = [d for d in decisions.values() if d["reason"] not in {"cannot judge", "gate"}]
    pilot = [decisions[c.as_py()] for c, d in zip(table["candidate_id"], table["draw"], strict=True) if d.as_py() < 2]
    pilot = [d for d in pilot if d["reason"] not in {"cannot judge", "gate"}]
    assert parameters["pilot_candidates"] == len(pilot) < len(open_) / 3
    if rule["rule"] == "threshold":
        assert sum(d["accepted"] for d in pilot) == math.floor(0.3 * len(pilot))
        assert parameters["pilot_share"] == math.floor(0.3 * len(pilot)) / len(pilot)
    else:
        assert math.fsum(math.exp(d["log_a"]) for d in pilot) / len(pilot) == pytest.approx(0.3, rel=1e-12)
    # The pilot is not set aside. The number picked from it fits all candidates, up to the error of 2 draws in 8.
    share = sum(d["accepted"] for d in open_) / len(open_)
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / len(pilot)))


def test_only_the_pilot_is_looked_at(connection):
    rows = [candidate(f"{i}/{draw}", draw=draw, score=i + 100.0 * draw) for i in range(10) for draw in (0, 1)]
    _, parameters = decide(connection, rows, rule="threshold", threshold="calibrate", share=0.3)
    assert (parameters["threshold"], parameters["pilot_candidates"], parameters["pilot_share"]) == (6.0, 10, 0.3)


def test_what_cannot_be_calibrated_says_where_and_what_to_do(connection):
    rows = [candidate(c, score=1.0) for c in "abcd"]
    with pytest.raises(ValueError, match=r"acceptance.threshold cannot be .* \(draw < 1\): 100.0% of 4 candidates"):
        decide(connection, rows, rule="threshold", threshold="calibrate", share=0.3)
    with pytest.raises(ValueError, match=r"acceptance.M cannot be calibrated .*no candidate was judged"):
        decide(connection, rows, rule="rejection", M="calibrate", share=0.3)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rule": "loss", "k": "calibrate"}, "`k: calibrate` and `share:` go together"),
        ({"rule": "loss", "k": 1, "share": 0.3}, "`k: calibrate` and `share:` go together"),
        ({"rule": "rejection", "share": 0.3}, "`M: calibrate` and `share:` go together"),
        ({"rule": "threshold", "threshold": "calibrate", "share": 0.3, "raise_by": 0.1}, "`raise_by` needs a number"),
        ({"rule": "rejection", "M": "calibrate", "share": 0.3, "threshold": 0.5}, "`M: calibrate` is for u < A"),
        ({"rule": "threshold", "threshold": 1, "weight": "A"}, "Extra inputs are not permitted"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        TypeAdapter(AnyRule).validate_python(rule)


# --- the distributions they promise ---------------------------------------------------------


def test_rejection_draws_from_the_target_and_accepts_one_in_M(connection):
    q = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    p = np.array([0.1, 0.3, 0.2, 0.2, 0.2])  # M = 4
    n = 40_000
    picks, table = drawn(np.random.default_rng(1), list("vwxyz"), np.log(q), n, target=np.log(p))
    decisions, parameters = decide(connection, table, rule="rejection", M=4 * (1 + 1e-12), distinct=False)
    counts = kept(decisions, picks, 5)
    assert stats.chisquare(counts, p * counts.sum()).pvalue > 0.01
    assert stats.binomtest(int(counts.sum()), n, 1 / 4).pvalue > 0.01
    assert parameters["violations"] == 0


def test_an_M_too_small_is_seen_in_the_violations(connection):
    q, p = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    picks, table = drawn(np.random.default_rng(2), list("vw"), np.log(q), 1000, target=np.log(p))
    _, parameters = decide(connection, table, rule="rejection", M=1.2)
    assert parameters["violations"] == (picks == 1).sum()
    assert parameters["log_M_needed"] == pytest.approx(math.log(1.5), abs=1e-12)


def sequences_of_a_tiny_vocabulary():
    """Every sequence of 3 tokens from {x, y}, its probability under a bigram model, and its score."""
    after = {"": (0.6, 0.4), "x": (0.7, 0.3), "y": (0.2, 0.8)}
    sequences = ["".join(tokens) for tokens in itertools.product("xy", repeat=3)]
    log_q = [sum(math.log(after[s[i - 1] if i else ""]["xy".index(s[i])]) for i in range(3)) for s in sequences]
    return sequences, np.array(log_q), np.array([s.count("y") / 3 for s in sequences])


def test_boltzmann_draws_from_q_tilted_by_the_score(connection):
    sequences, log_q, score = sequences_of_a_tiny_vocabulary()
    beta = 0.4
    picks, table = drawn(np.random.default_rng(3), sequences, log_q, 40_000, score=score)
    decisions, _ = decide(connection, table, rule="boltzmann", beta=beta, distinct=False)
    tilted = np.exp(log_q + score / beta)
    counts = kept(decisions, picks, len(sequences))
    assert stats.chisquare(counts, tilted / tilted.sum() * counts.sum()).pvalue > 0.01
    assert all(d["log_a"] == (d["score"] - 1.0) / beta for d in decisions.values())


def test_a_cap_does_not_undo_what_a_stochastic_rule_did(connection):
    # 5000 prompts of 8 draws, one kept of each: among accepted candidates the choice is blind. Choosing the
    # smallest u instead would give back the distribution that was sampled from.
    sequences, log_q, score = sequences_of_a_tiny_vocabulary()
    picks, table = drawn(np.random.default_rng(4), sequences, log_q, 40_000, score=score)
    prompts = pa.array([str(i // 8) for i in range(40_000)])
    table = table.set_column(1, "prompt_id", prompts)
    decisions, _ = decide(connection, table, rule="boltzmann", beta=0.4, r_max=1, distinct=False, cap=1)
    tilted = np.exp(log_q + score / 0.4)
    counts = kept(decisions, picks, len(sequences))
    assert stats.chisquare(counts, tilted / tilted.sum() * counts.sum()).pvalue > 0.01


def test_the_loss_rule_accepts_each_sequence_as_often_as_its_loss_says(connection):
    sequences, log_q, _ = sequences_of_a_tiny_vocabulary()
    k = 0.8
    picks, table = drawn(
        np.random.default_rng(5), sequences, log_q, 40_000, log_p=log_q, tokens=np.full(len(sequences), 3)
    )
    decisions, _ = decide(connection, table, rule="loss", k=k, distinct=False)
    chance = np.minimum(1, -log_q / 3 / k)
    assert 0 < (chance == 1).sum() < len(sequences)
    seen, counts = np.bincount(picks, minlength=len(sequences)), kept(decisions, picks, len(sequences))
    assert (counts == seen)[chance == 1].all()
    open_ = chance < 1
    squares = (counts - seen * chance)[open_] ** 2 / (seen * chance * (1 - chance))[open_]
    assert stats.chi2.sf(squares.sum(), open_.sum()) > 0.01


# --- what must not matter -------------------------------------------------------------------

EVERY_RULE = [
    {"rule": "threshold", "threshold": 0.3},
    {"rule": "top_k", "k": 2},
    {"rule": "quantile", "share": 0.3},
    {"rule": "rejection", "pilot": 2, "safety": 1.3},
    {"rule": "boltzmann", "beta": 0.5},
    {"rule": "loss", "k": 2.0},
    {"rule": "rejection", "M": 2.0, "threshold": 0.4, "weight": "A"},
    {"rule": "threshold", "threshold": "calibrate", "share": 0.5, "pilot": 3},
    {"rule": "rejection", "M": "calibrate", "share": 0.3, "pilot": 3, "weight": "A"},
    {"rule": "boltzmann", "beta": "calibrate", "share": 0.5, "r_max": 1.25, "weight": "A"},
    {"rule": "loss", "k": "calibrate", "share": 0.3},
]
every_rule = pytest.mark.parametrize("rule", EVERY_RULE, ids=lambda rule: rule["rule"])


def a_round(prompts=60, draws=8):
    """Few scores and few texts, so that there are ties and duplicates; some rows are not judged."""
    rng = np.random.default_rng(6)
    return [
        candidate(
            f"{p}/{d}",
            prompt_id=str(p),
            draw=d,
            text=str(rng.integers(12)),
            tokens=int(rng.integers(1, 20)),
            log_q=-float(rng.random()),
            log_p=-float(rng.exponential(5)),
            target=-float(rng.random()),
            score=None if rng.random() < 0.1 else float(rng.integers(3)) / 2,
            passed=bool(rng.random() < 0.9),
        )
        for p in range(prompts)
        for d in range(draws)
    ]


@every_rule
def test_the_order_of_rows_does_not_matter(connection, rule):
    rows = a_round()
    first = decide(connection, rows, **rule, cap=2)
    shuffled = [rows[i] for i in np.random.default_rng(7).permutation(len(rows))]
    assert decide(connection, shuffled, **rule, cap=2) == first
    found = {d["reason"] for d in first[0].values()}
    assert {"accepted", "gate", "duplicate"} <= found  # the round has something to get wrong
    assert "cap" in found or rule["rule"] == "top_k"


@every_rule
def test_deciding_again_from_stored_parameters_gives_the_same_bits(connection, rule):
    rows = a_round()
    decisions, parameters = decide(connection, rows, **rule, cap=2)
    stored = json.loads(json.dumps(parameters, allow_nan=False))
    again = connection.sql(acceptance.decisions_sql("candidates", stored, 0)).to_arrow_table().to_pylist()
    assert {d["candidate_id"]: d for d in again} == decisions
    assert all(d["u"] == lineage.uniform(c, 0) for c, d in decisions.items())
    for d in decisions.values():
        if rule.get("weight") != "A":
            assert d["weight"] == 1.0
        elif d["accepted"]:
            assert d["weight"] == pytest.approx(math.exp(d["log_a"]), rel=1e-15)


@every_rule
def test_another_seed_chooses_differently_among_equals(connection, rule):
    rows = a_round()
    first, _ = decide(connection, rows, **rule, cap=2)
    second, _ = decide(connection, rows, seed=1, **rule, cap=2)
    accepted = [sorted(c for c, d in decisions.items() if d["accepted"]) for decisions in (first, second)]
    assert accepted[0] != accepted[1]


@every_rule
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")], ids=str)
def test_a_bad_row_is_not_accepted_and_changes_no_other_decision(connection, rule, bad):
    rows = a_round()
    before, parameters = decide(connection, rows, **rule)
    broken = candidate("bad", prompt_id="3", draw=7, log_q=bad, log_p=bad, target=bad, score=bad, tokens=5)
    after, parameters_after = decide(connection, [*rows, broken], **rule)
    assert after.pop("bad")["reason"] == "cannot judge"
    assert after == before
    assert parameters_after == parameters


@every_rule
def test_later_draws_change_no_decision_of_a_rule_that_looks_at_candidates_alone(connection, rule):
    rows = a_round()
    first = [row for row in rows if row["draw"] < 4]

    def accepted(rows, **how):
        return {c for c, d in decide(connection, rows, **rule, **how)[0].items() if d["accepted"]}

    def per_prompt(accepted):
        return Counter(candidate_id.split("/")[0] for candidate_id in accepted)

    early, late = accepted(first, distinct=False), accepted(rows, distinct=False)
    alone = TypeAdapter(AnyRule).validate_python(rule).per_candidate
    assert alone == (rule["rule"] not in {"top_k", "quantile"} and rule != {"rule": "boltzmann", "beta": 0.5})
    if rule["rule"] != "top_k":  # 2 of the first 4 may stay the best 2
        assert alone == (early == {c for c in late if int(c.split("/")[1]) < 4})
    if alone:  # and a prompt never has fewer accepted than before, though another of one text may be preferred
        assert per_prompt(accepted(first, cap=2)) <= per_prompt(accepted(rows, cap=2))


@every_rule
def test_an_empty_round_has_no_decisions(connection, rule):
    assert decide(connection, [], **rule)[0] == {}


def test_a_score_of_none_is_not_a_score_of_zero(connection):
    rows = [candidate("a", score=None), candidate("b", score=0.0)]
    assert reasons(connection, rows, rule="threshold", threshold=-1) == {"a": "cannot judge", "b": "accepted"}
    assert reasons(connection, rows, rule="top_k", k=2) == {"a": "cannot judge", "b": "accepted"}


def test_rules_that_need_no_score_decide_without_one(connection):
    rows = [candidate("a", score=None, log_p=-30.0, tokens=3, log_q=-1.0, target=-1.0)]
    assert reasons(connection, rows, rule="loss", k=1) == {"a": "accepted"}
    assert reasons(connection, rows, rule="rejection", M=1) == {"a": "accepted"}


def test_a_quantile_of_ties_does_not_keep_the_first_prompts_only(connection):
    rng = np.random.default_rng(8)
    rows = [
        candidate(f"{p}/{d}", prompt_id=str(p), draw=d, score=float(rng.random() < 0.9))
        for p in range(100)
        for d in range(8)
    ]
    decisions, _ = decide(connection, rows, rule="quantile", share=0.5)
    accepted = [d for d in decisions.values() if d["accepted"]]
    assert len(accepted) == 400
    # By row order 56 prompts would fill the share; by hash a prompt is missed with a chance of about 0.44^7 at most.
    assert len({d["prompt_id"] for d in accepted}) >= 97


def test_numbers_reach_the_sql_to_the_bit(connection):
    score = 0.30000000000000004  # 0.1 + 0.2, one bit above 0.3
    assert reasons(connection, [candidate("a", score=score)], rule="threshold", threshold=score) == {
        "a": "below threshold"
    }
    assert reasons(connection, [candidate("a", score=score)], rule="threshold", threshold=0.3) == {"a": "accepted"}


def test_extreme_numbers_do_not_stop_the_others(connection):
    rows = [
        candidate("a", score=-1e308, log_p=-5e-324, tokens=10, log_q=-1e308, target=1e308),
        candidate("b", score=1e308, log_p=-1e308, tokens=1, log_q=1e308, target=-1e308),
    ]
    assert reasons(connection, rows, rule="boltzmann", beta=1e-300) == {"a": "u >= A", "b": "accepted"}
    assert reasons(connection, rows, rule="loss", k=1e-300) == {"a": "u >= A", "b": "accepted"}
    assert reasons(connection, rows, rule="rejection", M=1) == {"a": "accepted", "b": "u >= A"}
