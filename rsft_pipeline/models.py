"""Models: weights on disk and in memory, and which of them train.

Belongs here: finding the base model, loading, saving and verifying checkpoints, and choosing the
trainable parameters. Does not: how a small model is made (bootstrap.py) or trained (training.py).

A checkpoint is a folder in the Hugging Face format named after the digest of its content, with a
`meta.json` (where it came from) and a `README.md` (the model card) that are not part of the digest.
Weights are read and written as safetensors only, and no code that comes with a model is ever run.
"""

import contextlib
import difflib
import fnmatch
import functools
import inspect
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsft_pipeline import lineage
from rsft_pipeline.devices import Device
from rsft_pipeline.recipe.model import Model
from rsft_pipeline.recipe.recipe import Recipe

# What a model's content is: weights, configuration, tokenizer, chat template.
CONTENT = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.codes")
META = "meta.json"
POINT_TO_A_FOLDER = "To use a model that is on this machine: --set {field}.source=/path/to/folder"


class ModelError(RuntimeError):
    """A model that cannot be found, read or trained as asked."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and the content digest that names them wherever they lie."""

    digest: str
    path: Path


# --- finding the base -------------------------------------------------------------------------


def base(
    recipe: Recipe, home: Path, on_step: Callable[[int, int, float, int], None] = lambda step, steps, loss, tokens: None
) -> Checkpoint:
    """The weights that a first round starts from: bootstrapped, a local folder used in place, or from the hub.

    Args:
        home: what is made on this machine is kept in its `models` folder, and made only once.
        on_step: progress of a warm-up, see `training.fit`.

    Raises:
        ModelError: the model cannot be fetched, or has no safetensors weights.
    """
    from rsft_pipeline import bootstrap  # it saves what it makes with this module

    wanted, root = recipe.model, bases(home)
    if wanted.source == "bootstrap":
        return bootstrap.build(recipe, root, on_step)
    found = fetch(recipe, "model", wanted.source, wanted.revision)
    return bootstrap.prepare(recipe, found, root, on_step) if wanted.warm_up or wanted.labels else found


def check(recipe: Recipe) -> None:
    """See that the models that the recipe names can be had, before one is made or loaded. A hub is not asked.

    Raises:
        ModelError: a folder that is not there or holds no weights, or what a model would be made of is not right.
    """
    if recipe.model.bootstrap or recipe.model.warm_up:
        from rsft_pipeline import bootstrap

        bootstrap.check(recipe)
    named = {"model": recipe.model, "sampling.teacher": recipe.sampling.teacher}
    for field, wanted in named.items():
        if wanted and wanted.source != "bootstrap" and (folder := _local(recipe, field, wanted.source)):
            _check_folder(folder)


def bases(home: Path) -> Path:
    """The folder of the base models that were made on this machine."""
    return Path(home) / "models"


def made(root: Path, digest: str) -> Checkpoint | None:
    """Such a model, if it is still there. Raises ModelError when it has changed since."""
    folder = root / digest
    if not folder.is_dir():
        return None
    if changed := verify(folder):
        raise ModelError(
            f"{folder} is not the model that was made there: {', '.join(changed)} changed since. "
            "Move the folder away, and it is made again"
        )
    return Checkpoint(digest, folder)


def teacher(recipe: Recipe, student: Path) -> Checkpoint:
    """The weights of the recipe's teacher.

    Raises:
        ModelError: it cannot be fetched, or its token ids mean other text than the student's.
    """
    wanted = recipe.sampling.teacher
    found = fetch(recipe, "sampling.teacher", wanted.source, wanted.revision)
    if tokenizer(found.path).get_vocab() != tokenizer(student).get_vocab():
        raise ModelError(
            f"sampling.teacher {wanted.source!r} has another vocabulary than the policy: training is on the very token "
            "ids that were drawn, so teacher and policy need the same tokenizer"
        )
    return found


def fetch(recipe: Recipe, field: str, source: str, revision: str | None) -> Checkpoint:
    """A model of a recipe's field: a local folder, or from the hub. Raises ModelError, naming the field."""
    folder = _local(recipe, field, source) or _download(field, source, revision)
    _check_folder(folder)
    return Checkpoint(content_digest(folder), folder)


def _local(recipe: Recipe, field: str, source: str) -> Path | None:
    """The folder that a source means; None for one that the hub is to have."""
    folder = recipe.path(source)
    if folder.is_dir():
        return folder
    if source.startswith(("/", ".", "~")):
        raise ModelError(f"{field}.source is {source!r}: there is no folder {folder}")
    return None


