"""Bootstrap: a small model made on this machine, so that a recipe can run without a hub.

Belongs here: the tokenizer, the fresh weights and the warm-up corpus. Does not: the loop (training.py)
or how a checkpoint is written (models.py). It is made on the CPU, where two builds give the same bits.
"""

import difflib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from rsft_pipeline import functions, lineage, models, prompts, tasks, training
from rsft_pipeline.devices import Device
from rsft_pipeline.recipe import Bootstrap, Recipe, Training

log = logging.getLogger(__name__)

PAD, BOS, EOS, UNKNOWN = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")

CARD = """# A bootstrapped {model_type}

Made from random weights and {rows} rows of warm-up text to give the recipe `{recipe}` a first policy.
It knows nothing beyond that text.
"""


def build(recipe: Recipe, root: Path, on_step: Callable[[int, int, float, int], None]) -> models.Checkpoint:
    """The recipe's bootstrapped model: made on first use, found again afterwards.

    Rows whose prompt is in the evaluation split are left out. The loss is on completion and EOS; a
    row without a prompt is trained on whole.

    Args:
        root: folder of checkpoints. `root/bootstrap` remembers which of them each bootstrap gave, and
            holds the state that a killed warm-up goes on from.
        on_step: see `training.fit`.

    Raises:
        ModelError: a corpus or configuration that cannot be used.
    """
    settings = recipe.model.bootstrap
    corpus = _corpus(recipe)
    rows = [row for row in corpus if not row["prompt"] or not prompts.held_out(recipe, row["prompt"])]
    key = lineage.digest([settings.model_dump(mode="json"), corpus, rows, recipe.seed, recipe.task])
    made = root / "bootstrap" / f"{key}.txt"
    if made.is_file():
        digest = made.read_text("utf-8")
        if (root / digest).is_dir():
            return models.Checkpoint(digest, root / digest)

    log.info("bootstrap: %d rows of %d, the rest is in the evaluation split", len(rows), len(corpus))
    if not rows:
        raise models.ModelError(f"{settings.corpus}: no row is left to train on once the evaluation split is left out")
    # An alphabet teaches nothing, so held-out prompts may add to it; the merges of BPE are learnt from the rest.
    tokenizer = _tokenizer(settings, _texts(corpus if settings.tokenizer == "characters" else rows))
    model = _fresh(settings, tokenizer, recipe.task, recipe.seed)
    scratch = root / "bootstrap" / key
    history = None
    if settings.steps:
        history = training.fit(
            model,
            _samples(tokenizer, rows),
            Training(
                epochs=settings.steps * settings.batch_size / len(rows),
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                schedule="cosine",
            ),
            task=tasks.of(recipe),
            start=key,
            seed=recipe.seed,
            device=Device("cpu", "float32"),
            pad_id=tokenizer.pad_token_id,
            scratch=scratch,
            on_step=on_step,
        )
    meta = {
        "kind": "bootstrap",
        "recipe": recipe.name,
        "bootstrap": settings.model_dump(mode="json"),
        "corpus": lineage.digest(corpus),
        "rows": len(rows),
        "rows_held_out": len(corpus) - len(rows),
        "seed": recipe.seed,
        "steps": settings.steps,
        "tokens": history.tokens if history else 0,
        "loss": history.steps[-1].loss if history else None,
    }
    card = CARD.format(model_type=model.config.model_type, rows=len(rows), recipe=recipe.name)
    checkpoint = models.save(model, tokenizer, root, meta, card)
    made.parent.mkdir(exist_ok=True)
    temporary = made.with_suffix(f".{os.getpid()}")
    temporary.write_text(checkpoint.digest, "utf-8")
    temporary.replace(made)
    shutil.rmtree(scratch, ignore_errors=True)
    return checkpoint


# --- the corpus -------------------------------------------------------------------------------


def _corpus(recipe: Recipe) -> list[dict[str, str]]:
    """Every row as {prompt, completion}; the prompt may be empty, the completion may not."""
    source = recipe.model.bootstrap.corpus
    file = recipe.path(source)
    if file.is_file():
        rows = _json_lines(file)
    elif ":" in source:
        rows = functions.load(source, recipe.folder)()
    else:
        raise models.ModelError(
            f"model.bootstrap.corpus is {source!r}: there is no file {file}, and it is not `module:function`"
        )
    corpus = []
    for number, row in enumerate(rows, start=1):
        if not (
            isinstance(row, dict)
            and isinstance(row.get("prompt", ""), str)
            and isinstance(row.get("completion"), str)
            and row["completion"]
        ):
            raise models.ModelError(
                f"{source}: row {number} is {row!r:.100}; expected {{prompt: text, completion: text that is not empty}}"
            )
        corpus.append({"prompt": row.get("prompt", ""), "completion": row["completion"]})
    return corpus


def _json_lines(file: Path) -> Iterable[object]:
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise models.ModelError(f"{file}: line {number} is not JSON: {error}") from None


def _texts(rows: list[dict[str, str]]) -> Iterable[str]:
    for row in rows:
        yield row["prompt"]
        yield row["completion"]


def _samples(tokenizer, rows: list[dict[str, str]]) -> list[training.Sample]:
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows], add_special_tokens=False)["input_ids"]
    return [
        training.Sample(row["prompt"] or row["completion"], prompt, [*completion, tokenizer.eos_token_id])
        for row, prompt, completion in zip(rows, prompts, completions, strict=True)
    ]


# --- tokenizer and weights --------------------------------------------------------------------


def _tokenizer(settings: Bootstrap, texts: Iterable[str]):
    """A tokenizer that gives back the very text it was given, and reads `</s>` in a text as mere characters.

    Every prompt starts with BOS, so that even an empty one has a position to predict from. With
    `characters`, a character that the corpus never shows becomes `<unk>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers import models as inner_models
    from transformers import PreTrainedTokenizerFast

    if settings.tokenizer == "characters":
        alphabet = sorted(set().union(*texts))
        ids = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
        inner = Tokenizer(inner_models.WordLevel(ids, unk_token=UNKNOWN))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()
    else:
        inner = Tokenizer(inner_models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=settings.vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, inner.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _fresh(settings: Bootstrap, tokenizer, task: str, seed: int):
    """A model of the configuration with random weights that follow from the seed."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, GenerationConfig

    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = dict(settings.config)
    model_type = sizes.pop("model_type", None)
    if model_type is None:
        raise models.ModelError("model.bootstrap.config has no `model_type`, such as llama or gpt2")
    try:
        defaults = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise models.ModelError(f"model.bootstrap.config.model_type is {model_type!r}: {error}") from None
    known = {*defaults.to_dict(), *defaults.attribute_map}
    for name in sizes:
        if name not in known:  # transformers would keep it and build the model at its default size
            near = difflib.get_close_matches(name, known, n=1)
            raise models.ModelError(
                f"model.bootstrap.config.{name}: {model_type} has no such setting."
                f"{f' Did you mean {near[0]!r}?' if near else ''}"
            )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            config = AutoConfig.for_model(model_type, **{**sizes, **special, "vocab_size": len(tokenizer)})
            model = models.auto_class(task).from_config(config)
        except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise models.ModelError(f"model.bootstrap.config makes no model: {reason}") from error
    model.generation_config = GenerationConfig(**special)
    return model
