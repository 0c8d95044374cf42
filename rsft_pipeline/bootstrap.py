"""Bootstrap: the weights of a first round, if they have to be made on this machine.

Either a small model from scratch, so that a recipe can run without a hub, or a model from elsewhere that gets
a head for the recipe's labels or a supervised warm-up. Belongs here: the tokenizer, the initial weights and
the warm-up corpus. Not: the loop (training.py) or how a checkpoint is written (models/checkpoints.py). Everything
is made on the CPU, where two builds give the same bits.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rsft_pipeline import functions, lineage, models, prompts, tasks, training
from rsft_pipeline.devices import Device, own_rng
from rsft_pipeline.models import checkpoints, configuration
from rsft_pipeline.models.checkpoints import Checkpoint
from rsft_pipeline.models.trainable import select_trainable
from rsft_pipeline.recipe.model import Bootstrap, WarmUp
from rsft_pipeline.recipe.reading import nearest
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.training import Training

log = logging.getLogger(__name__)

PAD, BOS, EOS, UNKNOWN = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")

CARD = """# A bootstrapped {model_type}

Made from random weights and {rows} rows of warm-up text to give the recipe `{recipe}` a first policy.
It knows nothing beyond that text.
"""

PREPARED_CARD = """# A prepared {model_type}

The weights `{parent}`, made ready for the recipe `{recipe}`: labels {labels}, {rows} rows of warm-up text.
"""

OnStep = Callable[[int, int, float, int], None]


def check(recipe: Recipe):
    """Check that the recipe's warm-up can run: that its corpus is usable, and a model of the given sizes can be made.

    Returns:
        The configuration of a bootstrapped model; None if the model comes from elsewhere.

    Raises:
        ModelError: a corpus or configuration that cannot be used.
    """
    import torch

    _corpus(recipe, recipe.model.bootstrap or recipe.model.warm_up)
    if recipe.model.bootstrap is None:
        return None
    special = {f"{name}_token_id": SPECIAL.index(token) for name, token in (("pad", PAD), ("bos", BOS), ("eos", EOS))}
    config = _configuration(recipe.model.bootstrap, **special)
    with torch.device("meta"):  # no weights
        _random(config, recipe)
    return config


def build(recipe: Recipe, root: Path, on_step: OnStep) -> Checkpoint:
    """The recipe's bootstrapped model: made on first use, found again afterwards.

    Args:
        root: folder of checkpoints. `root/bootstrap` records which of them each bootstrap gave, and
            holds the state from which a killed warm-up continues.
        on_step: see `training.fit`.

    Raises:
        ModelError: a corpus or configuration that cannot be used.
    """
    settings = recipe.model.bootstrap
    corpus = _corpus(recipe, settings)
    rows = _rows(recipe, corpus)
    key = lineage.digest([settings.model_dump(mode="json"), corpus, rows, *_shape(recipe)])
    if made := _made(root, key):
        return made
    # An alphabet reveals nothing, so held-out prompts may add to it; BPE merges are learnt without them.
    texts = _texts(corpus if settings.tokenizer == "characters" else rows)
    tokenizer = _tokenizer(settings, texts, _configuration(settings).is_encoder_decoder)
    model = _fresh(settings, tokenizer, recipe)
    facts = _warm_up(recipe, settings, model, tokenizer, corpus, rows, root / "bootstrap" / key, key, on_step)
    meta = {"kind": "bootstrap", **facts, "bootstrap": settings.model_dump(mode="json")}
    card = CARD.format(model_type=model.config.model_type, rows=len(rows), recipe=recipe.name)
    return _remember(root, key, checkpoints.save(model, tokenizer, root, meta, card))


def prepare(recipe: Recipe, found: Checkpoint, root: Path, on_step: OnStep) -> Checkpoint:
    """A model from elsewhere with the recipe's labels and warm-up: made on first use, found again afterwards.

    The warm-up trains what `model.train` says, and the head of a classification model.

    Args:
        found: the original model.
        root, on_step: as in `build`.

    Raises:
        ModelError: a corpus that cannot be used.
    """
    labels, settings = recipe.model.labels, recipe.model.warm_up
    corpus = _corpus(recipe, settings) if settings else []
    told = settings.model_dump(mode="json") if settings else None
    trained = recipe.model.model_dump(mode="json", include={"train", "last_layers", "freeze", "lora"})
    rows = _rows(recipe, corpus, models.tokenizer(found.path)) if corpus else []
    key = lineage.digest([found.digest, labels, told, trained, corpus, rows, *_shape(recipe)])
    if made := _made(root, key):
        return made
    tokenizer = models.tokenizer(found.path)
    if recipe.task == "classification":
        model = models.with_head(found.path, labels, recipe.seed)
    else:
        model = models.load(found.path, CPU, train=True, task=recipe.task)
    facts = {"recipe": recipe.name, "rows": 0}
    if settings:
        model, _, _ = select_trainable(model, recipe.model, recipe.seed)
        facts = _warm_up(recipe, settings, model, tokenizer, corpus, rows, root / "bootstrap" / key, key, on_step)
    meta = {"kind": "prepared", **facts, "parent": found.digest, "labels": labels, "warm_up": told}
    card = PREPARED_CARD.format(
        model_type=model.config.model_type,
        parent=found.digest,
        labels=", ".join(labels) or "none",
        rows=facts["rows"],
        recipe=recipe.name,
    )
    return _remember(root, key, checkpoints.save(model, tokenizer, root, meta, card))


# --- the warm-up ------------------------------------------------------------------------------

CPU = Device("cpu", "float32")


def _shape(recipe: Recipe) -> list:
    return [recipe.seed, recipe.task, recipe.model.labels]


def _rows(recipe: Recipe, corpus: list[dict[str, str]], tokenizer=None) -> list[dict[str, str]]:
    """The rows to train on, without those whose prompt is in the evaluation split.

    Args:
        tokenizer: the model's; None for a model made here, which has no chat template.
    """
    asked = {row["prompt"] for row in corpus} - {""}  # each may be in many rows, and is checked once
    left_out = prompts.held_out(recipe, asked, tokenizer)
    return [row for row in corpus if row["prompt"] not in left_out]


def _warm_up(
    recipe: Recipe,
    settings: WarmUp,
    model,
    tokenizer,
    corpus: list,
    rows: list,
    scratch: Path,
    key: str,
    on_step: OnStep,
) -> dict:
    """Train the model on the rows; a killed warm-up continues from `scratch`. Returns what to record of it.

    The loss is taken on the completion and EOS; for a row without a prompt that is the whole text.
    """
    log.info("warm-up: %d rows of %d, the rest is in the evaluation split", len(rows), len(corpus))
    if not rows:
        raise _bad_corpus(f"{settings.corpus} has no row to train on once the evaluation split is left out")
    history = None
    if settings.steps:
        history = training.fit(
            model,
            _samples(recipe, model, tokenizer, rows),
            Training(
                epochs=settings.steps * settings.batch_size / len(rows),
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                schedule="cosine",
            ),
            task=tasks.of(recipe),
            start=key,
            seed=recipe.seed,
            device=CPU,
            pad_id=tokenizer.pad_token_id,
            scratch=scratch,
            on_step=on_step,
        )
    return {
        "recipe": recipe.name,
        "corpus": lineage.digest(corpus),
        "rows": len(rows),
        "rows_held_out": len(corpus) - len(rows),
        "seed": recipe.seed,
        "steps": settings.steps,
        "tokens": history.tokens if history else 0,
        "loss": history.steps[-1].loss if history else None,
    }


def _samples(recipe: Recipe, model, tokenizer, rows: list[dict[str, str]]) -> list[training.Sample]:
    chat = recipe.prompts.messages is not None
    asked = [prompts.encode(tokenizer, row["prompt"], chat, recipe.task) for row in rows]
    completions = tasks.of(recipe).completion_ids(model, tokenizer, [row["completion"] for row in rows])
    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    samples = [
        training.Sample(row["prompt"] or row["completion"], prompt or start, completion)  # for GPT-2 "" has no tokens
        for row, prompt, completion in zip(rows, asked, completions, strict=True)
    ]
    context = configuration.context_of(model.config) or math.inf
    for row, sample in zip(rows, samples, strict=True):
        if (length := training.room(sample, model)) > context:
            raise _bad_corpus(f"the row {row!r:.100} has {length} tokens; the model's context is {context}")
    return samples


def _made(root: Path, key: str) -> Checkpoint | None:
    """The checkpoint made under this key before, if it is still there. Raises ModelError if it has changed since."""
    file = root / "bootstrap" / f"{key}.txt"
    return models.made(root, file.read_text("utf-8")) if file.is_file() else None


def _remember(root: Path, key: str, checkpoint: Checkpoint) -> Checkpoint:
    file = root / "bootstrap" / f"{key}.txt"
    file.parent.mkdir(exist_ok=True)
    checkpoints.replace(file, checkpoint.digest)
    shutil.rmtree(file.with_suffix(""), ignore_errors=True)  # the state that a killed warm-up would go on from
    return checkpoint


# --- the corpus -------------------------------------------------------------------------------


def _corpus(recipe: Recipe, settings: WarmUp) -> list[dict[str, str]]:
    """Every row as {prompt, completion}; the prompt may be empty, the completion may not."""
    source = settings.corpus
    file = recipe.path(source)
    if file.is_file():
        rows = _json_lines(file)
    elif ":" in source:
        rows = functions.rows(source, recipe.folder)
    else:
        raise _bad_corpus(f"there is no file {file}, and {source!r} is not `module:function`")
    try:
        return _checked(source, rows)
    except functions.FunctionError as error:
        raise _bad_corpus(error) from error


def _checked(source: str, rows: Iterable[object]) -> list[dict[str, str]]:
    corpus = []
    for number, row in enumerate(rows, start=1):
        if not (
            isinstance(row, dict)
            and isinstance(row.get("prompt", ""), str)
            and isinstance(row.get("completion"), str)
            and row["completion"]
        ):
            raise _bad_corpus(
                f"{source}: row {number} is {row!r:.100}; expected {{prompt: text, completion: text that is not empty}}"
            )
        corpus.append({"prompt": row.get("prompt", ""), "completion": row["completion"]})
    if not corpus:
        raise _bad_corpus(f"{source} has no rows")
    return corpus


def _json_lines(file: Path) -> Iterable[object]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise _bad_corpus(f"{file}: line {number} is not JSON: {error}") from None


def _bad_corpus(why: object) -> models.ModelError:
    return models.ModelError(f"the warm-up's `corpus`: {why}")


def _texts(rows: list[dict[str, str]]) -> Iterable[str]:
    for row in rows:
        yield row["prompt"]
        yield row["completion"]


# --- tokenizer and weights --------------------------------------------------------------------


def _tokenizer(settings: Bootstrap, texts: Iterable[str], encoder: bool = False):
    """A tokenizer that decodes to exactly the text it encoded, and reads `</s>` in a text as plain characters.

    Every prompt starts with BOS, so that even an empty one has a position to predict from; an encoder's ends
    with EOS instead, as T5's does. With `characters`, a character that is not in the corpus becomes `<unk>`.
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
        single=f"$A {EOS}" if encoder else f"{BOS} $A",
        special_tokens=[(token, inner.token_to_id(token)) for token in (BOS, EOS)],
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


