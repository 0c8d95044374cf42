"""Which number accepts a wanted share: by hand, to the bit where there is a formula, and what cannot be."""

import math

import numpy as np
import pytest

from rsft_pipeline import calibration
from rsft_pipeline.calibration import CalibrationError


def mean_a(values, c):
    """Mean of min(1, exp(value − c)), summed exactly."""
    return math.fsum(np.exp(np.minimum(0, np.asarray(values) - c))) / len(values)


@pytest.mark.parametrize(
    ("scores", "share", "t", "accepted"),
    [
        ([0.1, 0.4, 0.2, 0.3], 0.5, 0.2, 2),
        ([0.1, 0.4, 0.2, 0.3], 0.74, 0.2, 2),  # 2.96 of 4
        ([0.1, 0.4, 0.2, 0.3], 0.75, 0.1, 3),
        ([1, 1, 0.5, 0.5, 0.5, 0], 0.5, 0.5, 2),  # three have 0.5: all or none of them
        ([1, 1, 0.5, 0.5, 0.5, 0], 0.84, 0, 5),
        ([0.0, 1.0], 1.0, np.nextafter(0.0, -1), 2),
        (list(range(100)), 0.07, 92, 7),  # 0.07 · 100 > 7 in binary, and 7 in decimal
        (list(range(100)), 0.29, 70, 29),  # 0.29 · 100 < 29 in binary
    ],
)
def test_the_threshold_accepts_the_largest_share_that_is_not_too_large(scores, share, t, accepted):
    found = calibration.threshold(np.array(scores, float), share)
    assert found == t
    assert (np.array(scores) > found).sum() == accepted


@pytest.mark.parametrize(
    ("losses", "share", "k"),
    [
        ([1, 2, 3, 4], 0.5, 5.0),  # all below k: 10 / k = 2
        ([1, 2, 3, 4], 0.8, 2.5),  # 3 / k + 2 = 3.2
        ([1, 2, 3, 4], 0.75, 3.0),  # 6 / k + 1 = 3
        ([4, 2, 3, 1], 1.0, 1.0),  # the largest k that accepts them all
        ([0, 0, 2, 2], 0.5, 2.0),
        ([0, 0, 2, 2], 0.25, 4.0),
        ([7], 0.1, 70.0),
    ],
)
def test_k_by_hand(losses, share, k):
    with np.errstate(divide="ignore"):
        assert math.exp(calibration.log_scale(np.log(losses), share)) == pytest.approx(k, rel=1e-15)


def test_a_scale_hits_its_share_to_float_precision_over_a_thousand_nats():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 1000, 50_000):
        for values in (rng.normal(size=n), 300 * rng.normal(size=n), rng.choice([-1000.0, 0.0, 5.0, 700.0], n)):
            for share in (0.01, 0.3, 0.5, 0.9, rng.random()):
                assert mean_a(values, calibration.log_scale(values, share)) == pytest.approx(share, rel=2e-13)


def test_beta_by_hand():
    # exp(−1/β) + exp(−2/β) = 3/4 where exp(−1/β) = 1/2
    assert calibration.temperature(np.array([-1.0, -2.0]), 3 / 8) == pytest.approx(1 / math.log(2), rel=1e-15)
    # One of three has A = 1; (1 + x + x) / 3 = 1/2 where x = 1/4
    assert calibration.temperature(np.array([-1.0, 0.0, -1.0]), 1 / 2) == pytest.approx(1 / math.log(4), rel=1e-15)
    # Two of four have A = 1; (2 + x + x²) / 4 = 11/16 where x = 1/2
    found = calibration.temperature(np.array([-2.0, 0.0, -1.0, 0.0]), 11 / 16)
    assert found == pytest.approx(1 / math.log(2), rel=1e-15)


def test_beta_hits_its_share_to_float_precision():
    rng = np.random.default_rng(1)
    for n in (1, 2, 1000, 50_000):
        for shortfalls in (-rng.exponential(size=n), -1e-200 * rng.random(n), -(10.0 ** rng.uniform(-9, 9, n))):
            for share in (0.01, 0.3, 0.5, 0.9):
                beta = calibration.temperature(shortfalls, share)
                assert math.fsum(np.exp(shortfalls / beta)) / n == pytest.approx(share, rel=2e-13)


def test_the_largest_share_that_can_be_had_is_had_however_it_is_rounded():
    values = np.array([-np.inf] * 93 + [1.0] * 7)
    assert calibration.log_scale(values, 0.07) == 1.0  # 0.07 · 100 is more than 7 in floats


def test_what_no_number_can_give_is_an_error_that_says_what_to_do():
    same = np.full(10, 0.5)
    with pytest.raises(CalibrationError, match=r"100.0% of 10 candidates score 0.5.*rule: quantile.*share of 1.0"):
        calibration.threshold(same, 0.3)
    with pytest.raises(CalibrationError, match="less than one: raise `pilot`"):
        calibration.threshold(same, 0.05)
    with pytest.raises(CalibrationError, match=r"2 of 4 .* never be accepted.*Ask for 0.5 or less"):
        calibration.log_scale(np.array([0.0, 1.0, -np.inf, -np.inf]), 0.6)
    with pytest.raises(CalibrationError, match=r"every β accepts these and more. Ask for a share above 0.5"):
        calibration.temperature(np.array([0.0, -1.0]), 0.5)
    with pytest.raises(CalibrationError, match="no β accepts everything"):
        calibration.temperature(np.array([-2.0, -1.0]), 1.0)
    for find in (calibration.threshold, calibration.log_scale, calibration.temperature):
        with pytest.raises(CalibrationError, match="no candidate was judged and passed"):
            find(np.array([]), 0.5)


def test_a_share_is_the_decimal_that_was_written():
    best = np.array([0.0] * 7 + [-1.0] * 93)
    with pytest.raises(calibration.CalibrationError, match="score the largest possible"):
        calibration.temperature(best, 0.07)  # 0.07 · 100 is a little more than 7 in doubles
