"""Configuration: what a model says of its texts: where they begin and end, how long they may be, which ids exist.

Not: its weights (the package itself).
"""

import math
from pathlib import Path

from rsft_pipeline.models.checkpoints import ModelError

# --- where texts begin and end ------------------------------------------------------------------


def stop_ids(model, tokenizer) -> set[int]:
    """Ids after which a completion has ended: the generation config's and the tokenizer's EOS."""
    return ends(model.generation_config, tokenizer)


def ends(generation, tokenizer) -> set[int]:
    """The same from a generation config alone, for a model that is not loaded; see `generation`."""
    configured = generation.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def start_id(model) -> int:
    """The id from which an encoder-decoder's decoder starts; it is not part of a completion.

    Raises:
        ModelError: the model's configuration has none.
    """
    for config in (model.config, model.generation_config):
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            return start
    raise ModelError("the model's configuration has no `decoder_start_token_id`, from which its decoder would write on")


def begin_ids(model) -> list[int]:
    """The ids before an encoder-decoder's text in a completion: BART was trained on texts that begin with its `<s>`.

    Such a model's configuration forces the token on what it generates. Our draws do not: the model writes it itself.
    """
    forced = model.generation_config.forced_bos_token_id if model.config.is_encoder_decoder else None
    return [] if forced is None else [forced]


def end_id(model, tokenizer) -> int:
    """The id that ends a completion: the generation config's, or the tokenizer's EOS if that is one of several there.

    Raises:
        ModelError: neither has one.
    """
    configured = model.generation_config.eos_token_id
    if isinstance(configured, list):
        configured = tokenizer.eos_token_id if tokenizer.eos_token_id in configured else configured[0]
    if (end := tokenizer.eos_token_id if configured is None else configured) is None:
        raise ModelError("neither the model's generation config nor its tokenizer has an end-of-sequence token")
    return end


def generation(path: Path):
    """The generation config of a model that is not loaded."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # then its configuration may say it
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, trust_remote_code=False))


# --- how long they may be, and which ids exist --------------------------------------------------


def context_length(path: Path) -> int | None:
    """How many tokens prompt and completion may have; None if the model's configuration sets no bound.

    Raises:
        ModelError: the configuration cannot be read, or lacks the padding id from which positions are counted.
    """
    return context_of(read(path))


def vocabulary(path: Path) -> float:
    """How many token ids a model has, from 0. Raises ModelError if its configuration cannot be read."""
    return vocabulary_of(read(path))


def read(path: Path):
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{path}: its config.json makes no model: {error}") from error


# RoBERTa and its descendants: position ids begin after the padding id, and no token has a smaller one.
BEHIND_PADDING = {
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
    """The position id of a text's first token. Raises ModelError if it depends on a padding id that is not set."""
    config = config.get_text_config(decoder=True)
    if config.model_type not in BEHIND_PADDING:
        return 0
    if config.pad_token_id is None:
        raise ModelError(f"the model's configuration has no `pad_token_id`, from which a {config.model_type} counts on")
    return config.pad_token_id + 1


def context_of(config) -> int | None:
    """`context_length` from a configuration.

    With `longrope` (Phi), a row beyond the original context changes the frequencies of the whole batch, so the original
    context is the limit: a draw must not depend on its batch.
    """
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    context = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # the latter: MPT
    if context is not None:
        context = context - first_position(config) if context > 0 else None  # XLNet has -1 for no bound
    return rope.get("original_max_position_embeddings", context) if rope.get("rope_type") == "longrope" else context


def vocabulary_of(config) -> float:
    """How many token ids a model has, from 0; infinity without a `vocab_size` (the model reads characters)."""
    return getattr(config.get_text_config(decoder=True), "vocab_size", math.inf)


def depth_of(config) -> int:
    """Layers of the decoder; in a causal model that is all layers."""
    config = config.get_text_config(decoder=True)
    return getattr(config, "num_decoder_layers", None) or config.num_hidden_layers


def reads_both_ways(config) -> bool:
    """Whether the model is of a masked-language family such as BERT, and `is_decoder` does not make it causal."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder
