"""OpenLineage: the rounds that a checkpoint came from, as events of their runs (https://openlineage.io).

Belongs here: which rounds these are, and the events. Not: sending them; they are written to a file.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rsft_pipeline.audit.impact import MADE, earlier
from rsft_pipeline.audit.reading import snapshots
from rsft_pipeline.store import Query

PRODUCER = "urn:rsft-pipeline"
NAMESPACE = "rsft"


def history(query: Query, made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A checkpoint and all that it started or learned from, oldest first: rows of MADE with the rounds of its samples
    in `learned`, the sources of the prompts that were asked, and when and how much was drawn, as far as is known.

    Args:
        made: the checkpoint's row of `checkpoints`.
    """
    kept = snapshots(query)
    return [
        {
            "sources": _sources(query, made, made["snapshot"] in kept),
            **dict.fromkeys(("candidates", "started", "finished")),
            **_attempt(query, made, made["snapshot"] in kept),
            **made,
            "learned": [*before, made["round"]],
        }
        for made, before in _ancestors(made, query(MADE))
    ]


def _sources(query: Query, made: Mapping[str, Any], there: bool) -> list[str]:
    """The sources of a round's prompts, by their names at its snapshot, or by the present ones if that is gone."""
    sql = """SELECT DISTINCT source FROM prompts {at} WHERE recipe = $recipe AND prompt_id IN (
        SELECT prompt_id FROM candidates WHERE recipe = $recipe AND round = $round AND split = 'train')
        ORDER BY source"""
    at = f"AT (VERSION => {int(made['snapshot'])})" if there else ""
    return [row["source"] for row in query(sql.format(at=at), {"recipe": made["recipe"], "round": made["round"]})]


# From an older snapshot, only columns that every store then had are selected.
_ROUND = """SELECT {more} candidates, epoch_ms(started_at) AS started, epoch_ms(finished_at) AS finished
    FROM rounds {at} WHERE recipe = $recipe AND round = $round"""


def _attempt(query: Query, made: dict[str, Any], there: bool) -> dict[str, Any]:
    """The round's record of the attempt that made a checkpoint: the present one or, if the round was begun again since,
    the one that training read, from before the attempt ended. Empty if there is neither."""
    for now in query(_ROUND.format(more="checkpoint, controls,", at=""), made):
        if made["checkpoint"] in (now["checkpoint"], *json.loads(now["controls"] or "{}").values()):
            return now
    at = f"AT (VERSION => {int(made['snapshot'])})"
    then = query(_ROUND.format(more="", at=at), made) if there else []
    return then[0] if then else {}


def _ancestors(of: Mapping[str, Any], made: list[dict]) -> list[tuple[dict, dict[str, dict]]]:
    """The rows of a checkpoint and of all that it started or learned from, each with the rows of earlier rounds whose
    samples it also has."""
    by_digest = {row["checkpoint"]: row for row in reversed(made)}
    itself = ("recipe", "round", "checkpoint")
    found, open_ = {}, [next(row for row in made if all(row[name] == of[name] for name in itself))]
    while open_:
        row = open_.pop()
        if row["checkpoint"] not in found:
            before = earlier(row, made)
            found[row["checkpoint"]] = row, before
            weights = [by_digest[digest] for digest in (row["parent"], row["drawn_from"]) if digest in by_digest]
            open_ += [*weights, *before.values()]
    return sorted(found.values(), key=lambda one: made.index(one[0]))


def write(path: Path, rows: Path, history: list[dict[str, Any]], columns: Mapping[str, str]) -> None:
    """Write the events of every round that a checkpoint came from, oldest first, and of this export of its samples.

    Args:
        history: the result of `history`. `columns`: what each of the exported rows' columns is.
    """
    from openlineage.client.serde import Serde

    with open(path, "w", encoding="utf-8") as file:
        for one in history:
            for event in _events(one):
                file.write(Serde.to_json(event) + "\n")
        file.write(Serde.to_json(_exported(rows, history[-1], columns)) + "\n")


