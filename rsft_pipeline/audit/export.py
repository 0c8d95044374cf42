"""Export: a checkpoint's training set, row by row with where each came from, in forms that others read.

Belongs here: the rows (Parquet or JSON lines), how Croissant describes them (https://mlcommons.org/croissant, 1.1),
and the runs that led to them as OpenLineage events (https://openlineage.io). Not: publishing any of it; events are
written to a file, not sent.

What was erased is not brought back: prompts are read as of the checkpoint's snapshot, since references may have
changed since, but without the texts that are gone now.
"""

import json
import logging
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rsft_pipeline import lineage
from rsft_pipeline.audit.ids import AuditError, Thing, thing
from rsft_pipeline.audit.impact import MADE, earlier
from rsft_pipeline.audit.reading import on
from rsft_pipeline.revocations import of_checkpoint
from rsft_pipeline.steps.rows import of_scorers
from rsft_pipeline.store import Query, Store

PRODUCER = "urn:rsft-pipeline"
NAMESPACE = "rsft"
EXTRA = "pip install 'rsft-pipeline[audit]'"

# Column → what it is, in the order of the file.
COLUMNS = {
    "prompt": "The prompt, as the tokenizer got it.",
    "completion": "What the policy answered.",
    "token_ids": "The completion's tokens, as they were sampled and trained on.",
    "weight": "The sample's weight in the training loss.",
    "reference": "The reference answer, where the source has one.",
    "source": "Where the prompt comes from: a file, data set or function.",
    "line": "The line or row of the source, counted from 1.",
    "score": "The combined score.",
    "scores": "JSON: what each scorer said, with its version.",
    "reason": "Of the decision.",
    "u": "The decision's uniform draw; it follows from the candidate's id and the recipe's seed.",
    "log_a": "The logarithm of the acceptance probability, where the rule has one.",
    "parameters": "JSON: the acceptance rule, its settings, and what it estimated.",
    "round": "The round that drew it and decided on it.",
    "draw": "The index of the draw for its prompt.",
    "origin": "What drew it: the policy, a teacher, or nothing (a reference).",
    "policy": "Digest of the weights that it was drawn from.",
    "settings": "Hash of the sampling settings and the seed.",
    "seed": "Of the draw's own random stream.",
    "log_q": "Log-probability under the distribution that was sampled from.",
    "log_p": "Log-probability under those weights as they are.",
    "finish_reason": "`stop` or `length`.",
    "recipe": "The recipe.",
    "checkpoint": "Digest of the weights that were trained on it.",
    "prompt_id": "Hash of the prompt's text, every space of it.",
    "candidate_id": "Hash of recipe, round, policy, prompt, draw and settings.",
    "leaf": "The row's hash, of which the checkpoint's Merkle root is made.",
}
NUMBERS = ("weight", "score", "log_a", "u", "log_q", "log_p")  # those that may have a fraction


@dataclass(frozen=True)
class Exported:
    """What was written."""

    recipe: str
    round: str
    checkpoint: str
    samples: int
    files: list[str]
    notes: list[str]  # what a reader should know: revoked, erased, or not written


def export(
    store: Store, checkpoint: str, to: Path, form: Literal["parquet", "jsonl"] = "parquet", recipe: str | None = None
) -> Exported:
    """Write the training set of a checkpoint to a folder: rows, `croissant.json` and `openlineage.jsonl`.

    Args:
        checkpoint: its digest, or the beginning of it.
        to: is made, and must be empty.

    Raises:
        AuditError: no round made such weights, or the folder holds something.
    """
    named = _checkpoint(thing(store, checkpoint, recipe))
    to = Path(to).expanduser().resolve()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise AuditError(f"{to} is not an empty folder: give a new one")
    rows = to / f"training_set.{form}"

    def work(connection) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
        query = on(connection)
        made = _made(query, named)
        to.mkdir(parents=True, exist_ok=True)
        sql, parameters, notes = _rows(query, made, form)
        how = "FORMAT parquet, COMPRESSION zstd" if form == "parquet" else "FORMAT json"
        connection.execute(f"COPY ({sql}) TO {_quoted(rows)} ({how})", parameters)
        return made, _history(query, made["checkpoint"]), notes

    made, history, notes = store.commit(work)
    if why := of_checkpoint(store, made["recipe"], made["checkpoint"]):
        notes.append(why)
    files = [str(rows)]
    for name, write in (
        ("croissant.json", lambda path: _croissant(path, rows, form, made)),
        ("openlineage.jsonl", lambda path: _openlineage(path, rows, history)),
    ):
        try:
            write(to / name)
            files.append(str(to / name))
        except ImportError as error:
            notes.append(f"{name} was not written, for want of {error.name}: {EXTRA}")
    return Exported(made["recipe"], made["round"], made["checkpoint"], made["samples"], files, notes)


