"""Models: found where a recipe says that they are, and loaded.

Belongs here: the base model of a first round, a teacher, and loading either; in modules of their own, what a model's
configuration says of its texts (configuration.py), saved weights (checkpoints.py) and which weights are trained
(trainable.py). Not: how a small model is made (bootstrap.py) or trained (training.py).

Weights are read as safetensors only, and no code that comes with a model is ever run.
"""

import inspect
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rsft_pipeline.devices import Device, own_rng
from rsft_pipeline.models import configuration
from rsft_pipeline.models.checkpoints import CONTENT, Checkpoint, ModelError, content_digest, no_bars, verify
from rsft_pipeline.recipe.recipe import Recipe

POINT_TO_A_FOLDER = "To use a model that is on this machine: --set {field}.source=/path/to/folder"

# --- finding the base -------------------------------------------------------------------------


def base(
    recipe: Recipe, home: Path, on_step: Callable[[int, int, float, int], None] = lambda step, steps, loss, tokens: None
) -> Checkpoint:
    """The weights that a first round starts from: bootstrapped, a local folder used in place, or from the hub.

    Args:
        home: models made on this machine are kept in its `models` folder, and made only once.
        on_step: progress of a warm-up, see `training.fit`.

    Raises:
        ModelError: the model cannot be fetched, or has no safetensors weights.
    """
    from rsft_pipeline import bootstrap  # which imports this module

    wanted, root = recipe.model, bases(home)
    if wanted.source == "bootstrap":
        return bootstrap.build(recipe, root, on_step)
    found = fetch(recipe, "model", wanted.source, wanted.revision)
    return bootstrap.prepare(recipe, found, root, on_step) if wanted.warm_up or wanted.labels else found


def check(recipe: Recipe) -> int | None:
    """Check that the models that the recipe names are usable, before one is made or loaded. The hub is not asked.

    Returns:
        The context, in tokens, of the policy or the teacher, whichever is shorter, as far as it is known already: see
        `context_length`.

    Raises:
        ModelError: a folder does not exist or has no weights, or a model cannot be made from what the recipe gives.
    """
    contexts = []
    if recipe.model.bootstrap or recipe.model.warm_up:
        from rsft_pipeline import bootstrap

        if made := bootstrap.check(recipe):
            contexts.append(configuration.context_of(made))
    for field, source in _named(recipe).items():
        if folder := local(recipe, f"{field}.source", source):
            _check_folder(folder, field)
            contexts.append(configuration.context_length(folder))
    return min((context for context in contexts if context is not None), default=None)


def on_hub(recipe: Recipe) -> list[str]:
    """Policy and teacher, unless they are local folders: they are taken for hub ids, and so is a misspelt folder."""
    return [source for field, source in _named(recipe).items() if local(recipe, f"{field}.source", source) is None]


def _named(recipe: Recipe) -> dict[str, str]:
    """The fields that name policy and teacher, and their sources; a bootstrapped policy has none."""
    teacher = {"sampling.teacher": recipe.sampling.teacher.source} if recipe.sampling.teacher else {}
    return teacher if recipe.model.bootstrap else {**teacher, "model": recipe.model.source}


def bases(home: Path) -> Path:
    """The folder of the base models that were made on this machine."""
    return Path(home) / "models"


def made(root: Path, digest: str) -> Checkpoint | None:
    """The model with this digest, if it is still there. Raises ModelError if it has changed since."""
    there = Checkpoint(digest, root / digest)
    if not there.path.is_dir():
        return None
    if changed := verify(there):
        raise ModelError(
            f"{there.path} is not the model that was made there: {', '.join(changed)} changed since. "
            "Move the folder away, and it is made again"
        )
    return there


def teacher(recipe: Recipe, student: Path) -> Checkpoint:
    """The weights of the recipe's teacher.

    Raises:
        ModelError: it cannot be fetched, its token ids mean other text than the student's, or it ends a completion
            with a token after which the student would continue.
    """
    wanted = recipe.sampling.teacher
    found = fetch(recipe, "sampling.teacher", wanted.source, wanted.revision)
    its, own = tokenizer(found.path), tokenizer(student)
    if its.get_vocab() != own.get_vocab():
        raise ModelError(
            f"sampling.teacher {wanted.source!r} has another vocabulary than the policy: training is on the very token "
            "ids that were drawn, so teacher and policy need the same tokenizer"
        )
    if recipe.task == "classification":  # a label has no end
        return found
    stops = own(recipe.sampling.stop, add_special_tokens=False)["input_ids"] if recipe.sampling.stop else []
    known = configuration.ends(configuration.generation(student), own) | {token for ids in stops for token in ids}
    can_be_drawn = {
        token for token in configuration.ends(configuration.generation(found.path), its) if token < len(its)
    }
    if others := can_be_drawn - known:
        texts = json.dumps([its.decode([token]) for token in sorted(others)], ensure_ascii=False)
        raise ModelError(
            f"sampling.teacher {wanted.source!r} also ends its texts by {texts}, which the policy would learn to write "
            f"and then continue after: with `sampling.stop: {texts}` it ends there as well"
        )
    return found


def fetch(recipe: Recipe, field: str, source: str, revision: str | None) -> Checkpoint:
    """The model that a recipe's field names: a local folder, or from the hub. Raises ModelError, naming the field."""
    folder = local(recipe, f"{field}.source", source) or _download(field, source, revision)
    _check_folder(folder, field)
    return Checkpoint(content_digest(folder), folder)


def local(recipe: Recipe, field: str, source: str) -> Path | None:
    """The folder that a recipe's field means; None if it means a hub id. Raises ModelError, naming the field.

    What looks like a path is never taken for a hub id.
    """
    folder = recipe.path(source)
    if folder.is_dir():
        return folder
    if source.startswith(("/", ".", "~")):
        raise ModelError(f"{field} is {source!r}: there is no folder {folder}")
    return None


def _download(field: str, model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            model_id, revision=revision, allow_patterns=list(CONTENT), ignore_patterns=["*/*", "consolidated*"]
        )
    except (OSError, ValueError) as error:  # all errors of the hub's client are one of these
        wanted = model_id if revision is None else f"{model_id} at {revision}"
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"the model {wanted} is neither a local folder nor could it be fetched from the hub: {reason}\n"
            f"{POINT_TO_A_FOLDER.format(field=field)}"
        ) from error
    return Path(folder)


def _check_folder(folder: Path, field: str = "model") -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model: there is no config.json. {POINT_TO_A_FOLDER.format(field=field)}")
    if not any(folder.glob("*.safetensors")):
        found = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
        raise ModelError(
            f"{folder} has no *.safetensors weights{f', only {found[0]}' if found else ''}: weights are read from "
            "safetensors only, because other formats can run code when they are opened. Convert them with "
            "transformers' save_pretrained"
        )


# --- loading ----------------------------------------------------------------------------------