def _download(field: str, model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            model_id, revision=revision, allow_patterns=list(CONTENT), ignore_patterns=["*/*", "consolidated*"]
        )
    except (OSError, ValueError) as error:  # every error of the hub's client is one of the two
        wanted = model_id if revision is None else f"{model_id} at {revision}"
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"the model {wanted} is neither a local folder nor could it be fetched from the hub: {reason}\n"
            f"{POINT_TO_A_FOLDER.format(field=field)}"
        ) from error
    return Path(folder)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model: there is no config.json. {POINT_TO_A_FOLDER.format(field='model')}")
    if not any(folder.glob("*.safetensors")):
        found = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
        raise ModelError(
            f"{folder} has no *.safetensors weights{f', only {found[0]}' if found else ''}: weights are read from "
            "safetensors only, because other formats can run code when they are opened. Convert them with "
            "transformers' save_pretrained"
        )


# --- loading ----------------------------------------------------------------------------------


def tokenizer(path: Path):
    """The model's tokenizer; where it has no padding token, EOS serves (padding is masked by position).

    Raises:
        ModelError: when it has neither.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if loaded.pad_token_id is None:
        if loaded.eos_token_id is None:
            raise ModelError(f"the tokenizer in {path} has neither a padding nor an end-of-sequence token")
        loaded.pad_token = loaded.eos_token
    return loaded


def load(path: Path, device: Device, train: bool = False, task: str = "causal"):
    """The model on the device, in evaluation mode.

    Its weights are in the device's number format, or in float32 to be trained: updates smaller than
    what bf16 can hold would be lost otherwise.
    """
    import torch

    _no_bars()
    _check_folder(Path(path))
    model = whole(auto_class(task), path, dtype=torch.float32 if train else device.torch_dtype)
    if task != "classification" and "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"{path}: a {type(model).__name__} keeps no keys and values, which draws would go on from")
    model.stored_dtype = _stored_dtype(Path(path))
    if task == "classification":
        _pad_as_the_tokenizer(model, path)
    return model.to(device.kind).eval()


def whole(made_with: Any, source: Path | str, *, new_head: bool = False, **how: Any):
    """A model read from safetensors, every weight of it: Transformers would make those that are missing from nothing.

    Args:
        made_with: a class of transformers.
        source: local folder, or hub id.
        new_head: whether what stands above the encoder may be random. So may a pooler: nobody trains one before.
        how: for `from_pretrained`.

    Raises:
        ModelError: weights are missing, or of another shape than the configuration says. OSError: no such model.
    """
    model, read = made_with.from_pretrained(
        source,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # named below
        **how,
    )
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

    A head that is there and has as many outputs is kept; a new one is random, and follows from the seed.

    Raises:
        ModelError: the model has these labels in another order.
    """
    import torch

    _no_bars()
    _check_order(path, labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = whole(auto_class("classification"), path, new_head=True, dtype=torch.float32, **head(labels))
    _pad_as_the_tokenizer(model, path)
    return model


def _check_order(path: Path, labels: Sequence[str]) -> None:
    """Raise ModelError where the labels would be given to each other's outputs."""
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
    """Decoder models find a text's last token, where they classify, by the padding behind it."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer(path).pad_token_id


def head(labels: Sequence[str]) -> dict:
    """What a model's configuration says of its labels."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _no_bars() -> None:
    """Progress is ours to show (progress.py): bars for single files only get in its way."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def stop_ids(model, tokenizer) -> set[int]:
    """Ids after which a completion has ended: the generation config's and the tokenizer's EOS."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def start_id(model) -> int:
    """The id that an encoder-decoder's completions follow, and that is no part of them.

    Raises:
        ModelError: the model's configuration has none.
    """
    for config in (model.config, model.generation_config):
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            return start
    raise ModelError("the model's configuration has no `decoder_start_token_id`, from which its decoder would write on")


def end_id(model, tokenizer) -> int:
    """The id that a completion of the model ends with: the generation config's; of several the tokenizer's EOS."""
    configured = model.generation_config.eos_token_id
    if isinstance(configured, list):
        configured = tokenizer.eos_token_id if tokenizer.eos_token_id in configured else configured[0]
    return tokenizer.eos_token_id if configured is None else configured


def context_length(path: Path) -> int | None:
    """Tokens that prompt and completion have room for; None where the model's configuration sets no bound."""
    from transformers import AutoConfig

    return context_of(AutoConfig.from_pretrained(path, trust_remote_code=False))


# RoBERTa and what was made after it: position ids begin behind that of padding, and those before are no token's.
_BEHIND_PADDING = {
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}


def first_position(config) -> int:
    """The position id of a text's first token."""
    config = config.get_text_config(decoder=True)
    return config.pad_token_id + 1 if config.model_type in _BEHIND_PADDING else 0


def context_of(config) -> int | None:
    """The same of a configuration.

    Where a row past the original context changes the frequencies of all rows beside it (Phi's `longrope`), that is the
    context: what a draw is must not depend on its batch.
    """
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    context = getattr(config, "max_position_embeddings", None)
    if context is not None:
        context -= first_position(config)
    return rope.get("original_max_position_embeddings", context) if rope.get("rope_type") == "longrope" else context


def auto_class(task: str):
    """The transformers class that models of a task are made with."""
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
    with safe_open(min(folder.glob("*.safetensors")), framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (not a mapping)
            tensor = weights.get_slice(name)
            formats[tensor.get_dtype()] += functools.reduce(int.__mul__, tensor.get_shape(), 1)
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return known.get(formats.most_common(1)[0][0], torch.float32)


# --- what trains ------------------------------------------------------------------------------


def select_trainable(model, config: Model, seed: int = 0):
    """Set `requires_grad` as `config.train` says.

    With `last_layers` the last blocks, the final norm and the head train. A head whose weights are
    also the input embedding stays fixed: training it would change what every frozen block reads.

    Args:
        seed: of the adapters' random start, with `lora`.

    Returns:
        The model (wrapped by peft with `lora`), the number of parameters that train, and of all.

    Raises:
        ModelError: a freeze pattern that matches nothing, nothing left to train, or peft missing.
    """
    match config.train:
        case "all":
            model.requires_grad_(True)
        case "lora":
            model = _with_adapters(model, config, seed)
        case "last_layers":
            _train_last_layers(model, config.last_layers)
        case "freeze":
            _freeze(model, config.freeze)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if trainable == 0:
        raise ModelError(f"`train: {config.train}` leaves none of the {total} parameters to train")
    return model, trainable, total


def _with_adapters(model, config: Model, seed: int):
    import torch

    try:
        import peft
    except ImportError:
        raise ModelError("`train: lora` needs peft: pip install 'rsft-pipeline[lora]'") from None
    lora, kind, whole = config.lora, "CAUSAL_LM", None
    if not model.can_generate():
        kind, whole = "SEQ_CLS", r"(.*\.)?(\w*classifier|score)(\..*)?"  # which peft then trains whole
    elif model.config.is_encoder_decoder:
        kind = "SEQ_2_SEQ_LM"
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        exclude_modules=whole,
        task_type=kind,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, settings)
        except ValueError as error:  # no module has one of the names
            raise ModelError(f"`model.lora.targets` is {lora.targets!r}: {error}") from None
    _check_untied(adapted, lora.targets)
    return adapted


def _check_untied(adapted, targets: str | list[str]) -> None:
    """Merged into weights that are embedding and head at once, an adapter of one would change the other too."""
    inner = adapted.get_base_model()
    ends = [end for end in (inner.get_input_embeddings(), inner.get_output_embeddings()) if end is not None]
    weights = [getattr(end, "base_layer", end).weight for end in ends]
    if any(hasattr(end, "base_layer") for end in ends) and len(weights) > len({id(weight) for weight in weights}):
        raise ModelError(
            f"`model.lora.targets` is {targets!r}, but this model's embedding and head are one matrix: leave both out"
        )


def _train_last_layers(model, count: int) -> None:
    import torch

    config = model.config.get_text_config(decoder=True)
    depth = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    if count > depth:
        raise ModelError(f"`last_layers: {count}`, but the model has {depth} transformer blocks")
    whole = model.get_decoder() if model.config.is_encoder_decoder else model
    path, blocks = next(
        (name, module)
        for name, module in whole.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    )
    decoder = whole.get_submodule(path.rpartition(".")[0])
    norms = [m for name, m in decoder.named_children() if "Norm" in type(m).__name__ and "embed" not in name]
    body = {model.base_model_prefix, "shared", "encoder", "decoder"}  # T5 has its two halves beside its head
    heads = [module for name, module in model.named_children() if name not in body]
    if pooler := getattr(model.base_model, "pooler", None):
        heads.append(pooler)
    model.requires_grad_(False)
    for module in [*blocks[-count:], *norms, *heads]:
        module.requires_grad_(True)
    embedding = model.get_input_embeddings()
    if any(getattr(module, "weight", None) is embedding.weight for module in heads):
        embedding.requires_grad_(False)


def _freeze(model, patterns: Iterable[str]) -> None:
    names = dict(model.named_parameters(remove_duplicate=False))  # a tied weight answers to both its names
    model.requires_grad_(True)
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ModelError(
                f"`freeze` pattern {pattern!r} matches no parameter. "
                f"{'Near: ' + ', '.join(near) if near else 'Parameters are named like ' + next(iter(names))}"
            )
        for name in matched:
            names[name].requires_grad_(False)


# --- checkpoints ------------------------------------------------------------------------------


def save(model, tokenizer, root: Path, meta: dict, card: str) -> Checkpoint:
    """Write a checkpoint to `root/<digest>`, whole or not at all; one that is there already is kept.

    What a killed process had written of one goes after a day.

    Adapters are merged in float32 and the weights then rounded to the format that the base has on
    disk. Both happen in place: the model is spent, load the checkpoint to go on.

    Args:
        meta: what to record in `meta.json`, beside the digest and each file's SHA-256.
        card: text of the README.md.
    """
    stored = getattr(model, "stored_dtype", model.dtype)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)
    if tokenizer.is_fast:  # what the last batch was padded to is no part of a tokenizer, yet it would be saved
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()

    _no_bars()
    for left in Path(root).glob(".saving-*"):
        with contextlib.suppress(FileNotFoundError):  # it was saved this moment
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left)
    temporary = Path(root) / f".saving-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        files = _file_digests(temporary)
        saved = Checkpoint(_digest_of(files), Path(root) / _digest_of(files))
        (temporary / META).write_text(_as_json({**meta, "digest": saved.digest, "files": files}), "utf-8")
        (temporary / "README.md").write_text(card, "utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        try:
            temporary.rename(saved.path)
        except OSError:
            if not saved.path.is_dir():  # else the same was saved before
                raise
        _sync(saved.path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return saved


def describe(saved: Checkpoint, meta: dict, card: str) -> None:
    """Write what is said of a checkpoint anew: `meta.json` and README.md."""
    _replace(saved.path / META, _as_json({**meta, "digest": saved.digest, "files": _file_digests(saved.path)}))
    write_card(saved.path, card)


def write_card(folder: Path, text: str) -> None:
    """Put a card in place of an earlier one; it is no part of the checkpoint's digest."""
    _replace(folder / "README.md", text)


def _replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    temporary.write_text(text, "utf-8")
    temporary.replace(file)


def _as_json(meta: dict) -> str:
    return json.dumps(meta, indent=2, sort_keys=True, ensure_ascii=False)


def content_digest(folder: Path) -> str:
    """Digest of what the model in a folder is: names and bytes of its CONTENT files."""
    return _digest_of(_file_digests(Path(folder)))


def read_meta(path: Path) -> dict:
    """What was recorded when the checkpoint was saved; empty for a model that came from elsewhere."""
    file = Path(path) / META
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def verify(path: Path) -> list[str]:
    """Names of the files that are not as they were saved: changed, missing or added since.

    Raises:
        ModelError: when there is no record to compare with.
    """
    record = read_meta(path)
    if "files" not in record:
        raise ModelError(f"{path} has no {META} with file digests: it was not saved as a checkpoint")
    now, then = _file_digests(Path(path)), record["files"]
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if _digest_of(then) != record["digest"]:
        changed.append(META)
    return changed


def _digest_of(files: dict[str, str]) -> str:
    return lineage.digest(sorted(files.items()))


def _file_digests(folder: Path) -> dict[str, str]:
    """File name → SHA-256 of every CONTENT file."""
    names = {path.name for pattern in CONTENT for path in folder.glob(pattern)} - {META}
    return {name: _file_digest(folder.resolve() / name) for name in sorted(names)}


# SHA-256 of files by device, inode, size and time: large weights are read once, also where their folder is renamed.
_digests: dict[tuple[int, int, int, int], str] = {}


def _file_digest(file: Path) -> str:
    status = file.stat()
    identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if identity not in _digests:
        _digests[identity] = lineage.file_digest(file)
    return _digests[identity]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
