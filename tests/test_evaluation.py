"""Metrics by enumeration, intervals by simulation, and the verdicts of promotion and stop."""

import math
from itertools import combinations

import letters_store as letters
import numpy as np
import pytest

from rsft_pipeline.evaluation import (
    Comparison,
    FinishedRound,
    PromptResult,
    compare,
    interval,
    pass_at_k,
    promoted,
    stop_reason,
    summarise,
)
from rsft_pipeline.recipe.evaluation import Promotion, Stop
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.rounds import Round
from rsft_pipeline.steps.evaluate import results


def result(prompt_id, passes=0, draws=4, score=0.5, distinct=1, tokens=10.0, eligible=None):
    return PromptResult(str(prompt_id), draws, passes, score, distinct, tokens, eligible)


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                share = sum(map(any, subsets)) / len(subsets)
                assert pass_at_k(np.array([n]), np.array([c]), k)[0] == pytest.approx(share, abs=1e-15)


def test_pass_at_k_is_vectorised_and_stable_for_many_draws():
    values = pass_at_k(np.array([100_000, 100_000, 4]), np.array([1, 0, 4]), 4)
    np.testing.assert_allclose(values, [4 / 100_000, 0, 1], rtol=1e-10)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 2), (3, -1, 2), (3, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(np.array([n]), np.array([c]), k)


def test_a_summary_by_hand():
    results = [
        result("a", passes=0, score=0.1, distinct=4, tokens=10),
        result("b", passes=2, score=0.4, distinct=2, tokens=20),
        result("c", passes=4, score=None, distinct=1, tokens=60),
    ]
    summary = summarise(results, k=2, confidence=0.95)
    assert summary.prompts == 3
    # mean 0.5, standard deviation 0.5, t(2) = 4.3027: 0.5 ± 1.242, which the bounds cut
    assert (summary.pass_at_1.value, summary.pass_at_1.low, summary.pass_at_1.high) == (0.5, 0, 1)
    assert summary.pass_at_k.value == pytest.approx((0 + 5 / 6 + 1) / 3, abs=1e-15)  # 1 of 6 pairs of b has no pass
    # nobody judged c: mean 0.25, standard deviation 0.3/√2, t(1) = 12.7062
    assert summary.mean_score.n == 2
    assert summary.mean_score.value == 0.25
    assert summary.mean_score.high == pytest.approx(0.25 + 12.706204736 * 0.15, abs=1e-8)
    assert summary.mean_score.low == pytest.approx(0.25 - 12.706204736 * 0.15, abs=1e-8)
    assert summary.distinct_ratio == pytest.approx((1 + 0.5 + 0.25) / 3, abs=1e-15)
    assert summary.mean_tokens == 30


def test_prompts_without_a_value_are_left_out_and_counted():
    summary = summarise([result("a", passes=1, draws=1, score=None), result("b", passes=4)], k=2, confidence=0.95)
    assert (summary.pass_at_1.n, summary.pass_at_k.n, summary.mean_score.n) == (2, 1, 1)
    exactly = summarise([result("a", passes=1, draws=2), result("b", passes=0, draws=1)], k=2, confidence=0.95)
    assert (exactly.pass_at_k.n, exactly.pass_at_k.value) == (1, 1.0)  # two draws are enough for k = 2
    nothing = summarise([result("a", passes=1, draws=1, score=None)], k=2, confidence=0.95)
    assert (nothing.pass_at_k, nothing.mean_score) == (None, None)


def test_no_results_are_an_error():
    with pytest.raises(ValueError, match="no held-out prompt was evaluated"):
        summarise([], k=2, confidence=0.95)


@pytest.mark.parametrize("n", [1, 3, 100])
def test_all_solved_or_none_gives_the_exact_interval(n):
    lowest = 0.025 ** (1 / n)  # were the chance lower, n passes of n would be rarer than 2.5 %
    solved = summarise([result(i, passes=4) for i in range(n)], k=2, confidence=0.95).pass_at_1
    assert (solved.value, solved.high) == (1, 1)
    assert solved.low == pytest.approx(lowest, abs=1e-12)
    unsolved = summarise([result(i, passes=0) for i in range(n)], k=2, confidence=0.95).pass_at_1
    assert (unsolved.value, unsolved.low) == (0, 0)
    assert unsolved.high == pytest.approx(1 - lowest, abs=1e-12)


def test_equal_prompts_never_give_an_interval_without_width():
    summary = summarise([result(i, passes=2, score=0.3) for i in range(3)], k=2, confidence=0.95)
    assert summary.pass_at_1.low < 0.2
    assert summary.pass_at_1.high > 0.8
    assert (summary.mean_score.low, summary.mean_score.high) == (-math.inf, math.inf)
    rounded = [result(i, score=s) for i, s in enumerate([0.3, 0.1 + 0.2, 0.3])]  # equal but for the last bit
    assert summarise(rounded, k=2, confidence=0.95).mean_score.high == math.inf


def test_a_comparison_pairs_the_prompts_that_both_have():
    policy = [result("a", 1, tokens=10), result("b", 0, tokens=30), result("c", 4, tokens=99)]
    checkpoint = [result("d", 4, tokens=99), result("b", 1, tokens=45), result("a", 4, tokens=15)]
    comparison = compare(policy, checkpoint, "pass_at_1", k=2, confidence=0.9)
    assert comparison.n == 2
    assert comparison.difference == 0.5  # 0.75 and 0.25: standard deviation 0.25·√2, t(1) at 95 % = 6.3138
    assert comparison.low == -1 and comparison.high == 1  # 0.5 ± 1.578, cut
    assert comparison.length_drift == 1.5
    back = compare(checkpoint, policy, "pass_at_1", k=2, confidence=0.9)
    assert back.difference == -0.5


def test_each_metric_is_compared_by_its_own_values():
    policy = [result(i, passes=1, score=0.2) for i in range(4)]
    checkpoint = [result(i, passes=2, score=0.5 + i / 10) for i in range(4)]
    by = {m: compare(policy, checkpoint, m, k=2, confidence=0.95) for m in ("pass_at_1", "pass_at_k", "mean_score")}
    assert by["pass_at_1"].difference == 0.25
    assert by["pass_at_k"].difference == pytest.approx(5 / 6 - 1 / 2, abs=1e-15)
    # 0.3, 0.4, 0.5, 0.6: standard deviation √(0.05/3), t(3) = 3.18245
    assert by["mean_score"].difference == pytest.approx(0.45, abs=1e-15)
    assert by["mean_score"].low == pytest.approx(0.45 - 3.182446305 * math.sqrt(0.05 / 3) / 2, abs=1e-8)


def test_a_comparison_is_the_same_to_the_bit_in_whatever_order_the_prompts_come():
    rng = np.random.default_rng(0)
    policy, checkpoint = (
        [result(i, score=rng.lognormal(0, 9), draws=7, eligible=int(rng.integers(8))) for i in range(300)]
        for _ in range(2)
    )
    first = compare(policy, checkpoint, "mean_score", k=1, confidence=0.95)
    for _ in range(5):
        sides = [[side[i] for i in rng.permutation(300)] for side in (policy, checkpoint)]
        assert compare(*sides, "mean_score", k=1, confidence=0.95) == first


def test_nothing_in_common_is_an_error():
    with pytest.raises(ValueError, match="cannot be compared by mean_score"):
        compare([result("a", score=None)], [result("a")], "mean_score", k=1, confidence=0.95)


@pytest.mark.parametrize("prompts", [20, 200])
def test_the_paired_interval_covers_the_true_difference_about_as_often_as_it_says(prompts):
    # Prompts differ in difficulty; training adds to the log-odds. 8 draws of each prompt from either model.
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=200_000)
    chance = [1 / (1 + np.exp(difficulty)), 1 / (1 + np.exp(difficulty - 0.5))]
    truth = float((chance[1] - chance[0]).mean())
    covered, widths, trials = 0, [], 400
    for _ in range(trials):
        sample = rng.integers(len(difficulty), size=prompts)
        passes = [rng.binomial(8, c[sample]) for c in chance]
        sides = [[result(i, int(n), draws=8) for i, n in enumerate(side)] for side in passes]
        comparison = compare(*sides, "pass_at_1", k=4, confidence=0.9)
        covered += comparison.low <= truth <= comparison.high
        widths.append(comparison.high - comparison.low)
    assert 0.86 <= covered / trials <= 0.94  # 0.9 ± 2.7 standard errors
    assert np.mean(widths) < 1.2 / math.sqrt(prompts)


def comparison(difference, low, high):
    return Comparison("pass_at_1", difference, low, high, 50, 1.0)


def test_better_needs_the_whole_interval_above_the_margin():
    better = Promotion(require="better")
    assert promoted(comparison(0.12, 0.08, 0.16), better) == (
        True,
        "better: pass_at_1 +0.120 [+0.080, +0.160] > 0 over 50 prompts",
    )
    assert promoted(comparison(0.12, 0.0, 0.24), better) == (
        False,
        "not better: pass_at_1 +0.120 [+0.000, +0.240] is not wholly > 0 over 50 prompts",
    )
    assert not promoted(comparison(0.12, 0.08, 0.16), Promotion(require="better", margin=0.1))[0]


def test_not_worse_allows_a_loss_within_the_margin():
    promotion = Promotion(require="not_worse", margin=0.05)
    assert promoted(comparison(0.0, -0.04, 0.04), promotion) == (
        True,
        "not worse: pass_at_1 +0.000 [-0.040, +0.040] > -0.05 over 50 prompts",
    )
    assert promoted(comparison(0.0, -0.05, 0.05), promotion)[1].startswith("may be worse:")


def test_a_metric_that_does_not_vary_promotes_nobody():
    same = [result(i, score=1.0) for i in range(100)]
    for require in ("better", "not_worse"):
        verdict = promoted(
            compare(same, same, "mean_score", k=1, confidence=0.95), Promotion(require=require, margin=0.1)
        )
        assert not verdict[0]


