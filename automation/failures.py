"""Failures: why a run failed, as people are told."""

import re
from dataclasses import dataclass, field

import dagster as dg

from rsft_pipeline.store import INTERRUPTED

OURS = r"rsft_pipeline\.[\w.]+: "  # how an error of the project's own is told, before what it says


@dataclass
class Failure:
    """Why a run did not succeed."""

    interrupted: bool = False
    why: list[str] = field(default_factory=list)  # each check that stopped it, and step that failed, and what it says
    stacks: list[str] = field(default_factory=list)  # of errors that were not made for people: where they came from


def of_run(instance: dg.DagsterInstance, run_id: str) -> Failure:
    """What a run that did not succeed left in Dagster's records."""
    found = Failure()
    for event in _events(instance, run_id, dg.DagsterEventType.ASSET_CHECK_EVALUATION):
        check = event.asset_check_evaluation_data
        if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR:
            found.why.append(f"check {check.check_name}: {check.description}")
    for event in _events(instance, run_id, dg.DagsterEventType.STEP_FAILURE):
        error = event.step_failure_data.error
        raised = error.cause or error  # it says more to people than what Dagster makes of it
        if raised.cls_name == "DagsterAssetCheckFailedError":  # the check says why itself
            continue
        interrupted = _interrupted(error)
        found.interrupted |= interrupted
        said = "interrupted" if interrupted else re.sub(OURS, "", raised.message).strip()
        found.why.append(f"{event.step_key}: {said}")
        if not interrupted and not re.match(f"{OURS}|dagster", raised.message):
            found.stacks.append("".join(raised.stack))
    if not found.why:  # of a process that was killed
        ended = _events(instance, run_id, dg.DagsterEventType.RUN_FAILURE)
        found.why += [event.message for event in ended if event.message]
    return found


def _events(instance: dg.DagsterInstance, run_id: str, kind: dg.DagsterEventType) -> list[dg.DagsterEvent]:
    return [entry.dagster_event for entry in instance.all_logs(run_id, of_type=kind)]


def _interrupted(error) -> bool:
    """Whether a step failed because of a signal."""
    while error:
        if error.cls_name == "DagsterExecutionInterruptedError" or INTERRUPTED in error.message:
            return True
        error = error.cause or error.context
    return False
