"""Report: what people look at: numbers, examples and plots. Reads the store, decides nothing."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rsft_pipeline import acceptance, steps
from rsft_pipeline.lineage import digest, set_digest
from rsft_pipeline.markdown import picture, table
from rsft_pipeline.store import Store

if TYPE_CHECKING:
    from rsft_pipeline.rounds import Round

NAMES = {"pass_at_1": "pass@1", "pass_at_k": "pass@k", "mean_score": "mean score"}
SHOWN = 6  # rows of each kind in a table of examples


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
    axes.hist(values, bins=30, color="#4f7cac")
    axes.set(title=title, xlabel="score", ylabel="candidates")
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def rounds_plot(recipe: str, metric: str, history: Sequence[Mapping[str, Any]]) -> bytes:
    """The promotion metric of checkpoint and champion over the rounds, with intervals, and the acceptance rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4))
    axes = figure.subplots()
    keys = ["base", *(row["round"] for row in history)]
    first = json.loads(history[0]["policy_eval"])
    made = [first, *(json.loads(row["checkpoint_eval"]) for row in history)]
    crowned = [first, *(json.loads(row["champion_eval"]) for row in history)]
    for summaries, label, style in ((made, "checkpoint", "o"), (crowned, "champion", "-")):
        values = [summary[metric]["value"] for summary in summaries]
        if label == "champion":
            axes.step(range(len(keys)), values, style, where="post", color="#c0504d", label=label, alpha=0.8)
            continue
        below = [s[metric]["value"] - _end(s[metric], "low") for s in summaries]  # None: open end
        above = [_end(s[metric], "high") - s[metric]["value"] for s in summaries]
        axes.errorbar(range(len(keys)), values, [below, above], fmt=style, color="#4f7cac", capsize=3, label=label)
    axes.set(
        xticks=range(len(keys)),
        xticklabels=keys,
        ylabel=NAMES[metric],
        title=f"{recipe}: held-out {NAMES[metric]} by round",
    )
    rates = axes.twinx()
    rates.bar(
        range(1, len(keys)), [row["accepted"] / max(1, row["candidates"]) for row in history], width=0.3, alpha=0.2
    )
    rates.set(ylim=(0, 1), ylabel="accepted share (bars)")
    axes.legend(loc="upper left", frameon=False)
    axes.spines["top"].set_visible(False)
    rates.spines["top"].set_visible(False)
    return _png(figure)


def _end(estimate: Mapping[str, Any], end: str) -> float:
    return estimate["value"] if estimate[end] is None else estimate[end]


# --- what an asset says of itself -------------------------------------------------------------


@dataclass(frozen=True)
class CandidateFacts:
    number: int
    prompts: int
    tokens: int
    stopped: float
    log_q: float
    digest: str
    examples: str


def candidates(store: Store, round_: "Round") -> CandidateFacts:
    """A round's candidates in numbers, and some of them."""
    parameters = steps.of_round(round_)
    facts = store.query(
        f"""SELECT count(*) AS number, count(DISTINCT prompt_id) AS prompts, coalesce(sum(tokens), 0)::BIGINT AS tokens,
                avg((finish_reason = 'stop')::INTEGER) AS stopped, avg(log_q) AS log_q
            FROM ({steps.ROUND_CANDIDATES})""",
        parameters,
    )[0]
    ids = store.arrow(f"SELECT candidate_id FROM ({steps.ROUND_CANDIDATES})", parameters)["candidate_id"].to_pylist()
    shown = store.query(
        f"""SELECT p.text AS prompt, c.text AS candidate, c.finish_reason, c.log_q
            FROM ({steps.ROUND_CANDIDATES}) c
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


def scores(store: Store, round_: "Round") -> ScoreFacts:
    """A round's scores in numbers, by scorer, and the distribution of the combined one."""
    version_of = steps.versions(round_.recipe)
    rows = store.query(
        f"""SELECT s.scorer, s.version, count(*) AS judged, count(*) FILTER (s.value IS NULL) AS unjudged,
                min(s.value) AS lowest, avg(s.value) AS mean, max(s.value) AS highest
            FROM ({steps.ROUND_CANDIDATES}) c JOIN scores s ON s.candidate_id = c.candidate_id AND s.recipe = $recipe
            WHERE list_contains($versions, s.version) GROUP BY ALL ORDER BY s.scorer""",
        {**steps.of_round(round_), "versions": list(version_of.values())},
    )
    scored = store.arrow(
        f"SELECT candidate_id, score FROM ({steps.scored(round_.recipe)}) ORDER BY candidate_id", steps.of_round(round_)
    )
    values = [value for value in scored["score"].to_pylist() if value is not None]
    combined = next((row for row in rows if row["scorer"] == steps.COMBINED), {"mean": None, "unjudged": 0})
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


def decisions(store: Store, round_: "Round") -> DecisionFacts:
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
            FROM {joined} QUALIFY row_number() OVER (PARTITION BY d.accepted ORDER BY d.u) <= {SHOWN}
            ORDER BY d.accepted DESC, d.u""",
        of,
    )
    return DecisionFacts(
        **numbers,
        digest=set_digest(ids["candidate_id"].to_pylist()),
        reasons=table(reasons),
        examples=table(shown),
    )
