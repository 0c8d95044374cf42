"""Asset checks: the gates of rsft_pipeline/steps/gates.py, where Dagster and people see them."""

import functools
from collections.abc import Callable

import dagster as dg

from assets.shared import key
from resources.store import StoreResource
from rsft_pipeline import rounds
from rsft_pipeline.home import Home
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.rounds import Round
from rsft_pipeline.steps import gates
from rsft_pipeline.store import Store


def checks(recipe: Recipe) -> list[dg.AssetChecksDefinition]:
    """Every check of a recipe's assets."""
    warn = dg.AssetCheckSeverity.WARN
    return [
        *(_check(recipe, "accepted", gate, blocking=True) for gate in gates.BLOCKING),
        _check(recipe, "accepted", gates.acceptance_rate, severity=warn),
        _check(recipe, "accepted", gates.prompt_share, severity=warn),
        _check(recipe, "policy", source_is_latest, severity=warn),
        _check(recipe, "checkpoint", gates.nothing_revoked),
        _check(recipe, "evaluation", gates.not_worse),
    ]


@functools.wraps(gates.source_is_latest)
def source_is_latest(store: Store, round_: Round) -> gates.Finding:
    return gates.source_is_latest(store, round_, Home.here())


def _check(
    recipe: Recipe,
    asset: str,
    gate: Callable[[Store, Round], gates.Finding],
    *,
    blocking: bool = False,
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=key(recipe, asset), name=gate.__name__, description=gate.__doc__, blocking=blocking)
    def check(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
        with store.open() as lake:
            # A check that is run by itself has no partition: it is about the last round that was begun.
            round_key = context.run.tags.get("dagster/partition") or rounds.last_begun(lake, recipe.name)
            finding = gate(lake, rounds.record(lake, recipe, round_key))
        return dg.AssetCheckResult(
            passed=finding.passed, severity=severity, description=finding.reason, metadata=finding.facts
        )

    return check
