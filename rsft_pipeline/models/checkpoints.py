"""Checkpoints: weights on disk, named by the digest of their content.

A checkpoint is a folder in the Hugging Face format named after the digest of its content, with a `meta.json` (where it
came from) and a `README.md` (the model card) that are not part of the digest. Weights are written as safetensors only.

Belongs here: saving, describing and verifying them. Not: loading (the package itself).
"""

import contextlib
import json
import logging
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from rsft_pipeline import lineage

log = logging.getLogger(__name__)

# The files that are a model's content: weights, configuration, tokenizer, chat template.
CONTENT = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.codes")
META = "meta.json"


class ModelError(RuntimeError):
    """A model that cannot be found, read or trained as asked."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and the content digest that identifies them wherever they are."""

    digest: str
    path: Path


def save(model, tokenizer, root: Path, meta: dict, card: str) -> Checkpoint:
    """Write a checkpoint to `root/<digest>`, whole or not at all; an undamaged one that exists already is kept.

    Partial files of a killed process are deleted after a day.

    Adapters are merged in float32, and the weights then rounded to the format that the base has on
    disk. Both happen in place: the model is used up; load the checkpoint to continue.

    Args:
        meta: what to record in `meta.json`, besides the digest and each file's SHA-256.
        card: text of the README.md.
    """
    root = Path(root)
    _delete_partial(root)
    temporary = root / f"{_SAVING}{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        _write(model, tokenizer, temporary)
        files = _file_digests(temporary)
        saved = Checkpoint(_digest_of(files), root / _digest_of(files))
        (temporary / META).write_text(_as_json({**meta, "digest": saved.digest, "files": files}), "utf-8")
        (temporary / "README.md").write_text(card, "utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        _move(temporary, saved)
        _sync(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return saved


_SAVING = ".saving-"  # how folders begin whose checkpoint is not complete


def _delete_partial(root: Path) -> None:
    for left in root.glob(f"{_SAVING}*"):
        with contextlib.suppress(FileNotFoundError):  # its process has just finished saving
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left)


def _write(model, tokenizer, folder: Path) -> None:
    stored = getattr(model, "stored_dtype", model.dtype)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)
    if tokenizer.is_fast:  # otherwise the padding and truncation of the last batch would be saved too
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    no_bars()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _move(temporary: Path, saved: Checkpoint) -> None:
    """Put a complete folder in its place, unless the same checkpoint is there already; a damaged one makes way."""
    try:
        temporary.rename(saved.path)
    except OSError:
        if not saved.path.is_dir():
            raise
        if not _intact(saved):
            aside = saved.path.with_name(f"{saved.digest}-damaged-{uuid.uuid4().hex[:8]}")
            saved.path.rename(aside)
            temporary.rename(saved.path)
            log.warning("%s was damaged: what was there is in %s", saved.path, aside)


def describe(saved: Checkpoint, meta: dict, card: str) -> None:
    """Rewrite a checkpoint's `meta.json` and README.md; the recorded digests of its files are kept."""
    replace(saved.path / META, _as_json({**meta, "digest": saved.digest, "files": read_meta(saved.path)["files"]}))
    write_card(saved.path, card)


def write_card(folder: Path, text: str) -> None:
    """Replace the model card, which is not part of the checkpoint's digest."""
    replace(folder / "README.md", text)


def replace(file: Path, text: str) -> None:
    """Write a file whole or not at all, even if the machine fails meanwhile."""
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    temporary.write_text(text, "utf-8")
    _sync(temporary)
    temporary.replace(file)
    _sync(file.parent)


def _as_json(meta: dict) -> str:
    return json.dumps(meta, indent=2, sort_keys=True, ensure_ascii=False)


def content_digest(folder: Path) -> str:
    """Digest of the model in a folder: names and bytes of its CONTENT files."""
    return _digest_of(_file_digests(Path(folder)))


def read_meta(path: Path) -> dict:
    """What was recorded when the checkpoint was saved; empty for a model that came from elsewhere."""
    file = Path(path) / META
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def verify(saved: Checkpoint, anew: bool = False) -> list[str]:
    """Names of the files that differ from what was saved: changed, missing or added since.

    `meta.json` is among them if it is the record of other weights, such as another folder's.

    Args:
        anew: hash files again that this process has hashed before, even if their size and time are the same.

    Raises:
        ModelError: there is no record to compare with.
    """
    match read_meta(saved.path):
        case {"files": dict(then), "digest": str(digest)}:
            pass
        case _:
            raise ModelError(f"{saved.path} has no {META} with file digests: it was not saved as a checkpoint")
    if anew:
        _digests.clear()
    now = _file_digests(saved.path)
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if not _digest_of(then) == digest == saved.digest:
        changed.append(META)
    return changed


def _intact(saved: Checkpoint) -> bool:
    try:
        return not verify(saved)
    except (ModelError, ValueError, OSError):  # its record is gone or unreadable
        return False


def _digest_of(files: dict[str, str]) -> str:
    return lineage.digest(sorted(files.items()))


def _file_digests(folder: Path) -> dict[str, str]:
    """File name → SHA-256 of every CONTENT file."""
    names = {path.name for pattern in CONTENT for path in folder.glob(pattern)} - {META}
    return {name: _file_digest(folder.resolve() / name) for name in sorted(names)}


# SHA-256 of files by device, inode, size and time, so that large weights are read once even if their folder is renamed.
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


def no_bars() -> None:
    """Turn off Transformers' progress bars for single files: they would disturb ours (progress.py)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