def _checkpoint(named: Thing) -> Thing:
    if named.kind != "checkpoint":
        raise AuditError(f"{named.what} is a {named.kind}, not a checkpoint")
    return named


def _made(query: Query, named: Thing) -> dict[str, Any]:
    rows = query(
        """SELECT * EXCLUDE (meta), json_extract_string(meta, '$.scorers[*]') AS scorers, meta FROM checkpoints
           WHERE checkpoint = $checkpoint ORDER BY snapshot LIMIT 1""",
        {"checkpoint": named.what},
    )
    if not rows:
        raise AuditError(f"no round made the weights {named.what}: they have no training set here")
    return rows[0]


# --- rows -------------------------------------------------------------------------------------


def _rows(query: Query, made: dict[str, Any], form: str) -> tuple[str, dict[str, Any], list[str]]:
    """SQL of the rows in the order of their ids, its parameters, and what to note."""
    there = query("SELECT 1 FROM lake.snapshots() WHERE snapshot_id = $snapshot", {"snapshot": made["snapshot"]})
    at = f"AT (VERSION => {int(made['snapshot'])})" if there else ""
    notes = [] if there else [f"the snapshot {made['snapshot']} is gone: decisions and prompts are as they are now"]
    (erased,) = query(
        """SELECT count(*) AS n FROM training_samples t JOIN candidates c ON c.candidate_id = t.candidate_id
           WHERE t.recipe = $recipe AND t.round = $round AND t.checkpoint = $checkpoint AND c.recipe = $recipe
             AND c.text IS NULL""",
        made,
    )
    if erased["n"]:
        notes.append(f"the texts of {erased['n']} of the samples were erased")
    finite = {name: f"CASE WHEN isfinite({name}) THEN {name} END AS {name}" for name in NUMBERS if form == "jsonl"}
    sql = _ROWS.format(at=at, columns=", ".join(finite.get(name, name) for name in COLUMNS))
    of = {key: made[key] for key in ("recipe", "round", "checkpoint")}
    return sql, {**of, "scorers": _scorers(query, made, at)}, notes


def _scorers(query: Query, made: dict[str, Any], at: str) -> list[str]:
    """The scorers that the decisions rest on, by round, name and version: one that was renamed has only the name by
    which the round recorded it."""
    if not made["scorers"]:  # from before they were recorded
        return []
    rows = query(f"SELECT round, scorers FROM rounds {at} WHERE recipe = $recipe AND round <= $round", made)
    return [f"{row['round']} {one}" for row in rows for one in of_scorers(json.loads(row["scorers"] or "{}"))]


_ROWS = """
    WITH chosen AS (
        SELECT candidate_id, weight, leaf FROM training_samples
        WHERE recipe = $recipe AND round = $round AND checkpoint = $checkpoint
    ), drawn AS (
        SELECT c.* FROM candidates c SEMI JOIN chosen t ON t.candidate_id = c.candidate_id WHERE c.recipe = $recipe
    ), asked AS (
        SELECT n.prompt_id, t.source, t.line, t.content, CASE WHEN n.text IS NOT NULL THEN t.text END AS prompt,
            CASE WHEN n.text IS NOT NULL THEN t.reference END AS reference
        FROM prompts n JOIN (SELECT * FROM prompts {at}) t ON t.prompt_id = n.prompt_id
        WHERE n.recipe = $recipe AND t.recipe = $recipe
    ), judged AS (
        SELECT s.candidate_id,
            json_group_object(s.scorer, json_object('version', s.version, 'value', s.value))::VARCHAR AS scores
        FROM scores s JOIN drawn c ON c.candidate_id = s.candidate_id JOIN asked p ON p.prompt_id = c.prompt_id
        WHERE s.recipe = $recipe AND list_contains($scorers, s.round || ' ' || s.scorer || ' ' || s.version)
            AND s.content = p.content
        GROUP BY s.candidate_id
    ), ready AS (
        SELECT p.prompt, c.text AS completion, c.token_ids, t.weight, p.reference, p.source, p.line, d.score, j.scores,
            d.reason, d.u, d.log_a, d.parameters, c.round, c.draw, c.origin, c.policy, c.settings, c.seed, c.log_q,
            c.log_p, c.finish_reason, c.recipe, $checkpoint AS checkpoint, c.prompt_id, c.candidate_id, t.leaf
        FROM chosen t JOIN drawn c ON c.candidate_id = t.candidate_id
        LEFT JOIN asked p ON p.prompt_id = c.prompt_id
        LEFT JOIN (SELECT * FROM decisions {at} WHERE recipe = $recipe) d ON d.candidate_id = c.candidate_id
        LEFT JOIN judged j ON j.candidate_id = c.candidate_id
    )
    SELECT {columns} FROM ready ORDER BY candidate_id"""


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