def test_an_identical_checkpoint_on_many_prompts_is_not_worse_and_not_better():
    same = [result(i, passes=i % 5) for i in range(100)]
    identical = compare(same, same, "pass_at_1", k=1, confidence=0.95)
    assert not promoted(identical, Promotion(require="better"))[0]
    assert promoted(identical, Promotion(require="not_worse", margin=0.05))[0]


def test_what_is_nearly_identical_is_not_more_surely_not_worse_than_what_is():
    def verdict(n, worse):
        before = [result(i, passes=4) for i in range(n)]
        after = [result(i, passes=4 - (i < worse)) for i in range(n)]
        compared = compare(before, after, "pass_at_1", k=1, confidence=0.95)
        return promoted(compared, Promotion(require="not_worse", margin=0.01))

    assert [verdict(100, worse)[0] for worse in (0, 1)] == [False, False]
    assert [verdict(500, worse)[0] for worse in (0, 1)] == [True, True]
    assert verdict(500, 500)[1].startswith("may be worse: pass_at_1 -0.")


def test_an_interval_of_what_is_rare_and_large_misses_as_often_as_is_said():
    chance, missed = np.random.default_rng(0), 0
    for _ in range(2000):
        lost = -(chance.random(100) < 0.02).astype(float)
        lost[0] += chance.choice([-1, 1]) / 8  # one draw of eight
        low, high = interval(lost, 0.95, (-1.0, 1.0))
        missed += not low <= -0.02 <= high
    assert 0.11 < missed / 2000 < 0.16


