"""Draw: the candidates of a round, and those of its evaluation.

Belongs here: which prompts a round asks, which of their draws are still missing in the store, and persisting each wave
once it is drawn. Not: how candidates are drawn (sampling.py), nor drawing until enough are accepted (until.py).
"""

import time
from collections.abc import Sequence
from functools import partial

from rsft_pipeline import lineage, prompts, sampling
from rsft_pipeline.progress import Show
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.rounds import Round, RoundError
from rsft_pipeline.sampling import EVALUATION, Asked, Session, evaluation_sampling
from rsft_pipeline.steps import ingest
from rsft_pipeline.steps.rows import EVALUATION_CANDIDATES, ROUND_CANDIDATES, of_evaluation, of_round
from rsft_pipeline.steps.score import check_not_revoked
from rsft_pipeline.store import Store, columns


def prompts_of(store: Store, recipe: Recipe, split: str) -> list[dict]:
    """The prompts of a split that are in the sources now."""
    return store.query("SELECT * FROM prompts WHERE recipe = ? AND split = ? AND active", [recipe.name, split])


def answers(store: Store, recipe: Recipe) -> str | None:
    """Digest of the present reference answers, if these are a round's candidates; else None."""
    if recipe.sampling.source != "reference":
        return None
    known = prompts_of(store, recipe, "train")
    return lineage.set_digest(lineage.digest([row["prompt_id"], row["reference"]]) for row in known)


def ask(store: Store, round_: Round, tokenizer, *, split: str, run_id: str) -> list[Asked]:
    """The prompts that a round draws for (split `train`) or is evaluated on (`eval`). Writes `round_prompts`.

    Raises:
        RoundError: weights or a scorer were revoked, or prompt settings or reference answers changed since it began.
    """
    check_not_revoked(store, round_)  # before anything is drawn in vain
    recipe = round_.recipe
    read_by = store.query("SELECT DISTINCT settings FROM prompts WHERE recipe = ? AND active", [recipe.name])
    if {row["settings"] for row in read_by} - {ingest.settings(recipe), None}:  # None: from before they were recorded
        raise RoundError(
            f"{recipe.name} {round_.key}: its prompts were read with another section `prompts` than the round began "
            "with: the recipe was changed in between. Run the round again, from its prompts on"
        )
    if split == "train" and round_.answers not in (None, answers(store, recipe)):
        raise RoundError(
            f"{recipe.name} {round_.key}: its reference answers have changed since it began: run the round again"
        )
    scope = round_.key if split == "train" else EVALUATION
    number = recipe.sampling.prompts if split == "train" else recipe.evaluation.prompts
    chosen = sampling.choose(prompts_of(store, recipe, split), number, f"{recipe.seed} {scope}")
    of = {"recipe": recipe.name, "round": round_.key, "split": split}
    rows = [{**of, "prompt_id": row["prompt_id"], "dagster_run_id": run_id} for row in chosen]
    store.replace("round_prompts", rows, **of)
    return [
        Asked(
            row["prompt_id"],
            tuple(prompts.encode(tokenizer, row["text"], row["chat"], recipe.task)),
            row["reference"],
        )
        for row in chosen
    ]


def plan(
    store: Store, round_: Round, policy: str, asked: Sequence[Asked], *, split: str, draws: range
) -> list[tuple[int, list[sampling.Request]]]:
    """The waves of the missing draws: those of the round (split `train`), or of the evaluation of a policy (`eval`)."""
    recipe = round_.recipe
    if split == "train":
        scope, how, there = round_.key, recipe.sampling, (ROUND_CANDIDATES, of_round(round_))
    else:
        scope, how = EVALUATION, evaluation_sampling(recipe)
        there = EVALUATION_CANDIDATES, of_evaluation(round_, policy)
    waves = sampling.waves(recipe, scope, policy, asked, how, draws, round_.answers)
    sql, parameters = there
    drawn = set(store.arrow(f"SELECT candidate_id FROM ({sql})", parameters)["candidate_id"].to_pylist())
    return list(sampling.pending(waves, drawn))


def draw(
    store: Store,
    round_: Round,
    policy: str,
    session: Session,
    waves: Sequence[tuple[int, list[sampling.Request]]],
    *,
    split: str,
    run_id: str,
    show: Show,
) -> int:
    """Draw the waves and persist each, whole, as soon as it is drawn. Returns the number of tokens drawn."""
    recipe = round_.recipe
    how = recipe.sampling if split == "train" else evaluation_sampling(recipe)
    hashed = sampling.settings(how, recipe.seed, round_.answers)
    tokens, done, began = 0, 0, time.monotonic()
    for number, requests in waves:
        drawn = session.draw(requests, how)
        store.append(
            "candidates",
            columns(
                len(drawn),
                recipe=recipe.name,
                round=round_.key,
                candidate_id=[one.request.candidate_id for one in drawn],
                prompt_id=[one.request.asked.prompt_id for one in drawn],
                split=split,
                origin=how.source,
                policy=policy,
                draw=[one.request.draw for one in drawn],
                wave=number,
                text=[one.text for one in drawn],
                token_ids=[one.token_ids for one in drawn],
                tokens=[len(one.token_ids) for one in drawn],
                finish_reason=[one.finish_reason for one in drawn],
                log_q=[one.log_q for one in drawn],
                log_p=[one.log_p for one in drawn],
                seed=[one.request.seed for one in drawn],
                settings=hashed,
                dagster_run_id=run_id,
            ),
        )
        tokens += sum(len(one.token_ids) for one in drawn)
        done += len(drawn)
        show(done, f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
    return tokens


def draw_all(
    store: Store, round_: Round, session: Session, asked: Sequence[Asked], *, run_id: str, show: Show
) -> tuple[int, int]:
    """Draw equally many for each of the round's prompts. Returns how many candidates and tokens this call drew."""
    (draws,) = sampling.passes(round_.recipe.sampling)
    waves = plan(store, round_, round_.drawn_from, asked, split="train", draws=draws)
    missing = sum(len(requests) for _, requests in waves)
    show = partial(show, total=missing)
    return missing, draw(store, round_, round_.drawn_from, session, waves, split="train", run_id=run_id, show=show)