def tokenizer(path: Path):
    """The model's tokenizer. If it has no padding token, or one that the model has no embedding for, EOS serves:
    padding is masked by position.

    Raises:
        ModelError: it has neither.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if loaded.pad_token_id is None or loaded.pad_token_id >= configuration.vocabulary(path):
        if loaded.eos_token_id is None:
            raise ModelError(f"the tokenizer in {path} has neither a padding nor an end-of-sequence token")
        loaded.pad_token = loaded.eos_token
    return loaded


def load(path: Path, device: Device, train: bool = False, task: str = "causal"):
    """The model on the device, in evaluation mode.

    Its weights are in the device's number format or, for training, in float32: otherwise updates too
    small for bf16 would be lost.

    Raises:
        ModelError: it is no model for this task, or cannot be loaded from its files.
    """
    import torch

    no_bars()
    _check_folder(Path(path))
    model = whole(auto_class(task), path, dtype=torch.float32 if train else device.torch_dtype)
    try:
        check_kind(model, task)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    model.stored_dtype = _stored_dtype(Path(path))
    if task == "classification":
        _pad_as_the_tokenizer(model, path)
    return model.to(device.kind).eval()


def check_kind(model, task: str) -> None:
    """Check that the task can be done with this kind of model. Raises ModelError."""
    if task == "classification":
        return
    name = type(model).__name__
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"a {name} keeps no keys and values, which draws would go on from")
    if task == "causal" and configuration.reads_both_ways(model.config):
        raise ModelError(f"a {name} reads its text both ways, unless its configuration has `is_decoder: true`")


def whole(made_with: Any, source: Path | str, *, new_head: bool = False, **how: Any):
    """A model with all of its weights read from safetensors: Transformers would initialise missing ones at random.

    Args:
        made_with: a class of transformers.
        source: local folder, or hub id.
        new_head: whether the head may be random, and a pooler, which nobody has trained before either.
        how: for `from_pretrained`.

    Raises:
        ModelError: weights are missing, or of another shape than the configuration says. OSError: no such model.
    """
    # Its load report would repeat the error below; raised to ERROR instead, it would warn about tensor parallelism.
    reporting = logging.getLogger("transformers.modeling_utils")
    reporting.disabled = True
    try:
        model, read = made_with.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # an error below
            **how,
        )
    except ValueError as error:
        why = str(error).strip().partition("\n")[0]
        raise ModelError(f"{source} cannot be loaded as a {made_with.__name__}: {why}") from error
    finally:
        reporting.disabled = False
    lacking = {*read["missing_keys"], *(name for name, *_ in read["mismatched_keys"])}
    if new_head:
        encoder = f"{model.base_model_prefix}."
        lacking = {name for name in lacking if name.startswith(encoder) and "pooler" not in name}
    if lacking:
        some = ", ".join(sorted(lacking)[:3])
        raise ModelError(
            f"{source} has not all the weights of a {type(model).__name__}: {len(lacking)} are missing or of another "
            f"shape ({some}{', …' if len(lacking) > 3 else ''}), and would be random. Is it a model for this task?"
        )
    return model


def with_head(path: Path, labels: Sequence[str], seed: int):
    """A classification model on the CPU, to be trained: the encoder's weights, and a head for these labels.

    An existing head with as many outputs is kept; a new one is random, determined by the seed.

    Raises:
        ModelError: the model has these labels in another order.
    """
    import torch

    no_bars()
    _check_order(path, labels)
    with own_rng("cpu"):
        torch.manual_seed(seed)
        model = whole(auto_class("classification"), path, new_head=True, dtype=torch.float32, **head(labels))
    model.stored_dtype = _stored_dtype(Path(path))
    _pad_as_the_tokenizer(model, path)
    return model


def _check_order(path: Path, labels: Sequence[str]) -> None:
    """Raise ModelError if the model has the same labels in another order."""
    from transformers import AutoConfig

    named = AutoConfig.from_pretrained(path, trust_remote_code=False).id2label
    own = [str(named[output]) for output in sorted(named)]
    theirs, ours = ([label.casefold() for label in each] for each in (own, labels))
    if theirs != ours and sorted(theirs) == sorted(ours):
        raise ModelError(
            f"`model.labels` are {', '.join(labels)}, but the outputs of the model in {path} are {', '.join(own)}, and "
            "its head is kept: give the labels in that order"
        )


def _pad_as_the_tokenizer(model, path: Path) -> None:
    """Set the model's padding id to the tokenizer's: decoder models classify at the last token before the padding.

    Models that count positions from their padding id keep their own.
    """
    if model.config.model_type not in configuration.BEHIND_PADDING:
        model.config.pad_token_id = tokenizer(path).pad_token_id


def head(labels: Sequence[str]) -> dict:
    """The entries for labels in a model's configuration."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def auto_class(task: str):
    """The class of transformers that loads models for a task."""
    import transformers

    match task:
        case "causal":
            return transformers.AutoModelForCausalLM
        case "seq2seq":
            return transformers.AutoModelForSeq2SeqLM
        case "classification":
            return transformers.AutoModelForSequenceClassification
    raise ModelError(f"there is no model class for the task {task!r}")


def _stored_dtype(folder: Path):
    """The number format that most of the weights have on disk."""
    import torch
    from safetensors import safe_open

    formats: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                tensor = weights.get_slice(name)
                formats[tensor.get_dtype()] += math.prod(tensor.get_shape())
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return known.get(formats.most_common(1)[0][0], torch.float32)
