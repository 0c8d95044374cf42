"""Train: a checkpoint from the accepted set, or from what a control is trained on.

Belongs here: reading a training set as one snapshot, and writing the checkpoint with everything that went into it.
Not: which rows a training set consists of (rows.py), nor the training itself (training.py).
"""

import json
import shutil
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rsft_pipeline import lineage, merkle, models, prompts, revocations, tasks
from rsft_pipeline.card import card
from rsft_pipeline.devices import Device
from rsft_pipeline.home import Home
from rsft_pipeline.models import checkpoints
from rsft_pipeline.models.checkpoints import Checkpoint
from rsft_pipeline.models.trainable import select_trainable
from rsft_pipeline.progress import Show
from rsft_pipeline.rounds import Round, Weights
from rsft_pipeline.steps.rows import TrainedOn, of_training, training_rows
from rsft_pipeline.store import NEWEST_SNAPSHOT, Store, columns, replace
from rsft_pipeline.training import History, Sample, fit


def samples_sql(rows: str) -> str:
    """A SELECT of what samples are made of, with their Merkle leaves; `rows` is the SQL of `training_rows`."""
    return f"SELECT candidate_id, prompt, chat, token_ids, weight, {merkle.LEAF} AS leaf FROM ({rows})"


def training_set(
    store: Store, round_: Round, tokenizer, trained_on: TrainedOn = "accepted"
) -> tuple[list[Sample], pa.ChunkedArray, int]:
    """The samples that a checkpoint of the round is trained on, in the order of their ids, the leaf of each
    (merkle.py), and the snapshot that they were read from."""
    chosen, parameters = training_rows(round_.recipe.name, round_.key, round_.recipe, trained_on)

    def work(connection):
        read = connection.execute(f"{samples_sql(chosen)} ORDER BY candidate_id", parameters).to_arrow_table()
        return read, connection.execute(NEWEST_SNAPSHOT).fetchone()[0]

    read, snapshot = store.commit(work)
    rows = read.to_pylist()
    encoded = {(row["prompt"], row["chat"]): None for row in rows}
    for text, chat in encoded:
        encoded[text, chat] = prompts.encode(tokenizer, text, chat, round_.recipe.task)
    samples = [
        Sample(row["candidate_id"], encoded[row["prompt"], row["chat"]], row["token_ids"], row["weight"])
        for row in rows
    ]
    return samples, read["leaf"], snapshot


def _scorers(store: Store, round_: Round) -> list[str]:
    """The scorer versions that the decisions behind a training set were made with."""
    rows = store.query(
        "SELECT scorers FROM rounds WHERE recipe = $recipe AND round BETWEEN $first AND $last", of_training(round_)
    )
    return sorted({version for row in rows for version in json.loads(row["scorers"] or "{}").values()})


# If a control comes out as the round's own checkpoint, it was trained on the same rows: the checkpoint's are kept.
_ACCEPTED_ALIKE = """SELECT 1 FROM checkpoints WHERE recipe = ? AND round = ? AND checkpoint = ?
    AND coalesce(trained_on, 'accepted') = 'accepted'"""


@dataclass(frozen=True)
class Trained:
    """A checkpoint and how it was made."""

    checkpoint: Checkpoint
    parent: str
    accepted_digest: str
    merkle_root: str
    samples: int
    trainable: int
    total: int
    history: History


def train(
    store: Store,
    round_: Round,
    start: Weights,
    home: Home,
    device: Device,
    run_id: str,
    show: Show,
    trained_on: TrainedOn = "accepted",
) -> Trained:
    """Fine-tune the starting weights on the accepted set, or as a control, save the checkpoint, and write its rows.

    Writes `checkpoints` and `training_samples`. After a kill it continues from the last saved step.
    """
    recipe = round_.recipe
    tokenizer = models.tokenizer(start.path)
    samples, leaves, snapshot = training_set(store, round_, tokenizer, trained_on)
    model = models.load(start.path, device, train=True, task=recipe.task)
    model, trainable, total = select_trainable(model, recipe.model, recipe.seed)
    scratch = home.scratch / recipe.name / round_.key / trained_on
    history = fit(
        model,
        samples,
        recipe.training,
        task=tasks.of(recipe),
        start=lineage.digest([start.digest, recipe.model.model_dump(mode="json")]),
        seed=recipe.seed,
        device=device,
        pad_id=tokenizer.pad_token_id,
        scratch=scratch,
        on_step=lambda step, steps, loss, tokens: show(step, f"loss {loss:.3f}", steps),
    )
    accepted = lineage.set_digest(sample.candidate_id for sample in samples)
    meta = {
        "kind": "checkpoint",
        "recipe": recipe.name,
        "round": round_.key,
        "parent": start.digest,
        "policy": round_.policy,
        "drawn_from": round_.drawn_from,
        "trained_on": trained_on,
        "accepted_digest": accepted,
        "merkle_root": merkle.root(leaves),
        "samples": len(samples),
        "store_snapshot": snapshot,
        "scorers": _scorers(store, round_),
        "training": recipe.training.model_dump(mode="json"),
        "recipe_digest": recipe.digest,
        "steps": len(history.steps),
        "tokens": history.tokens,
        "loss": history.steps[-1].loss,
        "trainable_parameters": trainable,
        "parameters": total,
    }
    checkpoint = checkpoints.save(model, tokenizer, home.checkpoints, meta, card(meta))
    if trained_on == "accepted":  # the same weights may exist already, from rows with other scores or as a control
        checkpoints.describe(checkpoint, meta, card(meta))
    _write(store, round_, checkpoint, meta, samples, leaves, run_id)
    shutil.rmtree(scratch, ignore_errors=True)
    return Trained(checkpoint, start.digest, accepted, meta["merkle_root"], len(samples), trainable, total, history)


def _write(
    store: Store,
    round_: Round,
    checkpoint: Checkpoint,
    meta: dict[str, Any],
    samples: list[Sample],
    leaves: pa.ChunkedArray,
    run_id: str,
) -> None:
    """Write the rows of a saved checkpoint, and name it in its round's record."""
    made = {"recipe": meta["recipe"], "round": meta["round"], "checkpoint": checkpoint.digest}
    copied = ("parent", "policy", "drawn_from", "trained_on", "accepted_digest", "samples", "steps", "loss")
    row = {
        **made,
        **{name: meta[name] for name in copied},
        "path": str(checkpoint.path),
        "snapshot": meta["store_snapshot"],
        "meta": json.dumps(meta),
        "mlflow_run_id": round_.mlflow_run_id,
        "dagster_run_id": run_id,
    }
    members = columns(
        len(samples),
        **made,
        candidate_id=[sample.candidate_id for sample in samples],
        weight=[sample.weight for sample in samples],
        leaf=leaves,
        dagster_run_id=run_id,
    )

    def work(connection):
        accepted = meta["trained_on"] == "accepted"
        if accepted or not connection.execute(_ACCEPTED_ALIKE, list(made.values())).fetchone():
            replace(connection, "checkpoints", [row], **made)
            replace(connection, "training_samples", members, **made)
        revocations.lift(connection, checkpoint.digest)
        if accepted:
            column, value = "checkpoint = ?", checkpoint.digest
        else:
            column = "controls = json_merge_patch(coalesce(controls, '{}'), ?)"
            value = json.dumps({meta["trained_on"]: checkpoint.digest})
        of_round = [meta["recipe"], meta["round"]]
        connection.execute(f"UPDATE rounds SET {column} WHERE recipe = ? AND round = ?", [value, *of_round])

    store.commit(work)
