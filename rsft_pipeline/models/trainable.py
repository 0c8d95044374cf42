"""Trainable: which of a model's weights are trained: all, adapters, the last layers, or all but some.

Not: training them (training.py).
"""

import difflib
import fnmatch
import re
import warnings
from collections.abc import Iterable

from rsft_pipeline import devices
from rsft_pipeline.models import configuration
from rsft_pipeline.models.checkpoints import ModelError
from rsft_pipeline.recipe.model import Model


def select_trainable(model, config: Model, seed: int = 0):
    """Set `requires_grad` as `config.train` says.

    With `last_layers`, the last blocks, the final norm and the head are trained. A head whose weights
    are also the input embedding stays fixed: training it would change the input of every frozen block.

    Args:
        seed: for the random initial weights of the adapters, with `lora`.

    Returns:
        The model (wrapped by peft with `lora`), the number of trainable parameters, and of all.

    Raises:
        ModelError: `train` does not fit this model, nothing is left to train, or peft is missing.
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
    lora, kind, heads = config.lora, "CAUSAL_LM", []
    if not model.can_generate():  # a classifier's head may be new, so it is trained in full
        kind, heads = "SEQ_CLS", list(_heads(model))
    elif model.config.is_encoder_decoder:
        kind = "SEQ_2_SEQ_LM"
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        modules_to_save=heads or None,
        exclude_modules=rf"({'|'.join(map(re.escape, heads))})(\..*)?" if heads else None,
        task_type=kind,
    )
    with devices.own_rng(model.device.type), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft uses an old name
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, settings)
        except ValueError as error:  # one of the names is no module's
            raise ModelError(f"`model.lora.targets` is {lora.targets!r}: {error}") from None
    _check_untied(adapted, lora.targets)
    return adapted


def _check_untied(adapted, targets: str | list[str]) -> None:
    """Refuse adapters on tied embedding and head: merging an adapter of one would change the other too."""
    inner = adapted.get_base_model()
    ends = [end for end in (inner.get_input_embeddings(), inner.get_output_embeddings()) if end is not None]
    weights = [getattr(end, "base_layer", end).weight for end in ends]
    if any(hasattr(end, "base_layer") for end in ends) and len(weights) > len({id(weight) for weight in weights}):
        raise ModelError(
            f"`model.lora.targets` is {targets!r}, but this model's embedding and head are one matrix: leave both out"
        )


def _train_last_layers(model, count: int) -> None:
    import torch

    depth = configuration.depth_of(model.config)
    if count > depth:
        raise ModelError(f"`last_layers: {count}`, but the model has {depth} transformer blocks")
    whole = model.get_decoder() if model.config.is_encoder_decoder else model
    lists = {n: module for n, module in whole.named_modules() if isinstance(module, torch.nn.ModuleList)}
    path, blocks = next(((name, blocks) for name, blocks in lists.items() if len(blocks) == depth), (None, None))
    if blocks is None:  # ALBERT uses one block for all layers
        raise ModelError("`train: last_layers`: this model's blocks cannot be told apart: use `train: freeze`")
    decoder = whole.get_submodule(path.rpartition(".")[0])
    norms = [m for name, m in decoder.named_children() if "Norm" in type(m).__name__ and "embed" not in name]
    heads = _heads(model).values()
    model.requires_grad_(False)
    for module in [*blocks[-count:], *norms, *heads]:
        module.requires_grad_(True)
    embedding = model.get_input_embeddings()
    if any(weight is embedding.weight for module in heads for weight in module.parameters()):
        embedding.requires_grad_(False)


def _heads(model) -> dict:
    """The modules with weights above the blocks, by name, including the pooler, which may be as new as the head."""
    body = {model.base_model_prefix, "shared", "encoder", "decoder"}  # T5's encoder and decoder are beside its head
    heads = {name: module for name, module in model.named_children() if name not in body}
    if pooler := getattr(model.base_model, "pooler", None):
        heads[f"{model.base_model_prefix}.pooler"] = pooler
    return {name: module for name, module in heads.items() if list(module.parameters())}


def _freeze(model, patterns: Iterable[str]) -> None:
    names = dict(model.named_parameters(remove_duplicate=False))  # a tied weight has both its names
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