# --- Croissant --------------------------------------------------------------------------------


def _croissant(path: Path, rows: Path, form: str, made: dict[str, Any]) -> None:
    """Describe the rows, and read the description and the first row back with Croissant's own reader."""
    import mlcroissant as mlc

    logging.getLogger("absl").setLevel(logging.ERROR)  # it misses a licence and a citation, which are not ours to give
    context = mlc.Context(conforms_to="http://mlcommons.org/croissant/1.1")  # the first with arrays
    kinds = {
        "line": mlc.DataType.INT64,
        "draw": mlc.DataType.INT32,
        "seed": mlc.DataType.INT64,
        "token_ids": mlc.DataType.INT32,
        **dict.fromkeys(NUMBERS, mlc.DataType.FLOAT64),
    }

    fields = [
        mlc.Field(
            ctx=context,
            id=f"samples/{column}",
            name=column,
            description=description,
            data_types=[kinds.get(column, mlc.DataType.TEXT)],
            source=mlc.Source(file_object="rows", extract=mlc.Extract(column=column)),
            **({"is_array": True, "array_shape": "-1"} if column == "token_ids" else {}),
        )
        for column, description in COLUMNS.items()
    ]
    control = made["trained_on"] not in (None, "accepted")
    kind = f"candidates (a control: {made['trained_on']})" if control else "accepted candidates"
    file = mlc.FileObject(
        ctx=context,
        id="rows",
        name=rows.name,
        content_url=rows.name,
        content_size=f"{rows.stat().st_size} B",
        encoding_formats=[mlc.EncodingFormat.PARQUET if form == "parquet" else mlc.EncodingFormat.JSON_LINES],
        sha256=lineage.file_digest(rows),
    )
    metadata = mlc.Metadata(
        ctx=context,
        name=f"{made['recipe']}_{made['round']}_training_set",
        description=f"What the checkpoint {made['checkpoint']} of {made['recipe']} {made['round']} was trained on: "
        f"{made['samples']} {kind} with their provenance.",
        version=f"1.0.0+{made['checkpoint']}",
        date_published=datetime.now(UTC).replace(tzinfo=None),
        distribution=[file],
        record_sets=[
            mlc.RecordSet(ctx=context, id="samples", name="samples", key=["samples/candidate_id"], fields=fields)
        ],
    )
    path.write_text(json.dumps(metadata.to_json(), indent=2, default=str, ensure_ascii=False), "utf-8")
    written = mlc.Dataset(jsonld=path)
    if errors := written.metadata.ctx.issues.errors:
        raise AuditError(f"{path} is not valid: {'; '.join(sorted(map(str, errors)))}")
    next(iter(written.records("samples")))


# --- OpenLineage --------------------------------------------------------------------------------


def _history(query: Query, checkpoint: str) -> list[dict[str, Any]]:
    """A checkpoint and all that it started or learned from, oldest first: rows of MADE with the rounds that its samples
    are of in `learned`, the sources of the recipe's prompts, and when and how much was drawn, as far as is known."""
    snapshots = {row["snapshot_id"] for row in query("SELECT snapshot_id FROM lake.snapshots()")}
    sources = {row["recipe"]: row["sources"] for row in query(_SOURCES)}
    return [
        {
            "sources": sources.get(made["recipe"], []),
            **dict.fromkeys(("candidates", "started", "finished")),
            **_attempt(query, made, made["snapshot"] in snapshots),
            **made,
            "learned": [*before, made["round"]],
        }
        for made, before in _ancestors(checkpoint, query(MADE))
    ]


_SOURCES = "SELECT recipe, list(DISTINCT source ORDER BY source) AS sources FROM prompts GROUP BY recipe"
# Of an older snapshot no columns are asked that a store of then may lack.
_ROUND = """SELECT {more} candidates, epoch_ms(started_at) AS started, epoch_ms(finished_at) AS finished
    FROM rounds {at} WHERE recipe = $recipe AND round = $round"""


def _attempt(query: Query, made: dict[str, Any], there: bool) -> dict[str, Any]:
    """The round's record of the attempt that made a checkpoint: that of now, or where the round was begun again since,
    that of when training read it, before it ended. Empty where neither is there."""
    for now in query(_ROUND.format(more="checkpoint, controls,", at=""), made):
        if made["checkpoint"] in (now["checkpoint"], *json.loads(now["controls"] or "{}").values()):
            return now
    at = f"AT (VERSION => {int(made['snapshot'])})"
    then = query(_ROUND.format(more="", at=at), made) if there else []
    return then[0] if then else {}


