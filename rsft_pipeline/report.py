"""Report: the numbers, examples and plots that people look at. Reads the store, decides nothing."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsft_pipeline import acceptance, classes, efficiency, revocations
from rsft_pipeline.evaluation import Estimate, interval
from rsft_pipeline.lineage import digest, set_digest
from rsft_pipeline.markdown import picture, table
from rsft_pipeline.rounds import Round
from rsft_pipeline.steps import decide, evaluate
from rsft_pipeline.steps.evaluate import Contest
from rsft_pipeline.steps.rows import (
    COMBINED,
    EVALUATION_CANDIDATES,
    OF_SCORERS,
    ROUND_CANDIDATES,
    of_evaluation,
    of_round,
    of_scorers,
)
from rsft_pipeline.steps.score import versions
from rsft_pipeline.store import Store

NAMES = {"pass_at_1": "pass@1", "pass_at_k": "pass@k", "mean_score": "mean score"}
SHOWN = 6  # rows of each kind in a table of examples
GROUPS_SHOWN = 50  # groups of prompts in a table


# --- plots -----------------------------------------------------------------------------------


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def histogram(values: Sequence[float], title: str) -> bytes:
    """Distribution of scores, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.6))
    axes = figure.subplots()
    axes.hist(values, bins=30, range=_around(values), color="#4f7cac")
    axes.set(title=title, xlabel="score", ylabel="candidates")
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _around(values: Sequence[float]) -> tuple[float, float] | None:
    """The range of a histogram whose values are equal up to rounding: theirs is too small to be split into bins."""
    if len(values) and np.ptp(values) <= 1e-12 * max(1.0, abs(values[0])):
        return values[0] - 0.5, values[0] + 0.5
    return None


def rounds_plot(recipe: str, metric: str, history: Sequence[Mapping[str, Any]]) -> bytes:
    """The promotion metric of checkpoint and champion over the rounds, with intervals, as a PNG."""
    return _png(rounds_figure(recipe, metric, history))


def rounds_figure(recipe: str, metric: str, history: Sequence[Mapping[str, Any]]):
    """The figure of `rounds_plot`. Bars in the background show the share of candidates that was accepted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4))
    axes = figure.subplots()
    history = [row for row in history if measured(row, metric)]
    names, made, champions = by_round(history, metric)
    at, every = range(len(names)), math.ceil(len(names) / 14)
    values = [one["value"] for one in made]
    below = [one["value"] - _end(one, "low") for one in made]
    above = [_end(one, "high") - one["value"] for one in made]
    axes.errorbar(at, values, [below, above], fmt="o", color="#4f7cac", capsize=3, label="checkpoint")
    values = [one["value"] for one in champions]
    axes.step(at, values, "-", where="post", color="#c0504d", label="champion", alpha=0.8)
    axes.set(
        xticks=at[::every],
        xticklabels=names[::every],
        ylabel=NAMES[metric],
        title=f"{recipe}: held-out {NAMES[metric]} by round",
    )
    rates = axes.twinx()
    rates.bar(at[1:], [row["accepted"] / max(1, row["candidates"]) for row in history], width=0.3, alpha=0.2)
    rates.set(ylim=(0, 1), ylabel="accepted share (bars)")
    axes.set_zorder(rates.get_zorder() + 1)  # bars behind points
    axes.patch.set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    axes.spines["top"].set_visible(False)
    rates.spines["top"].set_visible(False)
    return figure


def by_round(history: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[str], list[dict], list[dict]]:
    """What a plot of rounds shows: a name for each position, the checkpoint's estimate there, and the champion's.

    The first position is the policy of the first round, which is not the base model if earlier rounds lack the metric.
    """
    first = history[0]
    began = json.loads(first["policy_eval"])[metric]
    start = "base" if first["policy_source"] == "base" else f"from {first['policy_source']}"
    return (
        [start, *(row["round"] for row in history)],
        [began, *(json.loads(row["checkpoint_eval"])[metric] for row in history)],
        [began, *(json.loads(row["champion_eval"])[metric] for row in history)],
    )


def measured(row: Mapping[str, Any], metric: str) -> bool:
    """Whether a round has the metric: a round that was judged by another metric may have no value for it."""
    return all(json.loads(row[evaluated])[metric] for evaluated in ("policy_eval", "checkpoint_eval", "champion_eval"))


def _end(estimate: Mapping[str, Any], end: str) -> float:
    return estimate["value"] if estimate[end] is None else estimate[end]


# --- what assets report -----------------------------------------------------------------------


@dataclass(frozen=True)
class CandidateFacts:
    number: int
    prompts: int
    tokens: int
    stopped: float
    log_q: float
    digest: str
    examples: str


def candidates(store: Store, round_: Round) -> CandidateFacts:
    """A round's candidates in numbers, with some examples."""
    parameters = of_round(round_)
    facts = store.query(
        f"""SELECT count(*) AS number, count(DISTINCT prompt_id) AS prompts, coalesce(sum(tokens), 0)::BIGINT AS tokens,
                avg((finish_reason = 'stop')::INTEGER) AS stopped, avg(log_q) AS log_q
            FROM ({ROUND_CANDIDATES})""",
        parameters,
    )[0]
    ids = store.arrow(f"SELECT candidate_id FROM ({ROUND_CANDIDATES})", parameters)["candidate_id"].to_pylist()
    shown = store.query(
        f"""SELECT p.text AS prompt, c.text AS candidate, c.finish_reason, c.log_q
            FROM (SELECT * FROM ({ROUND_CANDIDATES}) s WHERE NOT ({revocations.REVOKED})) c
            JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
            ORDER BY c.candidate_id LIMIT {SHOWN}""",
        parameters,
    )
    return CandidateFacts(**facts, digest=set_digest(ids), examples=table(shown))


