"""Embeddings: texts as vectors of length 1, and how near they are to each other.

Belongs here: the two ways to make vectors, and cosines in bounded memory. Does not: what nearness is good or
bad for (dialogue).
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Union

import numpy as np

from rsft_pipeline.devices import Device

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Vectors = Union[np.ndarray, "csr_matrix"]  # float32 [texts, dimensions], dense or sparse
Embed = Callable[[Sequence[str]], Vectors]

HASHING = "hashing"  # the name of the vectors that need no model
BLOCK = 1024, 8192  # rows of the two sides whose cosines are held at once: 32 MiB of float32


def require() -> str:
    """The release of sentence-transformers. Raises ImportError, with the remedy, when it is not installed."""
    try:
        return importlib.metadata.version("sentence-transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            "sentence embeddings need sentence-transformers: pip install 'rsft-pipeline[embeddings]'; "
            f"`model: {HASHING}` does without"
        ) from None


def hashing(texts: Sequence[str]) -> "csr_matrix":
    """Counts of the texts' runs of 3 to 5 characters inside words, hashed to 2²⁰ places.

    They tell which spellings are shared and nothing of what is meant: «film» and «movie» have nothing in common.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    vectoriser = HashingVectorizer(
        analyzer="char_wb", ngram_range=(3, 5), n_features=2**20, alternate_sign=False, norm="l2", dtype=np.float32
    )
    return vectoriser.transform(texts)


class Sentences:
    """A model of sentence-transformers on a device, in float32.

    Args:
        model: local folder, or hub id.
        revision: commit or tag on the hub.

    Raises:
        ImportError: sentence-transformers is not installed. OSError: no such model, or none with safetensors.
    """

    def __init__(self, model: str, revision: str | None, batch_size: int, device: Device):
        require()
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading; progress is ours to show
        try:
            self.model = SentenceTransformer(
                model,
                revision=revision,
                device=device.kind,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        except OSError as error:
            raise OSError(
                f"the model {model} could not be loaded: {error}\n"
                f"`model: /path/to/folder` uses one that is on this machine, `model: {HASHING}` does without"
            ) from error
        self.model.float()  # in half precision a text would be less than like itself
        if hasattr(self.model.tokenizer, "truncation_side"):  # static embeddings cut nothing
            self.model.tokenizer.truncation_side = "left"  # of a long dialogue, the end matters
        self.batch_size = batch_size

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.encode(
            list(texts), batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False
        )


def cosines(left: Vectors, right: Vectors) -> list[float]:
    """The cosine of each row with the row beside it."""
    product = left.multiply(right) if hasattr(left, "multiply") else left * right
    return np.clip(np.asarray(product.sum(axis=1)).ravel(), -1.0, 1.0).tolist()


def nearest(rows: Vectors, others: Vectors) -> list[float]:
    """The largest cosine of each row with any of the others, of which there is one at least."""
    height, width = BLOCK
    largest = np.full(rows.shape[0], -1.0, np.float32)
    for i in range(0, rows.shape[0], height):
        for j in range(0, others.shape[0], width):
            block = rows[i : i + height] @ others[j : j + width].T
            best = block.max(axis=1)
            best = best.toarray().ravel() if hasattr(best, "toarray") else best
            largest[i : i + height] = np.maximum(largest[i : i + height], best)
    return np.minimum(largest, 1.0).tolist()
