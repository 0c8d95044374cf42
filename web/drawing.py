"""Drawing: where the parts of a plot or a graph go.

Belongs here: turning numbers into coordinates. Not: lines and colours (templates/drawings.html and the style sheet):
drawings are SVG, as sharp, and as light or dark, as the page around them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsft_pipeline.audit.browse import Distribution
from rsft_pipeline.report import by_round, measured


@dataclass(frozen=True)
class Axis:
    """Ticks of an axis: their places and labels."""

    ticks: list[tuple[float, str]]


# --- rounds ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A result: its point, and where its interval begins and ends."""

    x: float
    y: float
    low: float
    high: float
    label: str


@dataclass(frozen=True)
class RoundsPlot:
    """The promotion metric by round, of each checkpoint and of the champion, and the accepted share as bars."""

    width: int
    height: int
    left: int
    right: int
    bottom: int
    xs: Axis
    ys: Axis
    measured: list[Measured]
    champion: str  # the points of its line
    bars: list[tuple[float, float, float, str]]  # x, y, height, label
    bar: float  # width


def rounds(history: Sequence[Mapping[str, Any]], metric: str) -> RoundsPlot | None:
    """The plot of a recipe's finished and revoked rounds; None if none has a value of the metric."""
    done = [row for row in history if row["state"] != "started" and measured(row, metric)]
    if not done:
        return None
    width, height, left, right, top, bottom = 1120, 250, 46, 10, 12, 220
    names, made, champions = by_round(done, metric)
    ends = [end for one in made for end in (one["low"], one["high"], one["value"]) if end is not None]
    scale, ticks = _scale(min(0.0, *ends), max(ends), bottom, top)
    step = (width - left - right) / len(names)
    xs = [left + step * (i + 0.5) for i in range(len(names))]
    every = math.ceil(len(names) / 12)
    points = []
    for x, one in zip(xs, champions, strict=True):
        points += [f"{x - step / 2:.1f},{scale(one['value']):.1f}", f"{x + step / 2:.1f},{scale(one['value']):.1f}"]
    shares = [row["accepted"] / max(1, row["candidates"]) for row in done]
    bar = min(36.0, step * 0.5)
    return RoundsPlot(
        width,
        height,
        left,
        width - right,
        bottom,
        Axis([(x, name) for i, (x, name) in enumerate(zip(xs, names, strict=True)) if i % every == 0]),
        Axis(ticks),
        [
            Measured(
                x,
                scale(one["value"]),
                scale(one["value"] if one["low"] is None else one["low"]),
                scale(one["value"] if one["high"] is None else one["high"]),
                f"{name}: {one['value']:.3f}",
            )
            for x, name, one in zip(xs, names, made, strict=True)
        ],
        " ".join(points),
        [
            (x - bar / 2, bottom - share * (bottom - top), share * (bottom - top), f"{share:.1%}")
            for x, share in zip(xs[1:], shares, strict=True)
        ],
        bar,
    )


# --- scores ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """Candidates by score, accepted on top of rejected."""

    width: int
    height: int
    left: int
    right: int
    bottom: int
    xs: Axis
    ys: Axis
    bars: list[tuple[float, float, float, float, str]]  # x, y of the rejected, y of the accepted, end, label
    bar: float
    words: str  # for screen readers


def histogram(scores: Distribution) -> Histogram:
    width, height, left, right, top, bottom = 520, 200, 62, 12, 12, 168
    totals = [a + r for a, r in zip(scores.accepted, scores.rejected, strict=True)]
    scale, ticks = _scale(0, max(totals), bottom, top, whole=True)
    step = (width - left - right) / len(totals)
    size = (scores.high - scores.low) / len(totals)
    bars = []
    for i, (accepted, rejected) in enumerate(zip(scores.accepted, scores.rejected, strict=True)):
        if accepted or rejected:
            begin = scores.low + i * size
            said = f"{begin:.4g} to {begin + size:.4g}: {accepted:,} accepted, {rejected:,} rejected"
            bars.append((left + i * step, scale(rejected), scale(accepted + rejected), bottom, said))
    _, marks = _scale(scores.low, scores.high, 0, 1)
    across = (width - left - right) / ((scores.high - scores.low) or 1.0)
    values = [(float(name.replace(",", "")), name) for _, name in marks]
    within = [(left + (value - scores.low) * across, name) for value, name in values if value <= scores.high + 1e-9]
    inside = [(x, name) for x, name in within if x >= left]
    words = (
        f"candidates by combined score, from {scores.low:.4g} to {scores.high:.4g}: "
        f"{sum(scores.accepted):,} accepted, {sum(scores.rejected):,} rejected"
    )
    return Histogram(width, height, left, width - right, bottom, Axis(inside), Axis(ticks), bars, step - 1, words)


def _scale(low: float, high: float, begin: float, end: float, whole: bool = False):
    """A linear scale from [low, high], widened to round numbers, and its ticks."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 5)
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)

    def scale(value: float) -> float:
        return begin + (value / step - first) / (last - first) * (end - begin)

    return scale, [(scale(i * step), f"{i * step:,}" if whole else f"{i * step:,.10g}") for i in range(first, last + 1)]


# --- a graph ---------------------------------------------------------------------------------


@dataclass
class Node:
    """A box of a graph: a thing in the lineage."""

    title: str
    text: str
    href: str | None = None
    kind: str = ""  # a class of the style sheet
    more: str = ""
    x: float = 0
    y: float = 0


@dataclass
class Chain:
    """Boxes in columns, each box joined to some of the next columns."""

    columns: list[list[Node]]
    edges: list[tuple[Node, Node]]
    box: tuple[int, int] = (140, 64)
    width: int = 0
    height: int = 0
    paths: list[str] = field(default_factory=list)


def chain(columns: list[list[Node]], edges: list[tuple[Node, Node]]) -> Chain:
    """Place the boxes: columns side by side, each centred."""
    made = Chain(columns, edges)
    (wide, high), across, down = made.box, 30, 16
    rows = max(len(column) for column in columns)
    made.width = len(columns) * (wide + across) - across + 2
    made.height = rows * (high + down) - down + 2
    for i, column in enumerate(columns):
        taken = len(column) * (high + down) - down
        for j, node in enumerate(column):
            node.x, node.y = 1 + i * (wide + across), 1 + (made.height - 2 - taken) / 2 + j * (high + down)
    for begin, end in edges:
        x0, y0, x1, y1 = begin.x + wide, begin.y + high / 2, end.x - 5, end.y + high / 2
        middle = x1 - (across - 5) / 2
        made.paths.append(
            f"M{x0:.1f} {y0:.1f} H{middle - 8:.1f} C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} "
            f"{middle + 8:.1f} {y1:.1f} H{x1:.1f}"
        )
    return made
