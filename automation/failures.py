"""Failures: why a run failed, in words for people."""

import re
from dataclasses import dataclass, field

import dagster as dg

from rsft_pipeline.store import INTERRUPTED

OURS = r"rsft_pipeline\.[\w.]+: "  # what precedes the message of one of the project's own errors


@dataclass
class Failure:
    """Why a run did not succeed."""

    interrupted: bool = False
    why: list[str] = field(default_factory=list)  # checks that stopped it and steps that failed, with their messages
    stacks: list[str] = field(default_factory=list)  # stack traces of errors whose messages are not meant for people


def of_run(instance: dg.DagsterInstance, run_id: str) -> Failure:
    """Why a run did not succeed, from Dagster's records."""
    found = Failure()
    for event in _events(instance, run_id, dg.DagsterEventType.ASSET_CHECK_EVALUATION):
        check = event.asset_check_evaluation_data
        if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR:
            found.why.append(f"check {check.check_name}: {check.description}")
    for event in _events(instance, run_id, dg.DagsterEventType.STEP_FAILURE):
        error = event.step_failure_data.error
        raised = error.cause or error  # says more to people than Dagster's own error
        if raised.cls_name == "DagsterAssetCheckFailedError":  # the check itself has said why
            continue
        interrupted = _interrupted(error)
        found.interrupted |= interrupted
        said = "interrupted" if interrupted else re.sub(OURS, "", raised.message).strip()
        found.why.append(f"{event.step_key}: {said}")
        if not interrupted and not re.match(f"{OURS}|dagster", raised.message):
            found.stacks.append("".join(raised.stack))
    if not found.why:  # its process was killed
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