@dataclass(frozen=True)
class ScoreFacts:
    mean: float | None
    unjudged: int
    digest: str
    table: str
    histogram: str


def scores(store: Store, round_: Round) -> ScoreFacts:
    """A round's scores in numbers, by scorer, and the distribution of the combined one."""
    version_of = versions(store, round_)
    rows = store.query(
        f"""SELECT s.scorer, s.version, count(*) AS judged, count(*) FILTER (s.value IS NULL) AS unjudged,
                min(s.value) AS lowest, avg(s.value) AS mean, max(s.value) AS highest
            FROM ({ROUND_CANDIDATES}) c JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
            JOIN scores s ON s.candidate_id = c.candidate_id AND s.recipe = $recipe AND s.content = p.content
            WHERE {OF_SCORERS} GROUP BY ALL ORDER BY s.scorer""",
        {**of_round(round_), "scorers": of_scorers(version_of)},
    )
    scored = store.arrow(
        f"SELECT candidate_id, score FROM ({decide.scored(store, round_)}) ORDER BY candidate_id",
        of_round(round_),
    )
    values = [value for value in scored["score"].to_pylist() if value is not None]
    combined = next((row for row in rows if row["scorer"] == COMBINED), {"mean": None, "unjudged": 0})
    title = f"{round_.recipe.name} {round_.key}: combined score"
    return ScoreFacts(
        mean=combined["mean"],
        unjudged=combined["unjudged"],
        digest=digest([scored["candidate_id"].to_pylist(), scored["score"].to_pylist()]),
        table=table(rows),
        histogram=picture(histogram(values, title), title),
    )


@dataclass(frozen=True)
class DecisionFacts:
    candidates: int
    accepted: int
    rate: float
    distinct: int
    prompts: int
    digest: str
    reasons: str
    examples: str
    efficiency: efficiency.Efficiency
    efficiency_table: str
    coverage_table: str  # of the recipe's `group_by`; empty without


def decisions(store: Store, round_: Round) -> DecisionFacts:
    """A round's decisions in numbers, by reason, and some accepted and rejected candidates side by side."""
    of = {"recipe": round_.recipe.name, "round": round_.key}
    here = "WHERE d.recipe = $recipe AND d.round = $round"
    joined = f"""decisions d JOIN candidates c ON c.candidate_id = d.candidate_id AND c.recipe = $recipe
        JOIN prompts p ON p.prompt_id = d.prompt_id AND p.recipe = $recipe {here}"""
    numbers = store.query(
        f"""SELECT count(*) AS candidates, count(*) FILTER (d.accepted) AS accepted,
                coalesce(avg(d.accepted::INTEGER), 0) AS rate,
                count(DISTINCT CASE WHEN d.accepted THEN d.prompt_id || {acceptance.normalised("c.text")} END)
                    AS "distinct",
                count(DISTINCT CASE WHEN d.accepted THEN d.prompt_id END) AS prompts FROM {joined}""",
        of,
    )[0]
    ids = store.arrow(f"SELECT candidate_id FROM decisions d {here} AND accepted", of)
    reasons = store.query(
        f"SELECT reason, count(*) AS candidates FROM decisions d {here} GROUP BY ALL ORDER BY candidates DESC",
        of,
    )
    shown = store.query(
        f"""SELECT d.accepted, d.reason, p.text AS prompt, c.text AS candidate, d.score, exp(d.log_a) AS A, d.u
            FROM {joined} AND d.reason <> '{revocations.REASON}'
            QUALIFY row_number() OVER (PARTITION BY d.accepted ORDER BY d.u) <= {SHOWN}
            ORDER BY d.accepted DESC, d.u""",
        of,
    )
    found = decide.efficiency_of(store, round_, round_.recipe.group_by)
    return DecisionFacts(
        **numbers,
        digest=set_digest(ids["candidate_id"].to_pylist()),
        reasons=table(reasons),
        examples=table(shown),
        efficiency=found,
        efficiency_table=efficiency_table(found),
        coverage_table=coverage_table(found.groups) if found.groups else "",
    )


