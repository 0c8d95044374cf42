"""What-if: a round's decisions under another rule, from the stored scores, beside those that were made.

Belongs here: changing a recorded rule, and comparing two sets of decisions on the same candidates. Not: whether the
recorded decisions follow from their own rule (replay.py). Nothing is drawn, judged or written.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import duckdb
import yaml
from pydantic import ValidationError

from rsft_pipeline import acceptance, rounds
from rsft_pipeline.audit import recorded
from rsft_pipeline.audit.findings import NAMED
from rsft_pipeline.audit.ids import AuditError, check_round
from rsft_pipeline.audit.reading import as_of
from rsft_pipeline.recipe import reading
from rsft_pipeline.recipe.acceptance import RejectionRule, Rule
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.revocations import set_aside
from rsft_pipeline.store import Store


@dataclass(frozen=True)
class Side:
    """A set of decisions on a round's candidates."""

    parameters: dict[str, Any]  # of the rule, including those resolved from the rows
    accepted: int
    rate: float
    score: float | None  # mean combined score of the accepted
    tokens: float | None  # mean length of the accepted
    prompts: int  # with at least one accepted
    per_prompt: dict[int, int]  # number of accepted → how many prompts have that many
    largest_share: float  # the largest share of the accepted set that one prompt has
    reasons: dict[str, int]  # reason → candidates


@dataclass(frozen=True)
class Agreement:
    """How many candidates both accept, only one, or neither; and the first of those on which they differ."""

    both: int
    only_was: int
    only_would: int
    neither: int
    only_was_ids: tuple[str, ...]
    only_would_ids: tuple[str, ...]


@dataclass(frozen=True)
class WhatIf:
    """A round's decisions as they were, and as they would be."""

    recipe: str
    round: str
    candidates: int
    prompts: int
    was: Side
    would: Side
    agreement: Agreement
    notes: tuple[str, ...]  # why the other rule's numbers may mislead
    seconds: float


def whatif(store: Store, recipe: Recipe, round_key: str, changes: Mapping[str, str]) -> WhatIf:
    """Decide on a round's candidates by a changed rule. What is revoked by now is set aside.

    Args:
        recipe: as its file is now; the rule that is changed is the one that the round recorded.
        changes: `acceptance.x`, or `acceptance` for several at once, → value as YAML text. Another `acceptance.rule`
            keeps only `distinct` and `cap`.

    Raises:
        AuditError: there is no such round, nothing was decided in it, or the changed rule is invalid or cannot decide
            on these candidates.
        RoundError: it ran with settings that are now refused.
    """
    began = time.perf_counter()
    check_round(store, recipe.name, round_key)
    round_ = rounds.record(store, recipe, round_key)
    hypothetical = replace(round_, recipe=changed(round_.recipe, changes))
    rule = hypothetical.recipe.acceptance

    with store.connection() as connection, as_of(connection, recorded.TABLES):
        version_of = recorded.versions(connection, round_)
        recorded.load(connection, hypothetical, version_of)
        counted = connection.execute("SELECT count(*), count(DISTINCT prompt_id) FROM recorded").fetchone()
        of = {"recipe": recipe.name, "round": round_key}
        connection.execute(f"CREATE TEMP TABLE was AS {recorded.DECISIONS}", of)
        found = connection.execute("SELECT DISTINCT parameters FROM was LIMIT 1").fetchone()
        if found is None:
            raise AuditError(f"{recipe.name} {round_key}: nothing was decided in this round")
        connection.execute("CREATE TEMP TABLE drawn AS SELECT candidate_id, tokens FROM recorded")
        revoked = set_aside(connection, "recorded", recipe.name, round_.recipe.seed)
        try:
            parameters = acceptance.parameters(connection, "recorded", rule, rounds.number(round_key))
        except ValueError as error:
            raise AuditError(str(error)) from None
        decided = acceptance.decisions_sql("recorded", parameters, round_.recipe.seed)
        connection.execute(f"CREATE TEMP TABLE would AS ({decided}) UNION ALL BY NAME ({revoked})")
        sides = _side(connection, "was", json.loads(found[0])), _side(connection, "would", parameters)
        agreement = _agreement(connection)
    notes = (_UNTIL,) if round_.recipe.sampling.until else ()
    return WhatIf(recipe.name, round_key, *counted, *sides, agreement, notes, time.perf_counter() - began)