def _configuration(settings: Bootstrap, **filled_in: Any):
    """The model's configuration, with what is filled in; unknown settings are refused."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    sizes = dict(settings.config)
    model_type = sizes.pop("model_type", None)
    if model_type is None:
        raise models.ModelError("model.bootstrap.config has no `model_type`, such as llama or gpt2")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        near = nearest(str(model_type), CONFIG_MAPPING.keys())
        raise models.ModelError(f"model.bootstrap.config.model_type: transformers has no {model_type!r}.{near}")
    defaults = AutoConfig.for_model(model_type)
    known = {*defaults.to_dict(), *defaults.attribute_map}
    for name in sizes:
        if name not in known:  # transformers would keep it and build the model at its default size
            raise models.ModelError(
                f"model.bootstrap.config.{name}: {model_type} has no such setting.{nearest(name, known)}"
            )
    try:
        return AutoConfig.for_model(model_type, **{**sizes, **filled_in})
    except (ValueError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise _no_model(error) from error


def _random(config, recipe: Recipe):
    """A model of the configuration with random weights, on torch's default device and from its random generator."""
    try:
        model = models.auto_class(recipe.task).from_config(config)
    except Exception as error:  # each kind of model raises its own
        raise _no_model(error) from error
    models.check_kind(model, recipe.task)
    return model


def _no_model(error: Exception) -> models.ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
    return models.ModelError(f"model.bootstrap.config makes no model: {reason}")


def _fresh(settings: Bootstrap, tokenizer, recipe: Recipe):
    """A model of the configuration with random weights that follow from the recipe's seed."""
    import torch
    from transformers import GenerationConfig

    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if _configuration(settings).is_encoder_decoder:
        special["decoder_start_token_id"] = tokenizer.pad_token_id  # as T5's
    labels = models.head(recipe.model.labels) if recipe.model.labels else {}
    config = _configuration(settings, **special, **labels, vocab_size=len(tokenizer))
    with own_rng("cpu"):
        torch.manual_seed(recipe.seed)
        model = _random(config, recipe)
    if model.can_generate():
        model.generation_config = GenerationConfig(**special)
    return model
