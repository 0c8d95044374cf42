"""Lineage: how prompts, candidates and sets of them are identified.

Belongs here: content hashes, ids, and the uniform draw that follows from an id. Nothing else, and
no imports beyond the standard library: every other module may depend on this one.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest(value: Any) -> str:
    """SHA-256 of the value as canonical JSON, the first 32 hex digits (128 bits)."""
    return hashlib.sha256(_CANONICAL.encode(value).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, all 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_digest(ids: Iterable[str]) -> str:
    """Digest of a set of ids, independent of their order."""
    return digest(sorted(ids))


def normalise(text: str) -> str:
    """Unicode NFC with white space collapsed to single spaces and trimmed: what «the same text» means here."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def prompt_id(text: str) -> str:
    """Id of a prompt: the hash of its exact rendered text, since even another space gives other tokens."""
    return digest(["prompt", text])


def same_text(text: str) -> str:
    """The hash of the normalised text, equal for prompts that look the same to people. It used to be a prompt's id."""
    return digest(["prompt", normalise(text)])


def question(values: Iterable[str]) -> str:
    """Id of what is asked: the values of the columns that a prompt uses, whatever the template's wording and order."""
    return digest(["split", *sorted(map(normalise, values))])


def in_eval_split(question: str, fraction: float) -> bool:
    """Whether a question is held out."""
    return int(question[:15], 16) / 16**15 < fraction


def candidate_id(recipe: str, scope: str, policy: str, prompt: str, draw: int, settings: str) -> str:
    """Id of one draw, known before it is drawn, so that a repeated run resumes instead of drawing again.

    `scope` is the round's key, or `evaluation`: held-out draws of the same weights are shared by rounds.
    """
    return digest([recipe, scope, policy, prompt, draw, settings])


def seed_of(candidate: str, seed: int) -> int:
    """The 60-bit seed of a candidate's own random stream."""
    return int(digest(["seed", candidate, seed])[:15], 16)


def uniform(candidate: str, seed: int) -> float:
    """The u of a decision, in [0, 1): it depends only on the candidate and the recipe's seed.

    The same number as `acceptance.UNIFORM_SQL`: the upper 53 bits of the low half of an MD5.
    """
    low = int.from_bytes(hashlib.md5(f"{seed}:{candidate}".encode()).digest()[8:], "little")
    return (low >> 11) * 2.0**-53