_UNTIL = (
    "draws of a prompt ended with enough accepted by the recorded rule (`sampling.until`): the other rule decides on "
    "these, and would itself have had other prompts drawn for longer"
)


def changed(recipe: Recipe, changes: Mapping[str, str]) -> Recipe:
    """The recipe with its acceptance section changed. Raises AuditError, naming the field."""
    rule = recipe.acceptance.model_dump(mode="json")
    given = {}
    for key, text in changes.items():
        section, _, name = key.partition(".")
        try:
            value = yaml.safe_load(text)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise AuditError(f"--set {key}: {text!r} is not YAML: {error}") from None
        if section != "acceptance" or not (name or isinstance(value, dict)):
            raise AuditError(
                f"--set {key}: only the rule can be asked about, as acceptance.x=value or acceptance={{x: value, …}}"
            )
        given |= {name: value} if name else value
    if given.get("rule", rule["rule"]) != rule["rule"]:
        rule = {name: rule[name] for name in Rule.model_fields}
    try:
        fields = {**recipe.model_dump(mode="json"), "acceptance": {**rule, **given}}
        fields["sampling"]["until"] = None  # nothing is drawn, so the rule need not allow `until`
        rule = recipe.as_recorded(fields).acceptance
        if isinstance(rule, RejectionRule) and given.keys() & {"rule", "target"}:
            recipe.check_target(rule.target)
        return recipe.model_copy(update={"acceptance": rule})
    except ValidationError as error:
        _, _, lines = reading.explain(error, recipe.file).partition("\n")  # the first line is about the file
        raise AuditError(f"no such rule:\n{lines}") from None
    except ValueError as error:
        raise AuditError(str(error)) from None


def _side(connection: duckdb.DuckDBPyConnection, table: str, parameters: dict[str, Any]) -> Side:
    numbers = connection.execute(
        f"""SELECT count(*) FILTER (d.accepted), coalesce(avg(d.accepted::INTEGER), 0),
                avg(d.score) FILTER (d.accepted), avg(r.tokens) FILTER (d.accepted)
            FROM {table} d LEFT JOIN drawn r ON r.candidate_id = d.candidate_id"""
    ).fetchone()
    accepted = numbers[0]
    of_prompt = f"SELECT count(*) FILTER (accepted) AS n FROM {table} GROUP BY prompt_id"
    spread = dict(connection.execute(f"SELECT n, count(*) FROM ({of_prompt}) GROUP BY n ORDER BY n").fetchall())
    reasons = f"SELECT reason, count(*) AS n FROM {table} GROUP BY reason ORDER BY n DESC, reason"
    return Side(
        parameters,
        *numbers,
        prompts=sum(spread.values()) - spread.get(0, 0),
        per_prompt=spread,
        largest_share=max(spread, default=0) / max(1, accepted),
        reasons=dict(connection.execute(reasons).fetchall()),
    )


def _agreement(connection: duckdb.DuckDBPyConnection) -> Agreement:
    sql = """SELECT coalesce(w.candidate_id, n.candidate_id) AS candidate_id,
            coalesce(w.accepted, false) AS was, coalesce(n.accepted, false) AS would
        FROM was w FULL JOIN would n ON n.candidate_id = w.candidate_id"""
    counts = {
        (was, would): count
        for was, would, count in connection.execute(f"SELECT was, would, count(*) FROM ({sql}) GROUP BY ALL").fetchall()
    }

    def first(condition: str) -> tuple[str, ...]:
        ids = connection.execute(
            f"SELECT candidate_id FROM ({sql}) WHERE {condition} ORDER BY candidate_id LIMIT {NAMED}"
        ).fetchall()
        return tuple(candidate for (candidate,) in ids)

    return Agreement(
        both=counts.get((True, True), 0),
        only_was=counts.get((True, False), 0),
        only_would=counts.get((False, True), 0),
        neither=counts.get((False, False), 0),
        only_was_ids=first("was AND NOT would"),
        only_would_ids=first("would AND NOT was"),
    )