def efficiency_table(found: efficiency.Efficiency) -> str:
    """Acceptance in numbers, and which parameters would have accepted other shares."""
    numbers = {
        "accepted": f"{found.accepted} of {found.candidates}{_within(found.rate, found.low, found.high)}",
        "seen by the rule: judged, past the gates, no pilot": found.seen,
        "mean A of these": found.mean_a,
        "1 / M": found.one_over_m,
        "accepted samples, counted by their weights": found.effective_samples,
        "seen candidates, counted by A": found.effective_size,
        "KL(accepted ‖ drawn), nats": found.kl,
        "tokens drawn for each accepted sample": found.tokens_per_accepted,
    }
    rows = [{"number": name, "value": value} for name, value in numbers.items() if value is not None]
    suggested = [
        {
            "to accept": f"{one.wanted:.0%}",
            one.name: "no such number" if one.value is None else one.value,
            "accepts": "" if one.share is None else f"{one.share:.1%}",
        }
        for one in found.suggestions
    ]
    return f"{table(rows)}\n\n{table(suggested)}"


def coverage_table(groups: Sequence[efficiency.Group]) -> str:
    """Acceptance in each group of prompts, the lowest rate first."""
    rows = [
        {
            "group": "(none)" if group.group is None else group.group,
            "prompts": group.prompts,
            "with accepted": group.prompts_with_accepted,
            "candidates": group.candidates,
            "accepted": f"{group.accepted}{_within(group.rate, group.low, group.high)}",
            "draws needed": "" if group.draws_needed is None else group.draws_needed,
        }
        for group in groups[:GROUPS_SHOWN]
    ]
    left = len(groups) - len(rows)
    return table(rows) + (f"\n\n… and {left} groups, of no lower rate" if left else "")


def _within(share: float | None, low: float | None, high: float | None) -> str:
    """A share with its interval, as text; empty if there is none."""
    return "" if share is None else f" = {share:.1%} ({low:.1%} to {high:.1%})"


# --- held-out scores --------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutScores:
    means: dict[str, dict[str, Estimate | None]]  # by role, by scorer; None: it could judge nothing
    table: str


def held_out_scores(store: Store, round_: Round, contest: Contest) -> HeldOutScores:
    """Each scorer's mean over the held-out prompts, such as exact match and F1 side by side, for each role."""
    means = contest.by_role(lambda weights: _means(store, round_, weights))

    def shown(mean: Estimate | None) -> str:
        if mean is None:
            return ""
        bounds = f"{mean.low:.4f} to {mean.high:.4f}" if math.isfinite(mean.low) else "open"  # all prompts alike
        return f"{mean.value:.4f} ({bounds})"

    rows = [{"weights": role, **{name: shown(mean) for name, mean in of.items()}} for role, of in means.items()]
    return HeldOutScores(means, table(rows))


def _means(store: Store, round_: Round, policy: str) -> dict[str, Estimate | None]:
    """Means over the prompts with a judged candidate; intervals as for the mean score (evaluation.py)."""
    version_of = versions(store, round_)
    rows = store.query(
        f"""SELECT s.scorer, c.prompt_id, avg(s.value) AS value FROM ({EVALUATION_CANDIDATES}) c
            JOIN prompts p ON p.prompt_id = c.prompt_id AND p.recipe = $recipe
            JOIN scores s ON s.candidate_id = c.candidate_id AND s.recipe = $recipe AND s.content = p.content
            WHERE {OF_SCORERS} AND s.value IS NOT NULL GROUP BY ALL ORDER BY ALL""",
        {**of_evaluation(round_, policy), "scorers": of_scorers(version_of)},
    )
    means: dict[str, Estimate | None] = {}
    for scorer in version_of:
        values = np.array([row["value"] for row in rows if row["scorer"] == scorer])
        low_high = interval(values, round_.recipe.evaluation.confidence, None) if len(values) else None
        means[scorer] = low_high and Estimate(float(values.mean()), *low_high, len(values))
    return means


# --- classifiers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassFacts:
    macro_f1: dict[str, float]  # by role
    table: str


def by_class(store: Store, round_: Round, contest: Contest) -> ClassFacts:
    """Macro-F1 of each model of a contest, and precision, recall and F1 of each label."""
    recipe, overall, rows = round_.recipe, [], []
    how = {"confidence": recipe.evaluation.confidence, "seed": recipe.seed}
    answers = contest.by_role(lambda weights: evaluate.answers(store, round_, weights))
    found = {role: classes.macro_f1(each, **how) for role, each in answers.items()}
    for role, each in answers.items():
        overall.append(
            {"weights": role, "macro-F1": f"{found[role].value:.4f} ({found[role].low:.4f} to {found[role].high:.4f})"}
        )
        rows += [
            {"weights": role, **vars(one), "f1": "neither asked nor answered" if one.f1 is None else one.f1}
            for one in classes.classes(each, recipe.model.labels)
        ]
    return ClassFacts({role: one.value for role, one in found.items()}, f"{table(overall)}\n\n{table(rows)}")