def _ancestors(checkpoint: str, made: list[dict]) -> list[tuple[dict, dict[str, dict]]]:
    """The rows of a checkpoint and of all that it started or learned from, each with those of the earlier rounds whose
    samples it has too."""
    by_digest = {row["checkpoint"]: row for row in reversed(made)}
    found, open_ = {}, [by_digest[checkpoint]]
    while open_:
        row = open_.pop()
        if row["checkpoint"] not in found:
            before = earlier(row, made)
            found[row["checkpoint"]] = row, before
            weights = [by_digest[digest] for digest in (row["parent"], row["drawn_from"]) if digest in by_digest]
            open_ += [*weights, *before.values()]
    return sorted(found.values(), key=lambda one: made.index(one[0]))


def _openlineage(path: Path, rows: Path, history: list[dict[str, Any]]) -> None:
    """Events of every round that the checkpoint came of, oldest first, and of this export of the last one's samples."""
    from openlineage.client.serde import Serde

    with open(path, "w", encoding="utf-8") as file:
        for one in history:
            for event in _events(one):
                file.write(Serde.to_json(event) + "\n")
        file.write(Serde.to_json(_exported(rows, history[-1])) + "\n")


def _events(made: dict[str, Any]) -> Iterator[Any]:
    """A start and an end for each step of a round, where it is known when; else one event that is neither."""
    from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.facet_v2 import dataset_version_dataset, output_statistics_output_dataset, parent_run

    recipe, round_key = made["recipe"], made["round"]
    version = dataset_version_dataset.DatasetVersionDatasetFacet
    statistics = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet
    weights = lambda digest: InputDataset(NAMESPACE, f"weights/{digest}", facets={"version": version(digest)})  # noqa: E731
    table = lambda name: f"{recipe}/{round_key}/{name}"  # noqa: E731
    read = lambda name: InputDataset(NAMESPACE, table(name))  # noqa: E731
    sources = [InputDataset(NAMESPACE, f"sources/{source}") for source in made["sources"]]
    learned = [InputDataset(NAMESPACE, name) for name in _learned(made)]
    only = [table("accepted")] == _learned(made)  # then the digest and number of its samples are that table's
    accepted = {"version": version(made["accepted_digest"])} if only else {}
    steps = [
        ("candidates", [*sources, weights(made["drawn_from"])], table("candidates"), {}, made["candidates"]),
        ("scores", [read("candidates")], table("scores"), {}, None),
        ("accepted", [read("scores")], table("accepted"), accepted, made["samples"] if only else None),
        (
            "checkpoint",
            [*learned, weights(made["parent"])],
            f"weights/{made['checkpoint']}",
            {"version": version(made["checkpoint"])},
            None,
        ),
    ]
    whole = _uuid(made["dagster_run_id"], recipe, round_key)
    parent = parent_run.ParentRunFacet(
        run=parent_run.Run(runId=whole), job=parent_run.Job(namespace=NAMESPACE, name=f"{recipe}_round")
    )
    times = {RunState.START: made["started"], RunState.COMPLETE: made["finished"]}
    known = {state: when for state, when in times.items() if when is not None} or {RunState.OTHER: None}
    for step, inputs, output, facets, count in steps:
        run = Run(runId=_uuid(None, whole, step), facets={"parent": parent})
        for state, when in known.items():
            yield RunEvent(
                eventType=state,
                eventTime=_time(when),
                run=run,
                job=Job(namespace=NAMESPACE, name=f"{recipe}.{step}"),
                producer=PRODUCER,
                inputs=inputs,
                outputs=[
                    OutputDataset(
                        NAMESPACE,
                        output,
                        facets=facets,
                        outputFacets={"outputStatistics": statistics(rowCount=count)} if count is not None else {},
                    )
                ],
            )


def _learned(made: dict[str, Any]) -> list[str]:
    """The tables that a checkpoint was trained on: of its rounds, what was accepted, or of a control what was drawn."""
    table = "accepted" if made["trained_on"] in (None, "accepted") else "candidates"
    return [f"{made['recipe']}/{key}/{table}" for key in made["learned"]]


def _exported(rows: Path, made: dict[str, Any]) -> Any:
    from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
    from openlineage.client.facet_v2 import schema_dataset

    fields = [schema_dataset.SchemaDatasetFacetFields(name=name, description=said) for name, said in COLUMNS.items()]
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
    """A run's id as OpenLineage wants it."""
    try:
        return str(uuid.UUID(given))
    except (ValueError, TypeError):
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(otherwise)))


def _time(milliseconds: int | None) -> str:
    moment = datetime.now(UTC) if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat()