def _events(made: dict[str, Any]) -> Iterator[Any]:
    """A start and an end event for each step of a round, if the times are known; else one event that is neither."""
    from openlineage.client.event_v2 import Job, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.facet_v2 import output_statistics_output_dataset, parent_run

    recipe, statistics = made["recipe"], output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet
    whole = _uuid(made["dagster_run_id"], recipe, made["round"])
    parent = parent_run.ParentRunFacet(
        run=parent_run.Run(runId=whole), job=parent_run.Job(namespace=NAMESPACE, name=f"{recipe}_round")
    )
    times = {RunState.START: made["started"], RunState.COMPLETE: made["finished"]}
    known = {state: when for state, when in times.items() if when is not None} or {RunState.OTHER: None}
    for step, inputs, output, facets, count in _steps(made):
        counted = {} if count is None else {"outputStatistics": statistics(rowCount=count)}
        for state, when in known.items():
            yield RunEvent(
                eventType=state,
                eventTime=_time(when),
                run=Run(runId=_uuid(None, whole, step), facets={"parent": parent}),
                job=Job(namespace=NAMESPACE, name=f"{recipe}.{step}"),
                producer=PRODUCER,
                inputs=inputs,
                outputs=[OutputDataset(NAMESPACE, output, facets=facets, outputFacets=counted)],
            )


def _steps(made: dict[str, Any]) -> Iterator[tuple[str, list[Any], str, dict[str, Any], int | None]]:
    """Each step of a round: its name, what it read, what it wrote, with facets and number of rows."""
    from openlineage.client.event_v2 import InputDataset
    from openlineage.client.facet_v2 import dataset_version_dataset

    def version(digest: str) -> dict[str, Any]:
        return {"version": dataset_version_dataset.DatasetVersionDatasetFacet(digest)}

    def weights(digest: str) -> InputDataset:
        return InputDataset(NAMESPACE, f"weights/{digest}", facets=version(digest))

    sources = [InputDataset(NAMESPACE, f"sources/{source}") for source in made["sources"]]
    learned = [InputDataset(NAMESPACE, name) for name in _learned(made)]
    drawn, judged, taken = (f"{made['recipe']}/{made['round']}/{name}" for name in ("candidates", "scores", "accepted"))
    own = [taken] == _learned(made)  # then digest and number of its samples are those of that table
    yield "candidates", [*sources, weights(made["drawn_from"])], drawn, {}, made["candidates"]
    yield "scores", [InputDataset(NAMESPACE, drawn)], judged, {}, None
    chosen = version(made["accepted_digest"]) if own else {}
    yield "accepted", [InputDataset(NAMESPACE, judged)], taken, chosen, made["samples"] if own else None
    made_of = [*learned, weights(made["parent"])]
    yield "checkpoint", made_of, f"weights/{made['checkpoint']}", version(made["checkpoint"]), None


def _learned(made: dict[str, Any]) -> list[str]:
    """The tables that a checkpoint was trained on: its rounds' accepted sets or, for a control, their candidates."""
    table = "accepted" if made["trained_on"] in (None, "accepted") else "candidates"
    return [f"{made['recipe']}/{key}/{table}" for key in made["learned"]]


def _exported(rows: Path, made: dict[str, Any], columns: Mapping[str, str]) -> Any:
    from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.facet_v2 import schema_dataset

    fields = [schema_dataset.SchemaDatasetFacetFields(name=name, description=said) for name, said in columns.items()]
    return RunEvent(
        eventType=RunState.COMPLETE,
        eventTime=_time(None),
        run=Run(runId=str(uuid.uuid4())),
        job=Job(namespace=NAMESPACE, name=f"{made['recipe']}.export"),
        producer=PRODUCER,
        inputs=[InputDataset(NAMESPACE, name) for name in _learned(made)],
        outputs=[OutputDataset("file", str(rows), facets={"schema": schema_dataset.SchemaDatasetFacet(fields=fields)})],
    )


def _uuid(given: str | None, *otherwise: str) -> str:
    """A run's id as a UUID, which OpenLineage requires."""
    try:
        return str(uuid.UUID(given))
    except (ValueError, TypeError):
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(otherwise)))


def _time(milliseconds: int | None) -> str:
    moment = datetime.now(UTC) if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat()