def test_a_mean_score_of_fewer_eligible_draws_promotes_nobody():
    before = [result(i, score=i / 40, eligible=4) for i in range(20)]

    def verdict(eligible, metric="mean_score", passes=0, gain=0.3):
        after = [result(i, passes, score=i / 40 + gain + i / 100, eligible=eligible) for i in range(20)]
        return promoted(compare(before, after, metric, k=4, confidence=0.95), Promotion(metric=metric))

    said = "mean_score +0.395 [+0.367, +0.423] > 0 over 20 prompts"
    # Equal on 20 prompts: what happens on 1 − 0.025^(1/20) of all may have gone unseen.
    assert verdict(4) == (True, f"better: {said}; eligible draws +0.000 [-0.168, +0.168]")
    # 20 prompts that are all at −0.75: the interval reaches up to −0.75 + 0.168 · 1.75
    assert verdict(1) == (False, f"fewer draws are eligible: {said}; eligible draws -0.750 [-0.792, -0.455]")
    assert verdict(1, gain=-0.1)[1].startswith("not better: mean_score -0.005")  # that alone is reason enough
    assert verdict(None) == (True, f"better: {said}")  # an evaluation from before they were counted
    assert verdict(1, "pass_at_1", passes=1)[0]  # there the draws that are not eligible did not pass


def test_draws_that_were_not_judged_or_failed_a_gate_are_not_eligible(tmp_path, write_recipe):
    round_ = Round(load(write_recipe(letters.RECIPE)), "r000", letters.BASE, "base", letters.BASE, "")
    first, second = (letters.prompt_id(number, "eval") for number in (0, 1))
    with letters.write(tmp_path) as store:  # the last of four draws was not judged
        held_out = {"recipe": letters.RECIPE, "round": "r000", "split": "eval"}
        store.append("round_prompts", [{**held_out, "prompt_id": prompt} for prompt in (first, second)])
        gate = "UPDATE scores SET passed = false WHERE candidate_id = ? AND scorer = 'combined'"
        store.commit(lambda connection: connection.execute(gate, [letters.candidate_id("r000", 0, 0, "eval")]))
        found = results(store.query, round_, letters.BASE, letters.SCORERS["combined"])
    assert {r.prompt_id: (r.draws, r.eligible, r.score) for r in found} == {first: (4, 2, 0.75), second: (4, 3, 0.75)}


def test_eligible_draws_are_summarised_where_they_were_counted():
    summary = summarise([result("a", eligible=4), result("b", eligible=1), result("c")], k=2, confidence=0.95)
    assert (summary.eligible.value, summary.eligible.n) == (0.625, 2)
    assert (summary.eligible.low, summary.eligible.high) == (0, 1)  # 0.625 ± 12.7062 · 0.375, cut
    assert summarise([result("a")], k=2, confidence=0.95).eligible is None


def history(*promotions, value=0.5, tokens=1000):
    return [FinishedRound(p, value, tokens) for p in promotions]


def test_the_loop_goes_on_while_nothing_is_reached():
    stop = Stop(rounds=4, patience=2, target=0.9, tokens=10_000)
    assert stop_reason(stop, [], "pass_at_1") is None
    assert stop_reason(stop, history(False, True, False), "pass_at_1") is None


def test_the_loop_ends_after_the_last_round():
    assert stop_reason(Stop(rounds=2), history(True), "pass_at_1") is None
    assert stop_reason(Stop(rounds=2), history(True, True), "pass_at_1") == "rounds used up: 2 finished, 2 allowed"


def test_the_loop_ends_when_patience_does():
    stop = Stop(rounds=9, patience=2)
    assert stop_reason(stop, history(False), "pass_at_1") is None
    assert stop_reason(stop, history(False, False, True, False), "pass_at_1") is None
    reason = "patience used up: no promotion in the last 2 rounds"
    assert stop_reason(stop, history(True, False, False), "pass_at_1") == reason
    assert stop_reason(stop, history(False, False), "pass_at_1") == reason


def test_the_loop_ends_when_the_champion_reaches_the_target():
    stop = Stop(rounds=9, target=0.5)
    assert stop_reason(stop, history(True, value=0.499), "pass_at_1") is None
    assert stop_reason(stop, history(True, value=None), "pass_at_1") is None
    assert stop_reason(stop, history(True, value=0.5), "mean_score") == (
        "target reached: the champion's mean_score is 0.500, and 0.5 is enough"
    )


def test_the_loop_ends_when_the_tokens_are_spent():
    stop = Stop(rounds=9, tokens=2000)
    assert stop_reason(stop, history(True), "pass_at_1") is None
    assert stop_reason(stop, history(True, True), "pass_at_1") == "budget used up: 2000 of 2000 tokens drawn"
