"""Croissant: a description of exported rows as a data set (https://mlcommons.org/croissant, 1.1).

Not: which rows are exported, and what their columns mean (export.py).
"""

import json
import logging
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rsft_pipeline import lineage
from rsft_pipeline.audit.ids import AuditError


def write(
    path: Path, rows: Path, made: Mapping[str, Any], columns: Mapping[str, str], numbers: Collection[str]
) -> None:
    """Describe exported rows, and read the description and the first row back with Croissant's own reader.

    Args:
        rows: the file; its name tells whether it is Parquet or JSON lines.
        made: the checkpoint's row of `checkpoints`.
        columns: what each column is, in the order of the file. `numbers`: those that may have fractions.
    """
    import mlcroissant as mlc

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of no licence and citation, not ours to give
    context = mlc.Context(conforms_to="http://mlcommons.org/croissant/1.1")  # the first version with arrays
    kinds = {
        "chat": mlc.DataType.BOOL,
        "line": mlc.DataType.INT64,
        "draw": mlc.DataType.INT32,
        "seed": mlc.DataType.INT64,
        "token_ids": mlc.DataType.INT32,
        **dict.fromkeys(numbers, mlc.DataType.FLOAT64),
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
        for column, description in columns.items()
    ]
    control = made["trained_on"] not in (None, "accepted")
    kind = f"candidates (a control: {made['trained_on']})" if control else "accepted candidates"
    file = mlc.FileObject(
        ctx=context,
        id="rows",
        name=rows.name,
        content_url=rows.name,
        content_size=f"{rows.stat().st_size} B",
        encoding_formats=[mlc.EncodingFormat.PARQUET if rows.suffix == ".parquet" else mlc.EncodingFormat.JSON_LINES],
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
