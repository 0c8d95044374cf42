"""Plots: what is where, on the audit pages and in MLflow and Dagster."""

import json

import pytest

from rsft_pipeline import report
from rsft_pipeline.audit.browse import Distribution
from web import drawing


def estimate(value, low=None, high=None):
    return {"pass_at_1": {"value": value, "low": low, "high": high}, "mean_score": None}


def row(key, checkpoint, champion, policy=None, source="r000", accepted=0):
    return {
        "round": key,
        "state": "finished",
        "policy_source": source,
        "policy_eval": json.dumps(policy or estimate(0.5)),
        "checkpoint_eval": json.dumps(checkpoint),
        "champion_eval": json.dumps(champion),
        "candidates": 8,
        "accepted": accepted,
    }


BASE, FIRST, WORSE = estimate(0.2, 0.1, 0.3), estimate(0.6, 0.5, 0.8), estimate(0.4, None, 0.5)
HISTORY = [row("r000", FIRST, FIRST, BASE, "base", accepted=2), row("r001", WORSE, FIRST, FIRST, accepted=8)]


def test_a_pages_plot_of_rounds_has_each_value_at_its_place():
    plot = drawing.rounds(HISTORY, "pass_at_1")
    places = {float(name): y for y, name in plot.ys.ticks}

    def y(value):  # from the ticks alone: they are what people read the plot by
        return places[0.0] + value / 0.8 * (places[0.8] - places[0.0])

    assert places[0.0] == plot.bottom > places[0.8] and len(plot.ys.ticks) > 2
    assert [name for _, name in plot.xs.ticks] == ["base", "r000", "r001"]
    assert [(one.x, one.label) for one in plot.measured] == [
        (x, f"{name}: {value:.3f}") for (x, name), value in zip(plot.xs.ticks, (0.2, 0.6, 0.4), strict=True)
    ]
    drawn = [(one.low, one.y, one.high) for one in plot.measured]
    expected = [(y(0.1), y(0.2), y(0.3)), (y(0.5), y(0.6), y(0.8)), (y(0.4), y(0.4), y(0.5))]  # an open end: none
    assert drawn == [pytest.approx(each) for each in expected]
    line = [float(point.split(",")[1]) for point in plot.champion.split()]
    assert line == pytest.approx([y(v) for v in (0.2, 0.2, 0.6, 0.6, 0.6, 0.6)], abs=0.051)  # r001 was not promoted
    across = plot.bottom - min(y for y, _ in plot.ys.ticks)
    assert [(height / across, said) for _, _, height, said in plot.bars] == [
        (pytest.approx(0.25, abs=0.01), "25.0%"),
        (pytest.approx(1, abs=0.01), "100.0%"),
    ]
    assert [x + plot.bar / 2 for x, *_ in plot.bars] == pytest.approx([x for x, _ in plot.xs.ticks[1:]])


def test_a_figure_of_rounds_has_each_value_at_its_place():
    axes, rates = report.rounds_figure("letters", "pass_at_1", HISTORY).axes
    (points, _, (bars,)) = axes.containers[0]
    assert list(zip(*points.get_data(), strict=True)) == [(0, 0.2), (1, 0.6), (2, 0.4)]
    spans = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    assert spans == [pytest.approx(each) for each in ((0.1, 0.3), (0.5, 0.8), (0.4, 0.5))]
    (champion,) = [line for line in axes.get_lines() if line.get_label() == "champion"]
    assert (list(champion.get_ydata()), champion.get_drawstyle()) == ([0.2, 0.6, 0.6], "steps-post")
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in rates.patches] == [(1, 0.25), (2, 1)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["base", "r000", "r001"]
    assert axes.get_zorder() > rates.get_zorder() and not axes.patch.get_visible()  # bars are behind, not hidden


def test_the_first_point_is_called_what_it_is_where_earlier_rounds_lack_the_metric():
    lacking = {"pass_at_1": None, "mean_score": None}
    history = [row("r000", lacking, lacking, lacking, "base"), HISTORY[1]]
    assert [name for _, name in drawing.rounds(history, "pass_at_1").xs.ticks] == ["from r000", "r001"]
    axes, _ = report.rounds_figure("letters", "pass_at_1", history).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["from r000", "r001"]


def test_of_many_rounds_not_each_is_named():
    history = HISTORY[:1] + [row(f"r{i:03}", WORSE, FIRST) for i in range(1, 60)]
    assert len(drawing.rounds(history, "pass_at_1").xs.ticks) <= 12
    axes, _ = report.rounds_figure("letters", "pass_at_1", history).axes
    named = {
        round(place): label.get_text() for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    }
    assert len(named) <= 14 and named[0] == "base" and named[5] == "r004"


def test_a_pages_histogram_has_the_accepted_on_top_of_the_rejected():
    plot = drawing.histogram(Distribution(low=0.0, high=1.0, accepted=[0, 3], rejected=[10, 5]))
    heights = {name: y for y, name in plot.ys.ticks}
    (x0, middle0, top0, end0, said0), (x1, middle1, top1, end1, said1) = plot.bars
    assert (middle0, top0, end0) == (heights["10"], heights["10"], plot.bottom)  # ten rejected, and nothing above
    one = (plot.bottom - heights["10"]) / 10
    assert (end1 - middle1, middle1 - top1) == pytest.approx((5 * one, 3 * one))
    assert (said0, said1) == ("0 to 0.5: 0 accepted, 10 rejected", "0.5 to 1: 3 accepted, 5 rejected")
    assert x0 == plot.left and x1 == pytest.approx((plot.left + plot.right) / 2)
    assert plot.words.endswith("3 accepted, 15 rejected")
